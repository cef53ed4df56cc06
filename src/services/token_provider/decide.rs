//! The decisions about calls: serve, wait or refuse; how long a token may be reused; the outcome of a report.
//! All are pure functions of a snapshot of the account, the request and the present moment.

use std::{cmp::Ordering, sync::Arc, time::Duration};

use super::CallRefusal;
use crate::{
    domain::{
        account::AccountName,
        clock::{Timestamp, delta, until_from},
        refresh_policy::RefreshPolicy,
        refresh_state::FailureClass,
        token::{Generation, Token},
    },
    services::{account_cache::AccountSnapshot, connectivity::Connectivity},
};

/// Retry delay reported to the client when no better estimate is known, and the shortest one reported.
const DEFAULT_RETRY: Duration = Duration::from_secs(1);
/// The shortest reuse time that is reported for a token that lives at least that long.
const MIN_REUSE: Duration = Duration::from_secs(1);
/// Error codes of the upstream's other APIs that do not concern the token: a new token would not help.
const NOT_TOKEN_FAULTS: [&str; 5] = ["61001", "61002", "63001", "64001", "64002"];

/// Which token a caller wants of an account.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenRequest {
    /// How long the token should still live, at least. [`RefreshPolicy::longest_min_ttl`] limits it.
    pub min_ttl: Duration,
    /// The token must be of a later generation than this.
    pub newer_than: Generation,
}

/// What to do with a call for a token.
#[derive(Clone, Debug)]
pub(super) enum Decision {
    Serve(Arc<Token>),
    /// A new token may come soon: decide again when the account or the connectivity has changed.
    Wait,
    Refuse(CallRefusal),
}

/// Decides whether a call for a token is served, waits, or is refused.
///
/// A live token is served whatever the account's refresh state, unless the account is disabled or the token may
/// have been ended by a replica that does not know of this one. A call
/// that wants a token with more life left, or of a later generation, waits as long as one may still come;
/// when none will come soon, the live token is served if its generation suffices.
pub(super) fn decide(
    snapshot: &AccountSnapshot,
    request: &TokenRequest,
    policy: &RefreshPolicy,
    connectivity: Connectivity,
    now: Timestamp,
) -> Decision {
    if snapshot.removed {
        return Decision::Refuse(CallRefusal::NoSuchAccount);
    }
    if !snapshot.account.enabled {
        return Decision::Refuse(CallRefusal::AccountDisabled);
    }
    // Another replica may have ended the token in the cache.
    if connectivity == Connectivity::Unacknowledged {
        return Decision::Refuse(CallRefusal::DatabaseUnavailable { retry_after: DEFAULT_RETRY });
    }
    let acceptable = snapshot.live_token(now).filter(|token| token.generation > request.newer_than);
    let no_new_token = why_no_new_token_soon(snapshot, connectivity, now);
    match (acceptable, no_new_token) {
        (Some(token), None) if has_too_little_life(token, request, policy, now) => Decision::Wait,
        (Some(token), _) => Decision::Serve(token.clone()),
        (None, Some(refusal)) => Decision::Refuse(refusal),
        (None, None) => Decision::Wait,
    }
}

/// Whether `token` lives for less than the `min_ttl` of `request`, after the policy has limited that.
fn has_too_little_life(
    token: &Token,
    request: &TokenRequest,
    policy: &RefreshPolicy,
    now: Timestamp,
) -> bool {
    token.time_left(now) < request.min_ttl.min(policy.longest_min_ttl(token))
}

/// Returns the refusal that says why no new token will come soon, or `None` while one may come.
fn why_no_new_token_soon(
    snapshot: &AccountSnapshot,
    connectivity: Connectivity,
    now: Timestamp,
) -> Option<CallRefusal> {
    let refresh = &snapshot.refresh;
    let leased = refresh.lease_until.is_some_and(|until| until > now);
    if connectivity == Connectivity::Partitioned && !leased {
        return Some(CallRefusal::DatabaseUnavailable { retry_after: DEFAULT_RETRY });
    }
    let (refusal, retry_at) = last_failure(snapshot, now)?;
    if snapshot.account.wants_reissue(refresh) || leased {
        return None;
    }
    // A failure that does not suspend the account is followed by another attempt.
    let is_final = !matches!(refusal, CallRefusal::UpstreamUnavailable { .. });
    (is_final || retry_at.is_some_and(|at| at > now)).then_some(refusal)
}

