//! Aggregates repeated refusals into one audit record with a count, so that a flood of refused calls
//! fills neither the disk nor the log.
//!
//! Refusals are grouped by kind: origin (caller, else network address), event, outcome and reason. The
//! first 20 refusals of a kind get a record each, and then one per second ([`INDIVIDUAL_RECORDS`]). All
//! others share a record, which is written [`AGGREGATION_WINDOW`] after the first of them.
//!
//! Each refusal is durable before it is answered, so that a flooding client has to wait. The audit layer
//! makes one exception: when many calls are already waiting that are refused because of their headers,
//! further ones are answered while the record that counts them is being written (`api/grpc/audit.rs`).

mod merge;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tokio_util::task::TaskTracker;

use self::merge::AggregatedRefusal;
use crate::{
    audit::{
        journal::{AuditUnavailable, Journal},
        record::{Event, Record},
    },
    services::{
        client_network::network_of,
        gcra::{Gcra, Quota},
    },
};

/// How many refusals of one kind get a record each: up to 20 at once, then one a second.
const INDIVIDUAL_RECORDS: Quota = Quota::one_per_second(20);
/// The least time between two removals of idle kinds.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// How long an aggregated record waits for further refusals.
const AGGREGATION_WINDOW: Duration = Duration::from_millis(250);
/// How long an aggregated record may take to become durable. After that, its callers get an error.
const DURABLE_WITHIN: Duration = Duration::from_secs(5);
/// How many kinds are tracked at most. Refusals of further kinds are aggregated regardless of their origin.
const MAX_KINDS: usize = 10_000;

/// The outcome of an aggregated record; `None` until it is known.
type WriteResult = Option<Result<(), AuditUnavailable>>;

/// Records refusals in the journal, aggregated where they repeat. Cheap to clone.
#[derive(Clone)]
pub struct RefusalAggregator(Arc<Inner>);

struct Inner {
    journal: Journal,
    /// Tracks the tasks that write aggregated records.
    tasks: TaskTracker,
    epoch: Instant,
    kinds: Mutex<KindTable>,
}

/// The tracked kinds. All times are since the epoch of the aggregator.
#[derive(Default)]
struct KindTable {
    states: HashMap<RefusalKind, KindState>,
    /// Earliest time of the next removal of idle kinds.
    sweep_at: Duration,
}

/// Refusals of the same kind can share a record.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct RefusalKind {
    origin: Origin,
    event: Event,
    outcome: &'static str,
    reason: Option<String>,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
enum Origin {
    Caller(String),
    /// An IPv4 address, or the /64 network of an IPv6 address.
    Network(IpAddr),
    /// The origin is unknown, or there are too many kinds to distinguish it.
    Any,
}

#[derive(Default)]
struct KindState {
    /// Limits the individual records.
    individual_records: Gcra,
    pending: Option<PendingAggregate>,
}

/// An aggregated record that is not written yet.
struct PendingAggregate {
    refusal: AggregatedRefusal,
    outcome: watch::Sender<WriteResult>,
}

/// How a refusal is recorded.
enum RecordedIn {
    /// In a record of its own.
    Individual(Box<Record>),
    /// In an aggregated record, whose outcome is sent here.
    Aggregated(watch::Receiver<WriteResult>),
}

impl RefusalAggregator {
    /// Returns an aggregator that writes to `journal`. Wait for `tasks` before closing the journal.
    #[must_use]
    pub fn new(journal: Journal, tasks: TaskTracker) -> Self {
        let epoch = Instant::now();
        Self(Arc::new(Inner { journal, tasks, epoch, kinds: Mutex::default() }))
    }

