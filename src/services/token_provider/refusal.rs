//! The reasons for which a call is refused.

use std::time::Duration;

use thiserror::Error;

/// Why a call is refused. The texts are those that the caller reads, so none of them holds a secret or an
/// upstream body. `api::grpc::status` maps each to a gRPC status and a reason.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum CallRefusal {
    /// A field of the request is malformed.
    #[error("{field}: {description}")]
    Invalid {
        /// The malformed field.
        field: &'static str,
        /// What is wrong with it.
        description: String,
    },
    /// The request is not one of gRPC.
    #[error("the request is not gRPC: {description}")]
    NotGrpc {
        /// Which rule of gRPC it violates.
        description: &'static str,
    },
    /// The message is compressed with an encoding that the broker does not read.
    #[error("the encoding of the request is not supported: send gzip or identity")]
    EncodingNotSupported,
    /// The message is larger than the method accepts.
    #[error("the message is larger than 64 KiB, or for health and reflection than 4 KiB")]
    MessageTooLarge,
    /// The message is small enough only while it is compressed.
    #[error(
        "the message is larger than 64 KiB once it is decompressed, or for health and reflection than 4 KiB"
    )]
    DecompressedTooLarge,
    /// The message violates the format of gRPC, gzip or protobuf.
    #[error("the message cannot be read: {description}")]
    MessageMalformed {
        /// Which rule it violates. Quotes nothing of the message.
        description: String,
    },
    /// There is no such service, or it has no such method.
    #[error("there is no such service or method")]
    UnknownMethod,
    /// The caller sent no bearer and showed no client certificate.
    #[error("no credential: send `authorization: Bearer tbk_…`, or show a client certificate")]
    CredentialMissing,
    /// The `authorization` metadata is not a well-formed bearer.
    #[error("the authorization metadata is not a well-formed bearer")]
    BearerMalformed,
    /// The credential is unknown, has ended, was revoked, or its caller is disabled. The text is the same
    /// for all of them, so that a caller cannot probe which credentials exist.
    #[error("the credential is refused")]
    CredentialRefused,
    /// No grant covers the account. The refusal does not reveal whether the account exists.
    #[error("no grant covers this account")]
    NotGranted,
    /// A grant covers the name, but there is no such account.
    #[error("there is no such account")]
    NoSuchAccount,
    /// An admin disabled the account.
    #[error("the account is disabled")]
    AccountDisabled,
    /// No live token is left, and the upstream refuses the account's credential.
    #[error("no live token is left, and the upstream refuses the account's credential")]
    CredentialRejected {
        /// The upstream's error code, if it sent one.
        upstream_code: Option<String>,
    },
    /// No live token is left, and the upstream refuses the account or the broker's address.
    #[error("no live token is left, and the upstream refuses the account or the broker's address")]
    EgressRejected {
        /// The upstream's error code, if it sent one.
        upstream_code: Option<String>,
    },
    /// No live token is left, and the upstream cannot be reached or answers wrongly.
    #[error("no live token is left, and the upstream does not answer as it should")]
    UpstreamUnavailable {
        /// Time until the next attempt to issue a token.
        retry_after: Duration,
    },
    /// The call needs the database, which does not answer: no live token is left and this replica may not
    /// issue without the database, or a report cannot be stored.
    #[error("the broker's database does not answer")]
    DatabaseUnavailable {
        /// How long the caller should wait before it tries again.
        retry_after: Duration,
    },
    /// The token expired, or its account was moved to another login, while the audit record of the call was being
    /// written.
    #[error("the token ended before it could be sent")]
    TokenEnded,
    /// The audit record of the call cannot be written, so the call is not answered.
    #[error("the call cannot be recorded")]
    AuditUnavailable,
    /// The database has not confirmed the grants for longer than `MAX_AUTHORIZATION_STALENESS`.
    #[error("the grants were not confirmed by the database for too long")]
    GrantsStale,
    /// The caller exceeded its rate limit.
    #[error("the caller exceeded its rate limit")]
    CallerRate {
        /// How long the caller should wait before it tries again.
        retry_after: Duration,
    },
    /// The limit of waiting calls or of open streams is reached.
    #[error("too many calls wait for tokens, or too many streams are open")]
    Overloaded {
        /// How long the caller should wait before it tries again.
        retry_after: Duration,
    },
    /// The deadline passed before there was an answer.
    #[error("the deadline passed before there was an answer")]
    DeadlineExceeded,
    /// The caller cancelled the call.
    #[error("the call was cancelled")]
    Cancelled,
}
