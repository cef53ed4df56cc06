//! Verification of the audit log: whether it is complete, in order and unmodified.
//!
//! A [`Verifier`] is given the claims, receipts and checkpoints first, then the records, and finally
//! returns a [`VerificationReport`]. It reads nothing itself, so that Postgres, journal files and exports
//! are verified by the same rules. Records should come in roughly the order of their numbers: those that
//! come before the records they follow are held in memory.

mod chain_verifier;
mod claim;
mod fault;
mod report;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    mem,
};

use chrono::TimeDelta;

use self::{
    chain_verifier::{ChainVerifier, RecordHashes},
    report::FindingList,
};
pub use self::{
    claim::{ChainClaim, Extent},
    fault::{Fault, Finding},
    report::{ChainReport, VerificationReport},
};
use super::{
    chain::{ChainHead, Digest, StoredEvent},
    checkpoint::{PruningReceipt, SignedCheckpoint},
    lost::LostRecords,
    unreadable::Unreadable,
};
use crate::{crypto::VerifyingKeys, domain::clock::Timestamp};

/// How many records of all chains together are held because an earlier record has not come: about 100
/// MiB. Beyond that, the records that they wait for count as missing.
const MAX_WAITING: usize = 1 << 20;

/// How long after its first record the first signed head of a chain may come at the latest. A broker stores one
/// within seconds.
const SIGNED_WITHIN: TimeDelta = TimeDelta::minutes(20);

/// Verifies a log.
pub struct Verifier {
    extent: Extent,
    keys: Option<VerifyingKeys>,
    /// The chains by name.
    chains: HashMap<String, ChainVerifier>,
    /// How many records all chains hold together.
    waiting: usize,
    /// From how many waiting records on some of them are released.
    max_waiting: usize,
    /// How many records were shown.
    shown: u64,
    /// Until when records must be covered by a signed head; `None` if they need not be.
    signed_until: Option<Timestamp>,
    findings: FindingList,
    /// Up to which record an instance reported to have written a chain: the chain, the instance and the number.
    reported_ends: Vec<(String, String, i64)>,
}

impl Verifier {
    /// Returns a verifier that is shown the part `extent` of a log. Without `keys`, signatures are not
    /// checked, and the report says so.
    #[must_use]
    pub fn new(extent: Extent, keys: Option<VerifyingKeys>) -> Self {
        Self {
            extent,
            keys,
            chains: HashMap::new(),
            waiting: 0,
            max_waiting: MAX_WAITING,
            shown: 0,
            signed_until: None,
            findings: FindingList::default(),
            reported_ends: Vec::new(),
        }
    }

    /// Demands that each chain whose last record was written long enough before `now` has a signed head, or that a
    /// chain which has one follows it. Whoever can insert records, and does not have the keyring, can make up a
    /// whole chain, but cannot sign it. Without keys, or for a part of a log, this has no effect.
    pub fn require_signed_heads(&mut self, now: Timestamp) {
        self.signed_until = Some(now - SIGNED_WITHIN);
    }

    /// Adds what is claimed about a chain. The first record to be shown follows `root`.
    pub fn add_chain(&mut self, claim: ChainClaim, root: ChainHead) {
        let chain = self.chains.entry(claim.chain.clone()).or_default();
        chain.set_claim(claim, root);
    }

    /// Adds a receipt of records that retention removed.
    pub fn add_receipt(&mut self, receipt: PruningReceipt) {
        let (first, last) = (receipt.first_seq, receipt.last_seq);
        if !is_valid_seq(first) || !is_valid_seq(last) || last < first {
            return self.findings.add(&receipt.chain, Fault::InvalidRange { first, last });
        }
        match self.keys.as_ref().map_or(Ok(()), |keys| receipt.verify(keys)) {
            Ok(()) => self.chains.entry(receipt.chain.clone()).or_default().add_receipt(receipt),
            Err(error) => {
                self.findings.add(&receipt.chain, Fault::InvalidReceipt { first, last, error });
            }
        }
    }

    /// Adds a checkpoint, after checking its signature if there are keys.
    pub fn add_checkpoint(&mut self, checkpoint: &SignedCheckpoint) {
        match self.keys.as_ref().map_or(Ok(()), |keys| checkpoint.verify(keys)) {
            Ok(()) => self.add_trusted_head(&checkpoint.chain, checkpoint.head()),
            Err(error) => {
                let fault = Fault::InvalidCheckpoint { seq: checkpoint.seq, error };
                self.findings.add(&checkpoint.chain, fault);
            }
        }
    }

