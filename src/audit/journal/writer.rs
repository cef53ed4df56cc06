//! The one writer: takes what is queued, numbers and hashes it, and makes it durable at one stroke.

use std::{
    io, mem,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use thiserror::Error;

use super::{
    SyncMode,
    catalog::Segment,
    files::Appending,
    queue::{Commit, MOST_RECORDS, Taken},
    segment::{Header, encode, name_of},
    shared::Shared,
};
use crate::audit::{
    chain::{ChainHead, StoredEvent},
    record::Record,
};

/// How long an unwritable journal is left alone before it is tried again.
const PROBE: Duration = Duration::from_millis(500);
/// How long a batch waits for more records while they come, and how long in all.
const GATHER: Duration = Duration::from_micros(100);
const GATHER_AT_MOST: Duration = Duration::from_millis(1);
/// How often a writer looks for room.
const LOOK_FOR_ROOM: Duration = Duration::from_secs(1);
/// How often an idle writer looks for segments whose time is over, and keeps the delivered positions.
const HOUSEKEEPING: Duration = Duration::from_mins(1);

/// Why a batch was not written.
#[derive(Debug, Error)]
enum WriteError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the records that wait for Postgres fill the journal's {0} bytes")]
    Full(u64),
}

/// The segment that is being written.
struct Open {
    name: String,
    file: Box<dyn Appending>,
    /// How far it is durable.
    len: u64,
    /// Whether any record in it is.
    holds_records: bool,
}

/// A record on its way to a segment. Its place is found anew at each try.
struct Unwritten {
    event: StoredEvent,
    is_call: bool,
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    segment: Option<Open>,
    /// The last durable record.
    head: ChainHead,
    /// The last number that is on disk for sure; with [`SyncMode::Write`], `head` is ahead of it.
    synced: i64,
    /// What waits for the journal to be writable again, in order; no calls.
    kept: Vec<Unwritten>,
    /// While the journal cannot be written: when to try again.
    probe_at: Option<Instant>,
    /// When it was looked for room, and whether anything was written since.
    room_seen: Option<Instant>,
    grown: bool,
    /// The last batch was of several records.
    crowded: bool,
}

impl Writer {
    /// A writer whose first segment is there.
    pub(super) fn start(shared: Arc<Shared>) -> io::Result<Self> {
        let head = shared.link.root();
        let mut writer = Self {
            shared,
            segment: None,
            head,
            synced: 0,
            kept: Vec::new(),
            probe_at: None,
            room_seen: None,
            grown: false,
            crowded: false,
        };
        writer.segment = Some(writer.open_segment()?);
        Ok(writer)
    }

    /// Writes until the journal is closed.
    pub(super) fn run(mut self) {
        let mut positions_kept = Instant::now();
        loop {
            let closing = self.shared.closing.load(Ordering::Acquire);
            if self.crowded && !closing {
                self.gather();
            }
            let taken = self.shared.queue.take(closing);
            self.crowded = taken.records.len() > 1;
            self.step(taken, closing);
            if closing {
                break;
            }
            if self.room_seen.is_none_or(|seen| seen.elapsed() >= LOOK_FOR_ROOM) {
                self.shared.watched(|| self.shared.look_at_room());
                (self.room_seen, self.grown) = (Some(Instant::now()), false);
            }
            thread::park_timeout(self.rest());
            if self.probe_at.is_none() {
                self.shared.watched(|| self.remove_expired());
            }
            let moved = self.shared.positions_moved.swap(false, Ordering::AcqRel);
            if moved || positions_kept.elapsed() >= HOUSEKEEPING {
                positions_kept = Instant::now();
                self.shared.watched(|| self.shared.keep_positions());
            }
        }
        self.finish();
    }

    /// Lets a batch grow for as long as it does. A commit for each of many calls costs more than the
    /// calls. Those that come one by one do not wait.
    fn gather(&self) {
        let begun = Instant::now();
        let mut waiting = self.shared.queue.len();
        while begun.elapsed() < GATHER_AT_MOST {
            thread::sleep(GATHER);
            let now = self.shared.queue.len();
            if mem::replace(&mut waiting, now) == now {
                return;
            }
        }
    }

