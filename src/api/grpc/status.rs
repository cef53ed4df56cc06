//! The gRPC status of each refusal: its code, its reason, and details for clients to act on.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status, metadata::MetadataValue};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{services::token_provider::CallRefusal, telemetry::GRPC_CODE_NAMES};

/// The `domain` of every `ErrorInfo`.
pub const ERROR_DOMAIN: &str = "token-broker";
/// The trailer from which gRPC's built-in retries take their delay, in milliseconds (gRFC A6). The layers that
/// know the call's time replace it where no retry can be answered any more: see `pushback`.
pub(super) const PUSHBACK: &str = "grpc-retry-pushback-ms";
/// The header that names the encodings which requests may have.
const ACCEPT_ENCODING: &str = "grpc-accept-encoding";
/// Its value.
const ACCEPTED_ENCODINGS: &str = "gzip,identity";
/// The pushback with which gRPC's clients do not retry.
pub(super) const DO_NOT_RETRY: &str = "-1";
/// Retry delay reported to the client when no better estimate is known.
const DEFAULT_RETRY: Duration = Duration::from_secs(1);

/// Declares [`Reason`] from one list, so that no reason lacks a name or a code.
macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = ($name:literal, $code:ident),)+) => {
        /// The `reason` of an `ErrorInfo`: a stable name for programs to act on. `README.md` lists the reasons
        /// for users.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub enum Reason {
            $($(#[$doc])* $variant,)+
        }

        impl Reason {
            /// Every reason.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// Returns the name on the wire, in the audit log and in `README.md`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// Returns the status code, which is the same for each refusal with this reason.
            #[must_use]
            pub const fn code(self) -> Code {
                match self {
                    $(Self::$variant => Code::$code,)+
                }
            }
        }
    };
}

reasons! {
    /// The request has another HTTP method or content type than gRPC.
    NotGrpc = ("NOT_GRPC", Internal),
    /// The message is compressed with an encoding that the broker does not read.
    EncodingNotSupported = ("ENCODING_NOT_SUPPORTED", Unimplemented),
    /// There is no such service, or it has no such method.
    UnknownMethod = ("UNKNOWN_METHOD", Unimplemented),
    /// The message is larger than the method accepts.
    MessageTooLarge = ("MESSAGE_TOO_LARGE", OutOfRange),
    /// The message is small enough only while it is compressed.
    DecompressedTooLarge = ("DECOMPRESSED_TOO_LARGE", ResourceExhausted),
    /// The message violates the format of gRPC, gzip or protobuf.
    MessageMalformed = ("MESSAGE_MALFORMED", Internal),
    /// No bearer and no client certificate.
    CredentialMissing = ("CREDENTIAL_MISSING", Unauthenticated),
    /// The metadata is not a well-formed bearer.
    BearerMalformed = ("BEARER_MALFORMED", Unauthenticated),
    /// An unknown, ended or revoked credential, or a disabled caller.
    CredentialRefused = ("CREDENTIAL_REFUSED", Unauthenticated),
    /// No grant covers the account.
    NotGranted = ("NOT_GRANTED", PermissionDenied),
    /// There is no such account.
    NoSuchAccount = ("NO_SUCH_ACCOUNT", NotFound),
    /// The account is disabled.
    AccountDisabled = ("ACCOUNT_DISABLED", FailedPrecondition),
    /// The upstream refuses the account's credential.
    CredentialRejected = ("CREDENTIAL_REJECTED", FailedPrecondition),
    /// The upstream refuses the broker's address, or the account.
    EgressRejected = ("EGRESS_REJECTED", FailedPrecondition),
    /// The upstream does not answer as it should.
    UpstreamUnavailable = ("UPSTREAM_UNAVAILABLE", Unavailable),
    /// The database does not answer.
    DatabaseUnavailable = ("DATABASE_UNAVAILABLE", Unavailable),
    /// The token ended before it could be sent.
    TokenEnded = ("TOKEN_ENDED", Unavailable),
    /// The audit record cannot be written.
    AuditUnavailable = ("AUDIT_UNAVAILABLE", Unavailable),
    /// The database has not confirmed the grants for too long.
    GrantsStale = ("GRANTS_STALE", Unavailable),
    /// The caller exceeded its rate limit.
    CallerRate = ("CALLER_RATE", ResourceExhausted),
    /// Too many calls wait, or too many streams are open.
    Overloaded = ("OVERLOADED", ResourceExhausted),
}

