//! `check`: what it proves of the way to the upstream, and by `--issue` of the whole.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
};

use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde_json::Value;
use token_broker::dev::simulator::{Simulator, SimulatorOptions};

use crate::harness::{database::TestDatabase, process::BrokerSetup};

/// No database: what is looked at here comes after it.
const NO_DATABASE: &str = "postgresql://127.0.0.1:9/nobody?sslmode=disable";
/// Whom the certificate below comes from. Its key is gone: what it has signed is all there will be.
const AUTHORITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/processes/tls/ca.pem");
/// A certificate of `localhost`, and its key.
const CERTIFICATE: &[u8] = include_bytes!("tls/server.pem");
const KEY: &[u8] = include_bytes!("tls/server.key");

/// Serves one connection with `serve`, in a thread; where, and what came of it.
fn once<T: Send + 'static>(
    serve: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> (SocketAddr, thread::JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let served = thread::spawn(move || {
        // The first connection is the probe that says nothing.
        drop(listener.accept().unwrap());
        serve(listener.accept().unwrap().0)
    });
    (address, served)
}

/// Reads a request's head from `stream`, and answers it with `status`; the head.
fn answer(stream: &mut (impl Read + Write), status: &str) -> std::io::Result<String> {
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    stream.write_all(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").as_bytes())?;
    stream.flush()?;
    Ok(String::from_utf8(head).unwrap())
}

/// What an upstream with TLS is asked.
fn answer_by_tls(stream: TcpStream) -> std::io::Result<String> {
    let certificates = CertificateDer::pem_slice_iter(CERTIFICATE).map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_slice(KEY).unwrap();
    let config = ServerConfig::builder_with_provider(aws_lc_rs::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .unwrap();
    let tls = ServerConnection::new(Arc::new(config)).unwrap();
    answer(&mut StreamOwned::new(tls, stream), "404 Not Found")
}

/// The one finding on `subject`.
fn finding<'a>(findings: &'a str, subject: &str) -> &'a str {
    let of = |line: &&str| line.split_whitespace().nth(1) == Some(subject);
    let mut found = findings.lines().filter(of);
    let first = found.next().unwrap_or_else(|| panic!("nothing on {subject}: {findings}"));
    assert_eq!(found.next(), None, "{findings}");
    first
}

#[tokio::test]
async fn an_upstream_with_tls_is_asked_without_a_credential_and_its_certificate_is_checked() {
    let (address, asked) = once(answer_by_tls);
    let mut setup =
        BrokerSetup::new(NO_DATABASE, &format!("https://localhost:{}/api/1.1", address.port()))
            .await;
    setup.set("SSL_CERT_FILE", AUTHORITY);

    let findings = setup.run(&["check"]).await.failed();

    assert!(finding(&findings, "reach").starts_with("ok "), "{findings}");
    assert!(finding(&findings, "tls").starts_with("ok "), "{findings}");
    assert!(finding(&findings, "tls").contains("404 Not Found"), "{findings}");
    let head = asked.join().unwrap().unwrap().to_lowercase();
    assert!(head.starts_with("head /api/1.1 http/1.1\r\n"), "{head}");
    assert!(!head.contains("authorization") && !head.contains("content-length"), "{head}");
}

#[tokio::test]
async fn an_upstream_whose_certificate_nobody_vouches_for_fails_at_tls() {
    let (address, asked) = once(answer_by_tls);
    let setup = BrokerSetup::new(NO_DATABASE, &format!("https://{address}/api/1.1")).await;

    let findings = setup.run(&["check"]).await.failed();

    assert!(finding(&findings, "reach").starts_with("ok "), "{findings}");
    let tls = finding(&findings, "tls");
    assert!(tls.starts_with("FAIL") && tls.ends_with("its certificate is not accepted"), "{tls}");
    asked.join().unwrap().unwrap_err();
}

#[tokio::test]
async fn a_proxy_that_does_not_open_the_way_is_told_from_an_upstream_that_fails() {
    let (address, asked) = once(|mut stream| answer(&mut stream, "403 Forbidden").unwrap());
    let mut setup = BrokerSetup::new(NO_DATABASE, "https://localhost:1/api/1.1").await;
    setup.set("TOKEN_BROKER_UPSTREAM_PROXY", &format!("http://{address}"));

    let findings = setup.run(&["check"]).await.failed();

    let reach = finding(&findings, "reach");
    assert!(reach.starts_with("ok ") && reach.contains("the proxy at"), "{reach}");
    let tls = finding(&findings, "tls");
    let ends = tls.ends_with("the proxy does not open a way to it");
    assert!(tls.starts_with("FAIL") && ends, "{tls}");
    assert!(asked.join().unwrap().starts_with("CONNECT localhost:1 HTTP/1.1\r\n"));
}

#[tokio::test]
async fn a_trial_issues_one_token_through_the_brokers_that_run() {
    let database = TestDatabase::new().await;
    let upstream = Simulator::start_on_loopback(SimulatorOptions::default()).await.unwrap();
    upstream.add_account("acmeId", "SK.acme");
    upstream.add_account("typoId", "SK.right");
    let setup = BrokerSetup::new(database.url(), &upstream.base_url()).await;
    let mut serve = setup.serve().await;
    for (name, secret) in [("acme", "SK.acme"), ("typo", "SK.wrong")] {
        let added = ["account", "add", name, "--client-id", &format!("{name}Id"), "--wait"];
        setup.run_with_secret(&added, secret).await;
    }
    let attempts = || ["acmeId", "typoId"].map(|id| upstream.attempts(id));
    assert_eq!(attempts(), [1, 1]);

    let findings = setup.run(&["check"]).await.ok();
    assert!(!findings.contains("issue  "), "{findings}");
    assert_eq!(attempts(), [1, 1], "a check alone never logs in");

    let issued = setup.run(&["check", "--issue", "acme"]).await.ok();
    assert!(finding(&issued, "issue").contains("acme: fresh, token until "), "{issued}");
    assert_eq!(attempts(), [2, 1]);

    let refused = setup.run(&["check", "--issue", "typo", "--json"]).await.failed();
    let refused: Value = serde_json::from_str(&refused).unwrap();
    let last = refused.as_array().unwrap().last().unwrap();
    assert_eq!((&last["subject"], &last["verdict"]), (&"issue".into(), &"fail".into()));
    let text = last["text"].as_str().unwrap();
    assert!(text.contains("typo: rejected: 61006") && text.contains("; hint: "), "{text}");
    assert_eq!(attempts(), [2, 2]);

    let unknown = setup.run(&["check", "--issue", "other"]).await.failed();
    assert!(finding(&unknown, "issue").contains("no enabled account other"), "{unknown}");

    serve.signal(nix::sys::signal::Signal::SIGTERM);
    serve.wait().await;
    let alone = setup.run(&["check", "--issue", "acme", "--timeout", "1s"]).await.failed();
    let told = finding(&alone, "issue");
    assert!(told.contains("no broker issued within 1s: is one running?"), "{told}");
}
