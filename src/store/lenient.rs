//! Values that may be malformed, because somebody wrote them while the triggers were disabled.
//!
//! The driver fails for a whole result if one value of it cannot be decoded, and it panics for a time such
//! as `infinity`. With these types each value is decoded for itself, so that a malformed row concerns only
//! itself.

use std::{borrow::Cow, fmt};

use sqlx::{
    Decode, Postgres, Type, error::BoxDynError, postgres::PgTypeInfo, postgres::PgValueRef,
};

use crate::domain::clock::Timestamp;

/// The microseconds from 1970, from which timestamps count, to 2000, from which Postgres counts.
const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;
/// The first second after the times that the triggers accept: 9999-12-31 00:00:00 UTC.
const LAST_SECOND: i64 = 253_402_214_400;

/// A row that cannot be used. It is treated as if it did not exist, and is reported until it is corrected.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct UnusableRow {
    /// The table, or the column if only that cannot be used.
    pub table: &'static str,
    /// The row's id; for `tokens` and `refreshes` that of the account.
    pub id: i64,
    /// What is wrong, without the value.
    pub problem: Cow<'static, str>,
}

impl UnusableRow {
    /// Returns the report that the row `id` of `table` cannot be used because of `problem`, which must not
    /// quote the row.
    #[must_use]
    pub fn new(table: &'static str, id: i64, problem: impl Into<Cow<'static, str>>) -> Self {
        Self { table, id, problem: problem.into() }
    }
}

impl fmt::Display for UnusableRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} row {}: {}", self.table, self.id, self.problem)
    }
}

/// The rows of a table that can be used, and those that cannot.
#[derive(Clone, Debug)]
pub struct Readable<T> {
    /// The rows that can be used.
    pub rows: Vec<T>,
    /// The other rows.
    pub unusable: Vec<UnusableRow>,
}

impl<T> FromIterator<Result<T, UnusableRow>> for Readable<T> {
    fn from_iter<I: IntoIterator<Item = Result<T, UnusableRow>>>(rows: I) -> Self {
        let mut readable = Self { rows: Vec::new(), unusable: Vec::new() };
        for row in rows {
            match row {
                Ok(row) => readable.rows.push(row),
                Err(unusable) => readable.unusable.push(unusable),
            }
        }
        readable
    }
}

/// A value of the type `T`, or a malformed one.
#[derive(Clone, Debug)]
pub(super) struct Lenient<T>(Option<T>);

impl<T> Lenient<T> {
    /// Returns the value, or the error that `problem` describes if it is malformed.
    pub(super) fn or<E>(self, problem: E) -> Result<T, E> {
        self.0.ok_or(problem)
    }
}

impl<T: Type<Postgres>> Type<Postgres> for Lenient<T> {
    fn type_info() -> PgTypeInfo {
        T::type_info()
    }

    fn compatible(other: &PgTypeInfo) -> bool {
        T::compatible(other)
    }
}

impl<'r, T: Decode<'r, Postgres>> Decode<'r, Postgres> for Lenient<T> {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        Ok(Self(T::decode(value).ok()))
    }
}

/// A time between 1970 and 9999, the times that the triggers accept, or another one, which is malformed.
#[derive(Clone, Copy, Debug)]
pub(super) struct LenientTime(Option<Timestamp>);

impl LenientTime {
    /// Returns the time, or the error that `problem` describes if it is malformed.
    pub(super) fn or<E>(self, problem: E) -> Result<Timestamp, E> {
        self.0.ok_or(problem)
    }

    /// Converts microseconds since 2000, as Postgres sends them. `infinity` and `-infinity` are the largest
    /// and the smallest number.
    fn from_postgres(micros: i64) -> Self {
        let micros = micros.checked_add(POSTGRES_EPOCH_MICROS);
        let micros = micros.filter(|micros| (0..=LAST_SECOND * 1_000_000).contains(micros));
        Self(micros.and_then(Timestamp::from_timestamp_micros))
    }
}

impl Type<Postgres> for LenientTime {
    fn type_info() -> PgTypeInfo {
        <Timestamp as Type<Postgres>>::type_info()
    }
}

impl<'r> Decode<'r, Postgres> for LenientTime {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        let micros = <i64 as Decode<Postgres>>::decode(value);
        Ok(micros.map_or(Self(None), Self::from_postgres))
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;

    #[test]
    fn times_that_the_triggers_refuse_are_malformed_and_all_others_are_exact() {
        let time = |micros| LenientTime::from_postgres(micros).or(()).ok();
        assert_eq!(time(0), DateTime::from_timestamp(946_684_800, 0));
        let expected =
            DateTime::from_timestamp(946_684_800, 0).unwrap() + TimeDelta::microseconds(7);
        assert_eq!(time(7), Some(expected));
        let last = LAST_SECOND * 1_000_000 - POSTGRES_EPOCH_MICROS;
        assert_eq!(time(last).unwrap().to_rfc3339(), "9999-12-31T00:00:00+00:00");
        assert_eq!(time(-POSTGRES_EPOCH_MICROS), Some(DateTime::UNIX_EPOCH));
        for malformed in [i64::MAX, i64::MIN, last + 1, -POSTGRES_EPOCH_MICROS - 1] {
            assert_eq!(time(malformed), None, "{malformed}");
        }
    }

    #[test]
    fn rows_are_separated_into_usable_and_unusable_ones() {
        let unusable = UnusableRow::new("grants", 7, "malformed pattern");
        let readable: Readable<i32> = [Ok(1), Err(unusable.clone()), Ok(2)].into_iter().collect();
        assert_eq!(readable.rows, [1, 2]);
        assert_eq!(readable.unusable, [unusable]);
        assert_eq!(readable.unusable[0].to_string(), "grants row 7: malformed pattern");
    }
}
