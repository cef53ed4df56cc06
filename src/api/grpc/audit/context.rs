//! The context of a call, which the audit layer passes to the RPC.

use std::sync::Arc;

use http::HeaderMap;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    draft_record::DraftRecord,
    token_access::{TokenAccess, check_certificate},
};
use crate::{
    domain::{caller::Caller, token::Token},
    services::{account_cache::CachedAccount, token_provider::CallRefusal},
    store::callers::CredentialKey,
    tls::ClientCertificate,
};

/// The facts about a call that its RPC needs. The request carries them as an extension.
#[derive(Clone)]
pub struct CallContext {
    /// The authenticated caller.
    pub caller: Arc<Caller>,
    /// The credential by which the caller was authenticated.
    pub credential: CredentialKey,
    /// The client certificate, if the caller was authenticated by it.
    pub certificate: Option<Arc<ClientCertificate>>,
    /// When the RPC must have answered: a little before the call's deadline, so that the answer, even an
    /// error, reaches the client in time.
    pub deadline: Instant,
    /// The audit record of the call.
    pub draft: DraftRecord,
    /// Cancelled when the connection drains. A stream must end then.
    pub draining: CancellationToken,
}

impl CallContext {
    /// Checks that the client certificate which authenticated the caller, if any, is still accepted.
    ///
    /// # Errors
    /// [`CallRefusal::CredentialRefused`] if it has ended or was revoked meanwhile.
    pub fn check_certificate(&self) -> Result<(), CallRefusal> {
        check_certificate(self.certificate.as_deref())
    }

    /// Notes that the response holds `token` of `account`, in the call's record too. The audit layer does not
    /// send the response if the token, the credential, the grant or the account ends while the record is written.
    pub fn set_token(self, account: Arc<CachedAccount>, token: &Token) {
        let Self { credential, certificate, draft, .. } = self;
        let issued_with = token.credential_version;
        draft.set_token(token, TokenAccess { credential, certificate, account, issued_with });
    }
}

/// Returns the trace id in a W3C `traceparent` header, if it is well formed.
pub(super) fn trace_id_of(headers: &HeaderMap) -> Option<String> {
    let text = headers.get("traceparent")?.to_str().ok()?;
    let id = text.split('-').nth(1)?;
    let well_formed = id.len() == 32
        && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        && id.bytes().any(|b| b != b'0');
    well_formed.then(|| id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_well_formed_trace_id_is_recorded() {
        let trace = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", value.parse().unwrap());
            trace_id_of(&headers)
        };
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(trace(&format!("00-{id}-00f067aa0ba902b7-01")).as_deref(), Some(id));
        for bad in ["", "00", "00-short-1-01", &format!("00-{}-1-01", "0".repeat(32))] {
            assert_eq!(trace(bad), None);
        }
    }
}
