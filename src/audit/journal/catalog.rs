//! Which segments there are, how far each is durable, and how far each chain is delivered.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    audit::chain::{ChainHead, ChainLink},
    domain::clock::{Timestamp, delta},
};

/// A file of the journal.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) name: String,
    pub(super) link: Arc<ChainLink>,
    /// The chain's head before the segment's first record.
    pub(super) before: ChainHead,
    /// The number of its last durable record; that of `before` while it is empty.
    pub(super) last_seq: i64,
    /// How many of its bytes are durable.
    pub(super) len: u64,
    /// When it was written last; `None` while the writer has it open.
    pub(super) closed_at: Option<Timestamp>,
}

/// A chain of which this journal has segments.
#[derive(Clone, Debug)]
pub struct LocalChain {
    /// Whose chain, and where it starts.
    pub link: Arc<ChainLink>,
    /// What its first record that is still there follows.
    pub before: ChainHead,
    /// The number of its last durable record; 0 if it is empty.
    pub last_seq: i64,
}

#[derive(Debug, Default)]
pub(super) struct Catalog {
    /// In the order of starts, and of numbers within each.
    segments: Vec<Segment>,
    /// The last delivered number of each chain, as far as it is known.
    delivered: BTreeMap<String, i64>,
}

impl Catalog {
    pub(super) fn new(segments: Vec<Segment>, mut delivered: BTreeMap<String, i64>) -> Self {
        delivered.retain(|chain, _| segments.iter().any(|s| s.link.chain == *chain));
        Self { segments, delivered }
    }

    /// Adds the segment that the writer has opened.
    pub(super) fn opened(&mut self, segment: Segment) {
        self.segments.push(segment);
    }

    /// Notes how far the writer's segment is durable now.
    pub(super) fn committed(&mut self, last_seq: i64, len: u64) {
        if let Some(segment) = self.segments.last_mut() {
            segment.last_seq = last_seq;
            segment.len = len;
        }
    }

    /// Notes that the writer has left its segment.
    pub(super) fn closed(&mut self, at: Timestamp) {
        if let Some(segment) = self.segments.last_mut() {
            segment.closed_at = Some(at);
        }
    }

    /// Forgets a segment that was removed.
    pub(super) fn removed(&mut self, name: &str) {
        self.segments.retain(|segment| segment.name != name);
    }

    /// Notes that `chain` is delivered up to `seq`; whether that completed a segment.
    pub(super) fn delivered(&mut self, chain: &str, seq: i64) -> bool {
        let before = self.delivered.insert(chain.to_owned(), seq).unwrap_or(0);
        self.segments
            .iter()
            .any(|s| s.link.chain == chain && (before + 1..=seq).contains(&s.last_seq))
    }

    /// How far each chain is delivered, to be kept for the next start.
    pub(super) fn positions(&self) -> &BTreeMap<String, i64> {
        &self.delivered
    }

    /// How much the durable parts of all segments take.
    pub(super) fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.len).sum()
    }

    /// How much of that may not be deleted.
    pub(super) fn held_bytes(&self) -> u64 {
        let held = self.segments.iter().filter(|segment| !self.may_go(segment));
        held.map(|segment| segment.len).sum()
    }

    pub(super) fn segments(&self) -> usize {
        self.segments.len()
    }

    /// How many durable records are not known to be delivered.
    pub(super) fn undelivered(&self) -> u64 {
        let waiting = |segment: &Segment| {
            let from = self.position(&segment.link.chain).max(segment.before.seq);
            u64::try_from(segment.last_seq - from).unwrap_or(0)
        };
        self.segments.iter().map(waiting).sum()
    }

    /// Whether every chain but `chain` is delivered whole.
    pub(super) fn delivered_but(&self, chain: &str) -> bool {
        let mut others = self.segments.iter().filter(|segment| segment.link.chain != chain);
        others.all(|segment| segment.last_seq <= self.position(&segment.link.chain))
    }

    /// The chains, in the order of starts.
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

    /// The segment that holds, or else would hold, the record `seq` of `chain`.
    pub(super) fn holding(&self, chain: &str, seq: i64) -> Option<&Segment> {
        self.segments.iter().rev().find(|s| s.link.chain == chain && s.before.seq < seq)
    }

    /// The oldest segment that may go because all of it is delivered.
    pub(super) fn oldest_delivered(&self) -> Option<&Segment> {
        self.segments.iter().find(|segment| self.may_go(segment))
    }

    /// The names of the delivered segments that were written last before `now - retention`.
    pub(super) fn expired(&self, now: Timestamp, retention: Duration) -> Vec<String> {
        let limit = now - delta(retention);
        let expired = |segment: &&Segment| {
            self.may_go(segment) && segment.closed_at.is_some_and(|closed| closed <= limit)
        };
        self.segments.iter().filter(expired).map(|segment| segment.name.clone()).collect()
    }

    fn may_go(&self, segment: &Segment) -> bool {
        segment.closed_at.is_some() && segment.last_seq <= self.position(&segment.link.chain)
    }

    fn position(&self, chain: &str) -> i64 {
        self.delivered.get(chain).copied().unwrap_or(0)
    }
}
