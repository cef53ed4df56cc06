//! The outcome of a verification.

use std::collections::HashMap;

use serde::Serialize;

use super::fault::{Fault, Finding};
use crate::{audit::chain::Digest, domain::clock::Timestamp};

/// Most findings that a report lists; the rest are only counted.
pub(super) const MAX_LISTED_FINDINGS: usize = 1_000;

/// The outcome of a verification.
#[derive(Debug)]
#[must_use]
pub struct VerificationReport {
    /// Whether signatures were checked.
    pub signatures_checked: bool,
    /// The first thousand faults that were found, sorted by chain and number.
    pub findings: Vec<Finding>,
    /// Number of all faults.
    pub faults: u64,
    /// Observations for people that are not faults, such as what could not be checked.
    pub notices: Vec<String>,
    /// The chains by name.
    pub chains: Vec<ChainReport>,
}

impl VerificationReport {
    /// Whether no fault was found.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.faults == 0
    }

    /// Returns the number of records that were shown.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.chains.iter().map(|chain| chain.records).sum()
    }
}

/// The outcome of a verification for one chain. `audit verify --json` prints it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct ChainReport {
    /// Name of the chain.
    pub chain: String,
    /// Number of its records that were shown.
    pub records: u64,
    /// Number of its records that retention removed.
    pub removed: i64,
    /// `seq` of its last record.
    pub last_seq: i64,
    /// Hash of its last record.
    pub last_hash: Digest,
    /// The earliest and the latest time of the records that were shown; `None` if there were none.
    pub times: Option<(Timestamp, Timestamp)>,
    /// Number of checkpoints that match their records.
    pub heads: u64,
    /// The last `seq` that a checkpoint covers; 0 if there is none.
    pub signed_seq: i64,
    /// Number of faults in this chain.
    pub faults: u64,
}

/// The faults that were found so far. Only the first [`MAX_LISTED_FINDINGS`] are kept.
#[derive(Debug, Default)]
pub(super) struct FindingList {
    pub(super) listed: Vec<Finding>,
    total: u64,
    by_chain: HashMap<String, u64>,
}

impl FindingList {
    pub(super) fn add(&mut self, chain: &str, fault: Fault) {
        self.total += 1;
        match self.by_chain.get_mut(chain) {
            Some(count) => *count += 1,
            None => drop(self.by_chain.insert(chain.to_owned(), 1)),
        }
        if self.listed.len() < MAX_LISTED_FINDINGS {
            self.listed.push(Finding { chain: chain.to_owned(), fault });
        }
    }

    pub(super) fn count_of(&self, chain: &str) -> u64 {
        self.by_chain.get(chain).copied().unwrap_or_default()
    }

    /// Returns the listed findings, sorted by chain and number, and the number of all faults.
    pub(super) fn into_sorted(mut self) -> (Vec<Finding>, u64) {
        self.listed.sort_by(|a, b| (&a.chain, a.fault.seq()).cmp(&(&b.chain, b.fault.seq())));
        (self.listed, self.total)
    }
}
