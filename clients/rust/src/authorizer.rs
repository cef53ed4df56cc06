//! What the adapters for HTTP clients have in common: the token for a request, and the replacement of a token that
//! the API refused.

use std::{
    error::Error as StdError,
    fmt::{self, Display},
    sync::Arc,
    time::Duration,
};

use http::HeaderValue;
use serde_json::Value;
use tokio::time::Instant;
use url::Url;

use crate::{
    client::TokenClient,
    error::{Error, ErrorKind},
    time::later,
    token::Token,
};

/// Longer answers of the API are not searched for a code.
pub(crate) const LONGEST_ANSWER: usize = 64 * 1024;
/// The codes with which the API refuses a token.
const REFUSED_TOKEN: [&str; 2] = ["61003", "61004"];

/// Why a request was not sent, or not answered.
#[derive(Debug)]
pub enum SendError<E> {
    /// There is no token, or it must not go to the request's host.
    Token(Error),
    /// The HTTP client's own error.
    Request(E),
}

impl<E: Display> Display for SendError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(error) => error.fmt(f),
            Self::Request(error) => error.fmt(f),
        }
    }
}

impl<E: StdError + 'static> StdError for SendError<E> {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            // The text is that of the error itself, so its cause comes next.
            Self::Token(error) => error.source(),
            Self::Request(error) => error.source(),
        }
    }
}

/// Gives the requests of one account their tokens.
#[derive(Clone, Debug)]
pub(crate) struct Authorizer {
    client: TokenClient,
    account: Arc<str>,
    timeout: Duration,
}

impl Authorizer {
    pub(crate) fn new(client: TokenClient, account: &str) -> Self {
        Self { timeout: client.default_timeout(), client, account: account.into() }
    }

    pub(crate) fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Returns the token for a request to `url`.
    pub(crate) async fn token_for(&self, url: Option<&Url>) -> Result<Token, Error> {
        let token = self.client.token_within(&self.account, self.timeout).await?;
        let api = Url::parse(token.api_base_url()).ok();
        match (api, url) {
            (Some(api), Some(url)) if api.origin() == url.origin() => Ok(token),
            _ => Err(wrong_host(&self.account, token.api_base_url())),
        }
    }

    /// Tells the broker that the API refused `token` with `code`, and waits for another token; only for the report
    /// if the request cannot be sent again.
    pub(crate) async fn replacement(&self, token: &Token, code: &str) -> Option<Token> {
        let deadline = later(Instant::now(), self.timeout);
        self.client.replace_refused(&self.account, token.generation(), code, deadline).await
    }
}

/// Returns the error for a token that would go elsewhere than to the API.
pub(crate) fn wrong_host(account: &str, api_base_url: &str) -> Error {
    let message = format!("the token may be sent only to {api_base_url}");
    Error::local(ErrorKind::WrongHost, account, message)
}

/// Returns the header with the token, marked so that HTTP libraries do not print it.
pub(crate) fn authorization(token: &Token) -> Result<HeaderValue, Error> {
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.access_token())).map_err(
        // The error must not quote the token.
        |_| Error::local(ErrorKind::Internal, token.account(), "the token is no header value"),
    )?;
    value.set_sensitive(true);
    Ok(value)
}

/// Returns the code in an answer of the API, if it says that the token was refused.
pub(crate) fn refusal_code(body: &[u8]) -> Option<&'static str> {
    let body: Value = serde_json::from_slice(body).ok()?;
    let code =
        body.get("error").and_then(|error| error.get("code")).or_else(|| body.get("code"))?;
    let code = match code {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => return None,
    };
    REFUSED_TOKEN.into_iter().find(|refused| *refused == code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_codes_of_a_refused_token_count_wherever_they_are() {
        for (body, code) in [
            (r#"{"error": {"code": "61003", "message": "expired"}}"#, Some("61003")),
            (r#"{"error": {"code": 61004}}"#, Some("61004")),
            (r#"{"code": "61003"}"#, Some("61003")),
            (r#"{"code": 61004, "error": "a text"}"#, Some("61004")),
            (r#"{"error": {"code": "63001"}}"#, None),
            (r#"{"error": {"code": "61001"}, "code": "61003"}"#, None),
            (r#"{"error": {"code": ["61003"]}}"#, None),
            (r#"["61003"]"#, None),
            ("61003", None),
            ("", None),
        ] {
            assert_eq!(refusal_code(body.as_bytes()), code, "{body}");
        }
    }
}
