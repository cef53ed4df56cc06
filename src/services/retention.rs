//! Removes the days of the audit log whose time is over, and signs what it removes.

use std::{sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    audit::{checkpoint::PruningReceipt, pruning::Runs},
    crypto::Keyring,
    domain::clock::{Clock, Timestamp},
    store::{
        Database, StoreError,
        retention::{Day, Removal, days_over, least_kept},
    },
};

/// How often to look.
const AGAIN: Duration = Duration::from_hours(1);
/// Postgres' code for a lock that was not had in time.
const LOCK_NOT_AVAILABLE: &str = "55P03";

/// Keeps records for as long as the settings say.
pub struct Retention {
    /// The database. A day may take long: it has a connection of its own.
    pub database: Database,
    /// Signs cuts.
    pub keyring: Arc<Keyring>,
    /// Time.
    pub clock: Clock,
    /// How long records are kept that are not changes; `None` for ever.
    pub calls: Option<Duration>,
    /// How long changes are kept; no shorter than calls.
    pub changes: Option<Duration>,
}

impl Retention {
    /// Removes what is over, again and again until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        loop {
            // A removal that is cut off is taken back by the database.
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.remove_all() => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.clock.sleep(AGAIN) => {}
            }
        }
    }

    /// Removes what is over by now. What cannot be removed is tried again the next time.
    pub async fn remove_all(&self) {
        // Nothing is kept shorter than calls: where these are kept for ever, all is.
        let Some(calls) = self.calls else { return };
        let pool = self.database.pool(1);
        match self.remove_days(&pool, calls).await {
            Ok(()) => {}
            Err(why @ StoreError::MissingPrivilege(_)) => {
                warn!(%why, "no audit records are removed: run deploy/roles.sql, as after each migration");
            }
            Err(error) => warn!(%error, "it cannot be told which audit records are over"),
        }
        pool.close().await;
    }

    async fn remove_days(&self, pool: &PgPool, calls: Duration) -> Result<(), StoreError> {
        let now = self.clock.now();
        let least = least_kept(pool).await?;
        if !least.allows(self.calls, self.changes) {
            warn!(
                ?least,
                "audit records are kept for longer than the settings say: the table \
                audit_retention wants it so"
            );
        }
        let calls = calls.max(least.calls);
        let changes = self.changes.map(|changes| changes.max(least.changes));
        for day in days_over(pool, now, Some(calls), changes).await? {
            match self.remove(pool, day, now).await {
                Ok(true) => {}
                // Another replica is at it.
                Ok(false) => return Ok(()),
                Err(error) => {
                    warn!(day = %day.day, %error, "audit records that are over are not removed yet");
                    // Whoever reads the log for long is in the way of every other day too.
                    if error.sqlstate() == Some(LOCK_NOT_AVAILABLE) {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Removes what is over of `day`; `false` while another replica does.
    async fn remove(&self, pool: &PgPool, day: Day, now: Timestamp) -> Result<bool, StoreError> {
        let Some(mut removal) = Removal::begin(pool, day).await? else { return Ok(false) };
        match self.cut(&mut removal, now).await {
            Ok(Some(records)) => {
                removal.finish().await?;
                info!(day = %day.day, changes_too = day.changes_too, records,
                    "audit records whose time is over are removed");
                Ok(true)
            }
            kept => {
                removal.abandon().await?;
                kept.map(|_| true)
            }
        }
    }

    /// Cuts all that goes; how many records that is, or `None` where one of them is evidence.
    async fn cut(&self, removal: &mut Removal, now: Timestamp) -> Result<Option<i64>, StoreError> {
        let mut runs = Runs::default();
        removal.records(|event| runs.add(&event)).await?;
        let records = runs.records();
        match runs.finish() {
            Ok(runs) => {
                for (chain, run) in runs {
                    removal.cut(&PruningReceipt::new(&self.keyring, &chain, run, now)).await?;
                }
                Ok(Some(records))
            }
            Err((chain, seq)) => {
                error!(day = %removal.day(), chain, seq, "an audit record is not what was written: \
                    its day is kept as evidence; see `audit verify`");
                Ok(None)
            }
        }
    }
}
