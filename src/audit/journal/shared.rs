//! What callers, the writer and readers share.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{Notify, watch};

use super::{
    JournalSettings, catalog::Catalog, lost::Lost, queue::Queue, recover::DELIVERED,
    segments::Segments,
};
use crate::{
    audit::chain::{ChainHead, ChainLink},
    domain::clock::Clock,
};

/// The part of the journal's bytes, one in so many, that is kept for those who have not heard yet that
/// it is nearly full.
const RESERVE: u64 = 8;
/// What takes longer means that the disk hangs: the journal then counts as not writable.
const STALLED: Duration = Duration::from_secs(2);

/// What callers, the writer and readers share.
pub(super) struct Shared {
    pub(super) segments: Arc<Segments>,
    pub(super) settings: JournalSettings,
    pub(super) clock: Clock,
    pub(super) link: Arc<ChainLink>,
    pub(super) queue: Queue,
    /// The last durable record of this start's chain.
    head: Mutex<ChainHead>,
    pub(super) lost: Lost,
    pub(super) counters: Counters,
    pub(super) writable: AtomicBool,
    /// There is room for more than the writer is about to need.
    pub(super) roomy: AtomicBool,
    /// When what is under way on the disk began, in milliseconds since `started`, plus 1; 0 if none is.
    pub(super) touching_since: AtomicU64,
    started: Instant,
    pub(super) closing: AtomicBool,
    /// Told after each commit.
    pub(super) more_durable: Notify,
    /// A delivered position completed a segment: it is time to keep the positions.
    pub(super) positions_moved: AtomicBool,
    /// Some delivered position is not kept yet.
    pub(super) positions_unkept: AtomicBool,
    pub(super) ended: watch::Sender<bool>,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) appended: AtomicU64,
    pub(super) durable: AtomicU64,
    pub(super) failed: AtomicU64,
    /// When Postgres last took records, in milliseconds since 1970; 0 for never.
    pub(super) delivered_ms: AtomicI64,
}

impl Shared {
    pub(super) fn new(
        segments: Arc<Segments>,
        settings: JournalSettings,
        clock: Clock,
        link: ChainLink,
    ) -> Self {
        Self {
            segments,
            settings,
            clock,
            head: Mutex::new(link.root()),
            link: Arc::new(link),
            queue: Queue::new(),
            lost: Lost::default(),
            counters: Counters::default(),
            writable: AtomicBool::new(true),
            roomy: AtomicBool::new(true),
            touching_since: AtomicU64::new(0),
            started: Instant::now(),
            closing: AtomicBool::new(false),
            more_durable: Notify::new(),
            positions_moved: AtomicBool::new(false),
            positions_unkept: AtomicBool::new(false),
            ended: watch::Sender::new(false),
        }
    }

    pub(super) fn catalog(&self) -> MutexGuard<'_, Catalog> {
        self.segments.catalog()
    }

    /// The last durable record of this start's chain.
    pub(super) fn head(&self) -> MutexGuard<'_, ChainHead> {
        // Held for a look or a note; nothing panics in between.
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks how much room is left: a journal that is nearly full says so while it still takes
    /// records, so that callers are sent elsewhere before they are refused. A disk that does not tell
    /// is taken to have room; a write that fails will say otherwise.
    pub(super) fn look_at_room(&self) {
        let JournalSettings { max_bytes, segment_bytes, .. } = self.settings;
        let free = self.segments.files.free().unwrap_or(u64::MAX);
        let held = self.catalog().held_bytes();
        let roomy = free >= segment_bytes && held <= max_bytes - max_bytes / RESERVE;
        if self.roomy.swap(roomy, Ordering::AcqRel) && !roomy {
            tracing::warn!(free, held, max_bytes, "the audit journal is nearly full");
        }
    }

    pub(super) fn lose(&self, is_call: bool, count: i64) {
        self.counters.failed.fetch_add(1, Ordering::Relaxed);
        self.lost.add(is_call, count);
    }

    /// Runs what touches the disk so that its hanging can be seen.
    pub(super) fn watched<T>(&self, touch: impl FnOnce() -> T) -> T {
        self.touching_since.store(self.millis() + 1, Ordering::Release);
        let done = touch();
        self.touching_since.store(0, Ordering::Release);
        done
    }

    pub(super) fn is_stalled(&self) -> bool {
        stalled(self.touching_since.load(Ordering::Acquire), self.millis())
    }

    /// Keeps the delivered positions, if they changed: a start without Postgres then knows what may be
    /// deleted, and one with it, whether Postgres went back.
    pub(super) fn keep_positions(&self) {
        if !self.positions_unkept.swap(false, Ordering::AcqRel) {
            return;
        }
        let positions = serde_json::to_vec(self.catalog().positions());
        let kept = positions
            .map_err(io::Error::from)
            .and_then(|positions| self.segments.files.replace(DELIVERED, &positions));
        if let Err(error) = kept {
            tracing::warn!(%error, "the delivered positions were not kept");
        }
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Whether what began at `since` (0 if none is under way) hangs at `now`.
pub(super) fn stalled(since: u64, now: u64) -> bool {
    since != 0 && Duration::from_millis(now.saturating_sub(since)) > STALLED
}

/// Tells that the writer has ended, however it did: after a panic nothing is writable.
pub(super) struct Ending(pub(super) Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.writable.store(false, Ordering::Release);
        for commit in self.0.queue.take(true).commits {
            commit.finish(false);
        }
        self.0.ended.send_replace(true);
    }
}