    /// How long to wait for a record at most.
    fn rest(&self) -> Duration {
        match self.probe_at {
            Some(at) => at.saturating_duration_since(Instant::now()),
            None if self.grown || !self.shared.roomy.load(Ordering::Acquire) => LOOK_FOR_ROOM,
            None => HOUSEKEEPING,
        }
    }

    /// Makes one batch of everything there is, or refuses it.
    fn step(&mut self, taken: Taken, closing: bool) {
        let Taken { records, commits } = taken;
        let mut batch = mem::take(&mut self.kept);
        batch.extend(records.into_iter().map(|record| self.unwritten(record)));
        if !closing && self.probe_at.is_some_and(|at| Instant::now() < at) {
            return self.refuse(batch, &commits);
        }
        let lost = self.shared.lost.counted();
        if let Some(gap) = lost.record(self.shared.clock.now()) {
            batch.push(self.unwritten(gap));
        }
        if batch.is_empty() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        match shared.watched(|| self.write(&mut batch)) {
            Ok(()) => {
                self.shared.lost.told(lost);
                self.written(batch.len(), &commits);
            }
            Err(error) => {
                if lost.any() {
                    batch.pop();
                }
                self.unwritable(&error);
                self.refuse(batch, &commits);
            }
        }
    }

    fn unwritten(&self, record: Record) -> Unwritten {
        let is_call = record.event.is_call();
        Unwritten { event: StoredEvent::unplaced(record, &self.shared.link), is_call }
    }

    /// Releases the waiters of a durable batch.
    fn written(&mut self, records: usize, commits: &[Arc<Commit>]) {
        self.shared.counters.durable.fetch_add(records as u64, Ordering::Relaxed);
        self.shared.writable.store(true, Ordering::Release);
        for commit in commits {
            commit.finish(true);
        }
        self.shared.more_durable.notify_one();
        if self.probe_at.take().is_some() {
            tracing::info!("the audit journal can be written again");
        }
    }

    fn unwritable(&mut self, error: &WriteError) {
        if self.probe_at.is_none() {
            tracing::error!(%error, "the audit journal cannot be written: calls are refused");
        }
        self.shared.writable.store(false, Ordering::Release);
        self.probe_at = Some(Instant::now() + PROBE);
    }

    /// Turns the waiters away; counts the calls, keeps the rest.
    fn refuse(&mut self, batch: Vec<Unwritten>, commits: &[Arc<Commit>]) {
        for Unwritten { event, is_call } in batch {
            if is_call || self.kept.len() >= MOST_RECORDS {
                self.shared.lose(is_call, event.count);
            } else {
                self.kept.push(Unwritten { event, is_call });
            }
        }
        for commit in commits {
            commit.finish(false);
        }
    }

