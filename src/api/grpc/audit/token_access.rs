//! What a caller needs for the token in a response, checked again before the response is sent.

use std::sync::Arc;

use crate::{
    domain::{account::AccountName, caller::Right, clock::Timestamp},
    services::{caller_directory::CallerDirectory, token_provider::CallRefusal},
    store::callers::CredentialKey,
    tls::ClientCertificate,
};

/// By what the call's caller may have the token in the response.
pub(super) struct TokenAccess {
    pub(super) credential: CredentialKey,
    pub(super) certificate: Option<Arc<ClientCertificate>>,
    pub(super) account: AccountName,
}

impl TokenAccess {
    /// Checks after the wait for the record that `callers` still has the credential, and a grant of the account,
    /// and that neither has ended at `now`, by the database's clock.
    ///
    /// # Errors
    /// [`CallRefusal::CredentialRefused`] or [`CallRefusal::NotGranted`].
    pub(super) fn check(
        &self,
        callers: &CallerDirectory,
        now: Timestamp,
    ) -> Result<(), CallRefusal> {
        check_certificate(self.certificate.as_deref())?;
        let caller = callers
            .authenticate(&self.credential, now)
            .map_err(|_| CallRefusal::CredentialRefused)?;
        if caller.permits(Right::Get, &self.account, now) {
            Ok(())
        } else {
            Err(CallRefusal::NotGranted)
        }
    }
}

/// Checks that a client certificate, if there is one, is still accepted.
///
/// # Errors
/// [`CallRefusal::CredentialRefused`] if it has ended or was revoked.
pub(super) fn check_certificate(
    certificate: Option<&ClientCertificate>,
) -> Result<(), CallRefusal> {
    match certificate.and_then(ClientCertificate::refusal) {
        Some(_) => Err(CallRefusal::CredentialRefused),
        None => Ok(()),
    }
}
