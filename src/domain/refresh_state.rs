//! Where an account's issuing stands: its last attempt, its last failure, and the state that people
//! and callers see.

use std::{fmt, str::FromStr};

use crate::domain::{
    account::{AccountId, AccountName, ClientId, CredentialVersion, Invalid},
    clock::Timestamp,
    secret::SealedSecret,
    token::{Generation, Token},
};

/// Why an issue failed, as far as what to do next depends on it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum FailureClass {
    /// The upstream refuses the credential: nothing is tried until it changes.
    Rejected,
    /// The sealed secret does not open with the keyring: nothing is tried until it changes.
    Intake,
    /// The upstream refuses the account or our address: tried again seldom.
    EgressRejected,
    /// The upstream asks to wait.
    RateLimited,
    /// The upstream cannot be reached, or fails by itself.
    Unreachable,
    /// The upstream's answer is no token and no error that we know.
    Malformed,
}

impl FailureClass {
    /// The outcome in the audit log: the gRPC status that a call would end with for it.
    #[must_use]
    pub fn outcome(self) -> &'static str {
        match self {
            Self::Rejected | Self::EgressRejected | Self::Intake => "failed_precondition",
            _ => "unavailable",
        }
    }

    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Rejected,
        Self::Intake,
        Self::EgressRejected,
        Self::RateLimited,
        Self::Unreachable,
        Self::Malformed,
    ];

    /// The name in the database and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Intake => "intake",
            Self::EgressRejected => "egress_rejected",
            Self::RateLimited => "rate_limited",
            Self::Unreachable => "unreachable",
            Self::Malformed => "malformed",
        }
    }

    /// Whether the account is left alone until its credential changes.
    #[must_use]
    pub fn parks(self) -> bool {
        matches!(self, Self::Rejected | Self::Intake)
    }
}

impl FromStr for FailureClass {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<Self, Invalid> {
        Self::ALL
            .into_iter()
            .find(|class| class.as_str() == name)
            .ok_or(Invalid::Unknown("failure class", "one of this release's"))
    }
}

/// A failed issue.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IssueFailure {
    /// What it means.
    pub class: FailureClass,
    /// The upstream's code, such as `61006`.
    pub code: Option<String>,
    /// Our own words, never the upstream's.
    pub message: String,
    /// The credential that failed.
    pub version: CredentialVersion,
}

/// One of an account's credentials.
#[derive(Clone, Debug)]
pub struct AccountCredential {
    /// Which one.
    pub version: CredentialVersion,
    /// Its secret.
    pub secret: SealedSecret,
}

/// One attempt to issue: for whom, with what, and as which generation.
#[derive(Clone, Debug)]
pub struct IssueAttempt {
    /// The account.
    pub account: AccountId,
    /// The login.
    pub client_id: ClientId,
    /// The credential to use.
    pub credential: AccountCredential,
    /// Whether that is the account's current credential, and not the one before a rotation whose
    /// new secret the upstream refuses.
    pub current: bool,
    /// What the new token's generation will be.
    pub generation: Generation,
}

/// An account as the database has it.
#[derive(Clone, Debug)]
pub struct Account {
    /// Its row.
    pub id: AccountId,
    /// Its name.
    pub name: AccountName,
    /// Its login at the upstream.
    pub client_id: ClientId,
    /// A disabled account is neither issued for nor served.
    pub enabled: bool,
    /// Its current credential.
    pub credential_version: CredentialVersion,
    /// That credential's secret, once it is sealed.
    pub secret: Option<SealedSecret>,
    /// The credential before the last rotation, while it is kept.
    pub previous: Option<AccountCredential>,
    /// A token issued before this moment is to be replaced.
    pub reissue_requested_at: Option<Timestamp>,
}

impl Account {
    /// Whether an admin asked for a new token since the last attempt.
    #[must_use]
    pub fn wants_reissue(&self, progress: &RefreshState) -> bool {
        self.reissue_requested_at
            .is_some_and(|at| progress.attempt_started_at.is_none_or(|started| started < at))
    }