    /// Records `refusal`, individually or aggregated, and waits until the record is durable. Cancel safe:
    /// once this was polled, the refusal is recorded in any case.
    ///
    /// # Errors
    /// [`AuditUnavailable`] when the record could not be written, or is not durable after the time
    /// `within`.
    pub async fn record(&self, refusal: Record, within: Duration) -> Result<(), AuditUnavailable> {
        match self.choose_record(refusal, self.0.epoch.elapsed()) {
            RecordedIn::Individual(record) => self.0.journal.append(*record).durable(within).await,
            RecordedIn::Aggregated(mut outcome) => {
                let known = tokio::time::timeout(within, outcome.wait_for(Option::is_some)).await;
                let known = known.map_err(|_| AuditUnavailable::TooSlow(within))?;
                // An error means that the task that writes the record was dropped.
                known.map_or(None, |known| *known).unwrap_or(Err(AuditUnavailable::Unwritable))
            }
        }
    }

    /// Decides how `refusal` is recorded, and adds it to the aggregated record where it belongs to one.
    fn choose_record(&self, refusal: Record, now: Duration) -> RecordedIn {
        let mut kinds = self.0.kinds.lock();
        let (kind, state) = kinds.state_of(RefusalKind::of(&refusal), now);
        // While a record is pending, later refusals join it, so that none overtakes earlier ones.
        if state.pending.is_none() && kind.origin != Origin::Any && state.try_spend(now) {
            return RecordedIn::Individual(Box::new(refusal));
        }
        let pending = match &mut state.pending {
            Some(pending) => {
                pending.refusal.add(refusal);
                pending
            }
            none => {
                self.0.tasks.spawn(self.clone().write_after_window(kind));
                none.insert(PendingAggregate {
                    refusal: AggregatedRefusal::new(refusal),
                    outcome: watch::Sender::new(None),
                })
            }
        };
        RecordedIn::Aggregated(pending.outcome.subscribe())
    }

    /// Writes the pending record of `kind` after the aggregation window.
    async fn write_after_window(self, kind: RefusalKind) {
        tokio::time::sleep(AGGREGATION_WINDOW).await;
        let pending =
            self.0.kinds.lock().states.get_mut(&kind).and_then(|state| state.pending.take());
        if let Some(PendingAggregate { refusal, outcome }) = pending {
            let record = refusal.into_record();
            let durable = self.0.journal.append(record).durable(DURABLE_WITHIN).await;
            outcome.send_replace(Some(durable));
        }
    }
}

impl KindTable {
    /// Returns `kind` with its state. When the table is full, returns the kind without its origin instead.
    fn state_of(&mut self, mut kind: RefusalKind, now: Duration) -> (RefusalKind, &mut KindState) {
        if self.states.len() >= MAX_KINDS && !self.states.contains_key(&kind) {
            if self.sweep_at <= now {
                self.sweep_at = now + SWEEP_INTERVAL;
                self.states.retain(|_, state| !state.is_idle(now));
            }
            if self.states.len() >= MAX_KINDS {
                kind.origin = Origin::Any;
            }
        }
        let state = self.states.entry(kind.clone()).or_default();
        (kind, state)
    }
}

impl KindState {
    /// Spends the allowance for an individual record; `false` if there is none left.
    fn try_spend(&mut self, now: Duration) -> bool {
        self.individual_records.take(INDIVIDUAL_RECORDS, now).is_ok()
    }

    /// Whether the state is that of a new kind, so that it can be removed.
    fn is_idle(&self, now: Duration) -> bool {
        self.pending.is_none() && self.individual_records.is_idle(now)
    }
}

impl RefusalKind {
    fn of(refusal: &Record) -> Self {
        Self {
            origin: Origin::of(refusal),
            event: refusal.event,
            outcome: refusal.outcome,
            reason: refusal.reason.clone(),
        }
    }
}

impl Origin {
    fn of(refusal: &Record) -> Self {
        if let Some(caller) = &refusal.caller {
            return Self::Caller(caller.clone());
        }
        let peer = refusal.peer.as_deref().and_then(|peer| peer.parse::<SocketAddr>().ok());
        peer.map_or(Self::Any, |peer| Self::Network(network_of(peer.ip())))
    }
}

#[cfg(test)]
mod tests;
