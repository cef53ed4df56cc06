//! The faults that can be set: [`Faults`] for all requests, and [`Answer`] for a single one.

use std::{net::IpAddr, time::Duration};

use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

/// How the simulated upstream behaves. In JSON, durations are strings such as `"90s"` or `"1h"`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// The lifetime of tokens.
    #[serde(with = "duration_text")]
    pub token_life: Duration,
    /// A delay in real time before a token request is handled. If the client disconnects meanwhile,
    /// the request is handled all the same.
    #[serde(with = "duration_text")]
    pub latency: Duration,
    /// Whether issuing a token revokes the older ones of the same account.
    pub new_token_ends_older: bool,
    /// Whether an account's token is given again, and no new one issued, until it has ended.
    pub repeats_tokens: bool,
    /// The addresses that may request tokens; if absent, all.
    pub allowed_addresses: Option<Vec<IpAddr>>,
    /// The HTTP status of the response to requests from other addresses, 400 to 599.
    pub unregistered_status: u16,
    /// The error code of that response. The code that the real API uses is unknown.
    pub unregistered_code: String,
    /// The claim `allowIp` of tokens; if absent, the address of the client.
    pub allow_ip: Option<IpAddr>,
    /// The fraction of token requests, 0 to 1, that are answered with a 503 and an HTML page, as a
    /// proxy might do. Which requests these are depends on `seed` and the number of the request only.
    pub error_rate: f64,
    /// The seed of the random choice for `error_rate`.
    pub seed: u64,
    /// How far the upstream's clock is ahead of the simulator's clock, in seconds; at most a year in
    /// either direction. It affects the header `Date` and the times of tokens.
    pub clock_skew_seconds: i64,
    /// The answer to each protected call with a live token, instead of the right one.
    pub api_answer: Option<ApiAnswer>,
    /// The answer to all requests for which there is no script.
    pub answer: Answer,
}

/// An answer to a protected call.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ApiAnswer {
    /// A JSON error as the API sends it.
    Refuse {
        /// The HTTP status, 400 to 599.
        status: u16,
        /// The error code in the body.
        code: String,
    },
    /// Status 307, a redirect.
    Redirect {
        /// The value of the header `Location`.
        to: String,
    },
}

impl ApiAnswer {
    fn check(&self) -> Result<(), FaultError> {
        match self {
            Self::Refuse { status, .. } if !(400..=599).contains(status) => {
                Err(FaultError::OutOfRange("api_answer.status", "400 to 599"))
            }
            Self::Redirect { to } if !is_header_value(to) => {
                Err(FaultError::OutOfRange("api_answer.to", "visible ASCII characters"))
            }
            _ => Ok(()),
        }
    }
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            token_life: Duration::from_hours(1),
            latency: Duration::ZERO,
            new_token_ends_older: true,
            repeats_tokens: false,
            allowed_addresses: None,
            unregistered_status: 403,
            unregistered_code: "61090".to_owned(),
            allow_ip: None,
            error_rate: 0.0,
            seed: 0,
            clock_skew_seconds: 0,
            api_answer: None,
            answer: Answer::Issue,
        }
    }
}

impl Faults {
    /// Returns these faults with the fields replaced that `changes`, a JSON object, contains.
    ///
    /// # Errors
    /// When `changes` is no object, has an unknown field, or has a value that is not allowed. The
    /// message names the field.
    pub fn changed_by(&self, changes: Value) -> Result<Self, FaultError> {
        let Value::Object(changes) = changes else { return Err(FaultError::NotAnObject) };
        let mut merged = serde_json::to_value(self)?;
        if let Value::Object(merged) = &mut merged {
            merged.extend(changes);
        }
        let faults: Self = serde_json::from_value(merged)?;
        faults.check()?;
        Ok(faults)
    }

