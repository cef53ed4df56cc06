//! The checks that are repeated before a token is sent, after the wait for the call's record.

use std::sync::Arc;

use crate::{
    domain::{account::CredentialVersion, clock::Timestamp},
    services::{
        account_cache::CachedAccount,
        caller_directory::CallerDirectory,
        token_provider::{CallRefusal, check_still_served},
    },
    store::callers::CredentialKey,
    tls::ClientCertificate,
};

/// By what the call's caller may have the token in the response.
pub(super) struct TokenAccess {
    pub(super) credential: CredentialKey,
    pub(super) certificate: Option<Arc<ClientCertificate>>,
    pub(super) account: Arc<CachedAccount>,
    /// The credential of the account that the token was issued with.
    pub(super) issued_with: CredentialVersion,
}

impl TokenAccess {
    /// Checks after the wait for the record that `callers` still has the credential, and a grant of the account,
    /// that neither has ended at `now`, by the database's clock, and that the account's token is still served.
    ///
    /// # Errors
    /// [`CallRefusal::CredentialRefused`], or as [`check_still_served`].
    pub(super) fn check(
        &self,
        callers: &CallerDirectory,
        now: Timestamp,
    ) -> Result<(), CallRefusal> {
        check_certificate(self.certificate.as_deref())?;
        let caller = callers
            .authenticate(&self.credential, now)
            .map_err(|_| CallRefusal::CredentialRefused)?;
        check_still_served(&caller, &self.account, self.issued_with, now)
    }
}

/// Checks that the client certificate of a call, if it has one, is still accepted.
pub(super) fn check_certificate(
    certificate: Option<&ClientCertificate>,
) -> Result<(), CallRefusal> {
    match certificate.and_then(ClientCertificate::refusal) {
        Some(_) => Err(CallRefusal::CredentialRefused),
        None => Ok(()),
    }
}
