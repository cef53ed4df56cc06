use chrono::TimeDelta;
use proptest::{option, prelude::*, sample::select};

use super::*;
use crate::domain::refresh_state::{AccountCredential, IntervalExceptions, IssueFailure};

const POLICY: RefreshPolicy =
    RefreshPolicy { refresh_at: 0.75, min_issue_interval: Duration::from_secs(30) };

fn at(second: i64) -> Timestamp {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
}

fn account() -> Account {
    Account::example(1, "acme")
}

fn rotated() -> Account {
    let previous = AccountCredential { version: CredentialVersion(1), secret: vec![0].into() };
    Account { credential_version: CredentialVersion(2), previous: Some(previous), ..account() }
}

fn token(life: i64) -> Token {
    Token::example(1, life)
}

/// Returns the state after one ended attempt with credential 1, which began at second 0. Generation 1 is
/// stored.
fn tried() -> RefreshState {
    RefreshState {
        attempt_started_at: Some(at(0)),
        attempt_version: Some(CredentialVersion(1)),
        stored_generation: Some(Generation(1)),
        ..RefreshState::default()
    }
}

fn failed(class: FailureClass, version: i64, next_attempt_at: Option<Timestamp>) -> RefreshState {
    let failure = IssueFailure {
        class,
        code: None,
        message: String::new(),
        version: CredentialVersion(version),
    };
    RefreshState { failure: Some(failure), next_attempt_at, ..tried() }
}

/// Returns when the next issue for a cached account with this token is permitted.
fn planned(account: &Account, refresh: &RefreshState, token: Option<&Token>) -> Option<Timestamp> {
    let scheduled_at = POLICY.scheduled_at(&account.name, token);
    POLICY.next_issue_at(&IssueView::cached(account, refresh, scheduled_at, None))
}

/// Returns the decision of a claim at `second` to replace generation 1.
fn claimed(account: &Account, refresh: &RefreshState, second: i64) -> IssueDecision {
    let view = IssueView::locked(account, refresh, Some(Generation(1)), None);
    POLICY.decide(&view, at(second))
}

fn issue(version: i64, uses_interval_exception: bool) -> IssueDecision {
    let credential_version = CredentialVersion(version);
    IssueDecision::Issue { credential_version, uses_interval_exception }
}

mod planning {
    use super::*;

    #[test]
    fn an_account_without_a_token_is_issued_for_at_once() {
        assert_eq!(planned(&account(), &RefreshState::default(), None), Some(at(0)));
    }

    #[test]
    fn a_token_is_replaced_at_its_advisory_refresh_time() {
        let token = token(3_600);
        let due = planned(&account(), &tried(), Some(&token));
        assert_eq!(due, Some(POLICY.advisory_refresh_at(&account().name, &token)));
    }

    #[test]
    fn a_disabled_or_unsealed_account_waits_for_a_change() {
        let disabled = Account { enabled: false, ..account() };
        assert_eq!(planned(&disabled, &tried(), None), None);
        let unsealed = Account { secret: None, ..account() };
        assert_eq!(planned(&unsealed, &RefreshState::default(), None), None);
    }

    #[test]
    fn a_possibly_revoked_token_is_replaced_after_the_minimum_interval() {
        let revoked = RefreshState { possibly_revoked: true, ..tried() };
        assert_eq!(planned(&account(), &revoked, Some(&token(3_600))), Some(at(30)));
    }

    #[test]
    fn an_attempt_without_a_recorded_end_is_repeated_after_its_lease() {
        let lost = RefreshState { attempt_open: true, lease_until: Some(at(40)), ..tried() };
        assert_eq!(planned(&account(), &lost, Some(&token(3_600))), Some(at(40)));
    }

    #[test]
    fn a_refused_credential_waits_for_its_change_or_an_admin() {
        let suspended = failed(FailureClass::Rejected, 1, None);
        assert_eq!(planned(&account(), &suspended, None), None);
        let changed = Account { credential_version: CredentialVersion(2), ..account() };
        assert_eq!(planned(&changed, &suspended, None), Some(at(0)));
        let requested = Account { reissue_requested_at: Some(at(1)), ..account() };
        assert_eq!(planned(&requested, &suspended, None), Some(at(30)));
    }

    #[test]
    fn after_a_refused_rotation_the_previous_credential_keeps_the_schedule() {
        let refused = failed(FailureClass::Rejected, 2, None);
        let token = token(3_600);
        let due = planned(&rotated(), &refused, Some(&token));
        assert_eq!(due, Some(POLICY.advisory_refresh_at(&rotated().name, &token)));
    }

    #[test]
    fn after_a_transient_failure_the_next_attempt_is_scheduled_after_the_pause() {
        let failing = failed(FailureClass::Unreachable, 1, Some(at(120)));
        assert_eq!(planned(&account(), &failing, None), Some(at(120)));
    }

