//! A certificate authority for tests, and connections with TLS.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    CrlDistributionPoint, CrlIssuingDistributionPoint, DnType, IsCa, KeyIdMethod, KeyPair,
    RevokedCertParams, SanType, SerialNumber, date_time_ymd, string::Ia5String,
};
use token_broker::tls::TlsFiles;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::TEST_TIMEOUT;

/// The DNS name in the broker's certificate, which clients verify.
pub(crate) const BROKER_DNS_NAME: &str = "broker.test";

/// A certificate authority with a self-signed certificate.
pub(crate) struct TestCa(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its private key, both in PEM.
#[derive(Clone)]
pub(crate) struct PemIdentity {
    pub(crate) cert: String,
    pub(crate) key: String,
}

impl TestCa {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Creates an authority that is valid from the beginning of one year to that of another.
    pub(crate) fn valid(name: &str, from: i32, until: i32) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        (params.not_before, params.not_after) =
            (date_time_ymd(from, 1, 1), date_time_ymd(until, 1, 1));
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Returns the authority's own certificate in PEM.
    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// Issues a certificate with these alternative names. A name that contains `://` is a URI, and any other
    /// that is not an IP address is a DNS name.
    pub(crate) fn issue(&self, names: &[&str]) -> PemIdentity {
        self.issue_until(names, 4096)
    }

    /// Issues a certificate that expired in 2001.
    pub(crate) fn issue_expired(&self, names: &[&str]) -> PemIdentity {
        self.issue_until(names, 2001)
    }

    fn issue_until(&self, names: &[&str], year: i32) -> PemIdentity {
        self.issue_numbered(names, year, None)
    }

    /// Issues a certificate that ends at the beginning of `year`, with this serial number if any.
    pub(crate) fn issue_numbered(
        &self,
        names: &[&str],
        year: i32,
        serial: Option<u64>,
    ) -> PemIdentity {
        self.issue_with_point(names, year, serial, None)
    }

    /// Like [`Self::issue_numbered`], with a CRL distribution point.
    pub(crate) fn issue_with_point(
        &self,
        names: &[&str],
        year: i32,
        serial: Option<u64>,
        point: Option<&str>,
    ) -> PemIdentity {
        let mut params = CertificateParams::default();
        params.crl_distribution_points = point.map(distribution_point).into_iter().collect();
        params.serial_number = serial.map(SerialNumber::from);
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        let name = |name: &&str| {
            if let Ok(address) = name.parse() {
                return SanType::IpAddress(address);
            }
            let text = Ia5String::try_from(*name).unwrap();
            if name.contains("://") { SanType::URI(text) } else { SanType::DnsName(text) }
        };
        params.subject_alt_names = names.iter().map(name).collect();
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        PemIdentity { cert: cert.pem(), key: key.serialize_pem() }
    }

    /// Returns a list, in PEM, that revokes the certificates with these serial numbers, and is valid until
    /// the beginning of `next_update`.
    pub(crate) fn revocation_list(&self, serials: &[u64], next_update: i32) -> String {
        self.scoped_revocation_list(serials, next_update, None)
    }

    /// Like [`Self::revocation_list`], for certificates with the CRL distribution point `point`.
    pub(crate) fn scoped_revocation_list(
        &self,
        serials: &[u64],
        next_update: i32,
        point: Option<&str>,
    ) -> String {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: (*serial).into(),
            revocation_time: date_time_ymd(2001, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2000, 1, 1),
            next_update: date_time_ymd(next_update, 1, 1),
            crl_number: 1.into(),
            issuing_distribution_point: point.map(|uri| CrlIssuingDistributionPoint {
                distribution_point: distribution_point(uri),
                scope: None,
            }),
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.0).unwrap().pem().unwrap()
    }
}

fn distribution_point(uri: &str) -> CrlDistributionPoint {
    CrlDistributionPoint { uris: vec![uri.to_owned()] }
}

/// Writes the lists of revoked certificates beside the other TLS files, and returns the file.
pub(crate) fn write_revocation_lists(directory: &Path, lists: &[String]) -> PathBuf {
    replace_file(directory, "callers.crl", &lists.concat())
}

/// Replaces the file atomically, as a broker that reads it at any time expects.
fn replace_file(directory: &Path, name: &str, text: &str) -> PathBuf {
    let (temporary, file) = (directory.join(format!("{name}.new")), directory.join(name));
    fs::write(&temporary, text).unwrap();
    fs::rename(temporary, &file).unwrap();
    file
}

/// Writes the TLS files of a broker into `directory`, replacing existing ones: its certificate and
/// key, and the authorities of client certificates, if any.
pub(crate) fn write_tls_files(
    directory: &Path,
    broker: &PemIdentity,
    client_cas: &[&TestCa],
) -> TlsFiles {
    let file = |name: &str, text: &str| replace_file(directory, name, text);
    let cas: String = client_cas.iter().map(|ca| ca.pem()).collect();
    TlsFiles {
        cert: file("broker.pem", &broker.cert),
        key: file("broker.key", &broker.key),
        client_ca: (!client_cas.is_empty()).then(|| file("callers.pem", &cas)),
        client_crl: None,
    }
}

/// Connects with TLS to a broker on this machine, whose certificate `ca` must have issued. `identity` is
/// the client certificate, if any.
pub(crate) async fn connect_tls(
    port: u16,
    ca: &TestCa,
    identity: Option<&PemIdentity>,
) -> Result<Channel, tonic::transport::Error> {
    connect_tls_trusting(port, &[ca], identity).await
}

/// Like [`connect_tls`], but trusts several authorities.
pub(crate) async fn connect_tls_trusting(
    port: u16,
    cas: &[&TestCa],
    identity: Option<&PemIdentity>,
) -> Result<Channel, tonic::transport::Error> {
    let trusted = cas.iter().map(|ca| Certificate::from_pem(ca.pem()));
    let mut tls = ClientTlsConfig::new().ca_certificates(trusted).domain_name(BROKER_DNS_NAME);
    if let Some(PemIdentity { cert, key }) = identity {
        tls = tls.identity(Identity::from_pem(cert, key));
    }
    Endpoint::from_shared(format!("https://127.0.0.1:{port}"))
        .unwrap()
        .connect_timeout(TEST_TIMEOUT)
        .tls_config(tls)
        .unwrap()
        .connect()
        .await
}
