//! Delivery over one connection.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use chrono::{Datelike, NaiveDate};
use tracing::instrument;

use super::{error::DeliveryError, source::JournalSource};
use crate::{
    audit::{
        chain::{ChainHead, StoredEvent},
        checkpoint_signer::CheckpointSigner,
        journal::{ChainReader, LocalChain, ReadError, with_causes},
    },
    store::{Database, Session, StoreError, audit},
};

/// The detail of an event that names the row of `changes` that it records.
pub const CHANGE_ID: &str = "change_id";

/// How many rows one transaction inserts at most. More would not be faster, and would hold locks for longer.
const MAX_ROWS_PER_TRANSACTION: usize = 500;
/// How long one exchange with Postgres may take. After that, the connection is dropped.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(15);

/// The delivery of one chain.
pub(super) struct ChainDelivery {
    pub(super) chain: LocalChain,
    /// The chain's position in Postgres.
    pub(super) position: ChainHead,
    /// `None` while a blocking task uses it, and from then on if that task did not complete.
    reader: Option<ChainReader>,
    /// Why the chain cannot be delivered any further. Other chains are delivered meanwhile.
    pub(super) blocked: Option<String>,
}

impl ChainDelivery {
    /// Whether the chain's row in Postgres could be read.
    fn is_registered(&self) -> bool {
        self.reader.is_some()
    }
}

/// A connection to Postgres, and what was learned over it.
pub(super) struct DeliverySession<'a> {
    source: &'a dyn JournalSource,
    session: Session,
    /// Days whose partitions exist. A new connection starts without them, since the failure of the last one
    /// may mean that somebody dropped a partition.
    partitions: BTreeSet<NaiveDate>,
}

impl<'a> DeliverySession<'a> {
    pub(super) async fn connect(
        source: &'a dyn JournalSource,
        database: &Database,
    ) -> Result<Self, DeliveryError> {
        let session = within_timeout(database.session()).await?;
        Ok(Self { source, session, partitions: BTreeSet::new() })
    }

    /// Registers all chains of the source, and reads their positions.
    #[instrument(level = "debug", skip_all)]
    pub(super) async fn register_chains(&mut self) -> Result<Vec<ChainDelivery>, DeliveryError> {
        let mut deliveries = Vec::new();
        for chain in self.source.chains() {
            deliveries.push(self.register_chain(chain).await?);
        }
        Ok(deliveries)
    }

    /// Registers a chain, and reads its position. A row that is not the one of this chain, or cannot be
    /// read, blocks the chain alone.
    async fn register_chain(&mut self, chain: LocalChain) -> Result<ChainDelivery, DeliveryError> {
        let registered = audit::register_chain(self.session.connection()?, &chain.link);
        let position = match within_timeout(registered).await {
            Ok(position) => position,
            Err(DeliveryError::Store(
                error @ (StoreError::UnreadableRow { .. }
                | StoreError::Conflict { cause: None, .. }),
            )) => {
                let name = &chain.link.chain;
                tracing::error!(chain = name, %error, "an audit chain cannot be delivered");
                let (position, blocked) = (chain.link.root(), Some(error.to_string()));
                return Ok(ChainDelivery { chain, position, reader: None, blocked });
            }
            Err(error) => return Err(error),
        };
        if position.seq > chain.last_seq {
            tracing::error!(
                chain = chain.link.chain,
                delivered = position.seq,
                journal = chain.last_seq,
                "Postgres has audit records that this journal has lost"
            );
        }
        self.source.mark_delivered(&chain.link.chain, position.seq);
        let reader = Some(self.source.reader(Arc::clone(&chain.link), position));
        Ok(ChainDelivery { chain, position, reader, blocked: None })
    }

    /// Tries again what is blocked.
    pub(super) async fn unblock(
        &mut self,
        deliveries: &mut [ChainDelivery],
    ) -> Result<(), DeliveryError> {
        for delivery in deliveries.iter_mut().filter(|delivery| delivery.blocked.is_some()) {
            if delivery.is_registered() {
                delivery.blocked = None;
            } else {
                *delivery = self.register_chain(delivery.chain.clone()).await?;
            }
        }
        Ok(())
    }