    #[test]
    fn an_account_is_scheduled_after_the_end_of_another_replicas_lease() {
        let leased = RefreshState { lease_until: Some(at(99)), ..tried() };
        assert_eq!(planned(&account(), &leased, None), Some(at(99)));
    }
}

mod claiming {
    use super::*;

    #[test]
    fn the_token_that_the_claimant_knows_may_be_replaced() {
        assert_eq!(claimed(&account(), &tried(), 1_000), issue(1, false));
    }

    #[test]
    fn a_token_that_another_replica_replaced_needs_no_issue() {
        let replaced = RefreshState { stored_generation: Some(Generation(2)), ..tried() };
        assert_eq!(claimed(&account(), &replaced, 1_000), IssueDecision::NotNeeded);
    }

    #[test]
    fn a_disabled_account_is_not_issued_for() {
        let disabled = Account { enabled: false, ..account() };
        assert_eq!(claimed(&disabled, &tried(), 1_000), IssueDecision::NotNeeded);
    }

    #[test]
    fn a_claim_waits_until_a_held_lease_ends() {
        let leased = RefreshState { lease_until: Some(at(1_005)), ..tried() };
        assert_eq!(claimed(&account(), &leased, 1_000), IssueDecision::WaitUntil(at(1_005)));
        assert_eq!(claimed(&account(), &leased, 1_005), issue(1, false));
    }

    #[test]
    fn the_minimum_interval_is_kept_to_the_second() {
        let recent = RefreshState { attempt_started_at: Some(at(990)), ..tried() };
        assert_eq!(claimed(&account(), &recent, 1_000), IssueDecision::WaitUntil(at(1_020)));
        assert_eq!(claimed(&account(), &recent, 1_020), issue(1, false));
    }

    #[test]
    fn a_changed_credential_need_not_wait_for_the_interval_three_times_an_hour() {
        let changed = Account { credential_version: CredentialVersion(2), ..account() };
        let recent = |used, since| RefreshState {
            attempt_started_at: Some(at(9_990)),
            interval_exceptions: IntervalExceptions { used, since: Some(at(since)) },
            ..tried()
        };
        assert_eq!(claimed(&changed, &recent(2, 9_900), 10_000), issue(2, true));
        let spent = recent(3, 9_900);
        assert_eq!(claimed(&changed, &spent, 10_000), IssueDecision::WaitUntil(at(10_020)));
        assert_eq!(claimed(&changed, &recent(3, 10_000 - 3_600), 10_000), issue(2, true));
    }

    #[test]
    fn a_refused_credential_is_suspended_until_it_changes_or_an_admin_asks() {
        let suspended = failed(FailureClass::Rejected, 1, None);
        assert_eq!(claimed(&account(), &suspended, 1_000), IssueDecision::NotNeeded);
        let changed = Account { credential_version: CredentialVersion(2), ..account() };
        assert_eq!(claimed(&changed, &suspended, 1_000), issue(2, false));
        let requested = Account { reissue_requested_at: Some(at(5)), ..account() };
        assert_eq!(claimed(&requested, &suspended, 1_000), issue(1, false));
        let tried_since = RefreshState { attempt_started_at: Some(at(6)), ..suspended };
        assert_eq!(claimed(&requested, &tried_since, 1_000), IssueDecision::NotNeeded);
    }

    #[test]
    fn while_a_new_secret_is_refused_tokens_are_issued_with_the_previous_one() {
        let refused = RefreshState {
            attempt_version: Some(CredentialVersion(2)),
            ..failed(FailureClass::Rejected, 2, None)
        };
        assert_eq!(claimed(&rotated(), &refused, 1_000), issue(1, false));
    }

    #[test]
    fn a_claim_waits_out_the_pause_after_a_transient_failure_unless_the_credential_changed() {
        let failing = failed(FailureClass::Unreachable, 1, Some(at(1_060)));
        assert_eq!(claimed(&account(), &failing, 1_000), IssueDecision::WaitUntil(at(1_060)));
        let changed = Account { credential_version: CredentialVersion(2), ..account() };
        assert_eq!(claimed(&changed, &failing, 1_000), issue(2, false));
    }

    #[test]
    fn a_pause_for_an_outage_of_the_upstream_ends_with_it() {
        let after_outage = |class, outage_ended: i64| {
            let refresh = RefreshState {
                attempt_started_at: Some(at(900)),
                ..failed(class, 1, Some(at(1_060)))
            };
            let ended = Some(at(outage_ended));
            let account = account();
            let view = IssueView::locked(&account, &refresh, Some(Generation(1)), ended);
            POLICY.decide(&view, at(1_000))
        };
        for class in FailureClass::ALL.into_iter().filter(|class| class.is_transient()) {
            assert_eq!(after_outage(class, 901), issue(1, false), "{class}");
            let wait = IssueDecision::WaitUntil(at(1_060));
            assert_eq!(after_outage(class, 900), wait, "{class}");
        }
        assert_eq!(after_outage(FailureClass::Rejected, 901), IssueDecision::NotNeeded);
    }
}

