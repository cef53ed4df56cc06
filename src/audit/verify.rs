//! The proof of the audit log: whether it is what was written, whole and in order.
//!
//! A [`Verifier`] is told what is claimed of the chains, then shown the records in any order that is
//! nearly theirs, and says at the end what does not hold. It reads nothing itself, so that Postgres,
//! journal files and exports are proven by the same rules. [`walk`] follows one chain.

mod fault;
mod walk;

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::{Deserialize, Serialize};

pub use self::fault::{Fault, Finding};
use self::walk::Walk;
use super::{
    chain::{ChainHead, ChainLink, Digest, StoredEvent},
    checkpoint::{PruningReceipt, SignedCheckpoint},
    timestamp_format,
};
use crate::{crypto::VerifyingKeys, domain::clock::Timestamp};

/// How many records may wait for those before them, over all chains: some 100 MiB. With more, what
/// has not come is missing.
const MOST_WAITING: usize = 1 << 20;
/// How many findings are told one by one.
const MOST_FINDINGS: usize = 1_000;

/// What is claimed of a chain by who keeps it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Claim {
    /// The chain.
    pub chain: String,
    /// Whose.
    pub instance: String,
    /// When it was opened.
    #[serde(with = "timestamp_format")]
    pub started_at: Timestamp,
    /// The instance's chain before it.
    pub linked_chain: Option<String>,
    /// The last hash of that one; zeros if there was none.
    pub linked_hash: Digest,
    /// The number of its last record, where that is known apart from the records.
    pub last_seq: Option<i64>,
    /// That record's hash.
    pub last_hash: Option<Digest>,
    /// What an admin said of it as its replica was lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retired: Option<String>,
}

impl Claim {
    /// What a journal says of a chain, of which it tells no end.
    #[must_use]
    pub fn of(link: &ChainLink) -> Self {
        Self {
            chain: link.chain.clone(),
            instance: link.instance.clone(),
            started_at: link.started_at,
            linked_chain: link.linked_chain.clone(),
            linked_hash: link.linked_hash,
            last_seq: None,
            last_hash: None,
            retired: None,
        }
    }

    /// What its first record follows.
    #[must_use]
    pub fn root(&self) -> ChainHead {
        ChainHead { seq: 0, hash: self.linked_hash }
    }
}

/// How much of the log is shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Extent {
    /// All of it: what is not there is missing.
    Whole,
    /// What a replica still keeps: chains and records that were deleted from the front are not missed.
    Kept,
    /// What a filter let through: each record is proven, and that it follows the one before where
    /// that is there. What is not there is counted.
    Part,
}

/// Proves a log.
pub struct Verifier {
    extent: Extent,
    keys: Option<VerifyingKeys>,
    walks: HashMap<String, Walk>,
    waiting: usize,
    findings: Findings,
}

/// What a proof says.
#[derive(Debug)]
pub struct Verdict {
    /// Whether signatures were checked.
    pub signatures_checked: bool,
    /// What does not hold, by chain and number; the first thousand.
    pub findings: Vec<Finding>,
    /// How many there are in all.
    pub faults: u64,
    /// What holds and should be known.
    pub notices: Vec<String>,
    /// The chains, in the order of their names.
    pub chains: Vec<ChainVerdict>,
}

/// What a proof says of a chain.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct ChainVerdict {
    /// The chain.
    pub chain: String,
    /// How many of its records were seen.
    pub records: u64,
    /// How many retention removed.
    pub removed: i64,
    /// The last record that was seen.
    pub last_seq: i64,
    /// Its hash.
    pub last_hash: Digest,
    /// When its first and its last record were made, as far as they are there.
    pub times: Option<(Timestamp, Timestamp)>,
    /// How many signed heads of it hold.
    pub heads: u64,
    /// The last number that a signed head vouches for; 0 if none does.
    pub signed_seq: i64,
    /// How many things do not hold.
    pub faults: u64,
}

/// Faults that were found, bounded.
#[derive(Debug, Default)]
struct Findings {
    told: Vec<Finding>,
    all: u64,
    by_chain: HashMap<String, u64>,
}

