//! Certificate revocation lists: which certificates their CAs have revoked.

use std::{cmp::Reverse, collections::HashSet, fmt, path::Path, sync::Arc};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use x509_parser::{
    certificate::X509Certificate,
    extensions::{DistributionPointName, GeneralName, ParsedExtension, X509Extension},
    num_bigint::BigUint,
    oid_registry::{OID_X509_EXT_CRL_DISTRIBUTION_POINTS, OID_X509_EXT_ISSUER_DISTRIBUTION_POINT},
    prelude::FromDer,
    revocation_list::CertificateRevocationList,
};

use super::{
    error::{TlsError, malformed, pem_fault},
    name::ComparableName,
};
use crate::domain::clock::Timestamp;

/// Whose certificate it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Holder {
    /// A caller.
    User,
    /// An intermediate CA.
    Ca,
}

/// A list of the certificates that a CA has revoked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RevocationList {
    /// The name of the CA.
    pub issuer: String,
    /// The name of the CA as it is encoded, for comparison.
    encoded_issuer: Vec<u8>,
    /// The name of the CA, however it is encoded.
    issuer_name: ComparableName,
    /// Which of the CA's certificates the list is about; `None` if it is about all of them.
    pub scope: Option<ListScope>,
    /// The number of the list, if it has one. The CA raises it with each list.
    number: Option<BigUint>,
    /// When the CA made the list, in seconds since 1970.
    this_update: i64,
    /// When the CA publishes the next list at the latest, if it says so.
    pub next_update: Option<Timestamp>,
    /// How many certificates the list names.
    pub revoked: usize,
    /// The numbers of these certificates.
    serials: Arc<HashSet<BigUint>>,
}

/// Which of a CA's certificates a list is about: its issuing distribution point.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ListScope {
    /// The extension as it is encoded, for comparison.
    encoded: Vec<u8>,
    only_users: bool,
    only_cas: bool,
    /// A certificate that names distribution points must name one of these.
    uris: Vec<String>,
}

impl ListScope {
    fn of(extension: &X509Extension<'_>) -> Self {
        let encoded = extension.value.to_vec();
        let ParsedExtension::IssuingDistributionPoint(point) = extension.parsed_extension() else {
            return Self { encoded, only_users: true, only_cas: true, uris: Vec::new() };
        };
        Self {
            encoded,
            only_users: point.only_contains_user_certs,
            only_cas: point.only_contains_ca_certs,
            uris: uris(point.distribution_point.as_ref()).map(ToOwned::to_owned).collect(),
        }
    }

    fn includes(&self, certificate: &X509Certificate<'_>, holder: Holder) -> bool {
        let excluded = match holder {
            Holder::User => self.only_cas,
            Holder::Ca => self.only_users,
        };
        if excluded {
            return false;
        }
        let points = match certificate.get_extension_unique(&OID_X509_EXT_CRL_DISTRIBUTION_POINTS) {
            Ok(None) => return true,
            Ok(Some(extension)) => extension.parsed_extension(),
            Err(_) => return false,
        };
        let ParsedExtension::CRLDistributionPoints(points) = points else { return false };
        // A point that names another issuer, or some reasons only, is not about this kind of list.
        let own = points.iter().filter(|it| it.crl_issuer.is_none() && it.reasons.is_none());
        own.flat_map(|point| uris(point.distribution_point.as_ref()))
            .any(|uri| self.uris.iter().any(|own| own == uri))
    }
}

impl fmt::Display for ListScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let holders = match (self.only_users, self.only_cas) {
            (true, true) => "no certificates",
            (true, false) => "callers' certificates only",
            (false, true) => "certificates of CAs only",
            (false, false) => "certificates",
        };
        let uris = if self.uris.is_empty() { "none".into() } else { self.uris.join(", ") };
        write!(f, "{holders}, whose distribution point, if they name any, is {uris}")
    }
}

/// Returns the URIs of a distribution point.
fn uris<'a>(point: Option<&'a DistributionPointName<'_>>) -> impl Iterator<Item = &'a str> {
    let names: &[GeneralName<'_>] = match point {
        Some(DistributionPointName::FullName(names)) => names,
        _ => &[],
    };
    names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    })
}

impl RevocationList {
    /// Returns whether the list is of the CA that the certificate names as its issuer. It may be encoded otherwise.
    pub(super) fn names_issuer_of(&self, certificate: &X509Certificate<'_>) -> bool {
        self.issuer_name == ComparableName::of(certificate.issuer())
    }

    /// Returns whether the list has the certificate's number.
    pub(super) fn revokes(&self, certificate: &X509Certificate<'_>) -> bool {
        self.serials.contains(&certificate.serial)
    }

    /// Returns whether rustls can take the list to tell that the certificate is not revoked.
    pub(super) fn is_about(&self, certificate: &X509Certificate<'_>, holder: Holder) -> bool {
        self.encoded_issuer == certificate.issuer().as_raw()
            && self.scope.as_ref().is_none_or(|scope| scope.includes(certificate, holder))
    }

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
            issuer_name: ComparableName::of(list.issuer()),
            scope: list
                .extensions()
                .iter()
                .find(|extension| extension.oid == OID_X509_EXT_ISSUER_DISTRIBUTION_POINT)
                .map(ListScope::of),
            number: list.crl_number().cloned(),
            this_update: list.last_update().timestamp(),
            next_update: next_update.and_then(Timestamp::from_timestamp_secs),
            revoked: list.iter_revoked_certificates().count(),
            serials: Arc::new(
                list.iter_revoked_certificates().map(|it| it.serial().clone()).collect(),
            ),
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

/// The CAs for which the lists say less than somebody may expect, by name.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct UnlistedCas {
    /// The CAs of which there is no list: their certificates cannot be revoked.
    pub without_list: Vec<String>,
    /// The CAs whose name is written otherwise in their lists, in another encoding or case, so that no list is about
    /// their certificates: all of them are refused.
    pub misnamed: Vec<String>,
}

impl UnlistedCas {
    pub(super) fn of(cas: &[CertificateDer<'_>], lists: &[RevocationList]) -> Self {
        let mut unlisted = Self::default();
        for ca in cas.iter().filter_map(|ca| X509Certificate::from_der(ca).ok()).map(|(_, ca)| ca) {
            let name = ComparableName::of(ca.subject());
            let mut own = lists.iter().filter(|list| list.issuer_name == name).peekable();
            if own.peek().is_none() {
                unlisted.without_list.push(ca.subject().to_string());
            } else if own.all(|list| list.encoded_issuer != ca.subject().as_raw()) {
                unlisted.misnamed.push(ca.subject().to_string());
            }
        }
        unlisted
    }
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
