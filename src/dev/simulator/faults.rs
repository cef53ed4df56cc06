//! What can go wrong: settings for all requests, and answers for one.

use std::{net::IpAddr, time::Duration};

use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

/// How the simulated upstream behaves. As JSON, durations are text such as `"90s"` or `"1h"`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// The life of a token.
    #[serde(with = "span")]
    pub token_life: Duration,
    /// Real time before a request is looked at. A client that hangs up meanwhile changes nothing:
    /// the token is issued all the same.
    #[serde(with = "span")]
    pub latency: Duration,
    /// Whether a new token ends the older ones of its account.
    pub new_token_ends_older: bool,
    /// The addresses that may ask for tokens; all, when absent.
    pub allowed_addresses: Option<Vec<IpAddr>>,
    /// The status of the answer to any other address.
    pub unregistered_status: u16,
    /// The code of that answer. The real one is unknown.
    pub unregistered_code: String,
    /// The `allowIp` of tokens; the asking address, when absent.
    pub allow_ip: Option<IpAddr>,
    /// The share of requests, 0 to 1, that get a 503 in HTML, as from a proxy. Which ones depends on
    /// the seed and on how many came before.
    pub error_rate: f64,
    /// Chooses the requests that `error_rate` hits.
    pub seed: u64,
    /// How far the upstream's clock, `Date` and token times alike, is ahead of the real one.
    pub clock_skew_seconds: i64,
    /// How every request is answered that no script answers.
    pub answer: Answer,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            token_life: Duration::from_hours(1),
            latency: Duration::ZERO,
            new_token_ends_older: true,
            allowed_addresses: None,
            unregistered_status: 403,
            unregistered_code: "61090".to_owned(),
            allow_ip: None,
            error_rate: 0.0,
            seed: 0,
            clock_skew_seconds: 0,
            answer: Answer::Issue,
        }
    }
}

impl Faults {
    /// These faults with the keys of `changes`, a JSON object, put in place.
    ///
    /// # Errors
    /// Names the key or value that cannot be.
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
        self.answer.check()
    }

    /// Whether the `n`-th request is one of those that fail.
    pub(super) fn hits(&self, n: u64) -> bool {
        #[expect(clippy::cast_precision_loss, reason = "53 bits are taken, and 53 bits are exact")]
        let drawn = (scatter(self.seed ^ scatter(n)) >> 11) as f64 / (1_u64 << 53) as f64;
        drawn < self.error_rate
    }
}

/// `SplitMix64`: near numbers in, far numbers out.
fn scatter(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// How one request for a token is answered.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// As the API's document says.
    #[default]
    Issue,
    /// 200 with a proxy's page; nothing is issued.
    Html,
    /// 200 without a body; nothing is issued.
    Empty,
    /// A token is issued, and the JSON ends in its middle.
    TruncatedJson,
    /// A token is issued, and the connection ends before the `Content-Length` is reached.
    BrokenOff,
    /// A token is issued, and `expiresIn` is a minute ago.
    PastExpiry,
    /// A token is issued, and `expiresIn` is ten years ahead.
    FarFutureExpiry,
    /// A token is issued, and `expiresIn` is its life in seconds.
    ExpiresInDuration,
    /// A token is issued, in an answer of 1 MiB.
    HugeBody,
    /// A token is issued, and the answer comes a byte at a time, ten a second.
    SlowDrip,
    /// No answer until the client leaves; nothing is issued.
    Hang,
    /// A token is issued, and no answer comes.
    IssueThenHang,
    /// The connection is reset; nothing is issued.
    Reset,
    /// A token is issued, and the connection is reset.
    IssueThenReset,
    /// 307 to another place; nothing is issued.
    Redirect {
        /// The `Location`.
        to: String,
    },
    /// 429; nothing is issued.
    RateLimited {
        /// The `Retry-After`, in seconds or as a date; no header when absent.
        #[serde(default)]
        retry_after: Option<String>,
    },
    /// An error in the API's form; nothing is issued.
    Refuse {
        /// 400 to 599.
        status: u16,
        /// The error's code.
        code: String,
    },
    /// A proxy's page with a status; nothing is issued.
    Unavailable {
        /// 400 to 599.
        status: u16,
    },
}

impl Answer {
    /// Whether a token is issued with it.
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
            | Self::Unavailable { .. } => false,
        }
    }

    pub(super) fn check(&self) -> Result<(), FaultError> {
        match self {
            Self::Refuse { status, .. } | Self::Unavailable { status }
                if !(400..=599).contains(status) =>
            {
                Err(FaultError::OutOfRange("status", "400 to 599"))
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

/// A status that was checked to be one; what is not becomes 500.
pub(super) fn status(number: u16) -> StatusCode {
    StatusCode::from_u16(number).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// Why faults cannot be set so.
#[derive(Debug, Error)]
pub enum FaultError {
    /// Something else than `{…}`.
    #[error("the faults must be a JSON object")]
    NotAnObject,
    /// An unknown key, or a value of another type.
    #[error("the faults cannot be read: {0}")]
    Unreadable(#[from] serde_json::Error),
    /// A value that cannot be.
    #[error("{0} must be {1}")]
    OutOfRange(&'static str, &'static str),
}

/// Durations as people write them.
mod span {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(span: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(*span))
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
    fn changes_keep_what_they_do_not_name() {
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
    fn what_cannot_be_is_refused_by_name() {
        for (changes, named) in [
            (json!([]), "object"),
            (json!({"token_lif": "1h"}), "token_lif"),
            (json!({"latency": "soon"}), "number"),
            (json!({"error_rate": 1.5}), "error_rate"),
            (json!({"unregistered_status": 200}), "unregistered_status"),
            (json!({"clock_skew_seconds": i64::MAX}), "clock_skew_seconds"),
            (json!({"answer": "explode"}), "explode"),
            (json!({"answer": {"redirect": {"to": "a\r\nb"}}}), "to must be"),
            (json!({"answer": {"refuse": {"status": 99, "code": "x"}}}), "status"),
        ] {
            let refused = Faults::default().changed_by(changes).unwrap_err().to_string();
            assert!(refused.contains(named), "{refused}");
        }
    }

    #[test]
    fn the_error_rate_hits_its_share_and_the_same_ones_for_a_seed() {
        let hits = |error_rate, seed| {
            let faults = Faults { error_rate, seed, ..Faults::default() };
            (0..10_000).filter(|n| faults.hits(*n)).collect::<Vec<_>>()
        };
        assert!(hits(0.0, 1).is_empty());
        assert_eq!(hits(1.0, 1).len(), 10_000);
        assert!((2_700..3_300).contains(&hits(0.3, 1).len()));
        assert_eq!(hits(0.3, 1), hits(0.3, 1));
        assert_ne!(hits(0.3, 1), hits(0.3, 2));
    }
}
