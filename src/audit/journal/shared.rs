//! State that callers, the writer thread and readers share.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, watch};

use super::{
    catalog::Catalog,
    dropped::DroppedRecords,
    queue::Queue,
    recent::RecentBatches,
    recover::{CLOSED_FILE, ClosedChain, POSITIONS_FILE},
    segment_store::SegmentStore,
    settings::JournalSettings,
};
use crate::{
    audit::chain::{ChainHead, ChainLink},
    domain::clock::Clock,
};

/// When no more than 1/8 of the journal's limit is left, the journal reports that it is nearly full, so
/// that load balancers have time to react before calls are refused.
const RESERVED_DIVISOR: u64 = 8;
/// The longest time that an I/O operation may take. After that, the disk counts as hanging and the
/// journal as unwritable.
const STALL_LIMIT: Duration = Duration::from_secs(2);

/// State that callers, the writer thread and readers share.
pub(super) struct Shared {
    pub(super) segments: Arc<SegmentStore>,
    pub(super) settings: JournalSettings,
    pub(super) clock: Clock,
    pub(super) link: Arc<ChainLink>,
    pub(super) queue: Queue,
    /// The last durable record of this start's chain.
    head: Mutex<ChainHead>,
    /// The last batches that are not delivered yet.
    recent: Mutex<RecentBatches>,
    /// Why the journal cannot be written, if it cannot.
    problem: Mutex<Option<String>>,
    /// The chains that could not be read to their ends when that was last tried, and why.
    unreadable: Mutex<BTreeMap<String, String>>,
    pub(super) dropped: DroppedRecords,
    pub(super) counters: Counters,
    pub(super) writable: AtomicBool,
    /// Whether there is space beyond what the writer needs next.
    pub(super) has_space: AtomicBool,
    /// When the writer's present I/O operation began, in milliseconds since `started`, plus 1; 0 if
    /// there is none.
    pub(super) io_started_at: AtomicU64,
    started: Instant,
    pub(super) closing: AtomicBool,
    /// Whether the journal was closed, and not only dropped together with its directory, as by a test.
    pub(super) closed_in_order: AtomicBool,
    /// Notified after each group commit.
    pub(super) committed: Notify,
    /// The delivery of a segment was completed, so that the positions should be saved soon.
    pub(super) positions_save_due: AtomicBool,
    /// A delivered position changed since the positions were saved.
    pub(super) positions_unsaved: AtomicBool,
    /// Whether the writer should check its files without delay.
    pub(super) check_requested: AtomicBool,
    /// Notified after each check of the files.
    pub(super) checked: watch::Sender<()>,
    pub(super) ended: watch::Sender<bool>,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) appended: AtomicU64,
    pub(super) durable: AtomicU64,
    pub(super) failed: AtomicU64,
    /// Number of durable records that another program removed before they were delivered.
    pub(super) lost: AtomicU64,
    /// When records were last delivered to Postgres, in milliseconds since 1970; 0 for never.
    pub(super) delivered_ms: AtomicI64,
}

impl Shared {
    pub(super) fn new(
        segments: Arc<SegmentStore>,
        settings: JournalSettings,
        clock: Clock,
        link: ChainLink,
    ) -> Self {
        Self {
            segments,
            settings,
            clock,
            head: Mutex::new(link.root()),
            recent: Mutex::new(RecentBatches::new(settings.memory_bytes)),
            problem: Mutex::default(),
            unreadable: Mutex::default(),
            link: Arc::new(link),
            queue: Queue::new(),
            dropped: DroppedRecords::default(),
            counters: Counters::default(),
            writable: AtomicBool::new(true),
            has_space: AtomicBool::new(true),
            io_started_at: AtomicU64::new(0),
            started: Instant::now(),
            closing: AtomicBool::new(false),
            closed_in_order: AtomicBool::new(false),
            committed: Notify::new(),
            positions_save_due: AtomicBool::new(false),
            positions_unsaved: AtomicBool::new(false),
            check_requested: AtomicBool::new(false),
            checked: watch::Sender::new(()),
            ended: watch::Sender::new(false),
        }
    }

