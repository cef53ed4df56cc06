//! When clients that retry by themselves are told to do so.
//!
//! A gRPC client with a retry policy waits for exactly as long as `grpc-retry-pushback-ms` says, even beyond its
//! deadline (gRFC A6). Then its program hears `DEADLINE_EXCEEDED` and not why the call was refused. So a pause is
//! told only where a retry after it can still be answered in the call's time; otherwise the value says that the
//! client must not retry, and its program hears the refusal at once.
//!
//! The pause itself stays in `RetryInfo`, for programs that retry on their own.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, Response};
use tokio::time::Instant;
use tonic::body::Body;

use super::{
    status::{DO_NOT_RETRY, PUSHBACK},
    timeout::timeout_of,
};

/// The time that a retry needs to arrive, to be answered and recorded, and for the answer to arrive. It also
/// covers that the client's time began before its call arrived.
const TIME_FOR_RETRY: Duration = Duration::from_millis(500);

/// The time that a client gives a call.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClientTime {
    arrived: Instant,
    limit: Duration,
}

impl ClientTime {
    /// Returns the time of a call with these headers that arrived at `arrived`. A call that sends no time limit,
    /// or a malformed one, has the time `default`, in which the broker answers it. A long limit counts in full,
    /// though the broker answers sooner: all retries of the call together have so much time.
    pub(super) fn of(headers: &HeaderMap, arrived: Instant, default: Duration) -> Self {
        Self { arrived, limit: timeout_of(headers).ok().flatten().unwrap_or(default) }
    }

    /// Forbids the client to retry, if `response` tells it to do so later than a retry can be answered at `now`.
    pub(super) fn limit_pushback(self, response: &mut Response<Body>, now: Instant) {
        let Some(value) = response.headers_mut().get_mut(PUSHBACK) else { return };
        let left = self.limit.saturating_sub(now.saturating_duration_since(self.arrived));
        let pause = value.to_str().ok().and_then(|text| text.parse().ok());
        if !pause.is_some_and(|pause| can_be_retried(Duration::from_millis(pause), left)) {
            *value = HeaderValue::from_static(DO_NOT_RETRY);
        }
    }
}

