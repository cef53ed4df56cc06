//! An account with its attempts to issue tokens, and the state derived from both that admins and callers
//! see.

use std::{str::FromStr, time::Duration};

use crate::domain::{
    account::{AccountId, AccountName, ClientId, CredentialVersion, InvalidValue},
    clock::{Timestamp, delta},
    named_enum::named_enum,
    secret::SealedSecret,
    token::Generation,
};

named_enum! {
    /// The kind of failure of an attempt to issue, which decides whether and when it is retried.
    ///
    /// The names are stored in `refreshes.error_class`; the view `account_status` compares with them.
    pub enum FailureClass {
        /// The upstream refuses the credential. The account is suspended until its credential
        /// changes: a login that fails too often is locked.
        Rejected = "rejected",
        /// The stored secret does not open with the keyring. The account is suspended until its
        /// credential changes; the upstream is not called.
        Intake = "intake",
        /// The upstream refuses the account or the address that it is called from. Retried after
        /// pauses that grow to about 15 minutes.
        EgressRejected = "egress_rejected",
        /// The upstream asks for fewer calls, and may say for how long.
        RateLimited = "rate_limited",
        /// The upstream does not answer, or reports a failure of its own.
        Unreachable = "unreachable",
        /// The upstream's answer is neither a token nor a known error.
        Malformed = "malformed",
    }
}

impl FailureClass {
    /// Returns the outcome for the audit log: the gRPC status that a call would end with.
    #[must_use]
    pub fn outcome(self) -> &'static str {
        if self.suspends() || self == Self::EgressRejected {
            "failed_precondition"
        } else {
            "unavailable"
        }
    }

    /// Returns whether the failure suspends the account: no attempt is made until the credential changes
    /// or an admin requests a new token.
    #[must_use]
    pub fn suspends(self) -> bool {
        matches!(self, Self::Rejected | Self::Intake)
    }

    /// Returns whether the cause may lie outside the account, so that it may be the same for several
    /// accounts, and may pass without a change of the account.
    #[must_use]
    pub fn is_transient(self) -> bool {
        !self.suspends()
    }
}

impl FromStr for FailureClass {
    type Err = InvalidValue;

    fn from_str(name: &str) -> Result<Self, InvalidValue> {
        Self::ALL
            .into_iter()
            .find(|class| class.as_str() == name)
            .ok_or(InvalidValue::Unknown("failure class", "a class that this release knows"))
    }
}

/// A failed issue, as it is stored and shown to admins.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IssueFailure {
    /// The kind of failure, which decides what is retried and when.
    pub class: FailureClass,
    /// The upstream's code, such as `61006`.
    pub code: Option<String>,
    /// A description in the broker's words. It never quotes the upstream, whose answer may echo
    /// the secret.
    pub message: String,
    /// The version of the credential that the attempt used.
    pub version: CredentialVersion,
}

/// A credential with its sealed secret.
#[derive(Clone, Debug)]
pub struct AccountCredential {
    /// The version that the sealed secret is bound to.
    pub version: CredentialVersion,
    /// The secret, sealed to the account and the version.
    pub secret: SealedSecret,
}

/// One attempt to issue a token: the account, the credential, and the generation of the result.
#[derive(Clone, Debug)]
pub struct IssueAttempt {
    /// The account to issue for.
    pub account: AccountId,
    /// The account's login at the upstream.
    pub client_id: ClientId,
    /// The credential to issue with.
    pub credential: AccountCredential,
    /// Whether `credential` is the account's current one. The previous one is used while the current one
    /// has not issued a token, because it is not sealed yet or because it failed.
    pub uses_current_credential: bool,
    /// Whether `credential` is the current one and the previous one is kept, which goes on issuing if this
    /// attempt fails.
    pub has_fallback: bool,
    /// The generation that the new token gets.
    pub generation: Generation,
}

/// An account, as it is stored in the database.
#[derive(Clone, Debug)]
pub struct Account {
    /// The row's id, which is never reused.
    pub id: AccountId,
    /// The unique name, by which callers ask.
    pub name: AccountName,
    /// The login at the upstream.
    pub client_id: ClientId,
    /// Whether tokens of the account are issued and served.
    pub enabled: bool,
    /// The version of the current credential.
    pub credential_version: CredentialVersion,
    /// The version of the first credential of the present login. Tokens of earlier versions belong to another login.
    pub login_version: CredentialVersion,
    /// The current credential's secret; `None` until it has been sealed.
    pub secret: Option<SealedSecret>,
    /// The credential before the last rotation, kept until the new one has issued a token.
    pub previous: Option<AccountCredential>,
    /// When an admin last requested a new token. A token that was issued before is replaced.
    pub reissue_requested_at: Option<Timestamp>,
}

impl Account {
    /// Returns whether an admin requested a new token after the last attempt began, and no attempt has
    /// answered the request. The second condition holds whatever the database's clock did in between.
    #[must_use]
    pub fn wants_reissue(&self, refresh: &RefreshState) -> bool {
        self.reissue_requested_at != refresh.answered_reissue
            && self
                .reissue_requested_at
                .is_some_and(|at| refresh.attempt_started_at.is_none_or(|started| started < at))
    }