    fn check(&self) -> Result<(), FaultError> {
        const YEAR: i64 = 366 * 86_400;
        if !(0.0..=1.0).contains(&self.error_rate) {
            return Err(FaultError::OutOfRange("error_rate", "0 to 1"));
        }
        if !(-YEAR..=YEAR).contains(&self.clock_skew_seconds) {
            return Err(FaultError::OutOfRange("clock_skew_seconds", "a year at most"));
        }
        if !(400..=599).contains(&self.unregistered_status) {
            return Err(FaultError::OutOfRange("unregistered_status", "400 to 599"));
        }
        self.api_answer.as_ref().map_or(Ok(()), ApiAnswer::check)?;
        self.answer.check()
    }

    /// Whether the request with the number `n` fails because of `error_rate`.
    pub(super) fn is_random_failure(&self, n: u64) -> bool {
        #[expect(
            clippy::cast_precision_loss,
            reason = "an f64 represents integers of 53 bits exactly"
        )]
        let uniform =
            (split_mix_64(self.seed ^ split_mix_64(n)) >> 11) as f64 / (1_u64 << 53) as f64;
        uniform < self.error_rate
    }
}

/// The output function of the random number generator `SplitMix64` (Steele, Lea and Flood, 2014).
fn split_mix_64(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// How the upstream answers one token request.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// As the API's documentation specifies.
    #[default]
    Issue,
    /// Status 200 with an HTML page, as a proxy might send it. No token is issued.
    Html,
    /// Status 200 with an empty body. No token is issued.
    Empty,
    /// A token is issued, but the JSON in the body ends in the middle.
    TruncatedJson,
    /// A token is issued, but the connection is closed before the body has reached the length that
    /// `Content-Length` states.
    BrokenOff,
    /// A token is issued, but `expiresIn` is a minute in the past.
    PastExpiry,
    /// A token is issued, but `expiresIn` is ten years in the future.
    FarFutureExpiry,
    /// A token is issued, but `expiresIn` is its lifetime in seconds instead of a point in time.
    ExpiresInDuration,
    /// A token is issued, in a body of more than 1 MiB.
    HugeBody,
    /// A token is issued, but the body arrives at ten bytes a second.
    SlowDrip,
    /// No response is sent. No token is issued.
    Hang,
    /// A token is issued, but no response is sent.
    IssueThenHang,
    /// The connection is reset. No token is issued.
    Reset,
    /// A token is issued, but the connection is reset.
    IssueThenReset,
    /// Status 307, a redirect. No token is issued.
    Redirect {
        /// The value of the header `Location`.
        to: String,
    },
    /// Status 429. No token is issued.
    RateLimited {
        /// The value of the header `Retry-After`: seconds, or a date. If absent, there is no header.
        #[serde(default)]
        retry_after: Option<String>,
    },
    /// A JSON error as the API sends it. No token is issued.
    Refuse {
        /// The HTTP status, 400 to 599.
        status: u16,
        /// The error code in the body.
        code: String,
    },
    /// The given status and body. No token is issued.
    Body {
        /// The HTTP status, 200 to 599.
        status: u16,
        /// The body, whatever it is.
        body: String,
    },
    /// An error status with an HTML page, as a proxy might send it. No token is issued.
    Unavailable {
        /// The HTTP status, 400 to 599.
        status: u16,
    },
}

impl Answer {
    /// Whether this answer includes issuing a token.
    pub(super) fn issues(&self) -> bool {
        match self {
            Self::Issue
            | Self::TruncatedJson
            | Self::BrokenOff
            | Self::PastExpiry
            | Self::FarFutureExpiry
            | Self::ExpiresInDuration
            | Self::HugeBody
            | Self::SlowDrip
            | Self::IssueThenHang
            | Self::IssueThenReset => true,
            Self::Html
            | Self::Empty
            | Self::Hang
            | Self::Reset
            | Self::Redirect { .. }
            | Self::RateLimited { .. }
            | Self::Refuse { .. }
            | Self::Body { .. }
            | Self::Unavailable { .. } => false,
        }
    }

