//! Detects an outage of the upstream. If attempts for several accounts in a row fail because of the
//! upstream, the upstream as a whole is assumed to be unavailable.
//!
//! During an outage, only one account at a time is tried, as a canary. When the upstream answers again, all
//! accounts that failed in the outage are due at once, whatever their own pauses are.

use std::time::Duration;

use parking_lot::Mutex;

use crate::domain::{
    account::AccountId,
    clock::{Timestamp, delta},
    refresh_state::FailureClass,
};

/// The number of accounts in a row whose attempts must fail for an outage to begin.
const THRESHOLD: usize = 3;
/// The pause before the first canary; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause between canaries, after which the end of an outage is noticed at the latest.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Whether the upstream is in an outage, judged by the attempts of this replica.
#[derive(Debug, Default)]
pub struct Outage(Mutex<State>);

#[derive(Clone, Debug, Default)]
struct State {
    /// The accounts that failed since the upstream last answered, up to [`THRESHOLD`].
    failed: Vec<AccountId>,
    /// The next canary; `None` if there is no outage.
    canary: Option<Canary>,
    /// When the last outage ended.
    ended_at: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug)]
struct Canary {
    /// When the next canary may be tried.
    not_before: Timestamp,
    /// The pause that follows if this canary fails.
    pause: Duration,
}

/// How the end of an attempt changed the outage.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum OutageChange {
    None,
    Began,
    Ended,
}

impl Outage {
    /// Returns whether the upstream is in an outage.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.lock().canary.is_some()
    }

    /// Returns the upper bound of the pause after a failure during an outage; `None` without an outage. It
    /// ensures that there is an account to try as the next canary.
    pub(super) fn pause_cap(&self) -> Option<Duration> {
        self.is_on().then_some(LONGEST_PAUSE)
    }

    /// Returns the time before which no account may be tried during an outage; `None` without an outage.
    pub(super) fn next_canary(&self) -> Option<Timestamp> {
        self.0.lock().canary.map(|canary| canary.not_before)
    }

    /// Records how an attempt for the account ended at `now`; `failure` is `None` after a success.
    pub(super) fn attempt_ended(
        &self,
        account: AccountId,
        failure: Option<FailureClass>,
        now: Timestamp,
    ) -> OutageChange {
        let mut state = self.0.lock();
        match failure {
            // The upstream was not called.
            Some(FailureClass::Intake) => OutageChange::None,
            Some(class) if class.is_upstream_fault() => state.failed(account, now),
            _ => state.answered(now),
        }
    }

    /// Returns when the last outage ended.
    pub(super) fn ended_at(&self) -> Option<Timestamp> {
        self.0.lock().ended_at
    }
}

impl State {
    fn failed(&mut self, account: AccountId, now: Timestamp) -> OutageChange {
        if let Some(canary) = &mut self.canary {
            canary.not_before = now + delta(canary.pause);
            canary.pause = (canary.pause * 2).min(LONGEST_PAUSE);
            return OutageChange::None;
        }
        if !self.failed.contains(&account) {
            self.failed.push(account);
        }
        if self.failed.len() < THRESHOLD {
            return OutageChange::None;
        }
        self.canary = Some(Canary { not_before: now + delta(FIRST_PAUSE), pause: 2 * FIRST_PAUSE });
        OutageChange::Began
    }

    fn answered(&mut self, now: Timestamp) -> OutageChange {
        self.failed.clear();
        if self.canary.take().is_none() {
            return OutageChange::None;
        }
        self.ended_at = Some(now);
        OutageChange::Ended
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;

    const UNREACHABLE: Option<FailureClass> = Some(FailureClass::Unreachable);

    fn at(second: i64) -> Timestamp {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
    }

    /// Returns an outage that began at second 0, when the third account failed.
    fn outage() -> Outage {
        let outage = Outage::default();
        for account in 1..=2 {
            assert_eq!(
                outage.attempt_ended(AccountId(account), UNREACHABLE, at(0)),
                OutageChange::None
            );
        }
        assert!(!outage.is_on());
        assert_eq!(outage.attempt_ended(AccountId(3), UNREACHABLE, at(0)), OutageChange::Began);
        outage
    }

    #[test]
    fn three_failing_accounts_in_a_row_make_an_outage_and_one_does_not() {
        assert!(outage().is_on());
        let one = Outage::default();
        for second in 0..10 {
            assert_eq!(
                one.attempt_ended(AccountId(1), UNREACHABLE, at(second)),
                OutageChange::None
            );
        }
        assert_eq!(one.attempt_ended(AccountId(2), UNREACHABLE, at(11)), OutageChange::None);
        assert_eq!(one.attempt_ended(AccountId(4), None, at(12)), OutageChange::None);
        assert_eq!(one.attempt_ended(AccountId(3), UNREACHABLE, at(13)), OutageChange::None);
        assert!(!one.is_on());
    }

    #[test]
    fn canaries_are_tried_after_pauses_that_double_up_to_half_a_minute() {
        let outage = outage();
        let mut pauses = Vec::new();
        let mut now = at(0);
        for account in 0..7 {
            let next = outage.next_canary().unwrap();
            pauses.push((next - now).num_seconds());
            now = next;
            outage.attempt_ended(AccountId(account), Some(FailureClass::Malformed), now);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
    }

    #[test]
    fn any_answer_of_the_upstream_ends_an_outage_even_a_refusal() {
        for answer in [
            None,
            Some(FailureClass::Rejected),
            Some(FailureClass::EgressRejected),
            Some(FailureClass::RateLimited),
        ] {
            let outage = outage();
            assert_eq!(
                outage.attempt_ended(AccountId(1), Some(FailureClass::Intake), at(1)),
                OutageChange::None
            );
            assert_eq!(outage.attempt_ended(AccountId(1), answer, at(2)), OutageChange::Ended);
            assert!(!outage.is_on());
            assert_eq!(outage.next_canary(), None);
            assert_eq!(outage.attempt_ended(AccountId(1), UNREACHABLE, at(3)), OutageChange::None);
        }
    }

    #[test]
    fn the_end_of_an_outage_is_remembered() {
        let outage = outage();
        assert_eq!(outage.ended_at(), None);
        outage.attempt_ended(AccountId(1), None, at(10));
        assert_eq!(outage.ended_at(), Some(at(10)));
        outage.attempt_ended(AccountId(2), None, at(20));
        assert_eq!(outage.ended_at(), Some(at(10)));
    }
}
