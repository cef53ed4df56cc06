//! RCS Biz Center's wire format, read strictly: what is sent, and what an answer means. Pure.

use std::{net::IpAddr, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};
use http::{HeaderMap, StatusCode, header};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use zeroize::Zeroizing;

use super::{FailureClass, IssueError};
use crate::{
    account::ClientId,
    clock::Timestamp,
    secret::{AccessToken, ClientSecret},
    token::IssuedToken,
};

/// The longest life that is believed. The seen one is an hour; an end beyond this is a number read
/// wrongly, and would be served long after the token is dead.
pub const LONGEST_LIFE: TimeDelta = TimeDelta::hours(48);
/// The limits of what a `Retry-After` may ask for.
const SHORTEST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_hours(1);
/// The longest error code that is kept, in characters; the seen ones have five.
const LONGEST_CODE: usize = 16;
/// Korea is nine hours ahead of UTC and has no summer time.
const KOREA: TimeDelta = TimeDelta::hours(9);

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
        return read_token(body, skew(headers, now), now);
    }
    Err(read_refusal(status, headers, body, now))
}

/// Reads the answer of an issue.
fn read_token(
    body: &[u8],
    skew: Option<TimeDelta>,
    now: Timestamp,
) -> Result<IssuedToken, IssueError> {
    let mut answer: Value = serde_json::from_slice(body)
        .map_err(|_| IssueError::malformed("the upstream's answer is not whole JSON"))?;
    let access_token = answer
        .get_mut("accessToken")
        .map(Value::take)
        .and_then(|token| if let Value::String(token) = token { Some(token) } else { None })
        .map(Zeroizing::new)
        .ok_or_else(|| IssueError::malformed("the upstream's answer has no accessToken"))?;
    let access_token = AccessToken::new(&access_token).map_err(|_| {
        IssueError::malformed("the upstream's accessToken is not 1 to 8192 visible characters")
    })?;
    let stated_end = answer.get("expiresIn").and_then(read_end).ok_or_else(|| {
        IssueError::malformed("the upstream's expiresIn is not a time in milliseconds since 1970")
    })?;

    let claims = Claims::of(&access_token);
    let lead = skew.unwrap_or_default().max(TimeDelta::zero());
    if stated_end - now > LONGEST_LIFE + lead {
        return Err(IssueError::malformed("the upstream's token ends further ahead than 48 hours"));
    }
    let expires_at =
        end_by_our_clock(stated_end, &claims, lead, now).filter(|end| *end > now).ok_or_else(
            || IssueError::malformed("the upstream's token has already ended by our clock"),
        )?;
    Ok(IssuedToken {
        access_token,
        expires_at,
        allowed_ip: claims.allowed_ip,
        skew_ms: skew.map(|skew| skew.num_milliseconds()),
    })
}

/// The earliest of what the answer says: `expiresIn` and the claims' `expireDate`, each less the
/// lead of the upstream's clock over ours; and `now` plus the life that the claims state, which
/// holds whatever the clocks say. A lag of the upstream's clock is not added: that side is safe.
fn end_by_our_clock(
    stated_end: Timestamp,
    claims: &Claims,
    lead: TimeDelta,
    now: Timestamp,
) -> Option<Timestamp> {
    let by_upstream =
        claims.end.map_or(stated_end, |end| end.min(stated_end)).checked_sub_signed(lead)?;
    let by_life = claims.life.map(|life| now + life.clamp(-LONGEST_LIFE, LONGEST_LIFE));
    Some(by_life.map_or(by_upstream, |end| end.min(by_upstream)))
}

/// `expiresIn`: whatever its name says, a moment in milliseconds since 1970, as text or number.
fn read_end(value: &Value) -> Option<Timestamp> {
    let ms = match value {
        Value::String(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
            digits.parse().ok()?
        }
        Value::Number(number) => number.as_i64()?,
        _ => return None,
    };
    DateTime::from_timestamp_millis(ms)
}

/// What the JWT's payload says. Unverified text: whatever cannot be read is absent, not an error.
#[derive(Debug, Default, PartialEq)]
struct Claims {
    end: Option<Timestamp>,
    /// From `createDate` to `expireDate`, which needs no clock to agree with another.
    life: Option<TimeDelta>,
    allowed_ip: Option<String>,
}

impl Claims {
    fn of(token: &AccessToken) -> Self {
        Self::read(token.expose()).unwrap_or_default()
    }

