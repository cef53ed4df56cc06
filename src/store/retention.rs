//! Days of the audit log that are to go.

use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, NaiveDate, NaiveTime};
use futures_util::TryStreamExt;
use sqlx::{PgPool, Postgres, Transaction, types::Json};

use super::{
    StoreError,
    audit::{Row, StoredEvent},
    interval,
};
use crate::{audit::checkpoint::PruningReceipt, domain::clock::Timestamp};

/// How long a day may take, which may have many records. Nobody but a late delivery waits for it.
const DAY_TIMEOUT: &str = "2h";
/// How long to wait for a table. Whoever waits has all others wait behind it.
const LOCK_TIMEOUT: &str = "2s";

/// How long records are kept at least, whatever the settings say.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MinimumRetention {
    /// All records but those of changes.
    pub calls: Duration,
    /// Those of changes; no shorter.
    pub changes: Duration,
}

impl MinimumRetention {
    /// Whether records may go as soon as the settings say; `None` is for ever.
    #[must_use]
    pub fn allows(&self, calls: Option<Duration>, changes: Option<Duration>) -> bool {
        calls.is_none_or(|calls| calls >= self.calls)
            && changes.is_none_or(|changes| changes >= self.changes)
    }
}

/// What the database's owner has set as the least, and `audit_prune` keeps to.
///
/// # Errors
/// When the database cannot be reached.
pub async fn least_kept(pool: &PgPool) -> Result<MinimumRetention, StoreError> {
    let row = sqlx::query!(
        r#"/* store::retention::least_kept */
        select calls_days, changes_days from audit_retention"#
    )
    .fetch_one(pool)
    .await?;
    let days = |days: i32| Duration::from_hours(24 * u64::from(days.unsigned_abs()));
    Ok(MinimumRetention { calls: days(row.calls_days), changes: days(row.changes_days) })
}

/// A day of the audit log that is over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Day {
    /// The UTC day.
    pub day: NaiveDate,
    /// Whether its changes are to go too, and not its calls alone.
    pub changes_too: bool,
}

/// The days that are over by the clock of the database and by `now`, which is ours: one of them may
/// be wrong. `calls` and `changes` are how long each is kept; `None` is for ever.
///
/// # Errors
/// When the database cannot be reached.
pub async fn days_over(
    pool: &PgPool,
    now: Timestamp,
    calls: Option<Duration>,
    changes: Option<Duration>,
) -> Result<Vec<Day>, StoreError> {
    let rows = sqlx::query!(
        r#"/* store::retention::days_over */
        with days as (
            select to_date(substring(c.relname from '^audit_events_(\d{8})$'), 'YYYYMMDD') as day
            from pg_inherits i
            join pg_class c on c.oid = i.inhrelid
            where i.inhparent = 'audit_events'::regclass
        ),
        ages as (
            select day, least(clock_timestamp(), $1)
                - ((day + 1)::timestamp at time zone 'UTC') as age
            from days where day is not null
        )
        select day as "day!", coalesce(age >= $3::interval, false) as "changes_too!"
        from ages
        where age >= $3::interval or (age >= $2::interval and exists (
            select from audit_events e
            where e.at >= day::timestamp at time zone 'UTC'
                and e.at < (day + 1)::timestamp at time zone 'UTC'
                and not audit_is_change(e.event)))
        order by day"#,
        now,
        calls.map(interval),
        changes.map(interval),
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| Day { day: row.day, changes_too: row.changes_too }).collect())
}

/// A day that is being removed.
pub struct Removal {
    transaction: Transaction<'static, Postgres>,
    day: Day,
}

impl Removal {
    /// Begins, and keeps the day as it is until the end; `None` while another replica removes one.
    ///
    /// # Errors
    /// When the database cannot be reached, or somebody has the day for too long.
    pub async fn begin(pool: &PgPool, day: Day) -> Result<Option<Self>, StoreError> {
        let mut transaction = pool.begin().await?;
        let alone = sqlx::query_scalar!(
            r#"/* store::retention::begin */
            select pg_try_advisory_xact_lock(hashtext('token_broker.retention')) as "alone!""#
        )
        .fetch_one(&mut *transaction)
        .await?;
        if !alone {
            return Ok(None);
        }
        sqlx::query!(
            "/* store::retention::begin */
            select set_config('statement_timeout', $1, true) as statement,
                set_config('lock_timeout', $2, true) as lock",
            DAY_TIMEOUT,
            LOCK_TIMEOUT,
        )
        .fetch_one(&mut *transaction)
        .await?;
        sqlx::query!("/* store::retention::begin */ select audit_hold($1)", day.day)
            .execute(&mut *transaction)
            .await?;
        Ok(Some(Self { transaction, day }))
    }

    /// Which day it is.
    #[must_use]
    pub fn day(&self) -> NaiveDate {
        self.day.day
    }

    /// Shows every record that goes, by chain and number.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn records(&mut self, mut show: impl FnMut(StoredEvent)) -> Result<(), StoreError> {
        let begins = self.day.day.and_time(NaiveTime::MIN).and_utc();
        let ends = self.day.day.succ_opt().map_or(DateTime::<chrono::Utc>::MAX_UTC, |next| {
            next.and_time(NaiveTime::MIN).and_utc()
        });
        let mut rows = sqlx::query_as!(
            Row,
            r#"/* store::retention::records */
            select instance, chain, seq, at, event, caller, caller_kind, peer, account, outcome,
                reason, generation, token_fingerprint, trace_id, latency_us, count,
                detail as "detail: Json<BTreeMap<String, String>>", prev_hash, hash
            from audit_events
            where at >= $1 and at < $2 and ($3 or not audit_is_change(event))
            order by chain, seq"#,
            begins,
            ends,
            self.day.changes_too,
        )
        .fetch(&mut *self.transaction);
        while let Some(row) = rows.try_next().await? {
            show(row.try_into()?);
        }
        Ok(())
    }

    /// Notes a cut.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn cut(&mut self, cut: &PruningReceipt) -> Result<(), StoreError> {
        sqlx::query!(
            "/* store::retention::cut */
            insert into audit_cuts
                (chain, first_seq, prev_hash, last_seq, hash, at, key_id, signature)
            values ($1, $2, $3, $4, $5, $6, $7, $8)",
            cut.chain,
            cut.first_seq,
            &cut.prev_hash.0,
            cut.last_seq,
            &cut.hash.0,
            cut.at,
            cut.signature.key_id,
            cut.signature.signature,
        )
        .execute(&mut *self.transaction)
        .await?;
        Ok(())
    }

    /// Leaves the day as it is. A removal that is only dropped holds it for a moment longer, and keeps
    /// the next one from beginning.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn abandon(self) -> Result<(), StoreError> {
        Ok(self.transaction.rollback().await?)
    }

    /// Removes what was shown, all of which must be cut; how many records that was.
    ///
    /// # Errors
    /// [`StoreError::MissingPrivilege`] when something is not cut; and when the database cannot be reached.
    pub async fn finish(mut self) -> Result<i64, StoreError> {
        let removed = sqlx::query_scalar!(
            r#"/* store::retention::finish */
            select audit_prune($1, $2) as "removed!""#,
            self.day.day,
            self.day.changes_too,
        )
        .fetch_one(&mut *self.transaction)
        .await?;
        self.transaction.commit().await?;
        Ok(removed)
    }
}
