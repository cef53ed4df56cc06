use std::{fs, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    CrlDistributionPoint, CrlIssuingDistributionPoint, CrlScope, DnType, DnValue, IsCa,
    KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustls::{CertificateError, Error, pki_types::CertificateDer};

use super::super::{
    certificate::unix_time,
    reloaded::{Tls, TlsFiles},
};
use crate::domain::clock::Clock;

type Ca = CertifiedIssuer<'static, KeyPair>;
type Scope = Option<(&'static str, Option<CrlScope>)>;

const SERIAL: u64 = 7;
const HERE: &str = "http://crl.example/here";
const ELSEWHERE: &str = "http://crl.example/elsewhere";
const GOOD: Option<CertificateError> = None;
const REVOKED: Option<CertificateError> = Some(CertificateError::Revoked);
const UNKNOWN: Option<CertificateError> = Some(CertificateError::UnknownRevocationStatus);

fn params(name: impl Into<DnValue>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(4096, 1, 1);
    params
}

fn ca_params(name: impl Into<DnValue>) -> CertificateParams {
    let mut params = params(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

fn ca(name: impl Into<DnValue>) -> Ca {
    CertifiedIssuer::self_signed(ca_params(name), KeyPair::generate().unwrap()).unwrap()
}

fn points(uri: Option<&str>) -> Vec<CrlDistributionPoint> {
    uri.map(|uri| CrlDistributionPoint { uris: vec![uri.into()] }).into_iter().collect()
}

/// Returns a caller's certificate that names the distribution point `uri`.
fn leaf(ca: &Ca, uri: Option<&str>) -> CertificateDer<'static> {
    let mut params = params("caller");
    params.serial_number = Some(SerialNumber::from(SERIAL));
    params.crl_distribution_points = points(uri);
    params.signed_by(&KeyPair::generate().unwrap(), ca).unwrap().der().clone()
}

/// Returns a list that revokes the certificates with these numbers.
fn list(ca: &Ca, scope: Scope, serials: &[u64]) -> String {
    let revoked = serials.iter().map(|serial| RevokedCertParams {
        serial_number: (*serial).into(),
        revocation_time: date_time_ymd(2001, 1, 1),
        reason_code: None,
        invalidity_date: None,
    });
    let params = CertificateRevocationListParams {
        this_update: date_time_ymd(2001, 1, 1),
        next_update: date_time_ymd(4000, 1, 1),
        crl_number: 1.into(),
        issuing_distribution_point: scope.map(|(uri, scope)| CrlIssuingDistributionPoint {
            distribution_point: CrlDistributionPoint { uris: vec![uri.into()] },
            scope,
        }),
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(ca).unwrap().pem().unwrap()
}

/// Loads the files as a broker does.
fn load(directory: &Path, cas: &[&Ca], lists: &[String]) -> Tls {
    let own = rcgen::generate_simple_self_signed(vec!["broker.example".to_owned()]).unwrap();
    let file = |name: &str, text: String| {
        let file = directory.join(name);
        fs::write(&file, text).unwrap();
        file
    };
    let files = TlsFiles {
        cert: file("cert.pem", own.cert.pem()),
        key: file("key.pem", own.signing_key.serialize_pem()),
        client_ca: Some(file("ca.pem", cas.iter().map(|ca| ca.pem()).collect())),
        client_crl: Some(file("callers.crl", lists.concat())),
    };
    Tls::load(files, Clock::System).unwrap()
}

fn verify(tls: &Tls, chain: &[CertificateDer<'static>]) -> Option<CertificateError> {
    let verifier = tls.current.load().client_verifier.clone().unwrap();
    let now = unix_time(Clock::System.wall());
    match verifier.verify_client_cert(&chain[0], &chain[1..], now) {
        Ok(_) => None,
        Err(Error::InvalidCertificate(error)) => Some(error),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_list_counts_for_every_certificate_of_the_ca_that_it_names() {
    use CrlScope::{CaCertsOnly, UserCertsOnly};
    let ours = ca("Ours");
    let printable = ca(DnValue::PrintableString("Ours".try_into().unwrap()));
    let bmp = ca(DnValue::BmpString("Ours".try_into().unwrap()));
    let (other_case, another) = (ca("OURS "), ca("another"));
    let directory = tempfile::tempdir().unwrap();
    // What the list is about, whose it is, which distribution point the certificate names, and what becomes of the
    // certificate if the list does not have it.
    let table: [(&str, Scope, &Ca, Option<&str>, _); 14] = [
        ("everything", None, &ours, None, GOOD),
        ("everything, a point in the certificate", None, &ours, Some(HERE), GOOD),
        ("the certificate's point", Some((HERE, None)), &ours, Some(HERE), GOOD),
        ("the point of callers", Some((HERE, Some(UserCertsOnly))), &ours, Some(HERE), GOOD),
        ("a point, none in the certificate", Some((HERE, None)), &ours, None, GOOD),
        ("another point", Some((HERE, None)), &ours, Some(ELSEWHERE), UNKNOWN),
        (
            "another point of callers",
            Some((HERE, Some(UserCertsOnly))),
            &ours,
            Some(ELSEWHERE),
            UNKNOWN,
        ),
        ("only CAs", Some((HERE, Some(CaCertsOnly))), &ours, Some(HERE), UNKNOWN),
        ("only CAs, no point", Some((HERE, Some(CaCertsOnly))), &ours, None, UNKNOWN),
        (
            "a point that differs by case",
            Some((HERE, None)),
            &ours,
            Some("HTTP://crl.example/here"),
            UNKNOWN,
        ),
        ("the name as a printable string", None, &printable, None, UNKNOWN),
        ("the name in UTF-16", None, &bmp, None, UNKNOWN),
        ("the name in another case, with a space", None, &other_case, None, UNKNOWN),
        ("another CA", None, &another, None, GOOD),
    ];
    for (name, scope, issuer, uri, without) in table {
        let certificate = leaf(&ours, uri);
        let verified = |serials: &[u64]| {
            let tls = load(directory.path(), &[&ours], &[list(issuer, scope, serials)]);
            verify(&tls, std::slice::from_ref(&certificate))
        };
        assert_eq!(verified(&[1]), without, "{name}");
        let with = if issuer.der() == another.der() { GOOD } else { REVOKED };
        assert_eq!(verified(&[SERIAL]), with, "{name}, revoked");
    }
}

#[test]
fn a_ca_without_a_list_is_told_from_one_whose_lists_write_its_name_otherwise() {
    let (ours, another) = (ca("Ours"), ca("another"));
    let printable = ca(DnValue::PrintableString("Ours".try_into().unwrap()));
    let directory = tempfile::tempdir().unwrap();
    for (issuer, without_list, misnamed) in [(&ours, 0, 0), (&another, 1, 0), (&printable, 0, 1)] {
        let unlisted = load(directory.path(), &[&ours], &[list(issuer, None, &[])]).unlisted_cas();
        let found = (unlisted.without_list.len(), unlisted.misnamed.len());
        assert_eq!(found, (without_list, misnamed));
    }
}

#[test]
fn a_certificate_is_looked_for_in_all_lists_of_its_ca() {
    let ours = ca("ours");
    let directory = tempfile::tempdir().unwrap();
    for (first, second, uri) in [
        (&[SERIAL][..], &[][..], None),
        (&[], &[SERIAL], None),
        (&[], &[SERIAL], Some(HERE)),
        (&[SERIAL], &[], Some(ELSEWHERE)),
    ] {
        let lists =
            [list(&ours, Some((HERE, None)), first), list(&ours, Some((ELSEWHERE, None)), second)];
        let tls = load(directory.path(), &[&ours], &lists);
        assert_eq!(verify(&tls, &[leaf(&ours, uri)]), REVOKED, "{first:?} {second:?} {uri:?}");
        let lists =
            [list(&ours, Some((HERE, None)), &[1]), list(&ours, Some((ELSEWHERE, None)), &[2])];
        let tls = load(directory.path(), &[&ours], &lists);
        assert_eq!(verify(&tls, &[leaf(&ours, uri)]), GOOD, "{uri:?}");
    }
}

#[test]
fn the_lists_of_a_root_count_for_its_intermediate_cas() {
    let root = ca("root");
    let directory = tempfile::tempdir().unwrap();
    for (scope, uri, without) in [
        (None, None, GOOD),
        (Some((HERE, Some(CrlScope::CaCertsOnly))), Some(HERE), GOOD),
        (Some((HERE, None)), Some(ELSEWHERE), UNKNOWN),
        (Some((HERE, Some(CrlScope::UserCertsOnly))), Some(HERE), UNKNOWN),
    ] {
        let mut params = ca_params("intermediate");
        params.serial_number = Some(SerialNumber::from(SERIAL));
        params.crl_distribution_points = points(uri);
        let key = KeyPair::generate().unwrap();
        let intermediate = CertifiedIssuer::signed_by(params, key, &root).unwrap();
        // A client may send its root too, which has signed itself.
        let chain = [leaf(&intermediate, None), intermediate.der().clone(), root.der().clone()];
        let verified = |serials: &[u64]| {
            let tls = load(directory.path(), &[&root], &[list(&root, scope, serials)]);
            verify(&tls, &chain)
        };
        // The intermediate CA has no list of its own, so its certificates need none.
        assert_eq!(verified(&[1]), without, "{uri:?}");
        assert_eq!(verified(&[SERIAL]), REVOKED, "{uri:?}, revoked");
    }
}
