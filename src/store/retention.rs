//! Retention in Postgres: finding the expired days of the audit log, and removing them.

use std::time::Duration;

use chrono::{DateTime, NaiveDate, NaiveTime};
use futures_util::TryStreamExt;
use sqlx::{PgPool, Postgres, Transaction};
use tracing::instrument;

use super::{
    StoreError,
    audit::{Decoded, EventRow, StoredEvent},
    interval,
};
use crate::{audit::checkpoint::PruningReceipt, domain::clock::Timestamp};

/// Statement timeout while a day is removed. It is long since a day may have many records; meanwhile, only
/// late delivery of records of that day has to wait.
const REMOVAL_TIMEOUT: &str = "2h";
/// Lock timeout while a day is removed. It is short since a session that waits for a table's lock blocks
/// all later ones.
const LOCK_TIMEOUT: &str = "2s";

/// The shortest time for which records are kept, whatever the settings say. The database's owner
/// sets it in the table `audit_retention`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MinimumRetention {
    /// The minimum for all records except those of changes.
    pub calls: Duration,
    /// The minimum for records of changes; not shorter than `calls`.
    pub changes: Duration,
}

impl MinimumRetention {
    /// Whether the settings `calls` and `changes` keep records at least as long as this minimum; `None`
    /// means for ever.
    #[must_use]
    pub fn allows(&self, calls: Option<Duration>, changes: Option<Duration>) -> bool {
        calls.is_none_or(|calls| calls >= self.calls)
            && changes.is_none_or(|changes| changes >= self.changes)
    }
}

/// Returns the minimum retention, which `audit_prune` enforces.
///
/// # Errors
/// When the statement fails.
#[instrument(level = "debug", skip_all)]
pub async fn minimum_retention(pool: &PgPool) -> Result<MinimumRetention, StoreError> {
    let row = sqlx::query!(
        r#"/* store::retention::minimum_retention */
        select calls_days, changes_days from audit_retention"#
    )
    .fetch_one(pool)
    .await?;
    let days = |days: i32| Duration::from_hours(24 * u64::from(days.unsigned_abs()));
    Ok(MinimumRetention { calls: days(row.calls_days), changes: days(row.changes_days) })
}

/// A day of the audit log whose records have expired.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ExpiredDay {
    /// The UTC day.
    pub day: NaiveDate,
    /// Whether its records of changes have expired too, and not only the others.
    pub changes_too: bool,
}

/// Returns the expired days, in order. A day must have expired both by the database's clock and by `now`,
/// the time of the broker's clock, since one of them may be wrong. `calls` and `changes` are how long records
/// are kept; `None` means for ever.
///
/// # Errors
/// When the statement fails.
#[instrument(level = "debug", skip_all)]
pub async fn expired_days(
    pool: &PgPool,
    now: Timestamp,
    calls: Option<Duration>,
    changes: Option<Duration>,
) -> Result<Vec<ExpiredDay>, StoreError> {
    let rows = sqlx::query!(
        r#"/* store::retention::expired_days */
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
                and e.event <> all (audit_change_events())))
        order by day"#,
        now,
        calls.map(interval),
        changes.map(interval),
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| ExpiredDay { day: row.day, changes_too: row.changes_too })
        .collect())
}

/// The transaction that removes the expired records of one day. End it by [`DayRemoval::commit`] or
/// [`DayRemoval::roll_back`].
#[must_use]
pub struct DayRemoval {
    transaction: Transaction<'static, Postgres>,
    day: ExpiredDay,
}