/// Whether a retry after `pause` can be answered for a client that waits for the time `left`. A pause must also be
/// a signed number of 32 bits, or clients do not understand it.
fn can_be_retried(pause: Duration, left: Duration) -> bool {
    i32::try_from(pause.as_millis()).is_ok() && pause.saturating_add(TIME_FOR_RETRY) <= left
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tonic::Status;

    use super::*;
    use crate::services::token_provider::CallRefusal;

    /// Returns the pushback of a refusal that is answered `passed` after the call arrived.
    fn pushback(refusal: CallRefusal, timeout: Option<&str>, passed: Duration) -> Option<String> {
        let mut headers = HeaderMap::new();
        if let Some(timeout) = timeout {
            headers.insert("grpc-timeout", timeout.parse().unwrap());
        }
        let arrived = Instant::now();
        let mut response = Status::from(refusal).into_http();
        ClientTime::of(&headers, arrived, Duration::from_secs(5))
            .limit_pushback(&mut response, arrived + passed);
        response.headers().get(PUSHBACK).map(|value| value.to_str().unwrap().to_owned())
    }

    const MS: fn(u64) -> Duration = Duration::from_millis;

    /// Each refusal that a retry may turn into an answer, with its pause.
    fn refusals_with_a_pause() -> Vec<(CallRefusal, u64)> {
        let retry_after = MS(2_000);
        vec![
            (CallRefusal::UpstreamUnavailable { retry_after }, 2_000),
            (CallRefusal::DatabaseUnavailable { retry_after }, 2_000),
            (CallRefusal::CallerRate { retry_after }, 2_000),
            (CallRefusal::Overloaded { retry_after }, 2_000),
            (CallRefusal::TokenEnded, 1_000),
            (CallRefusal::AuditUnavailable, 1_000),
            (CallRefusal::GrantsStale, 1_000),
        ]
    }

    #[test]
    fn a_client_is_told_to_retry_only_if_the_retry_can_be_answered_in_its_time() {
        for (refusal, pause) in refusals_with_a_pause() {
            for (timeout, passed, retried) in [
                // Without a time limit, the broker's default counts: 5 s here.
                (None, 0, true),
                (None, 2_400, true),
                (None, 4_600, false),
                (None, 10_000, false),
                (Some("0n"), 0, false),
                (Some("1n"), 0, false),
                (Some("400m"), 0, false),
                (Some("1400m"), 0, false),
                (Some("2500m"), 0, true),
                (Some("3S"), 0, true),
                (Some("3S"), 2_000, false),
                (Some("3000000u"), 0, true),
                // Longer than the broker lets a call wait: all retries together have this time.
                (Some("10M"), 0, true),
                (Some("10M"), 590_000, true),
                (Some("10M"), 599_000, false),
                (Some("99999999H"), 0, true),
                // A malformed limit counts as none.
                (Some("soon"), 0, true),
                (Some("soon"), 4_600, false),
            ] {
                let expected = if retried { pause.to_string() } else { DO_NOT_RETRY.into() };
                let told = pushback(refusal.clone(), timeout, MS(passed));
                assert_eq!(told, Some(expected), "{refusal:?} {timeout:?} after {passed} ms");
            }
        }
    }

    #[test]
    fn a_message_that_is_too_large_is_not_sent_again_though_its_code_is_often_retried() {
        let told = pushback(CallRefusal::DecompressedTooLarge, Some("60S"), Duration::ZERO);
        assert_eq!(told.as_deref(), Some(DO_NOT_RETRY));
    }

    #[test]
    fn a_pause_of_minutes_forbids_the_retry_of_a_call_with_a_usual_deadline() {
        let retry_after = Duration::from_mins(5);
        for (timeout, expected) in
            [(None, "-1"), (Some("5S"), "-1"), (Some("60S"), "-1"), (Some("6M"), "300000")]
        {
            let refusal = CallRefusal::UpstreamUnavailable { retry_after };
            assert_eq!(pushback(refusal, timeout, Duration::ZERO).as_deref(), Some(expected));
        }
    }

    #[test]
    fn a_pause_is_rounded_up_so_that_the_retry_is_not_too_early() {
        for (pause, expected) in [(1, "1"), (999_999, "1"), (1_000_000, "1"), (1_000_001, "2")] {
            let refusal = CallRefusal::CallerRate { retry_after: Duration::from_nanos(pause) };
            assert_eq!(pushback(refusal, None, Duration::ZERO).as_deref(), Some(expected));
        }
    }

    #[test]
    fn a_refusal_that_no_retry_changes_says_nothing_about_retries() {
        for refusal in [
            CallRefusal::NotGranted,
            CallRefusal::NoSuchAccount,
            CallRefusal::CredentialMissing,
            CallRefusal::AccountDisabled,
            CallRefusal::CredentialRejected { upstream_code: None },
            CallRefusal::EgressRejected { upstream_code: None },
            CallRefusal::DeadlineExceeded,
            CallRefusal::Cancelled,
            CallRefusal::NotGrpc { description: "" },
            CallRefusal::EncodingNotSupported,
            CallRefusal::MessageTooLarge,
            CallRefusal::UnknownMethod,
        ] {
            assert_eq!(pushback(refusal.clone(), Some("60S"), Duration::ZERO), None, "{refusal:?}");
        }
    }

    proptest! {
        #[test]
        fn a_told_pause_leaves_time_for_the_answer(
            pause in 0_u64..10_000_000_000, timeout in 0_u32..100_000_000, passed in 0_u64..200_000_000,
        ) {
            let refusal = CallRefusal::CallerRate { retry_after: MS(pause) };
            let told = pushback(refusal, Some(&format!("{timeout}m")), MS(passed)).unwrap();
            if told != DO_NOT_RETRY {
                prop_assert_eq!(&told, &pause.to_string());
                prop_assert!(told.parse::<i32>().is_ok());
                prop_assert!(passed + pause < u64::from(timeout));
            }
        }
    }
}