impl Findings {
    fn add(&mut self, chain: &str, fault: Fault) {
        self.all += 1;
        match self.by_chain.get_mut(chain) {
            Some(count) => *count += 1,
            None => drop(self.by_chain.insert(chain.to_owned(), 1)),
        }
        if self.told.len() < MOST_FINDINGS {
            self.told.push(Finding { chain: chain.to_owned(), fault });
        }
    }
}

impl Verifier {
    /// A proof of that much of a log. Without `keys`, what is signed is taken as it is.
    #[must_use]
    pub fn new(extent: Extent, keys: Option<VerifyingKeys>) -> Self {
        let (walks, findings) = (HashMap::new(), Findings::default());
        Self { extent, keys, walks, waiting: 0, findings }
    }

    /// Tells of a chain whose first record that is there follows `root`.
    pub fn chain(&mut self, claim: Claim, root: ChainHead) {
        let walk = self.walks.entry(claim.chain.clone()).or_default();
        walk.claim(claim, root);
    }

    /// Tells of what retention removed.
    pub fn cut(&mut self, cut: PruningReceipt) {
        if !is_number(cut.first_seq) || !is_number(cut.last_seq) || cut.last_seq < cut.first_seq {
            return self
                .findings
                .add(&cut.chain, Fault::NoRun { first: cut.first_seq, last: cut.last_seq });
        }
        match self.keys.as_ref().map_or(Ok(()), |keys| cut.verify(keys)) {
            Ok(()) => self.walks.entry(cut.chain.clone()).or_default().cut(cut),
            Err(error) => {
                let fault = Fault::UnprovenCut { first: cut.first_seq, last: cut.last_seq, error };
                self.findings.add(&cut.chain, fault);
            }
        }
    }

    /// Tells of a head that was signed.
    pub fn head(&mut self, head: &SignedCheckpoint) {
        match self.keys.as_ref().map_or(Ok(()), |keys| head.verify(keys)) {
            Ok(()) => self.unsigned_head(&head.chain, head.head()),
            Err(error) => {
                self.findings.add(&head.chain, Fault::UnprovenHead { seq: head.seq, error });
            }
        }
    }

    /// Tells of a head that is vouched for otherwise.
    pub fn unsigned_head(&mut self, chain: &str, head: ChainHead) {
        if !is_number(head.seq) {
            return self.findings.add(chain, Fault::NoNumber { seq: head.seq });
        }
        let walk = self.walks.entry(chain.to_owned()).or_default();
        if let Err(fault) = walk.vouch(head) {
            self.findings.add(chain, fault);
        }
    }

    /// Tells that a journal's last segment ends in records that do not follow `last`.
    pub fn torn(&mut self, chain: &str, last: i64, place: String) {
        self.findings.add(chain, Fault::Torn { place, last });
    }

    /// Shows a record.
    pub fn record(&mut self, event: &StoredEvent) {
        self.hashed_record(event, event.computed_hash() == event.hash);
    }

    /// Shows a record of which it is known whether it has the hash that it should have.
    pub fn hashed_record(&mut self, event: &StoredEvent, sound: bool) {
        if !is_number(event.seq) {
            return self.findings.add(&event.chain, Fault::NoNumber { seq: event.seq });
        }
        if !sound {
            self.findings.add(&event.chain, Fault::Altered { seq: event.seq });
        }
        // Chains are few and records many: only the first record of a chain makes a name.
        let walk = if self.walks.contains_key(&event.chain) {
            self.walks.get_mut(&event.chain)
        } else {
            Some(self.walks.entry(event.chain.clone()).or_default())
        };
        let Some(walk) = walk else { return };
        let before = walk.waiting();
        walk.record(event, sound, self.extent, &mut |fault| self.findings.add(&event.chain, fault));
        self.waiting = self.waiting + walk.waiting() - before;
        if self.waiting >= MOST_WAITING {
            self.give_up_waiting();
        }
    }

    /// Goes on with what is there in the chain that waits with the most.
    fn give_up_waiting(&mut self) {
        let most = self.walks.iter_mut().max_by_key(|(_, walk)| walk.waiting());
        if let Some((chain, walk)) = most {
            self.waiting -= walk.waiting();
            walk.drain_half(self.extent, &mut |fault| self.findings.add(chain, fault));
            self.waiting += walk.waiting();
        }
    }

