//! Delivery of the journal to `audit_events`, exactly once and in order.
//!
//! The rows and the chain's position move in one transaction, and the position moves by
//! compare-and-set. So a commit whose outcome is unknown costs a look at the position, never a
//! record; and two shippers of one chain can only take turns.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use chrono::{Datelike, NaiveDate};
use sqlx::{ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::{
    audit::{
        chain::{ChainHead, ChainLink, StoredEvent},
        checkpoint_signer::CheckpointSigner,
        journal::{Archive, ChainReader, Journal, LocalChain, ReadError},
    },
    store::{StoreError, audit},
};

/// The detail that names the row of `changes` which an event tells of.
pub const CHANGE_ID: &str = "change_id";

/// The most rows in one transaction: more gain nothing and hold locks for longer.
const BATCH: usize = 500;
/// How long one exchange with Postgres may take. A server that hangs is left for a new connection.
const PATIENCE: Duration = Duration::from_secs(15);
/// The pause after a failed connection; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long a chain that cannot be read on is left alone.
const STUCK_PAUSE: Duration = Duration::from_mins(1);
/// How long a shipper that is told to stop goes on, unless told otherwise.
const DRAIN: Duration = Duration::from_secs(5);

/// Why delivery does not go on.
#[derive(Debug, Error)]
pub enum DeliveryError {
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It fell silent.
    #[error("the database did not answer within {} s", PATIENCE.as_secs())]
    Hung,
    /// Somebody else delivers the chain, or its position is that of another history.
    #[error("the position of audit chain {0} was moved by somebody else")]
    Moved(String),
    /// The process ends.
    #[error("reading the journal was interrupted")]
    Interrupted,
}

/// Delivers what is durable in a journal, over a connection of its own.
pub struct JournalDelivery {
    journal: Journal,
    connection: PgConnectOptions,
    notary: Option<Arc<CheckpointSigner>>,
    drain: Duration,
}

/// Where chains are read from.
trait JournalSource: Sync {
    fn chains(&self) -> Vec<LocalChain>;
    fn reader(&self, link: Arc<ChainLink>, after: ChainHead) -> ChainReader;
    /// Hears how far a chain has reached Postgres.
    fn delivered(&self, chain: &str, seq: i64);
}

impl JournalSource for Journal {
    fn chains(&self) -> Vec<LocalChain> {
        self.chains()
    }

    fn reader(&self, link: Arc<ChainLink>, after: ChainHead) -> ChainReader {
        self.reader(link, after)
    }

    fn delivered(&self, chain: &str, seq: i64) {
        self.delivered(chain, seq);
    }
}

impl JournalSource for Archive {
    fn chains(&self) -> Vec<LocalChain> {
        self.chains()
    }

    fn reader(&self, link: Arc<ChainLink>, after: ChainHead) -> ChainReader {
        self.reader(link, after)
    }

    /// A broker that starts on it asks Postgres.
    fn delivered(&self, _chain: &str, _seq: i64) {}
}

impl JournalDelivery {
    /// A shipper that has not begun.
    #[must_use]
    pub fn new(journal: Journal, connection: PgConnectOptions) -> Self {
        Self { journal, connection, notary: None, drain: DRAIN }
    }

    /// Takes the heads that `notary` signs to Postgres too.
    #[must_use]
    pub fn notary(mut self, notary: Arc<CheckpointSigner>) -> Self {
        self.notary = Some(notary);
        self
    }

    /// Sets how long [`JournalDelivery::run`] goes on once it is told to stop while records are left.
    #[must_use]
    pub fn drain(mut self, limit: Duration) -> Self {
        self.drain = limit;
        self
    }

    /// Delivers until `stop`, and then what is durable still, as far as the drain's limit allows.
    /// Close the journal before `stop`: what becomes durable later may wait for the next start.
    pub async fn run(self, stop: CancellationToken) {
        let out_of_time = async {
            stop.cancelled().await;
            tokio::time::sleep(self.drain).await;
        };
        tokio::select! {
            () = self.deliver_until(&stop) => {}
            () = out_of_time => {
                let undelivered = self.journal.stats().undelivered;
                tracing::warn!(undelivered, "audit records are left for the next start to deliver");
            }
        }
    }

    /// Connects, delivers, and connects anew after each failure.
    async fn deliver_until(&self, stop: &CancellationToken) {
        let mut pause = FIRST_PAUSE;
        loop {
            let mut delivered = false;
            let Err(error) = self.session(stop, &mut delivered).await else { return };
            if delivered {
                pause = FIRST_PAUSE;
            }
            tracing::warn!(%error, "audit delivery is interrupted");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                // At the end there is no time to lose.
                () = stop.cancelled(), if !stop.is_cancelled() => {}
            }
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    /// One connection's life: what the chains' positions are, then all that follows. Returns when
    /// it is told to stop and nothing is left.
    async fn session(
        &self,
        stop: &CancellationToken,
        delivered: &mut bool,
    ) -> Result<(), DeliveryError> {
        let mut session = Session {
            shelf: &self.journal,
            connection: within(async { Ok(self.connection.connect().await?) }).await?,
            days: BTreeSet::new(),
        };
        let mut deliveries = session.register().await?;
        loop {
            // Looked at first: what is told before the order to stop is delivered.
            let stopping = stop.is_cancelled();
            for delivery in &mut deliveries {
                *delivered |= session.deliver_all(delivery).await?;
                if let Some(notary) = &self.notary {
                    session.keep_head(notary, delivery).await?;
                }
            }
            if stopping && self.nothing_left(&deliveries) {
                // A server that does not hear of the end finds out by itself.
                let _ = within(async { Ok(session.connection.close().await?) }).await;
                return Ok(());
            }
            let any_stuck = deliveries.iter().any(|delivery| delivery.stuck.is_some());
            tokio::select! {
                () = self.journal.more_durable() => {}
                () = self.head_wanted() => {}
                () = stop.cancelled(), if !stopping => {}
                () = tokio::time::sleep(STUCK_PAUSE), if any_stuck => {
                    for delivery in &mut deliveries {
                        delivery.stuck = None;
                    }
                }
            }
        }
    }

    /// Returns when there may be a head to deliver.
    async fn head_wanted(&self) {
        match &self.notary {
            Some(notary) => notary.wanted().await,
            None => std::future::pending().await,
        }
    }

    /// Whether every chain that can be read is delivered as far as it is durable.
    fn nothing_left(&self, deliveries: &[Delivery]) -> bool {
        self.journal.chains().iter().all(|chain| {
            deliveries.iter().any(|delivery| {
                delivery.chain.link.chain == chain.link.chain
                    && (delivery.stuck.is_some() || delivery.position.seq >= chain.last_seq)
            })
        })
    }
}

/// A chain on its way.
struct Delivery {
    chain: LocalChain,
    position: ChainHead,
    /// Taken while a blocking task reads.
    reader: Option<ChainReader>,
    /// Why the chain cannot be read on. The others go on; it is tried again after [`STUCK_PAUSE`].
    stuck: Option<ReadError>,
}

/// What belongs to one connection.
struct Session<'a> {
    shelf: &'a dyn JournalSource,
    connection: PgConnection,
    /// The days whose partitions are there. Asked for anew by each connection, since an error may
    /// mean that one was dropped.
    days: BTreeSet<NaiveDate>,
}

impl Session<'_> {
    /// Makes the chains known, and takes their positions from Postgres.
    async fn register(&mut self) -> Result<Vec<Delivery>, DeliveryError> {
        let mut deliveries = Vec::new();
        for chain in self.shelf.chains() {
            let registered = audit::register_chain(&mut self.connection, &chain.link);
            let position = within(registered).await?;
            if position.seq > chain.last_seq {
                tracing::error!(
                    chain = chain.link.chain,
                    delivered = position.seq,
                    journal = chain.last_seq,
                    "Postgres has audit records that this journal has lost"
                );
            }
            self.shelf.delivered(&chain.link.chain, position.seq);
            let reader = Some(self.shelf.reader(Arc::clone(&chain.link), position));
            deliveries.push(Delivery { chain, position, reader, stuck: None });
        }
        Ok(deliveries)
    }

    /// Delivers what is durable of one chain; whether there was anything.
    async fn deliver_all(&mut self, delivery: &mut Delivery) -> Result<bool, DeliveryError> {
        let mut any = false;
        while delivery.stuck.is_none() {
            let events = match read(delivery).await? {
                Ok(events) if events.is_empty() => break,
                Ok(events) => events,
                Err(ReadError::Missing { .. }) if self.skip_lost(delivery) => continue,
                Err(error) => {
                    let chain = &delivery.chain.link.chain;
                    tracing::error!(chain, %error, "an audit chain cannot be delivered on");
                    delivery.stuck = Some(error);
                    break;
                }
            };
            for batch in events.chunks(BATCH) {
                self.deliver(delivery, batch).await?;
                any = true;
            }
        }
        Ok(any)
    }

    /// Goes on where the journal begins, if that is behind the database's position: it went back, and what
    /// would come next is gone. A gap in the log is told by every proof of it; to wait would fill the
    /// journal, and lose the rest too.
    fn skip_lost(&self, delivery: &mut Delivery) -> bool {
        let chain = &delivery.chain.link.chain;
        let kept = self.shelf.chains().into_iter().find(|kept| kept.link.chain == *chain);
        let Some(kept) = kept.filter(|kept| kept.before.seq > delivery.position.seq) else {
            return false;
        };
        let reader = delivery.reader.as_ref();
        if reader.is_none_or(|reader| reader.head().seq >= kept.before.seq) {
            return false;
        }
        tracing::error!(
            chain,
            first = delivery.position.seq + 1,
            last = kept.before.seq,
            "audit records that the database lost are not in the journal any more: a gap stays"
        );
        delivery.reader = Some(self.shelf.reader(Arc::clone(&kept.link), kept.before));
        true
    }

    async fn deliver(
        &mut self,
        delivery: &mut Delivery,
        events: &[StoredEvent],
    ) -> Result<(), DeliveryError> {
        let Some(last) = events.last() else { return Ok(()) };
        for day in days_for(events) {
            if !self.days.contains(&day) {
                within(audit::ensure_partition(&mut self.connection, day)).await?;
                self.days.insert(day);
            }
        }
        let (link, changes) = (&delivery.chain.link, change_ids(events));
        let delivered =
            audit::deliver(&mut self.connection, link, delivery.position, events, &changes);
        if !within(delivered).await? {
            return Err(DeliveryError::Moved(link.chain.clone()));
        }
        delivery.position = last.head();
        self.shelf.delivered(&link.chain, last.seq);
        Ok(())
    }

    async fn keep_head(
        &mut self,
        notary: &CheckpointSigner,
        delivery: &Delivery,
    ) -> Result<(), DeliveryError> {
        if let Some(head) = notary.due(&delivery.chain.link.chain, delivery.position.seq) {
            within(audit::keep_head(&mut self.connection, &head)).await?;
            notary.kept(&head);
        }
        Ok(())
    }
}

