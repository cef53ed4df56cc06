//! Reads an answer that is not a token: what it means for the account, in the broker's own words.

use std::time::Duration;

use http::{HeaderMap, StatusCode, header};
use serde_json::Value;

use super::http_date::http_date;
use crate::{
    domain::{clock::Timestamp, refresh_policy::LONGEST_RETRY_AFTER, refresh_state::FailureClass},
    upstream::issue_error::IssueError,
};

/// The shortest pause to which a `Retry-After` is clamped.
const SHORTEST_RETRY: Duration = Duration::from_secs(1);
/// The longest error code that is kept, in characters. The upstream's codes have five.
const LONGEST_CODE: usize = 16;

/// Reads an answer of any status but 200, received at `now`.
pub(super) fn read(
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
        // An error in the upstream's own format says that no token was issued, and so does any 429.
        // Another error page may come from a proxy that lost the upstream's answer.
        may_have_issued: class != FailureClass::RateLimited
            && !((status.is_client_error() || status.is_server_error()) && code.is_some()),
        code,
    }
}

/// Returns the class by the rows of the table at [`super::read`] that are not for status 200.
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

/// Describes the failure in the broker's own words: the upstream's message may quote the request.
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

/// Returns the `error.code` of an answer in the upstream's format, reduced to at most 16 ASCII letters and
/// digits so that it can be shown anywhere.
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

/// Returns the pause that `Retry-After` asks for, given in seconds or as a date, clamped to a second and an
/// hour. A date counts from the answer's `Date`, if it has one, and else from `now`.
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let asked = if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        Duration::from_secs(text.parse().unwrap_or(u64::MAX))
    } else {
        let then = http_date(headers, &header::RETRY_AFTER)?;
        let upstream_now = http_date(headers, &header::DATE).unwrap_or(now);
        (then - upstream_now).to_std().unwrap_or_default()
    };
    Some(asked.clamp(SHORTEST_RETRY, LONGEST_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::rcs::tests::{ISSUED_MS, at, headers};

    fn refused(status: u16, headers: &HeaderMap, body: &str) -> IssueError {
        let status = StatusCode::from_u16(status).unwrap();
        read(status, headers, body.as_bytes(), at(ISSUED_MS))
    }

    fn refused_with_code(status: u16, code: &str) -> IssueError {
        let body = format!(
            r#"{{"error":{{"code":"{code}","message":"canary"}},"status":{status},"more":[]}}"#
        );
        refused(status, &HeaderMap::new(), &body)
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
    fn a_refusal_without_a_code_may_have_issued_a_token() {
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
    fn a_code_is_reduced_to_at_most_sixteen_letters_and_digits() {
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
}
