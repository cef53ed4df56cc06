//! Why a token could not be had.

use std::{error::Error as StdError, fmt, sync::Arc, time::Duration};

use tonic::{Code, Status, TimeoutExpired};
use tonic_types::StatusExt;

/// The domain of the broker's reasons.
const DOMAIN: &str = "token-broker";
/// The metadata with which the broker says whether a call may be repeated; negative if not.
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// What kind of error it is. Programs should act on it, not on the text.
///
/// A caller that no longer wants a token drops the future, so there is no kind for that.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A malformed account name or a setting that cannot be used.
    InvalidArgument,
    /// The broker does not know the bearer or the certificate, or no longer accepts it.
    Unauthenticated,
    /// No grant covers the account.
    NotGranted,
    /// A grant covers the name, but there is no such account.
    NoSuchAccount,
    /// An admin disabled the account.
    AccountDisabled,
    /// The upstream refuses the account's credential: see [`Error::upstream_code`].
    CredentialRejected,
    /// The upstream refuses the account or the broker's address.
    EgressRejected,
    /// The broker, or what it needs, cannot be reached.
    Unavailable,
    /// The broker is overloaded, or the caller exceeds its rate.
    Overloaded,
    /// There was no token before the timeout.
    DeadlineExceeded,
    /// The client was closed.
    Closed,
    /// A request was about to take a token to another host than that of the API.
    WrongHost,
    /// Anything else: the broker or the client has a fault.
    Internal,
}

impl ErrorKind {
    /// Whether the same call may succeed a little later.
    #[must_use]
    pub fn is_temporary(self) -> bool {
        matches!(
            self,
            Self::Unavailable | Self::Overloaded | Self::DeadlineExceeded | Self::Internal
        )
    }

    /// Returns its name as in the specification of the clients, such as `NOT_GRANTED`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::Unauthenticated => "UNAUTHENTICATED",
            Self::NotGranted => "NOT_GRANTED",
            Self::NoSuchAccount => "NO_SUCH_ACCOUNT",
            Self::AccountDisabled => "ACCOUNT_DISABLED",
            Self::CredentialRejected => "CREDENTIAL_REJECTED",
            Self::EgressRejected => "EGRESS_REJECTED",
            Self::Unavailable => "UNAVAILABLE",
            Self::Overloaded => "OVERLOADED",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::Closed => "CLOSED",
            Self::WrongHost => "WRONG_HOST",
            Self::Internal => "INTERNAL",
        }
    }

    fn of(code: Code, reason: Option<&str>) -> Self {
        match (code, reason) {
            (Code::InvalidArgument, _) => Self::InvalidArgument,
            (Code::Unauthenticated, _) => Self::Unauthenticated,
            (Code::PermissionDenied, _) => Self::NotGranted,
            (Code::NotFound, _) => Self::NoSuchAccount,
            (Code::FailedPrecondition, Some("ACCOUNT_DISABLED")) => Self::AccountDisabled,
            (Code::FailedPrecondition, Some("CREDENTIAL_REJECTED")) => Self::CredentialRejected,
            (Code::FailedPrecondition, Some("EGRESS_REJECTED")) => Self::EgressRejected,
            (Code::Unavailable, _) => Self::Unavailable,
            (Code::ResourceExhausted, _) => Self::Overloaded,
            (Code::DeadlineExceeded, _) => Self::DeadlineExceeded,
            _ => Self::Internal,
        }
    }
}

/// Why a token could not be had. Never contains a token or a bearer. Cheap to clone.
#[derive(Clone)]
pub struct Error(Arc<Fields>);

#[derive(Clone)]
struct Fields {
    kind: ErrorKind,
    account: String,
    message: String,
    code: Option<Code>,
    reason: Option<String>,
    upstream_code: Option<String>,
    retry_after: Option<Duration>,
    may_retry: bool,
}