/// The days whose partitions `events` need, and the one after the last: so it is there before anybody
/// waits for it.
fn days_for(events: &[StoredEvent]) -> BTreeSet<NaiveDate> {
    let mut days: BTreeSet<_> = events.iter().map(|event| event.at.date_naive()).collect();
    let next = days.last().and_then(NaiveDate::succ_opt);
    days.extend(next.filter(|next| next.year() <= 9999));
    days
}

/// How far a chain of an [`Archive`] was delivered.
#[derive(Debug)]
pub struct Shipped {
    /// The chain.
    pub chain: Arc<ChainLink>,
    /// The last record that Postgres had before.
    pub from: i64,
    /// The last record that it has now.
    pub to: i64,
    /// Why it was not delivered to its end.
    pub stuck: Option<ReadError>,
}

/// Delivers all that `archive` holds, over one connection.
///
/// # Errors
/// When a chain cannot be delivered; what was delivered until then stays. One that cannot be read on
/// holds up no other.
pub async fn ship(
    archive: &Archive,
    connection: &PgConnectOptions,
) -> Result<Vec<Shipped>, DeliveryError> {
    let connection = within(async { Ok(connection.connect().await?) }).await?;
    let mut session = Session { shelf: archive, connection, days: BTreeSet::new() };
    let mut shipped = Vec::new();
    for mut delivery in session.register().await? {
        let from = delivery.position.seq;
        session.deliver_all(&mut delivery).await?;
        let Delivery { chain, position, stuck, .. } = delivery;
        shipped.push(Shipped { chain: chain.link, from, to: position.seq, stuck });
    }
    within(async { Ok(session.connection.close().await?) }).await?;
    Ok(shipped)
}

