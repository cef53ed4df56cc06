//! Merges refusals of one kind into one record.

use std::{collections::BTreeSet, net::SocketAddr};

use crate::{audit::record::Record, domain::clock::Timestamp};

/// How many of the requested accounts the record names at most.
const MAX_LISTED_ACCOUNTS: usize = 16;

/// Merged refusals. The record keeps what they have in common.
#[derive(Debug)]
pub(super) struct AggregatedRefusal {
    record: Record,
    until: Timestamp,
    /// The first requested accounts.
    accounts: BTreeSet<String>,
    more_accounts: bool,
}

impl AggregatedRefusal {
    pub(super) fn new(first: Record) -> Self {
        let accounts = first.account.iter().cloned().collect();
        Self { until: first.at, record: first, accounts, more_accounts: false }
    }

    pub(super) fn add(&mut self, other: Record) {
        let record = &mut self.record;
        record.at = record.at.min(other.at);
        self.until = self.until.max(other.at);
        record.count = record.count.saturating_add(other.count);
        if record.peer != other.peer {
            record.peer = common_host(record.peer.take(), other.peer);
        }
        keep_if_equal(&mut record.caller_kind, other.caller_kind.as_ref());
        keep_if_equal(&mut record.account, other.account.as_ref());
        keep_if_equal(&mut record.generation, other.generation.as_ref());
        keep_if_equal(&mut record.token_fingerprint, other.token_fingerprint.as_ref());
        keep_if_equal(&mut record.trace_id, other.trace_id.as_ref());
        record.detail.retain(|key, value| other.detail.get(key) == Some(value));
        record.latency_us = None;
        if let Some(account) = other.account {
            if self.accounts.len() < MAX_LISTED_ACCOUNTS {
                self.accounts.insert(account);
            } else {
                self.more_accounts |= !self.accounts.contains(&account);
            }
        }
    }

    /// Returns the merged record; for a single refusal, its own record unchanged.
    pub(super) fn into_record(self) -> Record {
        let Self { record, until, accounts, more_accounts } = self;
        if record.count == 1 {
            return record;
        }
        let several = record.account.is_none() && !accounts.is_empty();
        let mut record = record.with("until", until.to_rfc3339());
        if several {
            let mut names = accounts.into_iter().collect::<Vec<_>>().join(",");
            if more_accounts {
                names.push_str(",…");
            }
            // Inserted directly, since the names were sanitized when they were requested.
            record.detail.insert("accounts".into(), names);
        }
        record
    }
}

fn keep_if_equal<T: PartialEq>(kept: &mut Option<T>, other: Option<&T>) {
    if kept.as_ref() != other {
        *kept = None;
    }
}

/// Returns the address of two peers, if only their ports differ.
fn common_host(one: Option<String>, other: Option<String>) -> Option<String> {
    let host = |peer: &str| {
        peer.parse::<SocketAddr>().map_or_else(|_| peer.to_owned(), |peer| peer.ip().to_string())
    };
    let one = host(&one?);
    (one == host(&other?)).then_some(one)
}
