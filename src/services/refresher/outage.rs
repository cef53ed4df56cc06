//! Detects an outage of the upstream: several accounts in a row fail for a cause that may be the same for
//! all of them, such as no answer, an answer that is not the upstream's own, or a refusal of the address.
//!
//! Only an account that did not fail before is evidence of an outage. Accounts that go on failing say
//! nothing about others. For the same reason, an outage delays only accounts that failed: of them, one at a
//! time is tried, as a canary. Others are tried when they are due. When the upstream answers again, all
//! accounts that failed in the outage are due at once, whatever their own pauses are.
//!
//! Those that then fail again may fail for causes of their own, among accounts for which the upstream works. If
//! they were evidence too, each answer to another account would end an outage that they made, and make them due
//! again. So they are evidence only while most accounts fail.

use std::time::Duration;

use parking_lot::Mutex;

use crate::domain::{
    account::AccountId,
    attempt_priority::PriorityClass,
    clock::{Timestamp, delta},
    refresh_state::FailureClass,
};

/// The number of accounts in a row whose attempts must fail for an outage to begin.
const THRESHOLD: usize = 3;
/// The pause before the first canary; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause between canaries, after which the end of an outage is noticed at the latest.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The longest pause between canaries while the upstream refuses the accounts or the address, since each
/// attempt may count towards a lock of the account.
const LONGEST_REFUSAL_PAUSE: Duration = Duration::from_mins(5);

/// What an account's earlier attempts say about the cause of a failure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum AttemptHistory {
    /// The last attempt succeeded, or the account or its credential is new.
    Sound,
    /// The last attempts failed in an outage that has ended, which does not count.
    Forgiven,
    /// The account goes on failing.
    Failing,
}

impl AttemptHistory {
    /// Returns the history of an account before an attempt of this class, after `failures` in a row.
    pub(super) fn of(priority: PriorityClass, failures: u32) -> Self {
        match (priority, failures) {
            (PriorityClass::Failing, _) => Self::Failing,
            (_, 0) => Self::Sound,
            _ => Self::Forgiven,
        }
    }
}

/// The accounts that fail, among all.
#[derive(Clone, Debug)]
pub(super) struct FailingAccounts {
    /// The class of each transient failure.
    pub(super) classes: Vec<FailureClass>,
    /// The number of all accounts.
    pub(super) of: usize,
}

impl FailingAccounts {
    fn are_most(&self) -> bool {
        self.classes.len() * 2 > self.of
    }
}

/// Whether the upstream is in an outage, judged by the attempts of this replica.
#[derive(Debug, Default)]
pub struct Outage(Mutex<State>);

#[derive(Clone, Debug, Default)]
struct State {
    /// The accounts whose failures since the upstream last answered are evidence, up to [`THRESHOLD`].
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
    /// The longest pause, by the last failure.
    longest_pause: Duration,
}

impl Canary {
    /// Returns the first canary of an outage.
    fn first(class: FailureClass, not_before: Timestamp) -> Self {
        Self { not_before, pause: 2 * FIRST_PAUSE, longest_pause: longest_pause(class) }
    }
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
        self.0.lock().canary.map(|canary| canary.longest_pause)
    }

    /// Returns the time before which no account that failed may be tried during an outage; `None` without an
    /// outage.
    pub(super) fn next_canary(&self) -> Option<Timestamp> {
        self.0.lock().canary.map(|canary| canary.not_before)
    }

    /// Begins with the outage that an earlier process left, if most accounts fail at the start.
    pub(super) fn resume(&self, failing: &FailingAccounts, now: Timestamp) {
        if failing.classes.len() >= THRESHOLD && failing.are_most() {
            self.0.lock().canary = failing.classes.first().map(|class| Canary::first(*class, now));
        }
    }

    /// Records how an attempt for the account ended at `now`. `history` is that before the attempt, and
    /// `failure` is `None` after a success. `failing` counts the accounts that fail.
    pub(super) fn attempt_ended(
        &self,
        account: AccountId,
        history: AttemptHistory,
        failure: Option<FailureClass>,
        failing: impl FnOnce() -> FailingAccounts,
        now: Timestamp,
    ) -> OutageChange {
        // Counted without the lock, since it takes a while with many accounts.
        let is_evidence = match history {
            AttemptHistory::Sound => true,
            AttemptHistory::Forgiven => failure.is_some() && !self.is_on() && failing().are_most(),
            AttemptHistory::Failing => false,
        };
        let mut state = self.0.lock();
        match failure {
            // The upstream was not called.
            Some(FailureClass::Intake) => OutageChange::None,
            Some(class) if class.is_transient() => {
                if history == AttemptHistory::Failing {
                    state.canary_failed(class, now);
                }
                if is_evidence { state.failed(account, class, now) } else { OutageChange::None }
            }
            _ => state.answered(now),
        }
    }

    /// Returns when the last outage ended.
    pub(super) fn ended_at(&self) -> Option<Timestamp> {
        self.0.lock().ended_at
    }
}

