//! Recovery at a start: finds the segments, the head of the last chain, and a torn tail if there is
//! one.
//!
//! Only the last segment is read completely, since a segment is complete and durable before its
//! successor is created. The headers of the others say what each contains, and delivery checks each
//! record that it reads.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    catalog::{Catalog, Segment},
    error::JournalError,
    segment::{Header, decode, parse_name, start_number, synced_seq},
    storage::{FileInfo, JournalStorage},
};
use crate::{
    audit::{
        chain::{ChainHead, ChainLink, Digest, StoredEvent},
        json_error,
    },
    domain::clock::Timestamp,
};

/// The file that keeps the delivered positions for the next start.
pub(super) const POSITIONS_FILE: &str = "delivered.json";
/// Longest header line, in bytes.
const MAX_HEADER_BYTES: usize = 4_096;

/// The end of a damaged segment: no record has this number, so that its reader comes to the damage.
const UNKNOWN_END: ChainHead = ChainHead { seq: i64::MAX - 1, hash: Digest::ZERO };

/// The state from which a start continues.
pub(super) struct Recovered {
    pub(super) catalog: Catalog,
    /// Number of this start, from 1.
    pub(super) start: u32,
    /// The previous chain and its head.
    pub(super) last: Option<(Arc<ChainLink>, ChainHead)>,
    /// The torn tail, if [`TornTailAction::Leave`] left it in its segment.
    pub(super) torn: Option<TornTail>,
    /// The segments that are left out because their headers cannot be read, with [`TornTailAction::Leave`].
    pub(super) damaged: Vec<JournalError>,
}

/// The end of a journal's last segment, if it does not follow the records before it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TornTail {
    /// Name of the chain.
    pub chain: String,
    /// `seq` of the last record before the tail.
    pub last_seq: i64,
    /// Name of the segment.
    pub file: String,
    /// The first line of the tail, counted from 1.
    pub line: usize,
    /// Number of lines in the tail that are complete records. After a crash there are few; after an edit
    /// of a record, all that follow it are in the tail.
    pub records: usize,
}

/// What [`recover`] does with a torn tail.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum TornTailAction {
    /// Move it to a `.torn` file and truncate the segment.
    SetAside,
    /// Leave it where it is and ignore it. The journal is only read, and what can be read is wanted: segments
    /// without a header are left out, and damaged ones are kept up to the damage.
    Leave,
}

impl TornTailAction {
    /// Returns the error of a segment, or adds it to `damaged` if such a segment is left out.
    fn leave_out<T>(
        self,
        read: Result<T, JournalError>,
        damaged: &mut Vec<JournalError>,
    ) -> Result<Option<T>, JournalError> {
        match (read, self) {
            (Ok(read), _) => Ok(Some(read)),
            (Err(error), Self::SetAside) => Err(error),
            (Err(error), Self::Leave) => {
                damaged.push(error);
                Ok(None)
            }
        }
    }
}

/// Reads the journal in `storage` up to a torn tail. Blocks on I/O.
pub(super) fn recover(
    storage: &dyn JournalStorage,
    action: TornTailAction,
) -> Result<Recovered, JournalError> {
    let files = sorted_segments(storage)?;
    let number = |file: &FileInfo| start_number(parse_name(&file.name)?.0);
    let start = files.iter().filter_map(number).max().map_or(1, |last| last.saturating_add(1));
    let mut damaged = Vec::new();
    let headers = read_headers(storage, files, action, &mut damaged)?;
    let mut links = LinkInterner::default();
    let mut segments = Vec::with_capacity(headers.len());
    let (mut last, mut torn) = (None, None);
    for (index, (header, file)) in headers.iter().enumerate() {
        let link = links.of(header);
        let end = match headers.get(index + 1) {
            Some((next, _)) => match end_by_successor(header, next) {
                Some(head) => Ok((head, file.len)),
                None => check_records(storage, header, file, None, &mut torn),
            },
            None => check_records(storage, header, file, Some(action), &mut torn),
        };
        let (head, len) = match (end, action) {
            (Ok(end), _) => end,
            (Err(error), TornTailAction::SetAside) => return Err(error),
            // The reader gets as far as the damage, and reports it.
            (Err(_), TornTailAction::Leave) => (UNKNOWN_END, file.len),
        };
        segments.push(Segment {
            name: file.name.clone(),
            link: Arc::clone(&link),
            before: header.head(),
            last_seq: head.seq,
            len,
            closed_at: Some(file.modified),
            file: None,
            closed_state: None,
            distrusted: false,
        });
        last = Some((link, head));
    }
    let catalog = Catalog::new(segments, read_delivered(storage));
    Ok(Recovered { catalog, start, last, torn, damaged })
}