    /// Delivers the durable records of one chain. Returns whether there were any.
    #[instrument(level = "debug", skip_all, fields(chain = delivery.chain.link.chain))]
    pub(super) async fn deliver_all(
        &mut self,
        delivery: &mut ChainDelivery,
    ) -> Result<bool, DeliveryError> {
        let (mut any, mut restored) = (false, None);
        while delivery.blocked.is_none() {
            let events = match read(delivery).await? {
                Ok(events) => events,
                Err(ReadError::Missing { .. }) if self.skip_deleted(delivery) => continue,
                Err(error) => {
                    // Once for each position: the fault may lie elsewhere than in the segment.
                    let at = delivery.reader.as_ref().map(|reader| reader.head().seq);
                    if let ReadError::Damaged { file, .. } = &error
                        && std::mem::replace(&mut restored, at) != at
                        && self.source.restore(file).await
                    {
                        continue;
                    }
                    let chain = &delivery.chain.link.chain;
                    let why = with_causes(&error);
                    self.source.note_reading(chain, Some(&why));
                    tracing::error!(
                        chain,
                        error = why,
                        "an audit chain cannot be read any further"
                    );
                    delivery.blocked = Some(why);
                    break;
                }
            };
            self.source.note_reading(&delivery.chain.link.chain, None);
            if events.is_empty() {
                break;
            }
            for batch in events.chunks(MAX_ROWS_PER_TRANSACTION) {
                self.deliver(delivery, batch).await?;
                any = true;
            }
        }
        Ok(any)
    }

    /// Skips the records that neither the database nor the journal has any more: the database was
    /// restored to an earlier state, and the journal had deleted them as delivered; or another program removed
    /// them from the journal. Returns `false` if there are none. Verification reports the gap. Waiting for the records would fill the journal, and
    /// later records would be lost as well.
    fn skip_deleted(&self, delivery: &mut ChainDelivery) -> bool {
        let chain = &delivery.chain.link.chain;
        let Some(reader) = &delivery.reader else { return false };
        let Some(before) = self.source.after_gap(chain, reader.head().seq + 1) else {
            return false;
        };
        if before.seq <= reader.head().seq {
            return false;
        }
        tracing::error!(
            chain,
            first = reader.head().seq + 1,
            last = before.seq,
            "audit records that the database lacks are no longer in the journal either: the gap is permanent"
        );
        delivery.reader = Some(self.source.reader(Arc::clone(&delivery.chain.link), before));
        true
    }

    /// Delivers records in one transaction, after creating the partitions that they need.
    async fn deliver(
        &mut self,
        delivery: &mut ChainDelivery,
        events: &[StoredEvent],
    ) -> Result<(), DeliveryError> {
        let Some(last) = events.last() else { return Ok(()) };
        for day in partition_days(events) {
            if !self.partitions.contains(&day) {
                within_timeout(audit::ensure_partition(self.session.connection()?, day)).await?;
                self.partitions.insert(day);
            }
        }
        let (link, changes) = (&delivery.chain.link, change_ids(events));
        let connection = self.session.connection()?;
        let delivered = audit::deliver(connection, link, delivery.position, events, &changes);
        if !within_timeout(delivered).await? {
            return Err(DeliveryError::PositionConflict(link.chain.clone()));
        }
        delivery.position = last.head();
        self.source.mark_delivered(&link.chain, last.seq);
        Ok(())
    }

    /// Stores the latest checkpoint, if one is due and Postgres has the records that it covers.
    pub(super) async fn store_checkpoint(
        &mut self,
        signer: &CheckpointSigner,
        delivery: &ChainDelivery,
    ) -> Result<(), DeliveryError> {
        if let Some(checkpoint) = signer.due(&delivery.chain.link.chain, delivery.position.seq) {
            within_timeout(audit::store_checkpoint(self.session.connection()?, &checkpoint))
                .await?;
            signer.mark_stored(&checkpoint);
        }
        Ok(())
    }

    pub(super) async fn close(self) -> Result<(), DeliveryError> {
        within_timeout(self.session.close()).await
    }
}

/// The days of `events`, and the day after the last of them, so that its partition exists before it is
/// needed.
fn partition_days(events: &[StoredEvent]) -> BTreeSet<NaiveDate> {
    let mut days: BTreeSet<_> = events.iter().map(|event| event.at.date_naive()).collect();
    let next = days.last().and_then(NaiveDate::succ_opt);
    days.extend(next.filter(|next| next.year() <= 9999));
    days
}

/// Reads the chain's next records on a thread that may block.
async fn read(
    delivery: &mut ChainDelivery,
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

async fn within_timeout<T>(
    exchange: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, DeliveryError> {
    let answered = tokio::time::timeout(EXCHANGE_TIMEOUT, exchange).await;
    Ok(answered.map_err(|_| DeliveryError::Timeout(EXCHANGE_TIMEOUT))??)
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
            StoredEvent::from_record(record.with(CHANGE_ID, id), &link())
        };
        assert_eq!(change_ids(&[event("7"), event("x"), event(""), event("12")]), [7, 12]);
    }
}
