//! Verifies callers' certificates so that no revocation list of their CA is passed over.
//!
//! rustls takes the first list that fits a certificate: its issuer is encoded alike, and the list is about this kind
//! of certificate, and about a distribution point that the certificate names. If no list fits, rustls cannot tell a CA
//! that has no list from one whose lists are about something else, and accepts both. Here a list counts for every
//! certificate of the CA that it names.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::revocation::{Holder, RevocationList};

/// Accepts what `chain` accepts, unless a list of a certificate's CA names the certificate, or that CA has lists and
/// none of them is about the certificate.
#[derive(Debug)]
pub(super) struct ListedClientVerifier {
    /// Verifies the chain, and the signatures of the lists that fit.
    chain: Arc<dyn ClientCertVerifier>,
    lists: Vec<RevocationList>,
}

impl ListedClientVerifier {
    pub(super) fn new(chain: Arc<dyn ClientCertVerifier>, lists: Vec<RevocationList>) -> Self {
        Self { chain, lists }
    }

    /// Returns the fault of a certificate that a client presented, if the lists say of one.
    fn status(&self, certificate: &CertificateDer<'_>, holder: Holder) -> Result<(), Error> {
        let (_, certificate) = X509Certificate::from_der(certificate)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        // The end of a chain has signed itself. Whether it is trusted is for `chain` to say.
        if holder == Holder::Ca && certificate.issuer() == certificate.subject() {
            return Ok(());
        }
        let mut of_issuer =
            self.lists.iter().filter(|list| list.names_issuer_of(&certificate)).peekable();
        let has_list = of_issuer.peek().is_some();
        let (mut revoked, mut is_covered) = (false, false);
        for list in of_issuer {
            revoked |= list.revokes(&certificate);
            is_covered |= list.is_about(&certificate, holder);
        }
        match (revoked, has_list && !is_covered) {
            (true, _) => Err(CertificateError::Revoked.into()),
            (false, true) => Err(CertificateError::UnknownRevocationStatus.into()),
            (false, false) => Ok(()),
        }
    }
}

impl ClientCertVerifier for ListedClientVerifier {
    fn offer_client_auth(&self) -> bool {
        self.chain.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chain.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        self.status(end_entity, Holder::User)?;
        for intermediate in intermediates {
            self.status(intermediate, Holder::Ca)?;
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        self.chain.requires_raw_public_keys()
    }
}

#[cfg(test)]
mod tests;
