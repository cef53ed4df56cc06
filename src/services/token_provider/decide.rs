//! What to answer: pure functions of an account's view, the request and the moment.

use std::{sync::Arc, time::Duration};

use super::Refusal;
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

/// What is told as the pause when nothing better is known.
const SOON: Duration = Duration::from_secs(1);
/// The least time for which a token may be kept, unless it ends before.
const LEAST_REUSE: Duration = Duration::from_secs(1);
/// Codes of other APIs that do not speak of the token: a new one would not help.
const NOT_TOKEN_FAULTS: [&str; 5] = ["61001", "61002", "63001", "64001", "64002"];

/// What a caller asks for beside the account.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenRequest {
    /// The life that the token should have left; clamped by [`RefreshPolicy::longest_min_ttl`].
    pub min_ttl: Duration,
    /// Only a token of a later generation will do.
    pub newer_than: Generation,
}

/// What to do with a call for a token.
#[derive(Clone, Debug)]
pub(super) enum Decision {
    Serve(Arc<Token>),
    Wait,
    Refuse(Refusal),
}

/// Decides on a call. A live token is served whatever the account's refresh state, unless the
/// account is disabled; a wish for a longer or newer one is waited for while there is hope.
pub(super) fn decide(
    view: &AccountSnapshot,
    ask: &TokenRequest,
    policy: &RefreshPolicy,
    standing: Connectivity,
    now: Timestamp,
) -> Decision {
    if view.removed {
        return Decision::Refuse(Refusal::NoSuchAccount);
    }
    if !view.account.enabled {
        return Decision::Refuse(Refusal::AccountDisabled);
    }
    let acceptable = view.live_token(now).filter(|token| token.generation > ask.newer_than);
    let hopeless = hopeless(view, standing, now);
    match (acceptable, hopeless) {
        (Some(token), None) if is_short(token, ask, policy, now) => Decision::Wait,
        (Some(token), _) => Decision::Serve(token.clone()),
        (None, Some(refusal)) => Decision::Refuse(refusal),
        (None, None) => Decision::Wait,
    }
}

/// Whether `token` has less left than was asked for, as far as that may be asked for.
fn is_short(token: &Token, ask: &TokenRequest, policy: &RefreshPolicy, now: Timestamp) -> bool {
    token.time_left(now) < ask.min_ttl.min(policy.longest_min_ttl(token))
}

/// Why no new token will come soon; `None` while one may.
fn hopeless(view: &AccountSnapshot, standing: Connectivity, now: Timestamp) -> Option<Refusal> {
    let progress = &view.refresh;
    let leased = progress.lease_until.is_some_and(|until| until > now);
    if standing == Connectivity::Partitioned && !leased {
        return Some(Refusal::DatabaseUnavailable { retry_after: SOON });
    }
    let failure = progress.current_failure(view.account.credential_version)?;
    if view.account.wants_reissue(progress) || leased {
        return None;
    }
    let upstream_code = failure.code.clone();
    match failure.class {
        // The secret before a refused rotation goes on issuing.
        class if class.suspends() && view.account.previous.is_some() => None,
        class if class.suspends() => Some(Refusal::CredentialRejected { upstream_code }),
        FailureClass::EgressRejected => Some(Refusal::EgressRejected { upstream_code }),
        _ => progress
            .next_attempt_at
            .filter(|at| *at > now)
            .map(|at| Refusal::UpstreamUnavailable { retry_after: until_from(now, at).max(SOON) }),
    }
}

/// How long `token` may be kept before asking again: until its replacement is due, after which a
/// new one may end it; never longer than it lives, and always above zero.
pub(super) fn reuse_for(
    account: &AccountName,
    token: &Token,
    policy: &RefreshPolicy,
    now: Timestamp,
) -> Duration {
    until_from(now, policy.advisory_refresh_at(account, token))
        .max(LEAST_REUSE)
        .min(token.time_left(now))
        .max(Duration::from_millis(1))
}

/// What comes of a report.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ReportOutcome {
    /// A new token is being issued, or will be after the pause.
    Reissuing {
        /// When it is tried.
        retry_after: Duration,
        /// Whether the token was reported before.
        noted: bool,
    },
    /// There is a later token already.
    AlreadyReplaced,
    /// The token was issued too recently.
    TooSoon {
        /// When another report is heard.
        retry_after: Duration,
    },
    /// A new token would not help.
    NotATokenFault,
}