/// An upstream that gives the same token again until it ends.
mod repeating {
    use super::*;

    /// Returns the decision at `second` about a token that lives for 120 seconds, and was given again at the
    /// attempt that began at second 100.
    fn decided(refresh: &RefreshState, second: i64) -> [IssueDecision; 2] {
        let (account, token) = (account(), Token { repeated_at: Some(at(100)), ..token(120) });
        let scheduled_at = POLICY.scheduled_at(&account.name, Some(&token));
        let cached = IssueView::cached(&account, refresh, scheduled_at, None);
        let locked = IssueView::locked(&account, refresh, Some(Generation(1)), None);
        [cached, locked]
            .map(|view| POLICY.decide(&view.repeating_until(token.repeats_until()), at(second)))
    }

    fn attempted(second: i64) -> RefreshState {
        RefreshState { attempt_started_at: Some(at(second)), ..tried() }
    }

    #[test]
    fn the_next_attempt_is_just_after_the_tokens_end_whatever_the_minimum_interval() {
        let refresh = attempted(100);
        for second in [100, 105, 119, 120] {
            assert_eq!(decided(&refresh, second), [IssueDecision::WaitUntil(at(121)); 2]);
        }
        assert_eq!(decided(&refresh, 121), [issue(1, false); 2]);
    }

    #[test]
    fn a_few_attempts_just_after_the_end_need_not_keep_the_interval() {
        for (started, next) in [(121, 123), (123, 125), (127, 129), (128, 130), (129, 159)] {
            let wait = [IssueDecision::WaitUntil(at(next)); 2];
            assert_eq!(decided(&attempted(started), started + 1), wait, "{started}");
            assert_eq!(decided(&attempted(started), next), [issue(1, false); 2], "{started}");
        }
    }

    #[test]
    fn a_failure_just_after_the_end_has_a_short_pause_unless_the_upstream_refuses() {
        use FailureClass::{EgressRejected, Malformed, RateLimited, Rejected, Unreachable};
        let pause = |class, retry_after, until: Option<i64>, started| {
            let (until, started) = (until.map(at), Some(at(started)));
            RefreshPolicy::pause_after_late_repeat(class, retry_after, until, started)
        };
        let short = Some(Duration::from_secs(2));
        for class in [Malformed, Unreachable] {
            for (until, started, expected) in [
                (None, 121, None),
                (Some(121), 120, None),
                (Some(121), 121, short),
                (Some(121), 129, None),
            ] {
                assert_eq!(pause(class, None, until, started), expected, "{until:?} {started}");
            }
            assert_eq!(pause(class, Some(Duration::from_mins(1)), Some(121), 121), None);
        }
        for class in [EgressRejected, RateLimited, Rejected] {
            assert_eq!(pause(class, None, Some(121), 121), None, "{class}");
        }
    }

    #[test]
    fn a_token_that_may_be_revoked_is_not_waited_for_but_the_interval_is() {
        let revoked = RefreshState { possibly_revoked: true, ..attempted(60) };
        assert_eq!(decided(&revoked, 70), [IssueDecision::WaitUntil(at(90)); 2]);
        assert_eq!(decided(&revoked, 90), [issue(1, false); 2]);
    }

    #[test]
    fn a_token_that_is_repeated_has_no_life_left_to_wait_for() {
        assert_eq!(POLICY.longest_min_ttl(&token(1_000)), Duration::from_secs(200));
        let repeated = Token { repeated_at: Some(at(1)), ..token(1_000) };
        assert_eq!(POLICY.longest_min_ttl(&repeated), Duration::ZERO);
    }
}

/// While a new secret has not issued a token, the previous one goes on issuing, whatever the new one's failure
/// is. Secret 1 was replaced by secret 2, whose attempt began at second 1,000 and failed.
mod rotating {
    use super::*;

    /// When the account's next attempt is, and with which secret: the class of the new secret's failure, when the
    /// new one may be tried again, and what is special.
    type Case = (FailureClass, Option<i64>, fn(&mut Account, &mut RefreshState), (i64, i64));

    fn nothing(_: &mut Account, _: &mut RefreshState) {}

    fn possibly_revoked(_: &mut Account, refresh: &mut RefreshState) {
        refresh.possibly_revoked = true;
    }

    fn previous_fails(_: &mut Account, refresh: &mut RefreshState) {
        refresh.attempt_version = Some(CredentialVersion(1));
        refresh.consecutive_failures = 1;
        refresh.next_attempt_at = Some(at(9_000));
    }

    fn previous_issued(_: &mut Account, refresh: &mut RefreshState) {
        refresh.attempt_started_at = Some(at(3_000));
        refresh.attempt_version = Some(CredentialVersion(1));
    }

    fn requested(account: &mut Account, _: &mut RefreshState) {
        account.reissue_requested_at = Some(at(1_001));
    }

    fn unsealed(account: &mut Account, _: &mut RefreshState) {
        account.secret = None;
    }

