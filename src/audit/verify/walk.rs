//! One chain, followed from record to record.

use std::collections::BTreeMap;

use super::{ChainVerdict, Claim, Extent, fault::Fault};
use crate::{
    audit::{
        chain::{ChainHead, Digest, StoredEvent},
        checkpoint::PruningReceipt,
    },
    domain::clock::Timestamp,
};

/// Hears of what does not hold.
pub(super) type Tell<'a> = &'a mut dyn FnMut(Fault);

/// How far a chain was followed.
#[derive(Default)]
pub(super) struct Walk {
    claim: Option<Claim>,
    /// By the number of the first record.
    cuts: BTreeMap<i64, PruningReceipt>,
    /// What signed heads say, until it was compared.
    heads: BTreeMap<i64, Digest>,
    /// The last record that follows all before it; `None` while it is not known where to begin.
    head: Option<ChainHead>,
    /// Records that came before the ones they follow.
    waiting: BTreeMap<i64, Link>,
    records: u64,
    removed: i64,
    /// In a part of a log, how many records between others are not there.
    absent: u64,
    times: Option<(Timestamp, Timestamp)>,
    heads_held: u64,
    signed_seq: i64,
}

/// A record as far as its neighbours know it.
#[derive(Clone, Copy)]
struct Link {
    prev_hash: Digest,
    hash: Digest,
    /// Its own hash is that of what it says.
    sound: bool,
}

impl Walk {
    pub(super) fn claim(&mut self, claim: Claim, root: ChainHead) {
        self.claim = Some(claim);
        self.head = Some(root);
    }

    pub(super) fn claimed(&self) -> Option<&Claim> {
        self.claim.as_ref()
    }

    /// Notes what was removed.
    pub(super) fn cut(&mut self, cut: PruningReceipt) {
        let known = self.cuts.get(&cut.first_seq);
        if known.is_none_or(|known| known.last_seq < cut.last_seq) {
            self.cuts.insert(cut.first_seq, cut);
        }
    }