    /// Adds a head that is trusted without a signature, such as one from the command line.
    pub fn add_trusted_head(&mut self, chain: &str, head: ChainHead) {
        if !is_valid_seq(head.seq) {
            return self.findings.add(chain, Fault::InvalidNumber { seq: head.seq });
        }
        let chain_verifier = self.chains.entry(chain.to_owned()).or_default();
        if let Err(fault) = chain_verifier.add_trusted_head(head) {
            self.findings.add(chain, fault);
        }
    }

    /// Adds what `instance` reported: that it has written `chain` up to record `seq`. Later records may be there too.
    pub fn add_reported_end(&mut self, chain: &str, instance: &str, seq: i64) {
        self.reported_ends.push((chain.to_owned(), instance.to_owned(), seq));
    }

    /// Adds the finding that a journal's last segment ends in records that do not follow record `last`.
    /// `location` describes for people where these are.
    pub fn add_torn_tail(&mut self, chain: &str, last: i64, location: String) {
        self.findings.add(chain, Fault::TornTail { location, last });
    }

    /// Adds a row that cannot be decoded. If it is a record whose hashes can be read, the chain is followed
    /// through it.
    pub fn add_unreadable(&mut self, row: &Unreadable) {
        let Unreadable { table, chain, seq, why, .. } = row;
        let fault = Fault::Unreadable { seq: *seq, place: table.clone(), why: why.clone() };
        self.findings.add(chain, fault);
        if let Some((prev_hash, hash)) = row.hashes().filter(|_| is_valid_seq(*seq)) {
            let record = RecordHashes { prev_hash, hash, hash_matches: false };
            self.follow(chain, *seq, None, record);
        }
    }

    /// Adds a fault of a file, which belongs to no chain. `why` names the file and the place.
    pub fn add_unreadable_line(&mut self, why: String) {
        self.findings.add("", Fault::UnreadableLine { why });
    }

    /// Adds the finding that a chain cannot be read any further.
    pub fn add_unreadable_rest(&mut self, chain: &str, after: i64, why: String) {
        let place = "the journal".to_owned();
        self.findings.add(chain, Fault::Unreadable { seq: after.saturating_add(1), place, why });
    }

    /// Verifies a record.
    pub fn add_record(&mut self, event: &StoredEvent) {
        self.add_hashed_record(event, event.computed_hash() == event.hash);
    }

    /// Verifies a record whose hash was computed already; `hash_matches` is the outcome.
    pub fn add_hashed_record(&mut self, event: &StoredEvent, hash_matches: bool) {
        if !is_valid_seq(event.seq) {
            return self.findings.add(&event.chain, Fault::InvalidNumber { seq: event.seq });
        }
        if !hash_matches {
            self.findings.add(&event.chain, Fault::Altered { seq: event.seq });
        }
        if let Some(lost) = LostRecords::of(event) {
            self.add_reported_end(&lost.chain, &event.instance, lost.last);
        }
        let (prev_hash, hash) = (event.prev_hash, event.hash);
        let record = RecordHashes { prev_hash, hash, hash_matches };
        self.follow(&event.chain, event.seq, Some(event.at), record);
    }

    /// Shows a record to the verifier of its chain.
    fn follow(&mut self, name: &str, seq: i64, at: Option<Timestamp>, record: RecordHashes) {
        // Chains are few and records many: the name is copied for the first record of a chain only.
        let chain = if self.chains.contains_key(name) {
            self.chains.get_mut(name)
        } else {
            Some(self.chains.entry(name.to_owned()).or_default())
        };
        let Some(chain) = chain else { return };
        let before = chain.waiting();
        chain.add_record(seq, at, record, self.extent, &mut |fault| {
            self.findings.add(name, fault);
        });
        self.shown += 1;
        if before == 0 {
            chain.set_waiting_since(self.shown);
        }
        self.waiting = self.waiting + chain.waiting() - before;
        if self.waiting >= self.max_waiting {
            self.release_waiting();
        }
    }