impl State {
    fn canary_failed(&mut self, class: FailureClass, now: Timestamp) {
        let Some(canary) = &mut self.canary else { return };
        canary.not_before = now + delta(canary.pause);
        canary.longest_pause = longest_pause(class);
        canary.pause = (canary.pause * 2).min(canary.longest_pause);
    }

    /// Records a failure that is evidence of an outage.
    fn failed(&mut self, account: AccountId, class: FailureClass, now: Timestamp) -> OutageChange {
        if self.canary.is_some() {
            return OutageChange::None;
        }
        if !self.failed.contains(&account) {
            self.failed.push(account);
        }
        if self.failed.len() < THRESHOLD {
            return OutageChange::None;
        }
        self.canary = Some(Canary::first(class, now + delta(FIRST_PAUSE)));
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

fn longest_pause(class: FailureClass) -> Duration {
    match class {
        FailureClass::EgressRejected => LONGEST_REFUSAL_PAUSE,
        _ => LONGEST_PAUSE,
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};
    use proptest::{prelude::*, sample::select};

    use super::*;

    const UNREACHABLE: Option<FailureClass> = Some(FailureClass::Unreachable);

    fn at(second: i64) -> Timestamp {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
    }

    fn transient() -> Vec<FailureClass> {
        FailureClass::ALL.into_iter().filter(|class| class.is_transient()).collect()
    }

    impl Outage {
        /// Ends an attempt while few accounts fail.
        fn ended(
            &self,
            account: i64,
            history: AttemptHistory,
            failure: Option<FailureClass>,
            second: i64,
        ) -> OutageChange {
            self.ended_beside(failing(1, 10), account, history, failure, second)
        }

        fn ended_beside(
            &self,
            failing: FailingAccounts,
            account: i64,
            history: AttemptHistory,
            failure: Option<FailureClass>,
            second: i64,
        ) -> OutageChange {
            self.attempt_ended(AccountId(account), history, failure, || failing, at(second))
        }
    }

    fn failing(number: usize, of: usize) -> FailingAccounts {
        FailingAccounts { classes: vec![FailureClass::Unreachable; number], of }
    }

    /// Returns an outage that began at second 0, when the third account failed.
    fn outage(class: FailureClass) -> Outage {
        let outage = Outage::default();
        for account in [1, 2] {
            assert_eq!(
                outage.ended(account, AttemptHistory::Sound, Some(class), 0),
                OutageChange::None
            );
        }
        assert!(!outage.is_on());
        let third = outage.ended(3, AttemptHistory::Sound, Some(class), 0);
        assert_eq!(third, OutageChange::Began);
        outage
    }

    #[test]
    fn three_accounts_in_a_row_that_fail_for_the_first_time_make_an_outage_whatever_the_failure() {
        for class in transient() {
            assert!(outage(class).is_on(), "{class}");
        }
        let one = Outage::default();
        for (account, failure) in [(1, UNREACHABLE), (1, UNREACHABLE), (2, UNREACHABLE), (4, None)]
        {
            let change = one.ended(account, AttemptHistory::Sound, failure, 0);
            assert_eq!(change, OutageChange::None);
        }
        assert_eq!(one.ended(3, AttemptHistory::Sound, UNREACHABLE, 1), OutageChange::None);
        assert!(!one.is_on());
    }

    #[test]
    fn canaries_are_tried_after_pauses_that_double_up_to_half_a_minute_or_five_after_refusals() {
        for (class, expected) in [
            (FailureClass::Malformed, [1, 2, 4, 8, 16, 30, 30, 30, 30, 30]),
            (FailureClass::EgressRejected, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]),
        ] {
            let outage = outage(class);
            let mut pauses = Vec::new();
            let mut now = at(0);
            for account in 0..10 {
                let next = outage.next_canary().unwrap();
                pauses.push((next - now).num_seconds());
                now = next;
                let second = now.timestamp();
                let _ = outage.ended(account, AttemptHistory::Failing, Some(class), second);
            }
            assert_eq!(pauses, expected);
        }
    }

    #[test]
    fn an_outage_ends_with_a_token_or_a_judgement_of_a_credential() {
        for answer in [None, Some(FailureClass::Rejected)] {
            let outage = outage(FailureClass::Unreachable);
            let failing = AttemptHistory::Failing;
            let intake = outage.ended(1, failing, Some(FailureClass::Intake), 1);
            assert_eq!(intake, OutageChange::None);
            assert_eq!(outage.ended(1, failing, answer, 2), OutageChange::Ended);
            assert!(!outage.is_on());
            assert_eq!(outage.next_canary(), None);
            assert_eq!(outage.ended_at(), Some(at(2)));
            assert_eq!(outage.ended(1, failing, UNREACHABLE, 3), OutageChange::None);
            assert_eq!(outage.ended(1, failing, None, 20), OutageChange::None);
            assert_eq!(outage.ended_at(), Some(at(2)));
        }
    }

    #[test]
    fn a_start_continues_an_outage_if_most_accounts_fail() {
        for (number, accounts, expected) in
            [(2, 2, false), (3, 5, true), (3, 6, false), (0, 0, false)]
        {
            let outage = Outage::default();
            outage.resume(&failing(number, accounts), at(9));
            assert_eq!(outage.is_on(), expected, "{number} of {accounts}");
            assert_eq!(outage.next_canary(), expected.then_some(at(9)));
        }
    }

    #[test]
    fn accounts_that_fail_again_after_an_outage_make_another_one_only_if_most_accounts_fail() {
        for (fails, of, expected) in [(5, 10, OutageChange::None), (6, 10, OutageChange::Began)] {
            let outage = outage(FailureClass::Unreachable);
            assert_eq!(outage.ended(9, AttemptHistory::Sound, None, 1), OutageChange::Ended);
            let again = |account| {
                let beside = failing(fails, of);
                outage.ended_beside(beside, account, AttemptHistory::Forgiven, UNREACHABLE, 2)
            };
            assert_eq!([again(1), again(2)], [OutageChange::None; 2]);
            assert_eq!(again(3), expected, "{fails} of {of} fail");
        }
    }

    #[test]
    fn an_account_is_sound_until_it_fails_and_forgiven_until_it_fails_after_the_outage() {
        use PriorityClass::{Failing, Proven, Untried};
        for (priority, failures, expected) in [
            (Proven, 0, AttemptHistory::Sound),
            (Untried, 0, AttemptHistory::Sound),
            (Proven, 1, AttemptHistory::Forgiven),
            (Untried, 7, AttemptHistory::Forgiven),
            (Failing, 0, AttemptHistory::Failing),
            (Failing, 1, AttemptHistory::Failing),
        ] {
            assert_eq!(AttemptHistory::of(priority, failures), expected);
        }
    }

    proptest! {
        /// However many accounts go on failing, in whatever way and order, they never make an outage.
        #[test]
        fn accounts_that_failed_before_never_make_an_outage(
            attempts in proptest::collection::vec((0_i64..100, select(transient())), 0..300),
        ) {
            let outage = Outage::default();
            for (account, class) in attempts {
                let change = outage.ended(account, AttemptHistory::Failing, Some(class), account);
                prop_assert_eq!(change, OutageChange::None);
                prop_assert!(!outage.is_on());
            }
        }
    }
}
