//! Many accounts that fail alike are one state of the upstream, not as many states of accounts.
//!
//! While it lasts, one account at a time is tried, a canary. When the upstream answers again, all
//! that failed meanwhile are due at once: none waits for the end of a pause that was for the outage.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::domain::{
    account::AccountId,
    clock::{Timestamp, delta},
    refresh_state::{FailureClass, RefreshState},
};

/// How many accounts in a row must fail alike.
const ALIKE: usize = 3;
/// The first pause between two canaries; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest such pause: how late the end of an outage is noticed.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Whether the upstream answers at all, as the attempts of this replica have it.
#[derive(Debug, Default)]
pub struct Outage(Mutex<State>);

#[derive(Clone, Debug, Default)]
struct State {
    /// The accounts that failed since the upstream answered last, up to [`ALIKE`].
    failed: Vec<AccountId>,
    /// While it lasts.
    on: Option<On>,
    /// When the last one was over.
    over_at: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug)]
struct On {
    pause: Duration,
    next_canary: Timestamp,
}

/// What an attempt's end changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Change {
    None,
    Began,
    Ended,
}

/// Whether a failure of this class is the upstream's own.
fn is_upstreams(class: FailureClass) -> bool {
    matches!(class, FailureClass::Unreachable | FailureClass::Malformed)
}

impl Outage {
    /// Whether the upstream is away.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.state().on.is_some()
    }

    /// The pause after a failure whose account alone would wait for `pause`: while the upstream is away
    /// any account may be the next canary.
    pub(super) fn pause(&self, pause: Duration) -> Duration {
        if self.is_on() { pause.min(LONGEST_PAUSE) } else { pause }
    }

    /// Before when no account may be tried.
    pub(super) fn next_canary(&self) -> Option<Timestamp> {
        self.state().on.map(|on| on.next_canary)
    }

    /// Takes how an attempt for `account` ended.
    pub(super) fn ended(
        &self,
        account: AccountId,
        failure: Option<FailureClass>,
        now: Timestamp,
    ) -> Change {
        let mut state = self.state();
        match failure {
            // The upstream was not called.
            Some(FailureClass::Intake) => Change::None,
            Some(class) if is_upstreams(class) => state.failed(account, now),
            _ => state.answered(now),
        }
    }

    /// When the last outage ended.
    pub(super) fn over_at(&self) -> Option<Timestamp> {
        self.state().over_at
    }

    /// How long ago the outage ended that `progress` waits for, if it waits for one.
    pub(super) fn is_over_for(&self, progress: &RefreshState, now: Timestamp) -> Option<Duration> {
        let over_at = self.state().over_at?;
        let failed = progress.failure.as_ref().is_some_and(|it| is_upstreams(it.class));
        let before = progress.attempt_started_at.is_some_and(|started| started < over_at);
        (failed && before).then(|| (now - over_at).to_std().unwrap_or_default())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn failed(&mut self, account: AccountId, now: Timestamp) -> Change {
        if let Some(on) = &mut self.on {
            on.next_canary = now + delta(on.pause);
            on.pause = (on.pause * 2).min(LONGEST_PAUSE);
            return Change::None;
        }
        if !self.failed.contains(&account) {
            self.failed.push(account);
        }
        if self.failed.len() < ALIKE {
            return Change::None;
        }
        self.on = Some(On { pause: 2 * FIRST_PAUSE, next_canary: now + delta(FIRST_PAUSE) });
        Change::Began
    }

    fn answered(&mut self, now: Timestamp) -> Change {
        self.failed.clear();
        if self.on.take().is_none() {
            return Change::None;
        }
        self.over_at = Some(now);
        Change::Ended
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;
    use crate::domain::{account::CredentialVersion, refresh_state::IssueFailure};

    const UNREACHABLE: Option<FailureClass> = Some(FailureClass::Unreachable);

    fn at(second: i64) -> Timestamp {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
    }

    fn failing(class: FailureClass, started: i64) -> RefreshState {
        let failure = IssueFailure {
            class,
            code: None,
            message: String::new(),
            version: CredentialVersion(1),
        };
        RefreshState {
            failure: Some(failure),
            attempt_started_at: Some(at(started)),
            next_attempt_at: Some(at(1_000)),
            ..RefreshState::default()
        }
    }

    /// Three accounts have failed alike at the second 0.
    fn outage() -> Outage {
        let outage = Outage::default();
        for account in 1..=2 {
            assert_eq!(outage.ended(AccountId(account), UNREACHABLE, at(0)), Change::None);
        }
        assert!(!outage.is_on());
        assert_eq!(outage.ended(AccountId(3), UNREACHABLE, at(0)), Change::Began);
        outage
    }

    #[test]
    fn three_accounts_in_a_row_make_an_outage_and_one_alone_never_does() {
        assert!(outage().is_on());
        let one = Outage::default();
        for second in 0..10 {
            assert_eq!(one.ended(AccountId(1), UNREACHABLE, at(second)), Change::None);
        }
        assert_eq!(one.ended(AccountId(2), UNREACHABLE, at(11)), Change::None);
        assert_eq!(one.ended(AccountId(4), None, at(12)), Change::None);
        assert_eq!(one.ended(AccountId(3), UNREACHABLE, at(13)), Change::None);
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
            outage.ended(AccountId(account), Some(FailureClass::Malformed), now);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
    }

    #[test]
    fn any_answer_of_the_upstream_ends_it_be_it_a_refusal() {
        for answer in [
            None,
            Some(FailureClass::Rejected),
            Some(FailureClass::EgressRejected),
            Some(FailureClass::RateLimited),
        ] {
            let outage = outage();
            assert_eq!(outage.ended(AccountId(1), Some(FailureClass::Intake), at(1)), Change::None);
            assert_eq!(outage.ended(AccountId(1), answer, at(2)), Change::Ended);
            assert!(!outage.is_on());
            assert_eq!(outage.next_canary(), None);
            assert_eq!(outage.ended(AccountId(1), UNREACHABLE, at(3)), Change::None);
        }
    }

    #[test]
    fn who_failed_before_its_end_need_not_wait_any_longer() {
        let outage = outage();
        let failed = failing(FailureClass::Unreachable, 5);
        assert_eq!(outage.is_over_for(&failed, at(9)), None);
        outage.ended(AccountId(1), None, at(10));
        let ago = outage.is_over_for(&failed, at(12));
        assert_eq!(ago, Some(Duration::from_secs(2)));
        assert_eq!(outage.is_over_for(&failing(FailureClass::Unreachable, 11), at(12)), None);
        assert_eq!(outage.is_over_for(&failing(FailureClass::EgressRejected, 5), at(12)), None);
    }
}
