//! Delivery of the journal to `audit_events` in Postgres, exactly once and in order.
//!
//! The records and the chain's position are written in one transaction, and the position moves by
//! compare-and-set. So when the outcome of a commit is unknown, the position shows it, and no record is lost
//! or duplicated. Two processes that deliver the same chain can only take turns.

mod error;
mod session;
mod source;

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use self::session::{ChainDelivery, DeliverySession};
pub use self::{error::DeliveryError, session::CHANGE_ID};
use crate::{
    audit::{
        chain::ChainLink,
        checkpoint_signer::CheckpointSigner,
        journal::{Archive, Journal},
    },
    store::Database,
};

/// The delay before reconnecting after a failure. It doubles with each further failure.
const FIRST_RECONNECT_DELAY: Duration = Duration::from_millis(250);
/// The longest delay before reconnecting.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(5);
/// The delay before reading a chain again that could not be read: the journal may be restoring its files. It
/// doubles with each further failure.
const FIRST_UNREADABLE_DELAY: Duration = Duration::from_secs(1);
/// The longest delay before reading a chain again that could not be read.
const MAX_UNREADABLE_DELAY: Duration = Duration::from_mins(1);
/// How long delivery continues at most after it was stopped, unless [`JournalDelivery::drain`] sets it.
const DEFAULT_DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// Delivers the durable records of this process's journal, over a connection of its own.
pub struct JournalDelivery {
    journal: Journal,
    database: Database,
    checkpoint_signer: Option<Arc<CheckpointSigner>>,
    drain_limit: Duration,
}

impl JournalDelivery {
    /// Returns a delivery that [`JournalDelivery::run`] starts.
    #[must_use]
    pub fn new(journal: Journal, database: Database) -> Self {
        Self { journal, database, checkpoint_signer: None, drain_limit: DEFAULT_DRAIN_LIMIT }
    }

    /// Also stores the checkpoints of `signer` in Postgres.
    #[must_use]
    pub fn checkpoint_signer(mut self, signer: Arc<CheckpointSigner>) -> Self {
        self.checkpoint_signer = Some(signer);
        self
    }

    /// Sets how long [`JournalDelivery::run`] continues at most after `stop` was cancelled. The default is
    /// 5 seconds.
    #[must_use]
    pub fn drain(mut self, limit: Duration) -> Self {
        self.drain_limit = limit;
        self
    }

    /// Delivers until `stop` is cancelled, and then the records that are durable by then, within the drain
    /// limit. Failures are logged and retried.
    ///
    /// Close the journal before cancelling `stop`: records that become durable later may wait until the
    /// next start delivers them. Cancel safe: a transaction that is under way is rolled back.
    pub async fn run(self, stop: CancellationToken) {
        let drain_limit_reached = async {
            stop.cancelled().await;
            tokio::time::sleep(self.drain_limit).await;
        };
        tokio::select! {
            () = self.deliver_until(&stop) => {}
            () = drain_limit_reached => {
                let undelivered = self.journal.stats().undelivered;
                tracing::warn!(undelivered, "audit records are left for the next start to deliver");
            }
        }
    }

    /// Connects and delivers, and reconnects after each failure.
    async fn deliver_until(&self, stop: &CancellationToken) {
        let mut delay = FIRST_RECONNECT_DELAY;
        loop {
            let mut delivered = false;
            let Err(error) = self.run_session(stop, &mut delivered).await else { return };
            if delivered {
                delay = FIRST_RECONNECT_DELAY;
            }
            tracing::warn!(%error, "audit delivery is interrupted");
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                // Cancelling `stop` ends the present delay. Later delays use up the drain limit.
                () = stop.cancelled(), if !stop.is_cancelled() => {}
            }
            delay = (2 * delay).min(MAX_RECONNECT_DELAY);
        }
    }

    /// Delivers over one connection until it fails. Returns without an error when `stop` is cancelled
    /// and everything is delivered. Sets `delivered` once any record was delivered.
    async fn run_session(
        &self,
        stop: &CancellationToken,
        delivered: &mut bool,
    ) -> Result<(), DeliveryError> {
        let mut session = DeliverySession::connect(&self.journal, &self.database).await?;
        let mut deliveries = session.register_chains().await?;
        let (mut unreadable_delay, mut retry_at) = (FIRST_UNREADABLE_DELAY, None);
        loop {
            // Read before delivering, so that every record that was durable when `stop` was cancelled is
            // delivered.
            let stopping = stop.is_cancelled();
            for delivery in &mut deliveries {
                *delivered |= session.deliver_all(delivery).await?;
                if let Some(signer) = &self.checkpoint_signer {
                    session.store_checkpoint(signer, delivery).await?;
                }
            }
            if stopping && self.is_delivered(&deliveries) {
                // An error is ignored: all records are delivered, and the server notices that the
                // connection is gone.
                let _ = session.close().await;
                return Ok(());
            }
            let any_blocked = deliveries.iter().any(|delivery| delivery.blocked.is_some());
            if any_blocked {
                retry_at = retry_at.or_else(|| Some(Instant::now() + unreadable_delay));
            } else {
                (unreadable_delay, retry_at) = (FIRST_UNREADABLE_DELAY, None);
            }
            tokio::select! {
                () = self.journal.wait_for_durable() => {}
                () = self.wait_for_checkpoint() => {}
                () = stop.cancelled(), if !stopping => {}
                () = sleep_until(retry_at.unwrap_or_else(Instant::now)), if any_blocked => {
                    retry_at = None;
                    unreadable_delay = (2 * unreadable_delay).min(MAX_UNREADABLE_DELAY);
                    session.unblock(&mut deliveries).await?;
                }
            }
        }
    }

    /// Waits until there may be a checkpoint to store.
    async fn wait_for_checkpoint(&self) {
        match &self.checkpoint_signer {
            Some(signer) => signer.signed().await,
            None => std::future::pending().await,
        }
    }

    /// Whether every chain that can be read is delivered up to its last durable record.
    fn is_delivered(&self, deliveries: &[ChainDelivery]) -> bool {
        self.journal.chains().iter().all(|chain| {
            deliveries.iter().any(|delivery| {
                delivery.chain.link.chain == chain.link.chain
                    && (delivery.blocked.is_some() || delivery.position.seq >= chain.last_seq)
            })
        })
    }
}

/// How far a chain of an [`Archive`] was delivered.
#[derive(Debug)]
pub struct DeliveredChain {
    /// The chain.
    pub chain: Arc<ChainLink>,
    /// `seq` of the last record that Postgres had before.
    pub from: i64,
    /// `seq` of the last record that Postgres has now.
    pub to: i64,
    /// Why the chain could not be delivered to its end, if so.
    pub blocked: Option<String>,
}

/// Delivers everything in `archive` over one connection, for `audit ship`.
///
/// A chain that cannot be read to its end does not keep the others from being delivered.
///
/// # Errors
/// [`DeliveryError`] when the database refuses a statement or does not answer. Records that were delivered
/// before stay delivered.
pub async fn deliver_archive(
    archive: &Archive,
    database: &Database,
) -> Result<Vec<DeliveredChain>, DeliveryError> {
    let mut session = DeliverySession::connect(archive, database).await?;
    let mut delivered = Vec::new();
    for mut delivery in session.register_chains().await? {
        let from = delivery.position.seq;
        session.deliver_all(&mut delivery).await?;
        let ChainDelivery { chain, position, blocked, .. } = delivery;
        delivered.push(DeliveredChain { chain: chain.link, from, to: position.seq, blocked });
    }
    session.close().await?;
    Ok(delivered)
}
