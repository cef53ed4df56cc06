//! The simulated API: `POST /token`, and `/whoami`, which requires a token.

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
    connection::{ClientConnection, ResetHandle},
    faults::{Answer, ApiAnswer, status},
    upstream_state::{ApiError, SimulatedToken, UpstreamState},
};
use crate::domain::{account::MAX_CLIENT_ID, clock::Timestamp, secret::MAX_CLIENT_SECRET};

/// The delay between two bytes of the response of [`Answer::SlowDrip`].
const BYTE_DELAY: Duration = Duration::from_millis(100);
/// The number of bytes that the response of [`Answer::HugeBody`] contains beside the token.
const PADDING: usize = 1 << 20;
/// An error page such as a proxy in front of the API might send.
const PROXY_PAGE: &str = "<html><body><h1>Service unavailable</h1></body></html>";

pub(super) fn routes() -> Router<Arc<UpstreamState>> {
    Router::new().route("/token", post(token)).route("/whoami", get(whoami).post(whoami))
}

/// Sets the header `Date` of a response to the upstream's time.
pub(super) async fn date(
    State(state): State<Arc<UpstreamState>>,
    mut response: Response,
) -> Response {
    let date = state.now().format("%a, %d %b %Y %H:%M:%S GMT").to_string();
    if let Ok(date) = HeaderValue::from_str(&date) {
        response.headers_mut().insert(header::DATE, date);
    }
    response
}

async fn token(
    State(state): State<Arc<UpstreamState>>,
    ConnectInfo(client): ConnectInfo<ClientConnection>,
    body: Bytes,
) -> Response {
    let request = state.begin_request(client.address);
    let number = request.number;
    // The work is done in a task of its own, so that it continues when the client disconnects, as it
    // does at the real upstream. (A disconnect drops this handler's future.)
    let work = tokio::spawn({
        let state = state.clone();
        async move {
            tokio::time::sleep(state.faults().latency).await;
            handle(&state, number, &body, client.address)
        }
    });
    match work.await {
        Ok((answer, Ok(token))) => respond(answer, token.as_ref(), &state, &client.reset).await,
        Ok((_, Err(error))) => error.into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// Chooses how the request is answered, and issues a token if that answer includes one.
fn handle(
    state: &UpstreamState,
    number: u64,
    body: &[u8],
    client_address: IpAddr,
) -> (Answer, Result<Option<SimulatedToken>, ApiError>) {
    let (client_id, secret) = match parse_request(body) {
        Ok(credential) => credential,
        Err(error) => return (Answer::Issue, Err(error)),
    };
    let answer = state.next_answer(&client_id, number);
    let token =
        answer.issues().then(|| state.issue(&client_id, &secret, client_address)).transpose();
    (answer, token)
}

/// Parses the body of a token request into `clientId` and `clientSecret`.
fn parse_request(body: &[u8]) -> Result<(String, String), ApiError> {
    if body.is_empty() {
        return Err(ApiError::new(400, "64301", "Missing body"));
    }
    let request: Value =
        serde_json::from_slice(body).map_err(|_| ApiError::new(400, "64302", "Invalid JSON"))?;
    let field = |name: &str, max_length: usize| {
        let value = request
            .get(name)
            .and_then(Value::as_str)
            .ok_or_else(|| ApiError::new(400, "64303", "Invalid type"))?;
        if (1..=max_length).contains(&value.chars().count()) {
            Ok(value.to_owned())
        } else {
            Err(ApiError::new(400, "64304", "Invalid size"))
        }
    };
    Ok((field("clientId", MAX_CLIENT_ID)?, field("clientSecret", MAX_CLIENT_SECRET)?))
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Self { status: number, code, message } = self;
        let body = json!({"error": {"code": code, "message": message}, "status": number});
        (status(number), Json(body)).into_response()
    }
}

/// Returns the response of `answer`. `token` is the issued token, if that answer includes one. For an
/// answer that hangs, this returns only when the simulator shuts down.
async fn respond(
    answer: Answer,
    token: Option<&SimulatedToken>,
    state: &UpstreamState,
    connection: &ResetHandle,
) -> Response {
    match answer {
        Answer::Html => Html(PROXY_PAGE).into_response(),
        Answer::Empty => StatusCode::OK.into_response(),
        Answer::Unavailable { status: number } => {
            (status(number), Html(PROXY_PAGE)).into_response()
        }
        Answer::Refuse { status, code } => ApiError::new(status, &code, "Scripted").into_response(),
        Answer::Body { status: number, body } => (status(number), body).into_response(),
        Answer::RateLimited { retry_after } => rate_limited(retry_after.as_deref()),
        Answer::Redirect { to } => redirect(&to),
        Answer::Hang | Answer::IssueThenHang => {
            state.shutdown.cancelled().await;
            reset(connection)
        }
        Answer::Reset | Answer::IssueThenReset => reset(connection),
        answer => token.map_or_else(
            || StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            |token| token_response(&answer, token, state),
        ),
    }
}

/// Resets the connection. The returned response is never written.
fn reset(connection: &ResetHandle) -> Response {
    connection.reset();
    StatusCode::OK.into_response()
}

fn redirect(to: &str) -> Response {
    let headers = header_map(&header::LOCATION, Some(to));
    (StatusCode::TEMPORARY_REDIRECT, headers).into_response()
}

fn rate_limited(retry_after: Option<&str>) -> Response {
    let mut response = ApiError::new(429, "61092", "Too many requests").into_response();
    response.headers_mut().extend(header_map(&header::RETRY_AFTER, retry_after));
    response
}

/// Returns a map with one header, or an empty one if `value` is absent. [`Answer::check`] made sure
/// that the value is valid.
fn header_map(name: &header::HeaderName, value: Option<&str>) -> HeaderMap {
    let value = value.and_then(|value| HeaderValue::from_str(value).ok());
    value.into_iter().map(|value| (name.clone(), value)).collect()
}

fn token_response(answer: &Answer, token: &SimulatedToken, state: &UpstreamState) -> Response {
    let expires_in = match answer {
        Answer::PastExpiry => millis(state.now() - TimeDelta::minutes(1)),
        Answer::FarFutureExpiry => millis(state.now() + TimeDelta::days(3_650)),
        Answer::ExpiresInDuration => state.faults().token_life.as_secs().to_string(),
        _ => millis(token.expires_at),
    };
    let mut body = json!({"expiresIn": expires_in, "accessToken": token.text});
    if *answer == Answer::HugeBody {
        body["padding"] = "x".repeat(PADDING).into();
    }
    let json = body.to_string();
    match answer {
        Answer::TruncatedJson => json_response(json[..json.len() / 2].to_owned()),
        Answer::BrokenOff => incomplete_response(&json),
        Answer::SlowDrip => json_response(slow_body(json.into_bytes())),
        _ => json_response(json),
    }
}

fn millis(at: Timestamp) -> String {
    at.timestamp_millis().to_string()
}

fn json_response(body: impl Into<Body>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body.into()).into_response()
}

