//! The audit records of an attempt.

use crate::{
    audit::record::{Event, Record},
    domain::{
        account::AccountName,
        clock::{Clock, Timestamp},
        refresh_state::Account,
        token::Token,
    },
    upstream::IssueError,
};

/// Returns the record of an issue at this moment of `clock`. Its times are by the wall clock. `skew_ms` is how
/// far the upstream's clock was ahead, in milliseconds. The event says whether the token is a new one.
pub(super) fn issued(
    event: Event,
    account: &Account,
    token: &Token,
    skew_ms: Option<i64>,
    clock: &Clock,
) -> Record {
    let now = clock.wall();
    let expires_at = now + (token.expires_at - clock.now());
    let mut record = Record::new(now, event)
        .account(&account.name)
        .token(token.generation, &token.fingerprint)
        .with("client_id", account.client_id.as_str())
        .with("expires_at", expires_at.to_rfc3339());
    if let Some(skew) = skew_ms {
        record = record.with("upstream_clock_ahead_ms", skew.to_string());
    }
    if let Some(ip) = &token.allowed_ip {
        record = record.with("allowed_ip", ip);
    }
    record
}

/// Returns the record of a failed issue.
pub(super) fn failed(account: &AccountName, error: &IssueError, now: Timestamp) -> Record {
    let record = Record::new(now, Event::IssueFailed)
        .account(account)
        .outcome(error.class.outcome(), error.class.as_str())
        .with("message", &error.message);
    match &error.code {
        Some(code) => record.with("upstream_code", code),
        None => record,
    }
}
