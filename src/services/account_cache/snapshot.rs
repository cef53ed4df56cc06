//! A snapshot of an account, and how the steps of an attempt change it.
//!
//! The changes mirror what the same step writes into the account's row (`store::leases`,
//! `store::tokens`), so that a caller sees a step's result before the row is loaded again.

use std::{sync::Arc, time::Duration};

use crate::{
    domain::{
        clock::{Timestamp, delta},
        refresh_state::{Account, AccountState, IssueAttempt, RefreshState},
        token::Token,
    },
    store::leases::FailedAttempt,
};

/// An account with its token at one time. A call reads everything that it needs from one snapshot, so that
/// it sees consistent values.
#[derive(Clone, Debug)]
pub struct AccountSnapshot {
    /// The account.
    pub account: Account,
    /// Its attempts to issue tokens.
    pub refresh: RefreshState,
    /// Its last token, live or ended; never one of an earlier login.
    pub token: Option<Arc<Token>>,
    /// Whether the account was deleted. No later snapshot follows then.
    pub removed: bool,
}

impl AccountSnapshot {
    /// Returns the account's state at `now`.
    #[must_use]
    pub fn state(&self, now: Timestamp) -> AccountState {
        let token_ends = self.token.as_ref().map(|token| token.expires_at);
        AccountState::of(&self.account, &self.refresh, token_ends, now)
    }

    /// Returns the token if it may be served at `now`.
    #[must_use]
    pub fn live_token(&self, now: Timestamp) -> Option<&Arc<Token>> {
        self.token.as_ref().filter(|token| token.is_live(now))
    }

    /// Returns the snapshot after `attempt` was started at `now`, under a lease that lasts for `lease`. If
    /// the previous attempt was lost, it may have issued a token, so the stored one is possibly revoked.
    pub(in crate::services) fn with_attempt_started(
        &self,
        attempt: &IssueAttempt,
        previous_attempt_lost: bool,
        now: Timestamp,
        lease: Duration,
    ) -> Self {
        let mut snapshot = self.clone();
        let refresh = &mut snapshot.refresh;
        refresh.attempt_started_at = Some(now);
        refresh.answered_reissue = self.account.reissue_requested_at;
        refresh.attempt_open = true;
        refresh.attempt_version = Some(attempt.credential.version);
        refresh.lease_until = Some(now + delta(lease));
        refresh.possibly_revoked |= previous_attempt_lost;
        snapshot
    }

    /// Returns the snapshot after an attempt that issued `token`; `stored` says whether the token is in the
    /// database. A token of an earlier login changes nothing.
    pub(in crate::services) fn with_token(&self, token: &Arc<Token>, stored: bool) -> Self {
        let mut snapshot = self.clone();
        if !self.account.has_login_of(token.credential_version) {
            return snapshot;
        }
        // Another replica's later token may have been loaded during the attempt.
        if self.token.as_ref().is_none_or(|held| held.generation <= token.generation) {
            snapshot.token = Some(token.clone());
        }
        let refresh = &mut snapshot.refresh;
        if stored {
            refresh.stored_generation = refresh.stored_generation.max(Some(token.generation));
        }
        refresh.lease_until = None;
        refresh.attempt_open = false;
        refresh.possibly_revoked = false;
        refresh.consecutive_failures = 0;
        refresh.next_attempt_at = None;
        // A success with the previous credential must not clear the failure of the current one.
        if token.credential_version == self.account.credential_version {
            refresh.failure = None;
            refresh.new_secret_failures = 0;
            refresh.new_secret_retry_at = None;
            snapshot.account.previous = None;
        }
        snapshot
    }