    fn read(jwt: &str) -> Option<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Payload {
            #[serde(default)]
            create_date: Value,
            #[serde(default)]
            expire_date: Value,
            #[serde(default)]
            allow_ip: Value,
        }

        let mut parts = jwt.split('.');
        let (_, payload, _) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() {
            return None;
        }
        let payload = URL_SAFE_NO_PAD.decode(payload).ok()?;
        let payload: Payload = serde_json::from_slice(&payload).ok()?;
        let end = payload.expire_date.as_str().and_then(korea_time);
        let start = payload.create_date.as_str().and_then(korea_time);
        Some(Self {
            end,
            life: end.zip(start).map(|(end, start)| end - start),
            allowed_ip: payload
                .allow_ip
                .as_str()
                .and_then(|ip| ip.parse::<IpAddr>().ok())
                .map(|ip| ip.to_string()),
        })
    }
}

/// Reads `2024-05-31 15:56:41`, a time in Korea that does not say so.
fn korea_time(text: &str) -> Option<Timestamp> {
    let local = NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S").ok()?;
    Some(local.checked_sub_signed(KOREA)?.and_utc())
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

fn read_refusal(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    now: Timestamp,
) -> IssueError {
    let code = read_code(body);
    let class = classify(status, code.as_deref());
    IssueError {
        class,
        message: describe(class, status, code.as_deref()),
        retry_after: matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        )
        .then(|| retry_after(headers, now))
        .flatten(),
        // An answer in the upstream's own form is its word that it issued nothing; so is a 429 of
        // anyone. A proxy's page may hide an issue whose answer was lost behind it.
        may_have_issued: class != FailureClass::RateLimited
            && !((status.is_client_error() || status.is_server_error()) && code.is_some()),
        code,
    }
}

/// The table of [`read`].
fn classify(status: StatusCode, code: Option<&str>) -> FailureClass {
    match (status.as_u16(), code) {
        (429, _) => FailureClass::RateLimited,
        (408 | 500.., _) => FailureClass::Unreachable,
        (400..=499, Some("61005" | "61006" | "64301" | "64302" | "64303" | "64304")) => {
            FailureClass::Rejected
        }
        (401 | 403, _) | (400..=499, Some(_)) => FailureClass::EgressRejected,
        _ => FailureClass::Malformed,
    }
}

/// The failure in our own words: the upstream's may quote what it was sent.
fn describe(class: FailureClass, status: StatusCode, code: Option<&str>) -> String {
    let status = status.as_u16();
    let with_code = code.map_or_else(String::new, |code| format!(", code {code}"));
    match (class, code) {
        (FailureClass::Rejected, Some("61005")) => {
            "the upstream does not know the client id".to_owned()
        }
        (FailureClass::Rejected, Some("61006")) => {
            "the upstream refuses the client secret".to_owned()
        }
        (FailureClass::Rejected, _) => {
            format!("the upstream refuses the request's form (status {status}{with_code})")
        }
        (FailureClass::EgressRejected, _) => format!(
            "the upstream refuses the account or the address we call from \
             (status {status}{with_code})"
        ),
        (FailureClass::RateLimited, _) => {
            format!("the upstream says that it is asked too often (status {status}{with_code})")
        }
        (FailureClass::Unreachable, _) => {
            format!("the upstream cannot answer now (status {status}{with_code})")
        }
        (FailureClass::Malformed, _) if (300..400).contains(&status) => {
            format!(
                "the upstream answered with a redirect, which is not followed (status {status})"
            )
        }
        (FailureClass::Malformed | FailureClass::Intake, _) => {
            format!("the upstream answered with an unexpected status ({status})")
        }
    }
}

/// The `error.code` of an answer in the upstream's form, cut to what can be shown anywhere.
fn read_code(body: &[u8]) -> Option<String> {
    let answer: Value = serde_json::from_slice(body).ok()?;
    let code = match answer.get("error")?.get("code")? {
        Value::String(code) => code.clone(),
        Value::Number(code) => code.to_string(),
        _ => return None,
    };
    let code: String =
        code.chars().filter(char::is_ascii_alphanumeric).take(LONGEST_CODE).collect();
    (!code.is_empty()).then_some(code)
}