    /// The credential to issue with: the current one unless it is refused, else the one before.
    #[must_use]
    pub fn usable_credential(&self, progress: &RefreshState) -> Option<AccountCredential> {
        let failure = progress.current_failure(self.credential_version);
        let parked = failure.is_some_and(|failure| failure.class.parks());
        let secret = self.secret.clone().filter(|_| !parked || self.wants_reissue(progress));
        let current =
            secret.map(|secret| AccountCredential { version: self.credential_version, secret });
        current.or_else(|| self.previous.clone())
    }
}

#[cfg(test)]
impl Account {
    /// An enabled account with a sealed first secret, for tests.
    pub(crate) fn example(id: i64, name: &str) -> Self {
        Self {
            id: AccountId(id),
            name: name.parse().unwrap(),
            client_id: "acmeId".parse().unwrap(),
            enabled: true,
            credential_version: CredentialVersion(1),
            secret: Some(vec![0].into()),
            previous: None,
            reissue_requested_at: None,
        }
    }
}

/// What is known of an account's attempts.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RefreshState {
    /// When the last attempt began; stamped before the call, by the database's clock.
    pub attempt_started_at: Option<Timestamp>,
    /// The credential that it used.
    pub attempt_version: Option<CredentialVersion>,
    /// Whether that attempt has no recorded end: it is under way, or its replica was lost, and then
    /// the upstream may have issued.
    pub attempt_open: bool,
    /// Until when a replica holds the right to issue.
    pub lease_until: Option<Timestamp>,
    /// The token may have been ended by an issue whose answer was lost.
    pub suspect: bool,
    /// The generation of the stored token, also of one that does not open.
    pub stored_generation: Option<Generation>,
    /// Failures in a row.
    pub failures: u32,
    /// The last failure, until a success.
    pub failure: Option<IssueFailure>,
    /// Not before this moment, after a failure.
    pub next_attempt_at: Option<Timestamp>,
}

impl RefreshState {
    /// The failure that speaks of the account's current credential.
    #[must_use]
    pub fn current_failure(&self, version: CredentialVersion) -> Option<&IssueFailure> {
        self.failure.as_ref().filter(|failure| failure.version == version)
    }

    /// Whether the stored token may have been ended by an attempt whose outcome is not known.
    #[must_use]
    pub fn is_doubtful(&self) -> bool {
        self.suspect || self.attempt_open
    }

    fn is_due(&self, now: Timestamp) -> bool {
        self.suspect || self.next_attempt_at.is_some_and(|at| at <= now)
    }
}

/// Where an account stands, for people and callers: the contract's states.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum AccountState {
    /// No token was issued yet.
    Pending,
    /// A live token, not yet due.
    Fresh,
    /// A live token whose replacement is due or under way.
    Refreshing,
    /// The last token ended.
    Expired,
    /// The credential is refused.
    Rejected,
    /// The account or our address is refused.
    EgressRejected,
    /// The upstream does not answer as it should.
    Unreachable,
    /// An admin disabled it.
    Disabled,
}

impl AccountState {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Pending,
        Self::Fresh,
        Self::Refreshing,
        Self::Expired,
        Self::Rejected,
        Self::EgressRejected,
        Self::Unreachable,
        Self::Disabled,
    ];

    /// The state of an account at `now`. The view `account_status` states the same rule in SQL.
    #[must_use]
    pub fn of(
        account: &Account,
        token: Option<&Token>,
        progress: &RefreshState,
        now: Timestamp,
    ) -> Self {
        let live = token.is_some_and(|token| token.is_live(now));
        let leased = progress.lease_until.is_some_and(|until| until > now);
        if !account.enabled {
            return Self::Disabled;
        }
        match progress.current_failure(account.credential_version).map(|failure| failure.class) {
            Some(class) if class.parks() => Self::Rejected,
            Some(FailureClass::EgressRejected) => Self::EgressRejected,
            Some(_) if live && leased => Self::Refreshing,
            Some(_) => Self::Unreachable,
            None if live && (leased || progress.is_due(now)) => Self::Refreshing,
            None if live => Self::Fresh,
            None if token.is_some() => Self::Expired,
            None => Self::Pending,
        }
    }

    /// The name in `account_status` and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Fresh => "fresh",
            Self::Refreshing => "refreshing",
            Self::Expired => "expired",
            Self::Rejected => "rejected",
            Self::EgressRejected => "egress_rejected",
            Self::Unreachable => "unreachable",
            Self::Disabled => "disabled",
        }
    }
}

impl fmt::Display for AccountState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
