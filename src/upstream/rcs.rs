//! RCS Biz Center's wire format: builds the request, and reads and classifies the answer. All functions are
//! pure. An answer is decoded by what it is, and then read strictly: it is a token or an error.

mod answer;
mod body;
mod claims;
mod http_date;
mod issued;
mod json;
mod number;
mod refused;
mod stated_error;

use std::fmt::Display;

pub use body::MAX_BODY;
use body::Unreadable;
use chrono::TimeDelta;
use http::{HeaderMap, StatusCode, header};
pub use issued::{LONGEST_LIFE, stated_life};
use serde::Serialize;
use zeroize::Zeroizing;

use self::http_date::http_date;
use super::issue_error::IssueError;
use crate::domain::{
    account::ClientId, clock::Timestamp, secret::ClientSecret, token::IssuedToken,
};

/// Returns the body of the request, in memory that is cleared when it is dropped.
#[must_use]
pub(super) fn request_body(id: &ClientId, secret: &ClientSecret) -> Zeroizing<Vec<u8>> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Request<'a> {
        client_id: &'a str,
        client_secret: &'a str,
    }

    // The capacity suffices for 38 characters of up to 4 bytes and the 36 bytes around them. Growing would
    // leave a copy of the secret behind in memory.
    let mut body = Zeroizing::new(Vec::with_capacity(256));
    let request = Request { client_id: id.as_str(), client_secret: secret.expose() };
    serde_json::to_writer(&mut *body, &request)
        .expect("strings can be written as JSON, and writing to a vector cannot fail");
    body
}

/// Reads an answer that was received at `now`, to a request that was sent at `sent`. These are times of the process, and
/// `utc_ahead` is how far UTC is ahead of them.
///
/// An `error` in the upstream's own format counts whatever the status. Such an answer is not a token, even if it
/// has one: an upstream that says that something failed is believed, since a token can be issued again.
///
/// | status | body | class |
/// |---|---|---|
/// | 2xx | a token that ends in the future, at most [`LONGEST_LIFE`] ahead | – |
/// | 2xx | an error, with a status of its own | that of this status |
/// | 2xx | neither | malformed |
/// | any | code 61005, 61006, 64301–64304 | rejected |
/// | 429 | any other | rate limited |
/// | 408, 5xx | any other | unreachable |
/// | 401, 403 | any other | egress rejected |
/// | any other | another code | egress rejected, which is retried seldom, since a retry will hardly help |
/// | other 4xx | no code: the answer of a proxy or of a wrong address | malformed |
/// | any other, also redirects | no code | malformed |
pub fn read(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    sent: Timestamp,
    now: Timestamp,
    utc_ahead: TimeDelta,
) -> Result<IssuedToken, IssueError> {
    let answer = answer::read(headers, body);
    let error = answer.as_ref().ok().and_then(|answer| answer.error.as_ref());
    if status.is_success() && error.is_none() {
        let answer = answer.map_err(|unreadable| IssueError::malformed(unreadable.to_string()))?;
        let date = http_date(headers, &header::DATE);
        return issued::read(&answer, date, sent, now, utc_ahead);
    }
    let has_token = answer.as_ref().is_ok_and(|answer| !answer.access_tokens.is_empty());
    let mut refused = refused::read(status, headers, error, has_token, now + utc_ahead);
    // The body might name another cause than the status does.
    if let Err(unreadable) = answer
        && unreadable != Unreadable::NotJson
    {
        refused.message = with_unread_cause(&refused.message, &unreadable);
    }
    Err(refused)
}

/// Returns the message about a refusal whose body could not be read, because of `fault`.
pub(super) fn with_unread_cause(message: &str, fault: &impl Display) -> String {
    format!("{message}; its cause could not be read: {fault}")
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;

    /// The claims of the sample in the API's document: issued at 14:56:41.944 Korea time, for an hour.
    pub(in super::super) const SAMPLE: &str = r#"{"subAgncyId":"","isSubAgency":"n","expireDate":"2024-05-31 15:56:41","userId":"swjeong3117","allowIp":"211.169.153.170","createDate":"2024-05-31 14:56:41"}"#;
    pub(in super::super) const ISSUED_MS: i64 = 1_717_135_001_944;

    pub(in super::super) fn at(ms: i64) -> Timestamp {
        DateTime::from_timestamp_millis(ms).unwrap()
    }

    pub(in super::super) fn jwt(payload: &str) -> String {
        format!("eyJhbGciOiJIUzI1NiJ9.{}.c2ln", URL_SAFE_NO_PAD.encode(payload))
    }

    pub(in super::super) fn answer(expires_in: &str, token: &str) -> Vec<u8> {
        format!(r#"{{"expiresIn":{expires_in},"accessToken":"{token}"}}"#).into_bytes()
    }

    pub(in super::super) fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    pub(in super::super) fn ok(
        headers: &HeaderMap,
        body: &[u8],
    ) -> Result<IssuedToken, IssueError> {
        read(StatusCode::OK, headers, body, at(ISSUED_MS), at(ISSUED_MS), TimeDelta::zero())
    }

    #[test]
    fn the_request_has_the_documented_form() {
        let secret = ClientSecret::new("SK.atIs4g04r6PJepf").unwrap();
        let body = request_body(&"myMemberId".parse().unwrap(), &secret);
        assert_eq!(
            String::from_utf8_lossy(&body),
            r#"{"clientId":"myMemberId","clientSecret":"SK.atIs4g04r6PJepf"}"#
        );
    }

    #[test]
    fn the_longest_request_fits_the_capacity() {
        // Earlier releases took characters of four bytes.
        let secret = ClientSecret::stored(&"\u{1F512}".repeat(18)).unwrap();
        let body = request_body(&ClientId::stored(&"\u{1F511}".repeat(20)).unwrap(), &secret);
        assert_eq!(body.capacity(), 256);
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_reader_panic(
            status in 100_u16..1000, body in proptest::collection::vec(any::<u8>(), 0..200),
            date in "\\PC{0,40}", retry in "\\PC{0,40}",
        ) {
            let mut given = HeaderMap::new();
            for (name, value) in [(header::DATE, date), (header::RETRY_AFTER, retry)] {
                if let Ok(value) = value.parse() {
                    given.insert(name, value);
                }
            }
            let status = StatusCode::from_u16(status).unwrap();
            let _ = read(status, &given, &body, at(ISSUED_MS), at(ISSUED_MS), TimeDelta::zero());
        }
    }
}
