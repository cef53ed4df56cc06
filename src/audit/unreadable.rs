//! Rows and lines of the audit log that cannot be decoded.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::chain::Digest;
use crate::domain::clock::Timestamp;

/// A row of the audit log that does not hold what it should. Whoever may write to the tables can insert such
/// a row, so readers report it with its place, and go on.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Unreadable {
    /// The table, such as `audit_events`.
    pub table: String,
    /// Name of the chain.
    pub chain: String,
    /// The number in the row; 0 in a row of `audit_chains`.
    pub seq: i64,
    /// The time of a record, if it can be read. Not part of exports.
    #[serde(skip)]
    pub at: Option<Timestamp>,
    /// What is wrong. Never quotes the row.
    pub why: String,
    /// `prev_hash` and `hash` of a record, if these can be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prev_hash: Option<Digest>,
    /// See `prev_hash`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<Digest>,
}

impl Unreadable {
    /// Returns the fault `why` of a row of `table`. It must not quote the row.
    #[must_use]
    pub fn row(table: &str, chain: &str, seq: i64, why: impl Into<String>) -> Box<Self> {
        let (table, chain) = (table.to_owned(), chain.to_owned());
        let why = why.into();
        Box::new(Self { table, chain, seq, at: None, why, prev_hash: None, hash: None })
    }

    /// Returns the hashes of a record, if both can be read.
    #[must_use]
    pub fn hashes(&self) -> Option<(Digest, Digest)> {
        self.prev_hash.zip(self.hash)
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, chain, seq, why, .. } = self;
        write!(f, "{table}: chain {chain:?}, record {seq} cannot be read: {why}")
    }
}