    pub(super) fn catalog(&self) -> MutexGuard<'_, Catalog> {
        self.segments.catalog()
    }

    /// Locks the number and hash of the last durable record of this start's chain.
    pub(super) fn head(&self) -> MutexGuard<'_, ChainHead> {
        self.head.lock()
    }

    /// Locks the last batches that are not delivered yet.
    pub(super) fn recent(&self) -> MutexGuard<'_, RecentBatches> {
        self.recent.lock()
    }

    /// Locks the reason why the journal cannot be written.
    pub(super) fn problem(&self) -> MutexGuard<'_, Option<String>> {
        self.problem.lock()
    }

    /// Locks the chains that cannot be read to their ends, with the reasons.
    pub(super) fn unreadable(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.unreadable.lock()
    }

    /// Checks how much space is left, and updates `has_space`.
    ///
    /// A journal that is nearly full becomes unready while it still accepts records, so that
    /// callers are sent to other replicas before they are refused. If the free space cannot be
    /// determined, it counts as sufficient: if it is not, a write fails and makes the journal unwritable.
    pub(super) fn check_space(&self) {
        let JournalSettings { max_bytes, segment_bytes, .. } = self.settings;
        let free = self.segments.storage.free_bytes().unwrap_or(u64::MAX);
        let undeletable = self.catalog().undeletable_bytes();
        let has_space =
            free >= segment_bytes && undeletable <= max_bytes - max_bytes / RESERVED_DIVISOR;
        if self.has_space.swap(has_space, Ordering::AcqRel) && !has_space {
            tracing::warn!(free, undeletable, max_bytes, "the audit journal is nearly full");
        }
    }

    pub(super) fn count_dropped(&self, is_call: bool, count: i64) {
        self.counters.failed.fetch_add(1, Ordering::Relaxed);
        self.dropped.add(is_call, count);
    }

    /// Runs an I/O operation and records when it began, so that [`Shared::is_stalled`] notices if it
    /// hangs.
    pub(super) fn track_io<T>(&self, io: impl FnOnce() -> T) -> T {
        self.io_started_at.store(self.elapsed_ms() + 1, Ordering::Release);
        let output = io();
        self.io_started_at.store(0, Ordering::Release);
        output
    }

    pub(super) fn is_stalled(&self) -> bool {
        has_stalled(self.io_started_at.load(Ordering::Acquire), self.elapsed_ms())
    }

    /// Saves the delivered positions if they changed. They let the next start delete delivered segments
    /// without Postgres, and recognize a database that was restored to an earlier state.
    pub(super) fn save_positions(&self) {
        if !self.positions_unsaved.swap(false, Ordering::AcqRel) {
            return;
        }
        let positions = serde_json::to_vec(self.catalog().positions());
        let saved = positions
            .map_err(io::Error::from)
            .and_then(|positions| self.segments.storage.replace(POSITIONS_FILE, &positions));
        if let Err(error) = saved {
            tracing::warn!(%error, "the delivered audit positions were not saved");
        }
    }

    /// Saves where the chain ends. To be called once nothing more is written to it.
    pub(super) fn save_end(&self) {
        let closed = serde_json::to_vec(&ClosedChain::new(&self.link, *self.head()));
        let saved = closed
            .map_err(io::Error::from)
            .and_then(|closed| self.segments.storage.replace(CLOSED_FILE, &closed));
        if let Err(error) = saved {
            tracing::warn!(%error, "the end of the audit chain was not saved");
        }
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Whether an operation that began at `since` has stalled at `now`. Both are in milliseconds;
/// `since` is 0 if there is no operation.
pub(super) fn has_stalled(since: u64, now: u64) -> bool {
    since != 0 && Duration::from_millis(now.saturating_sub(since)) > STALL_LIMIT
}

/// Marks the journal as closed when the writer thread ends, also by a panic: nothing is writable
/// then, and no caller waits any longer.
pub(super) struct WriterGuard(pub(super) Arc<Shared>);

impl Drop for WriterGuard {
    fn drop(&mut self) {
        self.0.writable.store(false, Ordering::Release);
        for commit in self.0.queue.drain(true).commits {
            commit.finish(false);
        }
        self.0.ended.send_replace(true);
    }
}
