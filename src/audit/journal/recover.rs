//! Recovery at a start: finds the segments, the head of the last chain, and a torn tail if there is
//! one.
//!
//! Only the last segment is read completely, since a segment is complete and durable before its
//! successor is created. The headers of the others say what each contains, and delivery checks each
//! record that it reads.
//!
//! A damaged segment is evidence, and its records may exist nowhere else: the start refuses it. If all its records are
//! delivered, Postgres has them, so the file is only set aside.

use std::{
    collections::{BTreeMap, HashSet},
    io, iter,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

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
/// The file that says where the chain ended that was closed last.
pub(super) const CLOSED_FILE: &str = "closed.json";
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

/// The end of a chain that was closed in order: no record was written to it later.
///
/// Only with it is it known, without the last segment itself, that all of that segment's records are delivered. After a
/// crash there is none.
#[derive(Deserialize, Serialize)]
pub(super) struct ClosedChain {
    #[serde(flatten)]
    link: ChainLink,
    last_seq: i64,
    last_hash: Digest,
}

impl ClosedChain {
    pub(super) fn new(link: &ChainLink, head: ChainHead) -> Self {
        Self { link: link.clone(), last_seq: head.seq, last_hash: head.hash }
    }

    fn head(&self) -> ChainHead {
        ChainHead { seq: self.last_seq, hash: self.last_hash }
    }
}

/// Why a segment cannot be used.
enum Fault {
    Damaged { line: usize, why: String },
    Io(io::Error),
}

impl Fault {
    fn header(why: String) -> Self {
        Self::Damaged { line: 1, why }
    }

    fn into_error(self, file: &str) -> JournalError {
        match self {
            Self::Damaged { line, why } => JournalError::damaged(file, line, why),
            Self::Io(error) => JournalError::io(file)(error),
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A segment file, with its header if that can be read.
struct Candidate {
    file: FileInfo,
    header: Result<Header, Fault>,
}

impl Candidate {
    /// The chain and the number of the first record, by the name.
    fn named(&self) -> (&str, i64) {
        parse_name(&self.file.name).unwrap_or_default()
    }
}

/// What the journal's other files say of its segments.
struct Known {
    delivered: BTreeMap<String, i64>,
    closed: Option<ClosedChain>,
}

impl Known {
    fn read(storage: &dyn JournalStorage) -> Self {
        Self { delivered: read_delivered(storage), closed: read_closed(storage) }
    }

    fn delivered(&self, chain: &str) -> i64 {
        self.delivered.get(chain).copied().unwrap_or(0)
    }

    fn closed(&self, chain: &str) -> Option<&ClosedChain> {
        self.closed.as_ref().filter(|closed| closed.link.chain == chain)
    }

    /// Whether a segment has held records, by what is known of its chain.
    fn held_records(&self, (chain, first_seq): (&str, i64)) -> bool {
        let closed = self.closed(chain).map_or(0, |closed| closed.last_seq);
        self.delivered(chain).max(closed) >= first_seq
    }

    /// Whether Postgres has all records that `segment` has held, which `next` follows. Does not rely on the segment's
    /// content. `false` if it is not known where it ended.
    fn is_delivered(&self, segment: &Candidate, next: Option<&Candidate>) -> bool {
        let (chain, _) = segment.named();
        let end_by_next = next.and_then(|next| match (next.named(), &next.header) {
            ((next_chain, first_seq), _) if next_chain == chain => Some(first_seq - 1),
            (_, Ok(Header { link, .. })) if link.linked_chain.as_deref() == Some(chain) => {
                Some(link.linked_seq)
            }
            _ => None,
        });
        let end_by_link = || {
            let link = &self.closed.as_ref()?.link;
            (link.linked_chain.as_deref() == Some(chain)).then_some(link.linked_seq)
        };
        let end = end_by_next
            .or_else(|| self.closed(chain).map(|closed| closed.last_seq))
            .or_else(end_by_link);
        end.is_some_and(|end| end <= self.delivered(chain))
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
    let known = Known::read(storage);
    let mut damaged = Vec::new();
    let mut candidates = read_headers(storage, files, &known, action)?;
    if action == TornTailAction::Leave {
        candidates = without_headerless(candidates, &mut damaged);
    }
    let mut links = LinkInterner::default();
    let mut segments = Vec::with_capacity(candidates.len());
    let (mut last, mut torn) = (None, None);
    let mut rest = candidates.into_iter().peekable();
    while let Some(candidate) = rest.next() {
        let next = rest.peek();
        let is_delivered = known.is_delivered(&candidate, next);
        let chain = candidate.named().0.to_owned();
        let Candidate { file, header } = candidate;
        // A journal that is only read is described as it is.
        let closed = known.closed(&chain).filter(|_| action == TornTailAction::SetAside);
        let tail = Tail { action, written_to: closed.map_or(0, |closed| closed.last_seq) };
        let checked = header.and_then(|header| {
            let (head, len) = match check_end(storage, &header, &file, next, tail, &mut torn) {
                // The reader gets as far as the damage, and reports it.
                Err(_) if action == TornTailAction::Leave => (UNKNOWN_END, file.len),
                checked => checked?,
            };
            Ok((header, head, len))
        });
        let (header, head, len) = match checked {
            Ok(checked) => checked,
            Err(fault) if is_delivered => {
                set_aside_delivered(storage, &file.name, fault)?;
                last = closed.map(|it| (Arc::new(it.link.clone()), it.head())).or(last);
                continue;
            }
            Err(fault) => return Err(fault.into_error(&file.name)),
        };
        let link = links.of(&header);
        segments.push(Segment {
            name: file.name,
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
    let catalog = Catalog::new(segments, known.delivered);
    Ok(Recovered { catalog, start, last, torn, damaged })
}

/// How the end of the last segment is judged.
#[derive(Clone, Copy)]
struct Tail {
    /// What is done with a torn tail.
    action: TornTailAction,
    /// `seq` of the last record that was written to the chain, if that is known; otherwise 0. Without records up to it,
    /// the segment is damaged.
    written_to: i64,
}

/// Returns the head at a segment's end, and the length of its part up to there.
fn check_end(
    storage: &dyn JournalStorage,
    header: &Header,
    file: &FileInfo,
    next: Option<&Candidate>,
    tail: Tail,
    torn: &mut Option<TornTail>,
) -> Result<(ChainHead, u64), Fault> {
    let Some(next) = next else { return check_records(storage, header, file, Some(tail), torn) };
    match next.header.as_ref().ok().and_then(|next| end_by_successor(header, next)) {
        Some(head) => Ok((head, file.len)),
        None => check_records(storage, header, file, None, torn),
    }
}

/// Moves a damaged segment to a `.torn` file. Postgres has its records.
fn set_aside_delivered(
    storage: &dyn JournalStorage,
    name: &str,
    fault: Fault,
) -> Result<(), JournalError> {
    let aside = free_aside(storage, name).map_err(JournalError::io(name))?;
    storage.rename(name, &aside).map_err(JournalError::io(name))?;
    storage.sync_dir().map_err(JournalError::io("."))?;
    let (line, why) = match fault {
        Fault::Damaged { line, why } => (Some(line), why),
        Fault::Io(error) => (None, error.to_string()),
    };
    tracing::error!(
        file = name,
        line,
        why,
        aside,
        "an audit segment whose records are all in Postgres cannot be used: moved to a .torn file"
    );
    Ok(())
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

/// Reads the headers of all segments. A last segment whose creation was interrupted is discarded.
fn read_headers(
    storage: &dyn JournalStorage,
    files: Vec<FileInfo>,
    known: &Known,
    action: TornTailAction,
) -> Result<Vec<Candidate>, JournalError> {
    let mut candidates = Vec::with_capacity(files.len());
    for file in files {
        let header = read_header(storage, &file.name);
        candidates.push(Candidate { file, header });
    }
    let interrupted = candidates
        .pop_if(|it| !known.held_records(it.named()) && is_interrupted_creation(storage, it));
    if let (Some(Candidate { file, header: Err(fault) }), TornTailAction::SetAside) =
        (interrupted, action)
    {
        let why = if let Fault::Damaged { why, .. } = fault { why } else { String::new() };
        tracing::warn!(
            file = file.name,
            why,
            "the journal's last segment has no header: moved to a .torn file"
        );
        set_aside(storage, &file, 0).map_err(|fault| fault.into_error(&file.name))?;
        storage.remove(&file.name).map_err(JournalError::io(&file.name))?;
    }
    Ok(candidates)
}

/// Returns the segments with a header. Adds the faults of the others to `damaged`.
fn without_headerless(
    candidates: Vec<Candidate>,
    damaged: &mut Vec<JournalError>,
) -> Vec<Candidate> {
    let mut kept = Vec::with_capacity(candidates.len());
    for Candidate { file, header } in candidates {
        match header {
            Ok(header) => kept.push(Candidate { file, header: Ok(header) }),
            Err(fault) => damaged.push(fault.into_error(&file.name)),
        }
    }
    kept
}

fn read_header(storage: &dyn JournalStorage, name: &str) -> Result<Header, Fault> {
    let start = storage.read(name, 0, MAX_HEADER_BYTES)?;
    let Some(end) = start.iter().position(|b| *b == b'\n') else {
        return Err(Fault::header("the header line is not complete".into()));
    };
    Header::parse(name, &start[..end]).map_err(Fault::header)
}

/// Whether a crash may have interrupted the creation of a segment whose header is damaged. Such a file contains a part
/// of a header, and zeros where the file system had not written yet. The header is on disk before the first record is
/// written, so anything else was written later, by another program.
fn is_interrupted_creation(storage: &dyn JournalStorage, candidate: &Candidate) -> bool {
    const BEGINNING: &[u8] = br#"{"journal":"#;
    if !matches!(candidate.header, Err(Fault::Damaged { .. })) {
        return false;
    }
    let Ok(bytes) = read_all(storage, &candidate.file) else { return false };
    let written = bytes.iter().rposition(|byte| *byte != 0).map_or(&[][..], |last| &bytes[..=last]);
    let same = written.len().min(BEGINNING.len());
    written.len() <= MAX_HEADER_BYTES
        && !written.contains(&b'\n')
        && written[..same] == BEGINNING[..same]
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
/// `tail` is `None` if the segment cannot have a torn tail, since it is not the last. [`TornTailAction::Leave`] stores
/// a description of the tail in `torn`.
fn check_records(
    storage: &dyn JournalStorage,
    header: &Header,
    file: &FileInfo,
    tail: Option<Tail>,
    torn: &mut Option<TornTail>,
) -> Result<(ChainHead, u64), Fault> {
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
                    let is_torn =
                        |tail: &Tail| head.seq >= max_synced_seq(rest, chain).max(tail.written_to);
                    match tail.filter(is_torn).map(|tail| tail.action) {
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
                        None => return Err(Fault::Damaged { line, why }),
                    }
                    break;
                }
            }
        }
        intact += line.len();
    }
    match tail {
        Some(Tail { written_to, .. }) if head.seq < written_to => Err(Fault::Damaged {
            line: bytes.split(|b| *b == b'\n').count(),
            why: format!("it ends after record {}, and {written_to} were written", head.seq),
        }),
        _ => Ok((head, intact as u64)),
    }
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
fn set_aside(storage: &dyn JournalStorage, file: &FileInfo, keep: usize) -> Result<(), Fault> {
    let bytes = read_all(storage, file)?;
    let aside = free_aside(storage, &file.name)?;
    storage.replace(&aside, &bytes[keep..])?;
    Ok(storage.truncate(&file.name, keep as u64)?)
}

/// Returns a name for what is set aside of a segment that no file has: an earlier start may have set a part of it aside.
fn free_aside(storage: &dyn JournalStorage, name: &str) -> io::Result<String> {
    let first = format!("{name}.torn");
    let others = (2_u64..).map(|number| format!("{first}.{number}"));
    let names: HashSet<_> = storage.list()?.into_iter().map(|file| file.name).collect();
    let free = iter::once(first.clone()).chain(others).find(|aside| !names.contains(aside));
    Ok(free.unwrap_or(first))
}

fn read_all(storage: &dyn JournalStorage, file: &FileInfo) -> io::Result<Vec<u8>> {
    let len = usize::try_from(file.len).unwrap_or(usize::MAX);
    storage.read(&file.name, 0, len)
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

/// The chain that was closed last. Without it, a damaged last segment is refused.
fn read_closed(storage: &dyn JournalStorage) -> Option<ClosedChain> {
    let bytes = storage.read(CLOSED_FILE, 0, MAX_HEADER_BYTES).ok()?;
    serde_json::from_slice(&bytes).ok()
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
