//! Removes audit records that are older than the retention settings, and signs receipts for them.

use std::{sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, instrument, warn};

use crate::{
    audit::{checkpoint::PruningReceipt, pruning::PrunedRangeCollector},
    crypto::LiveKeyring,
    domain::clock::{Clock, Timestamp},
    store::{
        Database, StoreError,
        retention::{DayRemoval, ExpiredDay, expired_days, minimum_retention},
    },
};

/// Time between two runs.
const RUN_INTERVAL: Duration = Duration::from_hours(1);
/// How long finding out what has expired may take, and removing one day. Without a limit, a server that stops
/// answering would end the removal for good.
const READ_TIMEOUT: Duration = Duration::from_mins(1);
const DAY_TIMEOUT: Duration = Duration::from_hours(1);
/// SQLSTATE of a lock that was not granted in time.
const LOCK_NOT_AVAILABLE: &str = "55P03";

/// The task that enforces the retention settings. Whole UTC days are removed, each in one transaction.
pub struct Retention {
    /// The database. Removal uses a connection of its own, since a day may take long.
    pub database: Database,
    /// Signs the receipts.
    pub keyring: Arc<LiveKeyring>,
    /// Decides which days have expired, together with the database's clock.
    pub clock: Clock,
    /// How long all records but those of changes are kept; `None` for ever.
    pub calls: Option<Duration>,
    /// How long records of changes are kept, no shorter than `calls`; `None` for ever.
    pub changes: Option<Duration>,
}

/// Runs `step` for no longer than `limit`.
async fn in_time<T>(
    limit: Duration,
    step: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let late = StoreError::TimedOut { reason: "no answer while expired records were removed" };
    timeout(limit, step).await.unwrap_or(Err(late))
}

impl Retention {
    /// Removes expired records at once and again every hour, until `stop` is cancelled. A removal that is
    /// under way then is rolled back.
    pub async fn run(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.remove_expired() => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.clock.sleep(RUN_INTERVAL) => {}
            }
        }
    }

    /// Removes the records that have expired by now. Failures are logged; the next run tries again.
    /// Cancel safe: a day is removed completely or not at all.
    pub async fn remove_expired(&self) {
        // Records of changes are kept at least as long as others: if those are kept for ever, all are.
        let Some(calls) = self.calls else { return };
        let pool = self.database.pool(1);
        match self.remove_days(&pool, calls).await {
            Ok(()) => {}
            Err(why @ StoreError::MissingPrivilege(_)) => {
                warn!(%why, "no audit records are removed: run deploy/roles.sql, as after each migration");
            }
            Err(error) => warn!(%error, "expired audit records could not be determined"),
        }
        pool.close().await;
    }

    async fn remove_days(&self, pool: &PgPool, calls: Duration) -> Result<(), StoreError> {
        // The wall clock may be ahead, or may have been at the start. What is deleted does not come back.
        let now = self.clock.now().min(self.clock.wall());
        let minimum = in_time(READ_TIMEOUT, minimum_retention(pool)).await?;
        if !minimum.allows(self.calls, self.changes) {
            warn!(
                ?minimum,
                "audit records are kept for longer than the settings say: the table \
                audit_retention demands it"
            );
        }
        let calls = calls.max(minimum.calls);
        let changes = self.changes.map(|changes| changes.max(minimum.changes));
        let days = in_time(READ_TIMEOUT, expired_days(pool, now, Some(calls), changes)).await?;
        for day in days {
            match in_time(DAY_TIMEOUT, self.remove_day(pool, day, now)).await {
                Ok(true) => {}
                // Another replica is removing records: the rest is left to it.
                Ok(false) => return Ok(()),
                Err(error) => {
                    warn!(day = %day.day, %error, "expired audit records are not removed yet");
                    // A reader of the log locks every day, so that the other days would fail too.
                    if error.sqlstate() == Some(LOCK_NOT_AVAILABLE) {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Removes the expired records of `day`. Returns `false` if another replica removes records.
    #[instrument(level = "debug", skip_all, fields(day = %day.day))]
    async fn remove_day(
        &self,
        pool: &PgPool,
        day: ExpiredDay,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let Some(mut removal) = DayRemoval::begin(pool, day).await? else { return Ok(false) };
        match self.store_receipts(&mut removal, now).await {
            Ok(Some(records)) => {
                removal.commit().await?;
                info!(day = %day.day, changes_too = day.changes_too, records,
                    "expired audit records are removed");
                Ok(true)
            }
            not_removed => {
                let rolled_back = removal.roll_back().await;
                // The first error says why the day is not removed.
                not_removed?;
                rolled_back.map(|()| true)
            }
        }
    }

    /// Signs and stores receipts for all records that are to be removed. Returns how many records there
    /// are; `None` if one of them was tampered with, so that the day must be kept as evidence.
    async fn store_receipts(
        &self,
        removal: &mut DayRemoval,
        now: Timestamp,
    ) -> Result<Option<i64>, StoreError> {
        let mut ranges = PrunedRangeCollector::default();
        removal
            .records(|event| match event {
                Ok(event) => ranges.add(&event),
                Err(unreadable) => ranges.add_unreadable(&unreadable),
            })
            .await?;
        let records = ranges.records();
        match ranges.finish() {
            Ok(ranges) => {
                let keyring = self.keyring.current();
                for (chain, range) in ranges {
                    let receipt = PruningReceipt::new(&keyring, &chain, range, now);
                    removal.store_receipt(&receipt).await?;
                }
                Ok(Some(records))
            }
            Err(tampered) => {
                error!(day = %removal.day(), chain = tampered.chain, seq = tampered.seq,
                    "an audit record is not what was written: its day is kept as evidence; see \
                    `audit verify`");
                Ok(None)
            }
        }
    }
}