    /// Releases the earlier half of the waiting records of chains, in the order in which they began to wait, until
    /// not more than half of the limit wait: so that the cost of finding them is small beside that of reading as
    /// many further ones. The records that they wait for count as missing. Records that come in nearly the right
    /// order wait only for a moment, so those of made-up chains are released before them.
    fn release_waiting(&mut self) {
        let mut waiting: Vec<_> =
            self.chains.iter_mut().filter(|(_, chain)| chain.waiting() > 0).collect();
        waiting.sort_unstable_by_key(|(_, chain)| chain.waiting_since());
        for (name, chain) in waiting {
            self.waiting -= chain.waiting();
            chain.release_half(self.extent, &mut |fault| self.findings.add(name, fault));
            chain.set_waiting_since(self.shown);
            self.waiting += chain.waiting();
            if self.waiting <= self.max_waiting / 2 {
                return;
            }
        }
    }

    /// Ends the verification and returns its outcome.
    pub fn finish(mut self) -> VerificationReport {
        for (name, chain) in &mut self.chains {
            chain.finish(self.extent, &mut |fault| self.findings.add(name, fault));
        }
        if self.extent == Extent::Whole {
            self.compare_reported_ends();
        }
        let mut notices = self.notices_on_chains();
        if self.extent != Extent::Partial {
            self.check_links(&mut notices);
        }
        if let Some(until) = self.signed_until
            && self.keys.is_some()
            && self.extent == Extent::Whole
        {
            self.check_signed(until);
        }
        let signatures_checked = self.keys.is_some();
        if !signatures_checked {
            notices.push("signatures were not checked: there are no keys to check with".into());
        }
        if self.extent == Extent::Partial {
            let absent = self.chains.values().map(ChainVerifier::absent);
            let absent = absent.fold(0, u64::saturating_add);
            notices.push(format!(
                "this is a part of the log: missing records cannot be detected ({absent} records \
                 between those that are present are absent)"
            ));
        }
        let chains = self.chains.into_iter().map(|(name, chain)| {
            let faults = self.findings.count_of(&name);
            chain.into_report(name, faults)
        });
        let mut chains: Vec<_> = chains.collect();
        chains.sort_by(|a, b| a.chain.cmp(&b.chain));
        let (findings, faults) = self.findings.into_sorted();
        VerificationReport { signatures_checked, findings, faults, notices, chains }
    }

    /// Finds the chains that end before a record that their instance has reported. Of a retired chain, it is known
    /// already that records may be missing.
    fn compare_reported_ends(&mut self) {
        let mut furthest = BTreeMap::<String, (String, i64)>::new();
        for (chain, instance, seq) in mem::take(&mut self.reported_ends) {
            let known = furthest.entry(chain).or_default();
            if seq > known.1 {
                *known = (instance, seq);
            }
        }
        for (name, (instance, reported)) in furthest {
            let chain = self.chains.get(&name);
            let retired =
                chain.and_then(ChainVerifier::claim).is_some_and(|it| it.retired.is_some());
            let last = chain.and_then(ChainVerifier::last_seq).unwrap_or_default();
            if !retired && last < reported {
                let fault = Fault::EndsBeforeReport { last, reported, instance };
                self.findings.add(&name, fault);
            }
        }
    }

