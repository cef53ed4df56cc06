//! A client certificate counts as long as it is valid, its CA is trusted, and it is not revoked: for each
//! handshake, each call and each open connection. No TLS session is resumed.

use std::{path::Path, sync::Arc};

use chrono::DateTime;
use rustls::{
    ClientConfig, HandshakeKind, RootCertStore,
    client::Resumption,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use token_broker::{
    api::proto::{
        GetTokenRequest, WatchTokensRequest, WatchTokensResponse,
        token_service_client::TokenServiceClient,
    },
    app::AppConfig,
    config::Settings,
    dev::simulator::Faults,
    domain::clock::{Clock, ManualClock},
    tls::TlsFiles,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::harness::{
    broker::{Fixture, TestBroker},
    certificates::{
        BROKER_DNS_NAME, PemIdentity, TestCa, connect_tls, write_revocation_lists, write_tls_files,
    },
    eventually,
    process::BrokerSetup,
    raw_http2::{NONE, PREFACE, SETTINGS, frame},
};

const BILLING: &str = "spiffe://example.com/billing";

/// A broker with TLS, the account `acme`, and the caller `billing` with a certificate.
struct TlsBroker {
    fixture: Fixture,
    broker: TestBroker,
    broker_ca: TestCa,
    callers_ca: TestCa,
    files: tempfile::TempDir,
    identity: PemIdentity,
}

impl TlsBroker {
    /// Starts a broker whose file of revocation lists, if any, is what `lists` returns.
    async fn new(clock: Clock, lists: Option<fn(&TestCa) -> String>) -> Self {
        let fixture = Fixture::with(clock, Faults::default()).await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        fixture
            .database
            .sql(&format!(
                "insert into callers (name) values ('billing');
                 insert into grants (caller_id, pattern) select id, '*' from callers;
                 insert into caller_credentials (caller_id, kind, identity)
                     select id, 'spiffe', '{BILLING}' from callers"
            ))
            .await;
        let (broker_ca, callers_ca) = (TestCa::new("ours"), TestCa::new("callers"));
        let files = tempfile::tempdir().unwrap();
        let identity = broker_ca.issue(&[BROKER_DNS_NAME]);
        let mut tls = write_tls_files(files.path(), &identity, &[&callers_ca]);
        tls.client_crl = lists.map(|of| write_revocation_lists(files.path(), &[of(&callers_ca)]));
        let config = config(&fixture, tls);
        let broker = fixture.start_with(config).await;
        fixture.wait_for_state("acme", "fresh").await;
        Self { fixture, broker, broker_ca, callers_ca, files, identity }
    }

    fn directory(&self) -> &Path {
        self.files.path()
    }

    fn port(&self) -> u16 {
        self.broker.app.grpc_address.port()
    }

    async fn connect(&self, own: &PemIdentity) -> Result<Client, tonic::transport::Error> {
        let channel = connect_tls(self.port(), &self.broker_ca, Some(own)).await?;
        Ok(Client(TokenServiceClient::new(channel)))
    }

    /// Connects and calls. Returns whether a token was served.
    async fn serves(&self, own: &PemIdentity) -> bool {
        match self.connect(own).await {
            Ok(client) => client.get().await.is_ok(),
            Err(_) => false,
        }
    }

    /// Waits until the audit log has a refused handshake with this reason.
    async fn handshake_refused(&self, reason: &str) {
        eventually(reason, async || {
            let condition = format!("event = 'handshake_refused' and reason = '{reason}'");
            let events = self.fixture.audit_events(&condition).await;
            (!events.is_empty()).then_some(())
        })
        .await;
    }

    /// Checks that `client`, which was served, is not served any more, and neither is its stream.
    async fn assert_ends(&self, client: &Client, mut stream: Streaming<WatchTokensResponse>) {
        eventually("the end of the connection", async || client.get().await.err()).await;
        while let Ok(Some(_)) = stream.message().await {}
        for _ in 0..5 {
            client.get().await.unwrap_err();
        }
    }
}

fn config(fixture: &Fixture, tls: TlsFiles) -> AppConfig {
    let config = fixture.config();
    AppConfig {
        settings: Settings {
            tls: Some(tls),
            trust_domain: Some("example.com".into()),
            ..config.settings
        },
        ..config
    }
}

struct Client(TokenServiceClient<Channel>);

impl Client {
    async fn get(&self) -> Result<(), Status> {
        let request = GetTokenRequest { account: "acme".into(), ..Default::default() };
        self.0.clone().get_token(request).await.map(drop)
    }

    async fn watch(&self) -> Streaming<WatchTokensResponse> {
        let request = WatchTokensRequest { accounts: vec!["acme".into()] };
        let mut stream = self.0.clone().watch_tokens(request).await.unwrap().into_inner();
        assert!(stream.message().await.unwrap().is_some());
        stream
    }
}

#[tokio::test]
async fn a_connection_does_not_outlive_its_client_certificate() {
    let manual = ManualClock::new(Clock::System.now());
    let broker = TlsBroker::new(Clock::Manual(manual.clone()), None).await;
    let short = broker.callers_ca.issue_numbered(&[BILLING], 2035, None);
    let client = broker.connect(&short).await.unwrap();
    client.get().await.unwrap();
    let stream = client.watch().await;
    manual.set(DateTime::parse_from_rfc3339("2035-01-01T00:00:01Z").unwrap().to_utc());
    let refused = client.get().await.unwrap_err();
    assert!([Code::Unauthenticated, Code::Unavailable, Code::Unknown].contains(&refused.code()));
    broker.assert_ends(&client, stream).await;
    assert!(!broker.serves(&short).await);
    broker.handshake_refused("CERTIFICATE_EXPIRED").await;
    broker.broker.stop().await;
}

/// rustls takes every CA of the file as trusted, whatever time it names.
#[tokio::test]
async fn a_ca_that_has_ended_or_is_not_valid_yet_identifies_nobody() {
    let manual = ManualClock::new(Clock::System.now());
    for lists in [None, Some::<fn(&TestCa) -> String>(|ca| ca.revocation_list(&[9], 4000))] {
        let broker = TlsBroker::new(Clock::Manual(manual.clone()), lists).await;
        let (ended, future, ending) = (
            TestCa::valid("ended", 2000, 2010),
            TestCa::valid("future", 4000, 4096),
            TestCa::valid("ending", 2000, 2035),
        );
        let cas = [&ended, &future, &ending, &broker.callers_ca];
        write_tls_files(broker.directory(), &broker.identity, &cas);
        let [of_ended, of_future, of_ending, good] = cas.map(|ca| ca.issue(&[BILLING]));
        eventually("the new CAs", async || broker.serves(&of_ending).await.then_some(())).await;
        assert!(broker.serves(&good).await);
        assert!(!broker.serves(&of_ended).await && !broker.serves(&of_future).await);
        broker.handshake_refused("UNKNOWN_ISSUER").await;
        let client = broker.connect(&of_ending).await.unwrap();
        client.get().await.unwrap();
        let stream = client.watch().await;
        manual.set(DateTime::parse_from_rfc3339("2035-01-01T00:01:01Z").unwrap().to_utc());
        broker.assert_ends(&client, stream).await;
        assert!(!broker.serves(&of_ending).await);
        broker.broker.stop().await;
        manual.set(Clock::System.now());
    }
}

#[tokio::test]
async fn no_tls_session_is_resumed() {
    let broker = TlsBroker::new(Clock::System, None).await;
    let own = broker.callers_ca.issue(&[BILLING]);
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let config = client_config(&broker.broker_ca, &own, version);
        for _ in 0..3 {
            assert_eq!(handshake(broker.port(), &config).await, HandshakeKind::Full, "{version:?}");
        }
    }
    broker.broker.stop().await;
}

fn client_config(
    ca: &TestCa,
    own: &PemIdentity,
    version: &'static rustls::SupportedProtocolVersion,
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let chain = vec![CertificateDer::from_pem_slice(own.cert.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::in_memory_sessions(16);
    Arc::new(config)
}

/// Connects, exchanges the first frames, so that tickets arrive, and returns the kind of the handshake.
async fn handshake(port: u16, config: &Arc<ClientConfig>) -> HandshakeKind {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let name = ServerName::try_from(BROKER_DNS_NAME).unwrap();
    let mut stream = TlsConnector::from(config.clone()).connect(name, stream).await.unwrap();
    stream.write_all(&[PREFACE, &frame(SETTINGS, NONE, 0, &[])].concat()).await.unwrap();
    assert!(stream.read(&mut [0; 1024]).await.unwrap() > 0);
    stream.get_ref().1.handshake_kind().unwrap()
}

#[tokio::test]
async fn a_certificate_that_is_revoked_ends_its_connections_and_gets_no_new_one() {
    let broker = TlsBroker::new(Clock::System, Some(|ca| ca.revocation_list(&[1], 4000))).await;
    let numbered = |serial| broker.callers_ca.issue_numbered(&[BILLING], 4096, Some(serial));
    let (revoked, revoked_later, good) = (numbered(1), numbered(2), numbered(3));
    assert!(!broker.serves(&revoked).await);
    broker.handshake_refused("CERTIFICATE_REVOKED").await;

    let client = broker.connect(&revoked_later).await.unwrap();
    client.get().await.unwrap();
    let stream = client.watch().await;
    let lasting = broker.connect(&good).await.unwrap();
    let list = broker.callers_ca.revocation_list(&[1, 2], 4000);
    write_revocation_lists(broker.directory(), &[list]);
    broker.assert_ends(&client, stream).await;
    assert!(!broker.serves(&revoked_later).await);
    lasting.get().await.unwrap();
    assert!(broker.serves(&good).await);

    // A list that is appended replaces the one before it.
    let appended =
        [&[1][..], &[1, 2]].map(|serials| broker.callers_ca.revocation_list(serials, 4000));
    write_revocation_lists(broker.directory(), &appended);
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    assert!(!broker.serves(&revoked_later).await && broker.serves(&good).await);

    // A file that cannot be used revokes nothing, and takes nothing back.
    for unusable in ["", "nonsense", "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"] {
        write_revocation_lists(broker.directory(), &[unusable.to_owned()]);
        tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
        assert!(!broker.serves(&revoked_later).await && broker.serves(&good).await);
    }
    // A list that is out of date still counts, and a CA that has none needs none.
    let other = TestCa::new("other");
    write_tls_files(broker.directory(), &broker.identity, &[&broker.callers_ca, &other]);
    let old = broker.callers_ca.revocation_list(&[3], 2001);
    write_revocation_lists(broker.directory(), &[old]);
    eventually("the old list", async || lasting.get().await.err()).await;
    let of_other = other.issue(&[BILLING]);
    eventually("the other CA", async || broker.serves(&of_other).await.then_some(())).await;
    broker.broker.stop().await;
}

/// A list that does not fit a certificate is not passed over: it counts, or the certificate is refused.
#[tokio::test]
async fn a_list_that_is_about_other_certificates_accepts_none() {
    const HERE: &str = "http://crl.example/here";
    const ELSEWHERE: &str = "http://crl.example/elsewhere";
    let list = |ca: &TestCa| ca.scoped_revocation_list(&[1, 2], 4000, Some(HERE));
    let broker = TlsBroker::new(Clock::System, Some(list)).await;
    let issue = |serial, point| {
        broker.callers_ca.issue_with_point(&[BILLING], 4096, Some(serial), Some(point))
    };
    assert!(broker.serves(&issue(3, HERE)).await);
    assert!(!broker.serves(&issue(1, HERE)).await);
    assert!(!broker.serves(&issue(2, ELSEWHERE)).await);
    broker.handshake_refused("CERTIFICATE_REVOKED").await;
    assert!(!broker.serves(&issue(4, ELSEWHERE)).await);
    broker.handshake_refused("REVOCATION_UNKNOWN").await;

    // Once there is a list about it, the certificate is accepted, and refused when that list names it.
    let elsewhere = issue(4, ELSEWHERE);
    let lists = |serials: &[u64]| {
        let other = broker.callers_ca.scoped_revocation_list(serials, 4000, Some(ELSEWHERE));
        [list(&broker.callers_ca), other]
    };
    write_revocation_lists(broker.directory(), &lists(&[]));
    eventually("the second list", async || broker.serves(&elsewhere).await.then_some(())).await;
    let client = broker.connect(&elsewhere).await.unwrap();
    let stream = client.watch().await;
    write_revocation_lists(broker.directory(), &[list(&broker.callers_ca)]);
    broker.assert_ends(&client, stream).await;
    broker.broker.stop().await;
}

#[tokio::test]
async fn removing_a_ca_ends_the_connections_of_its_clients() {
    let broker = TlsBroker::new(Clock::System, None).await;
    let own = broker.callers_ca.issue(&[BILLING]);
    let client = broker.connect(&own).await.unwrap();
    client.get().await.unwrap();
    let stream = client.watch().await;
    write_tls_files(broker.directory(), &broker.identity, &[&TestCa::new("another")]);
    broker.assert_ends(&client, stream).await;
    assert!(!broker.serves(&own).await);
    broker.handshake_refused("UNKNOWN_ISSUER").await;
    broker.broker.stop().await;
}

#[tokio::test]
async fn check_reports_revocation_lists() {
    let fixture = Fixture::new().await;
    let mut setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let (ours, callers, other) =
        (TestCa::new("ours"), TestCa::new("callers"), TestCa::new("other"));
    let directory = setup.directory.path().to_owned();
    let mut files =
        write_tls_files(&directory, &ours.issue(&[BROKER_DNS_NAME]), &[&callers, &other]);
    let lists = [callers.revocation_list(&[1, 2], 2001), other.revocation_list(&[], 4000)];
    files.client_crl = Some(write_revocation_lists(&directory, &lists));
    setup.set_tls(&files);
    let serving = async || {
        let ran = setup.run(&["check"]).await;
        let line = ran.stdout.lines().find(|line| line.contains("serving")).map(str::to_owned);
        line.unwrap_or_else(|| panic!("{ran:?}"))
    };
    let line = serving().await;
    assert!(line.starts_with("warn"), "{line}");
    assert!(line.contains("2 certificates of CN=callers are revoked"), "{line}");
    assert!(line.contains("out of date since 2001"), "{line}");
    assert!(line.contains("0 certificates of CN=other"), "{line}");
    write_revocation_lists(&directory, &lists[1..]);
    let line = serving().await;
    assert!(line.contains("no certificate of CN=callers can be revoked"), "{line}");
    let scoped = callers.scoped_revocation_list(&[1], 4000, Some("http://crl.example/here"));
    write_revocation_lists(&directory, &[scoped, lists[1].clone()]);
    let line = serving().await;
    assert!(line.contains("only about certificates"), "{line}");
    assert!(line.contains("http://crl.example/here"), "{line}");
    write_revocation_lists(&directory, &["tbk_secret".into()]);
    let line = serving().await;
    assert!(line.contains("callers.crl") && !line.contains("tbk_secret"), "{line}");
}