    /// Returns whether a token that was issued with the credential of `version` belongs to the present login. A token
    /// of an earlier login may be ended by another account that has that login now, so it is not served.
    #[must_use]
    pub fn has_login_of(&self, version: CredentialVersion) -> bool {
        version >= self.login_version
    }

    /// Returns the current credential's version if it may be tried: it is sealed, and not suspended unless an
    /// admin requested a new token.
    #[must_use]
    pub fn usable_version(&self, refresh: &RefreshState) -> Option<CredentialVersion> {
        let suspended = refresh
            .current_failure(self.credential_version)
            .is_some_and(|failure| failure.class.suspends());
        let usable = self.secret.is_some() && (!suspended || self.wants_reissue(refresh));
        usable.then_some(self.credential_version)
    }

    /// Returns the previous credential's version if it goes on issuing tokens, because the current one cannot
    /// issue yet: it is not sealed, or its last attempt failed, for whatever reason. A request for a new token
    /// is answered with the current one first.
    #[must_use]
    pub fn fallback_version(&self, refresh: &RefreshState) -> Option<CredentialVersion> {
        let failed = refresh.current_failure(self.credential_version).is_some();
        let needed = self.secret.is_none() || failed && !self.wants_reissue(refresh);
        self.previous.as_ref().filter(|_| needed).map(|previous| previous.version)
    }

    /// Returns the current or the previous credential if it has this version and a sealed secret.
    #[must_use]
    pub fn credential(&self, version: CredentialVersion) -> Option<AccountCredential> {
        if version == self.credential_version {
            return self.secret.clone().map(|secret| AccountCredential { version, secret });
        }
        self.previous.clone().filter(|previous| previous.version == version)
    }

    /// Returns an attempt with the credential of this version, for a token of this generation.
    /// `None` if the account has no such credential.
    #[must_use]
    pub fn attempt(
        &self,
        version: CredentialVersion,
        generation: Generation,
    ) -> Option<IssueAttempt> {
        Some(IssueAttempt {
            account: self.id,
            client_id: self.client_id.clone(),
            credential: self.credential(version)?,
            uses_current_credential: version == self.credential_version,
            has_fallback: version == self.credential_version && self.previous.is_some(),
            generation,
        })
    }
}

#[cfg(test)]
impl Account {
    /// Returns an enabled account with a sealed first secret, for tests.
    pub(crate) fn example(id: i64, name: &str) -> Self {
        Self {
            id: AccountId(id),
            name: name.parse().unwrap(),
            client_id: "acmeId".parse().unwrap(),
            enabled: true,
            credential_version: CredentialVersion(1),
            login_version: CredentialVersion(1),
            secret: Some(vec![0].into()),
            previous: None,
            reissue_requested_at: None,
        }
    }
}

/// Counts how often a changed credential was tried before the minimum issue interval was over.
///
/// The counter has a fixed window: the first exception begins an hour with at most
/// [`IntervalExceptions::LIMIT`] exceptions.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct IntervalExceptions {
    /// The exceptions used since `since`.
    pub used: u32,
    /// When the window began, as the time of its first exception; `None` before any.
    pub since: Option<Timestamp>,
}

impl IntervalExceptions {
    /// The most exceptions in one window.
    pub const LIMIT: u32 = 3;
    const WINDOW: Duration = Duration::from_hours(1);

    /// Returns when the next exception may be used: a moment in the past while some are left, else
    /// the end of the window.
    #[must_use]
    pub fn available_from(&self) -> Timestamp {
        match self.since {
            Some(since) if self.used >= Self::LIMIT => since + delta(Self::WINDOW),
            _ => Timestamp::UNIX_EPOCH,
        }
    }

    /// Returns the counter after an attempt at `now`; `uses_one` says whether the attempt is an exception.
    /// If the window is over, the count starts again from 0.
    #[must_use]
    pub fn after_issue(&self, now: Timestamp, uses_one: bool) -> Self {
        let window = self.since.filter(|since| self.used > 0 && *since + delta(Self::WINDOW) > now);
        let used = if window.is_some() { self.used } else { 0 };
        Self { used: used + u32::from(uses_one), since: window.or(uses_one.then_some(now)) }
    }
}