/// Judges a report of `generation`. A token is reissued at most once for its reports, and not
/// within the floor between issues.
pub(super) fn judge_report(
    view: &AccountSnapshot,
    generation: u64,
    upstream_code: &str,
    policy: &RefreshPolicy,
    now: Timestamp,
) -> ReportOutcome {
    if NOT_TOKEN_FAULTS.contains(&upstream_code) {
        return ReportOutcome::NotATokenFault;
    }
    let progress = &view.refresh;
    let pause = progress.attempt_started_at.map_or(Duration::ZERO, |started| {
        until_from(now, started + delta(policy.min_issue_interval))
    });
    let Some(token) = &view.token else {
        return ReportOutcome::Reissuing { retry_after: pause.max(SOON), noted: true };
    };
    match generation.cmp(&token.generation.as_u64()) {
        std::cmp::Ordering::Less => ReportOutcome::AlreadyReplaced,
        // Another replica's token that has not arrived here yet.
        std::cmp::Ordering::Greater => ReportOutcome::TooSoon { retry_after: SOON },
        std::cmp::Ordering::Equal if progress.possibly_revoked => {
            ReportOutcome::Reissuing { retry_after: pause.max(SOON), noted: true }
        }
        std::cmp::Ordering::Equal if !pause.is_zero() => {
            ReportOutcome::TooSoon { retry_after: pause }
        }
        std::cmp::Ordering::Equal => ReportOutcome::Reissuing { retry_after: SOON, noted: false },
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};
    use proptest::prelude::*;

    use super::*;
    use crate::domain::{
        account::CredentialVersion,
        refresh_state::{Account, IssueFailure, RefreshState},
    };

    const POLICY: RefreshPolicy =
        RefreshPolicy { refresh_at: 0.75, min_issue_interval: Duration::from_secs(30) };

    fn at(second: i64) -> Timestamp {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
    }

    /// Generation 7 lives from 0 to 1000.
    fn view() -> AccountSnapshot {
        AccountSnapshot {
            account: Account::example(1, "acme"),
            refresh: RefreshState { attempt_started_at: Some(at(0)), ..RefreshState::default() },
            token: Some(Arc::new(Token::example(7, 1_000))),
            removed: false,
        }
    }

    fn failing(class: FailureClass, next_attempt_at: Option<Timestamp>) -> AccountSnapshot {
        let mut view = view();
        view.refresh.next_attempt_at = next_attempt_at;
        view.refresh.failure = Some(IssueFailure {
            class,
            code: Some("61006".into()),
            message: String::new(),
            version: CredentialVersion(1),
        });
        view
    }

    fn ask() -> TokenRequest {
        TokenRequest::default()
    }

    /// What was decided, in a word.
    fn decided(view: &AccountSnapshot, ask: TokenRequest, second: i64) -> &'static str {
        decided_while(Connectivity::Connected, view, ask, second)
    }

    fn decided_while(
        standing: Connectivity,
        view: &AccountSnapshot,
        ask: TokenRequest,
        second: i64,
    ) -> &'static str {
        match decide(view, &ask, &POLICY, standing, at(second)) {
            Decision::Serve(_) => "serve",
            Decision::Wait => "wait",
            Decision::Refuse(Refusal::NoSuchAccount) => "no such account",
            Decision::Refuse(Refusal::AccountDisabled) => "disabled",
            Decision::Refuse(Refusal::CredentialRejected { .. }) => "rejected",
            Decision::Refuse(Refusal::EgressRejected { .. }) => "egress",
            Decision::Refuse(Refusal::UpstreamUnavailable { .. }) => "unavailable",
            Decision::Refuse(Refusal::DatabaseUnavailable { .. }) => "database",
            Decision::Refuse(_) => "another",
        }
    }

    #[test]
    fn a_live_token_is_served_whatever_the_refresh_state() {
        assert_eq!(decided(&view(), ask(), 999), "serve");
        for class in FailureClass::ALL {
            assert_eq!(decided(&failing(class, Some(at(5_000))), ask(), 999), "serve", "{class:?}");
        }
    }

    #[test]
    fn a_disabled_account_is_refused_at_once_even_with_a_live_token() {
        let mut view = view();
        view.account.enabled = false;
        assert_eq!(decided(&view, ask(), 1), "disabled");
    }

    #[test]
    fn an_ended_token_is_waited_for_or_refused_with_the_reason() {
        assert_eq!(decided(&view(), ask(), 1_000), "wait");
        for (class, expected) in [
            (FailureClass::Rejected, "rejected"),
            (FailureClass::Intake, "rejected"),
            (FailureClass::EgressRejected, "egress"),
            (FailureClass::Unreachable, "unavailable"),
            (FailureClass::RateLimited, "unavailable"),
            (FailureClass::Malformed, "unavailable"),
        ] {
            assert_eq!(decided(&failing(class, Some(at(5_000))), ask(), 1_000), expected);
        }
        assert_eq!(
            decided(&failing(FailureClass::Unreachable, Some(at(999))), ask(), 1_000),
            "wait"
        );
    }

    #[test]
    fn a_changed_credential_is_waited_for_not_refused_for_the_old_ones_fault() {
        let mut view = failing(FailureClass::Rejected, None);
        view.account.credential_version = CredentialVersion(2);
        assert_eq!(decided(&view, ask(), 1_000), "wait");
    }

    #[test]
    fn who_is_cut_off_serves_what_it_has_and_waits_only_for_what_is_under_way() {
        let cut_off = |view: &AccountSnapshot, ask, second| {
            decided_while(Connectivity::Partitioned, view, ask, second)
        };
        let hour = TokenRequest { min_ttl: Duration::from_hours(1), ..ask() };
        assert_eq!(cut_off(&view(), ask(), 999), "serve");
        assert_eq!(cut_off(&view(), hour, 999), "serve");
        assert_eq!(cut_off(&view(), ask(), 1_000), "database");
        assert_eq!(decided_while(Connectivity::SoleReplica, &view(), ask(), 1_000), "wait");
        let mut under_way = view();
        under_way.refresh.lease_until = Some(at(1_020));
        assert_eq!(cut_off(&under_way, ask(), 1_000), "wait");
        assert_eq!(cut_off(&under_way, ask(), 1_020), "database");
    }

    #[test]
    fn a_longer_life_is_waited_for_within_what_a_refresh_can_give() {
        let hour = TokenRequest { min_ttl: Duration::from_hours(1), ..ask() };
        assert_eq!(decided(&view(), hour, 100), "serve");
        assert_eq!(decided(&view(), hour, 801), "wait");
        assert_eq!(decided(&view(), ask(), 801), "serve");
        let down = failing(FailureClass::Unreachable, Some(at(5_000)));
        assert_eq!(decided(&down, hour, 801), "serve");
    }

    #[test]
    fn a_newer_generation_is_waited_for() {
        let newer = TokenRequest { newer_than: Generation(7), ..ask() };
        assert_eq!(decided(&view(), newer, 1), "wait");
        let older = TokenRequest { newer_than: Generation(6), ..ask() };
        assert_eq!(decided(&view(), older, 1), "serve");
    }

    #[test]
    fn a_report_leads_to_one_reissue_of_its_generation_outside_the_floor() {
        let judge = |view: &AccountSnapshot, generation, code, second| {
            judge_report(view, generation, code, &POLICY, at(second))
        };
        let reissuing = ReportOutcome::Reissuing { retry_after: SOON, noted: false };
        assert_eq!(judge(&view(), 7, "61003", 100), reissuing);
        assert_eq!(judge(&view(), 7, "", 100), reissuing);
        assert_eq!(judge(&view(), 6, "61003", 100), ReportOutcome::AlreadyReplaced);
        assert_eq!(
            judge(&view(), 7, "61004", 10),
            ReportOutcome::TooSoon { retry_after: Duration::from_secs(20) }
        );
        for code in NOT_TOKEN_FAULTS {
            assert_eq!(judge(&view(), 7, code, 100), ReportOutcome::NotATokenFault);
        }
        let mut reported = view();
        reported.refresh.possibly_revoked = true;
        assert!(matches!(
            judge(&reported, 7, "61003", 100),
            ReportOutcome::Reissuing { noted: true, .. }
        ));
    }

    proptest! {
        #[test]
        fn an_ended_token_is_never_served(
            second in 0_i64..3_000, min_ttl in 0_u64..5_000, newer_than in 0_i64..10,
            failed in proptest::option::of(0_usize..6), next in 0_i64..4_000,
            standing in proptest::sample::select(vec![
                Connectivity::Connected, Connectivity::SoleReplica, Connectivity::Partitioned,
            ]),
        ) {
            let view = failed.map_or_else(view, |class| {
                failing(FailureClass::ALL[class], Some(at(next)))
            });
            let ask = TokenRequest {
                min_ttl: Duration::from_secs(min_ttl),
                newer_than: Generation(newer_than),
            };
            if let Decision::Serve(token) = decide(&view, &ask, &POLICY, standing, at(second)) {
                prop_assert!(token.expires_at > at(second));
                prop_assert!(token.generation > ask.newer_than);
            }
        }

        #[test]
        fn a_served_token_may_be_kept_for_some_time_but_not_beyond_its_end(second in 0_i64..1_000) {
            let view = view();
            let token = view.token.unwrap();
            let kept = reuse_for(&view.account.name, &token, &POLICY, at(second));
            prop_assert!(!kept.is_zero());
            prop_assert!(at(second) + delta(kept) <= token.expires_at);
        }
    }
}
