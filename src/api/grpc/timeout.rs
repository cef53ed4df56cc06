//! The time that a client gives a call: the header `grpc-timeout`.

use std::time::Duration;

use http::HeaderMap;

use crate::services::token_provider::CallRefusal;

/// Parses the `grpc-timeout` header: at most eight digits and a unit, as the gRPC specification has it.
///
/// # Errors
/// [`CallRefusal::Invalid`] for anything else. (tonic ignores what it cannot parse.)
pub(super) fn timeout_of(headers: &HeaderMap) -> Result<Option<Duration>, CallRefusal> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let parsed = value.to_str().ok().and_then(|text| {
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let number: u64 = digits.parse().ok()?;
        Some(match unit {
            "H" => Duration::from_hours(number),
            "M" => Duration::from_mins(number),
            "S" => Duration::from_secs(number),
            "m" => Duration::from_millis(number),
            "u" => Duration::from_micros(number),
            "n" => Duration::from_nanos(number),
            _ => return None,
        })
    });
    parsed.map(Some).ok_or(CallRefusal::Invalid {
        field: "grpc-timeout",
        description: "must be at most eight digits and one of H, M, S, m, u, n".into(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(value: &str) -> Result<Option<Duration>, CallRefusal> {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-timeout", value.parse().unwrap());
        timeout_of(&headers)
    }

    #[test]
    fn timeouts_are_parsed_in_all_units() {
        assert_eq!(timeout_of(&HeaderMap::new()), Ok(None));
        for (text, expected) in [
            ("2H", Duration::from_hours(2)),
            ("3M", Duration::from_mins(3)),
            ("4S", Duration::from_secs(4)),
            ("99999999m", Duration::from_millis(99_999_999)),
            ("6u", Duration::from_micros(6)),
            ("0n", Duration::ZERO),
        ] {
            assert_eq!(parse(text), Ok(Some(expected)));
        }
    }

    #[test]
    fn malformed_timeouts_are_refused() {
        for text in ["", "5", "S", "123456789S", "-1S", "1.5S", "5s", "5 S"] {
            assert!(matches!(parse(text), Err(CallRefusal::Invalid { .. })), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_header_is_parsed_or_refused_without_a_panic(text in "[ -~]{0,12}") {
            let _ = parse(&text);
        }
    }
}
