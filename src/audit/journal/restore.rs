//! Restores segments that somebody removed, moved, replaced, truncated or overwritten while the broker was running.
//!
//! A file that was removed or moved can still be read, since the journal keeps it open until its records are
//! delivered. Of a file whose content was changed, the records are kept that still follow each other; the others are
//! taken from memory, as far as they are there. What is neither here nor there is lost.

use std::{io, sync::atomic::Ordering};

use super::{
    catalog::Segment,
    segment::{Header, decode, name_of},
    shared::Shared,
    storage::{FileState, JournalStorage, SegmentFile},
};
use crate::audit::{chain::ChainHead, lost::LostRecords};

/// The numbers of the first and of the last of some records.
type Range = (i64, i64);

/// Consecutive records of a segment that are still known.
struct Piece {
    /// The chain's head before them.
    before: ChainHead,
    last_seq: i64,
    lines: Vec<u8>,
}

/// Ensures that the undelivered records of all closed segments are in files that nobody else has changed. Returns
/// those that are lost, and counts them. Blocks on I/O. Only one thread at a time may call this.
///
/// # Errors
/// When a file cannot be written. Nothing is lost by that: it can be tried again.
pub(super) fn restore(shared: &Shared) -> io::Result<Vec<LostRecords>> {
    let mut lost = Vec::new();
    // The catalog is not locked during the loop.
    let segments = shared.catalog().closed_to_check();
    for segment in segments {
        if !is_sound(&*shared.segments.storage, &segment)? {
            // Nothing is written to a directory that another process has taken.
            shared.segments.reclaim_state_dir()?;
            lost.extend(restore_segment(shared, &segment)?);
        } else if segment.distrusted {
            let state = segment.file.as_ref().and_then(|file| file.state().ok());
            shared.catalog().trust(&segment.name, state);
        }
    }
    Ok(lost)
}

/// Forgets delivered segments that somebody removed. Blocks on I/O.
pub(super) fn forget_removed(shared: &Shared) {
    let segments = shared.catalog().delivered();
    for segment in segments {
        let state = shared.segments.storage.state_of(&segment.name);
        if state.is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            tracing::warn!(
                segment = segment.name,
                "a delivered audit segment was removed before its time"
            );
            shared.catalog().remove(&segment.name);
        }
    }
}

/// Whether the name of a closed segment still leads to its file, unchanged.
fn is_sound(storage: &dyn JournalStorage, segment: &Segment) -> io::Result<bool> {
    let Ok(found) = storage.state_of(&segment.name) else { return Ok(false) };
    if segment.distrusted {
        let own = segment.file.as_ref().map(|file| file.state()).transpose()?;
        // What could not be truncated from an abandoned segment does no harm.
        let in_place = own.is_none_or(|own| own == found) && found.len >= segment.len;
        return Ok(in_place && is_intact(storage, segment)?);
    }
    Ok(match segment.closed_state {
        Some(closed) => found == closed && found.len >= segment.len,
        // Of an earlier start's segments only some are kept open: the others can be judged by their length.
        None => segment.file.is_none() && found.len >= segment.len,
    })
}

/// Whether a segment's file holds all its records. Reads the whole file.
pub(super) fn is_intact(storage: &dyn JournalStorage, segment: &Segment) -> io::Result<bool> {
    Ok(intact_piece(storage, segment)?.last_seq >= segment.last_seq)
}

fn restore_segment(shared: &Shared, segment: &Segment) -> io::Result<Option<LostRecords>> {
    let (storage, link) = (&*shared.segments.storage, &segment.link);
    storage.create_directory()?;
    let (pieces, lost) = match whole(segment)? {
        Some(bytes) => {
            let restored = write(shared, segment, segment.before, segment.last_seq, &bytes)?;
            (vec![restored], None)
        }
        None => rebuild(shared, segment)?,
    };
    tracing::error!(
        segment = segment.name,
        restored = ?pieces.iter().map(|piece| (piece.before.seq + 1, piece.last_seq)).collect::<Vec<_>>(),
        "an audit segment was removed, moved, replaced or changed by another program: its records were written \
         again"
    );
    shared.catalog().replace(&segment.name, pieces);
    let lost = lost.map(|(first, last)| LostRecords { chain: link.chain.clone(), first, last });
    if let Some(records @ LostRecords { chain, first, last }) = &lost {
        shared.counters.lost.fetch_add(records.count().unsigned_abs(), Ordering::Relaxed);
        tracing::error!(
            chain,
            first,
            last,
            "AUDIT RECORDS ARE LOST: another program removed them from the journal before Postgres had them"
        );
    }
    Ok(lost)
}