/// `Retry-After` in seconds or as a date, which is by the upstream's clock if it told it; clamped to
/// a second and an hour.
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let asked = if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        Duration::from_secs(text.parse().unwrap_or(u64::MAX))
    } else {
        let then = http_date(headers, &header::RETRY_AFTER)?;
        let upstream_now = http_date(headers, &header::DATE).unwrap_or(now);
        (then - upstream_now).to_std().unwrap_or_default()
    };
    Some(asked.clamp(SHORTEST_RETRY, LONGEST_RETRY))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The sample of the API's document, issued at 14:56:41.944 in Korea for an hour.
    const SAMPLE: &str = r#"{"subAgncyId":"","isSubAgency":"n","expireDate":"2024-05-31 15:56:41","userId":"swjeong3117","allowIp":"211.169.153.170","createDate":"2024-05-31 14:56:41"}"#;
    const ISSUED_MS: i64 = 1_717_135_001_944;

    fn at(ms: i64) -> Timestamp {
        DateTime::from_timestamp_millis(ms).unwrap()
    }

    fn jwt(payload: &str) -> String {
        format!("eyJhbGciOiJIUzI1NiJ9.{}.c2ln", URL_SAFE_NO_PAD.encode(payload))
    }

    fn answer(expires_in: &str, token: &str) -> Vec<u8> {
        format!(r#"{{"expiresIn":{expires_in},"accessToken":"{token}"}}"#).into_bytes()
    }

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    fn ok(headers: &HeaderMap, body: &[u8]) -> Result<IssuedToken, IssueError> {
        read(StatusCode::OK, headers, body, at(ISSUED_MS))
    }

    fn refused(status: u16, headers: &HeaderMap, body: &str) -> IssueError {
        let status = StatusCode::from_u16(status).unwrap();
        read(status, headers, body.as_bytes(), at(ISSUED_MS)).unwrap_err()
    }

    fn refused_with_code(status: u16, code: &str) -> IssueError {
        let body = format!(
            r#"{{"error":{{"code":"{code}","message":"canary"}},"status":{status},"more":[]}}"#
        );
        refused(status, &HeaderMap::new(), &body)
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

    #[test]
    fn the_sample_is_read_as_text_and_as_number() {
        for expires_in in ["\"1717138601944\"", "1717138601944"] {
            let issued = ok(&HeaderMap::new(), &answer(expires_in, &jwt(SAMPLE))).unwrap();
            // The claims drop the milliseconds, and the earlier end counts.
            assert_eq!(issued.expires_at, at(1_717_138_601_000));
            assert_eq!(issued.allowed_ip.as_deref(), Some("211.169.153.170"));
            assert_eq!(issued.skew_ms, None);
            assert_eq!(issued.access_token.expose(), jwt(SAMPLE));
        }
    }

    #[test]
    fn unknown_and_doubled_fields_do_no_harm() {
        let body = br#"{"a":{},"expiresIn":"1","expiresIn":"1717138601944","accessToken":"t"}"#;
        assert_eq!(ok(&HeaderMap::new(), body).unwrap().expires_at, at(1_717_138_601_944));
    }

    #[test]
    fn unreadable_claims_are_absent_and_the_token_is_still_a_token() {
        for token in [
            "opaque",
            "a.b",
            "a.!!!.c",
            "a.b.c.d",
            &jwt("[]"),
            &jwt("not json"),
            &jwt(r#"{"expireDate":7,"createDate":null,"allowIp":["1.2.3.4"]}"#),
            &jwt(r#"{"expireDate":"2024-05-31T15:56:41Z","allowIp":"1.2.3.4; drop"}"#),
        ] {
            let issued = ok(&HeaderMap::new(), &answer("1717138601944", token)).unwrap();
            assert_eq!(issued.expires_at, at(1_717_138_601_944), "{token}");
            assert_eq!(issued.allowed_ip, None, "{token}");
        }
    }

    #[test]
    fn the_earlier_end_counts() {
        let claims = jwt(r#"{"expireDate":"2024-05-31 15:00:00"}"#);
        let issued = ok(&HeaderMap::new(), &answer("1717138601944", &claims)).unwrap();
        assert_eq!(issued.expires_at, at(1_717_135_200_000));
        // The claims end later than expiresIn.
        let issued = ok(&HeaderMap::new(), &answer("1717135100000", &jwt(SAMPLE))).unwrap();
        assert_eq!(issued.expires_at, at(1_717_135_100_000));
    }

    #[test]
    fn a_lead_of_the_upstreams_clock_shortens_the_life_and_a_lag_does_not_lengthen_it() {
        let body = answer("1717138601944", "t");
        let ten_minutes_ahead = headers(&[(header::DATE, "Fri, 31 May 2024 06:06:41 GMT")]);
        let issued = ok(&ten_minutes_ahead, &body).unwrap();
        assert_eq!(issued.skew_ms, Some(599_056));
        assert_eq!(issued.expires_at, at(1_717_138_601_944 - 599_056));
        let ten_minutes_behind = headers(&[(header::DATE, "Fri, 31 May 2024 05:46:41 GMT")]);
        let issued = ok(&ten_minutes_behind, &body).unwrap();
        assert_eq!(issued.skew_ms, Some(-600_944));
        assert_eq!(issued.expires_at, at(1_717_138_601_944));
        let unreadable = headers(&[(header::DATE, "yesterday")]);
        assert_eq!(ok(&unreadable, &body).unwrap().skew_ms, None);
    }

    #[test]
    fn the_stated_life_holds_where_the_clocks_disagree_unseen() {
        // Our clock is half an hour behind, and no Date says so: an hour is still an hour.
        let now = at(ISSUED_MS - 1_800_000);
        let body = answer("1717138601944", &jwt(SAMPLE));
        let issued = read(StatusCode::OK, &HeaderMap::new(), &body, now).unwrap();
        assert_eq!(issued.expires_at, now + TimeDelta::hours(1));
    }

    #[test]
    fn an_answer_that_cannot_be_believed_yields_no_token() {
        let cases = [
            String::new(),
            "null".into(),
            "[]".into(),
            "<html>canary</html>".into(),
            r#"{"expiresIn":"1717138601944","accessToken":"canary"#.into(),
            r#"{"expiresIn":"1717138601944"}"#.into(),
            r#"{"accessToken":"canary"}"#.into(),
            r#"{"expiresIn":"1717138601944","accessToken":["canary"]}"#.into(),
            r#"{"expiresIn":"1717138601944","accessToken":""}"#.into(),
            r#"{"expiresIn":"1717138601944","accessToken":"canary\r\nX: y"}"#.into(),
            r#"{"error":{"code":"61006","message":"canary"},"status":401}"#.into(),
        ];
        let ends = [
            "\"1717135001944\"",
            "1717135001943",
            "\"3600\"",
            "3600",
            "-1",
            "0",
            "\"\"",
            "\" 1717138601944\"",
            "\"+1717138601944\"",
            "1717138601944.5",
            "1.7e12",
            "true",
            "null",
            "{}",
            "1717138601",
            "1717307801945",
            "99999999999999999999",
            "\"99999999999999999999\"",
            "9223372036854775807",
        ];
        let ends = ends.map(|end| String::from_utf8(answer(end, "canary")).unwrap());
        for body in cases.iter().chain(&ends) {
            let error = ok(&HeaderMap::new(), body.as_bytes()).unwrap_err();
            assert_eq!(error.class, FailureClass::Malformed, "{body}");
            assert!(error.may_have_issued && error.code.is_none(), "{body}");
            assert!(!format!("{error} {error:?}").contains("canary"), "{body}");
        }
    }

    #[test]
    fn claims_that_end_before_they_begin_yield_no_token() {
        let claims = r#"{"createDate":"2024-05-31 15:56:41","expireDate":"2024-05-31 15:50:00"}"#;
        let error = ok(&HeaderMap::new(), &answer("1717138601944", &jwt(claims))).unwrap_err();
        assert_eq!(error.class, FailureClass::Malformed);
    }

    #[test]
    fn a_life_of_48_hours_is_believed_and_no_longer_one() {
        let end = ISSUED_MS + LONGEST_LIFE.num_milliseconds();
        assert!(ok(&HeaderMap::new(), &answer(&end.to_string(), "t")).is_ok());
        assert!(ok(&HeaderMap::new(), &answer(&(end + 1).to_string(), "t")).is_err());
    }

    #[test]
    fn each_refusal_has_its_class() {
        use FailureClass::{EgressRejected, Malformed, RateLimited, Rejected, Unreachable};
        for (status, code, class) in [
            (401, "61005", Rejected),
            (401, "61006", Rejected),
            (403, "61006", Rejected),
            (400, "64301", Rejected),
            (400, "64302", Rejected),
            (400, "64303", Rejected),
            (400, "64304", Rejected),
            (401, "61099", EgressRejected),
            (403, "69999", EgressRejected),
            (400, "64305", EgressRejected),
            (404, "60000", EgressRejected),
            (429, "61006", RateLimited),
            (408, "61006", Unreachable),
            (500, "61006", Unreachable),
            (503, "70000", Unreachable),
            (302, "61006", Malformed),
            (201, "61006", Malformed),
        ] {
            let error = refused_with_code(status, code);
            assert_eq!(error.class, class, "{status} {code}");
            assert_eq!(error.code.as_deref(), Some(code));
            assert_eq!(error.may_have_issued, status < 400, "{status} {code}");
            assert!(!error.message.contains("canary"));
        }
    }

    #[test]
    fn a_refusal_without_a_code_leaves_an_issue_possible() {
        use FailureClass::{EgressRejected, Malformed, RateLimited, Unreachable};
        for (status, class, may_have_issued) in [
            (401, EgressRejected, true),
            (403, EgressRejected, true),
            (404, Malformed, true),
            (407, Malformed, true),
            (429, RateLimited, false),
            (502, Unreachable, true),
            (307, Malformed, true),
            (204, Malformed, true),
        ] {
            let error = refused(status, &HeaderMap::new(), "<html>canary</html>");
            assert_eq!((error.class, error.may_have_issued), (class, may_have_issued), "{status}");
            assert!(error.code.is_none() && !error.message.contains("canary"));
        }
    }

    #[test]
    fn a_code_is_cut_to_sixteen_letters_and_digits() {
        for (code, kept) in [
            (r#""61 0-06\u0000""#, Some("61006")),
            ("61006", Some("61006")),
            (r#""aaaaaaaaaaaaaaaaaaaa""#, Some("aaaaaaaaaaaaaaaa")),
            (r#""비밀""#, None),
            (r#""""#, None),
            ("null", None),
        ] {
            let body = format!(r#"{{"error":{{"code":{code}}}}}"#);
            let error = refused(401, &HeaderMap::new(), &body);
            assert_eq!(error.code.as_deref(), kept, "{code}");
        }
    }

    #[test]
    fn retry_after_is_read_in_both_forms_and_clamped() {
        let date = (header::DATE, "Fri, 31 May 2024 07:00:00 GMT");
        for (value, dated, seconds) in [
            ("5", false, Some(5)),
            ("0", false, Some(1)),
            ("99999999999999999999999", false, Some(3_600)),
            ("Fri, 31 May 2024 05:57:41 GMT", false, Some(59)),
            ("Fri, 31 May 2024 07:00:30 GMT", true, Some(30)),
            ("Fri, 31 May 2024 05:00:00 GMT", false, Some(1)),
            ("soon", false, None),
            ("-1", false, None),
            ("", false, None),
        ] {
            let mut given = headers(&[(header::RETRY_AFTER, value)]);
            if dated {
                given.extend(headers(std::slice::from_ref(&date)));
            }
            for status in [429, 503] {
                let asked = refused(status, &given, "").retry_after.map(|asked| asked.as_secs());
                assert_eq!(asked, seconds, "{status} {value}");
            }
            assert_eq!(refused(401, &given, "").retry_after, None);
        }
    }

    /// Bodies that come close to the right one, with any text in each place.
    fn near_answers() -> impl Strategy<Value = Vec<u8>> {
        let end = prop_oneof![
            any::<i64>().prop_map(|n| n.to_string()),
            (ISSUED_MS - 1_000_000_000..ISSUED_MS + 1_000_000_000).prop_map(|n| n.to_string()),
            "\\PC{0,30}".prop_map(|text| format!("{text:?}")),
        ];
        let date = prop_oneof![
            "[+-]?[0-9]{1,6}-[0-9]{1,2}-[0-9]{1,2} [0-9]{1,2}:[0-9]{2}:[0-9]{2}",
            "20[0-9]{2}-0[1-9]-[0-2][0-9] [0-1][0-9]:[0-5][0-9]:[0-5][0-9]",
            "\\PC{0,20}",
        ];
        (end, date.clone(), date, "\\PC{0,20}").prop_map(|(end, created, ended, ip)| {
            let claims = serde_json::json!(
                {"createDate": created, "expireDate": ended, "allowIp": ip}
            );
            answer(&end, &jwt(&claims.to_string()))
        })
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

        #[test]
        fn no_body_yields_a_token_that_has_ended_or_lives_beyond_belief(
            body in near_answers(), year in 1_i32..10_000, dated: bool,
        ) {
            let now = at(ISSUED_MS);
            let mut given = HeaderMap::new();
            if dated {
                let date = format!("31 May {year:04} 05:56:41 GMT");
                given.insert(header::DATE, date.parse().unwrap());
            }
            if let Ok(issued) = read(StatusCode::OK, &given, &body, now) {
                prop_assert!(issued.expires_at > now);
                prop_assert!(issued.expires_at <= now + LONGEST_LIFE);
            }
        }
    }
}
