//! Writes a chain's records to segment files: appends and syncs, starts new segments, and deletes
//! delivered ones. Before a batch counts as durable, it checks that its file is still there.

use std::{io, mem, sync::Arc};

use thiserror::Error;

use super::{
    catalog::Segment,
    restore::{self, state_in_place},
    segment::{Header, encode, name_of},
    settings::SyncMode,
    shared::Shared,
    storage::{FileState, SegmentFile},
};
use crate::audit::{
    chain::{ChainHead, StoredEvent},
    lost::LostRecords,
};

const NOT_IN_PLACE: &str = "its file was removed, moved, replaced or changed by another program";

/// Why a batch was not written.
#[derive(Debug, Error)]
pub(super) enum WriteError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("undelivered records fill the journal up to its limit of {0} bytes")]
    Full(u64),
}

/// The segment that is being written.
struct OpenSegment {
    name: String,
    file: Arc<dyn SegmentFile>,
    /// Length of its durable part in bytes.
    len: u64,
    /// The state of the file after the last write. Another one shows that somebody else has changed the file.
    state: FileState,
    /// Whether its durable part holds a record, and not only the header.
    holds_records: bool,
}

/// Owned by the writer thread. Every method blocks on I/O.
pub(super) struct SegmentWriter {
    shared: Arc<Shared>,
    segment: Option<OpenSegment>,
    /// The last durable record.
    head: ChainHead,
    /// `seq` of the last record that was synced. With [`SyncMode::Write`], `head` is ahead of it.
    synced_seq: i64,
    /// Records of which [`SegmentWriter::take_lost`] has not told yet that they are lost.
    lost: Vec<LostRecords>,
}

impl SegmentWriter {
    /// Creates a segment for the records after the chain's root.
    pub(super) fn new(shared: Arc<Shared>) -> io::Result<Self> {
        let head = shared.link.root();
        let mut writer = Self { shared, segment: None, head, synced_seq: 0, lost: Vec::new() };
        writer.segment = Some(writer.open_segment()?);
        Ok(writer)
    }

