//! Accounts, faults and counts over HTTP, while the simulator runs. Bodies are read as JSON whatever
//! their content type, so that a plain `curl -d` works.

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
    registry::Registry,
};

pub(super) fn routes() -> Router<Arc<Registry>> {
    Router::new()
        .route("/accounts", get(accounts))
        .route("/accounts/{client_id}", put(put_account).delete(delete_account))
        .route("/faults", get(faults).put(put_faults).patch(patch_faults))
        .route("/counts", get(counts))
        .route("/live", post(live))
        .route("/reset", post(reset))
}

/// What `PUT /simulator/accounts/{client_id}` takes; what is absent stays.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AccountChange {
    client_secret: Option<String>,
    locked: Option<bool>,
    script: Option<Vec<Answer>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LiveRequest {
    token: String,
}

async fn accounts(State(registry): State<Arc<Registry>>) -> Response {
    Json(registry.accounts()).into_response()
}

async fn put_account(
    State(registry): State<Arc<Registry>>,
    Path(client_id): Path<String>,
    body: Bytes,
) -> Result<StatusCode, BadRequest> {
    let change: AccountChange = read(&body)?;
    for answer in change.script.iter().flatten() {
        answer.check().map_err(BadRequest::new)?;
    }
    if !registry.put_account(&client_id, change.client_secret.as_deref(), change.locked) {
        return Err(BadRequest::new("a new account needs a client_secret"));
    }
    if let Some(script) = change.script {
        registry.script(&client_id, script);
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn delete_account(
    State(registry): State<Arc<Registry>>,
    Path(client_id): Path<String>,
) -> StatusCode {
    if registry.remove_account(&client_id) { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND }
}

async fn faults(State(registry): State<Arc<Registry>>) -> Json<Faults> {
    Json(registry.faults())
}

/// Replaces the faults: what is absent is as at the start.
async fn put_faults(
    State(registry): State<Arc<Registry>>,
    body: Bytes,
) -> Result<Json<Faults>, BadRequest> {
    change_faults(&registry, registry.faults_at_start(), &body)
}

/// Changes the faults: what is absent stays.
async fn patch_faults(
    State(registry): State<Arc<Registry>>,
    body: Bytes,
) -> Result<Json<Faults>, BadRequest> {
    change_faults(&registry, &registry.faults(), &body)
}

fn change_faults(
    registry: &Registry,
    base: &Faults,
    body: &[u8],
) -> Result<Json<Faults>, BadRequest> {
    let faults = base.changed_by(read(body)?).map_err(BadRequest::new)?;
    registry.set_faults(faults.clone());
    Ok(Json(faults))
}

async fn counts(State(registry): State<Arc<Registry>>) -> Response {
    Json(registry.counts()).into_response()
}

async fn live(
    State(registry): State<Arc<Registry>>,
    body: Bytes,
) -> Result<Json<Value>, BadRequest> {
    let LiveRequest { token } = read(&body)?;
    Ok(Json(match registry.look_up(&token) {
        Ok((client_id, live)) => {
            json!({"live": true, "client_id": client_id, "expires_at": live.expires_at})
        }
        Err(refusal) => json!({"live": false, "code": refusal.code}),
    }))
}

async fn reset(State(registry): State<Arc<Registry>>) -> StatusCode {
    registry.reset();
    StatusCode::NO_CONTENT
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, BadRequest> {
    serde_json::from_slice(body).map_err(BadRequest::new)
}

/// A body that cannot be followed, and why.
struct BadRequest(String);

impl BadRequest {
    fn new(fault: impl Display) -> Self {
        Self(fault.to_string())
    }
}

impl IntoResponse for BadRequest {
    fn into_response(self) -> Response {
        (StatusCode::BAD_REQUEST, Json(json!({"error": self.0}))).into_response()
    }
}
