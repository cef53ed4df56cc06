//! The endpoints under `/simulator`, which read and change accounts, faults and counters while the
//! simulator runs. Bodies are parsed as JSON whatever their content type, so that a plain `curl -d`
//! works.

use std::{fmt::Display, sync::Arc};

use axum::{
    Json, Router,
    extract::{Path, State},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use bytes::Bytes;
use http::StatusCode;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    faults::{Answer, Faults},
    upstream_state::UpstreamState,
};

pub(super) fn routes() -> Router<Arc<UpstreamState>> {
    Router::new()
        .route("/accounts", get(accounts))
        .route("/accounts/{client_id}", put(put_account).delete(delete_account))
        .route("/faults", get(faults).put(put_faults).patch(patch_faults))
        .route("/counts", get(counters))
        .route("/live", post(live))
        .route("/reset", post(reset))
}

/// The body of `PUT /simulator/accounts/{client_id}`. Absent fields leave the account as it is.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AccountChange {
    client_secret: Option<String>,
    locked: Option<bool>,
    script: Option<Vec<Answer>>,
}

/// The body of `POST /simulator/live`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LiveRequest {
    token: String,
}

async fn accounts(State(state): State<Arc<UpstreamState>>) -> Response {
    Json(state.accounts()).into_response()
}

async fn put_account(
    State(state): State<Arc<UpstreamState>>,
    Path(client_id): Path<String>,
    body: Bytes,
) -> Result<StatusCode, BadRequest> {
    let change: AccountChange = parse(&body)?;
    for answer in change.script.iter().flatten() {
        answer.check().map_err(BadRequest::new)?;
    }
    if !state.put_account(&client_id, change.client_secret.as_deref(), change.locked) {
        return Err(BadRequest::new("a new account needs a client_secret"));
    }
    if let Some(script) = change.script {
        state.script(&client_id, script);
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn delete_account(
    State(state): State<Arc<UpstreamState>>,
    Path(client_id): Path<String>,
) -> StatusCode {
    if state.remove_account(&client_id) { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND }
}

async fn faults(State(state): State<Arc<UpstreamState>>) -> Json<Faults> {
    Json(state.faults())
}

/// Replaces the faults. Absent fields get the values with which the simulator started.
async fn put_faults(
    State(state): State<Arc<UpstreamState>>,
    body: Bytes,
) -> Result<Json<Faults>, BadRequest> {
    change_faults(&state, state.initial_faults(), &body)
}

/// Changes the faults. Absent fields keep their values.
async fn patch_faults(
    State(state): State<Arc<UpstreamState>>,
    body: Bytes,
) -> Result<Json<Faults>, BadRequest> {
    change_faults(&state, &state.faults(), &body)
}

fn change_faults(
    state: &UpstreamState,
    base: &Faults,
    body: &[u8],
) -> Result<Json<Faults>, BadRequest> {
    let faults = base.changed_by(parse(body)?).map_err(BadRequest::new)?;
    state.set_faults(faults.clone());
    Ok(Json(faults))
}

async fn counters(State(state): State<Arc<UpstreamState>>) -> Response {
    Json(state.counters()).into_response()
}

/// Returns whether a token is live. The answer also has the client id of a live token, or the error code
/// with which another token would be refused.
async fn live(
    State(state): State<Arc<UpstreamState>>,
    body: Bytes,
) -> Result<Json<Value>, BadRequest> {
    let LiveRequest { token } = parse(&body)?;
    Ok(Json(match state.look_up(&token) {
        Ok((client_id, token)) => {
            json!({"live": true, "client_id": client_id, "expires_at": token.expires_at})
        }
        Err(error) => json!({"live": false, "code": error.code}),
    }))
}

async fn reset(State(state): State<Arc<UpstreamState>>) -> StatusCode {
    state.reset();
    StatusCode::NO_CONTENT
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, BadRequest> {
    serde_json::from_slice(body).map_err(BadRequest::new)
}

/// A response with the status 400 and an error message.
struct BadRequest(String);

impl BadRequest {
    fn new(error: impl Display) -> Self {
        Self(error.to_string())
    }
}

impl IntoResponse for BadRequest {
    fn into_response(self) -> Response {
        (StatusCode::BAD_REQUEST, Json(json!({"error": self.0}))).into_response()
    }
}
