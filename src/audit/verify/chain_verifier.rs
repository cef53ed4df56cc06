//! Verifies one chain, record by record.

use std::{collections::BTreeMap, mem};

use super::{
    claim::{ChainClaim, Extent},
    fault::Fault,
    report::ChainReport,
};
use crate::{
    audit::{
        chain::{ChainHead, Digest},
        checkpoint::PruningReceipt,
    },
    domain::clock::Timestamp,
};

/// A callback that receives each fault.
pub(super) type OnFault<'a> = &'a mut dyn FnMut(Fault);

/// State of the verification of one chain.
#[derive(Default)]
pub(super) struct ChainVerifier {
    claim: Option<ChainClaim>,
    /// By the number of the first removed record.
    receipts: BTreeMap<i64, PruningReceipt>,
    /// Trusted heads, by number, that were not compared with their records yet.
    trusted_heads: BTreeMap<i64, Digest>,
    /// The last record up to which the chain was followed; `None` while the start is not known.
    head: Option<ChainHead>,
    /// Records that came before a record that they follow.
    waiting: BTreeMap<i64, RecordHashes>,
    /// How many records of all chains had been shown when the first of them came.
    waiting_since: u64,
    records: u64,
    removed: i64,
    /// How many records between others are absent in a partial log.
    absent: u64,
    times: Option<(Timestamp, Timestamp)>,
    matching_checkpoints: u64,
    signed_seq: i64,
}

/// The part of a record that its neighbours in the chain are compared with.
#[derive(Clone, Copy)]
pub(super) struct RecordHashes {
    pub(super) prev_hash: Digest,
    pub(super) hash: Digest,
    /// Whether `hash` is the hash of the record's content.
    pub(super) hash_matches: bool,
}

impl ChainVerifier {
    pub(super) fn set_claim(&mut self, claim: ChainClaim, root: ChainHead) {
        self.claim = Some(claim);
        self.head = Some(root);
    }

    pub(super) fn claim(&self) -> Option<&ChainClaim> {
        self.claim.as_ref()
    }

    /// Adds a receipt. Of two that begin with the same record, the longer one counts.
    pub(super) fn add_receipt(&mut self, receipt: PruningReceipt) {
        let known = self.receipts.get(&receipt.first_seq);
        if known.is_none_or(|known| known.last_seq < receipt.last_seq) {
            self.receipts.insert(receipt.first_seq, receipt);
        }
    }

    /// Adds a head that the record with its number must have.
    pub(super) fn add_trusted_head(&mut self, head: ChainHead) -> Result<(), Fault> {
        match self.trusted_heads.insert(head.seq, head.hash) {
            Some(other) if other != head.hash => Err(Fault::CheckpointMismatch { seq: head.seq }),
            _ => Ok(()),
        }
    }

    /// How many records wait for an earlier one.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// When the records began to wait, as a number of records of all chains that had been shown.
    pub(super) fn waiting_since(&self) -> u64 {
        self.waiting_since
    }

    pub(super) fn set_waiting_since(&mut self, shown: u64) {
        self.waiting_since = shown;
    }

    /// Whether a signature covers the chain up to some record: that of a checkpoint, or of a receipt.
    pub(super) fn is_signed(&self) -> bool {
        self.matching_checkpoints > 0 || self.removed > 0
    }

    /// The latest time of its records.
    pub(super) fn last_time(&self) -> Option<Timestamp> {
        self.times.map(|(_, last)| last)
    }

    /// How many records of a partial log are absent between others.
    pub(super) fn absent(&self) -> u64 {
        self.absent
    }

    /// `seq` of the last record.
    pub(super) fn last_seq(&self) -> Option<i64> {
        self.head.map(|head| head.seq)
    }

    /// Hash of the last record, or of the chain's root while it has none.
    pub(super) fn last_hash(&self) -> Option<Digest> {
        self.head.map(|head| head.hash)
    }

    /// Hash of the last record; `None` for an empty chain.
    pub(super) fn last_record_hash(&self) -> Option<Digest> {
        self.head.filter(|head| head.seq > 0).map(|head| head.hash)
    }

