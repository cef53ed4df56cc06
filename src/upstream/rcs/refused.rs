//! Reads an answer that is not a token: what it means for the account, in the broker's own words.

use std::time::Duration;

use http::{HeaderMap, StatusCode, header};

use super::{http_date::http_date, stated_error::StatedError};
use crate::{
    domain::{clock::Timestamp, refresh_policy::LONGEST_RETRY_AFTER, refresh_state::FailureClass},
    upstream::issue_error::IssueError,
};

/// The shortest pause to which a `Retry-After` is clamped.
const SHORTEST_RETRY: Duration = Duration::from_secs(1);

/// Reads an answer that is an error, received at `now`: by its status, or by the `error` that it states, or both.
/// `has_token` says whether there is a token beside the error.
pub(super) fn read(
    status: StatusCode,
    headers: &HeaderMap,
    error: Option<&StatedError>,
    has_token: bool,
    now: Timestamp,
) -> IssueError {
    let code = error.and_then(|error| error.code.clone());
    // Some servers send every answer with the status 200, and the one that they mean in the body.
    let meant = error.and_then(|error| error.status).filter(|_| status.as_u16() < 400);
    let meant = meant.unwrap_or(status.as_u16());
    let class = classify(meant, code.as_deref());
    let mut message = describe(class, status, code.as_deref());
    if has_token {
        message.push_str("; the token beside the error is not used");
    }
    IssueError {
        class,
        message,
        retry_after: matches!(meant, 429 | 503).then(|| retry_after(headers, now)).flatten(),
        // An error in the upstream's own format says that no token was issued, and so does any 429.
        // Another error page may come from a proxy that lost the upstream's answer.
        may_have_issued: has_token || class != FailureClass::RateLimited && code.is_none(),
        code,
    }
}

