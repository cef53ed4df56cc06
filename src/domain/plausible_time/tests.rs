use chrono::DateTime;
use proptest::{option, prelude::*, sample::select};

use super::*;
use crate::domain::{
    account::CredentialVersion,
    refresh_policy::{IssueDecision, IssueView},
    refresh_state::{Account, FailureClass, IssueFailure},
};

const LIMITS: AttemptTimeLimits = AttemptTimeLimits {
    policy: RefreshPolicy { refresh_at: 0.75, min_issue_interval: Duration::from_secs(30) },
};

fn at(second: i64) -> Timestamp {
    DateTime::UNIX_EPOCH + TimeDelta::days(20_000) + TimeDelta::seconds(second)
}

/// Any time within some years of second 0, and often one near it.
fn time() -> impl Strategy<Value = Timestamp> {
    prop_oneof![-100_000_000_i64..100_000_000, -4_000_i64..4_000, -60_i64..60].prop_map(at)
}

fn state() -> impl Strategy<Value = RefreshState> {
    let times = (option::of(time()), option::of(time()), option::of(time()), option::of(time()));
    let failure = option::of(select(FailureClass::ALL.to_vec()));
    (times, failure, 0_u32..5, any::<bool>(), option::of(1_i64..3)).prop_map(
        |((started, lease, next, since), class, used, open, version)| RefreshState {
            attempt_started_at: started,
            attempt_version: version.map(CredentialVersion),
            attempt_open: open,
            lease_until: lease,
            next_attempt_at: next,
            failure: class.map(|class| IssueFailure {
                class,
                code: None,
                message: String::new(),
                version: CredentialVersion(1),
            }),
            interval_exceptions: IntervalExceptions { used, since },
            ..RefreshState::default()
        },
    )
}

/// Returns the decision about the stored state `refresh` at `now`, and stores a shortened lease as the claim
/// does.
fn claim(account: &Account, refresh: &mut RefreshState, now: Timestamp) -> IssueDecision {
    let mut believed = refresh.clone();
    if LIMITS.correct(&mut believed, now) {
        refresh.lease_until = believed.lease_until;
    }
    LIMITS.policy.decide(&IssueView::locked(account, &believed, None, None), now)
}

