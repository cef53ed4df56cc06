//! The journal: an append that a call can wait for, durable in groups, one hash chain for each start.
//!
//! Callers push to [`queue`] and wait for a commit; one thread, [`writer`], numbers and hashes what
//! is there and has it on disk at one stroke; `recover` is what a start finds; [`reader`] reads
//! back what is durable, for delivery. [`catalog`] knows the segments, [`segment`] their format.

mod archive;
mod catalog;
#[cfg(test)]
mod faults;
mod files;
mod lost;
mod queue;
mod reader;
mod recover;
mod segment;
mod segments;
mod shared;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    collections::BTreeMap,
    fmt, io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    thread::{self, JoinHandle, Thread},
    time::Duration,
};

use aws_lc_rs::rand;
use thiserror::Error;
use tokio::task;

pub use self::{
    archive::Archive,
    catalog::LocalChain,
    reader::{ChainReader, ReadError},
    recover::TornTail,
};
use self::{
    files::{Directory, Files},
    queue::Commit,
    recover::{Tail, link_to, recover},
    segments::Segments,
    shared::{Ending, Shared},
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

/// How much an answer may rely on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SyncMode {
    /// The record is on disk: it survives the machine's loss of power.
    Fsync,
    /// The kernel has the record: it survives the process.
    Write,
    /// Nobody has it: calls are answered and not recorded. For `cargo bench`; no setting leads here.
    #[cfg(feature = "bench")]
    Nothing,
}

/// The settings of a journal.
#[derive(Clone, Copy, Debug)]
pub struct JournalSettings {
    /// What "durable" means.
    pub sync: SyncMode,
    /// The size at which a segment is ended.
    pub segment_bytes: u64,
    /// What all segments may take. Delivered ones are deleted to keep it; when only undelivered ones
    /// are left, the journal becomes unwritable.
    pub max_bytes: u64,
    /// How long delivered segments are kept.
    pub retention: Duration,
}

impl Default for JournalSettings {
    /// On disk before the answer; 64 MiB a segment, 8 GiB in all; delivered ones stay for 7 days.
    fn default() -> Self {
        Self {
            sync: SyncMode::Fsync,
            segment_bytes: 64 << 20,
            max_bytes: 8 << 30,
            retention: Duration::from_hours(7 * 24),
        }
    }
}

/// Why a journal cannot be opened.
#[derive(Debug, Error)]
pub enum JournalError {
    /// A record that was on disk is not what was written. Somebody changed the file, or the disk
    /// lost it; the journal is not opened over it.
    #[error(
        "the audit journal is damaged: {file}, line {line}: {why}; keep the state directory as \
         evidence and start with another"
    )]
    Damaged {
        /// The segment.
        file: String,
        /// The line, from 1; the header is the first.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
    /// The file system refused.
    #[error("the audit journal cannot be opened: {}: {error}", file.display())]
    Io {
        /// What could not be read or written.
        file: PathBuf,
        /// Why.
        error: io::Error,
    },
}

impl JournalError {
    fn io(file: &str) -> impl FnOnce(io::Error) -> Self {
        let file = PathBuf::from(file);
        move |error| Self::Io { file, error }
    }

    fn damaged(file: &str, line: usize, why: String) -> Self {
        tracing::error!(file, line, why, "the audit journal is damaged");
        Self::Damaged { file: file.to_owned(), line, why }
    }
}

/// Why a record is not known to be durable. The call must be refused; what it asked for may still be
/// recorded.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum AuditUnavailable {
    /// The journal cannot be written.
    #[error("the audit journal cannot be written")]
    Unwritable,
    /// It was not written in time.
    #[error("the audit record was not durable within {0:?}")]
    TooSlow(Duration),
}

/// A record on its way to the disk. Dropping it cancels nothing.
#[must_use = "an answer leaves only after `durable`"]
#[derive(Debug)]
pub struct Appended(Arc<Commit>);

