//! Refusals as gRPC statuses with the contract's reasons and rich details.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status, metadata::MetadataValue};
use tonic_types::{ErrorDetails, StatusExt};

use crate::services::token_provider::Refusal;

/// The domain of every reason.
pub const DOMAIN: &str = "token-broker";
/// Tells gRPC's own retries when to come back, in milliseconds.
const PUSHBACK: &str = "grpc-retry-pushback-ms";
/// What is told when there is no better guess.
const RETRY: Duration = Duration::from_secs(1);

impl Refusal {
    /// The status code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::CredentialMissing | Self::BearerMalformed | Self::CredentialRefused => {
                Code::Unauthenticated
            }
            Self::NotGranted => Code::PermissionDenied,
            Self::NoSuchAccount => Code::NotFound,
            Self::AccountDisabled
            | Self::CredentialRejected { .. }
            | Self::EgressRejected { .. } => Code::FailedPrecondition,
            Self::UpstreamUnavailable { .. }
            | Self::DatabaseUnavailable { .. }
            | Self::TokenEnded
            | Self::AuditUnavailable
            | Self::GrantsStale => Code::Unavailable,
            Self::CallerRate { .. } | Self::Overloaded { .. } => Code::ResourceExhausted,
            Self::DeadlineExceeded => Code::DeadlineExceeded,
            Self::Cancelled => Code::Cancelled,
        }
    }

    /// The reason of the `ErrorInfo`, if the contract gives this refusal one.
    #[must_use]
    pub fn reason(&self) -> Option<&'static str> {
        match self {
            Self::Invalid { .. } | Self::DeadlineExceeded | Self::Cancelled => None,
            Self::CredentialMissing => Some("CREDENTIAL_MISSING"),
            Self::BearerMalformed => Some("BEARER_MALFORMED"),
            Self::CredentialRefused => Some("CREDENTIAL_REFUSED"),
            Self::NotGranted => Some("NOT_GRANTED"),
            Self::NoSuchAccount => Some("NO_SUCH_ACCOUNT"),
            Self::AccountDisabled => Some("ACCOUNT_DISABLED"),
            Self::CredentialRejected { .. } => Some("CREDENTIAL_REJECTED"),
            Self::EgressRejected { .. } => Some("EGRESS_REJECTED"),
            Self::UpstreamUnavailable { .. } => Some("UPSTREAM_UNAVAILABLE"),
            Self::DatabaseUnavailable { .. } => Some("DATABASE_UNAVAILABLE"),
            Self::TokenEnded => Some("TOKEN_ENDED"),
            Self::AuditUnavailable => Some("AUDIT_UNAVAILABLE"),
            Self::GrantsStale => Some("GRANTS_STALE"),
            Self::CallerRate { .. } => Some("CALLER_RATE"),
            Self::Overloaded { .. } => Some("OVERLOADED"),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::UpstreamUnavailable { retry_after }
            | Self::DatabaseUnavailable { retry_after }
            | Self::CallerRate { retry_after }
            | Self::Overloaded { retry_after } => Some(*retry_after),
            Self::TokenEnded | Self::AuditUnavailable | Self::GrantsStale => Some(RETRY),
            _ => None,
        }
    }

    fn upstream_code(&self) -> Option<&str> {
        match self {
            Self::CredentialRejected { upstream_code } | Self::EgressRejected { upstream_code } => {
                upstream_code.as_deref()
            }
            _ => None,
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let mut details = ErrorDetails::new();
        if let Some(reason) = refusal.reason() {
            let metadata: HashMap<String, String> = refusal
                .upstream_code()
                .map(|code| ("upstream_code".to_owned(), code.to_owned()))
                .into_iter()
                .collect();
            details.set_error_info(reason, DOMAIN, metadata);
        }
        if let Refusal::Invalid { field, description } = &refusal {
            details.add_bad_request_violation(*field, description.clone());
        }
        let retry_after = refusal.retry_after();
        if retry_after.is_some() {
            details.set_retry_info(retry_after);
        }
        let mut status = Status::with_error_details(refusal.code(), refusal.to_string(), details);
        if let Some(pause) = retry_after {
            let pause = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
            status.metadata_mut().insert(PUSHBACK, MetadataValue::from(pause));
        }
        status
    }
}

/// The code's name in the audit log and in metrics: the contract's, in lower case.
#[must_use]
pub fn outcome(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_its_reason_its_code_and_when_to_come_back() {
        let refusal = Refusal::UpstreamUnavailable { retry_after: Duration::from_millis(1_500) };
        let status = Status::from(refusal);
        assert_eq!(status.code(), Code::Unavailable);
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("UPSTREAM_UNAVAILABLE", DOMAIN));
        let retry = details.retry_info().unwrap().retry_delay.unwrap();
        assert_eq!(retry, Duration::from_millis(1_500));
        assert_eq!(status.metadata().get(PUSHBACK).unwrap(), "1500");
    }

    #[test]
    fn a_rejected_credential_tells_the_upstreams_code() {
        let refusal = Refusal::CredentialRejected { upstream_code: Some("61006".into()) };
        let details = Status::from(refusal).get_error_details();
        assert_eq!(details.error_info().unwrap().metadata["upstream_code"], "61006");
    }

    #[test]
    fn a_bad_request_names_the_field() {
        let refusal = Refusal::Invalid { field: "account", description: "is empty".into() };
        let details = Status::from(refusal).get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "account");
    }
}