    /// Notes what the hash of a record must be.
    pub(super) fn vouch(&mut self, head: ChainHead) -> Result<(), Fault> {
        match self.heads.insert(head.seq, head.hash) {
            Some(other) if other != head.hash => Err(Fault::Contradicted { seq: head.seq }),
            _ => Ok(()),
        }
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn absent(&self) -> u64 {
        self.absent
    }

    /// The last record that is there.
    pub(super) fn last(&self) -> Option<i64> {
        self.head.map(|head| head.seq)
    }

    /// The hash of the last record, if there is one.
    pub(super) fn end(&self) -> Option<Digest> {
        self.head.filter(|head| head.seq > 0).map(|head| head.hash)
    }

    pub(super) fn last_hash(&self) -> Option<Digest> {
        self.head.map(|head| head.hash)
    }

    pub(super) fn record(
        &mut self,
        event: &StoredEvent,
        sound: bool,
        extent: Extent,
        tell: Tell<'_>,
    ) {
        self.records += 1;
        let (first, last) = self.times.unwrap_or((event.at, event.at));
        self.times = Some((first.min(event.at), last.max(event.at)));
        // Rows, cuts and positions are of one database, and go back together: what was removed cannot
        // have come again.
        if self.covering(event.seq).is_some() {
            return tell(Fault::NotRemoved { seq: event.seq });
        }
        let link = Link { prev_hash: event.prev_hash, hash: event.hash, sound };
        match self.head {
            Some(head) if event.seq == head.seq + 1 && self.waiting.is_empty() => {
                self.step(head, event.seq, link, tell);
            }
            Some(head) if extent == Extent::Part => self.pass(head, event.seq, link),
            None if extent == Extent::Part => {
                self.head = Some(ChainHead { seq: event.seq, hash: link.hash });
            }
            Some(head) if event.seq <= head.seq => tell(Fault::Twice { seq: event.seq }),
            _ if self.waiting.insert(event.seq, link).is_some() => {
                tell(Fault::Twice { seq: event.seq });
            }
            _ => self.advance(extent, tell),
        }
    }

    /// In a part of a log, goes on with a record whatever is between. One that comes late is proven by
    /// itself alone.
    fn pass(&mut self, head: ChainHead, seq: i64, link: Link) {
        if seq > head.seq {
            self.absent = self.absent.saturating_add(seq.abs_diff(head.seq) - 1);
            self.head = Some(ChainHead { seq, hash: link.hash });
        }
    }

    /// Follows what is there without a gap.
    fn advance(&mut self, extent: Extent, tell: Tell<'_>) {
        while let Some(head) = self.head {
            let next = head.seq + 1;
            if let Some(link) = self.waiting.remove(&next) {
                self.step(head, next, link, tell);
            } else if let Some(cut) = self.covering(next).cloned() {
                self.jump(head, &cut, extent, tell);
            } else {
                return;
            }
        }
    }

    fn step(&mut self, head: ChainHead, seq: i64, link: Link, tell: Tell<'_>) {
        // What was altered itself says nothing of the one before.
        if link.prev_hash != head.hash && link.sound {
            tell(Fault::Replaced { seq: head.seq });
        }
        self.arrive(ChainHead { seq, hash: link.hash }, tell);
    }

    /// Goes on behind what retention removed.
    fn jump(&mut self, head: ChainHead, cut: &PruningReceipt, extent: Extent, tell: Tell<'_>) {
        if cut.first_seq == head.seq + 1 && cut.prev_hash != head.hash && extent != Extent::Part {
            tell(Fault::Replaced { seq: head.seq });
        }
        self.removed = self.removed.saturating_add(cut.last_seq - head.seq);
        let beyond = self.heads.split_off(&cut.last_seq);
        self.heads = beyond;
        let after = self.waiting.split_off(&(cut.last_seq + 1));
        for seq in std::mem::replace(&mut self.waiting, after).into_keys() {
            tell(Fault::NotRemoved { seq });
        }
        self.arrive(ChainHead { seq: cut.last_seq, hash: cut.hash }, tell);
    }

    fn arrive(&mut self, head: ChainHead, tell: Tell<'_>) {
        self.head = Some(head);
        if let Some(vouched) = self.heads.remove(&head.seq) {
            if vouched == head.hash {
                self.heads_held += 1;
                self.signed_seq = head.seq;
            } else {
                tell(Fault::Contradicted { seq: head.seq });
            }
        }
    }

    /// The cut that says that record `seq` was removed.
    fn covering(&self, seq: i64) -> Option<&PruningReceipt> {
        let (_, cut) = self.cuts.range(..=seq).next_back()?;
        (cut.last_seq >= seq).then_some(cut)
    }

    /// Takes what waits, whatever is missing before it.
    pub(super) fn drain(&mut self, extent: Extent, tell: Tell<'_>) {
        self.advance(extent, tell);
        while let Some((&first, &link)) = self.waiting.first_key_value() {
            let waiting = ChainHead { seq: first - 1, hash: link.prev_hash };
            let removed = self.next_cut().filter(|removed| removed.seq < waiting.seq);
            self.skip_to(removed.unwrap_or(waiting), extent, tell);
        }
    }

    /// Takes the earlier half of what waits: what is late is later than it will ever be again.
    pub(super) fn drain_half(&mut self, extent: Extent, tell: Tell<'_>) {
        let middle = self.waiting.keys().nth((self.waiting.len() / 2).max(1)).copied();
        let later = middle.map(|middle| self.waiting.split_off(&middle)).unwrap_or_default();
        self.drain(extent, tell);
        self.waiting = later;
        self.advance(extent, tell);
    }

    /// Goes on with the record that follows `head`, which is not there.
    fn skip_to(&mut self, head: ChainHead, extent: Extent, tell: Tell<'_>) {
        if let Some(before) = self.head.replace(head) {
            self.miss(before.seq + 1, head.seq, extent, tell);
        }
        self.advance(extent, tell);
    }

    /// What comes before the next removed record.
    fn next_cut(&self) -> Option<ChainHead> {
        let from = self.head.map_or(i64::MIN, |head| head.seq + 1);
        let (first, cut) = self.cuts.range(from..).next()?;
        Some(ChainHead { seq: first - 1, hash: cut.prev_hash })
    }

    fn miss(&mut self, first: i64, last: i64, extent: Extent, tell: Tell<'_>) {
        if extent == Extent::Part {
            self.absent = self.absent.saturating_add(last.abs_diff(first) + 1);
        } else {
            tell(Fault::Missing { first, last });
        }
    }

    /// Compares the end with what is known of it.
    pub(super) fn finish(&mut self, extent: Extent, tell: Tell<'_>) {
        self.drain(extent, tell);
        while let Some(removed) = self.next_cut() {
            self.skip_to(removed, extent, tell);
        }
        if extent == Extent::Part {
            return;
        }
        let Some(last) = self.head else { return };
        let claimed =
            self.claim.as_ref().and_then(|claim| Some((claim.last_seq?, claim.last_hash?)));
        if let Some((seq, hash)) = claimed {
            if last.seq < seq {
                tell(Fault::Missing { first: last.seq + 1, last: seq });
            } else if last.seq > seq {
                tell(Fault::BeyondPosition { seq: seq + 1 });
            } else if last.hash != hash {
                tell(Fault::NotThePosition { seq });
            }
        }
        if let Some((&head, _)) = self.heads.last_key_value()
            && head > last.seq
        {
            tell(Fault::CutShort { last: last.seq, head });
        }
    }

    /// How many heads could be compared with nothing that is here.
    pub(super) fn unchecked(&self) -> usize {
        self.heads.len()
    }

    /// Whether anything of the chain is known but heads.
    pub(super) fn is_here(&self) -> bool {
        self.claim.is_some() || self.records > 0
    }

    pub(super) fn verdict(self, chain: String, faults: u64) -> ChainVerdict {
        let last = self.head.unwrap_or(ChainHead { seq: 0, hash: Digest::ZERO });
        ChainVerdict {
            chain,
            records: self.records,
            removed: self.removed,
            last_seq: last.seq,
            last_hash: last.hash,
            times: self.times,
            heads: self.heads_held,
            signed_seq: self.signed_seq,
            faults,
        }
    }
}
