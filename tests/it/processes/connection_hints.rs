//! `token get` says what to do when there is no token.

use std::{
    io::Read,
    net::{Shutdown, SocketAddr, TcpListener},
    path::Path,
    sync::Arc,
    thread,
};

use nix::sys::signal::Signal;
use rustls::{
    RootCertStore, ServerConfig, ServerConnection,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};

use crate::harness::{
    broker::Fixture,
    certificates::{PemIdentity, TestCa, write_tls_files},
    eventually,
    process::{BrokerProcess, BrokerSetup, free_address, program, run},
};

/// Accepts connections as a server with this certificate, and ends each after its handshake. With `client_ca`, a
/// client certificate is required.
fn handshakes(identity: &PemIdentity, client_ca: Option<&TestCa>) -> SocketAddr {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let certificates = |pem: &str| -> Vec<_> {
        CertificateDer::pem_slice_iter(pem.as_bytes()).map(Result::unwrap).collect()
    };
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap();
    let config = match client_ca {
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(certificates(&ca.pem()));
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            config.with_client_cert_verifier(verifier.unwrap())
        }
        None => config.with_no_client_auth(),
    };
    let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
    let mut config = config.with_single_cert(certificates(&identity.cert), key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut tls = ServerConnection::new(Arc::clone(&config)).unwrap();
            // A failure is what the client is asked about. A socket with unread data would be reset, and the
            // alert be lost.
            let _ = tls.complete_io(&mut stream);
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.read_to_end(&mut vec![]);
        }
    });
    address
}

/// Runs `token get ACCOUNT` with these settings only. Returns what it prints on standard error.
async fn refusal(account: &str, settings: &[(&str, &str)]) -> String {
    let mut command = program(&["token", "get", account]);
    command.envs(settings.iter().map(|(name, value)| (format!("TOKEN_BROKER_{name}"), value)));
    run(command, "").await.failed()
}

fn path(directory: &Path, name: &str, text: &str) -> String {
    let file = directory.join(name);
    std::fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_connection_that_fails_leads_to_a_hint_at_its_cause() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, other) = (TestCa::new("ours"), TestCa::new("other"));
    let ca = path(directory.path(), "ca.pem", &ours.pem());
    let other_ca = path(directory.path(), "other.pem", &other.pem());
    let https = |address: SocketAddr| format!("https://{address}");
    let good = handshakes(&ours.issue(&["127.0.0.1"]), None);
    let elsewhere = handshakes(&ours.issue(&["broker.test"]), None);
    let expired = handshakes(&ours.issue_expired(&["127.0.0.1"]), None);
    let mutual = handshakes(&ours.issue(&["127.0.0.1"]), Some(&ours));
    let nobody = free_address();
    for (what, endpoint, ca, hint) in [
        ("a wrong CA", https(good), Some(&other_ca), "does not come from a CA in "),
        ("an unknown CA", https(good), None, "set TOKEN_BROKER_CA_FILE to that CA"),
        (
            "another host",
            https(elsewhere),
            Some(&ca),
            "a host name that is in the broker's certificate",
        ),
        (
            "an expired certificate",
            https(expired),
            Some(&ca),
            "an admin replaces the broker's certificate",
        ),
        ("no client certificate", https(mutual), Some(&ca), "TOKEN_BROKER_CLIENT_CERT and TOKEN"),
        (
            "nobody there",
            format!("http://{nobody}"),
            None,
            &format!("is a broker running at http://{nobody}?"),
        ),
        (
            "nobody there with TLS",
            https(nobody),
            Some(&ca),
            &format!("is a broker running at https://{nobody}?"),
        ),
        (
            "an unknown host",
            "http://nobody.invalid:1".into(),
            None,
            "is the host name in TOKEN_BROKER_ENDPOINT right?",
        ),
        ("TLS, spoken to without", format!("http://{good}"), None, "One with TLS needs https://"),
    ] {
        let mut settings = vec![("ENDPOINT", endpoint.as_str())];
        settings.extend(ca.map(|file| ("CA_FILE", file.as_str())));
        let printed = refusal("acme", &settings).await;
        assert!(printed.starts_with("error: UNAVAILABLE: "), "{what}: {printed}");
        assert!(printed.contains("\n  hint: ") && printed.contains(hint), "{what}: {printed}");
    }
    let unnamed = run(program(&["token", "get", "acme", "--endpoint", "https://broker"]), "").await;
    assert_eq!(unnamed.code, Some(2), "{unnamed:?}");
    assert!(unnamed.stderr.contains("a host and a port"), "{unnamed:?}");
}

#[tokio::test]
async fn a_refusal_of_the_broker_leads_to_a_hint_and_a_stream_without_a_token_says_why() {
    let fixture = Fixture::new().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let mut setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let ours = TestCa::new("ours");
    let ca = path(setup.directory.path(), "ca.pem", &ours.pem());
    let mut plain = setup.serve().await;
    fixture.wait_for_state("acme", "fresh").await;

    let (http, https) = (setup.endpoint(), format!("https://{}", setup.grpc));
    let printed = refusal("acme", &[("ENDPOINT", &https), ("CA_FILE", &ca)]).await;
    assert!(printed.contains("One without TLS needs http://"), "{printed}");
    let printed = refusal("acme", &[("ENDPOINT", &http)]).await;
    assert!(printed.contains("CREDENTIAL_MISSING"), "{printed}");
    assert!(printed.contains("or TOKEN_BROKER_CLIENT_CERT and"), "{printed}");
    let settings = [("ENDPOINT", http.as_str()), ("BEARER", bearer.expose())];
    let printed = refusal("unknown", &settings).await;
    assert!(printed.contains("NO_SUCH_ACCOUNT") && printed.contains("account list"), "{printed}");

    setup.run(&["account", "disable", "acme"]).await.ok();
    let mut watches = vec![];
    for (account, says) in [
        ("acme", "acme has no token now; waiting for one: FAILED_PRECONDITION (ACCOUNT_DISABLED)"),
        ("ac*", "no token yet of an account that ac* matches; waiting"),
    ] {
        let mut command = program(&["token", "get", account, "--watch"]);
        command.envs(settings.map(|(name, value)| (format!("TOKEN_BROKER_{name}"), value)));
        let watch = BrokerProcess::start(command);
        eventually("why there is no token", async || watch.stderr().contains(says).then_some(()))
            .await;
        assert_eq!(watch.stdout(), "");
        watches.push(watch);
    }
    setup.run(&["account", "enable", "acme"]).await.ok();
    for watch in &mut watches {
        watch.wait_for_stdout("eyJ").await;
    }
    plain.signal(Signal::SIGTERM);
    plain.wait().await;

    let identity = ours.issue(&["127.0.0.1"]);
    setup.set_tls(&write_tls_files(setup.directory.path(), &identity, &[&ours]));
    let mut serve = setup.serve().await;
    let printed = refusal("acme", &[("ENDPOINT", &http)]).await;
    assert!(printed.contains("One with TLS needs https://"), "{printed}");
    let printed = refusal("acme", &[("ENDPOINT", &https), ("CA_FILE", &ca)]).await;
    assert!(printed.contains("CREDENTIAL_MISSING"), "{printed}");
    assert!(printed.contains("or TOKEN_BROKER_CLIENT_CERT and"), "{printed}");
    serve.signal(Signal::SIGTERM);
    serve.wait().await;
}