impl Appended {
    /// Returns once the record is durable.
    ///
    /// # Errors
    /// When it was not written, or not `within` that time.
    pub async fn durable(self, within: Duration) -> Result<(), AuditUnavailable> {
        match tokio::time::timeout(within, self.0.decided()).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(AuditUnavailable::Unwritable),
            Err(_) => Err(AuditUnavailable::TooSlow(within)),
        }
    }
}

/// The journal's figures since its start.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct JournalStats {
    /// Records that were given to the journal.
    pub appended: u64,
    /// Records that became durable.
    pub durable: u64,
    /// Records that were dropped because the journal could not be written; each is told by the count
    /// of an `audit_gap` record.
    pub failed: u64,
    /// Durable records, also of earlier starts, that are not known to have reached Postgres.
    pub undelivered: u64,
    /// Segments on disk.
    pub segments: usize,
    /// What they take, in bytes.
    pub segments_bytes: u64,
    /// When Postgres last took records of this journal; `None` until it has.
    pub last_delivered_at: Option<Timestamp>,
}

/// The audit journal of a state directory. Cheap to clone; the writer ends with [`Journal::close`],
/// or when the last clone is dropped.
#[derive(Clone)]
pub struct Journal(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    writer: Thread,
    /// Taken by the first who closes.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Journal {
    /// Opens the journal of `state_dir`: checks what the last start left, sets a torn tail aside,
    /// and opens a new chain, linked to the last one's head. Blocks on I/O.
    ///
    /// # Errors
    /// [`JournalError::Damaged`] when a record that was on disk is not what was written.
    pub fn open(
        state_dir: &StateDir,
        settings: JournalSettings,
        clock: Clock,
    ) -> Result<Self, JournalError> {
        let path = state_dir.journal_dir();
        let opened = Directory::open(&path);
        let files = opened.map_err(|error| JournalError::Io { file: path, error })?;
        Self::open_on(Arc::new(files), state_dir.instance(), Some(state_dir), settings, clock)
    }

    fn open_on(
        files: Arc<dyn Files>,
        instance: &str,
        state_dir: Option<&StateDir>,
        settings: JournalSettings,
        clock: Clock,
    ) -> Result<Self, JournalError> {
        let found = recover(&*files, Tail::SetAside)?;
        let chain = new_chain(found.start).map_err(JournalError::io("."))?;
        let link = link_to(found.last.as_ref(), instance, chain, clock.now());
        let segments = Segments::new(files, found.catalog, state_dir.cloned());
        let shared = Arc::new(Shared::new(segments, settings, clock, link));
        let writer = Writer::start(Arc::clone(&shared)).map_err(JournalError::io("."))?;
        let ending = Ending(Arc::clone(&shared));
        let thread = thread::Builder::new().name("audit-journal".into()).spawn(move || {
            let _ending = ending;
            writer.run();
        });
        let thread = thread.map_err(JournalError::io("."))?;
        let writer = thread.thread().clone();
        Ok(Self(Arc::new(Inner { shared, writer, thread: Mutex::new(Some(thread)) })))
    }

    /// Takes `record` for the next commit. Never blocks on I/O, and takes no lock that other threads
    /// are hot for. Records of one thread are written in the order of their appends.
    ///
    /// The queue is bounded: when a hanging disk has filled it, and while the journal cannot be
    /// written, a call's record is refused at once and counted for an `audit_gap` record.
    pub fn append(&self, record: Record) -> Appended {
        let Inner { shared, writer, .. } = &*self.0;
        #[cfg(feature = "bench")]
        if shared.settings.sync == SyncMode::Nothing && record.event.is_call() {
            return Appended(queue::durable());
        }
        shared.counters.appended.fetch_add(1, Ordering::Relaxed);
        let (is_call, count) = (record.event.is_call(), record.count);
        let open = !is_call || shared.writable.load(Ordering::Acquire);
        let pushed = if open { shared.queue.push(record).ok() } else { None };
        let Some(pushed) = pushed else {
            shared.lose(is_call, count);
            writer.unpark();
            return Appended(queue::refused());
        };
        if pushed.first {
            writer.unpark();
        }
        Appended(pushed.commit)
    }

    /// Whether a call's record would be written now.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        let shared = &self.0.shared;
        shared.writable.load(Ordering::Acquire)
            && !shared.closing.load(Ordering::Acquire)
            && !shared.is_stalled()
    }

    /// Whether it can be written and has room for a while yet; for readiness.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.is_writable() && self.0.shared.roomy.load(Ordering::Acquire)
    }

    /// The figures.
    #[must_use]
    pub fn stats(&self) -> JournalStats {
        let shared = &self.0.shared;
        let catalog = shared.catalog();
        JournalStats {
            appended: shared.counters.appended.load(Ordering::Relaxed),
            durable: shared.counters.durable.load(Ordering::Relaxed),
            failed: shared.counters.failed.load(Ordering::Relaxed),
            undelivered: catalog.undelivered(),
            segments: catalog.segments(),
            segments_bytes: catalog.bytes(),
            last_delivered_at: Some(shared.counters.delivered_ms.load(Ordering::Relaxed))
                .filter(|ms| *ms != 0)
                .and_then(Timestamp::from_timestamp_millis),
        }
    }

    /// The chain of this start.
    #[must_use]
    pub fn chain(&self) -> &ChainLink {
        &self.0.shared.link
    }

    /// Writes what was appended, has it on disk and ends the writer. What is appended later is
    /// refused. Any number of callers may ask, any number of times.
    pub async fn close(&self) {
        let mut ended = self.0.shared.ended.subscribe();
        self.0.request_close();
        // The sender lives in `shared`, so the wait cannot fail.
        let _ = ended.wait_for(|ended| *ended).await;
        let thread = self.0.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // It holds the directory's lock to its very end. A panic of its was told by `ended`.
            let _ = task::spawn_blocking(|| thread.join()).await;
        }
    }

    /// The last durable record of this start's chain; before the first, what the chain is linked to.
    #[must_use]
    pub fn head(&self) -> ChainHead {
        *self.0.shared.head()
    }

    /// The chains of which there are segments, in the order of starts; the last is this start's.
    #[must_use]
    pub fn chains(&self) -> Vec<LocalChain> {
        self.0.shared.catalog().chains()
    }

    /// Reads the durable records of a chain that follow `after`.
    #[must_use]
    pub fn reader(&self, link: Arc<ChainLink>, after: ChainHead) -> ChainReader {
        ChainReader::new(Arc::clone(&self.0.shared.segments), link, after)
    }

    /// Whether all that earlier starts left in this journal is known to have reached Postgres.
    #[must_use]
    pub fn earlier_chains_delivered(&self) -> bool {
        self.0.shared.catalog().delivered_but(&self.chain().chain)
    }

    /// How far each chain is known to have reached Postgres.
    #[must_use]
    pub fn delivered_positions(&self) -> BTreeMap<String, i64> {
        self.0.shared.catalog().positions().clone()
    }

    /// Notes that Postgres has `chain` up to `seq`: what is delivered may be deleted in time.
    pub fn delivered(&self, chain: &str, seq: i64) {
        let shared = &self.0.shared;
        let now = shared.clock.now().timestamp_millis();
        shared.counters.delivered_ms.store(now, Ordering::Relaxed);
        let completed = shared.catalog().delivered(chain, seq);
        shared.positions_unkept.store(true, Ordering::Release);
        if completed {
            shared.positions_moved.store(true, Ordering::Release);
            self.0.writer.unpark();
        }
    }

    /// Has on disk what is known to have reached Postgres, for the next start. Once it is closed, the
    /// journal does not do so by itself any more. Blocks on I/O.
    pub fn keep_positions(&self) {
        self.0.shared.keep_positions();
    }

    /// Returns when a commit was made since the last time it returned; for one waiter.
    pub async fn more_durable(&self) {
        self.0.shared.more_durable.notified().await;
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

fn new_chain(start: u32) -> io::Result<String> {
    let mut random = [0; 8];
    rand::fill(&mut random).map_err(|_| io::Error::other("no random numbers"))?;
    Ok(format!("c{start:08}-{}", hex::encode(random)))
}