/// Reads on, where blocking hurts nobody.
async fn read(
    delivery: &mut Delivery,
) -> Result<Result<Vec<StoredEvent>, ReadError>, DeliveryError> {
    let mut reader = delivery.reader.take().ok_or(DeliveryError::Interrupted)?;
    let read = tokio::task::spawn_blocking(move || (reader.read(), reader)).await;
    let (events, reader) = read.map_err(|_| DeliveryError::Interrupted)?;
    delivery.reader = Some(reader);
    Ok(events)
}

fn change_ids(events: &[StoredEvent]) -> Vec<i64> {
    events.iter().filter_map(|event| event.detail.get(CHANGE_ID)?.parse().ok()).collect()
}

async fn within<T>(
    exchange: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, DeliveryError> {
    Ok(tokio::time::timeout(PATIENCE, exchange).await.map_err(|_| DeliveryError::Hung)??)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{
        chain::tests::link,
        record::{Event, Record},
    };

    #[test]
    fn only_decimal_change_ids_count() {
        let event = |id: &str| {
            let record = Record::new(chrono::DateTime::UNIX_EPOCH, Event::GrantChanged);
            StoredEvent::unplaced(record.with(CHANGE_ID, id), &link())
        };
        assert_eq!(change_ids(&[event("7"), event("x"), event(""), event("12")]), [7, 12]);
    }
}
