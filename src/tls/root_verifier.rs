//! Refuses callers' certificates whose CA has ended, or is not valid yet. The library takes the CAs as trusted, whatever
//! times they name.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use super::certificate::Validity;

/// Accepts what `all` accepts, if a CA that is valid at that moment suffices for it.
#[derive(Debug)]
pub(super) struct ValidRootVerifier {
    /// Trusts all CAs.
    all: Arc<dyn ClientCertVerifier>,
    /// Each CA's time, and a verifier that trusts that CA alone.
    each: Vec<(Validity, Arc<dyn ClientCertVerifier>)>,
}

impl ValidRootVerifier {
    pub(super) fn new(
        all: Arc<dyn ClientCertVerifier>,
        each: Vec<(Validity, Arc<dyn ClientCertVerifier>)>,
    ) -> Self {
        Self { all, each }
    }
}

impl ClientCertVerifier for ValidRootVerifier {
    fn offer_client_auth(&self) -> bool {
        self.all.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.all.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.all.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.all.verify_client_cert(end_entity, intermediates, now)?;
        // Usually all are, and one verification suffices.
        if self.each.iter().all(|(validity, _)| validity.contains(now)) {
            return Ok(verified);
        }
        let mut valid = self.each.iter().filter(|(validity, _)| validity.contains(now));
        let accepted =
            valid.any(|(_, ca)| ca.verify_client_cert(end_entity, intermediates, now).is_ok());
        // Its CA is known, and not valid at the moment.
        if accepted { Ok(verified) } else { Err(CertificateError::Expired.into()) }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.all.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.all.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.all.supported_verify_schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        self.all.requires_raw_public_keys()
    }
}