proptest! {
    #[test]
    fn whatever_is_stored_an_account_waits_no_longer_than_a_lease_and_the_longest_pause(
        mut refresh in state(), requested in option::of(time()),
    ) {
        let account = Account { reissue_requested_at: requested, ..Account::example(1, "acme") };
        let longest = LIMITS.policy.longest_pause().max(LONGEST_LEASE);
        let latest = at(0) + delta(longest) + TOLERANCE;
        let IssueDecision::WaitUntil(until) = claim(&account, &mut refresh, at(0)) else {
            return Ok(());
        };
        prop_assert!(until <= latest, "{until} is later than {latest}");
        // Looking again and again delays nothing: the time comes, at the latest. While a lease lasts, a pause that is
        // too long to be believed can become one that is not.
        let latest = latest + delta(LONGEST_LEASE);
        let mut now = at(0);
        while now <= latest {
            if !matches!(claim(&account, &mut refresh, now), IssueDecision::WaitUntil(_)) {
                return Ok(());
            }
            now += TimeDelta::seconds(7);
        }
        let decision = claim(&account, &mut refresh, latest);
        prop_assert!(!matches!(decision, IssueDecision::WaitUntil(_)), "{decision:?}");
    }

    #[test]
    fn times_that_can_be_true_are_kept(
        started in -100_000_i64..=0, pause in 0_i64..300, lease in -100_i64..=80, since in -9_000_i64..=0,
    ) {
        let refresh = RefreshState {
            attempt_started_at: Some(at(started)),
            next_attempt_at: Some(at(pause)),
            lease_until: Some(at(lease)),
            interval_exceptions: IntervalExceptions { used: 3, since: Some(at(since)) },
            ..RefreshState::default()
        };
        let mut corrected = refresh.clone();
        prop_assert!(!LIMITS.correct(&mut corrected, at(0)));
        prop_assert_eq!(corrected, refresh);
    }

    #[test]
    fn a_stored_token_never_lives_longer_than_it_was_issued_for(
        issued in time(), life in -10_i64..1_000_000, issuer_end in option::of(time()),
        process in time(), wall in time(), database in time(), even_since in time(),
    ) {
        let expires_at = issued + TimeDelta::seconds(life);
        let stored = StoredLife { issued_at: issued, expires_at, issuer_expires_at: issuer_end };
        let believed = stored.believed(&Moment { process, wall, database, even_since });
        let left = believed.expires_at - process;
        prop_assert!(left <= TimeDelta::seconds(life.max(0)).min(LONGEST_LIFE));
        prop_assert!(left <= (expires_at - database).max(-LONGEST_LIFE));
        if let Some(end) = issuer_end.filter(|_| !believed.certain) {
            prop_assert!(left <= (end - wall).max(-LONGEST_LIFE));
        }
    }

    /// One clock that is wrong by any amount changes nothing about what is told to callers.
    #[test]
    fn of_three_clocks_one_that_is_set_while_the_process_runs_is_outvoted(leap in -9_000_i64..9_000) {
        let (right, wrong) = (at(0), at(leap));
        let is_right = |time: Timestamp| (time - right).abs() <= TOLERANCE;
        prop_assert!(is_right(most_credible(right, wrong, right)));
        // The clock was wrong at the start, and was corrected since.
        prop_assert!(is_right(most_credible(wrong, right, right)));
        // Nobody can tell which of two is wrong, so the earlier one counts.
        prop_assert!(most_credible(right, right, wrong) <= right);
        prop_assert!(most_credible(wrong, wrong, right) <= right + TOLERANCE);
    }
}

/// The database's clock went back by 10 minutes after a token of an hour was issued.
#[test]
fn after_the_databases_clock_went_back_the_wall_clock_bounds_a_tokens_life() {
    let stored =
        StoredLife { issued_at: at(0), expires_at: at(3_600), issuer_expires_at: Some(at(3_600)) };
    let moment = |truth: i64| Moment {
        process: at(truth),
        wall: at(truth),
        database: at(truth - 600),
        even_since: at(truth - 600),
    };
    let old = stored.believed(&moment(3_000));
    assert_eq!((old.expires_at, old.from_the_future), (at(3_600), false));
    let young = stored.believed(&moment(60));
    assert_eq!((young.expires_at, young.from_the_future), (at(3_600), true));
    // The wall clock went back too, or an older release stored the token: it may have ended.
    let both = stored.believed(&Moment { wall: at(-540), ..moment(60) });
    assert!(both.expires_at <= at(60) && both.from_the_future);
    let alone = StoredLife { issuer_expires_at: None, ..stored }.believed(&moment(60));
    assert!(alone.expires_at <= at(60) && alone.from_the_future);
}

/// A token that was issued while this process compared the clocks needs no second witness: a wall clock that
/// is two hours ahead does not make it seem ended.
#[test]
fn a_token_of_another_replica_is_kept_though_our_wall_clock_is_ahead() {
    let stored = StoredLife {
        issued_at: at(100),
        expires_at: at(3_700),
        issuer_expires_at: Some(at(3_700)),
    };
    let moment =
        Moment { process: at(7_301), wall: at(7_301), database: at(101), even_since: at(0) };
    let believed = stored.believed(&moment);
    assert!(believed.certain && !believed.from_the_future);
    assert_eq!(believed.expires_at, at(7_301 + 3_599));
    // It was issued before the process began to compare, so the earlier end counts.
    let unknown = stored.believed(&Moment { even_since: at(101), ..moment });
    assert!(unknown.expires_at <= at(7_301));
}

