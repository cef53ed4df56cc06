//! Reads certificates: the identity that a client certificate names, and the end of a certificate.

use std::time::Duration;

use rustls::pki_types::{CertificateDer, UnixTime};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use crate::domain::clock::Timestamp;

/// How many DNS names of one certificate are considered; later ones are ignored.
const MAX_DNS_NAMES: usize = 16;

/// The identity that a verified client certificate names.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PeerIdentity {
    /// The certificate's only URI is a SPIFFE ID.
    Spiffe {
        /// The whole SPIFFE ID.
        id: String,
        /// The trust domain of the ID.
        trust_domain: String,
    },
    /// The certificate has no URI, and these DNS names, in lower case.
    Dns(Vec<String>),
    /// The certificate identifies no caller, for this reason.
    Unidentified(&'static str),
}

impl PeerIdentity {
    /// Returns the identity that `certificate` names. A SPIFFE certificate has exactly one URI (SPIFFE
    /// X.509-SVID, section 2). A certificate with a URI is never identified by its DNS names.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
            return Self::Unidentified("the certificate cannot be read");
        };
        let Ok(Some(names)) = parsed.subject_alternative_name() else {
            return Self::Unidentified("the certificate has no subject alternative name");
        };
        let (mut uris, mut dns) = (Vec::new(), Vec::new());
        for name in &names.value.general_names {
            match name {
                GeneralName::URI(uri) => uris.push(*uri),
                GeneralName::DNSName(name) if dns.len() < MAX_DNS_NAMES => {
                    dns.push(name.to_ascii_lowercase());
                }
                _ => {}
            }
        }
        match uris[..] {
            [] if dns.is_empty() => {
                Self::Unidentified("the certificate has neither URI nor DNS name")
            }
            [] => Self::Dns(dns),
            [uri] => spiffe(uri),
            _ => Self::Unidentified("the certificate has more than one URI"),
        }
    }
}

impl PeerIdentity {
    /// Returns the names for the audit log; `None` if the certificate identifies nobody.
    #[must_use]
    pub fn names(&self) -> Option<String> {
        match self {
            Self::Spiffe { id, .. } => Some(id.clone()),
            Self::Dns(names) => Some(names.join(",")),
            Self::Unidentified(_) => None,
        }
    }
}

fn spiffe(uri: &str) -> PeerIdentity {
    let Some((trust_domain, path)) =
        uri.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/'))
    else {
        return PeerIdentity::Unidentified("the certificate's URI is no SPIFFE ID of a workload");
    };
    if trust_domain.is_empty() || path.is_empty() {
        return PeerIdentity::Unidentified("the certificate's URI is no SPIFFE ID of a workload");
    }
    PeerIdentity::Spiffe { id: uri.to_owned(), trust_domain: trust_domain.to_owned() }
}

/// Returns when a certificate ends; `None` if it cannot be read.
pub(super) fn not_after(certificate: &CertificateDer<'_>) -> Option<Timestamp> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Timestamp::from_timestamp_secs(parsed.validity().not_after.timestamp())
}

/// Returns the name of the certificate's holder, for people.
pub(super) fn subject(certificate: &CertificateDer<'_>) -> String {
    let parsed = X509Certificate::from_der(certificate);
    parsed.map(|(_, parsed)| parsed.subject().to_string()).unwrap_or_default()
}

/// The time in which a certificate is valid, both ends included.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Validity {
    not_before: i64,
    not_after: i64,
}

impl Validity {
    /// Returns the time of `certificate`; `None` if it cannot be read.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let validity = parsed.validity();
        let (not_before, not_after) =
            (validity.not_before.timestamp(), validity.not_after.timestamp());
        Some(Self { not_before, not_after })
    }

    pub(super) fn contains(self, now: UnixTime) -> bool {
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        (self.not_before..=self.not_after).contains(&now)
    }
}

/// Returns `now` in the form that rustls takes. Times before 1970 become 1970.
pub(super) fn unix_time(now: Timestamp) -> UnixTime {
    let seconds = u64::try_from(now.timestamp()).unwrap_or_default();
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType, string::Ia5String};

    use super::*;

    fn certificate(names: Vec<SanType>) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().into()
    }

    fn ia5(text: &str) -> Ia5String {
        text.try_into().unwrap()
    }

    #[test]
    fn one_uri_names_a_workload_and_dns_names_count_without_one() {
        let (uri, dns) = (|text| SanType::URI(ia5(text)), |text| SanType::DnsName(ia5(text)));
        let id = "spiffe://example.com/billing";
        let spiffe = PeerIdentity::Spiffe { id: id.into(), trust_domain: "example.com".into() };
        assert_eq!(
            PeerIdentity::of(&certificate(vec![uri(id), dns("billing.example.com")])),
            spiffe
        );
        let names = vec!["a.example.com".to_owned(), "b.example.com".to_owned()];
        let several = vec![dns("A.example.com"), dns("b.example.com")];
        assert_eq!(PeerIdentity::of(&certificate(several)), PeerIdentity::Dns(names));
        for names in [
            vec![uri(id), uri("spiffe://example.com/other")],
            vec![uri(id), uri("https://example.com/")],
            vec![uri("https://example.com/billing"), dns("billing.example.com")],
            vec![uri("spiffe://example.com")],
            vec![uri("spiffe://example.com/")],
            vec![uri("spiffe:///billing")],
            vec![SanType::IpAddress([127, 0, 0, 1].into())],
            vec![],
        ] {
            let shown = PeerIdentity::of(&certificate(names));
            assert!(matches!(shown, PeerIdentity::Unidentified(_)), "{shown:?}");
        }
        assert!(matches!(
            PeerIdentity::of(&b"no certificate"[..].into()),
            PeerIdentity::Unidentified(_)
        ));
    }

    #[test]
    fn a_certificate_is_valid_from_its_first_to_its_last_second() {
        let mut params = CertificateParams::default();
        params.not_before = rcgen::date_time_ymd(2026, 1, 1);
        params.not_after = rcgen::date_time_ymd(2027, 1, 1);
        let dated = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let validity = Validity::of(dated.der()).unwrap();
        let (first, last) = (1_767_225_600, 1_798_761_600);
        for (second, valid) in
            [(first - 1, false), (first, true), (last, true), (last + 1, false), (0, false)]
        {
            let now = UnixTime::since_unix_epoch(Duration::from_secs(second));
            assert_eq!(validity.contains(now), valid, "{second}");
        }
    }
}
