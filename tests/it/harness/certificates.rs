//! Certificates, made as a test needs them.

use std::{fs, path::Path, time::Duration};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType,
    date_time_ymd, string::Ia5String,
};
use token_broker::tls::TlsFiles;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// What the broker's own certificate names.
pub(crate) const BROKER: &str = "broker.test";

/// A CA of the test's own.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub(crate) struct Certified {
    pub(crate) cert: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate with these names: URIs where there is a scheme, else DNS names.
    pub(crate) fn issue(&self, names: &[&str]) -> Certified {
        self.issue_until(names, 4096)
    }

    /// One that ended long ago.
    pub(crate) fn issue_expired(&self, names: &[&str]) -> Certified {
        self.issue_until(names, 2001)
    }

    fn issue_until(&self, names: &[&str], year: i32) -> Certified {
        let mut params = CertificateParams::default();
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        let name = |name: &&str| {
            let text = Ia5String::try_from(*name).unwrap();
            if name.contains("://") { SanType::URI(text) } else { SanType::DnsName(text) }
        };
        params.subject_alt_names = names.iter().map(name).collect();
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        Certified { cert: cert.pem(), key: key.serialize_pem() }
    }
}

/// Writes what a broker serves TLS with into `directory`.
pub(crate) fn write(directory: &Path, broker: &Certified, callers: &[&Authority]) -> TlsFiles {
    let file = |name: &str, text: &str| {
        // Whole or not at all, as secret stores do.
        let (draft, file) = (directory.join(format!("{name}.new")), directory.join(name));
        fs::write(&draft, text).unwrap();
        fs::rename(draft, &file).unwrap();
        file
    };
    let cas: String = callers.iter().map(|ca| ca.pem()).collect();
    TlsFiles {
        cert: file("broker.pem", &broker.cert),
        key: file("broker.key", &broker.key),
        client_ca: (!callers.is_empty()).then(|| file("callers.pem", &cas)),
    }
}

/// A connection that trusts `authority`, with the client certificate `own` if there is one.
pub(crate) async fn connect(
    port: u16,
    authority: &Authority,
    own: Option<&Certified>,
) -> Result<Channel, tonic::transport::Error> {
    connect_trusting(port, &[authority], own).await
}

/// The same, trusting several.
pub(crate) async fn connect_trusting(
    port: u16,
    authorities: &[&Authority],
    own: Option<&Certified>,
) -> Result<Channel, tonic::transport::Error> {
    let trusted = authorities.iter().map(|authority| Certificate::from_pem(authority.pem()));
    let mut tls = ClientTlsConfig::new().ca_certificates(trusted).domain_name(BROKER);
    if let Some(own) = own {
        tls = tls.identity(Identity::from_pem(&own.cert, &own.key));
    }
    Endpoint::from_shared(format!("https://127.0.0.1:{port}"))
        .unwrap()
        .connect_timeout(Duration::from_mins(1))
        .tls_config(tls)
        .unwrap()
        .connect()
        .await
}