    /// Checks that statuses and header values are allowed.
    pub(super) fn check(&self) -> Result<(), FaultError> {
        match self {
            Self::Refuse { status, .. } | Self::Unavailable { status }
                if !(400..=599).contains(status) =>
            {
                Err(FaultError::OutOfRange("status", "400 to 599"))
            }
            Self::Body { status, .. } if !(200..=599).contains(status) => {
                Err(FaultError::OutOfRange("status", "200 to 599"))
            }
            Self::Redirect { to } if !is_header_value(to) => {
                Err(FaultError::OutOfRange("to", "visible ASCII characters"))
            }
            Self::RateLimited { retry_after: Some(text) } if !is_header_value(text) => {
                Err(FaultError::OutOfRange("retry_after", "visible ASCII characters"))
            }
            _ => Ok(()),
        }
    }
}

fn is_header_value(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_graphic() || b == b' ')
}

/// Converts a status that [`Answer::check`] has accepted; any other becomes 500.
pub(super) fn status(number: u16) -> StatusCode {
    StatusCode::from_u16(number).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// Why faults were not accepted.
#[derive(Debug, Error)]
pub enum FaultError {
    /// The JSON value is not an object.
    #[error("the faults must be a JSON object")]
    NotAnObject,
    /// A field is unknown, or its value has the wrong type.
    #[error("the faults cannot be read: {0}")]
    Unreadable(#[from] serde_json::Error),
    /// The value of a field, the first string, is not what the second string requires.
    #[error("{0} must be {1}")]
    OutOfRange(&'static str, &'static str),
}

/// Serializes durations as strings such as `"90s"`.
mod duration_text {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(*duration))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        humantime::parse_duration(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_change_keeps_the_fields_that_it_does_not_contain() {
        let faults = Faults::default();
        let changed = faults
            .changed_by(
                json!({"token_life": "90s", "answer": {"rate_limited": {"retry_after": "5"}}}),
            )
            .unwrap();
        assert_eq!(changed.token_life, Duration::from_secs(90));
        assert_eq!(changed.answer, Answer::RateLimited { retry_after: Some("5".into()) });
        assert_eq!(
            Faults { token_life: faults.token_life, answer: Answer::Issue, ..changed },
            faults
        );
    }

    #[test]
    fn an_error_names_the_field_that_is_not_accepted() {
        for (changes, named) in [
            (json!([]), "object"),
            (json!({"token_lif": "1h"}), "token_lif"),
            (json!({"latency": "soon"}), "number"),
            (json!({"error_rate": 1.5}), "error_rate"),
            (json!({"unregistered_status": 200}), "unregistered_status"),
            (json!({"clock_skew_seconds": i64::MAX}), "clock_skew_seconds"),
            (json!({"answer": "explode"}), "explode"),
            (json!({"api_answer": {"refuse": {"status": 200, "code": "x"}}}), "api_answer.status"),
            (json!({"api_answer": {"redirect": {"to": "a\r\nb"}}}), "api_answer.to"),
            (json!({"answer": {"redirect": {"to": "a\r\nb"}}}), "to must be"),
            (json!({"answer": {"refuse": {"status": 99, "code": "x"}}}), "status"),
        ] {
            let error = Faults::default().changed_by(changes).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn the_error_rate_selects_that_fraction_of_requests_and_the_same_ones_for_the_same_seed() {
        let failures = |error_rate, seed| {
            let faults = Faults { error_rate, seed, ..Faults::default() };
            (0..10_000).filter(|n| faults.is_random_failure(*n)).collect::<Vec<_>>()
        };
        assert!(failures(0.0, 1).is_empty());
        assert_eq!(failures(1.0, 1).len(), 10_000);
        assert!((2_700..3_300).contains(&failures(0.3, 1).len()));
        assert_eq!(failures(0.3, 1), failures(0.3, 1));
        assert_ne!(failures(0.3, 1), failures(0.3, 2));
    }
}