impl CallRefusal {
    /// Returns the reason of the refusal, or the status code of a refusal that has no reason.
    const fn classify(&self) -> Result<Reason, Code> {
        Ok(match self {
            Self::Invalid { .. } => return Err(Code::InvalidArgument),
            Self::DeadlineExceeded => return Err(Code::DeadlineExceeded),
            Self::Cancelled => return Err(Code::Cancelled),
            Self::NotGrpc { .. } => Reason::NotGrpc,
            Self::EncodingNotSupported => Reason::EncodingNotSupported,
            Self::MessageTooLarge => Reason::MessageTooLarge,
            Self::DecompressedTooLarge => Reason::DecompressedTooLarge,
            Self::MessageMalformed { .. } => Reason::MessageMalformed,
            Self::UnknownMethod => Reason::UnknownMethod,
            Self::CredentialMissing => Reason::CredentialMissing,
            Self::BearerMalformed => Reason::BearerMalformed,
            Self::CredentialRefused => Reason::CredentialRefused,
            Self::NotGranted => Reason::NotGranted,
            Self::NoSuchAccount => Reason::NoSuchAccount,
            Self::AccountDisabled => Reason::AccountDisabled,
            Self::CredentialRejected { .. } => Reason::CredentialRejected,
            Self::EgressRejected { .. } => Reason::EgressRejected,
            Self::UpstreamUnavailable { .. } => Reason::UpstreamUnavailable,
            Self::DatabaseUnavailable { .. } => Reason::DatabaseUnavailable,
            Self::TokenEnded => Reason::TokenEnded,
            Self::AuditUnavailable => Reason::AuditUnavailable,
            Self::GrantsStale => Reason::GrantsStale,
            Self::CallerRate { .. } => Reason::CallerRate,
            Self::Overloaded { .. } => Reason::Overloaded,
        })
    }

    /// Returns the gRPC status code.
    #[must_use]
    pub fn code(&self) -> Code {
        self.classify().map_or_else(|code| code, Reason::code)
    }

