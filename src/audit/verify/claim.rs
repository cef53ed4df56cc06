//! What a verifier knows about a log before it sees the records.

use serde::{Deserialize, Serialize};

use crate::{
    audit::{
        chain::{ChainHead, ChainLink, Digest},
        timestamp_format,
    },
    domain::clock::Timestamp,
};

/// What the database, a journal or an export claims about a chain.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ChainClaim {
    /// Name of the chain.
    pub chain: String,
    /// The instance that wrote it.
    pub instance: String,
    /// When it was opened.
    #[serde(with = "timestamp_format")]
    pub started_at: Timestamp,
    /// The instance's previous chain.
    pub linked_chain: Option<String>,
    /// Hash of the last record of that chain; zeros if there was none.
    pub linked_hash: Digest,
    /// `seq` of the chain's last record, where it is known independently of the records.
    pub last_seq: Option<i64>,
    /// Hash of that record.
    pub last_hash: Option<Digest>,
    /// Which records may be missing, as `audit retire` noted when the chain's replica was lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retired: Option<String>,
}

impl ChainClaim {
    /// Returns the claim of a journal, which does not know a chain's end independently of the records.
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

    /// Returns the head that the chain's first record follows.
    #[must_use]
    pub fn root(&self) -> ChainHead {
        ChainHead { seq: 0, hash: self.linked_hash }
    }
}

/// How much of the log a verifier is shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Extent {
    /// The whole log: absent records and chains count as missing.
    Whole,
    /// The records that a replica's journal still retains: older records and chains, which were deleted,
    /// do not count as missing.
    Retained,
    /// The records that a filter selected. Each record is verified, and also its link to the previous
    /// record if that is present. Absent records are only counted.
    Partial,
}