    /// Numbers and hashes `events`, and makes them durable. If somebody removed, moved, replaced or changed
    /// segments with undelivered records, these are restored before: see [`restore`].
    ///
    /// After an error, the segment is abandoned and the records are written to a new one: after a failed
    /// sync, it is unknown which pages of the file the kernel still holds. If that fails too, no record is
    /// written and the head stays where it was.
    pub(super) fn write<'a>(
        &mut self,
        events: impl ExactSizeIterator<Item = &'a mut StoredEvent>,
    ) -> Result<(), WriteError> {
        let mut head = self.head;
        let mut lines = Vec::with_capacity(events.len() * 640);
        for event in events {
            event.link_after(&mut head);
            encode(event, self.synced_seq, &mut lines);
        }
        self.make_room(lines.len() as u64)?;
        self.restore()?;
        if let Some(segment) = self.segment.take() {
            match self.commit(segment, &mut lines, head) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::warn!(%error, "an audit segment is abandoned after an error");
                }
            }
        }
        self.restore_all()?;
        let segment = self.open_segment()?;
        Ok(self.commit(segment, &mut lines, head)?)
    }

    /// Checks that all files are where they should be, as [`SegmentWriter::write`] does, and that the state
    /// directory is locked. Restores them if they are not. With `contents`, also reads back what memory could
    /// restore: a change within the resolution of the file system's times leaves no other trace.
    pub(super) fn check_files(&mut self, contents: bool) -> Result<(), WriteError> {
        if contents {
            let remembered = self.shared.recent().begins_after().unwrap_or(self.head.seq);
            self.shared.catalog().distrust_after(&self.shared.link.chain, remembered);
        }
        self.shared.segments.reclaim_state_dir()?;
        restore::forget_removed(&self.shared);
        self.restore()?;
        let Some(segment) = self.segment.take() else { return Ok(()) };
        let storage = &*self.shared.segments.storage;
        // What cannot be read is restored from memory, or keeps the journal from being written.
        let unchanged = self.is_unchanged(&segment).unwrap_or(false);
        let in_place = state_in_place(storage, &segment.name, &*segment.file, segment.len);
        if unchanged && in_place.is_some() {
            self.segment = Some(segment);
            return Ok(());
        }
        self.abandon(&segment, unchanged.then_some(segment.len));
        self.restore_all()?;
        self.segment = Some(self.open_segment()?);
        Ok(())
    }

    /// Whether nobody else has changed the file of the open segment. Its content is read if it is distrusted.
    fn is_unchanged(&self, segment: &OpenSegment) -> io::Result<bool> {
        if segment.file.state()? != segment.state {
            return Ok(false);
        }
        let listed = self.shared.catalog().open().filter(|open| open.distrusted).cloned();
        let Some(listed) = listed else { return Ok(true) };
        let intact = restore::is_intact(&*self.shared.segments.storage, &listed)?;
        if intact {
            self.shared.catalog().trust(&listed.name, None);
        }
        Ok(intact)
    }

    /// Returns the records that were found to be lost since the last call.
    pub(super) fn take_lost(&mut self) -> Vec<LostRecords> {
        mem::take(&mut self.lost)
    }

    /// Restores the directories, and the closed segments.
    fn restore_all(&mut self) -> io::Result<()> {
        self.shared.segments.reclaim_state_dir()?;
        self.shared.segments.storage.create_directory()?;
        self.restore()
    }

    fn restore(&mut self) -> io::Result<()> {
        self.lost.extend(restore::restore(&self.shared)?);
        Ok(())
    }

    /// Appends `lines`, which end at `head`, to `segment`, and syncs if necessary. Checks before that nobody else
    /// has changed the segment, and after that it is still in place. Abandons it on an error; otherwise takes
    /// `lines`.
    fn commit(
        &mut self,
        mut segment: OpenSegment,
        lines: &mut Vec<u8>,
        head: ChainHead,
    ) -> io::Result<()> {
        let len = segment.len + lines.len() as u64;
        let full = segment.len + lines.len() as u64 >= self.shared.settings.segment_bytes;
        let sync = self.shared.settings.sync == SyncMode::Fsync || full;
        if segment.file.state().ok() != Some(segment.state) {
            self.abandon(&segment, None);
            return Err(io::Error::other(NOT_IN_PLACE));
        }
        let appended = segment.file.append(lines);
        let written = if sync { appended.and_then(|()| segment.file.sync()) } else { appended };
        let storage = &*self.shared.segments.storage;
        let in_place = written.and_then(|()| {
            let state = state_in_place(storage, &segment.name, &*segment.file, len);
            state.ok_or_else(|| io::Error::other(NOT_IN_PLACE))
        });
        segment.state = match in_place {
            Ok(state) => state,
            Err(error) => {
                self.abandon(&segment, Some(len));
                return Err(error);
            }
        };
        segment.len = len;
        segment.holds_records = true;
        let before = mem::replace(&mut self.head, head);
        self.shared.recent().push(before, head.seq, mem::take(lines));
        if sync {
            self.synced_seq = head.seq;
        }
        self.shared.catalog().extend_open(head.seq, segment.len);
        *self.shared.head() = head;
        if full {
            self.shared.catalog().close_open(self.shared.clock.now(), segment.file.state().ok());
            self.remove_expired();
        } else {
            self.segment = Some(segment);
        }
        Ok(())
    }

    /// Truncates a segment after its last durable record, or removes it if it has none. A failure is only
    /// logged, since the header of the next segment also says where this one ends. `written` is the length that
    /// the file has if nobody else changed it and no write failed; `None` if somebody else changed it.
    fn abandon(&self, segment: &OpenSegment, written: Option<u64>) {
        let OpenSegment { name, file, len, holds_records, .. } = segment;
        let truncated = if *holds_records {
            let found = file.state().map_or(0, |state| state.len);
            // A file that somebody else truncated is not what it seems, even if it has grown since.
            let unchanged = written.is_some_and(|written| (*len..=written).contains(&found));
            let truncated = if unchanged { file.truncate(*len) } else { Ok(()) };
            let state = if unchanged { file.state().ok() } else { None };
            self.shared.catalog().close_open(self.shared.clock.now(), state);
            truncated
        } else {
            self.shared.catalog().remove(name);
            match self.shared.segments.storage.remove(name) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                removed => removed,
            }
        };
        if let Err(error) = truncated {
            tracing::warn!(%error, segment = name, "an abandoned audit segment was not truncated");
        }
    }

    /// Creates the segment for the records after `head`, and makes its name and header durable.
    fn open_segment(&self) -> io::Result<OpenSegment> {
        let header = Header::new(&self.shared.link, self.head);
        let name = name_of(&self.shared.link.chain, header.first_seq);
        let line = header.line();
        let file = match self.create_segment_file(&name, &line) {
            // Left by an abandoned attempt that wrote no record.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.shared.segments.storage.remove(&name)?;
                self.create_segment_file(&name, &line)?
            }
            made => made?,
        };
        let (len, state) = (line.len() as u64, file.state()?);
        self.shared.catalog().add(Segment {
            name: name.clone(),
            link: Arc::clone(&self.shared.link),
            before: self.head,
            last_seq: self.head.seq,
            len,
            closed_at: None,
            file: Some(Arc::clone(&file)),
            closed_state: None,
            distrusted: false,
        });
        Ok(OpenSegment { name, file, len, state, holds_records: false })
    }

    fn create_segment_file(&self, name: &str, header: &[u8]) -> io::Result<Arc<dyn SegmentFile>> {
        let file = self.shared.segments.storage.create(name)?;
        file.append(header)?;
        file.sync()?;
        self.shared.segments.storage.sync_dir()?;
        Ok(file)
    }

    /// Deletes delivered segments, the oldest first, until `bytes` more fit within the limit.
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

    /// Deletes the delivered segments that were retained long enough.
    pub(super) fn remove_expired(&self) {
        let now = self.shared.clock.now();
        let expired = self.shared.catalog().expired(now, self.shared.settings.retention);
        for name in expired {
            if let Err(error) = self.remove(&name) {
                tracing::warn!(%error, segment = name, "a delivered audit segment was not deleted");
            }
        }
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match self.shared.segments.storage.remove(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => self.shared.catalog().remove(name),
        }
        Ok(())
    }

    /// Closes the last segment. Syncs it, since commits do not with [`SyncMode::Write`].
    pub(super) fn close(self) {
        if let Some(segment) = self.segment {
            if let Err(error) = segment.file.sync() {
                tracing::error!(%error, "the last audit segment was not synced at the end");
            }
            self.shared.catalog().close_open(self.shared.clock.now(), segment.file.state().ok());
        }
    }
}
