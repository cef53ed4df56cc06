//! Identification of callers by TLS client certificates and bearers, and of clients behind balancers.

use std::{collections::BTreeSet, fs, net::SocketAddr, path::Path, sync::Arc};

use nix::sys::signal::Signal;
use parking_lot::Mutex;
use token_broker::{
    api::proto::{GetTokenRequest, token_service_client::TokenServiceClient},
    crypto::bearer::Bearer,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{
    Request, Status,
    transport::{Channel, Endpoint},
};

use crate::harness::{
    broker::{Fixture, code_and_reason},
    certificates::{
        BROKER_DNS_NAME, PemIdentity, TestCa, connect_tls, connect_tls_trusting, write_tls_files,
    },
    eventually,
    process::{BrokerProcess, BrokerSetup},
};

const DOMAIN: &str = "example.com";
const BILLING: &str = "spiffe://example.com/billing";

/// A broker process with TLS, the account `acme`, and callers with certificates and bearers.
struct TlsBroker {
    fixture: Fixture,
    setup: BrokerSetup,
    serve: BrokerProcess,
    broker_ca: TestCa,
    callers_ca: TestCa,
    bearer: Bearer,
}

impl TlsBroker {
    async fn new() -> Self {
        let fixture = Fixture::new().await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let bearer = fixture.add_caller("demo", &["acme"]).await;
        for (caller, kind, identity) in
            [("billing", "spiffe", BILLING), ("search", "dns", "search.example.com")]
        {
            fixture
                .database
                .sql(&format!(
                    "insert into callers (name) values ('{caller}');
                     insert into grants (caller_id, pattern) select id, 'acme' from callers where name = '{caller}';
                     insert into caller_credentials (caller_id, kind, identity)
                         select id, '{kind}', '{identity}' from callers where name = '{caller}'"
                ))
                .await;
        }
        let (broker_ca, callers_ca) = (TestCa::new("ours"), TestCa::new("callers"));
        let mut setup =
            BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
        setup.set_tls(&write_tls_files(
            setup.directory.path(),
            &broker_ca.issue(&[BROKER_DNS_NAME]),
            &[&callers_ca],
        ));
        setup.set("TOKEN_BROKER_TRUST_DOMAIN", DOMAIN);
        let serve = setup.serve().await;
        let broker = Self { fixture, setup, serve, broker_ca, callers_ca, bearer };
        broker.fixture.wait_for_state("acme", "fresh").await;
        broker
    }

    fn port(&self) -> u16 {
        self.setup.grpc.port()
    }

    fn files(&self) -> &Path {
        self.setup.directory.path()
    }

    async fn channel(&self, own: Option<&PemIdentity>) -> Result<Channel, tonic::transport::Error> {
        connect_tls(self.port(), &self.broker_ca, own).await
    }

    /// Calls `GetToken` with this certificate and bearer. Returns the token, or the refusal's code and reason.
    async fn get(
        &self,
        own: Option<&PemIdentity>,
        bearer: Option<&Bearer>,
    ) -> Result<String, String> {
        match self.channel(own).await {
            Ok(channel) => get(channel, bearer).await.map_err(|status| code_and_reason(&status)),
            Err(error) => Err(format!("no connection: {error:?}")),
        }
    }

    async fn stop(mut self) -> Fixture {
        self.serve.signal(Signal::SIGTERM);
        assert_eq!(self.serve.wait().await.code(), Some(0), "{}", self.serve.stderr());
        self.fixture
    }
}

async fn get(channel: Channel, bearer: Option<&Bearer>) -> Result<String, Status> {
    let mut request =
        Request::new(GetTokenRequest { account: "acme".into(), ..Default::default() });
    if let Some(bearer) = bearer {
        let value = format!("Bearer {}", bearer.expose()).parse().unwrap();
        request.metadata_mut().insert("authorization", value);
    }
    let answer = TokenServiceClient::new(channel).get_token(request).await?;
    Ok(answer.into_inner().access_token)
}

#[tokio::test]
async fn a_caller_is_identified_by_its_certificate_or_by_its_bearer() {
    let broker = TlsBroker::new().await;
    let billing = broker.callers_ca.issue(&[BILLING]);
    let search = broker.callers_ca.issue(&["other.example.com", "search.example.com"]);
    let token = broker.get(Some(&billing), None).await.unwrap();
    assert_eq!(broker.get(Some(&search), None).await, Ok(token.clone()));
    assert_eq!(broker.get(None, Some(&broker.bearer)).await, Ok(token.clone()));
    // A bearer, which is sent on purpose, takes precedence over the certificate.
    assert_eq!(broker.get(Some(&billing), Some(&broker.bearer)).await, Ok(token));
    let fixture = broker.stop().await;
    let callers: Vec<String> = sqlx::query_scalar(
        "select caller || ' by ' || caller_kind from audit_events where event = 'get_token'
         order by at, chain, seq",
    )
    .fetch_all(fixture.database.pool())
    .await
    .unwrap();
    assert_eq!(callers, ["billing by spiffe", "search by dns", "demo by bearer", "demo by bearer"]);
}

#[tokio::test]
async fn a_missing_or_unacceptable_credential_is_refused_and_the_audit_log_says_why() {
    let broker = TlsBroker::new().await;
    let callers = &broker.callers_ca;
    assert_eq!(broker.get(None, None).await, Err("Unauthenticated CREDENTIAL_MISSING".into()));
    let unknown = Bearer::generate();
    for (names, why) in [
        (&[BILLING, "spiffe://example.com/other"][..], "the certificate has more than one URI"),
        (&["spiffe://example.org/billing"], "another trust domain"),
        (
            &["https://example.com/billing", "search.example.com"],
            "the certificate's URI is no SPIFFE ID",
        ),
        (&["unknown.example.com"], "no DNS name is registered"),
    ] {
        let own = callers.issue(names);
        let refused = Err("Unauthenticated CREDENTIAL_REFUSED".to_owned());
        assert_eq!(broker.get(Some(&own), None).await, refused, "{names:?}");
        let why = why.replace('\'', "''");
        let known = format!("reason = 'CREDENTIAL_REFUSED' and detail->>'refused' like '{why}%'");
        eventually(&why, async || {
            (!broker.fixture.audit_events(&known).await.is_empty()).then_some(())
        })
        .await;
    }
    let billing = callers.issue(&[BILLING]);
    let refused = broker.get(Some(&billing), Some(&unknown)).await;
    assert_eq!(
        refused,
        Err("Unauthenticated CREDENTIAL_REFUSED".into()),
        "the certificate is not tried after the bearer"
    );
    // A revocation by SQL takes effect within a second, also on open connections.
    let channel = broker.channel(Some(&billing)).await.unwrap();
    get(channel.clone(), None).await.unwrap();
    broker.fixture.database.sql("update caller_credentials set revoked_at = now()").await;
    eventually("the revocation", async || get(channel.clone(), None).await.err()).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_handshake_that_is_refused_is_recorded_with_its_reason() {
    let broker = TlsBroker::new().await;
    let strange = TestCa::new("strange").issue(&[BILLING]);
    let expired = broker.callers_ca.issue_expired(&[BILLING]);
    // A client of TLS 1.3 learns of the refusal only by its first call.
    for own in [&strange, &expired] {
        assert!(broker.get(Some(own), None).await.is_err());
    }
    let mut plain = TcpStream::connect(broker.setup.grpc).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    // A probe that only connects is not recorded.
    drop(TcpStream::connect(broker.setup.grpc).await.unwrap());
    // A client may try more than once.
    let reasons = async |fixture: &Fixture| {
        let refused =
            fixture.audit_events("event = 'handshake_refused' and peer like '127.0.0.1:%'").await;
        refused.into_iter().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
    };
    eventually("three reasons", async || (reasons(&broker.fixture).await.len() == 3).then_some(()))
        .await;
    let reasons = reasons(&broker.stop().await).await;
    assert_eq!(
        reasons,
        [
            "handshake_refused/-/-/unauthenticated/CERTIFICATE_EXPIRED",
            "handshake_refused/-/-/unauthenticated/NO_TLS",
            "handshake_refused/-/-/unauthenticated/UNKNOWN_ISSUER",
        ]
    );
}

#[tokio::test]
async fn certificates_are_replaced_under_load_without_a_failed_call() {
    let broker = TlsBroker::new().await;
    let old = broker.callers_ca.issue(&[BILLING]);
    let channel = broker.channel(Some(&old)).await.unwrap();
    let stop = CancellationToken::new();
    let load = {
        let (channel, stop) = (channel.clone(), stop.clone());
        tokio::spawn(async move {
            let mut calls = 0;
            while !stop.is_cancelled() {
                get(channel.clone(), None).await.unwrap();
                calls += 1;
            }
            calls
        })
    };
    let path = broker.files();
    for round in 0..2 {
        // The broker's certificate is replaced, and another CA of callers is added, at the same time.
        let (ours, callers) = (TestCa::new("ours again"), TestCa::new("callers again"));
        let cas = [&callers, &broker.callers_ca];
        write_tls_files(path, &ours.issue(&[BROKER_DNS_NAME]), &cas);
        let own = callers.issue(&[BILLING]);
        let changed = eventually("the new certificates", async || {
            let channel = connect_tls(broker.port(), &ours, Some(&own)).await.ok()?;
            get(channel, None).await.ok()
        });
        changed.await;
        if round == 0 {
            continue;
        }
        // Files that cannot be used change nothing, however often the broker reads them.
        overwrite(path, "broker.key", "no key");
        overwrite(
            path,
            "callers.pem",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        );
        let until = tokio::time::Instant::now() + std::time::Duration::from_secs(5);
        while tokio::time::Instant::now() < until {
            let channel = connect_tls(broker.port(), &ours, Some(&own)).await.unwrap();
            get(channel, None).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    }
    stop.cancel();
    assert!(load.await.unwrap() > 0);
    broker.stop().await;
}

/// The CAs that clients trust, and the certificate that they present.
type Present = Mutex<([Arc<TestCa>; 2], PemIdentity)>;

/// Connects with what is present. Returns the connection and the client's certificate.
async fn connect_as_present(port: u16, present: &Present) -> (Channel, String) {
    loop {
        let (trusted, own) = present.lock().clone();
        let both = [&*trusted[0], &*trusted[1]];
        match connect_tls_trusting(port, &both, Some(&own)).await {
            Ok(connected) => return (connected, own.cert),
            // The CAs were replaced between the reading of `present` and the handshake.
            Err(error) => {
                let now = &present.lock().0;
                assert!(!Arc::ptr_eq(&now[1], &trusted[1]), "{error:?}");
            }
        }
    }
}

/// Certificates, grants and bearers are rotated the recommended way: the new one is accepted before the old
/// one ends. A client that takes its new certificate before the old one's CA is removed loses no call, neither
/// on a lasting connection nor on new ones.
#[tokio::test]
async fn certificates_grants_and_bearers_are_rotated_under_load_and_no_call_is_lost() {
    const ROUNDS: usize = 6;
    let broker = TlsBroker::new().await;
    let database = &broker.fixture.database;
    // The CAs that the load's clients trust, and the certificate that they present. Each round replaces them.
    let authorities = |kind: &str| -> Vec<_> {
        (0..=ROUNDS).map(|nth| Arc::new(TestCa::new(&format!("{kind} {nth}")))).collect()
    };
    let (ours, callers) = (authorities("ours"), authorities("callers"));
    let present = Arc::new(Mutex::new((
        [Arc::new(TestCa::new("none")), ours[0].clone()],
        callers[0].issue(&[BILLING]),
    )));
    let path = broker.files();
    write_tls_files(path, &ours[0].issue(&[BROKER_DNS_NAME]), &[&callers[0]]);
    let port = broker.port();
    eventually("the first certificates", async || {
        let ([_, trusted], own) = present.lock().clone();
        get(connect_tls(port, &trusted, Some(&own)).await.ok()?, None).await.ok()
    })
    .await;

    let stop = CancellationToken::new();
    let mut load = JoinSet::new();
    // The certificate with which each client made its last call.
    let used = [(); 2].map(|()| Arc::new(Mutex::new(String::new())));
    for (reconnects, used) in [false, true].into_iter().zip(&used) {
        let (present, stop, used) = (present.clone(), stop.clone(), used.clone());
        load.spawn(async move {
            let (mut calls, mut channel, mut certificate) = (0, None, String::new());
            while !stop.is_cancelled() {
                let is_replaced = present.lock().1.cert != certificate;
                if reconnects || is_replaced {
                    let connected = connect_as_present(port, &present).await;
                    (channel, certificate) = (Some(connected.0), connected.1);
                }
                get(channel.clone().unwrap(), None).await.expect("a call");
                used.lock().clone_from(&certificate);
                calls += 1;
            }
            calls
        });
    }
    let mut bearer = broker.bearer.clone();
    for round in 1..=ROUNDS {
        // Both sides trust the old and the new CA; certificates of the old one are still in use.
        present.lock().0 = [ours[round - 1].clone(), ours[round].clone()];
        write_tls_files(
            path,
            &ours[round].issue(&[BROKER_DNS_NAME]),
            &[&callers[round - 1], &callers[round]],
        );
        // The grant is replaced in one transaction.
        let pattern = if round % 2 == 0 { "acme" } else { "ac*" };
        database
            .sql(&format!(
                "begin; delete from grants where caller_id = (select id from callers where name = 'billing');
                 insert into grants (caller_id, pattern) select id, '{pattern}' from callers
                     where name = 'billing'; commit"
            ))
            .await;
        // A new bearer is added, then the old one is revoked.
        let next = Bearer::generate();
        sqlx::query(
            "insert into caller_credentials (caller_id, kind, bearer_sha256)
             select id, 'bearer', $1 from callers where name = 'demo'",
        )
        .bind(next.sha256().as_slice())
        .execute(database.pool())
        .await
        .unwrap();
        let trusted = [&*ours[round - 1], &*ours[round]];
        let by_bearer = async |bearer: &Bearer| {
            let channel = connect_tls_trusting(port, &trusted, None).await.unwrap();
            get(channel, Some(bearer)).await
        };
        eventually("the new bearer", async || by_bearer(&next).await.ok()).await;
        sqlx::query("update caller_credentials set revoked_at = now() where bearer_sha256 = $1")
            .bind(bearer.sha256().as_slice())
            .execute(database.pool())
            .await
            .unwrap();
        eventually("the old bearer's end", async || by_bearer(&bearer).await.err()).await;
        bearer = next;
        // The callers' new certificates are accepted once the broker has read their CA.
        let own = callers[round].issue(&[BILLING]);
        eventually("the new CA", async || {
            let channel = connect_tls_trusting(port, &trusted, Some(&own)).await.ok()?;
            get(channel, None).await.ok()
        })
        .await;
        present.lock().1 = own.clone();
        // The next round removes the CA of the certificate before this one.
        eventually("the clients to take the new certificate", async || {
            used.iter().all(|used| *used.lock() == own.cert).then_some(())
        })
        .await;
    }
    stop.cancel();
    while let Some(calls) = load.join_next().await {
        assert!(calls.unwrap() > ROUNDS);
    }
    broker.stop().await;
}

fn overwrite(directory: &Path, name: &str, text: &str) {
    fs::write(directory.join(name), text).unwrap();
}

#[tokio::test]
async fn tls_files_that_cannot_be_used_are_one_error_that_names_the_file() {
    let fixture = Fixture::new().await;
    let (ours, other) = (TestCa::new("ours"), TestCa::new("other"));
    let (broker, another) = (ours.issue(&[BROKER_DNS_NAME]), other.issue(&[BROKER_DNS_NAME]));
    let directory = tempfile::tempdir().unwrap();
    for (file, text, words) in [
        ("broker.pem", None, "broker.pem: No such file"),
        ("broker.pem", Some(""), "broker.pem: it holds no certificate in PEM"),
        ("broker.pem", Some(&*broker.key), "broker.pem: it holds no certificate in PEM"),
        ("broker.key", Some("no key"), "broker.key: it holds no private key in PEM"),
        ("broker.key", Some(&*another.key), "cannot be used: "),
        ("callers.pem", Some("nobody"), "callers.pem: it holds no certificate in PEM"),
    ] {
        let tls = write_tls_files(directory.path(), &broker, &[&other]);
        match text {
            Some(text) => overwrite(directory.path(), file, text),
            None => fs::remove_file(directory.path().join(file)).unwrap(),
        }
        let mut config = fixture.config();
        config.settings.tls = Some(tls);
        let error = crate::harness::broker::start_error(config).await;
        assert!(error.starts_with("TLS cannot be served: ") && error.contains(words), "{error}");
        assert!(!error.contains("PRIVATE"), "{error}");
    }
}

/// Forwards connections to `broker`, each after `header`.
async fn balancer(
    broker: SocketAddr,
    header: &'static [u8],
) -> (SocketAddr, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let forwarding = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut server = TcpStream::connect(broker).await.unwrap();
            server.write_all(header).await.unwrap();
            connections.spawn(async move {
                let _ = copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    (address, AbortOnDropHandle::new(forwarding))
}

const PROXY_HEADER: &[u8] = b"PROXY TCP4 203.0.113.9 198.51.100.1 4321 443\r\n";

#[tokio::test]
async fn behind_a_balancer_the_peer_is_the_client_that_it_names_also_with_tls() {
    for with_tls in [false, true] {
        let fixture = Fixture::new().await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let bearer = fixture.add_caller("demo", &["acme"]).await;
        let ours = TestCa::new("ours");
        let files = tempfile::tempdir().unwrap();
        let tls =
            with_tls.then(|| write_tls_files(files.path(), &ours.issue(&[BROKER_DNS_NAME]), &[]));
        let balancers = vec!["127.0.0.0/8".parse().unwrap()];
        let mut config = fixture.config();
        (config.settings.tls, config.settings.proxy_protocol_from) = (tls, balancers);
        let broker = fixture.start_with(config).await;
        fixture.wait_for_state("acme", "fresh").await;
        let (address, _forwarding) = balancer(broker.app.grpc_address, PROXY_HEADER).await;
        let channel = if with_tls {
            connect_tls(address.port(), &ours, None).await.unwrap()
        } else {
            let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
            endpoint.connect().await.unwrap()
        };
        get(channel, Some(&bearer)).await.unwrap();

        // The balancer's own health check, and a connection without a header.
        let (own, _probing) = balancer(broker.app.grpc_address, b"PROXY UNKNOWN\r\n").await;
        if !with_tls {
            let probe = Endpoint::from_shared(format!("http://{own}")).unwrap();
            get(probe.connect().await.unwrap(), Some(&bearer)).await.unwrap();
        }
        let mut direct = TcpStream::connect(broker.app.grpc_address).await.unwrap();
        direct.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        // The broker closes or resets that connection without an answer.
        let mut received = vec![];
        let _ = direct.read_to_end(&mut received).await;
        assert!(received.is_empty());
        eventually("the record", async || {
            let refused = fixture
                .audit_events("reason = 'NO_PROXY_HEADER' and peer like '127.0.0.1:%'")
                .await;
            (refused.len() == 1).then_some(())
        })
        .await;
        broker.stop().await;
        let peers: Vec<String> = sqlx::query_scalar(
            "select distinct split_part(peer, ':', 1) from audit_events where event = 'get_token'
             order by 1",
        )
        .fetch_all(fixture.database.pool())
        .await
        .unwrap();
        let expected: &[_] =
            if with_tls { &["203.0.113.9"] } else { &["127.0.0.1", "203.0.113.9"] };
        assert_eq!(peers, expected);
    }
}

#[tokio::test]
async fn a_proxy_header_from_an_untrusted_address_is_refused() {
    let fixture = Fixture::new().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let bearer = fixture.add_caller("demo", &["acme"]).await;
    let balancers = vec!["192.0.2.0/24".parse().unwrap()];
    let mut config = fixture.config();
    config.settings.proxy_protocol_from = balancers;
    let broker = fixture.start_with(config).await;
    fixture.wait_for_state("acme", "fresh").await;
    let (address, _forwarding) = balancer(broker.app.grpc_address, PROXY_HEADER).await;
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let answer = match endpoint.connect().await {
        Ok(channel) => get(channel, Some(&bearer)).await.map_err(|status| status.to_string()),
        Err(error) => Err(error.to_string()),
    };
    assert!(answer.is_err(), "{answer:?}");
    // A client that sends no header is served under its own address.
    broker.client(&bearer).await.get("acme").await.unwrap();
    broker.stop().await;
    assert!(fixture.audit_events("peer like '203.%'").await.is_empty());
}