    pub(super) fn add_record(
        &mut self,
        seq: i64,
        at: Option<Timestamp>,
        record: RecordHashes,
        extent: Extent,
        on_fault: OnFault<'_>,
    ) {
        self.records += 1;
        if let Some(at) = at {
            let (first, last) = self.times.unwrap_or((at, at));
            self.times = Some((first.min(at), last.max(at)));
        }
        // Records and receipts are in one database and are restored together, so that a removed record
        // cannot have come back by a restore.
        if self.receipt_covering(seq).is_some() {
            return on_fault(Fault::PresentAfterPruning { seq });
        }
        match self.head {
            Some(head) if seq == head.seq + 1 && self.waiting.is_empty() => {
                self.follow_record(head, seq, record, on_fault);
            }
            Some(head) if extent == Extent::Partial => self.skip_absent(head, seq, record),
            None if extent == Extent::Partial => {
                self.head = Some(ChainHead { seq, hash: record.hash });
            }
            Some(head) if seq <= head.seq => on_fault(Fault::Duplicate { seq }),
            _ if self.waiting.insert(seq, record).is_some() => {
                on_fault(Fault::Duplicate { seq });
            }
            _ => self.advance(extent, on_fault),
        }
    }

    /// Moves the head to a later record of a partial log, and counts the absent records before it. A record
    /// that comes after a later one is verified only by its own hash.
    fn skip_absent(&mut self, head: ChainHead, seq: i64, record: RecordHashes) {
        if seq > head.seq {
            self.absent = self.absent.saturating_add(seq.abs_diff(head.seq) - 1);
            self.head = Some(ChainHead { seq, hash: record.hash });
        }
    }

    /// Follows waiting records and receipts as far as they go without a gap.
    fn advance(&mut self, extent: Extent, on_fault: OnFault<'_>) {
        while let Some(head) = self.head {
            let next = head.seq + 1;
            if let Some(record) = self.waiting.remove(&next) {
                self.follow_record(head, next, record, on_fault);
            } else if let Some(receipt) = self.receipt_covering(next).cloned() {
                self.follow_receipt(head, &receipt, extent, on_fault);
            } else {
                return;
            }
        }
    }

    fn follow_record(
        &mut self,
        head: ChainHead,
        seq: i64,
        record: RecordHashes,
        on_fault: OnFault<'_>,
    ) {
        // The `prev_hash` of an altered record is no evidence about the record before it.
        if record.prev_hash != head.hash && record.hash_matches {
            on_fault(Fault::Replaced { seq: head.seq });
        }
        self.move_to(ChainHead { seq, hash: record.hash }, on_fault);
    }

    /// Moves past a range that retention removed.
    fn follow_receipt(
        &mut self,
        head: ChainHead,
        receipt: &PruningReceipt,
        extent: Extent,
        on_fault: OnFault<'_>,
    ) {
        let begins_here = receipt.first_seq == head.seq + 1;
        if begins_here && receipt.prev_hash != head.hash && extent != Extent::Partial {
            on_fault(Fault::Replaced { seq: head.seq });
        }
        self.removed = self.removed.saturating_add(receipt.last_seq - head.seq);
        // Of the removed records, only the hash of the last one is known: other heads cannot be checked.
        self.trusted_heads = self.trusted_heads.split_off(&receipt.last_seq);
        let after = self.waiting.split_off(&(receipt.last_seq + 1));
        for seq in mem::replace(&mut self.waiting, after).into_keys() {
            on_fault(Fault::PresentAfterPruning { seq });
        }
        self.move_to(ChainHead { seq: receipt.last_seq, hash: receipt.hash }, on_fault);
    }

    /// Moves the head, and compares it with the checkpoint of the same number if there is one.
    fn move_to(&mut self, head: ChainHead, on_fault: OnFault<'_>) {
        self.head = Some(head);
        if let Some(trusted) = self.trusted_heads.remove(&head.seq) {
            if trusted == head.hash {
                self.matching_checkpoints += 1;
                self.signed_seq = head.seq;
            } else {
                on_fault(Fault::CheckpointMismatch { seq: head.seq });
            }
        }
    }

