//! When to issue next: pure functions of a token's times, the account's name and the failures so
//! far. Jitter is derived from the name, not drawn, so that looking twice does not drift.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use chrono::DateTime;

use crate::domain::{
    account::AccountName,
    clock::{Timestamp, delta},
    refresh_state::{Account, RefreshState},
    token::Token,
};

/// How far an account's refresh may lie from [`RefreshPolicy::refresh_at`], as a share of the token's life.
pub const JITTER: f64 = 0.05;
/// A token with less left than this share of its life is urgent.
const URGENT_SHARE: f64 = 0.10;
/// And never more than this before its end.
const URGENT_AT_MOST: Duration = Duration::from_mins(1);
/// The first pause after a failure that may pass by itself; it doubles with each further one.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_RETRY: Duration = Duration::from_mins(5);
/// How often a refused address is tried again: seldom, since each try may count against the account.
const PROBE: Duration = Duration::from_mins(15);

/// A moment that has always passed.
const AT_ONCE: Timestamp = DateTime::UNIX_EPOCH;

/// The settings that decide when to issue.
#[derive(Clone, Copy, Debug)]
pub struct RefreshPolicy {
    /// The share of a token's life after which it is replaced.
    pub refresh_at: f64,
    /// The least time between two issues of one account.
    pub min_issue_interval: Duration,
}

impl RefreshPolicy {
    /// When `token` is to be replaced: at [`RefreshPolicy::refresh_at`] of its life, ± 5 % of that life as
    /// the account's name decides.
    #[must_use]
    pub fn refresh_due(&self, account: &AccountName, token: &Token) -> Timestamp {
        token.at_share(self.refresh_at + (spread(account, "refresh") - 0.5) * 2.0 * JITTER)
    }

    /// When the next issue for an account is due; a moment in the past means now, `None` means not
    /// until something changes: the account is disabled, has no sealed secret, or its credential is
    /// refused and there is none before it.
    ///
    /// The database has the last word when the right to issue is claimed.
    #[must_use]
    pub fn next_attempt(
        &self,
        account: &Account,
        progress: &RefreshState,
        token: Option<&Token>,
    ) -> Option<Timestamp> {
        let failure = progress.current_failure(account.credential_version);
        let asked = account.wants_reissue(progress);
        let usable = account.usable_credential(progress).filter(|_| account.enabled)?;
        let untried = usable.version == account.credential_version
            && progress.attempt_version != Some(usable.version);
        let scheduled = token.map_or(AT_ONCE, |token| self.refresh_due(&account.name, token));
        // An attempt without an end is made up for once its lease has run out.
        let due = if asked || untried || progress.is_doubtful() { AT_ONCE } else { scheduled };
        let retry = progress.next_attempt_at.filter(|_| failure.is_some() && !asked && !untried);
        let floor = progress
            .attempt_started_at
            .filter(|_| !untried)
            .map(|started| started + delta(self.min_issue_interval));
        [retry, floor, progress.lease_until].into_iter().flatten().fold(due, Timestamp::max).into()
    }

    /// The moment from which the replacement of `token` cannot be put off: the last 10 % of its
    /// life, at most its last minute; at once where there is none or it may be dead.
    #[must_use]
    pub fn urgent_from(progress: &RefreshState, token: Option<&Token>) -> Timestamp {
        token.filter(|_| !progress.is_doubtful()).map_or(AT_ONCE, |token| {
            token.expires_at - delta(token.life().mul_f64(URGENT_SHARE).min(URGENT_AT_MOST))
        })
    }

    /// What a caller may demand at most as the rest of a token's life: what one always has left
    /// before its replacement is due. More would force an issue on everyone at each call.
    #[must_use]
    pub fn longest_min_ttl(&self, token: &Token) -> Duration {
        token.life().mul_f64((1.0 - self.refresh_at - JITTER).max(0.0))
    }

