//! Updates rows of accounts that other transactions may have locked, which no other duty may wait for.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    domain::clock::Timestamp,
    services::{account_cache::AccountCache, database_clock::DatabaseClock},
    store::{StoreError, accounts, leases, within},
};

/// The pause between two rounds.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often the times of the last requests are stored.
const REQUESTS_INTERVAL: Duration = Duration::from_secs(10);
/// The most accounts whose time of the last request is stored by one statement.
const REQUESTS_BATCH: usize = 500;

/// Drops credentials that are not needed any more, and stores when accounts were last requested. Rows that are
/// locked are left for a later round.
pub struct AccountUpkeep {
    /// The pool for all statements.
    pub pool: PgPool,
    /// The accounts, with the times at which they were last requested.
    pub cache: Arc<AccountCache>,
    /// The clock by which requests are stored.
    pub clock: Arc<DatabaseClock>,
}

impl AccountUpkeep {
    /// Runs until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.work() => {}
        }
    }

    /// Never returns.
    async fn work(&self) {
        let mut rounds = interval(INTERVAL);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut requests_due = Instant::now() + REQUESTS_INTERVAL;
        let mut refused = BTreeSet::new();
        loop {
            rounds.tick().await;
            let mut results = vec![self.drop_credentials(&mut refused).await];
            if Instant::now() >= requests_due {
                requests_due = Instant::now() + REQUESTS_INTERVAL;
                results.push(self.note_requests().await);
                results.push(within(leases::delete_expired_calls(&self.pool)).await);
            }
            for error in results.into_iter().filter_map(Result::err) {
                debug!(%error, "rows of accounts are left for a later round");
            }
        }
    }

    /// Drops previous secrets: all at once, or one by one if a row is refused. `refused` has the accounts whose rows
    /// were refused.
    async fn drop_credentials(&self, refused: &mut BTreeSet<i64>) -> Result<(), StoreError> {
        let dropped = match within(accounts::drop_replaced_credentials(&self.pool, None)).await {
            Err(StoreError::InvalidValue(_)) => self.drop_one_by_one(refused).await?,
            dropped => {
                let dropped = dropped?;
                refused.clear();
                dropped
            }
        };
        if dropped > 0 {
            info!(accounts = dropped, "previous secrets were dropped");
        }
        Ok(())
    }

    async fn drop_one_by_one(&self, refused: &mut BTreeSet<i64>) -> Result<u64, StoreError> {
        let known: Vec<_> = refused.iter().copied().collect();
        let mut dropped = 0;
        for account in within(accounts::with_replaced_credential(&self.pool, &known)).await? {
            let one = accounts::drop_replaced_credentials(&self.pool, Some(account));
            match within(one).await {
                Ok(one) => dropped += one,
                Err(error @ StoreError::InvalidValue(_)) => {
                    if refused.insert(account.0) {
                        warn!(%account, %error, "an account's row is malformed, so that it cannot be written, \
                            and its previous secret cannot be dropped");
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(dropped)
    }

    async fn note_requests(&self) -> Result<(), StoreError> {
        let (ids, moments) = self.requests_since(self.clock.local().now() - 2 * REQUESTS_INTERVAL);
        for (ids, moments) in ids.chunks(REQUESTS_BATCH).zip(moments.chunks(REQUESTS_BATCH)) {
            within(accounts::note_requests(&self.pool, ids, moments)).await?;
        }
        Ok(())
    }

    /// Returns the ids of the accounts that were last requested at or after `since`, and these times by the
    /// database's clock, in the same order.
    fn requests_since(&self, since: Timestamp) -> (Vec<i64>, Vec<Timestamp>) {
        let since = since.timestamp_millis();
        let ahead = self.clock.local().now() - self.clock.now();
        self.cache
            .all()
            .iter()
            .filter(|account| account.requested_ms() >= since)
            .filter_map(|account| {
                let requested = Timestamp::from_timestamp_millis(account.requested_ms())?;
                Some((account.id().0, requested - ahead))
            })
            .unzip()
    }
}
