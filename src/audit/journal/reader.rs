//! Reads a chain's durable records in order, and checks each against the one before.

use std::sync::Arc;

use super::{error::ReadError, segment::decode, segment_store::SegmentStore, storage::SegmentFile};
use crate::audit::chain::{ChainHead, ChainLink, StoredEvent};

/// How many bytes are read at a time. The size is doubled until a whole line fits.
const CHUNK_BYTES: usize = 1 << 20;
/// A line that is longer than this, in bytes, is damage. The broker's own lines are far shorter.
const MAX_LINE_BYTES: usize = 64 << 20;

/// Reads one chain from a position on, across its segments.
pub struct ChainReader {
    segments: Arc<SegmentStore>,
    link: Arc<ChainLink>,
    /// Number and hash of the last record that was returned.
    head: ChainHead,
    cursor: Option<Cursor>,
}

/// A position in a segment, right after `head`.
struct Cursor {
    name: String,
    offset: u64,
    /// Number of lines before it.
    lines: usize,
    head: ChainHead,
}

/// The part of a segment that may be read.
struct DurablePart {
    len: u64,
    last_seq: i64,
    /// The file if it is open. Its name may be gone.
    file: Option<Arc<dyn SegmentFile>>,
}

impl ChainReader {
    pub(super) fn new(segments: Arc<SegmentStore>, link: Arc<ChainLink>, after: ChainHead) -> Self {
        Self { segments, link, head: after, cursor: None }
    }

    /// Returns the number and hash of the last record that was returned, or if there was none, of the record
    /// after which reading began.
    #[must_use]
    pub fn head(&self) -> ChainHead {
        self.head
    }

    /// Reads the next durable records: a few thousand at most, and none if there are no more at
    /// present. Blocks on I/O.
    ///
    /// # Errors
    /// [`ReadError`] when a record is absent or does not follow the previous one. The reader then
    /// keeps its position, so that reading can be retried.
    pub fn read(&mut self) -> Result<Vec<StoredEvent>, ReadError> {
        loop {
            let Some((mut cursor, durable)) = self.next_position()? else { return Ok(Vec::new()) };
            let events = self.read_from(&mut cursor, &durable)?;
            self.cursor = Some(cursor);
            if let Some(last) = events.last() {
                self.head = last.head();
                return Ok(events);
            }
        }
    }

    /// The position of the next record; `None` if it is not durable yet.
    fn next_position(&mut self) -> Result<Option<(Cursor, DurablePart)>, ReadError> {
        let (chain, next) = (&self.link.chain, self.head.seq + 1);
        let segment = self.segments.catalog().segment_for(chain, next).cloned();
        let Some(segment) = segment.filter(|segment| segment.last_seq >= next) else {
            // Without a later record none is missing. A chain has no segment any more when those were delivered and
            // deleted.
            let lost = self.segments.catalog().after_gap(chain, next).is_some();
            let missing = ReadError::Missing { chain: chain.clone(), seq: next };
            return if lost { Err(missing) } else { Ok(None) };
        };
        let (len, last_seq, file) = (segment.len, segment.last_seq, segment.file);
        let durable = DurablePart { len, last_seq, file };
        if let Some(cursor) = self.cursor.take_if(|cursor| cursor.name == segment.name) {
            return Ok(Some((cursor, durable)));
        }
        let cursor = Cursor { name: segment.name, offset: 0, lines: 0, head: segment.before };
        self.check_start(&cursor, cursor.head)?;
        Ok(Some((cursor, durable)))
    }

    /// Reads one chunk, and returns the records in it that come after `self.head`.
    fn read_from(
        &self,
        cursor: &mut Cursor,
        durable: &DurablePart,
    ) -> Result<Vec<StoredEvent>, ReadError> {
        let mut events = Vec::new();
        let chunk = self.read_chunk(cursor, durable)?;
        for line in chunk.split_inclusive(|b| *b == b'\n') {
            // The rest of the segment was abandoned after a write error; the next segment has these
            // records.
            if cursor.head.seq == durable.last_seq {
                break;
            }
            if cursor.lines > 0 {
                let event = decode(line, &self.link.chain, cursor.head)
                    .map_err(|why| cursor.damaged(why))?;
                cursor.head = event.head();
                self.check_start(cursor, cursor.head)?;
                if event.seq > self.head.seq {
                    events.push(event);
                }
            }
            cursor.lines += 1;
            cursor.offset += line.len() as u64;
        }
        Ok(events)
    }

    /// Reads complete lines from the cursor on, at least one.
    fn read_chunk(&self, cursor: &Cursor, durable: &DurablePart) -> Result<Vec<u8>, ReadError> {
        let left = usize::try_from(durable.len - cursor.offset).unwrap_or(usize::MAX);
        let mut wanted = CHUNK_BYTES;
        loop {
            let len = wanted.min(left);
            let read = match &durable.file {
                Some(file) => file.read(cursor.offset, len),
                None => self.segments.storage.read(&cursor.name, cursor.offset, len),
            };
            let mut chunk =
                read.map_err(|source| ReadError::Io { file: cursor.name.clone(), source })?;
            if let Some(end) = chunk.iter().rposition(|b| *b == b'\n') {
                chunk.truncate(end + 1);
                return Ok(chunk);
            }
            if chunk.len() < wanted {
                let after = cursor.head.seq;
                return Err(cursor.damaged(format!("the segment ends after record {after}")));
            }
            if wanted >= MAX_LINE_BYTES {
                return Err(cursor.damaged("the line is longer than a record can be".into()));
            }
            wanted *= 2;
        }
    }

    /// If `head` has the number after which reading began, checks that it also has the same hash.
    fn check_start(&self, cursor: &Cursor, head: ChainHead) -> Result<(), ReadError> {
        if head.seq == self.head.seq && head.hash != self.head.hash {
            return Err(
                cursor.damaged("the delivered record is not the one in this journal".into())
            );
        }
        Ok(())
    }
}

impl Cursor {
    fn damaged(&self, why: String) -> ReadError {
        ReadError::Damaged { file: self.name.clone(), line: self.lines + 1, why }
    }
}