    /// Chain names in order. They begin with the number of the start, so that the chains of an instance
    /// sort in the order in which they were opened.
    fn chain_names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.chains.keys().cloned().collect();
        names.sort_unstable();
        names
    }

    fn notices_on_chains(&self) -> Vec<String> {
        let mut notices = Vec::new();
        for name in self.chain_names() {
            let chain = &self.chains[&name];
            if chain.unchecked_heads() > 0 {
                notices.push(format!(
                    "chain {name}: {} signed heads could not be checked, since their records are not \
                     present",
                    chain.unchecked_heads()
                ));
            }
            let retired = chain.claim().and_then(|claim| claim.retired.as_ref());
            if let Some(what) = retired.filter(|_| self.extent != Extent::Partial) {
                notices.push(format!("chain {name} was retired: {what}"));
            }
        }
        notices
    }

    /// Checks that each chain begins where its predecessor ended.
    fn check_links(&mut self, notices: &mut Vec<String>) {
        // Empty chains are left out: their last hash is the one that they claim to begin with, which
        // proves nothing.
        let ends: HashSet<_> =
            self.chains.values().filter_map(ChainVerifier::last_record_hash).collect();
        let mut successors = BTreeMap::<String, Vec<String>>::new();
        for name in self.chain_names() {
            match self.check_link(&name, &ends) {
                Link::None => {}
                Link::Intact { predecessor } => {
                    successors.entry(predecessor).or_default().push(name);
                }
                Link::NotDeliveredYet { predecessor } => notices.push(format!(
                    "chain {predecessor} is not delivered to its end: {name}, which follows it, \
                     has no record yet"
                )),
                Link::Broken { chain, fault } => self.findings.add(&chain, fault),
            }
        }
        for (predecessor, successors) in successors {
            if successors.len() > 1 {
                notices.push(format!(
                    "the chains {} all follow {predecessor}: its state directory was copied",
                    successors.join(", ")
                ));
            }
        }
    }

    /// Checks that each chain that ended before `until` is covered by a signed head.
    fn check_signed(&mut self, until: Timestamp) {
        let mut vouched_for = HashSet::new();
        // A chain comes after its predecessor in the order of names.
        for name in self.chain_names().into_iter().rev() {
            let chain = &self.chains[&name];
            if chain.is_signed() || vouched_for.contains(&name) {
                let claim = chain.claim();
                let linked = claim.and_then(|it| Some((it.linked_chain.clone()?, it.linked_hash)));
                if let Some((predecessor, hash)) = linked
                    && chain.last_record_hash().is_some()
                    && self.chains.get(&predecessor).and_then(ChainVerifier::last_hash)
                        == Some(hash)
                {
                    vouched_for.insert(predecessor);
                }
            } else if chain.last_time().is_some_and(|at| !is_recent(at, until)) {
                self.findings.add(&name, Fault::Unsigned);
            }
        }
    }

    /// Checks the link of chain `name` to its predecessor. `ends` are the last hashes of all chains that
    /// have records.
    fn check_link(&self, name: &str, ends: &HashSet<Digest>) -> Link {
        let broken = |chain: &str, fault| Link::Broken { chain: chain.to_owned(), fault };
        let chain = &self.chains[name];
        let Some(claim) = chain.claim() else {
            return match self.extent {
                Extent::Whole if chain.is_present() => broken(name, Fault::ChainRowMissing),
                Extent::Whole => broken(name, Fault::ChainAbsent),
                _ => Link::None,
            };
        };
        let predecessor = match &claim.linked_chain {
            Some(predecessor) => predecessor,
            None if claim.linked_hash == Digest::ZERO => return Link::None,
            None => return broken(name, Fault::PredecessorUnnamed),
        };
        let found = self.chains.get(predecessor);
        match found.filter(|found| found.is_present() && **predecessor < *name) {
            Some(found) if found.last_hash() == Some(claim.linked_hash) => {
                Link::Intact { predecessor: predecessor.clone() }
            }
            // Chains are delivered one after the other.
            Some(_) if chain.last_seq() == Some(0) && claim.last_seq == Some(0) => {
                Link::NotDeliveredYet { predecessor: predecessor.clone() }
            }
            Some(found) => {
                let last = found.last_seq().unwrap_or_default();
                let successor = name.to_owned();
                broken(predecessor, Fault::PredecessorEndMismatch { last, successor })
            }
            // A chain that stayed empty may never have reached Postgres.
            None if claim.linked_hash == Digest::ZERO
                || ends.contains(&claim.linked_hash)
                || self.extent == Extent::Retained =>
            {
                Link::None
            }
            None => broken(predecessor, Fault::PredecessorMissing { successor: name.to_owned() }),
        }
    }
}

/// State of a chain's link to its predecessor.
enum Link {
    /// There is no predecessor to compare with.
    None,
    /// The chain begins where its predecessor ended.
    Intact { predecessor: String },
    /// The predecessor's last records may still be delivered, since this chain has none yet.
    NotDeliveredYet { predecessor: String },
    /// The link does not hold; the fault is attributed to `chain`.
    Broken { chain: String, fault: Fault },
}

/// Whether a record of the time `at` may not be covered by a signed head yet, where older ones than `until` must be.
/// A time in the future could be renewed for ever by nobody, so it does not count as recent.
fn is_recent(at: Timestamp, until: Timestamp) -> bool {
    (until..=until + SIGNED_WITHIN * 2).contains(&at)
}

/// Whether a record can have the number `seq`. The input is not trusted and may contain any number.
pub(super) fn is_valid_seq(seq: i64) -> bool {
    (1..i64::MAX).contains(&seq)
}

#[cfg(test)]
mod tests;
