//! The journal: audit records on the local disk, one hash chain per start of the broker.
//!
//! A caller appends a record to `queue` and waits until it is durable. One thread, `writer`, takes
//! the queued records, numbers and hashes them, and writes and syncs them in one group commit. At a start,
//! `recover` checks the files that the previous start left. `reader` reads durable records back for
//! delivery. `catalog` lists the segment files, and `segment` defines their format.

mod archive;
mod catalog;
mod dropped;
mod error;
#[cfg(test)]
mod faulty_storage;
mod queue;
mod reader;
mod recent;
mod recover;
mod restore;
mod segment;
mod segment_store;
mod segment_writer;
mod settings;
mod shared;
mod storage;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{Arc, atomic::Ordering},
    thread::{self, JoinHandle, Thread},
    time::Duration,
};

use aws_lc_rs::rand;
use parking_lot::Mutex;
use tokio::task;

pub use self::{
    archive::Archive,
    catalog::LocalChain,
    error::{AuditUnavailable, JournalError, ReadError, with_causes},
    reader::ChainReader,
    recover::TornTail,
    settings::{JournalSettings, SyncMode},
};
use self::{
    queue::GroupCommit,
    recover::{TornTailAction, link_to, recover},
    segment_store::SegmentStore,
    shared::{Shared, WriterGuard},
    storage::{Directory, JournalStorage},
    writer::Writer,
};
use crate::{
    audit::{
        chain::{ChainHead, ChainLink},
        record::Record,
    },
    domain::clock::{Clock, Timestamp},
    files::state_dir::StateDir,
};

/// How long a reader waits for the writer to restore a segment.
const RESTORE_LIMIT: Duration = Duration::from_secs(5);

/// A record that was appended and may not be durable yet. Dropping this does not cancel the write.
#[must_use = "a call may be answered only after `durable` has returned"]
#[derive(Clone, Debug)]
pub struct Appended(Arc<GroupCommit>);

impl Appended {
    /// Waits until the record is durable. Cancel safe: the record is written in any case.
    ///
    /// # Errors
    /// [`AuditUnavailable`] when the record could not be written, or is not durable after the time
    /// `within`.
    pub async fn durable(self, within: Duration) -> Result<(), AuditUnavailable> {
        match tokio::time::timeout(within, self.0.outcome()).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(AuditUnavailable::Unwritable),
            Err(_) => Err(AuditUnavailable::TooSlow(within)),
        }
    }
}

/// Counters of a journal since its start.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct JournalStats {
    /// Number of appended records.
    pub appended: u64,
    /// Number of records that became durable.
    pub durable: u64,
    /// Number of records that were dropped because the journal could not be written. An `audit_gap`
    /// record counts them once the journal can be written again.
    pub failed: u64,
    /// Number of durable records that another program removed from the state directory before they were in
    /// Postgres. An `audit_gap` record names them.
    pub lost: u64,
    /// Number of durable records, those of earlier starts included, that are not known to be in
    /// Postgres.
    pub undelivered: u64,
    /// Number of segments on disk.
    pub segments: usize,
    /// Size of all segments in bytes.
    pub segments_bytes: u64,
    /// When records of this journal were last delivered to Postgres; `None` if they never were.
    pub last_delivered_at: Option<Timestamp>,
}

