//! The writer thread: takes the queued records, and writes them in group commits.

use std::{
    io, mem,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use super::{
    queue::{DrainedQueue, GroupCommit, MAX_RECORDS_PER_SHARD},
    segment_writer::{SegmentWriter, WriteError},
    shared::Shared,
};
use crate::audit::{chain::StoredEvent, record::Record};

/// How long the writer waits after a failed write before it tries again.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// Length of one step of [`Writer::gather`], which waits for further records.
const GATHER_STEP: Duration = Duration::from_micros(100);
/// The longest time for which [`Writer::gather`] delays a batch.
const MAX_GATHER_TIME: Duration = Duration::from_millis(1);
/// How often the writer checks the free space while it writes.
const SPACE_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How often the writer checks, besides at each batch, that nobody has removed or changed its files.
const FILE_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How often a writer deletes expired segments and saves the delivered positions.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_mins(1);

/// A record that is not durable yet. It gets its number and hash anew at each try.
struct PendingEvent {
    event: StoredEvent,
    is_call: bool,
    is_retained: bool,
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    segments: SegmentWriter,
    /// Records that are not of calls, in order. They wait until the journal can be written again.
    retained: Vec<PendingEvent>,
    /// When to try again, while the journal cannot be written.
    retry_at: Option<Instant>,
    /// When the free space was last checked.
    space_checked_at: Option<Instant>,
    /// Whether anything was written since then.
    written_since_check: bool,
    /// When the files were last checked without a batch.
    files_checked_at: Instant,
    /// Whether files are missing that could not be restored.
    files_missing: bool,
    /// Whether the last batch had several records, so that it is worth waiting for more.
    last_batch_had_several: bool,
}

impl Writer {
    /// Creates a writer and its first segment.
    pub(super) fn start(shared: Arc<Shared>) -> io::Result<Self> {
        Ok(Self {
            segments: SegmentWriter::new(Arc::clone(&shared))?,
            shared,
            retained: Vec::new(),
            retry_at: None,
            space_checked_at: None,
            written_since_check: false,
            files_checked_at: Instant::now(),
            files_missing: false,
            last_batch_had_several: false,
        })
    }

    /// Writes batches until the journal is closed.
    pub(super) fn run(mut self) {
        let mut positions_saved_at = Instant::now();
        loop {
            let closing = self.shared.closing.load(Ordering::Acquire);
            if self.last_batch_had_several && !closing {
                self.gather();
            }
            self.check_files(closing);
            let drained = self.shared.queue.drain(closing);
            self.last_batch_had_several = drained.records.len() > 1;
            self.write_batch(drained, closing);
            if closing {
                if !self.retained.is_empty() {
                    self.write_batch(DrainedQueue::default(), true);
                }
                break;
            }
            if self.space_checked_at.is_none_or(|seen| seen.elapsed() >= SPACE_CHECK_INTERVAL) {
                self.shared.track_io(|| self.shared.check_space());
                (self.space_checked_at, self.written_since_check) = (Some(Instant::now()), false);
            }
            thread::park_timeout(self.park_time());
            if self.retry_at.is_none() {
                self.shared.track_io(|| self.segments.remove_expired());
            }
            let save_due = self.shared.positions_save_due.swap(false, Ordering::AcqRel);
            if save_due || positions_saved_at.elapsed() >= HOUSEKEEPING_INTERVAL {
                positions_saved_at = Instant::now();
                self.shared.track_io(|| self.shared.save_positions());
            }
        }
        self.finish();
    }

    /// Waits while the queue grows, up to [`MAX_GATHER_TIME`]: one commit for many calls costs far
    /// less than one for each. Callers that come one by one do not wait.
    fn gather(&self) {
        let begun = Instant::now();
        let mut waiting = self.shared.queue.len();
        while begun.elapsed() < MAX_GATHER_TIME {
            thread::sleep(GATHER_STEP);
            let now = self.shared.queue.len();
            if mem::replace(&mut waiting, now) == now {
                return;
            }
        }
    }

    /// How long to park at most. An append to an empty shard unparks the thread.
    fn park_time(&self) -> Duration {
        match self.retry_at {
            Some(at) => at.saturating_duration_since(Instant::now()),
            None => FILE_CHECK_INTERVAL.min(SPACE_CHECK_INTERVAL),
        }
    }

    /// Checks the files, if that is due, and restores those that are missing. If they cannot be restored, the
    /// journal counts as not writable.
    fn check_files(&mut self, closing: bool) {
        let requested = self.shared.check_requested.swap(false, Ordering::AcqRel);
        let due = match self.retry_at {
            _ if requested => true,
            Some(at) => Instant::now() >= at,
            None => self.files_checked_at.elapsed() >= FILE_CHECK_INTERVAL,
        };
        let last = closing && self.shared.closed_in_order.load(Ordering::Acquire);
        if !last && (closing || !due) {
            return;
        }
        self.files_checked_at = Instant::now();
        let checked = self.shared.track_io(|| self.segments.check_files(last));
        self.files_missing = checked.is_err();
        if let Err(error) = checked {
            self.mark_unwritable(&error);
        }
        self.record_lost();
        self.shared.checked.send_replace(());
    }

    /// Records that durable records are lost.
    fn record_lost(&mut self) {
        for lost in self.segments.take_lost() {
            let pending = self.pending(lost.record(self.shared.clock.wall()));
            self.retained.push(pending);
        }
    }

    /// Writes everything that is queued or retained as one batch, or refuses it while the journal
    /// cannot be written.
    fn write_batch(&mut self, drained: DrainedQueue, closing: bool) {
        let DrainedQueue { records, commits } = drained;
        let mut batch = mem::take(&mut self.retained);
        batch.extend(records.into_iter().map(|record| self.pending(record)));
        if !closing && self.retry_at.is_some_and(|at| Instant::now() < at) {
            return self.refuse(batch, &commits);
        }
        let dropped = self.shared.dropped.snapshot();
        if let Some(gap) = dropped.gap_record(self.shared.clock.wall()) {
            batch.push(self.pending(gap));
        }
        if batch.is_empty() {
            // Only missing files kept the journal from being written, and they are restored.
            if self.retry_at.is_some() && !self.files_missing {
                self.complete(0, &[]);
            }
            return;
        }
        let events = batch.iter_mut().map(|pending| &mut pending.event);
        match self.shared.track_io(|| self.segments.write(events)) {
            Ok(()) => {
                self.shared.dropped.subtract(dropped);
                self.complete(batch.len(), &commits);
            }
            Err(error) => {
                if dropped.any() {
                    batch.pop();
                }
                self.mark_unwritable(&error);
                self.refuse(batch, &commits);
            }
        }
        self.record_lost();
    }

    fn pending(&self, record: Record) -> PendingEvent {
        let (is_call, is_retained) = (record.event.is_call(), record.event.is_retained());
        let event = StoredEvent::from_record(record, &self.shared.link);
        PendingEvent { event, is_call, is_retained }
    }

    /// Notifies the waiting callers that their records are durable.
    fn complete(&mut self, records: usize, commits: &[Arc<GroupCommit>]) {
        self.written_since_check = true;
        self.shared.counters.durable.fetch_add(records as u64, Ordering::Relaxed);
        self.shared.writable.store(true, Ordering::Release);
        if self.retry_at.is_some() {
            self.shared.problem().take();
        }
        for commit in commits {
            commit.finish(true);
        }
        self.shared.committed.notify_one();
        if self.retry_at.take().is_some() {
            tracing::info!("the audit journal can be written again");
        }
    }

    fn mark_unwritable(&mut self, error: &WriteError) {
        if self.retry_at.is_none() {
            tracing::error!(%error, "the audit journal cannot be written: calls are refused");
        }
        *self.shared.problem() = Some(error.to_string());
        self.shared.writable.store(false, Ordering::Release);
        self.retry_at = Some(Instant::now() + RETRY_INTERVAL);
    }

    /// Notifies the waiting callers that their records were not written. Records of calls and of refused handshakes
    /// are counted as dropped; others are retained.
    fn refuse(&mut self, batch: Vec<PendingEvent>, commits: &[Arc<GroupCommit>]) {
        for pending in batch {
            if pending.is_retained && self.retained.len() < MAX_RECORDS_PER_SHARD {
                self.retained.push(pending);
            } else {
                self.shared.count_dropped(pending.is_call, pending.event.count);
            }
        }
        for commit in commits {
            commit.finish(false);
        }
    }

    /// Closes the last segment, and saves where the chain ends and the delivered positions.
    fn finish(self) {
        self.segments.close();
        self.shared.save_end();
        if !self.retained.is_empty() {
            tracing::error!(
                records = self.retained.len(),
                "audit records are lost: the journal could not be written before it was closed"
            );
        }
        self.shared.save_positions();
    }
}