    /// Makes `batch` durable. An error in the present segment ends that segment, not the batch: what
    /// the kernel still holds of it cannot be trusted after a failed sync.
    fn write(&mut self, batch: &mut [Unwritten]) -> Result<(), WriteError> {
        let mut head = self.head;
        let mut lines = Vec::with_capacity(batch.len() * 640);
        for Unwritten { event, .. } in batch {
            event.place(&mut head);
            encode(event, self.synced, &mut lines);
        }
        self.make_room(lines.len() as u64)?;
        if let Some(open) = self.segment.take() {
            match self.commit(open, &lines, head) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::warn!(%error, "an audit segment is abandoned after an error");
                }
            }
        }
        let open = self.open_segment()?;
        Ok(self.commit(open, &lines, head)?)
    }

    /// Appends `lines`, which end at `head`, to `open`; abandons it on an error.
    fn commit(&mut self, mut open: Open, lines: &[u8], head: ChainHead) -> io::Result<()> {
        let full = open.len + lines.len() as u64 >= self.shared.settings.segment_bytes;
        let sync = self.shared.settings.sync == SyncMode::Fsync || full;
        let appended = open.file.append(lines);
        let written = if sync { appended.and_then(|()| open.file.sync()) } else { appended };
        if let Err(error) = written {
            self.abandon(&open);
            return Err(error);
        }
        open.len += lines.len() as u64;
        open.holds_records = true;
        self.grown = true;
        self.head = head;
        if sync {
            self.synced = head.seq;
        }
        self.shared.catalog().committed(head.seq, open.len);
        *self.shared.head() = head;
        if full {
            self.shared.catalog().closed(self.shared.clock.now());
            self.remove_expired();
        } else {
            self.segment = Some(open);
        }
        Ok(())
    }

    /// Leaves a segment as it was after its last durable record. If it cannot be cut, its successor's
    /// header says where it ends.
    fn abandon(&self, open: &Open) {
        let cut = if open.holds_records {
            self.shared.catalog().closed(self.shared.clock.now());
            self.shared.segments.files.truncate(&open.name, open.len)
        } else {
            self.shared.catalog().removed(&open.name);
            self.shared.segments.files.remove(&open.name)
        };
        if let Err(error) = cut {
            tracing::warn!(%error, segment = open.name, "an abandoned audit segment was not cut");
        }
    }

    /// Makes the segment that goes on after `head`, its name and header durable.
    fn open_segment(&self) -> io::Result<Open> {
        let header = Header::new(&self.shared.link, self.head);
        let name = name_of(&self.shared.link.chain, header.first_seq);
        let line = header.line();
        let file = match self.make_segment(&name, &line) {
            // Left by an abandoned try that held no record.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.shared.segments.files.remove(&name)?;
                self.make_segment(&name, &line)?
            }
            made => made?,
        };
        let len = line.len() as u64;
        self.shared.catalog().opened(Segment {
            name: name.clone(),
            link: Arc::clone(&self.shared.link),
            before: self.head,
            last_seq: self.head.seq,
            len,
            closed_at: None,
        });
        Ok(Open { name, file, len, holds_records: false })
    }

    fn make_segment(&self, name: &str, header: &[u8]) -> io::Result<Box<dyn Appending>> {
        let mut file = self.shared.segments.files.create(name)?;
        file.append(header)?;
        file.sync()?;
        self.shared.segments.files.sync_dir()?;
        Ok(file)
    }

    /// Deletes delivered segments, the oldest first, until `bytes` more fit.
    fn make_room(&self, bytes: u64) -> Result<(), WriteError> {
        let limit = self.shared.settings.max_bytes;
        loop {
            let oldest = {
                let catalog = self.shared.catalog();
                if catalog.bytes().saturating_add(bytes) <= limit {
                    return Ok(());
                }
                catalog.oldest_delivered().map(|segment| segment.name.clone())
            };
            self.remove(&oldest.ok_or(WriteError::Full(limit))?)?;
        }
    }

    /// Deletes the delivered segments whose time is over.
    fn remove_expired(&self) {
        let now = self.shared.clock.now();
        let expired = self.shared.catalog().expired(now, self.shared.settings.retention);
        for name in expired {
            if let Err(error) = self.remove(&name) {
                tracing::warn!(%error, segment = name, "a delivered audit segment was not deleted");
            }
        }
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match self.shared.segments.files.remove(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => self.shared.catalog().removed(name),
        }
        Ok(())
    }

    /// Ends the last segment, with a sync of its own where commits had none.
    fn finish(mut self) {
        if let Some(mut open) = self.segment.take() {
            if let Err(error) = open.file.sync() {
                tracing::error!(%error, "the last audit segment was not synced at the end");
            }
            self.shared.catalog().closed(self.shared.clock.now());
        }
        if !self.kept.is_empty() {
            tracing::error!(records = self.kept.len(), "audit records are lost: no disk took them");
        }
        self.shared.keep_positions();
    }
}