    fn unsealed_and_requested(account: &mut Account, refresh: &mut RefreshState) {
        unsealed(account, refresh);
        requested(account, refresh);
        refresh.next_attempt_at = Some(at(9_000));
    }

    fn rotated_again(account: &mut Account, _: &mut RefreshState) {
        account.credential_version = CredentialVersion(3);
    }

    fn gone(account: &mut Account, refresh: &mut RefreshState) {
        account.previous = None;
        refresh.next_attempt_at = Some(at(1_500));
    }

    const DUE: i64 = 2_700;

    #[test]
    fn the_previous_secret_issues_on_its_schedule_and_the_new_one_is_tried_after_its_pauses() {
        use FailureClass::{EgressRejected, Intake, Malformed, RateLimited, Rejected, Unreachable};
        let cases: [Case; 21] = [
            // A refused secret is not tried again, and any other one after its pause, if that ends first.
            (Rejected, None, nothing, (DUE, 1)),
            (Intake, None, nothing, (DUE, 1)),
            (EgressRejected, Some(1_300), nothing, (1_300, 2)),
            (RateLimited, Some(1_300), nothing, (1_300, 2)),
            (Unreachable, Some(1_300), nothing, (1_300, 2)),
            (Malformed, Some(1_300), nothing, (1_300, 2)),
            // The token is due before that.
            (EgressRejected, Some(4_600), nothing, (DUE, 1)),
            (Unreachable, Some(4_600), nothing, (DUE, 1)),
            (Malformed, Some(DUE), nothing, (DUE, 1)),
            // The failed attempt may have ended the token: only the minimum interval is waited for.
            (Unreachable, Some(1_030), possibly_revoked, (1_030, 1)),
            (Malformed, Some(4_600), possibly_revoked, (1_030, 1)),
            // The previous secret fails as well, and so each has its turn after its own pause.
            (Unreachable, Some(8_000), previous_fails, (8_000, 2)),
            (Unreachable, Some(9_500), previous_fails, (9_000, 1)),
            (Rejected, None, previous_fails, (9_000, 1)),
            // After the previous secret has issued, the new one does not count as untried.
            (Malformed, Some(4_600), previous_issued, (DUE.max(3_030), 1)),
            // An admin asks for a new token: with the new secret.
            (Rejected, None, requested, (1_030, 2)),
            (Malformed, Some(4_600), requested, (1_030, 2)),
            (Malformed, Some(1_300), unsealed, (DUE, 1)),
            (Intake, None, unsealed_and_requested, (1_030, 1)),
            // The next secret is tried at once, and the failure of the one before it says nothing about it.
            (Malformed, Some(4_600), rotated_again, (0, 3)),
            // The previous secret was refused too, and is not kept any more.
            (Unreachable, Some(4_600), gone, (DUE, 2)),
        ];
        for (n, (class, retry_at, change, expected)) in cases.into_iter().enumerate() {
            let (mut account, mut refresh) = (rotated(), failed(class, 2, None));
            refresh.attempt_started_at = Some(at(1_000));
            refresh.attempt_version = Some(CredentialVersion(2));
            refresh.new_secret_retry_at = retry_at.map(at);
            change(&mut account, &mut refresh);
            let view = IssueView::cached(&account, &refresh, at(DUE), None);
            let earliest = POLICY.earliest_issue(&view).unwrap();
            let version = earliest.credential_version.0;
            assert_eq!((earliest.at.timestamp(), version), expected, "case {n}: {class}");
        }
    }

    #[test]
    fn a_claim_for_the_new_secret_does_not_use_the_previous_one_before_its_time() {
        let (account, mut refresh) = (rotated(), failed(FailureClass::Malformed, 2, None));
        refresh.attempt_started_at = Some(at(1_000));
        refresh.new_secret_retry_at = Some(at(1_300));
        let claimed = |version, second| {
            let view = IssueView::locked(&account, &refresh, Some(Generation(1)), None)
                .for_credential(Some(CredentialVersion(version)));
            POLICY.decide(&view, at(second))
        };
        assert_eq!(claimed(2, 1_300), issue(2, false));
        assert_eq!(claimed(2, 1_299), IssueDecision::WaitUntil(at(1_300)));
        assert_eq!(claimed(1, 1_300), issue(1, false));
        // The row has changed since the claimant read it.
        assert_eq!(claimed(3, 1_300), IssueDecision::NotNeeded);
    }