/// The audit journal of a state directory. Cheap to clone. The writer thread ends with
/// [`Journal::close`], or when the last clone is dropped.
#[derive(Clone)]
pub struct Journal(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    writer: Thread,
    /// The writer thread. The first call of [`Journal::close`] takes it.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Journal {
    /// Opens the journal of `state_dir` and starts its writer thread. Blocks on I/O.
    ///
    /// Checks the files that the previous start left, moves a torn tail to a file of its own, and opens a
    /// new chain that is linked to the head of the previous one.
    ///
    /// # Errors
    /// [`JournalError::Damaged`] when a durable record is not what was written;
    /// [`JournalError::Io`] when the directory cannot be read or written.
    pub fn open(
        state_dir: &StateDir,
        settings: JournalSettings,
        clock: Clock,
    ) -> Result<Self, JournalError> {
        let path = state_dir.journal_dir();
        let opened = Directory::open(&path);
        let storage = opened.map_err(|source| JournalError::Io { file: path, source })?;
        Self::open_on(Arc::new(storage), state_dir.instance(), Some(state_dir), settings, clock)
    }

    fn open_on(
        storage: Arc<dyn JournalStorage>,
        instance: &str,
        state_dir: Option<&StateDir>,
        settings: JournalSettings,
        clock: Clock,
    ) -> Result<Self, JournalError> {
        let mut recovered = recover(&*storage, TornTailAction::SetAside)?;
        recovered.catalog.keep_open(|name| storage.open(name).ok());
        let chain = new_chain_name(recovered.start).map_err(JournalError::io("."))?;
        let link = link_to(recovered.last.as_ref(), instance, chain, clock.wall());
        let segments = SegmentStore::new(storage, recovered.catalog, state_dir.cloned());
        let shared = Arc::new(Shared::new(segments, settings, clock, link));
        let writer = Writer::start(Arc::clone(&shared)).map_err(JournalError::io("."))?;
        let guard = WriterGuard(Arc::clone(&shared));
        let thread = thread::Builder::new().name("audit-journal".into()).spawn(move || {
            let _guard = guard;
            writer.run();
        });
        let thread = thread.map_err(JournalError::io("."))?;
        let writer = thread.thread().clone();
        Ok(Self(Arc::new(Inner { shared, writer, thread: Mutex::new(Some(thread)) })))
    }

    /// Queues `record` for the next group commit. Never blocks on I/O; the only lock is that of the
    /// thread's own queue shard. Records of one thread are written in the order of their appends.
    ///
    /// The queue is bounded. A call's record is refused at once, and counted for an `audit_gap`
    /// record, when a hanging disk has filled the queue and while the journal cannot be written.
    pub fn append(&self, record: Record) -> Appended {
        let Inner { shared, writer, .. } = &*self.0;
        #[cfg(feature = "bench")]
        if shared.settings.sync == SyncMode::Nothing && record.event.is_call() {
            return Appended(queue::durable());
        }
        shared.counters.appended.fetch_add(1, Ordering::Relaxed);
        let (is_call, count) = (record.event.is_call(), record.count);
        let accepted = record.event.is_retained() || shared.writable.load(Ordering::Acquire);
        let enqueued = if accepted { shared.queue.push(record).ok() } else { None };
        let Some(enqueued) = enqueued else {
            shared.count_dropped(is_call, count);
            writer.unpark();
            return Appended(queue::refused());
        };
        if enqueued.first {
            writer.unpark();
        }
        Appended(enqueued.commit)
    }

    /// Whether the journal can be written now, so that calls can be recorded.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        let shared = &self.0.shared;
        shared.writable.load(Ordering::Acquire)
            && !shared.closing.load(Ordering::Acquire)
            && !shared.is_stalled()
    }

    /// Whether the journal can be written and is not nearly full. Readiness depends on it.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.is_writable() && self.0.shared.has_space.load(Ordering::Acquire)
    }

    /// Returns why the journal cannot be written; `None` if it can, or while a disk hangs.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.0.shared.problem().clone()
    }

    /// Returns the head before the first record of `chain` that is present after a gap which begins with record
    /// `seq`; `None` if there is no gap.
    #[must_use]
    pub fn after_gap(&self, chain: &str, seq: i64) -> Option<ChainHead> {
        self.0.shared.catalog().after_gap(chain, seq)
    }

    /// Returns the counters. Locks the catalog briefly.
    #[must_use]
    pub fn stats(&self) -> JournalStats {
        let shared = &self.0.shared;
        let catalog = shared.catalog();
        JournalStats {
            appended: shared.counters.appended.load(Ordering::Relaxed),
            durable: shared.counters.durable.load(Ordering::Relaxed),
            failed: shared.counters.failed.load(Ordering::Relaxed),
            lost: shared.counters.lost.load(Ordering::Relaxed),
            undelivered: catalog.undelivered(),
            segments: catalog.segments(),
            segments_bytes: catalog.bytes(),
            last_delivered_at: Some(shared.counters.delivered_ms.load(Ordering::Relaxed))
                .filter(|ms| *ms != 0)
                .and_then(Timestamp::from_timestamp_millis),
        }
    }

    /// Returns the identity of this start's chain.
    #[must_use]
    pub fn chain(&self) -> &ChainLink {
        &self.0.shared.link
    }

    /// Writes and syncs the appended records, and ends the writer thread. Later appends are refused.
    /// May be called more than once, also concurrently. Cancel safe: the writer ends in any case.
    pub async fn close(&self) {
        let mut ended = self.0.shared.ended.subscribe();
        self.0.shared.closed_in_order.store(true, Ordering::Release);
        self.0.request_close();
        // The sender lives in `shared`, so that the wait cannot fail.
        let _ = ended.wait_for(|ended| *ended).await;
        let thread = self.0.thread.lock().take();
        if let Some(thread) = thread {
            // The thread holds the directory's lock until it ends. The result is ignored: it only says
            // whether the thread panicked.
            let _ = task::spawn_blocking(|| thread.join()).await;
        }
    }

    /// Returns the number and hash of this start's last durable record. Before the first, that is
    /// the head that the chain is linked to.
    #[must_use]
    pub fn head(&self) -> ChainHead {
        *self.0.shared.head()
    }

    /// Returns the chains that have segments here, in the order of starts. The last one is this
    /// start's.
    #[must_use]
    pub fn chains(&self) -> Vec<LocalChain> {
        self.0.shared.catalog().chains()
    }

    /// Returns a reader of the durable records of a chain after `after`.
    #[must_use]
    pub fn reader(&self, link: Arc<ChainLink>, after: ChainHead) -> ChainReader {
        ChainReader::new(Arc::clone(&self.0.shared.segments), link, after)
    }

    /// Whether every record of earlier starts is known to be in Postgres.
    #[must_use]
    pub fn earlier_chains_delivered(&self) -> bool {
        self.0.shared.catalog().all_delivered_except(&self.chain().chain)
    }

    /// Returns the `seq` up to which each chain is known to be in Postgres.
    #[must_use]
    pub fn delivered_positions(&self) -> BTreeMap<String, i64> {
        self.0.shared.catalog().positions().clone()
    }

    /// Notes that Postgres has the records of `chain` up to `seq`. Segments of which all records are
    /// delivered may be deleted.
    pub fn mark_delivered(&self, chain: &str, seq: i64) {
        let shared = &self.0.shared;
        let now = shared.clock.wall().timestamp_millis();
        shared.counters.delivered_ms.store(now, Ordering::Relaxed);
        let segment_completed = shared.catalog().mark_delivered(chain, seq);
        if *chain == *shared.link.chain {
            shared.recent().mark_delivered(seq);
        }
        shared.positions_unsaved.store(true, Ordering::Release);
        if segment_completed {
            shared.positions_save_due.store(true, Ordering::Release);
            self.0.writer.unpark();
        }
    }

    /// Saves the delivered positions to disk for the next start. The writer thread does this until the
    /// journal is closed; call this for positions that are noted later. Blocks on I/O.
    pub fn save_positions(&self) {
        self.0.shared.save_positions();
    }

    /// Asks the writer to check `segment`, whose records cannot be read back, and to write them again from memory.
    /// Waits until it has, for 5 s at most; once the journal is closed, this does it itself. Returns whether that
    /// was done, so that reading is worth a try: what was not in memory any more is then lost. Returns `false` at
    /// once for a segment of an earlier start, of which nothing is in memory. Cancel safe.
    pub async fn restore(&self, segment: &str) -> bool {
        let Inner { shared, writer, .. } = &*self.0;
        let (mut checked, mut ended) = (shared.checked.subscribe(), shared.ended.subscribe());
        if !shared.catalog().distrust(&shared.link.chain, segment) {
            return false;
        }
        shared.check_requested.store(true, Ordering::Release);
        writer.unpark();
        let has_ended = tokio::select! {
            _ = checked.wait_for(|()| !shared.catalog().is_distrusted(segment)) => false,
            _ = ended.wait_for(|ended| *ended) => true,
            () = tokio::time::sleep(RESTORE_LIMIT) => false,
        };
        if has_ended {
            let shared = Arc::clone(shared);
            // A failure is shown by the segment, which is still distrusted then.
            let _ = task::spawn_blocking(move || restore::restore(&shared)).await;
        }
        !shared.catalog().is_distrusted(segment)
    }

    /// Notes why `chain` cannot be read to its end, or that it can.
    pub fn note_reading(&self, chain: &str, problem: Option<&str>) {
        let mut unreadable = self.0.shared.unreadable();
        match problem {
            Some(problem) => drop(unreadable.insert(chain.to_owned(), problem.to_owned())),
            None => drop(unreadable.remove(chain)),
        }
    }

    /// Returns the chains that could not be read to their ends when that was last tried, and why.
    #[must_use]
    pub fn unreadable(&self) -> BTreeMap<String, String> {
        self.0.shared.unreadable().clone()
    }

    /// Waits until records become durable; returns at once if some did since the last call returned.
    /// Supports one waiter; cancel safe.
    pub async fn wait_for_durable(&self) {
        self.0.shared.committed.notified().await;
    }
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal").field("chain", &self.chain().chain).finish_non_exhaustive()
    }
}

impl Inner {
    fn request_close(&self) {
        self.shared.closing.store(true, Ordering::Release);
        self.writer.unpark();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.request_close();
    }
}

fn new_chain_name(start: u32) -> io::Result<String> {
    let mut random = [0; 8];
    rand::fill(&mut random).map_err(|_| io::Error::other("no random numbers"))?;
    Ok(format!("c{start:08}-{}", hex::encode(random)))
}
