//! The catalog of a journal: its segments, how far each is durable, and how far each chain is
//! delivered.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::storage::{FileState, SegmentFile};
use crate::{
    audit::chain::{ChainHead, ChainLink},
    domain::clock::{Timestamp, delta},
};

/// A segment file.
#[derive(Clone)]
pub(super) struct Segment {
    pub(super) name: String,
    pub(super) link: Arc<ChainLink>,
    /// The chain's head before the segment's first record.
    pub(super) before: ChainHead,
    /// `seq` of its last durable record; that of `before` while the segment is empty.
    pub(super) last_seq: i64,
    /// Length of its durable part in bytes.
    pub(super) len: u64,
    /// When the writer closed it; `None` while it is open.
    pub(super) closed_at: Option<Timestamp>,
    /// The file, so that it can be read when its name is gone. `None` once its records are delivered, and if
    /// many others are open.
    pub(super) file: Option<Arc<dyn SegmentFile>>,
    /// The state of the file when it was closed, which it should still have. `None` while it is open, and if
    /// somebody else has changed the file.
    pub(super) closed_state: Option<FileState>,
    /// Whether the file may not hold what was written, so that its content has to be checked.
    pub(super) distrusted: bool,
}

/// A chain that has segments in this journal.
#[derive(Clone, Debug)]
pub struct LocalChain {
    /// Identity of the chain, and its link to the previous one.
    pub link: Arc<ChainLink>,
    /// The chain's head before the first record that is still present.
    pub before: ChainHead,
    /// `seq` of its last durable record; 0 if it is empty.
    pub last_seq: i64,
}

/// How many closed segments are kept open at most, since a process may not have many open files.
const MAX_OPEN_FILES: usize = 128;

#[derive(Default)]
pub(super) struct Catalog {
    /// In the order of starts and, within a chain, of numbers.
    segments: Vec<Segment>,
    /// `seq` of the last delivered record of each chain, as far as it is known.
    delivered: BTreeMap<String, i64>,
}

impl Catalog {
    pub(super) fn new(segments: Vec<Segment>, mut delivered: BTreeMap<String, i64>) -> Self {
        delivered.retain(|chain, _| segments.iter().any(|s| s.link.chain == *chain));
        Self { segments, delivered }
    }

    /// Adds the segment that the writer opened.
    pub(super) fn add(&mut self, segment: Segment) {
        self.segments.push(segment);
    }

    /// Notes how far the open segment is durable now.
    pub(super) fn extend_open(&mut self, last_seq: i64, len: u64) {
        if let Some(segment) = self.segments.last_mut() {
            segment.last_seq = last_seq;
            segment.len = len;
        }
    }

    /// Notes that the writer closed its segment. `state` is the state of its file; `None` if somebody else has
    /// changed the file.
    pub(super) fn close_open(&mut self, at: Timestamp, state: Option<FileState>) {
        let open_files = self.segments.iter().filter(|segment| segment.file.is_some()).count();
        if let Some(segment) = self.segments.last_mut() {
            segment.closed_at = Some(at);
            segment.closed_state = state;
            segment.distrusted |= state.is_none();
            if open_files > MAX_OPEN_FILES {
                segment.file = None;
            }
        }
    }

    /// The closed segments with records that are not known to be delivered, and those that are distrusted.
    pub(super) fn closed_to_check(&self) -> Vec<Segment> {
        let closed = self.segments.iter().filter(|segment| segment.closed_at.is_some());
        let checked = closed.filter(|segment| segment.distrusted || !self.is_deletable(segment));
        checked.cloned().collect()
    }

    /// Returns the segment that is being written.
    pub(super) fn open(&self) -> Option<&Segment> {
        self.segments.last().filter(|segment| segment.closed_at.is_none())
    }

    /// Notes that the content of a segment of `chain` has to be checked. Returns whether there is such a segment.
    pub(super) fn distrust(&mut self, chain: &str, name: &str) -> bool {
        let mut own = self.segments.iter_mut().filter(|segment| segment.link.chain == chain);
        let Some(segment) = own.find(|segment| segment.name == name) else { return false };
        segment.distrusted = true;
        true
    }

    /// Notes that the contents of the open segment, and of those of `chain` with records after `seq`, have to be
    /// checked.
    pub(super) fn distrust_after(&mut self, chain: &str, seq: i64) {
        for segment in self.segments.iter_mut().filter(|segment| segment.link.chain == chain) {
            segment.distrusted |= segment.last_seq > seq || segment.closed_at.is_none();
        }
    }

    /// Notes that a segment holds what was written. `state` is the state of its file, if that is open.
    pub(super) fn trust(&mut self, name: &str, state: Option<FileState>) {
        if let Some(segment) = self.segments.iter_mut().find(|segment| segment.name == name) {
            segment.distrusted = false;
            if segment.closed_at.is_some() {
                segment.closed_state = state;
            }
        }
    }

    /// Whether the content of a segment has yet to be checked.
    pub(super) fn is_distrusted(&self, name: &str) -> bool {
        self.segments.iter().any(|segment| segment.name == name && segment.distrusted)
    }

    /// The closed segments whose records are all delivered.
    pub(super) fn delivered(&self) -> Vec<Segment> {
        self.segments.iter().filter(|segment| self.is_deletable(segment)).cloned().collect()
    }

