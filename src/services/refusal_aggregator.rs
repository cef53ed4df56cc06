//! Refusals that repeat become one record with a count, so that a flood costs neither disk nor log.
//!
//! An origin (a caller, else an address) has a few refusals of each reason recorded one by one, and
//! then one a second. The others wait for the record that tells of them all: it is written a quarter
//! of a second after the first of them. So no refusal is answered before it is on disk either, and
//! who floods waits; but for calls that are refused by their headers while 10,000 such wait (`grpc/audit.rs`),
//! which are answered while the record that counts them is on its way.

mod merge;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};
use tokio_util::task::TaskTracker;

use self::merge::AggregatedRefusal;
use crate::audit::{
    journal::{AuditUnavailable, Journal},
    record::{Event, Record},
};
use crate::services::{
    client_network::network_of,
    gcra::{Gcra, Quota},
};

/// How many refusals of one kind get records of their own: up to 20 at once, then one a second.
const OWN_RECORDS: Quota = Quota::one_per_second(20);
/// How often idle kinds may be removed at most.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// How long a record with a count waits for others to join it.
const WINDOW: Duration = Duration::from_millis(250);
/// How long that record may take to become durable.
const RECORD_WITHIN: Duration = Duration::from_secs(5);
/// How many kinds of refusal are told apart at a time; those beyond are folded by reason alone.
const MOST_KINDS: usize = 10_000;

/// RefusalAggregator refusals on their way to the journal. Cheap to clone.
#[derive(Clone)]
pub struct RefusalAggregator(Arc<Inner>);

struct Inner {
    journal: Journal,
    /// The records with counts that are still to be written are among its tasks.
    tasks: TaskTracker,
    epoch: Instant,
    kinds: Mutex<Kinds>,
}

/// All times are since the epoch.
#[derive(Default)]
struct Kinds {
    states: HashMap<Kind, State>,
    /// When to look for idle ones again.
    sweep_at: Duration,
}

/// What is folded together.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Kind {
    origin: Origin,
    event: Event,
    outcome: &'static str,
    reason: Option<String>,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
enum Origin {
    Caller(String),
    Address(IpAddr),
    /// Nobody knows, or there are too many.
    Any,
}

#[derive(Default)]
struct State {
    /// Limits the refusals that get records of their own.
    own_records: Gcra,
    open: Option<Open>,
}

/// A record that others may still join.
struct Open {
    folded: AggregatedRefusal,
    told: watch::Sender<Option<Result<(), AuditUnavailable>>>,
}

/// What becomes of a refusal.
enum Way {
    /// It has a record of its own.
    Alone(Box<Record>),
    /// A record with a count will tell of it.
    AggregatedRefusal(watch::Receiver<Option<Result<(), AuditUnavailable>>>),
}

impl RefusalAggregator {
    /// RefusalAggregator what goes into `journal`. `tasks` is to be waited for before the journal is closed.
    #[must_use]
    pub fn new(journal: Journal, tasks: TaskTracker) -> Self {
        let epoch = Instant::now();
        Self(Arc::new(Inner { journal, tasks, epoch, kinds: Mutex::default() }))
    }

    /// Returns once `refusal` is recorded, alone or counted with others.
    ///
    /// # Errors
    /// When it was not written, or not `within` that time.
    pub async fn recorded(
        &self,
        refusal: Record,
        within: Duration,
    ) -> Result<(), AuditUnavailable> {
        match self.way_of(refusal, self.0.epoch.elapsed()) {
            Way::Alone(record) => self.0.journal.append(*record).durable(within).await,
            Way::AggregatedRefusal(mut told) => {
                let told = tokio::time::timeout(within, told.wait_for(Option::is_some)).await;
                let told = told.map_err(|_| AuditUnavailable::TooSlow(within))?;
                told.map_or(None, |told| *told).unwrap_or(Err(AuditUnavailable::Unwritable))
            }
        }
    }

    fn way_of(&self, refusal: Record, now: Duration) -> Way {
        let mut kinds = self.0.kinds();
        let (kind, state) = kinds.state_of(Kind::of(&refusal), now);
        // Nobody overtakes those that wait.
        if state.open.is_none() && kind.origin != Origin::Any && state.pays(now) {
            return Way::Alone(Box::new(refusal));
        }
        let open = match &mut state.open {
            Some(open) => {
                open.folded.join(refusal);
                open
            }
            none => {
                self.0.tasks.spawn(self.clone().write_later(kind));
                none.insert(Open {
                    folded: AggregatedRefusal::new(refusal),
                    told: watch::Sender::new(None),
                })
            }
        };
        Way::AggregatedRefusal(open.told.subscribe())
    }

    /// Writes the open record of `kind` when its time is over.
    async fn write_later(self, kind: Kind) {
        tokio::time::sleep(WINDOW).await;
        let open = self.0.kinds().states.get_mut(&kind).and_then(|state| state.open.take());
        if let Some(Open { folded, told }) = open {
            let recorded = self.0.journal.append(folded.record()).durable(RECORD_WITHIN).await;
            told.send_replace(Some(recorded));
        }
    }
}

impl Inner {
    fn kinds(&self) -> MutexGuard<'_, Kinds> {
        // No code panics while it holds this lock.
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kinds {
    /// Where `kind` stands; where there are too many, its origin does not count.
    fn state_of(&mut self, mut kind: Kind, now: Duration) -> (Kind, &mut State) {
        if self.states.len() >= MOST_KINDS && !self.states.contains_key(&kind) {
            if self.sweep_at <= now {
                self.sweep_at = now + SWEEP_EVERY;
                self.states.retain(|_, state| !state.is_idle(now));
            }
            if self.states.len() >= MOST_KINDS {
                kind.origin = Origin::Any;
            }
        }
        let state = self.states.entry(kind.clone()).or_default();
        (kind, state)
    }
}

impl State {
    /// Takes the price of a record of its own, if it can be paid.
    fn pays(&mut self, now: Duration) -> bool {
        self.own_records.take(OWN_RECORDS, now).is_ok()
    }

    fn is_idle(&self, now: Duration) -> bool {
        self.open.is_none() && self.own_records.is_idle(now)
    }
}

impl Kind {
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
        peer.map_or(Self::Any, |peer| Self::Address(network_of(peer.ip())))
    }
}

#[cfg(test)]
mod tests;