/// Returns the refusal that says how the last attempt with the account's present credential failed, and when the
/// next attempt is planned. `None` if it did not fail, or if the previous credential issues without a failure.
fn last_failure(
    snapshot: &AccountSnapshot,
    now: Timestamp,
) -> Option<(CallRefusal, Option<Timestamp>)> {
    let refresh = &snapshot.refresh;
    let failure = refresh.current_failure(snapshot.account.credential_version)?;
    let (upstream_code, retry_at) = (failure.code.clone(), refresh.next_attempt_at);
    let unavailable = || CallRefusal::UpstreamUnavailable {
        retry_after: retry_at.map_or(DEFAULT_RETRY, |at| until_from(now, at).max(DEFAULT_RETRY)),
    };
    let refusal = match failure.class {
        // After a rotation, the previous secret goes on issuing until the new one has issued. It fails only if
        // there is a pause before its next attempt.
        _ if snapshot.account.fallback_version(refresh).is_some() => {
            retry_at?;
            unavailable()
        }
        class if class.suspends() => CallRefusal::CredentialRejected { upstream_code },
        FailureClass::EgressRejected => CallRefusal::EgressRejected { upstream_code },
        _ => unavailable(),
    };
    Some((refusal, retry_at))
}

/// Decides how a call ends whose deadline passed while it waited: with the live token if its generation suffices,
/// even if it lives for less than `min_ttl`, since a token that works is better than an error. Otherwise with why
/// the last attempt failed, if it did, since the present one did not end in time either.
pub(super) fn decide_at_deadline(
    snapshot: &AccountSnapshot,
    request: &TokenRequest,
    now: Timestamp,
) -> Result<Arc<Token>, CallRefusal> {
    match snapshot.live_token(now) {
        Some(token) if token.generation > request.newer_than => Ok(token.clone()),
        _ => Err(last_failure(snapshot, now)
            .map_or(CallRefusal::DeadlineExceeded, |(refusal, _)| refusal)),
    }
}

/// Returns how long a caller may reuse `token` before it asks again: until the replacement is due, since
/// a new token may end the older one. It is never longer than the token lives, and always above zero.
pub(super) fn reuse_for(
    account: &AccountName,
    token: &Token,
    policy: &RefreshPolicy,
    now: Timestamp,
) -> Duration {
    until_from(now, policy.scheduled_at(account, Some(token)))
        .max(MIN_REUSE)
        .min(token.time_left(now))
        .max(Duration::from_millis(1))
}

/// The outcome of a caller's report that the upstream refused a token.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ReportOutcome {
    /// The token is replaced by a new one.
    Reissuing {
        /// When the caller should ask for the new token.
        retry_after: Duration,
        /// Whether there is nothing left to store: the token was reported before, or there is none.
        already_stored: bool,
    },
    /// The account has a token of a later generation already.
    AlreadyReplaced,
    /// The token was issued too recently, or its generation is not known here yet.
    TooSoon {
        /// When another report would be accepted.
        retry_after: Duration,
    },
    /// The code does not concern the token, so a new one would not help.
    NotATokenFault,
}

