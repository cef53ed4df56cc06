//! Why a call gets no token.

use std::time::Duration;

use thiserror::Error;

/// A refusal, in the words that a caller may read. `grpc::status` gives each its status and reason.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum Refusal {
    /// The request itself is wrong.
    #[error("{field}: {description}")]
    Invalid {
        /// The field at fault.
        field: &'static str,
        /// What is wrong with it.
        description: String,
    },
    /// No identity was shown.
    #[error("no credential: send `authorization: Bearer tbk_…`, or show a client certificate")]
    CredentialMissing,
    /// What was shown is no bearer of ours.
    #[error("the authorization metadata is no well-formed bearer")]
    BearerMalformed,
    /// Unknown, ended or disabled: the same words for all.
    #[error("the credential is refused")]
    CredentialRefused,
    /// No grant covers the account, which may or may not exist.
    #[error("no grant covers this account")]
    NotGranted,
    /// A grant covers the name, but there is no such account.
    #[error("there is no such account")]
    NoSuchAccount,
    /// An admin disabled the account.
    #[error("the account is disabled")]
    AccountDisabled,
    /// No live token is left and the upstream refuses the credential.
    #[error("no live token is left, and the upstream refuses the account's credential")]
    CredentialRejected {
        /// The upstream's code, if it gave one.
        upstream_code: Option<String>,
    },
    /// No live token is left and the upstream refuses the account or our address.
    #[error("no live token is left, and the upstream refuses the account or the broker's address")]
    EgressRejected {
        /// The upstream's code, if it gave one.
        upstream_code: Option<String>,
    },
    /// No live token is left and the upstream cannot be reached.
    #[error("no live token is left, and the upstream does not answer as it should")]
    UpstreamUnavailable {
        /// When it is tried next.
        retry_after: Duration,
    },
    /// What the call needs would have to be written to the database, which does not answer.
    #[error("the broker's database does not answer")]
    DatabaseUnavailable {
        /// When to try again.
        retry_after: Duration,
    },
    /// The token ended while the call was recorded.
    #[error("the token ended before it could be answered")]
    TokenEnded,
    /// The call cannot be recorded, so it is not answered.
    #[error("the call cannot be recorded")]
    AuditUnavailable,
    /// The grants were not confirmed by the database for too long.
    #[error("the grants were not confirmed by the database for too long")]
    GrantsStale,
    /// The caller asks more often than it may.
    #[error("the caller is beyond its rate")]
    CallerRate {
        /// When to try again.
        retry_after: Duration,
    },
    /// Too many calls wait already.
    #[error("too many calls wait for tokens")]
    Overloaded {
        /// When to try again.
        retry_after: Duration,
    },
    /// There was no answer before the deadline.
    #[error("no token before the deadline")]
    DeadlineExceeded,
    /// The caller went away.
    #[error("the call was cancelled")]
    Cancelled,
}
