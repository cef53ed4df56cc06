//! The rule that decides when a token may be issued for an account, as pure functions.
//!
//! The rule is applied twice. The refresher applies it to the cached account to schedule the next
//! attempt. The claim of a lease applies it again to the account's locked row, which may have changed
//! meanwhile. Both build an [`IssueView`] and call the same functions of [`RefreshPolicy`].
//!
//! Jitter is computed from the account's name instead of drawn at random. A random number would move
//! the schedule each time it is computed, and all replicas must compute the same time.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use chrono::DateTime;

use crate::domain::{
    account::{AccountName, CredentialVersion},
    attempt_priority::PriorityClass,
    clock::{Timestamp, delta},
    refresh_state::{Account, FailureClass, RefreshState},
    token::{Generation, Token},
};

/// The largest distance of an account's advisory refresh from [`RefreshPolicy::refresh_at`], before or
/// after it, as a share of the token's life.
pub const JITTER: f64 = 0.05;
/// The last share of a token's life in which its refresh is mandatory.
const MANDATORY_SHARE: f64 = 0.10;
/// The longest time before a token's end at which its refresh becomes mandatory.
const MANDATORY_AT_MOST: Duration = Duration::from_mins(1);
/// The pause after the first of several failures in a row; it doubles with each further one.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The upper bound of that pause.
const LONGEST_RETRY: Duration = Duration::from_mins(5);
/// The longest pause that the upstream can ask for with `Retry-After`.
pub const LONGEST_RETRY_AFTER: Duration = Duration::from_hours(1);
/// The pause after the first refusal of the account or the address; it doubles with each further one. It is
/// longer than [`FIRST_RETRY`], since each attempt may count towards a lock of the account.
const FIRST_EGRESS_RETRY: Duration = Duration::from_secs(30);
/// The upper bound of that pause.
const LONGEST_EGRESS_RETRY: Duration = Duration::from_mins(15);

/// A time in the past, for "at once".
const AT_ONCE: Timestamp = DateTime::UNIX_EPOCH;

/// The settings that decide when to issue.
#[derive(Clone, Copy, Debug)]
pub struct RefreshPolicy {
    /// The share of a token's life after which it is replaced, 0 to 1.
    pub refresh_at: f64,
    /// The least time between the starts of two attempts for one account, of all replicas together.
    pub min_issue_interval: Duration,
}

/// The facts that decide when a token may be issued for an account. All times are by the same clock as
/// `now`: the replica's for a cached account, the database's for a locked row.
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
    /// Returns the view of a cached account, for scheduling its next attempt. `scheduled_at` is
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

    /// Returns the view of an account's locked row, for a claim to replace the generation `replaces`.
    /// The claimant has checked the schedule already. Instead, the view compares generations: if a
    /// later one than `replaces` is stored, the token has been replaced.
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

    /// Returns the priority class of the account's next attempt. A failure in an outage that has ended says
    /// nothing about the account, and does not count.
    #[must_use]
    pub fn priority_class(&self) -> PriorityClass {
        let Self { account, refresh, .. } = self;
        let untried =
            account.usable_version(refresh).is_some_and(|version| self.is_untried(version));
        let failing = refresh.consecutive_failures > 0
            && !refresh
                .failure
                .as_ref()
                .is_some_and(|failure| self.failed_in_ended_outage(failure.class));
        if untried || account.wants_reissue(refresh) {
            PriorityClass::Untried
        } else if failing {
            PriorityClass::Failing
        } else if refresh.stored_generation.is_some() {
            PriorityClass::Proven
        } else {
            PriorityClass::Untried
        }
    }

    /// Returns whether `version` is the account's current credential and was not tried yet.
    fn is_untried(&self, version: CredentialVersion) -> bool {
        version == self.account.credential_version && self.refresh.attempt_version != Some(version)
    }

    /// Returns whether a last failure of `class` belongs to an outage of the upstream that has ended
    /// since.
    fn failed_in_ended_outage(&self, class: FailureClass) -> bool {
        let started = self.refresh.attempt_started_at;
        class.is_transient()
            && started.zip(self.outage_ended_at).is_some_and(|(started, ended)| started < ended)
    }
}

/// The decision whether a token may be issued for an account now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum IssueDecision {
    /// A token may be issued now.
    Issue {
        /// The credential to issue with.
        credential_version: CredentialVersion,
        /// Whether the minimum issue interval is not over yet. A changed credential may be tried
        /// earlier, up to [`IntervalExceptions::LIMIT`] times an hour.
        ///
        /// [`IntervalExceptions::LIMIT`]: super::refresh_state::IntervalExceptions::LIMIT
        uses_interval_exception: bool,
    },
    /// No token may be issued before this time.
    WaitUntil(Timestamp),
    /// No token is to be issued until the account changes: it is disabled, has no usable credential,
    /// or its token has been replaced already.
    NotNeeded,
}

/// The earliest time at which a token may be issued, and with which credential.
struct EarliestIssue {
    at: Timestamp,
    credential_version: CredentialVersion,
    /// The end of the minimum issue interval, which may be after `at`.
    interval_ends: Timestamp,
}

impl RefreshPolicy {
    /// Decides whether a token may be issued at `now`. For one view, [`IssueDecision::WaitUntil`] has the
    /// same time whatever `now` is.
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

