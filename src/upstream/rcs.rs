//! RCS Biz Center's wire format, read strictly: what is sent, and what an answer means. Pure.

mod issued;
mod refused;

use chrono::{DateTime, TimeDelta, Utc};
use http::{HeaderMap, StatusCode, header};
pub use issued::{LONGEST_LIFE, stated_life};
use serde::Serialize;
use zeroize::Zeroizing;

use super::IssueError;
use crate::domain::{
    account::ClientId, clock::Timestamp, secret::ClientSecret, token::IssuedToken,
};

/// The body of the one call, in memory that is cleared when it goes.
#[must_use]
pub(super) fn request_body(id: &ClientId, secret: &ClientSecret) -> Zeroizing<Vec<u8>> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Request<'a> {
        client_id: &'a str,
        client_secret: &'a str,
    }

    // 38 characters of up to 4 bytes, 36 bytes around them: it never grows, which would leave a
    // copy behind.
    let mut body = Zeroizing::new(Vec::with_capacity(256));
    let request = Request { client_id: id.as_str(), client_secret: secret.expose() };
    serde_json::to_writer(&mut *body, &request)
        .expect("two strings are JSON, and a vector takes all that is written");
    body
}

/// What a whole answer, received at `now`, means.
///
/// | status | body | class |
/// |---|---|---|
/// | 200 | a token whose end is ahead, at most [`LONGEST_LIFE`] | – |
/// | 200 | anything else | malformed |
/// | 429 | any | rate limited |
/// | 408, 5xx | any | unreachable |
/// | other 4xx | code 61005, 61006, 64301–64304 | rejected |
/// | 401, 403 | any other | egress rejected |
/// | other 4xx | another code | egress rejected: asking again won't help, so seldom |
/// | other 4xx | no code: a proxy's answer, or a wrong address | malformed |
/// | any other, redirects too | any | malformed |
pub fn read(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    now: Timestamp,
) -> Result<IssuedToken, IssueError> {
    if status == StatusCode::OK {
        return issued::read(body, skew(headers, now), now);
    }
    Err(refused::read(status, headers, body, now))
}

/// How far the upstream's clock is ahead of ours, by the `Date` of an answer received at `now`.
/// The header counts whole seconds and is older than `now` by the answer's way, so it is good to a
/// second or two.
fn skew(headers: &HeaderMap, now: Timestamp) -> Option<TimeDelta> {
    Some(http_date(headers, &header::DATE)? - now)
}

fn http_date(headers: &HeaderMap, name: &header::HeaderName) -> Option<Timestamp> {
    let text = headers.get(name)?.to_str().ok()?;
    Some(DateTime::parse_from_rfc2822(text).ok()?.with_timezone(&Utc))
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    use proptest::prelude::*;

    use super::*;

    /// The sample of the API's document, issued at 14:56:41.944 in Korea for an hour.
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
        read(StatusCode::OK, headers, body, at(ISSUED_MS))
    }

    #[test]
    fn the_request_is_the_documented_one() {
        let secret = ClientSecret::new("SK.atIs4g04r6PJepf").unwrap();
        let body = request_body(&"myMemberId".parse().unwrap(), &secret);
        assert_eq!(
            String::from_utf8_lossy(&body),
            r#"{"clientId":"myMemberId","clientSecret":"SK.atIs4g04r6PJepf"}"#
        );
    }

    #[test]
    fn the_longest_request_fits_its_memory() {
        let secret = ClientSecret::new(&"\u{1F512}".repeat(18)).unwrap();
        let body = request_body(&"\u{1F511}".repeat(20).parse().unwrap(), &secret);
        assert_eq!(body.capacity(), 256);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
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
            let _ = read(status, &given, &body, at(ISSUED_MS));
        }
    }
}