/// The attempts to issue tokens for an account, and what they led to.
///
/// The database stamps these times by its own clock. In the cache they are by the local clock:
/// `AccountLoader` converts them.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RefreshState {
    /// When the last attempt began. This is stored before the upstream is called.
    pub attempt_started_at: Option<Timestamp>,
    /// The version of the credential that the last attempt used.
    pub attempt_version: Option<CredentialVersion>,
    /// Whether the last attempt has no recorded end: it is under way, or its replica was lost and
    /// the upstream may have issued a token.
    pub attempt_open: bool,
    /// The end of the last lease, which may have passed; `None` if it was released.
    pub lease_until: Option<Timestamp>,
    /// Whether the upstream may have revoked the stored token, since an attempt may have issued another
    /// one that was not stored, or a caller reported the token as refused.
    pub possibly_revoked: bool,
    /// The generation of the stored token, even if the token cannot be opened.
    pub stored_generation: Option<Generation>,
    /// The failures since the last success. Those of a new secret beside the previous one do not count.
    pub consecutive_failures: u32,
    /// The last failure; `None` after a success.
    pub failure: Option<IssueFailure>,
    /// The time before which no attempt is made after a transient failure.
    pub next_attempt_at: Option<Timestamp>,
    /// The failures in a row of the current credential while the previous one is kept, if `failure` is the
    /// last one of them.
    pub new_secret_failures: u32,
    /// The time before which the current credential is not tried again after such a failure. The previous one
    /// does not wait for it.
    pub new_secret_retry_at: Option<Timestamp>,
    /// The exceptions from the minimum issue interval in the current hour.
    pub interval_exceptions: IntervalExceptions,
    /// The request for a new token ([`Account::reissue_requested_at`]) that the last attempt knew of.
    pub answered_reissue: Option<Timestamp>,
}

impl RefreshState {
    /// Returns how often the credential of this version, the current one, has failed in a row while the
    /// previous one was kept.
    #[must_use]
    pub fn new_secret_failures(&self, version: CredentialVersion) -> u32 {
        self.current_failure(version).map_or(0, |_| self.new_secret_failures)
    }

    /// Returns the last failure if it is about the current credential, whose version is `version`.
    #[must_use]
    pub fn current_failure(&self, version: CredentialVersion) -> Option<&IssueFailure> {
        self.failure.as_ref().filter(|failure| failure.version == version)
    }

    /// Returns whether the upstream may have revoked the stored token: it is marked so, or the outcome of
    /// the last attempt is not known.
    #[must_use]
    pub fn token_may_be_revoked(&self) -> bool {
        self.possibly_revoked || self.attempt_open
    }
}

named_enum! {
    /// The state of an account as the view `account_status`, callers and metrics show it.
    pub enum AccountState {
        /// No token was issued yet.
        Pending = "pending",
        /// The token is live and not to be replaced yet.
        Fresh = "fresh",
        /// The token is live and is being replaced, or about to be.
        Refreshing = "refreshing",
        /// The last token has ended, and no failure explains it.
        Expired = "expired",
        /// The credential is refused, or its stored secret does not open.
        Rejected = "rejected",
        /// The upstream refuses the account or the address that it is called from.
        EgressRejected = "egress_rejected",
        /// The last attempt failed for another reason; it is retried.
        Unreachable = "unreachable",
        /// An admin disabled the account.
        Disabled = "disabled",
    }
}

impl AccountState {
    /// Returns the state of an account at `now`. `token_ends` is the end of its last token.
    ///
    /// The view `account_status` states the same rule in SQL; an integration test compares both over
    /// all combinations of the facts.
    #[must_use]
    pub fn of(
        account: &Account,
        refresh: &RefreshState,
        token_ends: Option<Timestamp>,
        now: Timestamp,
    ) -> Self {
        let live = token_ends.is_some_and(|end| end > now);
        let leased = refresh.lease_until.is_some_and(|until| until > now);
        let due = refresh.possibly_revoked || refresh.next_attempt_at.is_some_and(|at| at <= now);
        if !account.enabled {
            return Self::Disabled;
        }
        match refresh.current_failure(account.credential_version).map(|failure| failure.class) {
            Some(class) if class.suspends() => Self::Rejected,
            Some(FailureClass::EgressRejected) => Self::EgressRejected,
            Some(_) if live && leased => Self::Refreshing,
            Some(_) => Self::Unreachable,
            None if live && (leased || due) => Self::Refreshing,
            None if live => Self::Fresh,
            None if token_ends.is_some() => Self::Expired,
            None => Self::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;

    fn at(second: i64) -> Timestamp {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
    }

    #[test]
    fn three_exceptions_are_available_in_an_hour_from_the_first() {
        let mut exceptions = IntervalExceptions::default();
        for second in [1_000, 1_010, 1_020] {
            assert!(exceptions.available_from() <= at(second));
            exceptions = exceptions.after_issue(at(second), true);
            exceptions = exceptions.after_issue(at(second + 5), false);
        }
        assert_eq!(exceptions.available_from(), at(1_000 + 3_600));
        let next_hour = exceptions.after_issue(at(1_000 + 3_600), true);
        assert_eq!(next_hour, IntervalExceptions { used: 1, since: Some(at(4_600)) });
    }

    #[test]
    fn a_failure_class_is_read_back_from_its_name() {
        for class in FailureClass::ALL {
            assert_eq!(class.as_str().parse(), Ok(class));
        }
        assert!("unknown".parse::<FailureClass>().is_err());
    }
}