    /// Says what holds.
    #[must_use]
    pub fn finish(mut self) -> Verdict {
        for (chain, walk) in &mut self.walks {
            walk.finish(self.extent, &mut |fault| self.findings.add(chain, fault));
        }
        let mut notices = Vec::new();
        self.follow_links(&mut notices);
        let signatures_checked = self.keys.is_some();
        if !signatures_checked {
            notices.push("signatures were not checked: there are no keys to check with".into());
        }
        if self.extent == Extent::Part {
            let absent = self.walks.values().map(Walk::absent).fold(0, u64::saturating_add);
            notices.push(format!(
                "this is a part of the log: that nothing is missing cannot be proven of it ({absent} \
                 records between those that are there are not there)"
            ));
        }
        let Findings { told: mut findings, all: faults, by_chain } = self.findings;
        findings.sort_by(|a, b| (&a.chain, a.fault.seq()).cmp(&(&b.chain, b.fault.seq())));
        let mut chains: Vec<_> = self
            .walks
            .into_iter()
            .map(|(chain, walk)| {
                let faults = by_chain.get(&chain).copied().unwrap_or_default();
                walk.verdict(chain, faults)
            })
            .collect();
        chains.sort_by(|a, b| a.chain.cmp(&b.chain));
        Verdict { signatures_checked, findings, faults, notices, chains }
    }

    /// Whether each chain begins where the one before it ended.
    fn follow_links(&mut self, notices: &mut Vec<String>) {
        let mut names: Vec<_> = self.walks.keys().cloned().collect();
        names.sort_unstable();
        // An empty chain ends as it says that it began, which proves nothing.
        let ends: HashSet<_> = self.walks.values().filter_map(Walk::end).collect();
        let mut successors = BTreeMap::<String, Vec<String>>::new();
        for chain in names {
            let walk = &self.walks[&chain];
            if walk.unchecked() > 0 {
                notices.push(format!(
                    "chain {chain}: {} signed heads are of records that are not here, and were \
                     compared with nothing",
                    walk.unchecked()
                ));
            }
            if self.extent == Extent::Part {
                continue;
            }
            let Some(claim) = walk.claimed() else {
                if self.extent == Extent::Whole {
                    let fault = if walk.is_here() { Fault::Unknown } else { Fault::NotHere };
                    self.findings.add(&chain, fault);
                }
                continue;
            };
            if let Some(what) = &claim.retired {
                notices.push(format!("chain {chain} was retired: {what}"));
            }
            let before = match &claim.linked_chain {
                Some(before) => before,
                None if claim.linked_hash == Digest::ZERO => continue,
                None => {
                    self.findings.add(&chain, Fault::NoBefore);
                    continue;
                }
            };
            // Names sort as chains were opened.
            let known = self.walks.get(before).filter(|walk| walk.is_here() && *before < chain);
            match known {
                Some(known) if known.last_hash() == Some(claim.linked_hash) => {
                    successors.entry(before.clone()).or_default().push(chain);
                }
                // Chains are delivered one after the other.
                Some(_) if walk.last() == Some(0) && claim.last_seq == Some(0) => {
                    notices.push(format!(
                        "chain {before} is not delivered to its end: {chain}, which follows it, \
                         has no record yet"
                    ));
                }
                Some(known) => {
                    let last = known.last().unwrap_or_default();
                    self.findings.add(before, Fault::EndsOtherwise { last, successor: chain });
                }
                // One that was empty may never have been told of.
                None if claim.linked_hash == Digest::ZERO
                    || ends.contains(&claim.linked_hash)
                    || self.extent == Extent::Kept => {}
                None => self.findings.add(before, Fault::ChainMissing { successor: chain }),
            }
        }
        for (before, successors) in successors {
            if successors.len() > 1 {
                notices.push(format!(
                    "the chains {} all follow {before}: its state directory was copied",
                    successors.join(", ")
                ));
            }
        }
    }
}

/// Whether a record can have that number. What is to be proven may say anything.
fn is_number(seq: i64) -> bool {
    (1..i64::MAX).contains(&seq)
}

impl Verdict {
    /// Whether all holds.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.faults == 0
    }

    /// How many records were seen.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.chains.iter().map(|chain| chain.records).sum()
    }
}

#[cfg(test)]
mod tests;
