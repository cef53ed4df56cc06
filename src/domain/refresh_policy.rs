//! When an account may be issued for: the one rule, as pure functions.
//!
//! The rule is applied twice. The refresher plans with what its cache has, and the claim of a lease
//! decides again with the account's locked row, which may have changed meanwhile. Both call
//! [`RefreshPolicy::decide`] with an [`IssueView`].
//!
//! Jitter is derived from the account's name, not drawn: a number drawn anew at each planning would
//! shift the schedule, and all replicas must find the same moment.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use chrono::DateTime;

use crate::domain::{
    account::{AccountName, CredentialVersion},
    clock::{Timestamp, delta},
    refresh_state::{Account, FailureClass, RefreshState},
    token::{Generation, Token},
};

/// How far an account's advisory refresh may lie from [`RefreshPolicy::refresh_at`] on either side,
/// as a share of the token's life.
pub const JITTER: f64 = 0.05;
/// The last share of a token's life in which its refresh is mandatory.
const MANDATORY_SHARE: f64 = 0.10;
/// The longest time before a token's end at which its refresh becomes mandatory.
const MANDATORY_AT_MOST: Duration = Duration::from_mins(1);
/// The pause after the first failure that may pass by itself; it doubles with each further one.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_RETRY: Duration = Duration::from_mins(5);
/// The pause while the upstream refuses the address: long, since each attempt may count against the
/// account.
const EGRESS_RETRY: Duration = Duration::from_mins(15);

/// A moment that has always passed.
const AT_ONCE: Timestamp = DateTime::UNIX_EPOCH;

/// The settings that decide when to issue.
#[derive(Clone, Copy, Debug)]
pub struct RefreshPolicy {
    /// The share of a token's life after which it is replaced, 0 to 1.
    pub refresh_at: f64,
    /// The least time between the starts of two attempts for one account, across replicas.
    pub min_issue_interval: Duration,
}

/// The facts that decide whether an account may be issued for. All times are of the clock that `now`
/// is read from: the replica's when planning, the database's when claiming.
#[derive(Clone, Copy, Debug)]
pub struct IssueView<'a> {
    account: &'a Account,
    refresh: &'a RefreshState,
    /// When the replacement of the account's token is scheduled.
    scheduled_at: Timestamp,
    /// When the last outage of the upstream ended, as this replica saw it.
    outage_ended_at: Option<Timestamp>,
    /// Whether another token is stored than the one to be replaced.
    already_replaced: bool,
}

impl<'a> IssueView<'a> {
    /// Returns the view for planning, of an account as the cache has it. `scheduled_at` is
    /// [`RefreshPolicy::scheduled_at`] for its token.
    #[must_use]
    pub fn cached(
        account: &'a Account,
        refresh: &'a RefreshState,
        scheduled_at: Timestamp,
        outage_ended_at: Option<Timestamp>,
    ) -> Self {
        Self { account, refresh, scheduled_at, outage_ended_at, already_replaced: false }
    }

    /// Returns the view for a claim, of an account as its locked row has it. The claimant found its
    /// token to be due, so the schedule is not asked again: instead the stored generation must still
    /// be the one that the claimant wants to replace.
    #[must_use]
    pub fn locked(
        account: &'a Account,
        refresh: &'a RefreshState,
        replaces: Option<Generation>,
        outage_ended_at: Option<Timestamp>,
    ) -> Self {
        let already_replaced = refresh.stored_generation > replaces;
        Self { account, refresh, scheduled_at: AT_ONCE, outage_ended_at, already_replaced }
    }

    /// Returns whether the last failure was for an outage of the upstream that is over since.
    fn failed_in_ended_outage(&self, class: FailureClass) -> bool {
        let started = self.refresh.attempt_started_at;
        class.is_upstream_fault()
            && started.zip(self.outage_ended_at).is_some_and(|(started, ended)| started < ended)
    }
}

/// Whether an account may be issued for now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IssueDecision {
    /// A token may be issued now.
    Issue {
        /// The credential to issue with.
        credential_version: CredentialVersion,
        /// Whether the minimum issue interval is not over yet. A changed credential need not wait
        /// for its end, three times an hour.
        uses_interval_exception: bool,
    },
    /// Not before this moment.
    WaitUntil(Timestamp),
    /// Not until the account changes: it is disabled, has no usable credential, or another replica
    /// has replaced the token already.
    NotNeeded,
}

/// When an account may be issued for at the earliest, and how.
struct EarliestIssue {
    at: Timestamp,
    credential_version: CredentialVersion,
    /// The end of the minimum issue interval, which may be after `at`.
    interval_ends: Timestamp,
}

impl RefreshPolicy {
    /// Decides whether the account may be issued for at `now`. The same view never yields a later
    /// wait at a later `now`.
    #[must_use]
    pub fn decide(&self, view: &IssueView<'_>, now: Timestamp) -> IssueDecision {
        match self.earliest_issue(view) {
            None => IssueDecision::NotNeeded,
            Some(earliest) if earliest.at > now => IssueDecision::WaitUntil(earliest.at),
            Some(earliest) => IssueDecision::Issue {
                credential_version: earliest.credential_version,
                uses_interval_exception: earliest.interval_ends > now,
            },
        }
    }