    /// How long to wait after the `failures`-th failure in a row of a kind that may pass by itself.
    /// Doubles from one second to five minutes, spread over half of that by the account's name, and
    /// is never below the floor between issues.
    #[must_use]
    pub fn retry_after(&self, account: &AccountName, failures: u32) -> Duration {
        let doubled =
            FIRST_RETRY.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST_RETRY);
        let jitter = spread(account, &failures.to_string());
        doubled.mul_f64(0.5 + jitter / 2.0).max(self.min_issue_interval)
    }

    /// How long to wait before the next try from an address or for an account that the upstream
    /// refuses.
    #[must_use]
    pub fn probe_after(&self, account: &AccountName) -> Duration {
        PROBE.mul_f64(0.75 + spread(account, "probe") / 2.0).max(self.min_issue_interval)
    }
}

/// A number in 0..1 that depends on `account` and `purpose` alone.
fn spread(account: &AccountName, purpose: &str) -> f64 {
    // DefaultHasher::new() has fixed keys: every replica of a version finds the same number.
    let mut hasher = DefaultHasher::new();
    (account.as_str(), purpose).hash(&mut hasher);
    #[expect(clippy::cast_precision_loss, reason = "53 bits are taken, and 53 bits are exact")]
    let number = (hasher.finish() >> 11) as f64 / (1_u64 << 53) as f64;
    number
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use proptest::prelude::*;

    use super::*;
    use crate::domain::{
        account::CredentialVersion,
        refresh_state::{AccountCredential, FailureClass, IssueFailure},
    };

    const POLICY: RefreshPolicy =
        RefreshPolicy { refresh_at: 0.75, min_issue_interval: Duration::from_secs(30) };

    fn previous() -> AccountCredential {
        AccountCredential { version: CredentialVersion(0), secret: vec![0].into() }
    }

    fn token(life: i64) -> Token {
        Token::example(1, life)
    }

    fn at(second: i64) -> Timestamp {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
    }

    fn account() -> Account {
        Account::example(1, "acme")
    }

    /// Tried once, with credential 1, at the second 0.
    fn tried() -> RefreshState {
        RefreshState {
            attempt_started_at: Some(at(0)),
            attempt_version: Some(CredentialVersion(1)),
            ..RefreshState::default()
        }
    }

    fn failed(class: FailureClass, next_attempt_at: Option<Timestamp>) -> RefreshState {
        let failure = IssueFailure {
            class,
            code: None,
            message: String::new(),
            version: CredentialVersion(1),
        };
        RefreshState { failure: Some(failure), next_attempt_at, ..tried() }
    }

    #[test]
    fn an_account_without_a_token_is_issued_for_at_once() {
        let due = POLICY.next_attempt(&account(), &RefreshState::default(), None);
        assert_eq!(due, Some(at(0)));
    }

    #[test]
    fn a_token_is_replaced_when_it_is_due() {
        let token = token(3_600);
        let due = POLICY.next_attempt(&account(), &tried(), Some(&token));
        assert_eq!(due, Some(POLICY.refresh_due(&account().name, &token)));
    }

    #[test]
    fn a_disabled_or_unsealed_account_waits_for_a_change() {
        let disabled = Account { enabled: false, ..account() };
        assert_eq!(POLICY.next_attempt(&disabled, &tried(), None), None);
        let unsealed = Account { secret: None, ..account() };
        assert_eq!(POLICY.next_attempt(&unsealed, &RefreshState::default(), None), None);
    }

    #[test]
    fn a_suspect_token_is_replaced_at_the_floor() {
        let suspect = RefreshState { suspect: true, ..tried() };
        assert_eq!(POLICY.next_attempt(&account(), &suspect, Some(&token(3_600))), Some(at(30)));
    }

    #[test]
    fn an_attempt_without_an_end_is_made_up_for_after_its_lease() {
        let lost = RefreshState { attempt_open: true, lease_until: Some(at(40)), ..tried() };
        assert_eq!(POLICY.next_attempt(&account(), &lost, Some(&token(3_600))), Some(at(40)));
    }

    #[test]
    fn a_refused_credential_waits_for_its_change_or_an_admin() {
        let parked = failed(FailureClass::Rejected, None);
        assert_eq!(POLICY.next_attempt(&account(), &parked, None), None);
        let changed = Account { credential_version: CredentialVersion(2), ..account() };
        assert_eq!(POLICY.next_attempt(&changed, &parked, None), Some(at(0)));
        let asked = Account { reissue_requested_at: Some(at(1)), ..account() };
        assert_eq!(POLICY.next_attempt(&asked, &parked, None), Some(at(30)));
    }

    #[test]
    fn a_refused_rotation_leaves_the_old_schedule_in_place() {
        let rotated = Account { previous: Some(previous()), ..account() };
        let parked = failed(FailureClass::Rejected, None);
        let token = token(3_600);
        let due = POLICY.next_attempt(&rotated, &parked, Some(&token));
        assert_eq!(due, Some(POLICY.refresh_due(&rotated.name, &token)));
    }

    #[test]
    fn a_failure_that_may_pass_is_waited_out() {
        let failing = failed(FailureClass::Unreachable, Some(at(120)));
        assert_eq!(POLICY.next_attempt(&account(), &failing, None), Some(at(120)));
    }

    #[test]
    fn another_replicas_lease_is_waited_for() {
        let leased = RefreshState { lease_until: Some(at(99)), ..tried() };
        assert_eq!(POLICY.next_attempt(&account(), &leased, None), Some(at(99)));
    }

    #[test]
    fn tokens_of_one_issue_are_replaced_over_a_tenth_of_their_life() {
        let token = token(3_600);
        let due: Vec<_> = (0..2_000)
            .map(|n| POLICY.refresh_due(&format!("account-{n}").parse().unwrap(), &token))
            .collect();
        let (first, last) = (due.iter().min().unwrap(), due.iter().max().unwrap());
        assert!((2_520..2_530).contains(&first.timestamp()), "{first}");
        assert!((2_870..=2_880).contains(&last.timestamp()), "{last}");
        // Peak over mean of the refreshes in a twentieth of the window: even enough for promise 11.
        let mut slots = [0; 20];
        for at in &due {
            slots[usize::try_from((at.timestamp() - 2_520) / 18).unwrap().min(19)] += 1;
        }
        assert!(slots.iter().all(|n| *n <= 200), "{slots:?}");
    }

    #[test]
    fn the_last_tenth_is_urgent_but_at_most_a_minute() {
        let urgent =
            |token: Option<&Token>| RefreshPolicy::urgent_from(&tried(), token).timestamp();
        assert_eq!(urgent(Some(&token(3_600))), 3_540);
        assert_eq!(urgent(Some(&token(100))), 90);
        assert_eq!(urgent(None), 0);
        let doubtful = RefreshState { suspect: true, ..tried() };
        assert_eq!(RefreshPolicy::urgent_from(&doubtful, Some(&token(100))).timestamp(), 0);
    }

    #[test]
    fn retries_double_up_to_five_minutes_and_keep_the_floor() {
        let name = "acme".parse().unwrap();
        let free = RefreshPolicy { min_issue_interval: Duration::ZERO, ..POLICY };
        assert!(free.retry_after(&name, 1) <= Duration::from_secs(1));
        assert!(free.retry_after(&name, 4) >= Duration::from_secs(4));
        assert!(free.retry_after(&name, u32::MAX) <= Duration::from_mins(5));
        assert_eq!(POLICY.retry_after(&name, 1), Duration::from_secs(30));
    }

    proptest! {
        #[test]
        fn a_replacement_is_due_in_life_and_before_it_is_urgent(
            name in "[a-z0-9][a-z0-9._-]{0,62}", life in 10_i64..100_000,
        ) {
            let (name, token) = (name.parse().unwrap(), token(life));
            let due = POLICY.refresh_due(&name, &token);
            prop_assert!(due > token.issued_at);
            prop_assert!(due < RefreshPolicy::urgent_from(&RefreshState::default(), Some(&token)));
            prop_assert!(token.time_left(due) >= POLICY.longest_min_ttl(&token));
            prop_assert_eq!(due, POLICY.refresh_due(&name, &token));
        }
    }
}