impl Error {
    /// Returns an error that no answer of the broker caused.
    pub(crate) fn local(kind: ErrorKind, account: &str, message: impl Into<String>) -> Self {
        Self(Arc::new(Fields {
            kind,
            account: account.to_owned(),
            message: message.into(),
            code: (kind == ErrorKind::DeadlineExceeded).then_some(Code::DeadlineExceeded),
            reason: None,
            upstream_code: None,
            retry_after: None,
            may_retry: true,
        }))
    }

    pub(crate) fn settings(message: impl Into<String>) -> Self {
        Self::local(ErrorKind::InvalidArgument, "", message)
    }

    pub(crate) fn closed(account: &str) -> Self {
        Self::local(ErrorKind::Closed, account, "the client is closed")
    }

    pub(crate) fn deadline(account: &str) -> Self {
        Self::local(ErrorKind::DeadlineExceeded, account, "no answer before the timeout")
    }

    /// Returns the error that `status` stands for.
    pub(crate) fn from_status(account: &str, status: &Status) -> Self {
        let is_local = is_local(status);
        let (code, message) = match status.code() {
            _ if has_timed_out(status) => (Code::DeadlineExceeded, "no answer in time".to_owned()),
            code if !is_local => (code, status.message().to_owned()),
            Code::DeadlineExceeded => (Code::DeadlineExceeded, status.message().to_owned()),
            // The connection failed: tonic has several codes for that.
            _ => (Code::Unavailable, causes(status)),
        };
        let details = status.get_error_details();
        let info = details.error_info().filter(|info| info.domain == DOMAIN);
        let reason = info.map(|info| info.reason.clone());
        let pushback = status.metadata().get(PUSHBACK).and_then(|value| value.to_str().ok());
        Self(Arc::new(Fields {
            kind: ErrorKind::of(code, reason.as_deref()),
            account: account.to_owned(),
            message,
            code: Some(code),
            reason,
            upstream_code: info.and_then(|info| info.metadata.get("upstream_code").cloned()),
            retry_after: details.retry_info().and_then(|retry| retry.retry_delay),
            may_retry: !pushback.is_some_and(|value| value.starts_with('-')),
        }))
    }

    /// Returns what kind of error it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the same call may succeed a little later.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        self.0.kind.is_temporary()
    }

    /// Returns the account that was asked for; empty for an error of the settings.
    #[must_use]
    pub fn account(&self) -> &str {
        &self.0.account
    }

    /// Returns the text, which is for people.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Returns the name of the gRPC status, such as `PERMISSION_DENIED`, if the call ended with one.
    #[must_use]
    pub fn code(&self) -> Option<&'static str> {
        self.0.code.map(code_name)
    }

    /// Returns the broker's reason, such as `CALLER_RATE`, if it gave one.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.0.reason.as_deref()
    }

    /// Returns the code with which the upstream refused the account's credential.
    #[must_use]
    pub fn upstream_code(&self) -> Option<&str> {
        self.0.upstream_code.as_deref()
    }

    /// Returns how long the broker asks to wait before the next call.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// Whether the broker did not forbid to repeat the call within its deadline.
    pub(crate) fn may_retry(&self) -> bool {
        self.0.may_retry
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fields { kind, account, message, code, reason, .. } = &*self.0;
        if !account.is_empty() {
            write!(f, "{account}: ")?;
        }
        f.write_str(code.map_or_else(|| kind.name(), code_name))?;
        if let Some(reason) = reason {
            write!(f, " ({reason})")?;
        }
        write!(f, ": {message}")
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fields { kind, account, message, code, reason, upstream_code, retry_after, .. } =
            &*self.0;
        f.debug_struct("Error")
            .field("kind", kind)
            .field("account", account)
            .field("message", message)
            .field("code", code)
            .field("reason", reason)
            .field("upstream_code", upstream_code)
            .field("retry_after", retry_after)
            .finish()
    }
}

impl StdError for Error {}

/// Whether this machine made `status`, because the connection failed or the time was over, and not the broker.
pub(crate) fn is_local(status: &Status) -> bool {
    status.source().is_some() && !has_timed_out(status)
}