    /// Returns the moment from which [`RefreshPolicy::decide`] permits the next issue, which may
    /// have passed; `None` while it is not needed. It does not depend on the present moment, so that
    /// planning an account twice gives it the same place in the queue.
    #[must_use]
    pub fn next_issue_at(&self, view: &IssueView<'_>) -> Option<Timestamp> {
        self.earliest_issue(view).map(|earliest| earliest.at)
    }

    fn earliest_issue(&self, view: &IssueView<'_>) -> Option<EarliestIssue> {
        let IssueView { account, refresh, .. } = view;
        if !account.enabled || view.already_replaced {
            return None;
        }
        let credential_version = account.usable_version(refresh)?;
        let asked = account.wants_reissue(refresh);
        let untried = credential_version == account.credential_version
            && refresh.attempt_version != Some(credential_version);
        let due = if asked || untried || refresh.token_may_be_revoked() {
            AT_ONCE
        } else {
            view.scheduled_at
        };
        let retry = refresh
            .current_failure(account.credential_version)
            .filter(|failure| !asked && !untried && !view.failed_in_ended_outage(failure.class))
            .and(refresh.next_attempt_at)
            .unwrap_or(AT_ONCE);
        let interval_ends = refresh
            .attempt_started_at
            .map_or(AT_ONCE, |started| started + delta(self.min_issue_interval));
        let interval = if untried {
            interval_ends.min(refresh.interval_exceptions.available_from())
        } else {
            interval_ends
        };
        let lease = refresh.lease_until.unwrap_or(AT_ONCE);
        let at = due.max(retry).max(interval).max(lease);
        Some(EarliestIssue { at, credential_version, interval_ends })
    }

    /// Returns when the replacement of `token` is scheduled: at [`RefreshPolicy::advisory_refresh_at`],
    /// or at once if there is no token.
    #[must_use]
    pub fn scheduled_at(&self, account: &AccountName, token: Option<&Token>) -> Timestamp {
        token.map_or(AT_ONCE, |token| self.advisory_refresh_at(account, token))
    }

    /// Returns when `token` is to be replaced, if nothing hinders: after [`RefreshPolicy::refresh_at`]
    /// of its life, ± 5 % of that life depending on the account's name.
    #[must_use]
    pub fn advisory_refresh_at(&self, account: &AccountName, token: &Token) -> Timestamp {
        token.at_share(self.refresh_at + (spread(account, "refresh") - 0.5) * 2.0 * JITTER)
    }

    /// Returns the moment from which the replacement of `token` cannot be put off: the last 10 % of
    /// its life, at most its last minute; at once if there is no token or it may have been revoked.
    #[must_use]
    pub fn mandatory_refresh_at(refresh: &RefreshState, token: Option<&Token>) -> Timestamp {
        token.filter(|_| !refresh.token_may_be_revoked()).map_or(AT_ONCE, |token| {
            let lead = token.life().mul_f64(MANDATORY_SHARE).min(MANDATORY_AT_MOST);
            token.expires_at - delta(lead)
        })
    }

    /// Returns the longest `min_ttl` that a caller is granted: what a token always has left before
    /// its replacement is due. A longer one would force an issue on everyone at each call.
    #[must_use]
    pub fn longest_min_ttl(&self, token: &Token) -> Duration {
        token.life().mul_f64((1.0 - self.refresh_at - JITTER).max(0.0))
    }

    /// Returns how long to wait after a failure of `class`, the `failures`-th in a row; `None` if
    /// nothing is to be tried until the credential changes.
    ///
    /// `asked` is the pause that the upstream asked for, and `cap` an upper bound of the broker's own
    /// pause.
    #[must_use]
    pub fn pause_after_failure(
        &self,
        account: &AccountName,
        class: FailureClass,
        failures: u32,
        asked: Option<Duration>,
        cap: Option<Duration>,
    ) -> Option<Duration> {
        match class {
            class if class.suspends() => None,
            FailureClass::EgressRejected => Some(self.egress_retry_pause(account)),
            _ => {
                let backoff = self.backoff(account, failures);
                let backoff = cap.map_or(backoff, |cap| backoff.min(cap));
                Some(asked.map_or(backoff, |asked| asked.max(backoff)))
            }
        }
    }

    /// Doubles from one second to five minutes, spread over the upper half of that by the account's
    /// name; never below the minimum issue interval.
    fn backoff(&self, account: &AccountName, failures: u32) -> Duration {
        let doubled =
            FIRST_RETRY.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST_RETRY);
        let jitter = spread(account, &failures.to_string());
        doubled.mul_f64(0.5 + jitter / 2.0).max(self.min_issue_interval)
    }

    fn egress_retry_pause(&self, account: &AccountName) -> Duration {
        EGRESS_RETRY.mul_f64(0.75 + spread(account, "probe") / 2.0).max(self.min_issue_interval)
    }
}

/// Returns a number in 0..1 that depends on `account` and `purpose` alone.
fn spread(account: &AccountName, purpose: &str) -> f64 {
    // DefaultHasher::new() has fixed keys: every replica of a version finds the same number.
    let mut hasher = DefaultHasher::new();
    (account.as_str(), purpose).hash(&mut hasher);
    #[expect(clippy::cast_precision_loss, reason = "53 bits are taken, and 53 bits are exact")]
    let number = (hasher.finish() >> 11) as f64 / (1_u64 << 53) as f64;
    number
}

#[cfg(test)]
mod tests;