impl DayRemoval {
    /// Begins the transaction and locks the day's partition. Returns `None` while another replica
    /// removes records.
    ///
    /// # Errors
    /// When a statement fails; in particular with SQLSTATE `55P03` when the lock on the partition is not
    /// granted in time.
    #[instrument(level = "debug", skip_all, fields(day = %day.day))]
    pub async fn begin(pool: &PgPool, day: ExpiredDay) -> Result<Option<Self>, StoreError> {
        let mut transaction = pool.begin().await?;
        let locked = sqlx::query_scalar!(
            r#"/* store::retention::begin */
            select pg_try_advisory_xact_lock(hashtext('token_broker.retention')) as "locked!""#
        )
        .fetch_one(&mut *transaction)
        .await?;
        if !locked {
            return Ok(None);
        }
        sqlx::query!(
            "/* store::retention::begin */
            select set_config('statement_timeout', $1, true) as statement,
                set_config('lock_timeout', $2, true) as lock",
            REMOVAL_TIMEOUT,
            LOCK_TIMEOUT,
        )
        .fetch_one(&mut *transaction)
        .await?;
        sqlx::query!("/* store::retention::begin */ select audit_lock_day($1)", day.day)
            .execute(&mut *transaction)
            .await?;
        Ok(Some(Self { transaction, day }))
    }

    /// Returns the day whose records are removed.
    #[must_use]
    pub fn day(&self) -> NaiveDate {
        self.day.day
    }

    /// Calls `visit` with every record that is to be removed, by chain and number.
    ///
    /// # Errors
    /// When the statement fails.
    #[instrument(level = "debug", skip_all, fields(day = %self.day.day))]
    pub async fn records(
        &mut self,
        mut visit: impl FnMut(Decoded<StoredEvent>),
    ) -> Result<(), StoreError> {
        let begins = self.day.day.and_time(NaiveTime::MIN).and_utc();
        let ends = self.day.day.succ_opt().map_or(DateTime::<chrono::Utc>::MAX_UTC, |next| {
            next.and_time(NaiveTime::MIN).and_utc()
        });
        let mut rows = sqlx::query_as!(
            EventRow,
            r#"/* store::retention::records */
            select instance as "instance?", chain, seq,
            case when at >= '1970-01-01 00:00:00+00' and at < '10000-01-01 00:00:00+00' then at end as "at?",
            event as "event?", caller, caller_kind, peer, account, outcome as "outcome?", reason,
            generation, token_fingerprint, trace_id, latency_us, count as "count?",
            detail::text as "detail?", prev_hash as "prev_hash?", hash as "hash?"
            from audit_events
            where at >= $1 and at < $2 and ($3 or event <> all (audit_change_events()))
            order by chain, seq"#,
            begins,
            ends,
            self.day.changes_too,
        )
        .fetch(&mut *self.transaction);
        while let Some(row) = rows.try_next().await? {
            visit(row.decode());
        }
        Ok(())
    }

    /// Inserts a receipt for a range of records that will be removed.
    ///
    /// # Errors
    /// When the statement fails.
    pub async fn store_receipt(&mut self, receipt: &PruningReceipt) -> Result<(), StoreError> {
        sqlx::query!(
            "/* store::retention::store_receipt */
            insert into audit_pruning_receipts
                (chain, first_seq, prev_hash, last_seq, hash, at, key_id, signature)
            values ($1, $2, $3, $4, $5, $6, $7, $8)",
            receipt.chain,
            receipt.first_seq,
            &receipt.prev_hash.0,
            receipt.last_seq,
            &receipt.hash.0,
            receipt.at,
            receipt.signature.key_id,
            receipt.signature.signature,
        )
        .execute(&mut *self.transaction)
        .await?;
        Ok(())
    }

    /// Rolls back, so that no record is removed. If the value is dropped instead, the rollback happens some
    /// time later, and no other removal can begin until then.
    ///
    /// # Errors
    /// When the statement fails.
    pub async fn roll_back(self) -> Result<(), StoreError> {
        Ok(self.transaction.rollback().await?)
    }

    /// Removes the records, all of which must have receipts, and commits. Returns the number of removed
    /// records.
    ///
    /// # Errors
    /// [`StoreError::MissingPrivilege`] when a record has no receipt; otherwise when a statement fails.
    #[instrument(level = "debug", skip_all, fields(day = %self.day.day))]
    pub async fn commit(mut self) -> Result<i64, StoreError> {
        let removed = sqlx::query_scalar!(
            r#"/* store::retention::commit */
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