#[test]
fn a_leap_of_the_databases_clock_is_told_from_a_slow_answer() {
    let first = ClockComparison::new(at(0), at(0), at(0));
    let (slow, leap) = first.next(at(10), at(19), at(20));
    assert_eq!(leap, None);
    assert_eq!(slow.even_since(), at(0));
    let (back, leap) = first.next(at(10), at(-590), at(10));
    assert_eq!(leap, Some(TimeDelta::seconds(-600)));
    assert_eq!(back.even_since(), at(-590));
    assert_eq!(back.middle(), TimeDelta::seconds(600));
    let (_, leap) = back.next(at(20), at(20), at(20));
    assert_eq!(leap, Some(TimeDelta::seconds(600)));
}

#[test]
fn a_lease_is_believed_up_to_the_longest_that_any_settings_permit() {
    let longest = i64::try_from(LONGEST_LEASE.as_secs()).unwrap();
    for (lease, believed) in
        [(30, 30), (longest, longest), (longest + 1, longest), (9_000, longest)]
    {
        let mut refresh = RefreshState { lease_until: Some(at(lease)), ..RefreshState::default() };
        let shortened = LIMITS.correct(&mut refresh, at(0));
        assert_eq!((refresh.lease_until, shortened), (Some(at(believed)), lease != believed));
    }
}

#[test]
fn a_stored_token_lives_no_longer_than_its_generation_and_its_claims_say() {
    let generation = Generation::next(at(0), 7, None);
    let hour = Some(TimeDelta::hours(1));
    let attempt = Duration::from_secs(30);
    // Start and end as stored, what the claims state, and start and end that are believed.
    for (issued, expires, stated, begins, ends) in [
        (2, 3_602, hour, 2, 3_602),
        (2, 3_602, None, 2, 3_602),
        (35, 3_635, hour, 35, 3_635),
        (2, 40_000, hour, 2, 3_635),
        (36_000, 39_600, hour, 0, 3_635),
        (-100_000, 100_000, hour, -100_000, 3_635),
        (2, 1_000_000, None, 2, 48 * 3_600 + 35),
        (2, 1_000_000, Some(TimeDelta::days(9_000)), 2, 48 * 3_600 + 35),
        (2, 3_602, Some(TimeDelta::hours(-1)), 2, 35),
        (2, 60, hour, 2, 60),
    ] {
        let stored =
            StoredLife { issued_at: at(issued), expires_at: at(expires), issuer_expires_at: None };
        let bounded = stored.bounded(generation, stated, attempt);
        assert_eq!((bounded.issued_at, bounded.expires_at), (at(begins), at(ends)), "{stored:?}");
    }
    // The clock was set back before the issue: the generation is that of a later time, and bounds less.
    let ahead = Generation::next(at(0), 7, Some(Generation::next(at(86_400), 7, None)));
    let stored = StoredLife { issued_at: at(2), expires_at: at(3_602), issuer_expires_at: None };
    assert_eq!(stored.bounded(ahead, hour, attempt).expires_at, at(3_602));
    for odd in [i64::MIN, -1, 0, 1, i64::MAX] {
        let _ = stored.bounded(Generation(odd), hour, attempt);
    }
}

#[test]
fn the_time_of_the_process_is_corrected_only_if_both_other_clocks_agree_against_it() {
    let right = DateTime::UNIX_EPOCH + TimeDelta::days(20_000);
    for wrong in [-7_200, -6, 6, 7_200].map(|seconds| right + TimeDelta::seconds(seconds)) {
        assert_eq!(correction(right, right, right), TimeDelta::zero());
        assert_eq!(correction(right, wrong, right), TimeDelta::zero());
        assert_eq!(correction(right, right, wrong), TimeDelta::zero());
        assert_eq!(correction(right, wrong, right + (right - wrong)), TimeDelta::zero());
        assert_eq!(correction(wrong, right, right), right - wrong);
    }
    let almost = right + TimeDelta::seconds(1);
    assert_eq!(correction(right - TimeDelta::hours(1), almost, right), TimeDelta::hours(1));
}