    /// The receipt whose range contains `seq`.
    fn receipt_covering(&self, seq: i64) -> Option<&PruningReceipt> {
        let (_, receipt) = self.receipts.range(..=seq).next_back()?;
        (receipt.last_seq >= seq).then_some(receipt)
    }

    /// Follows all waiting records. The absent records before them count as missing.
    pub(super) fn release(&mut self, extent: Extent, on_fault: OnFault<'_>) {
        self.advance(extent, on_fault);
        while let Some((&first, &record)) = self.waiting.first_key_value() {
            let before_record = ChainHead { seq: first - 1, hash: record.prev_hash };
            let before_receipt =
                self.before_next_receipt().filter(|before| before.seq < before_record.seq);
            self.skip_to(before_receipt.unwrap_or(before_record), extent, on_fault);
        }
    }

    /// Follows the earlier half of the waiting records. Since records come roughly in order, those that are
    /// still absent before that half are unlikely to come.
    pub(super) fn release_half(&mut self, extent: Extent, on_fault: OnFault<'_>) {
        let middle = self.waiting.keys().nth((self.waiting.len() / 2).max(1)).copied();
        let later = middle.map(|middle| self.waiting.split_off(&middle)).unwrap_or_default();
        self.release(extent, on_fault);
        self.waiting = later;
        self.advance(extent, on_fault);
    }

    /// Moves to `head`, whose record is absent. The records in between count as missing.
    fn skip_to(&mut self, head: ChainHead, extent: Extent, on_fault: OnFault<'_>) {
        if let Some(before) = self.head.replace(head) {
            self.count_missing(before.seq + 1, head.seq, extent, on_fault);
        }
        self.advance(extent, on_fault);
    }

    /// The record before the next removed range.
    fn before_next_receipt(&self) -> Option<ChainHead> {
        let from = self.head.map_or(i64::MIN, |head| head.seq + 1);
        let (first, receipt) = self.receipts.range(from..).next()?;
        Some(ChainHead { seq: first - 1, hash: receipt.prev_hash })
    }

    fn count_missing(&mut self, first: i64, last: i64, extent: Extent, on_fault: OnFault<'_>) {
        if extent == Extent::Partial {
            self.absent = self.absent.saturating_add(last.abs_diff(first) + 1);
        } else {
            on_fault(Fault::Missing { first, last });
        }
    }

    /// Follows the records that still wait, and compares the end with the claim and with trusted heads.
    pub(super) fn finish(&mut self, extent: Extent, on_fault: OnFault<'_>) {
        self.release(extent, on_fault);
        while let Some(before) = self.before_next_receipt() {
            self.skip_to(before, extent, on_fault);
        }
        if extent == Extent::Partial {
            return;
        }
        let Some(last) = self.head else { return };
        let claimed =
            self.claim.as_ref().and_then(|claim| Some((claim.last_seq?, claim.last_hash?)));
        if let Some((seq, hash)) = claimed {
            if last.seq < seq {
                on_fault(Fault::Missing { first: last.seq + 1, last: seq });
            } else if last.seq > seq {
                on_fault(Fault::BeyondDeliveredPosition { seq: seq + 1 });
            } else if last.hash != hash {
                on_fault(Fault::DeliveredHashMismatch { seq });
            }
        }
        if let Some((&head, _)) = self.trusted_heads.last_key_value()
            && head > last.seq
        {
            on_fault(Fault::EndsBeforeCheckpoint { last: last.seq, head });
        }
    }

    /// How many trusted heads could not be compared, since their records were not shown.
    pub(super) fn unchecked_heads(&self) -> usize {
        self.trusted_heads.len()
    }

    /// Whether a claim or a record of the chain was shown, and not only checkpoints.
    pub(super) fn is_present(&self) -> bool {
        self.claim.is_some() || self.records > 0
    }

    pub(super) fn into_report(self, chain: String, faults: u64) -> ChainReport {
        let last = self.head.unwrap_or(ChainHead { seq: 0, hash: Digest::ZERO });
        ChainReport {
            chain,
            records: self.records,
            removed: self.removed,
            last_seq: last.seq,
            last_hash: last.hash,
            times: self.times,
            heads: self.matching_checkpoints,
            signed_seq: self.signed_seq,
            faults,
        }
    }
}