/// Returns the durable part of a segment whose file was removed or moved and not changed; `None` if it was changed.
fn whole(segment: &Segment) -> io::Result<Option<Vec<u8>>> {
    let (Some(file), Some(closed)) = (&segment.file, segment.closed_state) else { return Ok(None) };
    if segment.distrusted || file.state()? != closed {
        return Ok(None);
    }
    let len = usize::try_from(segment.len).unwrap_or(usize::MAX);
    let bytes = file.read(0, len)?;
    Ok((bytes.len() == len).then_some(bytes))
}

/// Writes what is still known of a segment whose file was changed, and moves that file aside. Returns the new
/// segments, and the undelivered records that are lost.
fn rebuild(shared: &Shared, segment: &Segment) -> io::Result<(Vec<Segment>, Option<Range>)> {
    let storage = &*shared.segments.storage;
    let in_file = intact_piece(storage, segment)?;
    let remembered = remembered(shared, segment);
    // Read after the memory, which drops batches as soon as they are delivered.
    let delivered = shared.catalog().position(&segment.link.chain).max(segment.before.seq);
    let (pieces, gap) = join(in_file, remembered, delivered, segment.last_seq);
    let aside = format!("{}.torn", segment.name);
    match storage.rename(&segment.name, &aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut written = Vec::new();
    for Piece { before, last_seq, lines } in pieces {
        let mut bytes = Header::new(&segment.link, before).line();
        bytes.extend_from_slice(&lines);
        written.push(write(shared, segment, before, last_seq, &bytes)?);
    }
    Ok((written, gap))
}

/// Returns the records of a closed segment that are in memory.
fn remembered(shared: &Shared, segment: &Segment) -> Option<Piece> {
    if *segment.link != *shared.link {
        return None;
    }
    let last_seq = segment.last_seq;
    let (before, lines) = shared.recent().lines(segment.before.seq, last_seq)?;
    Some(Piece { before, last_seq, lines })
}

/// Returns the records at the beginning of a segment that still follow each other.
fn intact_piece(storage: &dyn JournalStorage, segment: &Segment) -> io::Result<Piece> {
    let len = usize::try_from(segment.len).unwrap_or(usize::MAX);
    let bytes = match &segment.file {
        Some(file) => file.read(0, len),
        None => storage.read(&segment.name, 0, len),
    };
    let bytes = match bytes {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        bytes => bytes?,
    };
    let (mut head, mut lines) = (segment.before, Vec::new());
    let mut rest = bytes.split_inclusive(|b| *b == b'\n');
    let header = rest.next().is_some_and(|line| Header::parse(&segment.name, line).is_ok());
    for line in rest.take_while(|line| header && line.ends_with(b"\n")) {
        let Ok(event) = decode(line, &segment.link.chain, head) else { break };
        head = event.head();
        lines.extend_from_slice(line);
    }
    Ok(Piece { before: segment.before, last_seq: head.seq, lines })
}

/// Decides which records of a segment up to `last` are kept, from those at its beginning and those that are
/// remembered. Returns them, and the first and the last of those after `delivered` that are lost.
fn join(
    in_file: Piece,
    remembered: Option<Piece>,
    delivered: i64,
    last: i64,
) -> (Vec<Piece>, Option<Range>) {
    let known = delivered.max(in_file.last_seq);
    let Some(remembered) = remembered else {
        let pieces = if in_file.last_seq > delivered { vec![in_file] } else { vec![] };
        return (pieces, (known < last).then_some((known + 1, last)));
    };
    let gap = remembered.before.seq;
    if in_file.last_seq > delivered && delivered < gap {
        // Records that are in both stay in the second piece only.
        let excess = usize::try_from(in_file.last_seq - gap).unwrap_or(0);
        let first = Piece {
            lines: without_last(&in_file.lines, excess).to_vec(),
            last_seq: in_file.last_seq.min(gap),
            ..in_file
        };
        return (vec![first, remembered], (known < gap).then_some((known + 1, gap)));
    }
    (vec![remembered], (delivered < gap).then_some((delivered + 1, gap)))
}

/// Returns `lines` without the last `count` of them.
fn without_last(lines: &[u8], count: usize) -> &[u8] {
    let mut ends = lines.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    ends.nth(count).map_or(&[], |(at, _)| &lines[..=at])
}

/// Writes a file for the records of `segment` after `before` up to `last_seq`, and returns its entry for the
/// catalog.
fn write(
    shared: &Shared,
    segment: &Segment,
    before: ChainHead,
    last_seq: i64,
    bytes: &[u8],
) -> io::Result<Segment> {
    let name = name_of(&segment.link.chain, before.seq + 1);
    let storage = &shared.segments.storage;
    storage.replace(&name, bytes)?;
    let file = storage.open(&name)?;
    let closed_state = Some(file.state()?);
    let keep = segment.file.is_some();
    let len = bytes.len() as u64;
    let file = keep.then_some(file);
    let distrusted = false;
    Ok(Segment { name, before, last_seq, len, file, closed_state, distrusted, ..segment.clone() })
}

/// Returns the state of `file`, the segment that is being written, if `name` still leads to it and it is `len` bytes
/// long.
pub(super) fn state_in_place(
    storage: &dyn JournalStorage,
    name: &str,
    file: &dyn SegmentFile,
    len: u64,
) -> Option<FileState> {
    let (found, own) = (storage.state_of(name).ok()?, file.state().ok()?);
    (found.identity == own.identity && found.len == len).then_some(own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::chain::Digest;

    fn piece(after: i64, last_seq: i64) -> Piece {
        let lines = (after + 1..=last_seq).flat_map(|seq| format!("{seq}\n").into_bytes());
        let before = ChainHead { seq: after, hash: Digest::ZERO };
        Piece { before, last_seq, lines: lines.collect() }
    }

    /// The records that are kept of a segment with the records 11 to 20, and the lost ones.
    fn kept(
        in_file: i64,
        remembered: Option<i64>,
        delivered: i64,
    ) -> (Vec<String>, Option<(i64, i64)>) {
        let remembered = remembered.map(|after| piece(after, 20));
        let (pieces, lost) = join(piece(10, in_file), remembered, delivered, 20);
        for piece in &pieces {
            let lines = String::from_utf8(piece.lines.clone()).unwrap();
            let end = lines.lines().last().unwrap().parse();
            assert_eq!(end, Ok(piece.last_seq));
            assert_eq!(i64::try_from(lines.lines().count()), Ok(piece.last_seq - piece.before.seq));
        }
        let kept = |piece: &Piece| format!("{}-{}", piece.before.seq + 1, piece.last_seq);
        (pieces.iter().map(kept).collect(), lost)
    }

    #[test]
    fn everything_undelivered_is_kept_that_the_file_or_the_memory_has_and_the_rest_is_lost() {
        let expected = |kept: &[&str], lost| (kept.iter().map(|it| (*it).into()).collect(), lost);
        // The file is empty.
        assert_eq!(kept(10, Some(10), 10), expected(&["11-20"], None));
        assert_eq!(kept(10, Some(14), 14), expected(&["15-20"], None));
        assert_eq!(kept(10, Some(14), 16), expected(&["15-20"], None));
        assert_eq!(kept(10, Some(14), 12), expected(&["15-20"], Some((13, 14))));
        assert_eq!(kept(10, None, 12), expected(&[], Some((13, 20))));
        // The file has some of the records.
        assert_eq!(kept(14, Some(14), 10), expected(&["11-14", "15-20"], None));
        assert_eq!(kept(17, Some(14), 10), expected(&["11-14", "15-20"], None));
        assert_eq!(kept(12, Some(14), 10), expected(&["11-12", "15-20"], Some((13, 14))));
        assert_eq!(kept(12, Some(14), 14), expected(&["15-20"], None));
        assert_eq!(kept(12, None, 10), expected(&["11-12"], Some((13, 20))));
        assert_eq!(kept(12, None, 14), expected(&[], Some((15, 20))));
        // It has all of them, in a file that was changed otherwise.
        assert_eq!(kept(20, None, 10), expected(&["11-20"], None));
        assert_eq!(kept(20, Some(14), 10), expected(&["11-14", "15-20"], None));
    }
}
