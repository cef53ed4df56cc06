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
/// The pause after the first failure of a new secret while the previous one goes on issuing, if the upstream
/// did not answer; it doubles with each further one.
const FIRST_NEW_SECRET_RETRY: Duration = Duration::from_secs(30);
/// That pause if the upstream answered, but not with a refusal of the secret that is known as one. No call
/// waits for the new secret, and a lock of the account would end the work of the previous one too.
const FIRST_NEW_SECRET_RETRY_AFTER_ANSWER: Duration = Duration::from_mins(5);
/// The upper bound of these pauses.
const LONGEST_NEW_SECRET_RETRY: Duration = Duration::from_hours(1);

/// How long after the end of a token that the upstream repeats it may give it again, which counts as ended then.
const LATE_REPEATS: Duration = Duration::from_secs(8);
/// The pause between attempts during this time. So there are at most five for one such token.
const LATE_REPEAT_PAUSE: Duration = Duration::from_secs(2);

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
    /// Until when the upstream gives the account's token again instead of a new one.
    repeats_until: Option<Timestamp>,
    /// When the last outage of the upstream ended, as this replica saw it.
    outage_ended_at: Option<Timestamp>,
    /// Whether another token is stored than the one to be replaced.
    already_replaced: bool,
    /// The one credential that may be used; `None` for any.
    credential: Option<CredentialVersion>,
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
        Self {
            account,
            refresh,
            scheduled_at,
            repeats_until: None,
            outage_ended_at,
            already_replaced: false,
            credential: None,
        }
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
        Self {
            account,
            refresh,
            scheduled_at: AT_ONCE,
            repeats_until: None,
            outage_ended_at,
            already_replaced,
            credential: None,
        }
    }

    /// Permits only the credential of this version: the one that the claimant has scheduled. The schedule of
    /// another one says nothing about it.
    #[must_use]
    pub fn for_credential(self, credential: Option<CredentialVersion>) -> Self {
        Self { credential, ..self }
    }

    /// Sets until when the upstream gives the account's token again instead of a new one:
    /// [`Token::repeats_until`].
    #[must_use]
    pub fn repeating_until(self, repeats_until: Option<Timestamp>) -> Self {
        Self { repeats_until, ..self }
    }

    /// Returns when the token is to be replaced. While the upstream repeats it, an attempt would be wasted.
    fn due(&self) -> Timestamp {
        if self.refresh.token_may_be_revoked() {
            return AT_ONCE;
        }
        self.repeats_until.map_or(self.scheduled_at, |until| until.max(self.scheduled_at))
    }

    /// Returns when the minimum issue interval ends. It does not outlast a token that the upstream repeats: an
    /// attempt that got the same token again was no issue. Since some upstreams repeat a token for a little longer
    /// than it lives, a few attempts just after its end are permitted too.
    fn interval_ends(&self, interval: Duration) -> Timestamp {
        let Some(started) = self.refresh.attempt_started_at else { return AT_ONCE };
        let ends = started + delta(interval);
        match self.repeats_until {
            Some(until) if started < until => ends.min(until),
            until if is_late_repeat(started, until) => ends.min(started + delta(LATE_REPEAT_PAUSE)),
            _ => ends,
        }
    }

    /// Returns the priority class of an attempt with the credential of this version. A failure in an outage
    /// that has ended says nothing about the account, and does not count.
    #[must_use]
    pub fn priority_class(&self, version: CredentialVersion) -> PriorityClass {
        let Self { account, refresh, .. } = self;
        let is_current = version == account.credential_version;
        let fallback = account.fallback_version(refresh);
        // The last failure of the previous credential is not stored. One that is still kept was not refused.
        let failure = refresh.failure.as_ref().filter(|_| fallback.is_none());
        let in_ended_outage = failure
            .map_or(fallback.is_some() && self.outage_ended_since_attempt(), |failure| {
                self.failed_in_ended_outage(failure.class)
            });
        let failing = refresh.consecutive_failures > 0 && !in_ended_outage;
        if self.is_untried(version) || account.wants_reissue(refresh) {
            PriorityClass::Untried
        } else if failing || is_current && fallback.is_some() {
            PriorityClass::Failing
        } else if refresh.stored_generation.is_some() {
            PriorityClass::Proven
        } else {
            PriorityClass::Untried
        }
    }

    /// Returns how often the credential of this version has failed in a row.
    #[must_use]
    pub fn failures(&self, version: CredentialVersion) -> u32 {
        let Self { account, refresh, .. } = self;
        let is_current = version == account.credential_version;
        if self.is_untried(version) {
            return 0;
        }
        if is_current && account.fallback_version(refresh).is_some() {
            return refresh.new_secret_failures(version);
        }
        refresh.consecutive_failures
    }

    /// Returns whether `version` is the account's current credential and was not tried yet. Since its last
    /// attempt, the previous one may have been used.
    fn is_untried(&self, version: CredentialVersion) -> bool {
        version == self.account.credential_version
            && self.refresh.attempt_version != Some(version)
            && self.refresh.current_failure(version).is_none()
    }

    /// Returns whether a last failure of `class` belongs to an outage of the upstream that has ended
    /// since.
    fn failed_in_ended_outage(&self, class: FailureClass) -> bool {
        class.is_transient() && self.outage_ended_since_attempt()
    }

    fn outage_ended_since_attempt(&self) -> bool {
        let started = self.refresh.attempt_started_at;
        started.zip(self.outage_ended_at).is_some_and(|(started, ended)| started < ended)
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
#[derive(Clone, Copy, Debug)]
pub struct EarliestIssue {
    /// The time, which may have passed. It does not depend on the present time, so an account that is
    /// scheduled twice keeps its position in the queue.
    pub at: Timestamp,
    /// The credential.
    pub credential_version: CredentialVersion,
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
    /// passed; `None` while no issue is needed.
    #[must_use]
    pub fn next_issue_at(&self, view: &IssueView<'_>) -> Option<Timestamp> {
        self.earliest_issue(view).map(|earliest| earliest.at)
    }

    /// Returns the next issue that [`RefreshPolicy::decide`] permits; `None` while no issue is needed.
    ///
    /// While a new secret has failed and the previous one is kept, the two have schedules of their own, which
    /// share only the minimum issue interval and the lease. The previous one replaces the token as if there had
    /// been no rotation. The new one is tried again after pauses of its own, so that an attempt which ends the
    /// rotation never takes the place of one that keeps a token alive.
    #[must_use]
    pub fn earliest_issue(&self, view: &IssueView<'_>) -> Option<EarliestIssue> {
        let IssueView { account, refresh, .. } = view;
        if !account.enabled || view.already_replaced {
            return None;
        }
        let fallback = account.fallback_version(refresh);
        let previous = fallback.map(|version| self.earliest_with_fallback(view, version));
        let current = account.usable_version(refresh).map(|version| match fallback {
            Some(_) => self.earliest_retry_beside_fallback(view, version),
            None => self.earliest_alone(view, version),
        });
        // At the same time, the one that is known to work is first.
        let is_permitted = |earliest: &EarliestIssue| {
            view.credential.is_none_or(|permitted| permitted == earliest.credential_version)
        };
        let candidates = [previous, current].into_iter().flatten().filter(is_permitted);
        candidates.min_by_key(|earliest| earliest.at)
    }

    /// The next issue with the current credential, where no other one can issue.
    fn earliest_alone(&self, view: &IssueView<'_>, version: CredentialVersion) -> EarliestIssue {
        let IssueView { account, refresh, .. } = view;
        let at_once = view.is_untried(version) || account.wants_reissue(refresh);
        let due = if at_once { AT_ONCE } else { view.due() };
        let retry = refresh
            .current_failure(version)
            .filter(|failure| !at_once && !view.failed_in_ended_outage(failure.class))
            .and(refresh.next_attempt_at);
        self.not_before(view, version, due, retry)
    }

    /// The next issue with the previous credential, while the current one cannot issue.
    fn earliest_with_fallback(
        &self,
        view: &IssueView<'_>,
        version: CredentialVersion,
    ) -> EarliestIssue {
        // A request for a new token is for the previous credential if the current one is not sealed.
        let at_once = view.account.wants_reissue(view.refresh);
        let due = if at_once { AT_ONCE } else { view.due() };
        let pauses = !at_once && !view.outage_ended_since_attempt();
        let retry = view.refresh.next_attempt_at.filter(|_| pauses);
        self.not_before(view, version, due, retry)
    }

    /// The next attempt with the current credential after it failed, while the previous one issues.
    fn earliest_retry_beside_fallback(
        &self,
        view: &IssueView<'_>,
        version: CredentialVersion,
    ) -> EarliestIssue {
        self.not_before(view, version, AT_ONCE, view.refresh.new_secret_retry_at)
    }

    /// Returns an issue at `due`, but not before the pause until `retry`, the minimum issue interval and the
    /// lease are over.
    fn not_before(
        &self,
        view: &IssueView<'_>,
        credential_version: CredentialVersion,
        due: Timestamp,
        retry: Option<Timestamp>,
    ) -> EarliestIssue {
        let refresh = view.refresh;
        let interval_ends = view.interval_ends(self.min_issue_interval);
        let interval = if view.is_untried(credential_version) {
            interval_ends.min(refresh.interval_exceptions.available_from())
        } else {
            interval_ends
        };
        let pauses = [retry, Some(interval), refresh.lease_until];
        let at = pauses.into_iter().flatten().fold(due, Timestamp::max);
        EarliestIssue { at, credential_version, interval_ends }
    }

    /// Returns when the replacement of `token` is scheduled: at [`RefreshPolicy::advisory_refresh_at`], at its
    /// end if the upstream repeats it until then, or at once if there is no token.
    #[must_use]
    pub fn scheduled_at(&self, account: &AccountName, token: Option<&Token>) -> Timestamp {
        token.map_or(AT_ONCE, |token| {
            token.repeats_until().unwrap_or_else(|| self.advisory_refresh_at(account, token))
        })
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
    /// left before its replacement is due. A longer one would cause an issue with each call. It is zero while the
    /// upstream repeats the token, since there is no other one to wait for.
    #[must_use]
    pub fn longest_min_ttl(&self, token: &Token) -> Duration {
        if token.repeated_at.is_some() {
            return Duration::ZERO;
        }
        token.life().mul_f64((1.0 - self.refresh_at - JITTER).max(0.0))
    }

    /// Returns how long to wait after a failure of `class`, the `failures`-th in a row; `None` if no
    /// attempt may be made until the credential changes.
    ///
    /// `retry_after` is the pause that the upstream asked for, and `cap` an upper bound of the broker's
    /// own pause. `live_for` is how long the account's token is still live; `None` without a live token. Then a
    /// longer `retry_after` counts as five minutes, since callers wait and other accounts may be answered. No
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
        let asked = retry_after.unwrap_or_default();
        let longest = live_for.and_then(|left| self.longest_pause_before_end(left));
        Some(match longest {
            Some(longest) => asked.max(backoff).min(longest),
            None => asked.min(LONGEST_RETRY).max(backoff),
        })
    }

    /// Returns how long to wait after a failure just after the end of a token that the upstream repeated, in an
    /// attempt that began at `started`: an upstream that is a little late with the new token gives the old one,
    /// which has ended. `None` if the failure is another one.
    #[must_use]
    pub fn pause_after_late_repeat(
        class: FailureClass,
        retry_after: Option<Duration>,
        repeats_until: Option<Timestamp>,
        started: Option<Timestamp>,
    ) -> Option<Duration> {
        let may_be_late = matches!(class, FailureClass::Malformed | FailureClass::Unreachable)
            && retry_after.is_none()
            && started.is_some_and(|started| is_late_repeat(started, repeats_until));
        may_be_late.then_some(LATE_REPEAT_PAUSE)
    }

    /// Returns how long to wait before a new secret is tried again, after its `failures`-th failure in a row
    /// while the previous one goes on issuing. The arguments are those of
    /// [`RefreshPolicy::pause_after_failure`].
    #[must_use]
    pub fn pause_of_new_secret(
        &self,
        account: &AccountName,
        class: FailureClass,
        failures: u32,
        retry_after: Option<Duration>,
    ) -> Option<Duration> {
        if class.suspends() {
            return None;
        }
        let first = match class {
            FailureClass::Unreachable | FailureClass::RateLimited => FIRST_NEW_SECRET_RETRY,
            _ => FIRST_NEW_SECRET_RETRY_AFTER_ANSWER,
        };
        let pause = doubling_pause(account, (first, LONGEST_NEW_SECRET_RETRY), failures);
        Some(pause.max(self.min_issue_interval).max(retry_after.unwrap_or_default()))
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

/// Returns whether an attempt that began at `started` may get a token again that has just ended.
fn is_late_repeat(started: Timestamp, repeats_until: Option<Timestamp>) -> bool {
    repeats_until.is_some_and(|until| (until..until + delta(LATE_REPEATS)).contains(&started))
}

/// Returns a pause that doubles with each failure: from one second to five minutes, or from half a minute to
/// a quarter of an hour while the upstream refuses the account or the address.
fn backoff(account: &AccountName, class: FailureClass, failures: u32) -> Duration {
    let bounds = match class {
        FailureClass::EgressRejected => (FIRST_EGRESS_RETRY, LONGEST_EGRESS_RETRY),
        _ => (FIRST_RETRY, LONGEST_RETRY),
    };
    doubling_pause(account, bounds, failures)
}

/// Returns a pause that doubles with each failure, from the first bound to the second. The account's name and
/// the number of failures spread it over the upper half of that.
fn doubling_pause(
    account: &AccountName,
    (first, longest): (Duration, Duration),
    failures: u32,
) -> Duration {
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
