use std::iter;

use chrono::{DateTime, TimeDelta};
use proptest::{option, prelude::*, sample::select};

use super::*;

const LIMITS: usize = 8;

fn at(second: i64) -> Timestamp {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
}

fn limits() -> ConcurrencyLimits {
    ConcurrencyLimits::new(LIMITS)
}

/// Returns a schedule for an account whose token ends at the second `ends`. Its refresh is mandatory from a
/// minute before.
fn schedule(due: i64, priority: PriorityClass, ends: Option<i64>) -> Schedule {
    let token = ends.map(|ends| TokenTimes { ends: at(ends), mandatory_from: at(ends - 60) });
    let failures = u32::from(priority == PriorityClass::Failing);
    Schedule { due: at(due), priority, failures, token }
}

impl RefreshQueue {
    fn add(&mut self, id: i64, due: i64, priority: PriorityClass, ends: Option<i64>) {
        self.plan(AccountId(id), Some(schedule(due, priority, ends)));
    }

    /// Takes accounts one after the other at `second`, and ends each attempt at once.
    fn order(&mut self, second: i64) -> Vec<i64> {
        iter::from_fn(|| {
            let id = self.take(at(second), limits(), None)?;
            self.attempt_ended(id);
            Some(id.0)
        })
        .collect()
    }

    /// Takes as many accounts as can be under way at once.
    fn fill(&mut self, second: i64, canary: Option<i64>) -> Vec<i64> {
        iter::from_fn(|| self.take(at(second), limits(), canary.map(at)).map(|id| id.0)).collect()
    }
}

#[test]
fn the_token_that_ends_first_is_first_and_a_new_account_precedes_those_with_a_minute_left() {
    let mut queue = RefreshQueue::default();
    queue.add(1, 1, PriorityClass::Proven, Some(500));
    queue.add(2, 2, PriorityClass::Untried, None);
    queue.add(3, 3, PriorityClass::Proven, Some(130));
    queue.add(4, 200, PriorityClass::Proven, Some(300));
    assert_eq!(queue.next_start(at(0), limits(), None), Some(at(1)));
    assert_eq!(queue.order(100), [3, 2, 1]);
    assert_eq!(queue.next_start(at(100), limits(), None), Some(at(200)));
}

#[test]
fn an_account_with_an_attempt_under_way_is_not_started_again() {
    let mut queue = RefreshQueue::default();
    queue.add(1, 0, PriorityClass::Untried, None);
    assert_eq!(queue.fill(0, None), [1]);
    queue.add(1, 0, PriorityClass::Untried, None);
    assert_eq!(queue.fill(9, None), [0; 0]);
    queue.attempt_ended(AccountId(1));
    queue.add(1, 0, PriorityClass::Untried, None);
    assert_eq!(queue.fill(9, None), [1]);
}

#[test]
fn scheduling_an_account_for_no_time_removes_it() {
    let mut queue = RefreshQueue::default();
    for priority in PriorityClass::ALL {
        queue.add(1, 0, priority, Some(100));
        assert_eq!(queue.next_start(at(1), limits(), None), Some(at(1)));
        queue.plan(AccountId(1), None);
        assert_eq!(queue.next_start(at(1), limits(), None), None);
    }
}

#[test]
fn accounts_that_get_no_answer_leave_places_for_others_and_a_new_account_precedes_older_ones() {
    let mut queue = RefreshQueue::default();
    for id in 0..60 {
        queue.add(id, 0, PriorityClass::Failing, None);
        queue.add(100 + id, 0, PriorityClass::Untried, None);
    }
    let hanging = queue.fill(0, None);
    assert_eq!(hanging.len(), 6, "two places are left for proven accounts");
    assert!(hanging.iter().filter(|id| **id < 100).count() <= 2);
    queue.add(1_000, 1, PriorityClass::Proven, Some(900));
    assert_eq!(queue.fill(1, None), [1_000]);
    queue.add(2_000, 2, PriorityClass::Untried, None);
    let untried = *hanging.iter().find(|id| **id >= 100).unwrap();
    queue.attempt_ended(AccountId(untried));
    assert_eq!(queue.fill(2, None), [2_000]);
}

#[test]
fn accounts_that_failed_in_an_outage_follow_those_that_were_never_tried() {
    let mut queue = RefreshQueue::default();
    queue.add(1, 0, PriorityClass::Untried, None);
    let failed = Schedule { failures: 2, ..schedule(0, PriorityClass::Untried, None) };
    queue.plan(AccountId(2), Some(failed));
    queue.plan(AccountId(3), Some(Schedule { failures: 1, ..failed }));
    assert_eq!(queue.order(1), [1, 3, 2]);
}

#[test]
fn failing_accounts_get_a_share_and_the_rate_goes_to_others_first() {
    let mut queue = RefreshQueue::default();
    for id in 0..100 {
        queue.add(id, 0, PriorityClass::Failing, None);
        queue.add(100 + id, 0, PriorityClass::Untried, None);
        queue.add(200 + id, 0, PriorityClass::Proven, Some(5_000));
    }
    let order = queue.order(0);
    let failing = order[..60].iter().filter(|id| **id < 100).count();
    assert!((5..=20).contains(&failing), "{failing} of the first 60");
    assert_eq!(order.len(), 300);
}