    /// Returns the time from which [`RefreshPolicy::decide`] permits the next issue, which may have
    /// passed; `None` while no issue is needed. It does not depend on the present time, so an account
    /// that is scheduled twice keeps its position in the queue.
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
        let reissue_requested = account.wants_reissue(refresh);
        let untried = view.is_untried(credential_version);
        let due = if reissue_requested || untried || refresh.token_may_be_revoked() {
            AT_ONCE
        } else {
            view.scheduled_at
        };
        let retry = refresh
            .current_failure(account.credential_version)
            .filter(|_| !reissue_requested && !untried)
            .filter(|failure| !view.failed_in_ended_outage(failure.class))
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

    /// Returns when `token` should be replaced: after the share [`RefreshPolicy::refresh_at`] of its
    /// life, earlier or later by up to [`JITTER`] of its life, depending on the account's name.
    #[must_use]
    pub fn advisory_refresh_at(&self, account: &AccountName, token: &Token) -> Timestamp {
        token.at_share(self.refresh_at + (spread(account, "refresh") - 0.5) * 2.0 * JITTER)
    }

    /// Returns the time from which the replacement of `token` must not be delayed: the start of the last
    /// 10 % of its life, or of its last minute if that is later. It is in the past if there is no token
    /// or the token may have been revoked.
    #[must_use]
    pub fn mandatory_refresh_at(refresh: &RefreshState, token: Option<&Token>) -> Timestamp {
        token
            .filter(|_| !refresh.token_may_be_revoked())
            .map_or(AT_ONCE, Self::mandatory_window_starts_at)
    }

    /// Returns the start of the last 10 % of the token's life, or of its last minute if that is later.
    #[must_use]
    pub fn mandatory_window_starts_at(token: &Token) -> Timestamp {
        let lead = token.life().mul_f64(MANDATORY_SHARE).min(MANDATORY_AT_MOST);
        token.expires_at - delta(lead)
    }

    /// Returns the upper bound of a caller's `min_ttl`: the part of its life that a token certainly has
    /// left before its replacement is due. A longer one would cause an issue with each call.
    #[must_use]
    pub fn longest_min_ttl(&self, token: &Token) -> Duration {
        token.life().mul_f64((1.0 - self.refresh_at - JITTER).max(0.0))
    }

    /// Returns how long to wait after a failure of `class`, the `failures`-th in a row; `None` if no
    /// attempt may be made until the credential changes.
    ///
    /// `retry_after` is the pause that the upstream asked for, and `cap` an upper bound of the broker's
    /// own pause. `live_for` is how long the account's token is still live; `None` without a live token. No
    /// pause outlasts a live token while an attempt could still replace it in time: it is then at most half
    /// of the time that is left. So there are several attempts before the end, and few, since the time that
    /// is left halves with each.
    #[must_use]
    pub fn pause_after_failure(
        &self,
        account: &AccountName,
        class: FailureClass,
        failures: u32,
        retry_after: Option<Duration>,
        cap: Option<Duration>,
        live_for: Option<Duration>,
    ) -> Option<Duration> {
        if class.suspends() {
            return None;
        }
        let backoff = backoff(account, class, failures);
        let backoff = cap.map_or(backoff, |cap| backoff.min(cap)).max(self.min_issue_interval);
        let pause = retry_after.map_or(backoff, |asked| asked.max(backoff));
        let longest = live_for.and_then(|left| self.longest_pause_before_end(left));
        Some(longest.map_or(pause, |longest| pause.min(longest)))
    }

    /// Returns the longest pause after a failure, whatever the upstream asks for.
    #[must_use]
    pub fn longest_pause(&self) -> Duration {
        LONGEST_RETRY_AFTER.max(self.min_issue_interval)
    }

    /// Returns the longest pause that leaves time for an attempt before a token ends, which lives for `left`
    /// from now; `None` if no pause is short enough.
    fn longest_pause_before_end(&self, left: Duration) -> Option<Duration> {
        let shortest = self.min_issue_interval.max(FIRST_RETRY);
        (left > shortest).then(|| (left / 2).max(shortest))
    }
}

/// Returns a pause that doubles with each failure: from one second to five minutes, or from half a minute to
/// a quarter of an hour while the upstream refuses the account or the address. The account's name and the
/// number of failures spread it over the upper half of that.
fn backoff(account: &AccountName, class: FailureClass, failures: u32) -> Duration {
    let (first, longest) = match class {
        FailureClass::EgressRejected => (FIRST_EGRESS_RETRY, LONGEST_EGRESS_RETRY),
        _ => (FIRST_RETRY, LONGEST_RETRY),
    };
    let doubled = first.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(longest);
    let jitter = spread(account, &failures.to_string());
    doubled.mul_f64(0.5 + jitter / 2.0)
}

/// Returns a number in 0..1 that depends on `account` and `purpose` alone.
fn spread(account: &AccountName, purpose: &str) -> f64 {
    // DefaultHasher::new() has fixed keys, so all replicas of one release compute the same number.
    let mut hasher = DefaultHasher::new();
    (account.as_str(), purpose).hash(&mut hasher);
    #[expect(clippy::cast_precision_loss, reason = "53 bits are taken, and 53 bits are exact")]
    let number = (hasher.finish() >> 11) as f64 / (1_u64 << 53) as f64;
    number
}

#[cfg(test)]
mod tests;