    /// Returns the reason, if this refusal has one.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        self.classify().ok()
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::UpstreamUnavailable { retry_after }
            | Self::DatabaseUnavailable { retry_after }
            | Self::CallerRate { retry_after }
            | Self::Overloaded { retry_after } => Some(*retry_after),
            Self::TokenEnded | Self::AuditUnavailable | Self::GrantsStale => Some(DEFAULT_RETRY),
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

impl From<CallRefusal> for Status {
    fn from(refusal: CallRefusal) -> Self {
        let mut details = ErrorDetails::new();
        if let Some(reason) = refusal.reason() {
            let metadata: HashMap<String, String> = refusal
                .upstream_code()
                .map(|code| ("upstream_code".to_owned(), code.to_owned()))
                .into_iter()
                .collect();
            details.set_error_info(reason.name(), ERROR_DOMAIN, metadata);
        }
        if let CallRefusal::Invalid { field, description } = &refusal {
            details.add_bad_request_violation(*field, description.clone());
        }
        let retry_after = refusal.retry_after();
        if retry_after.is_some() {
            details.set_retry_info(retry_after);
        }
        let mut status = Status::with_error_details(refusal.code(), refusal.to_string(), details);
        if matches!(refusal, CallRefusal::EncodingNotSupported) {
            let accepted = MetadataValue::from_static(ACCEPTED_ENCODINGS);
            status.metadata_mut().insert(ACCEPT_ENCODING, accepted);
        }
        if matches!(refusal, CallRefusal::DecompressedTooLarge) {
            // Clients often retry calls with this code.
            status.metadata_mut().insert(PUSHBACK, MetadataValue::from_static(DO_NOT_RETRY));
        }
        if let Some(delay) = retry_after {
            // Rounded up: an earlier retry would be refused again.
            let milliseconds = delay.as_nanos().div_ceil(1_000_000);
            let milliseconds = u64::try_from(milliseconds).unwrap_or(u64::MAX);
            status.metadata_mut().insert(PUSHBACK, MetadataValue::from(milliseconds));
        }
        status
    }
}

/// Returns the name of a status code in lower case, as the audit log's `outcome` has it.
#[must_use]
pub fn outcome_of(code: Code) -> &'static str {
    // The discriminants are gRPC's numbers, which are the indexes of the names.
    GRPC_CODE_NAMES[code as usize]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_refusal_carries_its_code_its_reason_and_its_retry_delay() {
        let refusal =
            CallRefusal::UpstreamUnavailable { retry_after: Duration::from_millis(1_500) };
        let status = Status::from(refusal);
        assert_eq!(status.code(), Code::Unavailable);
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!(info.reason, "UPSTREAM_UNAVAILABLE");
        assert_eq!(info.domain, ERROR_DOMAIN);
        let retry = details.retry_info().unwrap().retry_delay.unwrap();
        assert_eq!(retry, Duration::from_millis(1_500));
        assert_eq!(status.metadata().get(PUSHBACK).unwrap(), "1500");
    }

    #[test]
    fn the_refusal_of_a_rejected_credential_carries_the_upstreams_code() {
        let refusal = CallRefusal::CredentialRejected { upstream_code: Some("61006".into()) };
        let details = Status::from(refusal).get_error_details();
        assert_eq!(details.error_info().unwrap().metadata["upstream_code"], "61006");
    }

    #[test]
    fn a_bad_request_names_the_field() {
        let refusal = CallRefusal::Invalid { field: "account", description: "is empty".into() };
        let details = Status::from(refusal).get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "account");
    }

    #[test]
    fn every_code_has_its_own_name_in_the_audit_log() {
        for number in 0..=16 {
            let code = Code::from(number);
            assert_eq!(outcome_of(code).replace('_', ""), format!("{code:?}").to_lowercase());
        }
    }

    /// Returns the words of `text` in backticks that are in `UPPER_CASE`, as gRPC codes and reasons are.
    fn constants(text: &str) -> impl Iterator<Item = &str> {
        text.split('`')
            .skip(1)
            .step_by(2)
            .filter(|word| word.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'))
    }

    /// Each row of the table has the status and the reason; a row without a status continues the one above.
    #[test]
    fn the_readme_lists_exactly_these_reasons_each_with_its_status() {
        let readme = include_str!("../../../README.md");
        let (_, section) = readme.split_once("\n## Using it from a service\n").unwrap();
        let section = section.split("\n## ").next().unwrap();
        let mut listed = BTreeSet::new();
        let mut status = None;
        for row in section.lines().filter(|line| line.starts_with('|')) {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            let [_, first, second, ..] = cells[..] else { panic!("{row}") };
            let is_code = |word: &&str| GRPC_CODE_NAMES.contains(&&*word.to_lowercase());
            let Some(code) = constants(first).find(is_code).or(status) else { continue };
            status = Some(code);
            listed.extend(constants(second).map(|reason| (code.to_lowercase(), reason)));
        }
        let declared: BTreeSet<_> = Reason::ALL
            .iter()
            .map(|reason| (outcome_of(reason.code()).to_owned(), reason.name()))
            .collect();
        assert_eq!(listed, declared);
    }
}
