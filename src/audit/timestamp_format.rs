//! Serialization of timestamps: RFC 3339 in UTC with exactly six decimals, the precision that
//! hashes and signatures cover.

use std::borrow::Cow;

use chrono::{DateTime, SecondsFormat};
use serde::{Deserialize, Deserializer, Serializer, de::Error};

use crate::domain::clock::Timestamp;

/// Earliest and latest time that a record may have, in microseconds since 1970: the years 1970 to
/// 9999, for which Postgres can have partitions.
const RANGE_MICROS: (i64, i64) = (0, 253_402_300_799_999_999);

pub(super) fn serialize<S: Serializer>(at: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&text(*at))
}

/// Reads a timestamp in exactly the form that [`serialize`] writes. A time with more digits is refused,
/// since the hash would not cover the last ones.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(reader: D) -> Result<Timestamp, D::Error> {
    let written = Cow::<str>::deserialize(reader)?;
    let at: Option<Timestamp> = written.parse().ok();
    at.filter(|at| text(*at) == written).ok_or_else(|| {
        D::Error::custom("a time is not in whole microseconds, as 2027-03-01T00:00:00.000000Z")
    })
}

fn text(at: Timestamp) -> String {
    at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// Rounds `at` down to a whole microsecond and limits it to the years that a record may have.
pub(super) fn limit(at: Timestamp) -> Timestamp {
    let micros = at.timestamp_micros().clamp(RANGE_MICROS.0, RANGE_MICROS.1);
    DateTime::from_timestamp_micros(micros).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, PartialEq, serde::Serialize)]
    struct At(#[serde(with = "super")] Timestamp);

    #[test]
    fn a_timestamp_reads_back_and_any_other_form_is_refused() {
        let at = At(DateTime::from_timestamp_micros(1_717_138_601_944_001).unwrap());
        let text = serde_json::to_string(&at).unwrap();
        assert_eq!(text, "\"2024-05-31T06:56:41.944001Z\"");
        assert_eq!(serde_json::from_str::<At>(&text).unwrap(), at);
        for other in [
            "2024-05-31T06:56:41.9440011Z",
            "2024-05-31T06:56:41.944001000Z",
            "2024-05-31T06:56:41.944Z",
            "2024-05-31T06:56:41.944001+00:00",
            "2024-05-31T15:56:41.944001+09:00",
            "2024-05-31 06:56:41.944001Z",
            "",
        ] {
            let refused = serde_json::from_str::<At>(&format!("\"{other}\"")).unwrap_err();
            assert!(refused.to_string().starts_with("a time is not in whole"), "{refused}");
        }
    }
}
