//! The simulated API: `POST /token`, and one protected call.

use std::{convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{ConnectInfo, State},
    response::{Html, IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use chrono::TimeDelta;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{
    connection::{Cut, Peer},
    faults::{Answer, status},
    registry::{Issued, Refusal, Registry},
};
use crate::domain::{account::MAX_CLIENT_ID, clock::Timestamp, secret::MAX_CLIENT_SECRET};

/// The pause between two bytes of [`Answer::SlowDrip`].
const DRIP: Duration = Duration::from_millis(100);
/// How much an answer of [`Answer::HugeBody`] carries beside the token.
const PADDING: usize = 1 << 20;
const PROXY_PAGE: &str = "<html><body><h1>Service unavailable</h1></body></html>";

pub(super) fn routes() -> Router<Arc<Registry>> {
    Router::new().route("/token", post(token)).route("/whoami", get(whoami))
}

/// Puts the upstream's time on an answer.
pub(super) async fn date(
    State(registry): State<Arc<Registry>>,
    mut response: Response,
) -> Response {
    let date = registry.now().format("%a, %d %b %Y %H:%M:%S GMT").to_string();
    if let Ok(date) = HeaderValue::from_str(&date) {
        response.headers_mut().insert(header::DATE, date);
    }
    response
}

async fn token(
    State(registry): State<Arc<Registry>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    body: Bytes,
) -> Response {
    let in_flight = registry.begin(peer.address);
    let number = in_flight.number;
    // A task of its own: a server does not stop because its client has gone.
    let work = tokio::spawn({
        let registry = registry.clone();
        async move {
            tokio::time::sleep(registry.faults().latency).await;
            handle(&registry, number, &body, peer.address)
        }
    });
    match work.await {
        Ok((answer, Ok(issued))) => play(answer, issued.as_ref(), &registry, &peer.cut).await,
        Ok((_, Err(refusal))) => refusal.into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// Decides on an answer, and issues the token that belongs to it.
fn handle(
    registry: &Registry,
    number: u64,
    body: &[u8],
    from: IpAddr,
) -> (Answer, Result<Option<Issued>, Refusal>) {
    let (client_id, secret) = match read_request(body) {
        Ok(credential) => credential,
        Err(refusal) => return (Answer::Issue, Err(refusal)),
    };
    let answer = registry.next_answer(&client_id, number);
    let issued = answer.issues().then(|| registry.issue(&client_id, &secret, from)).transpose();
    (answer, issued)
}

fn read_request(body: &[u8]) -> Result<(String, String), Refusal> {
    if body.is_empty() {
        return Err(Refusal::new(400, "64301", "Missing body"));
    }
    let request: Value =
        serde_json::from_slice(body).map_err(|_| Refusal::new(400, "64302", "Invalid JSON"))?;
    let field = |name: &str, longest: usize| {
        let value = request
            .get(name)
            .and_then(Value::as_str)
            .ok_or_else(|| Refusal::new(400, "64303", "Invalid type"))?;
        if (1..=longest).contains(&value.chars().count()) {
            Ok(value.to_owned())
        } else {
            Err(Refusal::new(400, "64304", "Invalid size"))
        }
    };
    Ok((field("clientId", MAX_CLIENT_ID)?, field("clientSecret", MAX_CLIENT_SECRET)?))
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self { status: number, code, message } = self;
        let body = json!({"error": {"code": code, "message": message}, "status": number});
        (status(number), Json(body)).into_response()
    }
}

/// Acts out `answer`; where it issues, `issued` is the token.
async fn play(answer: Answer, issued: Option<&Issued>, registry: &Registry, cut: &Cut) -> Response {
    match answer {
        Answer::Html => Html(PROXY_PAGE).into_response(),
        Answer::Empty => StatusCode::OK.into_response(),
        Answer::Unavailable { status: number } => {
            (status(number), Html(PROXY_PAGE)).into_response()
        }
        Answer::Refuse { status, code } => Refusal::new(status, &code, "Scripted").into_response(),
        Answer::RateLimited { retry_after } => rate_limited(retry_after.as_deref()),
        Answer::Redirect { to } => {
            let headers = header_map(&header::LOCATION, Some(&to));
            (StatusCode::TEMPORARY_REDIRECT, headers).into_response()
        }
        Answer::Hang | Answer::IssueThenHang => {
            registry.closing.cancelled().await;
            reset(cut)
        }
        Answer::Reset | Answer::IssueThenReset => reset(cut),
        answer => issued.map_or_else(
            || StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            |issued| with_token(&answer, issued, registry),
        ),
    }
}

/// The connection ends instead of this answer.
fn reset(cut: &Cut) -> Response {
    cut.now();
    StatusCode::OK.into_response()
}

fn rate_limited(retry_after: Option<&str>) -> Response {
    let mut response = Refusal::new(429, "61092", "Too many requests").into_response();
    response.headers_mut().extend(header_map(&header::RETRY_AFTER, retry_after));
    response
}

/// A header that was checked when it was set.
fn header_map(name: &header::HeaderName, value: Option<&str>) -> HeaderMap {
    let value = value.and_then(|value| HeaderValue::from_str(value).ok());
    value.into_iter().map(|value| (name.clone(), value)).collect()
}

fn with_token(answer: &Answer, issued: &Issued, registry: &Registry) -> Response {
    let expires_in = match answer {
        Answer::PastExpiry => millis(registry.now() - TimeDelta::minutes(1)),
        Answer::FarFutureExpiry => millis(registry.now() + TimeDelta::days(3_650)),
        Answer::ExpiresInDuration => registry.faults().token_life.as_secs().to_string(),
        _ => millis(issued.expires_at),
    };
    let mut body = json!({"expiresIn": expires_in, "accessToken": issued.token});
    if *answer == Answer::HugeBody {
        body["padding"] = "x".repeat(PADDING).into();
    }
    let whole = body.to_string();
    match answer {
        Answer::TruncatedJson => json_response(whole[..whole.len() / 2].to_owned()),
        Answer::BrokenOff => broken_off(&whole),
        Answer::SlowDrip => json_response(drip(whole.into_bytes())),
        _ => json_response(whole),
    }
}

fn millis(at: Timestamp) -> String {
    at.timestamp_millis().to_string()
}

fn json_response(body: impl Into<Body>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body.into()).into_response()
}

/// Half of `whole` under the length of all of it: the connection ends in between.
fn broken_off(whole: &str) -> Response {
    let (parts, body) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    let half = Bytes::copy_from_slice(&whole.as_bytes()[..whole.len() / 2]);
    tokio::spawn(async move {
        let _ = parts.send(Ok(half)).await;
        // The server sends what it has while the body keeps it waiting.
        tokio::time::sleep(DRIP).await;
    });
    let mut response = json_response(Body::from_stream(ReceiverStream::new(body)));
    response.headers_mut().insert(header::CONTENT_LENGTH, whole.len().into());
    response
}

/// `bytes`, one at a time, until they end or the client leaves.
fn drip(bytes: Vec<u8>) -> Body {
    let (parts, body) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    tokio::spawn(async move {
        for byte in bytes {
            if parts.send(Ok(Bytes::copy_from_slice(&[byte]))).await.is_err() {
                return;
            }
            tokio::time::sleep(DRIP).await;
        }
    });
    Body::from_stream(ReceiverStream::new(body))
}

async fn whoami(State(registry): State<Arc<Registry>>, headers: HeaderMap) -> Response {
    let Some(authorization) = headers.get(header::AUTHORIZATION) else {
        return Refusal::new(401, "61001", "Missing authorization header").into_response();
    };
    let token = authorization.to_str().ok().and_then(|value| value.strip_prefix("Bearer "));
    let Some(token) = token.map(str::trim).filter(|token| !token.is_empty()) else {
        return Refusal::new(401, "61002", "Missing token").into_response();
    };
    match registry.look_up(token) {
        Ok((user_id, _)) => Json(json!({"userId": user_id})).into_response(),
        Err(refusal) => refusal.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_of_a_request_has_its_code() {
        for (body, code) in [
            ("", "64301"),
            ("{", "64302"),
            ("[]", "64303"),
            (r#"{"clientId":"a"}"#, "64303"),
            (r#"{"clientId":"a","clientSecret":7}"#, "64303"),
            (r#"{"clientId":"","clientSecret":"b"}"#, "64304"),
            (r#"{"clientId":"a","clientSecret":"1234567890123456789"}"#, "64304"),
            (r#"{"clientId":"123456789012345678901","clientSecret":"b"}"#, "64304"),
        ] {
            let refusal = read_request(body.as_bytes()).unwrap_err();
            assert_eq!((refusal.status, refusal.code.as_str()), (400, code), "{body}");
        }
        let request = br#"{"clientId":"a","clientSecret":"b","more":1}"#;
        assert_eq!(read_request(request).unwrap(), ("a".into(), "b".into()));
    }
}