    #[test]
    fn the_attempts_of_a_secret_that_never_works_become_rare_and_are_always_of_the_failing_class() {
        let name = "acme".parse().unwrap();
        for class in FailureClass::ALL.into_iter().filter(|class| !class.suspends()) {
            let (mut passed, mut attempts) = (Duration::ZERO, 0);
            while passed < Duration::from_hours(24) {
                attempts += 1;
                passed += POLICY.pause_of_new_secret(&name, class, attempts, None).unwrap();
            }
            assert!((24..60).contains(&attempts), "{class}: {attempts} attempts in a day");
            let refresh = failed(class, 2, None);
            let account = rotated();
            let view = IssueView::cached(&account, &refresh, at(DUE), None);
            assert_eq!(view.priority_class(CredentialVersion(2)), PriorityClass::Failing);
            assert_eq!(view.priority_class(CredentialVersion(1)), PriorityClass::Proven);
        }
        assert_eq!(POLICY.pause_of_new_secret(&name, FailureClass::Rejected, 1, None), None);
        let asked = Some(Duration::from_mins(50));
        let class = FailureClass::RateLimited;
        assert_eq!(POLICY.pause_of_new_secret(&name, class, 1, asked), asked);
    }
}

mod priority {
    use super::*;

    fn class(
        account: &Account,
        refresh: &RefreshState,
        outage_ended: Option<i64>,
    ) -> PriorityClass {
        let version = account.usable_version(refresh).unwrap();
        IssueView::cached(account, refresh, at(0), outage_ended.map(at)).priority_class(version)
    }

    fn failing() -> RefreshState {
        RefreshState {
            consecutive_failures: 1,
            ..failed(FailureClass::Unreachable, 1, Some(at(30)))
        }
    }

    #[test]
    fn an_account_is_proven_after_a_success_and_failing_after_a_failure() {
        assert_eq!(class(&account(), &tried(), None), PriorityClass::Proven);
        assert_eq!(class(&account(), &failing(), None), PriorityClass::Failing);
    }

    #[test]
    fn a_new_account_a_changed_credential_and_a_requested_token_count_as_untried() {
        assert_eq!(class(&account(), &RefreshState::default(), None), PriorityClass::Untried);
        let changed = Account { credential_version: CredentialVersion(2), ..account() };
        assert_eq!(class(&changed, &failing(), None), PriorityClass::Untried);
        let requested = Account { reissue_requested_at: Some(at(1)), ..account() };
        assert_eq!(class(&requested, &failing(), None), PriorityClass::Untried);
    }

    #[test]
    fn a_failure_in_an_outage_that_ended_does_not_count() {
        assert_eq!(class(&account(), &failing(), Some(1)), PriorityClass::Proven);
        assert_eq!(class(&account(), &failing(), Some(0)), PriorityClass::Failing);
        let never_issued = RefreshState { stored_generation: None, ..failing() };
        assert_eq!(class(&account(), &never_issued, Some(1)), PriorityClass::Untried);
    }
}

#[test]
fn tokens_issued_together_are_replaced_over_a_tenth_of_their_life() {
    let token = token(3_600);
    let due: Vec<_> = (0..2_000)
        .map(|n| POLICY.advisory_refresh_at(&format!("account-{n}").parse().unwrap(), &token))
        .collect();
    let (first, last) = (due.iter().min().unwrap(), due.iter().max().unwrap());
    assert!((2_520..2_530).contains(&first.timestamp()), "{first}");
    assert!((2_870..=2_880).contains(&last.timestamp()), "{last}");
    // The refreshes in each twentieth of the window are at most twice the mean, so the upstream sees
    // an even load.
    let mut counts = [0; 20];
    for at in &due {
        counts[usize::try_from((at.timestamp() - 2_520) / 18).unwrap().min(19)] += 1;
    }
    assert!(counts.iter().all(|n| *n <= 200), "{counts:?}");
}

#[test]
fn a_refresh_is_mandatory_in_the_last_tenth_of_a_life_but_at_most_a_minute() {
    let mandatory =
        |token: Option<&Token>| RefreshPolicy::mandatory_refresh_at(&tried(), token).timestamp();
    assert_eq!(mandatory(Some(&token(3_600))), 3_540);
    assert_eq!(mandatory(Some(&token(100))), 90);
    assert_eq!(mandatory(None), 0);
    let revoked = RefreshState { possibly_revoked: true, ..tried() };
    assert_eq!(RefreshPolicy::mandatory_refresh_at(&revoked, Some(&token(100))).timestamp(), 0);
}

#[test]
fn pauses_after_failures_double_up_to_five_minutes_and_keep_the_minimum_interval() {
    let name = "acme".parse().unwrap();
    let free = RefreshPolicy { min_issue_interval: Duration::ZERO, ..POLICY };
    let pause = |policy: RefreshPolicy, failures, retry_after, cap| {
        let class = FailureClass::Unreachable;
        policy.pause_after_failure(&name, class, failures, retry_after, cap, None).unwrap()
    };
    let seconds = Duration::from_secs;
    assert!(pause(free, 1, None, None) <= seconds(1));
    assert!(pause(free, 4, None, None) >= seconds(4));
    assert!(pause(free, u32::MAX, None, None) <= seconds(300));
    assert_eq!(pause(POLICY, 1, None, None), seconds(30));
    assert_eq!(pause(free, u32::MAX, None, Some(seconds(30))), seconds(30));
    assert_eq!(pause(free, 1, Some(seconds(120)), Some(seconds(30))), seconds(120));
    assert_eq!(pause(free, 1, Some(seconds(3_600)), None), seconds(300));
    let rare = RefreshPolicy { min_issue_interval: seconds(900), ..POLICY };
    assert_eq!(pause(rare, 1, Some(seconds(3_600)), None), seconds(900));
}