#[test]
fn in_an_outage_one_failing_account_is_tried_at_a_time_and_others_when_they_are_due() {
    let mut queue = RefreshQueue::default();
    for id in 0..5 {
        queue.add(id, 0, PriorityClass::Failing, Some(5_000));
    }
    queue.add(10, 0, PriorityClass::Untried, None);
    queue.add(11, 0, PriorityClass::Proven, Some(5_000));
    assert_eq!(queue.fill(1, Some(30)), [10, 11]);
    assert_eq!(queue.next_start(at(1), limits(), Some(at(30))), Some(at(30)));
    assert_eq!(queue.fill(30, Some(30)), [0]);
    assert_eq!(queue.next_start(at(31), limits(), Some(at(30))), Some(at(4_940)), "one at a time");
    queue.attempt_ended(AccountId(0));
    assert_eq!(queue.fill(31, Some(60)), [0; 0]);
    assert_eq!(queue.fill(60, Some(60)), [1]);
}

#[test]
fn a_canary_is_an_account_that_had_a_token_and_failed_the_fewest_times() {
    let mut queue = RefreshQueue::default();
    for (id, failures, ends) in
        [(1, 1, None), (2, 9, Some(5)), (3, 2, Some(5)), (4, 3, Some(5_000))]
    {
        let schedule = schedule(id, PriorityClass::Failing, ends);
        queue.plan(AccountId(id), Some(Schedule { failures, ..schedule }));
    }
    assert_eq!(queue.order(10), [3, 4, 2, 1]);
}

#[test]
fn in_an_outage_a_live_token_whose_refresh_is_mandatory_does_not_wait_for_a_canary() {
    let mut queue = RefreshQueue::default();
    queue.add(1, 0, PriorityClass::Failing, Some(200));
    let canary = Some(at(1_000));
    assert_eq!(queue.next_start(at(0), limits(), canary), Some(at(140)));
    assert_eq!(queue.fill(139, Some(1_000)), [0; 0]);
    assert_eq!(queue.fill(140, Some(1_000)), [1]);
    queue.attempt_ended(AccountId(1));
    queue.add(1, 150, PriorityClass::Failing, Some(200));
    assert_eq!(queue.next_start(at(160), limits(), canary), Some(at(160)));
    // Once the token has ended, the account waits for a canary again.
    assert_eq!(queue.next_start(at(200), limits(), canary), Some(at(1_000)));
    assert_eq!(queue.next_start(at(1_000), limits(), canary), Some(at(1_000)));
}

proptest! {
    #[test]
    fn each_account_is_taken_once_and_never_before_it_is_due(
        plans in proptest::collection::vec(
            (0_i64..20, 0_i64..100, select(PriorityClass::ALL.to_vec()), option::of(0_i64..200)),
            0..60,
        ),
        looks in proptest::collection::vec(0_i64..100, 0..5),
        now in 0_i64..100,
    ) {
        let mut queue = RefreshQueue::default();
        let mut last = HashMap::new();
        let mut looks = looks.into_iter();
        for (id, due, priority, ends) in plans {
            queue.add(id, due, priority, ends);
            last.insert(id, due);
            // The time may also go back.
            looks.next().map(|second| queue.next_start(at(second), limits(), None));
        }
        let most = last.values().filter(|due| **due <= now).count();
        let mut taken = queue.order(now);
        taken.sort_unstable();
        let early = taken.iter().filter(|id| last[*id] > now).count();
        let mut once = taken.clone();
        once.dedup();
        prop_assert_eq!(&once, &taken);
        prop_assert_eq!(taken.len() - early, most);
        for (id, due) in last {
            prop_assert!(due > now || taken.contains(&id));
        }
    }
}

/// How long an attempt takes that gets no answer.
const TIMEOUT: i64 = 10;

/// Six accounts that never get an answer are tried one after the other over `places`, again one second after each
/// failure. Returns how many seconds account 100 waits, which becomes due at second 35 with `priority` and a token
/// that ends at `ends`.
fn wait_beside_six_without_answer(
    places: usize,
    priority: PriorityClass,
    ends: Option<i64>,
) -> i64 {
    const DUE: i64 = 35;
    let limits = ConcurrencyLimits::new(places);
    let mut queue = RefreshQueue::default();
    for id in 0..6 {
        queue.add(id, 0, PriorityClass::Untried, None);
    }
    queue.add(100, DUE, priority, ends);
    let mut under_way: Vec<(i64, AccountId)> = vec![];
    for second in 0.. {
        for (_, id) in under_way.extract_if(.., |(until, _)| *until <= second) {
            queue.attempt_ended(id);
            queue.add(id.0, second + 1, PriorityClass::Failing, None);
        }
        while let Some(id) = queue.take(at(second), limits, None) {
            if id == AccountId(100) {
                return second - DUE;
            }
            under_way.push((second + TIMEOUT, id));
        }
    }
    unreachable!("the account is tried some day")
}

#[test]
fn accounts_without_an_answer_delay_others_by_few_attempts_however_few_places_there_are() {
    use PriorityClass::{Proven, Untried};
    for (places, proven, untried) in [(1, TIMEOUT, TIMEOUT), (2, TIMEOUT, 0), (3, 0, 0), (8, 0, 0)]
    {
        // Its token ends within a minute.
        let waited = wait_beside_six_without_answer(places, Proven, Some(90));
        assert!(waited <= proven, "proven, {places} places: {waited} s");
        let waited = wait_beside_six_without_answer(places, Untried, None);
        // One more attempt, as each lane is served from time to time.
        assert!(waited <= untried + TIMEOUT, "untried, {places} places: {waited} s");
    }
}
