//! Times and durations in the command line and in the output.

use std::{fmt, str::FromStr, time::Duration};

use chrono::{DateTime, Local, SecondsFormat};
use serde::{Serialize, Serializer};

use crate::domain::clock::{Timestamp, delta};

/// A time that is printed in the local time zone with its offset.
#[derive(Clone, Copy, Debug)]
pub(super) struct LocalTime(pub(super) Timestamp);

impl fmt::Display for LocalTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S %:z").fmt(f)
    }
}

impl Serialize for LocalTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = self.0.with_timezone(&Local).to_rfc3339_opts(SecondsFormat::AutoSi, false);
        serializer.serialize_str(&text)
    }
}

/// A time in a flag: an RFC 3339 time, or a duration before or after now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Moment {
    At(Timestamp),
    Relative(Duration),
}

impl Moment {
    /// Returns the time; a duration counts forwards from `now`.
    pub(super) fn after(self, now: Timestamp) -> Timestamp {
        match self {
            Self::At(at) => at,
            Self::Relative(duration) => now + delta(duration),
        }
    }

    /// Returns the time; a duration counts backwards from `now`.
    pub(super) fn before(self, now: Timestamp) -> Timestamp {
        match self {
            Self::At(at) => at,
            Self::Relative(duration) => now - delta(duration),
        }
    }
}

impl FromStr for Moment {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        DateTime::parse_from_rfc3339(text)
            .map(|at| Self::At(at.to_utc()))
            .or_else(|_| humantime::parse_duration(text).map(Self::Relative))
            .map_err(|_| "neither RFC 3339, such as 2027-01-31T09:00:00+09:00, nor a duration, such as 90d")
    }
}

/// Parses a duration above zero.
pub(super) fn positive_duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("must be above zero".into()),
        parsed => parsed.map_err(|error| error.to_string()),
    }
}

/// Formats a number of seconds as [`brief`] does.
pub(super) fn seconds(seconds: i64) -> String {
    brief(Duration::from_secs(seconds.unsigned_abs()))
}

/// Formats a duration in at most two units. It is rounded up to whole seconds, or to whole milliseconds
/// below a second, and then units below the two largest are dropped.
pub(super) fn brief(span: Duration) -> String {
    let unit = if span < Duration::from_secs(1) { 1_000_000 } else { 1_000_000_000 };
    let beyond = span.subsec_nanos() % unit;
    let missing = Duration::from_nanos(if beyond == 0 { 0 } else { (unit - beyond).into() });
    let whole = span.saturating_add(missing);
    humantime::format_duration(whole).to_string().split(' ').take(2).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_time_or_a_duration_before_or_after_now() {
        let now = DateTime::UNIX_EPOCH;
        let parse = |text: &str| text.parse::<Moment>();
        assert_eq!(parse("1970-01-01T09:00:05+09:00").unwrap().after(now).timestamp(), 5);
        assert_eq!(parse("90d").unwrap().after(now).timestamp(), 90 * 86_400);
        assert_eq!(parse("1h 30m").unwrap().before(now).timestamp(), -5_400);
        for wrong in ["", "tomorrow", "2027-01-31", "2027-01-31T09:00:00", "-1d", "90"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_time_is_printed_with_its_offset() {
        let shown = LocalTime(DateTime::UNIX_EPOCH).to_string();
        let parsed = DateTime::parse_from_str(&shown, "%Y-%m-%d %H:%M:%S %:z").unwrap();
        assert_eq!(parsed, DateTime::UNIX_EPOCH);
    }

    #[test]
    fn a_duration_has_at_most_two_units_and_no_fractions_of_seconds_from_one_second_on() {
        for (span, brief_span) in [
            (Duration::ZERO, "0s"),
            (Duration::from_nanos(1), "1ms"),
            (Duration::from_micros(151_003), "152ms"),
            (Duration::from_micros(999_500), "1s"),
            (Duration::from_micros(12_151_003), "13s"),
            (Duration::from_secs(61), "1m 1s"),
            (Duration::from_millis(119_001), "2m"),
            (Duration::from_secs(3_661), "1h 1m"),
            (Duration::from_secs(90_061), "1day 1h"),
        ] {
            assert_eq!(brief(span), brief_span, "{span:?}");
        }
        assert!(brief(Duration::MAX).split(' ').count() <= 2);
        assert_eq!(seconds(3_661), "1h 1m");
    }
}
