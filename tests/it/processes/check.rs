//! The command `check`: the connection to the upstream, and `--issue`.

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

use crate::harness::{
    database::TestDatabase,
    process::{BrokerSetup, NO_DATABASE},
};

/// The CA that signed the certificate below. Its key was deleted, so that it cannot sign anything else.
const CA_FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/processes/tls/ca.pem");
/// A certificate for `localhost` and its key, which are used by these tests only.
const CERTIFICATE: &[u8] = include_bytes!("tls/server.pem");
const KEY: &[u8] = include_bytes!("tls/server.key");

/// Accepts two connections on a thread: closes the first one, and serves the second one with `serve`. Returns
/// the address and the thread.
fn serve_once<T: Send + 'static>(
    serve: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> (SocketAddr, thread::JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let served = thread::spawn(move || {
        // The first connection is that of the check `reach`, which sends nothing.
        drop(listener.accept().unwrap());
        serve(listener.accept().unwrap().0)
    });
    (address, served)
}

/// Reads the head of a request from `stream`, answers with `status`, and returns the head.
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

/// Answers one request as an upstream with TLS, and returns the head of the request.
fn answer_over_tls(stream: TcpStream) -> std::io::Result<String> {
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

/// Returns the only line of the output about `subject`.
fn result_of<'a>(output: &'a str, subject: &str) -> &'a str {
    let is_about = |line: &&str| line.split_whitespace().nth(1) == Some(subject);
    let mut lines = output.lines().filter(is_about);
    let first = lines.next().unwrap_or_else(|| panic!("nothing about {subject}: {output}"));
    assert_eq!(lines.next(), None, "{output}");
    first
}

#[tokio::test]
async fn the_check_of_tls_sends_no_credential_and_verifies_the_upstreams_certificate() {
    let (address, request) = serve_once(answer_over_tls);
    let mut setup =
        BrokerSetup::new(NO_DATABASE, &format!("https://localhost:{}/api/1.1", address.port()))
            .await;
    setup.set("SSL_CERT_FILE", CA_FILE);

    let output = setup.run(&["check"]).await.failed();

    assert!(result_of(&output, "reach").starts_with("ok "), "{output}");
    assert!(result_of(&output, "tls").starts_with("ok "), "{output}");
    assert!(result_of(&output, "tls").contains("404 Not Found"), "{output}");
    let head = request.join().unwrap().unwrap().to_lowercase();
    assert!(head.starts_with("head /api/1.1 http/1.1\r\n"), "{head}");
    assert!(!head.contains("authorization") && !head.contains("content-length"), "{head}");
}

#[tokio::test]
async fn an_upstream_with_an_untrusted_certificate_fails_the_check_of_tls() {
    let (address, request) = serve_once(answer_over_tls);
    let setup = BrokerSetup::new(NO_DATABASE, &format!("https://{address}/api/1.1")).await;

    let output = setup.run(&["check"]).await.failed();

    assert!(result_of(&output, "reach").starts_with("ok "), "{output}");
    let tls = result_of(&output, "tls");
    assert!(tls.starts_with("FAIL") && tls.ends_with("its certificate is not accepted"), "{tls}");
    request.join().unwrap().unwrap_err();
}

#[tokio::test]
async fn a_proxy_that_refuses_to_connect_is_distinguished_from_an_upstream_that_fails() {
    let (address, request) = serve_once(|mut stream| answer(&mut stream, "403 Forbidden").unwrap());
    let mut setup = BrokerSetup::new(NO_DATABASE, "https://localhost:1/api/1.1").await;
    setup.set("TOKEN_BROKER_UPSTREAM_PROXY", &format!("http://{address}"));

    let output = setup.run(&["check"]).await.failed();

    let reach = result_of(&output, "reach");
    assert!(reach.starts_with("ok ") && reach.contains("the proxy at"), "{reach}");
    let tls = result_of(&output, "tls");
    let is_named = tls.ends_with("the proxy did not open a tunnel to it");
    assert!(tls.starts_with("FAIL") && is_named, "{tls}");
    assert!(request.join().unwrap().starts_with("CONNECT localhost:1 HTTP/1.1\r\n"));
}

#[tokio::test]
async fn check_with_issue_makes_a_running_broker_issue_one_token() {
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

    let output = setup.run(&["check"]).await.ok();
    assert!(!output.contains("issue  "), "{output}");
    assert_eq!(attempts(), [1, 1], "check without --issue requests no token");

    let issued = setup.run(&["check", "--issue", "acme"]).await.ok();
    assert!(result_of(&issued, "issue").contains("acme: fresh, token until "), "{issued}");
    assert_eq!(attempts(), [2, 1]);

    let refused = setup.run(&["check", "--issue", "typo", "--json"]).await.failed();
    let refused: Value = serde_json::from_str(&refused).unwrap();
    let last = refused.as_array().unwrap().last().unwrap();
    assert_eq!((&last["subject"], &last["verdict"]), (&"issue".into(), &"fail".into()));
    let text = last["text"].as_str().unwrap();
    assert!(text.contains("typo: rejected: 61006") && text.contains("; hint: "), "{text}");
    assert_eq!(attempts(), [2, 2]);

    let unknown = setup.run(&["check", "--issue", "other"]).await.failed();
    assert!(result_of(&unknown, "issue").contains("no enabled account other"), "{unknown}");

    serve.signal(nix::sys::signal::Signal::SIGTERM);
    serve.wait().await;
    let without_broker = setup.run(&["check", "--issue", "acme", "--timeout", "1s"]).await.failed();
    let result = result_of(&without_broker, "issue");
    assert!(result.contains("no broker issued within 1s; no broker is running; "), "{result}");
}

/// A row that was written past the triggers is named by `check`, and prevents no restart.
#[tokio::test]
async fn check_and_a_restart_name_a_malformed_row() {
    let database = TestDatabase::new().await;
    let upstream = Simulator::start_on_loopback(SimulatorOptions::default()).await.unwrap();
    let setup = BrokerSetup::new(database.url(), &upstream.base_url()).await;
    database
        .sql(
            "begin; set local session_replication_role = replica;
             insert into accounts (id, name, client_id, sealed_secret)
                overriding system value values (77, 'Acme', 'acmeId', '\\x00');
             insert into callers (id, name) overriding system value values (78, '');
             commit",
        )
        .await;
    let mut serve = setup.serve().await;

    let output = setup.run(&["check"]).await.failed();
    let rows = result_of(&output, "rows");
    assert!(rows.starts_with("FAIL") && rows.contains("accounts row 77: malformed name"), "{rows}");
    assert!(rows.contains("callers row 78: malformed name"), "{rows}");
    serve.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0));
    let log = serve.stderr();
    assert!(log.contains("a row cannot be used") && log.contains("77"), "{log}");
}