    /// Replaces a segment by others that hold what is known of its records.
    pub(super) fn replace(&mut self, name: &str, by: Vec<Segment>) {
        if let Some(index) = self.segments.iter().position(|segment| segment.name == name) {
            self.segments.splice(index..=index, by);
        }
    }

    /// Opens the segments with undelivered records, the newest first, as far as not too many are open then.
    pub(super) fn keep_open(&mut self, open: impl Fn(&str) -> Option<Arc<dyn SegmentFile>>) {
        let delivered = &self.delivered;
        let position = |chain: &str| delivered.get(chain).copied().unwrap_or(0);
        let undelivered =
            self.segments.iter_mut().rev().filter(|it| it.last_seq > position(&it.link.chain));
        for segment in undelivered.take(MAX_OPEN_FILES) {
            segment.file = open(&segment.name);
            segment.closed_state = segment.file.as_ref().and_then(|file| file.state().ok());
        }
    }

    /// The head before the first record that is present after a gap which begins with record `seq`; `None` if there
    /// is no gap, or nothing after it.
    pub(super) fn after_gap(&self, chain: &str, seq: i64) -> Option<ChainHead> {
        let mut own = self.segments.iter().filter(|segment| segment.link.chain == chain);
        if own.clone().any(|segment| segment.before.seq < seq && seq <= segment.last_seq) {
            return None;
        }
        own.find(|segment| segment.before.seq >= seq).map(|segment| segment.before)
    }

    /// Removes a deleted segment.
    pub(super) fn remove(&mut self, name: &str) {
        self.segments.retain(|segment| segment.name != name);
    }

    /// Notes that `chain` is delivered up to `seq`. Returns whether that completed the delivery of
    /// a segment.
    pub(super) fn mark_delivered(&mut self, chain: &str, seq: i64) -> bool {
        let before = self.delivered.insert(chain.to_owned(), seq).unwrap_or(0);
        for segment in self.segments.iter_mut().filter(|segment| segment.link.chain == chain) {
            if segment.closed_at.is_some() && segment.last_seq <= seq {
                segment.file = None;
            }
        }
        self.segments
            .iter()
            .any(|s| s.link.chain == chain && (before + 1..=seq).contains(&s.last_seq))
    }

    /// The delivered position of each chain.
    pub(super) fn positions(&self) -> &BTreeMap<String, i64> {
        &self.delivered
    }

    /// Size of the durable parts of all segments.
    pub(super) fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.len).sum()
    }

    /// Size of the segments that may not be deleted.
    pub(super) fn undeletable_bytes(&self) -> u64 {
        let undeletable = self.segments.iter().filter(|segment| !self.is_deletable(segment));
        undeletable.map(|segment| segment.len).sum()
    }

    pub(super) fn segments(&self) -> usize {
        self.segments.len()
    }

    /// Number of durable records that are not known to be delivered.
    pub(super) fn undelivered(&self) -> u64 {
        let waiting = |segment: &Segment| {
            let from = self.position(&segment.link.chain).max(segment.before.seq);
            u64::try_from(segment.last_seq - from).unwrap_or(0)
        };
        self.segments.iter().map(waiting).sum()
    }

    /// Whether every chain but `chain` is delivered completely.
    pub(super) fn all_delivered_except(&self, chain: &str) -> bool {
        let mut others = self.segments.iter().filter(|segment| segment.link.chain != chain);
        others.all(|segment| segment.last_seq <= self.position(&segment.link.chain))
    }

    /// The chains in the order of starts.
    pub(super) fn chains(&self) -> Vec<LocalChain> {
        let mut chains: Vec<LocalChain> = Vec::new();
        for Segment { link, before, last_seq, .. } in &self.segments {
            match chains.last_mut() {
                Some(chain) if chain.link.chain == link.chain => chain.last_seq = *last_seq,
                _ => chains.push(LocalChain {
                    link: Arc::clone(link),
                    before: *before,
                    last_seq: *last_seq,
                }),
            }
        }
        chains
    }

    /// The segment that contains the record `seq` of `chain`, or will contain it.
    pub(super) fn segment_for(&self, chain: &str, seq: i64) -> Option<&Segment> {
        self.segments.iter().rev().find(|s| s.link.chain == chain && s.before.seq < seq)
    }

    /// The oldest segment that may be deleted.
    pub(super) fn oldest_delivered(&self) -> Option<&Segment> {
        self.segments.iter().find(|segment| self.is_deletable(segment))
    }

    /// Names of the delivered segments that were closed before `now - retention`.
    pub(super) fn expired(&self, now: Timestamp, retention: Duration) -> Vec<String> {
        let limit = now - delta(retention);
        let expired = |segment: &&Segment| {
            self.is_deletable(segment) && segment.closed_at.is_some_and(|closed| closed <= limit)
        };
        self.segments.iter().filter(expired).map(|segment| segment.name.clone()).collect()
    }

    fn is_deletable(&self, segment: &Segment) -> bool {
        segment.closed_at.is_some() && segment.last_seq <= self.position(&segment.link.chain)
    }

    pub(super) fn position(&self, chain: &str) -> i64 {
        self.delivered.get(chain).copied().unwrap_or(0)
    }
}
