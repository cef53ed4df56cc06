//! One record for many refusals of a kind.

use std::{collections::BTreeSet, net::SocketAddr};

use crate::{audit::record::Record, domain::clock::Timestamp};

/// How many of the accounts that were asked for the record names.
const MOST_ACCOUNTS: usize = 16;

/// Refusals that become one record: it keeps what they have in common.
#[derive(Debug)]
pub(super) struct AggregatedRefusal {
    record: Record,
    until: Timestamp,
    /// The first few of the accounts that were asked for.
    accounts: BTreeSet<String>,
    more_accounts: bool,
}

impl AggregatedRefusal {
    pub(super) fn new(first: Record) -> Self {
        let accounts = first.account.iter().cloned().collect();
        Self { until: first.at, record: first, accounts, more_accounts: false }
    }

    pub(super) fn join(&mut self, other: Record) {
        let record = &mut self.record;
        record.at = record.at.min(other.at);
        self.until = self.until.max(other.at);
        record.count = record.count.saturating_add(other.count);
        if record.peer != other.peer {
            record.peer = same_host(record.peer.take(), other.peer);
        }
        agree(&mut record.caller_kind, other.caller_kind.as_ref());
        agree(&mut record.account, other.account.as_ref());
        agree(&mut record.generation, other.generation.as_ref());
        agree(&mut record.token_fingerprint, other.token_fingerprint.as_ref());
        agree(&mut record.trace_id, other.trace_id.as_ref());
        record.detail.retain(|key, value| other.detail.get(key) == Some(value));
        record.latency_us = None;
        if let Some(account) = other.account {
            if self.accounts.len() < MOST_ACCOUNTS {
                self.accounts.insert(account);
            } else {
                self.more_accounts |= !self.accounts.contains(&account);
            }
        }
    }

    /// The record. Of a single refusal it is that refusal's own.
    pub(super) fn record(self) -> Record {
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
            // As they were cleaned when they were asked for.
            record.detail.insert("accounts".into(), names);
        }
        record
    }
}

fn agree<T: PartialEq>(kept: &mut Option<T>, other: Option<&T>) {
    if kept.as_ref() != other {
        *kept = None;
    }
}

/// What two peers have in common: their address, if the port alone differs.
fn same_host(one: Option<String>, other: Option<String>) -> Option<String> {
    let host = |peer: &str| {
        peer.parse::<SocketAddr>().map_or_else(|_| peer.to_owned(), |peer| peer.ip().to_string())
    };
    let one = host(&one?);
    (one == host(&other?)).then_some(one)
}