/// Returns the class by the rows of the table at [`super::read`] that are not for a token.
fn classify(status: u16, code: Option<&str>) -> FailureClass {
    match (status, code) {
        (_, Some("61005" | "61006" | "64301" | "64302" | "64303" | "64304")) => {
            FailureClass::Rejected
        }
        (429, _) => FailureClass::RateLimited,
        (408 | 500.., _) => FailureClass::Unreachable,
        (401 | 403, _) | (_, Some(_)) => FailureClass::EgressRejected,
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
        (FailureClass::Malformed, _) if status == 200 => {
            "the upstream's answer states an error without a code (status 200)".to_owned()
        }
        (FailureClass::Malformed | FailureClass::Intake, _) => {
            format!("the upstream answered with an unexpected status ({status})")
        }
    }
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
    use chrono::TimeDelta;

    use super::*;
    use crate::upstream::rcs::{
        read,
        tests::{ISSUED_MS, at, headers},
    };

    fn refused(status: u16, headers: &HeaderMap, body: &str) -> IssueError {
        let status = StatusCode::from_u16(status).unwrap();
        read(status, headers, body.as_bytes(), at(ISSUED_MS), at(ISSUED_MS), TimeDelta::zero())
            .unwrap_err()
    }

    fn refused_with_code(status: u16, code: &str) -> IssueError {
        let body =
            format!(r#"{{"error":{{"code":"{code}","message":"canary"}},"status":200,"more":[]}}"#);
        refused(status, &HeaderMap::new(), &body)
    }

    #[test]
    fn each_refusal_has_its_class() {
        use FailureClass::{EgressRejected, RateLimited, Rejected, Unreachable};
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
            // A code that the API's document lists means the same whatever the status.
            (200, "61006", Rejected),
            (200, "61005", Rejected),
            (200, "64304", Rejected),
            (201, "61006", Rejected),
            (204, "61006", Rejected),
            (302, "61006", Rejected),
            (404, "61006", Rejected),
            (408, "61006", Rejected),
            (429, "61006", Rejected),
            (500, "61006", Rejected),
            (503, "61005", Rejected),
            // Of another code nothing is known but that it is the upstream's.
            (200, "61099", EgressRejected),
            (302, "61099", EgressRejected),
            (429, "61092", RateLimited),
            (500, "61099", Unreachable),
            (503, "70000", Unreachable),
        ] {
            let error = refused_with_code(status, code);
            assert_eq!(error.class, class, "{status} {code}");
            assert_eq!(error.code.as_deref(), Some(code));
            assert!(!error.may_have_issued, "{status} {code}");
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
    fn a_refusal_whose_body_cannot_be_read_says_so() {
        for (coding, body) in [("br", "canary"), ("zstd", "canary"), ("gzip", "\u{1f}canary")] {
            let named = headers(&[(header::CONTENT_ENCODING, coding)]);
            let message = refused(401, &named, body).message;
            let says = message.contains("its cause could not be read");
            assert_eq!(says, coding != "gzip", "{message}");
        }
        let damaged = read(
            StatusCode::UNAUTHORIZED,
            &HeaderMap::new(),
            b"\x1f\x8bcanary",
            at(ISSUED_MS),
            at(ISSUED_MS),
            TimeDelta::zero(),
        );
        assert!(damaged.unwrap_err().message.ends_with("damaged or longer than 64 KiB"));
    }

    #[test]
    fn a_status_in_the_body_counts_where_that_of_the_answer_says_nothing() {
        use FailureClass::{EgressRejected, Malformed, RateLimited, Rejected, Unreachable};
        let retry = headers(&[(header::RETRY_AFTER, "7")]);
        for (status, body, class) in [
            (200, r#"{"error":{"code":"61006"},"status":401}"#, Rejected),
            (200, r#"{"error":{"code":"61099"},"status":"503"}"#, Unreachable),
            (200, r#"{"error":{"code":61092.0},"status":429}"#, RateLimited),
            (200, r#"{"error":{"message":"canary"},"status":403}"#, EgressRejected),
            (200, r#"{"error":{},"status":4.03e2}"#, EgressRejected),
            (200, r#"{"status":500}"#, Unreachable),
            (200, r#"{"error":{"message":"canary"}}"#, Malformed),
            (200, r#"{"error":"canary","status":200}"#, Malformed),
            (403, r#"{"error":{"message":"canary"},"status":503}"#, EgressRejected),
        ] {
            let error = refused(status, &retry, body);
            assert_eq!(error.class, class, "{status} {body}");
            let asks = status == 200 && (body.contains("503") || body.contains("429"));
            assert_eq!(error.retry_after.is_some(), asks, "{status} {body}");
            assert!(!format!("{error:?}").contains("canary"), "{body}");
        }
    }

    #[test]
    fn a_token_beside_an_error_is_not_used_and_the_error_counts() {
        use FailureClass::{EgressRejected, Malformed, Rejected, Unreachable};
        let token = r#""accessToken":"canary","expiresIn":"1717138601944""#;
        for (status, error, class) in [
            (200, r#""error":{"code":"61006"}"#, Rejected),
            (200, r#""error":{"code":"61099"}"#, EgressRejected),
            (200, r#""error":{"message":"canary"}"#, Malformed),
            (200, r#""status":503"#, Unreachable),
            (500, r#""more":1"#, Unreachable),
            (401, r#""error":null"#, EgressRejected),
        ] {
            let refused = refused(status, &HeaderMap::new(), &format!("{{{token},{error}}}"));
            assert_eq!(refused.class, class, "{status} {error}");
            assert!(refused.may_have_issued, "{status} {error}");
            assert!(refused.message.ends_with("the token beside the error is not used"));
            assert!(!format!("{refused:?}").contains("canary"), "{error}");
        }
        // These fields say that there is no error.
        for none in [
            r#""error":null"#,
            r#""error":{}"#,
            r#""error":"""#,
            r#""error":[]"#,
            r#""error":false"#,
            r#""error":{"code":null,"message":null}"#,
            r#""error":{"code":"0","message":"success"},"status":200"#,
            r#""error":{"code":0}"#,
            r#""error":{"code":"00000","message":"OK"}"#,
        ] {
            let body = format!("{{{token},{none}}}");
            let issued = read(
                StatusCode::OK,
                &HeaderMap::new(),
                body.as_bytes(),
                at(ISSUED_MS),
                at(ISSUED_MS),
                TimeDelta::zero(),
            );
            assert!(issued.is_ok(), "{none}");
        }
    }

    #[test]
    fn a_code_is_reduced_to_at_most_sixteen_letters_and_digits() {
        for (code, kept) in [
            (r#""61 0-06\u0000""#, Some("61006")),
            ("61006", Some("61006")),
            ("61006.0", Some("61006")),
            ("6.1006e4", Some("61006")),
            (r#"" 61006\r\n""#, Some("61006")),
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