/// Returns a response whose `Content-Length` is that of `json`, but whose body ends in the middle; the
/// server closes the connection there.
fn incomplete_response(json: &str) -> Response {
    let (chunks, body) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    let half = Bytes::copy_from_slice(&json.as_bytes()[..json.len() / 2]);
    tokio::spawn(async move {
        let _ = chunks.send(Ok(half)).await;
        // The server writes the first half while it waits for more of the body.
        tokio::time::sleep(BYTE_DELAY).await;
    });
    let mut response = json_response(Body::from_stream(ReceiverStream::new(body)));
    response.headers_mut().insert(header::CONTENT_LENGTH, json.len().into());
    response
}

/// Returns a body that sends one byte every [`BYTE_DELAY`], until the client disconnects.
fn slow_body(bytes: Vec<u8>) -> Body {
    let (chunks, body) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    tokio::spawn(async move {
        for byte in bytes {
            if chunks.send(Ok(Bytes::copy_from_slice(&[byte]))).await.is_err() {
                return;
            }
            tokio::time::sleep(BYTE_DELAY).await;
        }
    });
    Body::from_stream(ReceiverStream::new(body))
}

/// Answers whose token the request has. If the request has a body, it is part of the answer.
async fn whoami(
    State(state): State<Arc<UpstreamState>>,
    headers: HeaderMap,
    body: String,
) -> Result<Response, ApiError> {
    state.count_api_request();
    let authorization = headers
        .get(header::AUTHORIZATION)
        .ok_or_else(|| ApiError::new(401, "61001", "Missing authorization header"))?;
    let token = authorization.to_str().ok().and_then(|value| value.strip_prefix("Bearer "));
    let token = token
        .map(str::trim)
        .filter(|token| !token.is_empty())
        .ok_or_else(|| ApiError::new(401, "61002", "Missing token"))?;
    let (user_id, _) = state.look_up(token)?;
    match state.faults().api_answer {
        Some(ApiAnswer::Refuse { status, code }) => {
            return Err(ApiError::new(status, &code, "Scripted"));
        }
        Some(ApiAnswer::Redirect { to }) => return Ok(redirect(&to)),
        None => {}
    }
    let mut answer = json!({"userId": user_id});
    if !body.is_empty() {
        answer["body"] = body.into();
    }
    Ok(Json(answer).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_invalid_request_has_its_own_error_code() {
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
            let error = parse_request(body.as_bytes()).unwrap_err();
            assert_eq!((error.status, error.code.as_str()), (400, code), "{body}");
        }
        let request = br#"{"clientId":"a","clientSecret":"b","more":1}"#;
        assert_eq!(parse_request(request).unwrap(), ("a".into(), "b".into()));
    }
}