/// Whether tonic ended the call, since it took longer than its timeout. That says nothing about the connection.
fn has_timed_out(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<TimeoutExpired>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Returns the texts of `status` and of its causes, each once, without tonic's own text, which says nothing.
fn causes(status: &Status) -> String {
    let mut texts = vec![];
    let mut cause = status.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if text != "transport error" && !texts.iter().any(|seen: &String| seen.contains(&text)) {
            texts.push(text);
        }
        cause = error.source();
    }
    texts.join(": ")
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    fn error(code: Code, reason: &str, domain: &str) -> Error {
        let mut details = ErrorDetails::new();
        details.set_error_info(reason, domain, [("upstream_code".into(), "61006".into())]);
        Error::from_status("acme", &Status::with_error_details(code, "why", details))
    }

    #[test]
    fn a_call_that_took_too_long_says_nothing_about_the_connection() {
        let status = Status::from_error(Box::new(TimeoutExpired(())));
        assert!(!is_local(&status));
        let error = Error::from_status("acme", &status);
        assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
        assert!(is_local(&Status::from_error("refused".into())));
    }

    #[test]
    fn each_status_and_reason_leads_to_the_kind_of_the_specification() {
        use ErrorKind as Kind;
        for (code, reason, kind, temporary) in [
            (Code::InvalidArgument, "", Kind::InvalidArgument, false),
            (Code::Unauthenticated, "CREDENTIAL_REFUSED", Kind::Unauthenticated, false),
            (Code::PermissionDenied, "NOT_GRANTED", Kind::NotGranted, false),
            (Code::NotFound, "NO_SUCH_ACCOUNT", Kind::NoSuchAccount, false),
            (Code::FailedPrecondition, "ACCOUNT_DISABLED", Kind::AccountDisabled, false),
            (Code::FailedPrecondition, "CREDENTIAL_REJECTED", Kind::CredentialRejected, false),
            (Code::FailedPrecondition, "EGRESS_REJECTED", Kind::EgressRejected, false),
            (Code::FailedPrecondition, "SOMETHING_NEW", Kind::Internal, true),
            (Code::Unavailable, "UPSTREAM_UNAVAILABLE", Kind::Unavailable, true),
            (Code::ResourceExhausted, "CALLER_RATE", Kind::Overloaded, true),
            (Code::DeadlineExceeded, "", Kind::DeadlineExceeded, true),
            (Code::Cancelled, "", Kind::Internal, true),
            (Code::Unknown, "", Kind::Internal, true),
        ] {
            let error = error(code, reason, "token-broker");
            assert_eq!((error.kind(), error.is_temporary()), (kind, temporary), "{error}");
        }
    }

    #[test]
    fn reasons_of_other_domains_are_ignored() {
        let error = error(Code::FailedPrecondition, "ACCOUNT_DISABLED", "example.com");
        assert_eq!((error.kind(), error.reason()), (ErrorKind::Internal, None));
        assert_eq!(error.upstream_code(), None);
    }

    #[test]
    fn an_error_names_its_account_its_status_and_its_reason() {
        let error = error(Code::PermissionDenied, "NOT_GRANTED", "token-broker");
        assert_eq!(error.to_string(), "acme: PERMISSION_DENIED (NOT_GRANTED): why");
        assert_eq!(Error::closed("acme").to_string(), "acme: CLOSED: the client is closed");
    }

    #[test]
    fn a_negative_pushback_forbids_a_retry() {
        let mut status = Status::unavailable("busy");
        assert!(Error::from_status("acme", &status).may_retry());
        status.metadata_mut().insert(PUSHBACK, "250".parse().unwrap());
        assert!(Error::from_status("acme", &status).may_retry());
        status.metadata_mut().insert(PUSHBACK, "-1".parse().unwrap());
        assert!(!Error::from_status("acme", &status).may_retry());
    }

    #[test]
    fn a_failed_connection_is_unavailable_and_says_why() {
        let refused = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "nobody listens");
        let error = Error::from_status("acme", &Status::from_error(Box::new(refused)));
        assert_eq!(error.to_string(), "acme: UNAVAILABLE: nobody listens");
    }
}