    /// Returns the snapshot after `attempt` failed at `now`. It keeps its token.
    pub(in crate::services) fn with_failure(
        &self,
        attempt: &IssueAttempt,
        failed: &FailedAttempt,
        now: Timestamp,
    ) -> Self {
        let before_new_secret = self.refresh.new_secret_failures(failed.failure.version);
        let mut snapshot = self.clone();
        let refresh = &mut snapshot.refresh;
        refresh.lease_until = None;
        refresh.attempt_open = false;
        refresh.possibly_revoked |= failed.possibly_revoked;
        let retry_at = failed.retry_after.map(|pause| now + delta(pause));
        if attempt.has_fallback {
            refresh.new_secret_failures = before_new_secret + 1;
            refresh.new_secret_retry_at = retry_at;
        } else {
            refresh.consecutive_failures += 1;
            refresh.next_attempt_at = retry_at;
        }
        if failed.failure.class.suspends() {
            let refused = failed.failure.version;
            snapshot.account.previous.take_if(|previous| previous.version == refused);
        }
        // A failure of the previous credential must not replace the failure of the current one.
        if attempt.uses_current_credential {
            refresh.failure = Some(failed.failure.clone());
        }
        snapshot
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;
    use crate::domain::{
        account::CredentialVersion,
        refresh_state::{AccountCredential, FailureClass, IssueFailure},
        token::Generation,
    };

    fn at(second: i64) -> Timestamp {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
    }

    /// Returns an account that is being rotated from credential 0 to 1. Its token has generation 3.
    fn rotating() -> AccountSnapshot {
        let previous = AccountCredential { version: CredentialVersion(0), secret: vec![0].into() };
        AccountSnapshot {
            account: Account { previous: Some(previous), ..Account::example(1, "acme") },
            refresh: RefreshState {
                stored_generation: Some(Generation(3)),
                ..RefreshState::default()
            },
            token: Some(Arc::new(Token::example(3, 3_600))),
            removed: false,
        }
    }

    fn started(version: i64) -> (AccountSnapshot, IssueAttempt) {
        let before = rotating();
        let attempt = before.account.attempt(CredentialVersion(version), Generation(4)).unwrap();
        let after = before.with_attempt_started(&attempt, false, at(10), Duration::from_mins(1));
        (after, attempt)
    }

    fn failed(class: FailureClass, version: i64) -> FailedAttempt {
        let version = CredentialVersion(version);
        FailedAttempt {
            failure: IssueFailure { class, code: None, message: String::new(), version },
            retry_after: Some(Duration::from_secs(5)),
            possibly_revoked: false,
        }
    }

    #[test]
    fn an_attempt_is_shown_as_open_under_its_lease() {
        let (snapshot, _) = started(1);
        assert!(snapshot.refresh.attempt_open);
        assert_eq!(snapshot.refresh.lease_until, Some(at(70)));
        assert_eq!(snapshot.refresh.attempt_version, Some(CredentialVersion(1)));
        assert_eq!(snapshot.state(at(11)), AccountState::Refreshing);
    }

    #[test]
    fn a_success_with_the_current_credential_ends_the_rotation() {
        let (snapshot, _) = started(1);
        let issued = snapshot.with_token(&Arc::new(Token::example(4, 3_600)), true);
        assert_eq!(issued.token.unwrap().generation, Generation(4));
        assert_eq!(issued.refresh.stored_generation, Some(Generation(4)));
        assert!(issued.account.previous.is_none() && !issued.refresh.attempt_open);
    }

    #[test]
    fn a_token_that_is_not_stored_leaves_the_stored_generation_alone() {
        let (snapshot, _) = started(1);
        let issued = snapshot.with_token(&Arc::new(Token::example(4, 3_600)), false);
        assert_eq!(issued.refresh.stored_generation, Some(Generation(3)));
    }

    #[test]
    fn an_older_token_does_not_displace_a_newer_one() {
        let (snapshot, _) = started(1);
        let issued = snapshot.with_token(&Arc::new(Token::example(2, 3_600)), true);
        assert_eq!(issued.token.unwrap().generation, Generation(3));
        assert_eq!(issued.refresh.stored_generation, Some(Generation(3)));
    }

    #[test]
    fn a_token_that_comes_after_the_account_was_moved_to_another_login_is_not_held() {
        let (mut snapshot, _) = started(1);
        snapshot.account.login_version = CredentialVersion(2);
        snapshot.account.credential_version = CredentialVersion(2);
        snapshot.token = None;
        let late = snapshot.with_token(&Arc::new(Token::example(4, 3_600)), false);
        assert!(late.token.is_none() && late.refresh.attempt_open);
        let of_new_login =
            Token { credential_version: CredentialVersion(2), ..Token::example(5, 3_600) };
        assert!(snapshot.with_token(&Arc::new(of_new_login), true).token.is_some());
    }

    #[test]
    fn a_refused_current_credential_leaves_the_previous_one_in_use() {
        let (snapshot, attempt) = started(1);
        let refused = snapshot.with_failure(&attempt, &failed(FailureClass::Rejected, 1), at(12));
        assert_eq!(refused.state(at(13)), AccountState::Rejected);
        assert!(refused.account.previous.is_some() && refused.token.is_some());
    }

    #[test]
    fn a_failure_of_a_new_secret_leaves_the_pauses_of_the_previous_one_alone() {
        let (snapshot, attempt) = started(1);
        let once = snapshot.with_failure(&attempt, &failed(FailureClass::Malformed, 1), at(12));
        assert_eq!(once.refresh.new_secret_retry_at, Some(at(17)));
        assert_eq!((once.refresh.consecutive_failures, once.refresh.next_attempt_at), (0, None));
        let twice = once.with_failure(&attempt, &failed(FailureClass::Malformed, 1), at(20));
        assert_eq!(twice.refresh.new_secret_failures(CredentialVersion(1)), 2);
        assert_eq!(twice.refresh.new_secret_failures(CredentialVersion(2)), 0);
        // The previous one fails too.
        let (_, previous) = started(0);
        let both = twice.with_failure(&previous, &failed(FailureClass::Unreachable, 0), at(30));
        assert_eq!(
            (both.refresh.consecutive_failures, both.refresh.next_attempt_at),
            (1, Some(at(35)))
        );
        assert_eq!(both.refresh.new_secret_retry_at, Some(at(25)));
        // The new one issues.
        let issued = both.with_token(&Arc::new(Token::example(5, 3_600)), true);
        assert_eq!((issued.refresh.new_secret_retry_at, issued.refresh.failure), (None, None));
    }

    #[test]
    fn a_refused_previous_credential_is_dropped_and_does_not_become_the_accounts_failure() {
        let (snapshot, attempt) = started(0);
        let refused = snapshot.with_failure(&attempt, &failed(FailureClass::Rejected, 0), at(12));
        assert!(refused.account.previous.is_none());
        assert_eq!(refused.refresh.failure, None);
        assert_eq!(refused.refresh.consecutive_failures, 1);
    }
}