#[test]
fn a_refused_credential_is_not_retried_and_a_refused_address_after_pauses_up_to_15_minutes() {
    let name = "acme".parse().unwrap();
    let pause =
        |class, failures| POLICY.pause_after_failure(&name, class, failures, None, None, None);
    for failures in 1..9 {
        assert_eq!(pause(FailureClass::Rejected, failures), None);
        assert_eq!(pause(FailureClass::Intake, failures), None);
    }
    let pauses: Vec<_> = (1..9)
        .map(|failures| pause(FailureClass::EgressRejected, failures).unwrap().as_secs())
        .collect();
    assert_eq!(pauses[0], 30, "the minimum interval");
    for (earlier, later) in pauses.iter().zip(&pauses[2..6]) {
        assert!(earlier <= later, "{pauses:?}");
    }
    assert!(pauses[6..].iter().all(|pause| (450..=900).contains(pause)), "{pauses:?}");
}

#[test]
fn a_pause_leaves_time_for_an_attempt_before_a_live_token_ends() {
    let name = "acme".parse().unwrap();
    let seconds = Duration::from_secs;
    let pause = |left| {
        let (class, asked) = (FailureClass::RateLimited, Some(seconds(3_600)));
        POLICY.pause_after_failure(&name, class, 1, asked, None, Some(seconds(left))).unwrap()
    };
    assert_eq!(pause(900), seconds(450), "half of the time that is left");
    assert_eq!(pause(50), seconds(30), "but not less than the minimum interval");
    assert_eq!(pause(30), seconds(300), "nothing can save the token");
}

/// Generated facts that a decision depends on.
#[derive(Clone, Debug)]
struct Facts {
    account: Account,
    refresh: RefreshState,
    scheduled_at: Timestamp,
    outage_ended_at: Option<Timestamp>,
    replaces: Option<Generation>,
    repeats_until: Option<Timestamp>,
}

impl Facts {
    fn cached(&self) -> IssueView<'_> {
        IssueView::cached(&self.account, &self.refresh, self.scheduled_at, self.outage_ended_at)
            .repeating_until(self.repeats_until)
    }

    fn locked(&self) -> IssueView<'_> {
        IssueView::locked(&self.account, &self.refresh, self.replaces, self.outage_ended_at)
            .repeating_until(self.repeats_until)
    }

    /// Returns the same facts with their times by a clock that is `ahead` of the first.
    fn by_clock(&self, ahead: TimeDelta) -> Self {
        let mut facts = self.clone();
        facts.scheduled_at += ahead;
        let Facts { account, refresh, outage_ended_at, repeats_until, .. } = &mut facts;
        for time in [
            &mut account.reissue_requested_at,
            &mut refresh.attempt_started_at,
            &mut refresh.lease_until,
            &mut refresh.next_attempt_at,
            &mut refresh.new_secret_retry_at,
            &mut refresh.interval_exceptions.since,
            &mut refresh.answered_reissue,
            outage_ended_at,
            repeats_until,
        ] {
            *time = time.map(|time| time + ahead);
        }
        facts
    }
}

fn moment() -> impl Strategy<Value = Timestamp> {
    // A narrow range with few values, so that equal moments occur.
    (10_000_i64..18_000).prop_map(|second| at(second / 10 * 10))
}

prop_compose! {
    fn accounts()(
        enabled in prop::bool::weighted(0.9), sealed in prop::bool::weighted(0.9),
        current in 1_i64..3, has_previous: bool, reissue_requested_at in option::of(moment()),
    ) -> Account {
        let previous = AccountCredential { version: CredentialVersion(0), secret: vec![0].into() };
        Account {
            enabled,
            secret: sealed.then(|| vec![0].into()),
            credential_version: CredentialVersion(current),
            previous: has_previous.then_some(previous),
            reissue_requested_at,
            ..account()
        }
    }
}

prop_compose! {
    fn refresh_states()(
        attempt_started_at in option::of(moment()), attempt_version in option::of(0_i64..3),
        attempt_open: bool, possibly_revoked: bool,
        lease_until in option::of(moment()), next_attempt_at in option::of(moment()),
        generation in option::of(0_i64..3),
        failure in option::of((select(FailureClass::ALL.to_vec()), 0_i64..3)),
        used in 0_u32..5, since in option::of(moment()), answered_reissue in option::of(moment()),
        new_secret_retry_at in option::of(moment()),
    ) -> RefreshState {
        RefreshState {
            attempt_started_at,
            attempt_version: attempt_version.map(CredentialVersion),
            attempt_open,
            lease_until,
            possibly_revoked,
            stored_generation: generation.map(Generation),
            consecutive_failures: 0,
            failure: failure.map(|(class, version)| IssueFailure {
                class,
                code: None,
                message: String::new(),
                version: CredentialVersion(version),
            }),
            next_attempt_at,
            new_secret_failures: 0,
            new_secret_retry_at,
            interval_exceptions: IntervalExceptions { used, since },
            answered_reissue,
        }
    }
}

