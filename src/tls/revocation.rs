//! Certificate revocation lists: which certificates their CAs have revoked.

use std::{cmp::Reverse, path::Path};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use x509_parser::{
    certificate::X509Certificate, num_bigint::BigUint,
    oid_registry::OID_X509_EXT_ISSUER_DISTRIBUTION_POINT, prelude::FromDer,
    revocation_list::CertificateRevocationList,
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
    /// The encoded issuing distribution point. It says which of the CA's certificates the list is about; a list
    /// without it is about all of them.
    scope: Option<Vec<u8>>,
    /// The number of the list, if it has one. The CA raises it with each list.
    number: Option<BigUint>,
    /// When the CA made the list, in seconds since 1970.
    this_update: i64,
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

    /// Returns whether one of the two lists replaces the other.
    fn is_about_the_same_as(&self, other: &Self) -> bool {
        self.encoded_issuer == other.encoded_issuer && self.scope == other.scope
    }

    /// Returns whether this list was made after `other`, which is about the same certificates. The numbers
    /// decide if both lists have one (RFC 5280, section 5.2.3).
    fn is_newer_than(&self, other: &Self) -> bool {
        let numbers = self.number.as_ref().zip(other.number.as_ref());
        let by_number = numbers.map(|(own, others)| own.cmp(others)).filter(|it| it.is_ne());
        by_number.unwrap_or_else(|| self.this_update.cmp(&other.this_update)).is_gt()
    }

    fn of(der: &CertificateRevocationListDer<'_>) -> Option<Self> {
        let (_, list) = CertificateRevocationList::from_der(der).ok()?;
        let next_update = list.next_update().map(|time| time.timestamp());
        Some(Self {
            issuer: list.issuer().to_string(),
            encoded_issuer: list.issuer().as_raw().to_vec(),
            scope: list
                .extensions()
                .iter()
                .find(|extension| extension.oid == OID_X509_EXT_ISSUER_DISTRIBUTION_POINT)
                .map(|extension| extension.value.to_vec()),
            number: list.crl_number().cloned(),
            this_update: list.last_update().timestamp(),
            next_update: next_update.and_then(Timestamp::from_timestamp_secs),
            revoked: list.iter_revoked_certificates().count(),
        })
    }
}

/// Returns the lists in a PEM file that are to be used, read and as they are encoded: of several that are about
/// the same certificates of one CA, only the newest, since rustls looks only into the first one that fits a
/// certificate. Of two that are equally new, it is the later one in the file.
///
/// At least one is required, so that a file which was emptied by accident does not revoke all revocations.
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
    let mut newest: Vec<(RevocationList, CertificateRevocationListDer<'static>)> = Vec::new();
    for der in encoded {
        let list = RevocationList::of(&der)
            .ok_or_else(|| malformed(file, "a certificate revocation list cannot be read"))?;
        match newest.iter().position(|(other, _)| other.is_about_the_same_as(&list)) {
            Some(at) if newest[at].0.is_newer_than(&list) => {}
            Some(at) => newest[at] = (list, der),
            None => newest.push((list, der)),
        }
    }
    // A certificate may fit two lists of different scope. Then the newer one counts.
    newest.sort_by_key(|(list, _)| Reverse(list.this_update));
    Ok(newest.into_iter().unzip())
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

#[cfg(test)]
mod tests {
    use rcgen::{
        CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType, KeyIdMethod,
        KeyPair, RevokedCertParams, date_time_ymd,
    };

    use super::*;

    fn ca(name: &str) -> CertifiedIssuer<'static, KeyPair> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    /// Returns a list with this number, made at the beginning of `year`, that revokes `revoked` certificates.
    fn list(
        ca: &CertifiedIssuer<'static, KeyPair>,
        number: u64,
        year: i32,
        revoked: u64,
    ) -> String {
        let revoked = (1..=revoked).map(|serial| RevokedCertParams {
            serial_number: serial.into(),
            revocation_time: date_time_ymd(2001, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(year, 1, 1),
            next_update: date_time_ymd(4000, 1, 1),
            crl_number: number.into(),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(ca).unwrap().pem().unwrap()
    }

    /// Returns how many certificates each list that is used names.
    fn used(pem: &[String]) -> Vec<usize> {
        let (lists, encoded) = lists(Path::new("crl"), pem.concat().as_bytes()).unwrap();
        let reread: Vec<_> = encoded.iter().map(|der| RevocationList::of(der).unwrap()).collect();
        assert_eq!(reread, lists);
        lists.iter().map(|list| list.revoked).collect()
    }

    #[test]
    fn of_the_lists_of_one_ca_only_the_newest_is_used() {
        let ours = ca("ours");
        let (old, new) = (list(&ours, 255, 2001, 1), list(&ours, 256, 2002, 2));
        assert_eq!(used(&[old.clone(), new.clone()]), [2]);
        assert_eq!(used(&[new, old.clone()]), [2]);
        let renumbered = list(&ours, 300, 2000, 3);
        assert_eq!(used(&[renumbered.clone(), old.clone()]), [3], "the number decides");
        assert_eq!(used(&[old.clone(), renumbered]), [3], "the number decides");
        let later = list(&ours, 255, 2002, 4);
        assert_eq!(used(&[later.clone(), old.clone()]), [4], "of one number, the time decides");
        assert_eq!(
            used(&[old.clone(), list(&ours, 255, 2001, 5)]),
            [5],
            "the later one in the file"
        );
    }

    #[test]
    fn lists_of_several_cas_are_all_used() {
        let (first, second) = (ca("first"), ca("second"));
        let lists = [list(&first, 9, 2001, 1), list(&second, 1, 2001, 2)];
        assert_eq!(used(&lists), [1, 2]);
    }
}
