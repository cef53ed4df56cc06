//! Reading a chain's durable records back, in order, each checked against the one before.

use std::{io, sync::Arc};

use thiserror::Error;

use super::{segment::decode, segments::Segments};
use crate::audit::chain::{ChainHead, ChainLink, StoredEvent};

/// How much is read at a time, unless a line is longer.
const CHUNK: usize = 1 << 20;

/// Why a chain cannot be read on.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The file system refused.
    #[error("{file}: {error}")]
    Io {
        /// The segment.
        file: String,
        /// Why.
        error: io::Error,
    },
    /// A record is not what was written.
    #[error("{file}, line {line}: {why}")]
    Damaged {
        /// The segment.
        file: String,
        /// The line, from 1; the header is the first.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
    /// The segment that held the next record is gone.
    #[error("the journal has no segment with record {seq} of chain {chain}")]
    Missing {
        /// The chain.
        chain: String,
        /// The record.
        seq: i64,
    },
}

/// Reads one chain from a position on.
pub struct ChainReader {
    segments: Arc<Segments>,
    link: Arc<ChainLink>,
    /// The last record that was read.
    head: ChainHead,
    cursor: Option<Cursor>,
}

/// A place in a segment, behind `head`.
struct Cursor {
    name: String,
    offset: u64,
    /// How many lines lie before.
    lines: usize,
    head: ChainHead,
}

/// The part of a segment that may be read.
struct Durable {
    len: u64,
    last_seq: i64,
}

impl ChainReader {
    pub(super) fn new(segments: Arc<Segments>, link: Arc<ChainLink>, after: ChainHead) -> Self {
        Self { segments, link, head: after, cursor: None }
    }

    /// The last record that was read, or where reading began.
    #[must_use]
    pub fn head(&self) -> ChainHead {
        self.head
    }

    /// Reads the next durable records, some thousands at most; none if there are no more now.
    /// Blocks on I/O.
    ///
    /// # Errors
    /// When a record is gone or is not the one that follows. The reader then stays where it was.
    pub fn read(&mut self) -> Result<Vec<StoredEvent>, ReadError> {
        loop {
            let Some((mut cursor, durable)) = self.position()? else { return Ok(Vec::new()) };
            let events = self.read_from(&mut cursor, &durable)?;
            self.cursor = Some(cursor);
            if let Some(last) = events.last() {
                self.head = last.head();
                return Ok(events);
            }
        }
    }

    /// Where to read on; `None` if nothing more is durable.
    fn position(&mut self) -> Result<Option<(Cursor, Durable)>, ReadError> {
        let (chain, next) = (&self.link.chain, self.head.seq + 1);
        let segment = self.segments.catalog().holding(chain, next).cloned();
        let segment =
            segment.ok_or_else(|| ReadError::Missing { chain: chain.clone(), seq: next })?;
        if segment.last_seq < next {
            return Ok(None);
        }
        let durable = Durable { len: segment.len, last_seq: segment.last_seq };
        if let Some(cursor) = self.cursor.take_if(|cursor| cursor.name == segment.name) {
            return Ok(Some((cursor, durable)));
        }
        let cursor = Cursor { name: segment.name, offset: 0, lines: 0, head: segment.before };
        self.check(&cursor, cursor.head)?;
        Ok(Some((cursor, durable)))
    }

    /// Reads what one chunk holds past `self.head`.
    fn read_from(
        &self,
        cursor: &mut Cursor,
        durable: &Durable,
    ) -> Result<Vec<StoredEvent>, ReadError> {
        let mut events = Vec::new();
        let chunk = self.chunk(cursor, durable.len)?;
        for line in chunk.split_inclusive(|b| *b == b'\n') {
            // What follows was abandoned after an error, and written anew to the next segment.
            if cursor.head.seq == durable.last_seq {
                break;
            }
            if cursor.lines > 0 {
                let event = decode(line, &self.link.chain, cursor.head)
                    .map_err(|why| cursor.damaged(why))?;
                cursor.head = event.head();
                self.check(cursor, cursor.head)?;
                if event.seq > self.head.seq {
                    events.push(event);
                }
            }
            cursor.lines += 1;
            cursor.offset += line.len() as u64;
        }
        Ok(events)
    }

    /// Complete lines from the cursor on, at least one.
    fn chunk(&self, cursor: &Cursor, segment_len: u64) -> Result<Vec<u8>, ReadError> {
        let left = usize::try_from(segment_len - cursor.offset).unwrap_or(usize::MAX);
        let mut wanted = CHUNK;
        loop {
            let mut chunk = self
                .segments
                .files
                .read(&cursor.name, cursor.offset, wanted.min(left))
                .map_err(|error| ReadError::Io { file: cursor.name.clone(), error })?;
            if let Some(end) = chunk.iter().rposition(|b| *b == b'\n') {
                chunk.truncate(end + 1);
                return Ok(chunk);
            }
            if chunk.len() < wanted {
                let after = cursor.head.seq;
                return Err(cursor.damaged(format!("the segment ends after record {after}")));
            }
            wanted *= 2;
        }
    }

    /// Where reading began, the chain must hold the record that it began after.
    fn check(&self, cursor: &Cursor, head: ChainHead) -> Result<(), ReadError> {
        if head.seq == self.head.seq && head.hash != self.head.hash {
            return Err(cursor.damaged("what was delivered is not what this journal holds".into()));
        }
        Ok(())
    }
}

impl Cursor {
    fn damaged(&self, why: String) -> ReadError {
        ReadError::Damaged { file: self.name.clone(), line: self.lines + 1, why }
    }
}