/// Shares one [`ChainLink`] among all segments of a chain.
#[derive(Default)]
struct LinkInterner(Option<Arc<ChainLink>>);

impl LinkInterner {
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

fn sorted_segments(storage: &dyn JournalStorage) -> Result<Vec<FileInfo>, JournalError> {
    let mut files = storage.list().map_err(JournalError::io("."))?;
    files.retain(|file| parse_name(&file.name).is_some());
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

/// Reads the headers of all segments. A last segment without a header is a torn tail.
fn read_headers(
    storage: &dyn JournalStorage,
    files: Vec<FileInfo>,
    action: TornTailAction,
    damaged: &mut Vec<JournalError>,
) -> Result<Vec<(Header, FileInfo)>, JournalError> {
    let mut headers = Vec::with_capacity(files.len());
    let last = files.len().saturating_sub(1);
    for (index, file) in files.into_iter().enumerate() {
        let header = match read_header(storage, &file.name) {
            Ok(Ok(header)) => Ok(Some(header)),
            Ok(Err(why)) if index == last => {
                discard_headerless(storage, &file, &why, action).map(|()| None)
            }
            Ok(Err(why)) => Err(JournalError::damaged(&file.name, 1, why)),
            Err(error) => Err(error),
        };
        let header = action.leave_out(header, damaged)?.flatten();
        headers.extend(header.map(|header| (header, file)));
    }
    Ok(headers)
}

/// Reads the header of a segment. The inner result is an error if the header is malformed.
fn read_header(
    storage: &dyn JournalStorage,
    name: &str,
) -> Result<Result<Header, String>, JournalError> {
    let start = storage.read(name, 0, MAX_HEADER_BYTES).map_err(JournalError::io(name))?;
    let Some(end) = start.iter().position(|b| *b == b'\n') else {
        return Ok(Err("the header line is not complete".into()));
    };
    Ok(Header::parse(name, &start[..end]))
}

/// Discards a last segment whose creation was interrupted by a crash. Such a segment contains no record.
/// If it does contain one, its header was damaged later, which is an error.
fn discard_headerless(
    storage: &dyn JournalStorage,
    file: &FileInfo,
    why: &str,
    action: TornTailAction,
) -> Result<(), JournalError> {
    if count_records(&read_all(storage, file)?) > 0 {
        return Err(JournalError::damaged(&file.name, 1, why.to_owned()));
    }
    if action == TornTailAction::Leave {
        return Ok(());
    }
    tracing::warn!(
        file = file.name,
        why,
        "the journal's last segment has no header: moved to a .torn file"
    );
    set_aside(storage, file, 0)?;
    storage.remove(&file.name).map_err(JournalError::io(&file.name))
}

/// The head at a segment's end according to the header of its successor, which is the next segment of
/// the chain, or the first one of the chain that is linked to it. Anything in the file beyond that head
/// was abandoned after an error and written again to the successor.
fn end_by_successor(header: &Header, next: &Header) -> Option<ChainHead> {
    if next.link.chain == header.link.chain {
        return Some(next.head());
    }
    let linked = next.link.linked_chain.as_deref() == Some(&*header.link.chain);
    linked.then_some(ChainHead { seq: next.link.linked_seq, hash: next.link.linked_hash })
}

/// Checks every record of a segment, and returns its last head and the length of its intact part.
///
/// `action` says what to do with a torn tail. It is `None` if the segment cannot have one, since it is
/// not the last. [`TornTailAction::Leave`] stores a description of the tail in `torn`.
fn check_records(
    storage: &dyn JournalStorage,
    header: &Header,
    file: &FileInfo,
    action: Option<TornTailAction>,
    torn: &mut Option<TornTail>,
) -> Result<(ChainHead, u64), JournalError> {
    let chain = &header.link.chain;
    let bytes = read_all(storage, file)?;
    let mut head = header.head();
    let mut intact = 0;
    for (index, line) in bytes.split_inclusive(|b| *b == b'\n').enumerate() {
        if index > 0 {
            match decode_complete(line, chain, head) {
                Ok(event) => head = event.head(),
                Err(why) => {
                    let (rest, line) = (&bytes[intact..], index + 1);
                    match action.filter(|_| head.seq >= max_synced_seq(rest, chain)) {
                        Some(TornTailAction::Leave) => {
                            *torn = Some(TornTail {
                                chain: chain.clone(),
                                last_seq: head.seq,
                                file: file.name.clone(),
                                line,
                                records: count_records(rest),
                            });
                        }
                        Some(TornTailAction::SetAside) => {
                            tracing::error!(
                                file = file.name,
                                line,
                                why,
                                after = head.seq,
                                bytes = rest.len(),
                                "the journal ends in records that no call was answered for, or its \
                                 last batch was tampered with: moved to a .torn file"
                            );
                            set_aside(storage, file, intact)?;
                        }
                        None => return Err(JournalError::damaged(&file.name, line, why)),
                    }
                    break;
                }
            }
        }
        intact += line.len();
    }
    Ok((head, intact as u64))
}

fn decode_complete(line: &[u8], chain: &str, head: ChainHead) -> Result<StoredEvent, String> {
    if line.ends_with(b"\n") {
        decode(line, chain, head)
    } else {
        Err("the line is not complete".into())
    }
}

fn count_records(lines: &[u8]) -> usize {
    let lines = lines.split(|b| *b == b'\n');
    lines.filter(|line| serde_json::from_slice::<StoredEvent>(line).is_ok()).count()
}

/// The largest value of `synced` in the lines of the tail. Records up to it were durable, so that their
/// loss is damage and not a torn tail.
fn max_synced_seq(tail: &[u8], chain: &str) -> i64 {
    tail.split(|b| *b == b'\n').filter_map(|line| synced_seq(line, chain)).max().unwrap_or(0)
}

/// Copies everything after the first `keep` bytes to `<name>.torn`, then truncates the segment.
fn set_aside(
    storage: &dyn JournalStorage,
    file: &FileInfo,
    keep: usize,
) -> Result<(), JournalError> {
    let bytes = read_all(storage, file)?;
    let aside = format!("{}.torn", file.name);
    storage.replace(&aside, &bytes[keep..]).map_err(JournalError::io(&aside))?;
    storage.truncate(&file.name, keep as u64).map_err(JournalError::io(&file.name))
}

fn read_all(storage: &dyn JournalStorage, file: &FileInfo) -> Result<Vec<u8>, JournalError> {
    let len = usize::try_from(file.len).unwrap_or(usize::MAX);
    storage.read(&file.name, 0, len).map_err(JournalError::io(&file.name))
}

/// The saved delivered positions. If they cannot be read, all segments are retained until Postgres has
/// reported its positions.
fn read_delivered(storage: &dyn JournalStorage) -> BTreeMap<String, i64> {
    const MAX_BYTES: usize = 1 << 20;
    let Ok(bytes) = storage.read(POSITIONS_FILE, 0, MAX_BYTES) else { return BTreeMap::new() };
    serde_json::from_slice(&bytes).unwrap_or_else(|error| {
        let why = json_error::describe(&error);
        tracing::warn!(why, "{POSITIONS_FILE} cannot be read: positions will come from Postgres");
        BTreeMap::new()
    })
}

/// Returns the link of a new chain to the previous one.
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