prop_compose! {
    fn facts()(
        account in accounts(), refresh in refresh_states(), scheduled_at in moment(),
        outage_ended_at in option::of(moment()), replaces in option::of(0_i64..3),
        repeats_until in option::weighted(0.3, moment()),
    ) -> Facts {
        let replaces = replaces.map(Generation);
        Facts { account, refresh, scheduled_at, outage_ended_at, replaces, repeats_until }
    }
}

/// A failed attempt as [`attempts_until_success`] simulates it: the class, the pause that the upstream asks
/// for, and the seconds until it fails.
type SimulatedFailure = (FailureClass, Option<u64>, i64);

/// Returns the starts of the attempts to replace `token`, up to the one that succeeds, since the upstream
/// answers from second `healthy` on. Before, they fail as `failures` says, over and over again. `None` once
/// the token has ended.
fn attempts_until_success(
    policy: RefreshPolicy,
    token: &Token,
    failures: &[SimulatedFailure],
    healthy: i64,
) -> Option<Vec<Timestamp>> {
    let name = "acme".parse().unwrap();
    let mut now = policy.advisory_refresh_at(&name, token);
    let mut attempts = vec![];
    for (class, asked, takes) in failures.iter().cycle() {
        if now >= token.expires_at {
            return None;
        }
        attempts.push(now);
        if now >= at(healthy) {
            break;
        }
        now += TimeDelta::seconds(*takes);
        let count = u32::try_from(attempts.len()).unwrap();
        let asked = asked.map(Duration::from_secs);
        let live_for = token.is_live(now).then(|| token.time_left(now));
        let pause = policy.pause_after_failure(&name, *class, count, asked, None, live_for);
        now += delta(pause.unwrap());
    }
    Some(attempts)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// No pause outlasts a live token while an attempt could still save it, and a token does not cause many
    /// attempts, since each may count towards a lock of the account.
    #[test]
    fn a_token_is_replaced_in_time_if_the_upstream_recovers_before_its_last_possible_attempt(
        life in 20_i64..7_200, interval in 0_u64..60, healthy in 0_i64..100,
        failures in proptest::collection::vec(
            (
                select(FailureClass::ALL.into_iter().filter(|it| it.is_transient()).collect::<Vec<_>>()),
                option::of(1_u64..3_600),
                0_i64..11,
            ),
            1..20,
        ),
    ) {
        let policy = RefreshPolicy { min_issue_interval: Duration::from_secs(interval), ..POLICY };
        let token = token(life);
        // An attempt that began just before the upstream recovered fails up to 10 seconds later.
        let last_possible = life - i64::try_from(interval.max(1)).unwrap() - 11;
        let healthy = last_possible * healthy / 100;
        let attempts = attempts_until_success(policy, &token, &failures, healthy);
        let attempts = attempts.expect("the token ended first");
        prop_assert!(attempts.len() <= 40, "{} attempts", attempts.len());
    }

    #[test]
    fn a_replacement_is_due_during_the_life_and_before_it_is_mandatory(
        name in "[a-z0-9][a-z0-9._-]{0,62}", life in 10_i64..100_000,
    ) {
        let (name, token) = (name.parse().unwrap(), token(life));
        let due = POLICY.advisory_refresh_at(&name, &token);
        let mandatory = RefreshPolicy::mandatory_refresh_at(&RefreshState::default(), Some(&token));
        prop_assert!(due > token.issued_at);
        prop_assert!(due < mandatory);
        prop_assert!(token.time_left(due) >= POLICY.longest_min_ttl(&token));
        prop_assert_eq!(due, POLICY.advisory_refresh_at(&name, &token));
    }

    #[test]
    fn an_issue_is_never_permitted_before_the_leases_end(facts in facts(), now in moment()) {
        for view in [facts.cached(), facts.locked()] {
            if matches!(POLICY.decide(&view, now), IssueDecision::Issue { .. }) {
                prop_assert!(facts.refresh.lease_until.is_none_or(|until| until <= now));
            }
        }
    }

    #[test]
    fn a_suspended_credential_is_used_only_when_an_admin_asks(facts in facts(), now in moment()) {
        let Facts { account, refresh, .. } = &facts;
        let suspended = refresh
            .current_failure(account.credential_version)
            .is_some_and(|failure| failure.class.suspends());
        for view in [facts.cached(), facts.locked()] {
            if let IssueDecision::Issue { credential_version, .. } = POLICY.decide(&view, now) {
                prop_assert!(account.enabled);
                prop_assert!(account.credential(credential_version).is_some());
                let current = credential_version == account.credential_version;
                prop_assert!(!current || !suspended || account.wants_reissue(refresh));
            }
        }
    }

    #[test]
    fn the_minimum_interval_is_kept_but_for_the_exceptions_of_a_changed_credential(
        facts in facts(), now in moment(),
    ) {
        let Facts { account, refresh, .. } = &facts;
        // The interval does not outlast a token that the upstream repeated at the last attempt.
        let repeated_until_now = |started| {
            facts.repeats_until.is_some_and(|until| {
                let just_after = until <= started && started < until + delta(LATE_REPEATS);
                started < until && until <= now
                    || just_after && started + delta(LATE_REPEAT_PAUSE) <= now
            })
        };
        let early = refresh.attempt_started_at.is_some_and(|started| {
            now < started + delta(POLICY.min_issue_interval) && !repeated_until_now(started)
        });
        for view in [facts.cached(), facts.locked()] {
            let IssueDecision::Issue { credential_version, uses_interval_exception } =
                POLICY.decide(&view, now)
            else {
                continue;
            };
            prop_assert_eq!(uses_interval_exception, early);
            if early {
                prop_assert_eq!(credential_version, account.credential_version);
                prop_assert_ne!(refresh.attempt_version, Some(credential_version));
                let after = refresh.interval_exceptions.after_issue(now, true);
                prop_assert!(after.used <= IntervalExceptions::LIMIT);
            }
        }
    }

    /// No failure of a new secret makes the previous one wait, except for the minimum interval.
    #[test]
    fn a_failing_new_secret_never_delays_the_previous_one(facts in facts()) {
        let Facts { account, refresh, .. } = &facts;
        let Some(previous) = account.fallback_version(refresh).filter(|_| account.enabled) else {
            return Ok(());
        };
        let alone = Account {
            credential_version: previous,
            secret: Some(vec![0].into()),
            previous: None,
            reissue_requested_at: None,
            ..account.clone()
        };
        let unfailed = RefreshState {
            attempt_version: Some(previous),
            failure: refresh.next_attempt_at.map(|_| IssueFailure {
                class: FailureClass::Unreachable,
                code: None,
                message: String::new(),
                version: previous,
            }),
            ..refresh.clone()
        };
        let view = IssueView::cached(&alone, &unfailed, facts.scheduled_at, facts.outage_ended_at)
            .repeating_until(facts.repeats_until);
        let without_rotation = POLICY.next_issue_at(&view).unwrap();
        let with_rotation = POLICY.next_issue_at(&facts.cached()).unwrap();
        prop_assert!(with_rotation <= without_rotation, "{with_rotation} {without_rotation}");
    }

    #[test]
    fn a_decision_at_a_later_time_never_waits_longer(
        facts in facts(), now in moment(), later in moment(),
    ) {
        let (now, later) = (now.min(later), now.max(later));
        for view in [facts.cached(), facts.locked()] {
            match (POLICY.decide(&view, now), POLICY.decide(&view, later)) {
                (IssueDecision::WaitUntil(first), IssueDecision::WaitUntil(second)) => {
                    prop_assert_eq!(first, second);
                }
                (IssueDecision::WaitUntil(first), IssueDecision::Issue { .. }) => {
                    prop_assert!(first <= later);
                }
                (IssueDecision::Issue { .. }, decision) => {
                    let issues = matches!(decision, IssueDecision::Issue { .. });
                    prop_assert!(issues);
                }
                (first, second) => prop_assert_eq!(first, second),
            }
        }
    }

    #[test]
    fn the_cache_and_the_locked_row_lead_to_the_same_decision(
        facts in facts(), now in moment(), ahead in -9_000_i64..90_000,
    ) {
        // The cached token is due, and is the stored one, so that the views differ only in the clock.
        let mut facts = facts;
        facts.scheduled_at = AT_ONCE;
        facts.replaces = facts.refresh.stored_generation;
        let ahead = TimeDelta::seconds(ahead);
        let by_clock = facts.by_clock(ahead);
        let cached = POLICY.decide(&by_clock.cached(), now + ahead);
        let scheduled = POLICY.earliest_issue(&by_clock.cached()).map(|it| it.credential_version);
        let locked = facts.locked().for_credential(scheduled);
        let expected = match POLICY.decide(&locked, now) {
            IssueDecision::WaitUntil(until) => IssueDecision::WaitUntil(until + ahead),
            decision => decision,
        };
        prop_assert_eq!(cached, expected);
    }

    #[test]
    fn planning_and_deciding_agree(facts in facts(), now in moment()) {
        for view in [facts.cached(), facts.locked()] {
            let planned = POLICY.next_issue_at(&view);
            match POLICY.decide(&view, now) {
                IssueDecision::NotNeeded => prop_assert_eq!(planned, None),
                IssueDecision::WaitUntil(until) => prop_assert_eq!(planned, Some(until)),
                IssueDecision::Issue { .. } => {
                    prop_assert!(planned.is_some_and(|planned| planned <= now));
                }
            }
        }
    }
}
