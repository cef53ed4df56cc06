//! Certificate revocation lists: which certificates their CAs have revoked.

use std::path::Path;

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use x509_parser::{
    certificate::X509Certificate, prelude::FromDer, revocation_list::CertificateRevocationList,
};

use super::error::{TlsError, malformed, pem_fault};
use crate::domain::clock::Timestamp;

/// A list of the certificates that a CA has revoked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RevocationList {
    /// The name of the CA.
    pub issuer: String,
    /// The name of the CA as it is encoded, for comparison.
    encoded_issuer: Vec<u8>,
    /// When the CA publishes the next list at the latest, if it says so.
    pub next_update: Option<Timestamp>,
    /// How many certificates the list names.
    pub revoked: usize,
}

impl RevocationList {
    /// Returns whether a newer list is due.
    #[must_use]
    pub fn is_out_of_date(&self, now: Timestamp) -> bool {
        self.next_update.is_some_and(|next| next < now)
    }

    fn of(der: &CertificateRevocationListDer<'_>) -> Option<Self> {
        let (_, list) = CertificateRevocationList::from_der(der).ok()?;
        let next_update = list.next_update().map(|time| time.timestamp());
        Some(Self {
            issuer: list.issuer().to_string(),
            encoded_issuer: list.issuer().as_raw().to_vec(),
            next_update: next_update.and_then(Timestamp::from_timestamp_secs),
            revoked: list.iter_revoked_certificates().count(),
        })
    }
}

/// Returns the lists in a PEM file, read and as they are encoded. At least one is required, so that a file
/// which was emptied by accident does not revoke all revocations.
pub(super) fn lists(
    file: &Path,
    pem: &[u8],
) -> Result<(Vec<RevocationList>, Vec<CertificateRevocationListDer<'static>>), TlsError> {
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(pem).collect();
    let encoded =
        found.map_err(|error| malformed(file, &format!("it is not PEM: {}", pem_fault(&error))))?;
    if encoded.is_empty() {
        return Err(malformed(file, "it holds no certificate revocation list in PEM"));
    }
    let unreadable = || malformed(file, "a certificate revocation list cannot be read");
    let lists: Option<Vec<_>> = encoded.iter().map(RevocationList::of).collect();
    Ok((lists.ok_or_else(unreadable)?, encoded))
}

/// Returns the names of the CAs of which no list is.
pub(super) fn cas_without_list(
    cas: &[CertificateDer<'_>],
    lists: &[RevocationList],
) -> Vec<String> {
    cas.iter()
        .filter_map(|ca| X509Certificate::from_der(ca).ok())
        .map(|(_, ca)| ca)
        .filter(|ca| lists.iter().all(|list| list.encoded_issuer != ca.subject().as_raw()))
        .map(|ca| ca.subject().to_string())
        .collect()
}
