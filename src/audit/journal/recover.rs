//! What a start finds on disk: the segments, the last chain's head, and perhaps a torn tail.
//!
//! Only the last segment is read whole: a torn tail can be nowhere else, since a segment is complete
//! and durable before its successor is made. The headers of the others say what each holds, and
//! delivery checks each record that it reads.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    JournalError,
    catalog::{Catalog, Segment},
    files::{Files, Listed},
    segment::{Header, decode, parse_name, start_number, synced},
};
use crate::{
    audit::chain::{ChainHead, ChainLink, Digest, StoredEvent},
    domain::clock::Timestamp,
};

/// Where the delivered positions are kept from start to start.
pub(super) const DELIVERED: &str = "delivered.json";
/// The longest header line.
const LONGEST_HEADER: usize = 4_096;

/// What a start goes on from.
pub(super) struct Recovered {
    pub(super) catalog: Catalog,
    /// The number of this start.
    pub(super) start: u32,
    /// The chain before this one, and its head.
    pub(super) last: Option<(Arc<ChainLink>, ChainHead)>,
    /// A tail that was left as it is.
    pub(super) torn: Option<TornTail>,
}

/// A tail of a journal's last segment that does not follow what is before it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TornTail {
    /// The chain.
    pub chain: String,
    /// The last record before it.
    pub last_seq: i64,
    /// The segment.
    pub file: String,
    /// The first line that does not follow, from 1.
    pub line: usize,
    /// How many lines of it are whole records: a crash leaves few, and an edit of one leaves all that
    /// follow.
    pub records: usize,
}

/// What becomes of a tail that a crash tore.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Tail {
    /// It is set aside, and the segment cut.
    SetAside,
    /// It is passed over.
    Leave,
}

/// Reads what `files` hold, up to a torn tail.
pub(super) fn recover(files: &dyn Files, tail: Tail) -> Result<Recovered, JournalError> {
    let listed = sorted_segments(files)?;
    let number = |file: &Listed| start_number(parse_name(&file.name)?.0);
    let start = listed.iter().filter_map(number).max().map_or(1, |last| last.saturating_add(1));
    let found = read_headers(files, listed, tail)?;
    let mut links = Links::default();
    let mut segments = Vec::with_capacity(found.len());
    let (mut last, mut torn) = (None, None);
    for (nth, (header, file)) in found.iter().enumerate() {
        let link = links.of(header);
        let (head, len) = match found.get(nth + 1) {
            Some((next, _)) => match end_by_successor(header, next) {
                Some(head) => (head, file.len),
                None => read_through(files, header, file, None, &mut torn)?,
            },
            None => read_through(files, header, file, Some(tail), &mut torn)?,
        };
        segments.push(Segment {
            name: file.name.clone(),
            link: Arc::clone(&link),
            before: header.head(),
            last_seq: head.seq,
            len,
            closed_at: Some(file.modified),
        });
        last = Some((link, head));
    }
    let catalog = Catalog::new(segments, read_delivered(files));
    Ok(Recovered { catalog, start, last, torn })
}

/// One shared link for all segments of a chain.
#[derive(Default)]
struct Links(Option<Arc<ChainLink>>);

impl Links {
    fn of(&mut self, header: &Header) -> Arc<ChainLink> {
        if let Some(link) = &self.0
            && **link == header.link
        {
            return Arc::clone(link);
        }
        let link = Arc::new(header.link.clone());
        self.0 = Some(Arc::clone(&link));
        link
    }
}

fn sorted_segments(files: &dyn Files) -> Result<Vec<Listed>, JournalError> {
    let mut listed = files.list().map_err(JournalError::io("."))?;
    listed.retain(|file| parse_name(&file.name).is_some());
    listed.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(listed)
}

/// The segments with their headers. A last one that has none yet is a torn tail.
fn read_headers(
    files: &dyn Files,
    listed: Vec<Listed>,
    tail: Tail,
) -> Result<Vec<(Header, Listed)>, JournalError> {
    let mut found = Vec::with_capacity(listed.len());
    let last = listed.len().saturating_sub(1);
    for (nth, file) in listed.into_iter().enumerate() {
        match read_header(files, &file.name)? {
            Ok(header) => found.push((header, file)),
            Err(why) if nth == last => discard_unmade(files, &file, &why, tail)?,
            Err(why) => return Err(JournalError::damaged(&file.name, 1, why)),
        }
    }
    Ok(found)
}

/// The header of a segment, or what is wrong with it.
fn read_header(files: &dyn Files, name: &str) -> Result<Result<Header, String>, JournalError> {
    let start = files.read(name, 0, LONGEST_HEADER).map_err(JournalError::io(name))?;
    let Some(end) = start.iter().position(|b| *b == b'\n') else {
        return Ok(Err("the header line is not complete".into()));
    };
    Ok(Header::parse(name, &start[..end]))
}

