//! Where records wait for the writer, and calls for their records.
//!
//! Two rules keep calls fast. Each thread pushes to a shard of its own, so that threads do not
//! meet. And a commit wakes one waiter of each shard, which wakes the others from its own runtime:
//! a wake-up across threads costs as much as the rest of an append.

use std::{
    cell::Cell,
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
    },
    thread,
};

use tokio::sync::Notify;

use crate::audit::record::Record;

/// The most calls that wait in a shard. At some 1 KiB each, this bounds the memory that a hanging
/// disk can cost to 16 MiB a shard.
pub(super) const MOST_CALLS: usize = 16_384;
/// The most records that wait in a shard when the last ones are not calls. They are rare, and
/// nothing is issued while the journal cannot be written.
pub(super) const MOST_RECORDS: usize = 2 * MOST_CALLS;

const PENDING: u8 = 0;
const DURABLE: u8 = 1;
const FAILED: u8 = 2;

/// The fate of all records that one shard had when the writer took them.
#[derive(Debug, Default)]
pub(super) struct Commit {
    state: AtomicU8,
    wake: Notify,
    others_woken: AtomicBool,
}

impl Commit {
    fn failed() -> Self {
        Self { state: AtomicU8::new(FAILED), ..Self::default() }
    }

    /// Whether the records are durable, once that is decided.
    fn outcome(&self) -> Option<bool> {
        match self.state.load(Ordering::Acquire) {
            PENDING => None,
            state => Some(state == DURABLE),
        }
    }

    /// Decides, and wakes one waiter. Should that one have gone, `Notify` hands it to the next.
    pub(super) fn finish(&self, durable: bool) {
        self.state.store(if durable { DURABLE } else { FAILED }, Ordering::Release);
        self.wake.notify_one();
    }

    /// Waits for the decision; whether the records are durable.
    pub(super) async fn decided(&self) -> bool {
        let woken = self.wake.notified();
        tokio::pin!(woken);
        // Registered before the look, so that no decision falls between the two.
        woken.as_mut().enable();
        if let Some(durable) = self.outcome() {
            return durable;
        }
        woken.await;
        if !self.others_woken.swap(true, Ordering::AcqRel) {
            self.wake.notify_waiters();
        }
        self.outcome().unwrap_or(false)
    }
}

/// What the writer took at once.
#[derive(Default)]
pub(super) struct Taken {
    pub(super) records: Vec<Record>,
    pub(super) commits: Vec<Arc<Commit>>,
}

/// A push that went through.
pub(super) struct Pushed {
    pub(super) commit: Arc<Commit>,
    /// Nobody has told the writer of this shard yet.
    pub(super) first: bool,
}

pub(super) struct Queue {
    shards: Box<[Shard]>,
}

/// Apart from its neighbours in the processor's cache.
#[derive(Default)]
#[repr(align(128))]
struct Shard(Mutex<Open>);

#[derive(Default)]
struct Open {
    records: Vec<Record>,
    commit: Arc<Commit>,
    closed: bool,
}

impl Queue {
    /// Twice as many shards as the machine runs threads at once: more threads than that are not hot
    /// together.
    pub(super) fn new() -> Self {
        let parallelism = thread::available_parallelism().map_or(2, usize::from);
        Self { shards: (0..2 * parallelism).map(|_| Shard::default()).collect() }
    }

    /// Adds `record`; gives it back when the shard is full or closed.
    pub(super) fn push(&self, record: Record) -> Result<Pushed, Box<Record>> {
        let mut open = self.shards[this_thread() % self.shards.len()].lock();
        let room = if record.event.is_call() { MOST_CALLS } else { MOST_RECORDS };
        if open.closed || open.records.len() >= room {
            return Err(Box::new(record));
        }
        open.records.push(record);
        Ok(Pushed { commit: Arc::clone(&open.commit), first: open.records.len() == 1 })
    }

    /// How many records wait.
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().records.len()).sum()
    }

    /// Takes everything, in the order of pushing within each shard. With `last`, nothing can be
    /// pushed any more.
    pub(super) fn take(&self, last: bool) -> Taken {
        let mut taken = Taken::default();
        for shard in &self.shards {
            let mut open = shard.lock();
            open.closed |= last;
            if open.records.is_empty() {
                continue;
            }
            taken.commits.push(mem::take(&mut open.commit));
            if taken.records.is_empty() {
                let room = Vec::with_capacity(open.records.len());
                taken.records = mem::replace(&mut open.records, room);
            } else {
                taken.records.append(&mut open.records);
            }
        }
        taken
    }
}

impl Shard {
    fn lock(&self) -> MutexGuard<'_, Open> {
        // No code panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A commit for a record that counts as durable.
#[cfg(feature = "bench")]
pub(super) fn durable() -> Arc<Commit> {
    Arc::new(Commit { state: AtomicU8::new(DURABLE), ..Commit::default() })
}

/// A commit for a record that was not taken.
pub(super) fn refused() -> Arc<Commit> {
    Arc::new(Commit::failed())
}

/// A number for each thread that appends, from 0.
fn this_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static THIS: Cell<Option<usize>> = const { Cell::new(None) });
    THIS.with(|this| {
        let number = this.get().unwrap_or_else(|| NEXT.fetch_add(1, Ordering::Relaxed));
        this.set(Some(number));
        number
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use chrono::DateTime;

    use super::*;
    use crate::audit::record::Event;

    fn record(event: Event) -> Record {
        Record::new(DateTime::UNIX_EPOCH, event)
    }

    #[test]
    fn records_of_one_thread_are_taken_in_order_and_once() {
        let queue = Queue::new();
        assert!(queue.push(record(Event::Started)).is_ok_and(|pushed| pushed.first));
        assert!(queue.push(record(Event::GetToken)).is_ok_and(|pushed| !pushed.first));
        let taken = queue.take(false);
        let events: Vec<_> = taken.records.iter().map(|record| record.event).collect();
        assert_eq!(events, [Event::Started, Event::GetToken]);
        assert_eq!(taken.commits.len(), 1);
        assert!(queue.take(false).records.is_empty());
    }

    #[test]
    fn a_full_shard_refuses_calls_before_it_refuses_the_rest() {
        let queue = Queue::new();
        for _ in 0..MOST_CALLS {
            assert!(queue.push(record(Event::GetToken)).is_ok());
        }
        assert!(queue.push(record(Event::GetToken)).is_err());
        for _ in MOST_CALLS..MOST_RECORDS {
            assert!(queue.push(record(Event::TokenIssued)).is_ok());
        }
        assert!(queue.push(record(Event::TokenIssued)).is_err());
    }

    #[test]
    fn nothing_is_pushed_after_the_last_take() {
        let queue = Queue::new();
        queue.take(true);
        assert!(queue.push(record(Event::Stopped)).is_err());
    }

    #[tokio::test]
    async fn one_wake_up_releases_every_waiter_even_if_the_first_has_gone() {
        let commit = Arc::new(Commit::default());
        let mut waiters: Vec<_> = (0..100)
            .map(|_| {
                let commit = Arc::clone(&commit);
                tokio::spawn(async move { commit.decided().await })
            })
            .collect();
        tokio::task::yield_now().await;
        commit.finish(true);
        waiters.remove(0).abort();
        for waiter in waiters {
            let waited = tokio::time::timeout(Duration::from_secs(10), waiter).await;
            assert!(waited.unwrap().unwrap());
        }
        assert!(commit.decided().await);
    }
}
