//! Tells the other replicas that this one is alive, and learns of them.

use std::{sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    audit::journal::Journal,
    domain::clock::{Clock, Timestamp},
    services::{account_cache::AccountCache, connectivity::DatabaseConnectivity},
    store::{
        StoreError, accounts,
        instances::{self, Heartbeat},
        within,
    },
};

/// How long [`HeartbeatTask::run`] tries to store, at its end, that this instance has stopped.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// The pause between two heartbeats. Each also stores when accounts were last requested.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
/// A replica whose last heartbeat is older than this (three intervals) counts as stopped.
const ABSENT_AFTER: Duration = Duration::from_secs(30);
/// The most accounts whose time of the last request is stored by one statement.
const REQUESTS_BATCH: usize = 500;

/// What a replica reports about itself in its heartbeat.
#[derive(Clone, Debug)]
pub struct ReplicaIdentity {
    /// The id of the instance, which belongs to its state directory.
    pub instance: String,
    /// The number of the replica, which is part of the generations of its tokens.
    pub replica: u16,
    /// The ids of the keys in its keyring.
    pub key_ids: Vec<String>,
    /// When the process started.
    pub started_at: Timestamp,
}

/// The task that stores this replica's heartbeat, with its dependencies.
pub struct HeartbeatTask {
    /// What this replica reports about itself.
    pub replica: ReplicaIdentity,
    /// The pool for all statements.
    pub pool: PgPool,
    /// The accounts, with the times at which they were last requested.
    pub cache: Arc<AccountCache>,
    /// Receives whether there are other replicas.
    pub connectivity: Arc<DatabaseConnectivity>,
    /// The audit journal, whose position is part of the heartbeat.
    pub journal: Journal,
    /// The clock by which requests are selected.
    pub clock: Clock,
}

impl HeartbeatTask {
    /// Stores the first heartbeat. This replica and the others must know of each other before a token is
    /// issued.
    ///
    /// # Errors
    /// Returns the database's error.
    pub async fn start(&self) -> Result<(), StoreError> {
        within(self.send_heartbeat()).await
    }

    /// Stores heartbeats until `stop` is cancelled, and then that this instance has stopped.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.keep_alive() => {}
        }
        let stopped = instances::mark_stopped(&self.pool, &self.replica.instance);
        if !matches!(timeout(STOP_TIMEOUT, stopped).await, Ok(Ok(()))) {
            debug!("cannot store in the database that this instance has stopped");
        }
    }

    /// Sends a heartbeat at each interval. Never returns.
    async fn keep_alive(&self) {
        loop {
            tokio::time::sleep(HEARTBEAT_INTERVAL).await;
            match within(self.send_heartbeat()).await {
                Ok(()) => {}
                // The next poll detects whether the database answers.
                Err(error) if error.may_be_outage() => {
                    debug!(%error, "the heartbeat cannot be stored");
                }
                Err(error) => {
                    warn!(%error, "the database refuses the heartbeat: other replicas do not see this one");
                    self.connectivity.heartbeat_refused();
                }
            }
        }
    }

    /// Stores a heartbeat and the times at which accounts were last requested from this replica, and counts
    /// the other replicas.
    async fn send_heartbeat(&self) -> Result<(), StoreError> {
        let heartbeat = Heartbeat {
            instance: &self.replica.instance,
            replica: self.replica.replica,
            version: env!("CARGO_PKG_VERSION"),
            key_ids: &self.replica.key_ids,
            started_at: self.replica.started_at,
            chain: &self.journal.chain().chain,
            seq: self.journal.head().seq,
        };
        let (ids, moments) = self.requests_since(self.clock.now() - 2 * HEARTBEAT_INTERVAL);
        instances::store_heartbeat(&self.pool, &heartbeat).await?;
        let others = instances::count_others(&self.pool, heartbeat.instance, ABSENT_AFTER).await?;
        self.connectivity.heartbeat_stored(others);
        for (ids, moments) in ids.chunks(REQUESTS_BATCH).zip(moments.chunks(REQUESTS_BATCH)) {
            accounts::note_requests(&self.pool, ids, moments).await?;
        }
        Ok(())
    }

    /// Returns the ids of the accounts that were last requested at or after `since`, and these times in the
    /// same order.
    fn requests_since(&self, since: Timestamp) -> (Vec<i64>, Vec<Timestamp>) {
        let since = since.timestamp_millis();
        self.cache
            .all()
            .iter()
            .filter(|account| account.requested_ms() >= since)
            .filter_map(|account| {
                let requested = Timestamp::from_timestamp_millis(account.requested_ms())?;
                Some((account.id().0, requested))
            })
            .unzip()
    }
}