/// Sets a last segment aside whose making a crash interrupted: it has no header yet, so that nothing
/// can have been written after it.
fn discard_unmade(
    files: &dyn Files,
    file: &Listed,
    why: &str,
    tail: Tail,
) -> Result<(), JournalError> {
    let bytes = read_all(files, file)?;
    if bytes.split(|b| *b == b'\n').any(|line| serde_json::from_slice::<StoredEvent>(line).is_ok())
    {
        return Err(JournalError::damaged(&file.name, 1, why.to_owned()));
    }
    if tail == Tail::Leave {
        return Ok(());
    }
    tracing::warn!(file = file.name, why, "the journal's last segment has no header: set aside");
    set_aside(files, file, 0)?;
    files.remove(&file.name).map_err(JournalError::io(&file.name))
}

/// The head at a segment's end as its successor's header tells it: the next segment of the chain, or
/// the first of the chain that is linked to it. Anything in the file past that was abandoned after
/// an error and written anew to the successor.
fn end_by_successor(header: &Header, next: &Header) -> Option<ChainHead> {
    if next.link.chain == header.link.chain {
        return Some(next.head());
    }
    let linked = next.link.linked_chain.as_deref() == Some(&*header.link.chain);
    linked.then_some(ChainHead { seq: next.link.linked_seq, hash: next.link.linked_hash })
}

/// Checks every record of a segment; its head and length. The last segment's may be torn at its `tail`.
fn read_through(
    files: &dyn Files,
    header: &Header,
    file: &Listed,
    tail: Option<Tail>,
    torn: &mut Option<TornTail>,
) -> Result<(ChainHead, u64), JournalError> {
    let bytes = read_all(files, file)?;
    let mut head = header.head();
    let mut good = 0;
    for (nth, line) in bytes.split_inclusive(|b| *b == b'\n').enumerate() {
        if nth > 0 {
            let decoded = if line.ends_with(b"\n") {
                decode(line, &header.link.chain, head)
            } else {
                Err("the line is not complete".into())
            };
            match decoded {
                Ok(event) => head = event.head(),
                Err(why)
                    if tail.is_some()
                        && head.seq >= known_synced(&bytes[good..], &header.link.chain) =>
                {
                    if tail == Some(Tail::Leave) {
                        let lines = bytes[good..].split(|b| *b == b'\n');
                        *torn = Some(TornTail {
                            chain: header.link.chain.clone(),
                            last_seq: head.seq,
                            file: file.name.clone(),
                            line: nth + 1,
                            records: lines
                                .filter(|line| serde_json::from_slice::<StoredEvent>(line).is_ok())
                                .count(),
                        });
                        break;
                    }
                    tracing::error!(
                        file = file.name,
                        line = nth + 1,
                        why,
                        after = head.seq,
                        bytes = bytes.len() - good,
                        "the journal ends in records that no call was answered for, or its last \
                         batch was tampered with: set aside"
                    );
                    set_aside(files, file, good)?;
                    break;
                }
                Err(why) => return Err(JournalError::damaged(&file.name, nth + 1, why)),
            }
        }
        good += line.len();
    }
    Ok((head, good as u64))
}

/// The last number that the lines after a fault say was on disk when they were written.
fn known_synced(tail: &[u8], chain: &str) -> i64 {
    tail.split(|b| *b == b'\n').filter_map(|line| synced(line, chain)).max().unwrap_or(0)
}

/// Copies what follows the first `keep` bytes into `<name>.torn`, then cuts it off.
fn set_aside(files: &dyn Files, file: &Listed, keep: usize) -> Result<(), JournalError> {
    let bytes = read_all(files, file)?;
    let aside = format!("{}.torn", file.name);
    files.replace(&aside, &bytes[keep..]).map_err(JournalError::io(&aside))?;
    files.truncate(&file.name, keep as u64).map_err(JournalError::io(&file.name))
}

fn read_all(files: &dyn Files, file: &Listed) -> Result<Vec<u8>, JournalError> {
    let len = usize::try_from(file.len).unwrap_or(usize::MAX);
    files.read(&file.name, 0, len).map_err(JournalError::io(&file.name))
}

/// The delivered positions as they were kept. They only say what may be deleted, so that without
/// them everything is held until Postgres has been asked.
fn read_delivered(files: &dyn Files) -> BTreeMap<String, i64> {
    const LONGEST: usize = 1 << 20;
    let Ok(bytes) = files.read(DELIVERED, 0, LONGEST) else { return BTreeMap::new() };
    serde_json::from_slice(&bytes).unwrap_or_else(|error| {
        tracing::warn!(%error, "{DELIVERED} cannot be read: positions will come from Postgres");
        BTreeMap::new()
    })
}

/// The link of a new chain.
pub(super) fn link_to(
    last: Option<&(Arc<ChainLink>, ChainHead)>,
    instance: &str,
    chain: String,
    started_at: Timestamp,
) -> ChainLink {
    ChainLink {
        instance: instance.to_owned(),
        chain,
        started_at,
        linked_chain: last.map(|(link, _)| link.chain.clone()),
        linked_seq: last.map_or(0, |(_, head)| head.seq),
        linked_hash: last.map_or(Digest::ZERO, |(_, head)| head.hash),
    }
}
