//! The queue from callers to the writer thread, and the notification of callers when their records
//! are durable.
//!
//! Two properties keep appends fast. Each thread pushes to a shard of its own, so that threads do
//! not contend for a lock. And a group commit wakes one waiter of each shard, which then wakes the
//! others from its own runtime: a wake-up across threads costs as much as the rest of an append.

use std::{
    cell::Cell,
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
    },
    thread,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::audit::record::Record;

/// A shard with this many records refuses further records of calls and of refused handshakes. At about 1 KiB each, they take at
/// most 16 MiB of memory per shard while a disk hangs.
pub(super) const MAX_CALLS_PER_SHARD: usize = 16_384;
/// A shard with this many records refuses all further records. It is larger since records that are not
/// of calls should not be lost; they are rare, since no tokens are issued while the journal cannot be
/// written.
pub(super) const MAX_RECORDS_PER_SHARD: usize = 2 * MAX_CALLS_PER_SHARD;

const PENDING: u8 = 0;
const DURABLE: u8 = 1;
const FAILED: u8 = 2;

/// The outcome for all records that were in one shard when the writer drained it. All their callers
/// share it.
#[derive(Debug, Default)]
pub(super) struct GroupCommit {
    state: AtomicU8,
    wake: Notify,
    others_woken: AtomicBool,
}

impl GroupCommit {
    fn failed() -> Self {
        Self { state: AtomicU8::new(FAILED), ..Self::default() }
    }

    /// Whether the records are durable; `None` while that is not decided.
    fn state(&self) -> Option<bool> {
        match self.state.load(Ordering::Acquire) {
            PENDING => None,
            state => Some(state == DURABLE),
        }
    }

    /// Sets the outcome and wakes one waiter. If that waiter was dropped, `Notify` wakes the next
    /// one instead.
    pub(super) fn finish(&self, durable: bool) {
        self.state.store(if durable { DURABLE } else { FAILED }, Ordering::Release);
        self.wake.notify_one();
    }

    /// Waits until the outcome is set; returns whether the records are durable. Cancel safe.
    pub(super) async fn outcome(&self) -> bool {
        let woken = self.wake.notified();
        tokio::pin!(woken);
        // Registered before the state is read, so that an outcome which is set in between still
        // wakes this waiter.
        woken.as_mut().enable();
        if let Some(durable) = self.state() {
            return durable;
        }
        woken.await;
        if !self.others_woken.swap(true, Ordering::AcqRel) {
            self.wake.notify_waiters();
        }
        self.state().unwrap_or(false)
    }
}

/// All records that waited when the writer drained the queue, and the outcomes to set for them.
#[derive(Default)]
pub(super) struct DrainedQueue {
    pub(super) records: Vec<Record>,
    pub(super) commits: Vec<Arc<GroupCommit>>,
}

/// A record that was accepted.
pub(super) struct Enqueued {
    pub(super) commit: Arc<GroupCommit>,
    /// Whether the shard was empty before, so that the writer must be woken.
    pub(super) first: bool,
}

pub(super) struct Queue {
    shards: Box<[Shard]>,
}

/// Aligned so that two shards never share a cache line, nor a pair of lines that is prefetched
/// together.
#[derive(Default)]
#[repr(align(128))]
struct Shard(Mutex<ShardState>);

#[derive(Default)]
struct ShardState {
    records: Vec<Record>,
    commit: Arc<GroupCommit>,
    closed: bool,
}

impl Queue {
    /// Creates two shards for each hardware thread: more threads than that do not append at the
    /// same time.
    pub(super) fn new() -> Self {
        let parallelism = thread::available_parallelism().map_or(2, usize::from);
        Self { shards: (0..2 * parallelism).map(|_| Shard::default()).collect() }
    }

    /// Adds `record`. Returns it as the error when the shard is full or the queue is closed.
    pub(super) fn push(&self, record: Record) -> Result<Enqueued, Box<Record>> {
        let mut shard = self.shards[thread_number() % self.shards.len()].lock();
        let limit =
            if record.event.is_retained() { MAX_RECORDS_PER_SHARD } else { MAX_CALLS_PER_SHARD };
        if shard.closed || shard.records.len() >= limit {
            return Err(Box::new(record));
        }
        shard.records.push(record);
        Ok(Enqueued { commit: Arc::clone(&shard.commit), first: shard.records.len() == 1 })
    }

    /// Number of waiting records.
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().records.len()).sum()
    }

    /// Takes everything, in the order of pushing within each shard. With `last`, the queue is
    /// closed: later pushes fail.
    pub(super) fn drain(&self, last: bool) -> DrainedQueue {
        let mut drained = DrainedQueue::default();
        for shard in &self.shards {
            let mut shard = shard.lock();
            shard.closed |= last;
            if shard.records.is_empty() {
                continue;
            }
            drained.commits.push(mem::take(&mut shard.commit));
            if drained.records.is_empty() {
                let empty = Vec::with_capacity(shard.records.len());
                drained.records = mem::replace(&mut shard.records, empty);
            } else {
                drained.records.append(&mut shard.records);
            }
        }
        drained
    }
}

impl Shard {
    fn lock(&self) -> MutexGuard<'_, ShardState> {
        self.0.lock()
    }
}

/// An outcome for a record that counts as durable without having been written.
#[cfg(feature = "bench")]
pub(super) fn durable() -> Arc<GroupCommit> {
    Arc::new(GroupCommit { state: AtomicU8::new(DURABLE), ..GroupCommit::default() })
}

/// An outcome for a record that was refused.
pub(super) fn refused() -> Arc<GroupCommit> {
    Arc::new(GroupCommit::failed())
}

/// Returns the calling thread's number. Numbers count from 0 in the order of the threads' first appends.
fn thread_number() -> usize {
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
        let drained = queue.drain(false);
        let events: Vec<_> = drained.records.iter().map(|record| record.event).collect();
        assert_eq!(events, [Event::Started, Event::GetToken]);
        assert_eq!(drained.commits.len(), 1);
        assert!(queue.drain(false).records.is_empty());
    }

    #[test]
    fn a_full_shard_refuses_calls_before_it_refuses_other_records() {
        let queue = Queue::new();
        for _ in 0..MAX_CALLS_PER_SHARD {
            assert!(queue.push(record(Event::GetToken)).is_ok());
        }
        assert!(queue.push(record(Event::GetToken)).is_err());
        assert!(queue.push(record(Event::HandshakeRefused)).is_err());
        for _ in MAX_CALLS_PER_SHARD..MAX_RECORDS_PER_SHARD {
            assert!(queue.push(record(Event::TokenIssued)).is_ok());
        }
        assert!(queue.push(record(Event::TokenIssued)).is_err());
    }

    #[test]
    fn nothing_can_be_pushed_after_the_last_drain() {
        let queue = Queue::new();
        queue.drain(true);
        assert!(queue.push(record(Event::Stopped)).is_err());
    }

    #[tokio::test]
    async fn one_wake_up_releases_every_waiter_even_if_the_first_was_dropped() {
        let commit = Arc::new(GroupCommit::default());
        let mut waiters: Vec<_> = (0..100)
            .map(|_| {
                let commit = Arc::clone(&commit);
                tokio::spawn(async move { commit.outcome().await })
            })
            .collect();
        tokio::task::yield_now().await;
        commit.finish(true);
        waiters.remove(0).abort();
        for waiter in waiters {
            let waited = tokio::time::timeout(Duration::from_secs(10), waiter).await;
            assert!(waited.unwrap().unwrap());
        }
        assert!(commit.outcome().await);
    }
}