/// Decides the outcome of a report of `generation`. A token is reissued at most once for all its reports, and
/// not within the minimum issue interval.
pub(super) fn decide_report(
    snapshot: &AccountSnapshot,
    generation: u64,
    upstream_code: &str,
    policy: &RefreshPolicy,
    now: Timestamp,
) -> ReportOutcome {
    if NOT_TOKEN_FAULTS.contains(&upstream_code) {
        return ReportOutcome::NotATokenFault;
    }
    let refresh = &snapshot.refresh;
    let interval_left = refresh.attempt_started_at.map_or(Duration::ZERO, |started| {
        until_from(now, started + delta(policy.min_issue_interval))
    });
    let already_reissuing = ReportOutcome::Reissuing {
        retry_after: interval_left.max(DEFAULT_RETRY),
        already_stored: true,
    };
    let Some(token) = &snapshot.token else { return already_reissuing };
    match generation.cmp(&token.generation.as_u64()) {
        Ordering::Less => ReportOutcome::AlreadyReplaced,
        // Another replica issued that token, and it has not arrived here yet.
        Ordering::Greater => ReportOutcome::TooSoon { retry_after: DEFAULT_RETRY },
        Ordering::Equal if refresh.possibly_revoked => already_reissuing,
        Ordering::Equal if !interval_left.is_zero() => {
            ReportOutcome::TooSoon { retry_after: interval_left }
        }
        Ordering::Equal => {
            ReportOutcome::Reissuing { retry_after: DEFAULT_RETRY, already_stored: false }
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};
    use proptest::prelude::*;

    use super::*;
    use crate::domain::{
        account::CredentialVersion,
        refresh_state::{Account, AccountCredential, IssueFailure, RefreshState},
    };

    const POLICY: RefreshPolicy =
        RefreshPolicy { refresh_at: 0.75, min_issue_interval: Duration::from_secs(30) };

    fn at(second: i64) -> Timestamp {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
    }

    /// An account whose token of generation 7 lives from second 0 to second 1000.
    fn snapshot() -> AccountSnapshot {
        AccountSnapshot {
            account: Account::example(1, "acme"),
            refresh: RefreshState { attempt_started_at: Some(at(0)), ..RefreshState::default() },
            token: Some(Arc::new(Token::example(7, 1_000))),
            removed: false,
        }
    }

    fn failing(class: FailureClass, next_attempt_at: Option<Timestamp>) -> AccountSnapshot {
        let mut snapshot = snapshot();
        snapshot.refresh.next_attempt_at = next_attempt_at;
        snapshot.refresh.failure = Some(IssueFailure {
            class,
            code: Some("61006".into()),
            message: String::new(),
            version: CredentialVersion(1),
        });
        snapshot
    }

    fn any_token() -> TokenRequest {
        TokenRequest::default()
    }

    /// The decision while the database is connected, as a word.
    fn decided(snapshot: &AccountSnapshot, request: TokenRequest, second: i64) -> &'static str {
        decided_with(Connectivity::Connected, snapshot, request, second)
    }

    fn decided_with(
        connectivity: Connectivity,
        snapshot: &AccountSnapshot,
        request: TokenRequest,
        second: i64,
    ) -> &'static str {
        match decide(snapshot, &request, &POLICY, connectivity, at(second)) {
            Decision::Serve(_) => "serve",
            Decision::Wait => "wait",
            Decision::Refuse(CallRefusal::NoSuchAccount) => "no such account",
            Decision::Refuse(CallRefusal::AccountDisabled) => "disabled",
            Decision::Refuse(CallRefusal::CredentialRejected { .. }) => "rejected",
            Decision::Refuse(CallRefusal::EgressRejected { .. }) => "egress",
            Decision::Refuse(CallRefusal::UpstreamUnavailable { .. }) => "unavailable",
            Decision::Refuse(CallRefusal::DatabaseUnavailable { .. }) => "database",
            Decision::Refuse(_) => "another",
        }
    }

    #[test]
    fn a_live_token_is_served_whatever_the_refresh_state() {
        assert_eq!(decided(&snapshot(), any_token(), 999), "serve");
        for class in FailureClass::ALL {
            assert_eq!(
                decided(&failing(class, Some(at(5_000))), any_token(), 999),
                "serve",
                "{class:?}"
            );
        }
    }

    #[test]
    fn a_disabled_account_is_refused_at_once_even_with_a_live_token() {
        let mut snapshot = snapshot();
        snapshot.account.enabled = false;
        assert_eq!(decided(&snapshot, any_token(), 1), "disabled");
    }

    #[test]
    fn without_a_live_token_a_call_waits_or_is_refused_with_the_reason() {
        assert_eq!(decided(&snapshot(), any_token(), 1_000), "wait");
        for (class, expected) in [
            (FailureClass::Rejected, "rejected"),
            (FailureClass::Intake, "rejected"),
            (FailureClass::EgressRejected, "egress"),
            (FailureClass::Unreachable, "unavailable"),
            (FailureClass::RateLimited, "unavailable"),
            (FailureClass::Malformed, "unavailable"),
        ] {
            assert_eq!(decided(&failing(class, Some(at(5_000))), any_token(), 1_000), expected);
        }
        assert_eq!(
            decided(&failing(FailureClass::Unreachable, Some(at(999))), any_token(), 1_000),
            "wait"
        );
    }

    #[test]
    fn a_call_whose_deadline_passes_hears_why_the_last_attempt_failed() {
        let ended = |snapshot: &AccountSnapshot, newer_than, second| {
            let request = TokenRequest { newer_than: Generation(newer_than), ..any_token() };
            decide_at_deadline(snapshot, &request, at(second)).map(|token| token.generation.0)
        };
        assert_eq!(ended(&snapshot(), 6, 999), Ok(7));
        assert_eq!(ended(&snapshot(), 7, 999), Err(CallRefusal::DeadlineExceeded));
        assert_eq!(ended(&snapshot(), 0, 1_000), Err(CallRefusal::DeadlineExceeded));
        // The next attempt is under way: the call waited for it.
        let under_way = |class| {
            let mut snapshot = failing(class, Some(at(1_004)));
            snapshot.refresh.lease_until = Some(at(1_030));
            snapshot
        };
        let unavailable = |seconds| {
            let retry_after = Duration::from_secs(seconds);
            Err(CallRefusal::UpstreamUnavailable { retry_after })
        };
        let unreachable = under_way(FailureClass::Unreachable);
        assert_eq!(decided(&unreachable, any_token(), 1_000), "wait");
        assert_eq!(ended(&unreachable, 0, 1_000), unavailable(4));
        assert_eq!(ended(&unreachable, 0, 1_010), unavailable(1));
        assert_eq!(ended(&unreachable, 0, 999), Ok(7));
        let upstream_code = Some("61006".to_owned());
        assert_eq!(
            ended(&under_way(FailureClass::EgressRejected), 0, 1_000),
            Err(CallRefusal::EgressRejected { upstream_code: upstream_code.clone() })
        );
        assert_eq!(
            ended(&under_way(FailureClass::Rejected), 0, 1_000),
            Err(CallRefusal::CredentialRejected { upstream_code })
        );
        let mut changed = under_way(FailureClass::Rejected);
        changed.account.credential_version = CredentialVersion(2);
        assert_eq!(ended(&changed, 0, 1_000), Err(CallRefusal::DeadlineExceeded));
    }

    #[test]
    fn after_a_change_of_the_credential_a_call_waits_and_is_not_refused_for_the_old_one() {
        let mut snapshot = failing(FailureClass::Rejected, None);
        snapshot.account.credential_version = CredentialVersion(2);
        assert_eq!(decided(&snapshot, any_token(), 1_000), "wait");
    }

    #[test]
    fn while_a_new_secret_fails_a_call_waits_for_a_token_of_the_previous_one() {
        for class in FailureClass::ALL {
            let mut snapshot = failing(class, None);
            snapshot.refresh.new_secret_retry_at = Some(at(9_000));
            snapshot.account.previous =
                Some(AccountCredential { version: CredentialVersion(0), secret: vec![0].into() });
            assert_eq!(decided(&snapshot, any_token(), 1_000), "wait", "{class}");
            // The previous one fails too.
            snapshot.refresh.next_attempt_at = Some(at(5_000));
            assert_eq!(decided(&snapshot, any_token(), 1_000), "unavailable", "{class}");
            assert_eq!(decided(&snapshot, any_token(), 5_000), "wait", "{class}");
        }
    }

    #[test]
    fn a_partitioned_replica_serves_its_live_tokens_and_waits_only_for_an_attempt_under_way() {
        let partitioned = |snapshot: &AccountSnapshot, request, second| {
            decided_with(Connectivity::Partitioned, snapshot, request, second)
        };
        let hour = TokenRequest { min_ttl: Duration::from_hours(1), ..any_token() };
        assert_eq!(partitioned(&snapshot(), any_token(), 999), "serve");
        assert_eq!(partitioned(&snapshot(), hour, 999), "serve");
        assert_eq!(partitioned(&snapshot(), any_token(), 1_000), "database");
        assert_eq!(
            decided_with(Connectivity::SoleReplica, &snapshot(), any_token(), 1_000),
            "wait"
        );
        let mut under_way = snapshot();
        under_way.refresh.lease_until = Some(at(1_020));
        assert_eq!(partitioned(&under_way, any_token(), 1_000), "wait");
        assert_eq!(partitioned(&under_way, any_token(), 1_020), "database");
    }

    #[test]
    fn nothing_is_served_that_a_replica_may_have_ended_which_does_not_know_of_this_one() {
        let unacknowledged =
            |second| decided_with(Connectivity::Unacknowledged, &snapshot(), any_token(), second);
        assert_eq!((unacknowledged(100), unacknowledged(1_000)), ("database", "database"));
    }

    #[test]
    fn while_the_upstream_repeats_a_token_no_call_waits_for_another_one() {
        let mut snapshot = snapshot();
        let repeated = Token { repeated_at: Some(at(800)), ..Token::example(7, 1_000) };
        let hour = TokenRequest { min_ttl: Duration::from_hours(1), ..any_token() };
        let reuse = |token: &Token| reuse_for(&"acme".parse().unwrap(), token, &POLICY, at(900));
        assert_eq!(reuse(&Token::example(7, 1_000)), MIN_REUSE);
        assert_eq!(reuse(&repeated), Duration::from_secs(100));
        snapshot.token = Some(Arc::new(repeated));
        assert_eq!(decided(&snapshot, hour, 999), "serve");
        assert_eq!(decided(&snapshot, hour, 1_000), "wait");
    }

    #[test]
    fn a_call_waits_for_a_min_ttl_up_to_what_a_refresh_can_give() {
        let hour = TokenRequest { min_ttl: Duration::from_hours(1), ..any_token() };
        assert_eq!(decided(&snapshot(), hour, 100), "serve");
        assert_eq!(decided(&snapshot(), hour, 801), "wait");
        assert_eq!(decided(&snapshot(), any_token(), 801), "serve");
        let down = failing(FailureClass::Unreachable, Some(at(5_000)));
        assert_eq!(decided(&down, hour, 801), "serve");
    }

    #[test]
    fn a_call_waits_for_a_newer_generation() {
        let newer = TokenRequest { newer_than: Generation(7), ..any_token() };
        assert_eq!(decided(&snapshot(), newer, 1), "wait");
        let older = TokenRequest { newer_than: Generation(6), ..any_token() };
        assert_eq!(decided(&snapshot(), older, 1), "serve");
    }

    #[test]
    fn a_report_leads_to_one_reissue_of_its_generation_and_not_within_the_minimum_issue_interval() {
        let report = |snapshot: &AccountSnapshot, generation, code, second| {
            decide_report(snapshot, generation, code, &POLICY, at(second))
        };
        let reissuing =
            ReportOutcome::Reissuing { retry_after: DEFAULT_RETRY, already_stored: false };
        assert_eq!(report(&snapshot(), 7, "61003", 100), reissuing);
        assert_eq!(report(&snapshot(), 7, "", 100), reissuing);
        assert_eq!(report(&snapshot(), 6, "61003", 100), ReportOutcome::AlreadyReplaced);
        assert_eq!(
            report(&snapshot(), 7, "61004", 10),
            ReportOutcome::TooSoon { retry_after: Duration::from_secs(20) }
        );
        for code in NOT_TOKEN_FAULTS {
            assert_eq!(report(&snapshot(), 7, code, 100), ReportOutcome::NotATokenFault);
        }
        let mut reported = snapshot();
        reported.refresh.possibly_revoked = true;
        assert!(matches!(
            report(&reported, 7, "61003", 100),
            ReportOutcome::Reissuing { already_stored: true, .. }
        ));
    }

    proptest! {
        #[test]
        fn an_expired_token_is_never_served(
            second in 0_i64..3_000, min_ttl in 0_u64..5_000, newer_than in 0_i64..10,
            failed in proptest::option::of(0_usize..6), next in 0_i64..4_000,
            connectivity in proptest::sample::select(vec![
                Connectivity::Connected, Connectivity::SoleReplica, Connectivity::Partitioned,
                Connectivity::Unacknowledged,
            ]),
        ) {
            let snapshot = failed.map_or_else(snapshot, |class| {
                failing(FailureClass::ALL[class], Some(at(next)))
            });
            let request = TokenRequest {
                min_ttl: Duration::from_secs(min_ttl),
                newer_than: Generation(newer_than),
            };
            if let Decision::Serve(token) = decide(&snapshot, &request, &POLICY, connectivity, at(second)) {
                prop_assert!(token.expires_at > at(second));
                prop_assert!(token.generation > request.newer_than);
                prop_assert_ne!(connectivity, Connectivity::Unacknowledged);
            }
        }

        #[test]
        fn a_served_token_may_be_reused_for_some_time_but_not_beyond_its_expiry(second in 0_i64..1_000) {
            let snapshot = snapshot();
            let token = snapshot.token.unwrap();
            let reuse = reuse_for(&snapshot.account.name, &token, &POLICY, at(second));
            prop_assert!(!reuse.is_zero());
            prop_assert!(at(second) + delta(reuse) <= token.expires_at);
        }
    }
}
