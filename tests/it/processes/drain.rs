//! The shutdown of a broker: it ends within its time limit whatever its clients do, loses no record, and
//! costs no client an error while another replica serves.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use nix::sys::signal::Signal;
use token_broker::{api::proto::WatchTokensRequest, crypto::bearer::Bearer};
use tokio::{
    io::{AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Status, transport::Endpoint};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_client::HealthClient},
};

use crate::harness::{
    broker::{Fixture, TestClient},
    eventually,
    process::{BrokerProcess, BrokerSetup},
    raw_http2::{
        DATA, END_HEADERS, END_STREAM, HEADERS, NONE, PREFACE, RawHttp2Client, SETTINGS, call,
        frame, message,
    },
};

const GET_TOKEN: &str = "/token_broker.v1.TokenService/GetToken";
const WATCH_TOKENS: &str = "/token_broker.v1.TokenService/WatchTokens";

/// A broker process with an account and a caller.
struct BrokerUnderTest {
    fixture: Fixture,
    setup: BrokerSetup,
    serve: BrokerProcess,
    bearer: Bearer,
}

impl BrokerUnderTest {
    async fn new(drain: &str) -> Self {
        let fixture = Fixture::new().await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        let mut setup =
            BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
        setup.set("TOKEN_BROKER_DRAIN", drain);
        let serve = setup.serve().await;
        let broker = Self { fixture, setup, serve, bearer };
        let client = broker.client().await;
        eventually("a token", async || client.get("acme").await.ok()).await;
        broker
    }

    async fn client(&self) -> TestClient {
        TestClient::connect(&self.setup.endpoint(), &self.bearer).await
    }

    fn authorization(&self) -> String {
        format!("Bearer {}", self.bearer.expose())
    }

    /// Returns a client that watches tokens and ignores every request of the server, such as GOAWAY.
    async fn client_that_ignores_goaway(&self) -> RawHttp2Client {
        let mut raw = RawHttp2Client::connect(self.setup.grpc).await;
        let watch = call(WATCH_TOKENS, Some(&self.authorization()));
        let asks = frame(DATA, END_STREAM, 1, &message(b"\x0a\x04acme"));
        assert!(raw.send(&[frame(HEADERS, END_HEADERS, 1, &watch), asks].concat()).await);
        let pushed = |frames: &[_]| frames.iter().any(|frame: &(u8, _, _, _)| frame.0 == DATA);
        raw.wait_for("the first token", pushed).await;
        raw
    }

    /// Returns a client that has made 100 calls and reads no response.
    async fn client_that_reads_nothing(&self) -> TcpStream {
        let mut stream = TcpStream::connect(self.setup.grpc).await.unwrap();
        let no_window = frame(SETTINGS, NONE, 0, &[0, 4, 0, 0, 0, 0]);
        stream.write_all(&[PREFACE, &no_window].concat()).await.unwrap();
        let block = call(GET_TOKEN, Some(&self.authorization()));
        for nth in 0..100 {
            let asks = frame(DATA, END_STREAM, 2 * nth + 1, &message(b"\x0a\x04acme"));
            let asked = [frame(HEADERS, END_HEADERS, 2 * nth + 1, &block), asks].concat();
            stream.write_all(&asked).await.unwrap();
        }
        stream
    }

    /// Checks that every record was delivered and that the audit log agrees with the signed checkpoints.
    async fn verify(&self) {
        let heads = self.setup.directory.path().join("state/audit-heads.jsonl");
        self.setup.run(&["audit", "verify", "--head", heads.to_str().unwrap()]).await.ok();
    }
}

/// Calls until `stop` or the first error. Returns the number of answers, and the error.
fn call_repeatedly(
    client: TestClient,
    stop: CancellationToken,
) -> JoinHandle<(usize, Option<Status>)> {
    tokio::spawn(async move {
        let mut answered = 0;
        while !stop.is_cancelled() {
            match client.get("acme").await {
                Ok(_) => answered += 1,
                Err(status) => return (answered, Some(status)),
            }
        }
        (answered, None)
    })
}

#[tokio::test]
async fn a_stop_ends_in_time_whatever_clients_do_and_loses_no_record() {
    let mut broker = BrokerUnderTest::new("2s").await;
    let ignoring = broker.client_that_ignores_goaway().await;
    let unreading = broker.client_that_reads_nothing().await;
    let silent = TcpStream::connect(broker.setup.grpc).await.unwrap();
    let mut unfinished = RawHttp2Client::connect(broker.setup.grpc).await;
    let begun = call(GET_TOKEN, Some(&broker.authorization()));
    assert!(unfinished.send(&frame(HEADERS, END_HEADERS, 1, &begun)).await);
    let mut callers = vec![];
    for _ in 0..3 {
        callers.push(call_repeatedly(broker.client().await, CancellationToken::new()));
    }
    let of_callers = "event = 'get_token' and outcome = 'ok' and caller = 'demo'";
    eventually("load", async || {
        (broker.fixture.audit_events(of_callers).await.len() > 300).then_some(())
    })
    .await;

    broker.serve.signal(Signal::SIGTERM);
    assert_eq!(broker.serve.wait().await.code(), Some(0), "{}", broker.serve.stderr());
    let log = broker.serve.stderr();
    assert!(log.contains("some connections did not end in time and are aborted"), "{log}");
    drop((ignoring, unreading, silent, unfinished));
    let mut answered = 0;
    for caller in callers {
        let (answers, _) = caller.await.unwrap();
        answered += answers;
    }
    // The setup's first call and the 100 calls whose responses were not read are recorded too. So there are
    // more records than answers; there must never be fewer.
    let recorded = broker.fixture.audit_events(of_callers).await.len();
    assert!(recorded > answered, "{answered} answered, {recorded} recorded");
    let last = broker.fixture.audit_events("event = 'stopped'").await;
    assert_eq!(last.len(), 1, "the stop is delivered");
    broker.verify().await;
}

#[tokio::test]
async fn a_second_signal_ends_the_process_at_once_and_the_next_start_delivers_its_records() {
    // The drain is longer than the test waits.
    let mut broker = BrokerUnderTest::new("5m").await;
    let _ignoring = broker.client_that_ignores_goaway().await;
    broker.serve.signal(Signal::SIGTERM);
    eventually("the stop to begin", async || {
        broker.serve.stderr().contains("stopping; a second signal").then_some(())
    })
    .await;
    broker.serve.signal(Signal::SIGTERM);
    assert_eq!(broker.serve.wait().await.code(), Some(1), "{}", broker.serve.stderr());
    assert!(broker.serve.stderr().contains("stopped at once"), "{}", broker.serve.stderr());
    broker.serve = broker.setup.serve().await;
    broker.serve.signal(Signal::SIGTERM);
    assert_eq!(broker.serve.wait().await.code(), Some(0), "{}", broker.serve.stderr());
    broker.verify().await;
}

#[tokio::test]
async fn open_streams_end_cleanly_at_a_stop_and_do_not_delay_it() {
    // The drain is longer than the test waits.
    let mut broker = BrokerUnderTest::new("4m").await;
    let client = broker.client().await;
    let watch = WatchTokensRequest { accounts: vec!["acme".into()] };
    let tokens = client.grpc.clone().watch_tokens(client.request(watch)).await.unwrap();
    let mut tokens = tokens.into_inner();
    assert!(tokens.message().await.unwrap().is_some());
    let channel = Endpoint::from_shared(broker.setup.endpoint()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel);
    let states = health.watch(HealthCheckRequest::default()).await.unwrap();
    let mut states = states.into_inner();
    assert_eq!(states.message().await.unwrap().unwrap().status(), ServingStatus::Serving.into());
    broker.serve.signal(Signal::SIGTERM);
    let state = states.message().await.unwrap().unwrap();
    assert_eq!(state.status(), ServingStatus::NotServing.into());
    assert_eq!(states.message().await.unwrap_err().code(), tonic::Code::Unavailable);
    // The stream ends without another token and without an error.
    assert!(tokens.message().await.unwrap().is_none());
    assert_eq!(broker.serve.wait().await.code(), Some(0), "{}", broker.serve.stderr());
    let log = broker.serve.stderr();
    assert!(!log.contains("did not end in time"), "{log}");
    broker.verify().await;
}

/// A TCP load balancer: new connections go in turn to the replicas whose health check reports serving, and to the
/// next one if a replica does not accept them.
struct Balancer {
    address: SocketAddr,
    serving: Vec<Arc<AtomicBool>>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Balancer {
    async fn in_front_of(replicas: &[SocketAddr]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving: Vec<_> = replicas.iter().map(|_| Arc::new(AtomicBool::new(false))).collect();
        let mut tasks = vec![];
        for (replica, serving) in replicas.iter().zip(&serving) {
            let probing = probe(*replica, Arc::clone(serving));
            tasks.push(AbortOnDropHandle::new(tokio::spawn(probing)));
        }
        let targets: Vec<_> = replicas.iter().copied().zip(serving.iter().cloned()).collect();
        tasks.push(AbortOnDropHandle::new(tokio::spawn(balance(listener, targets))));
        Self { address, serving, _tasks: tasks }
    }

    async fn until_all_serve(&self) {
        eventually("all replicas", async || {
            self.serving.iter().all(|serving| serving.load(Relaxed)).then_some(())
        })
        .await;
    }
}

async fn probe(replica: SocketAddr, serving: Arc<AtomicBool>) {
    loop {
        let channel = Endpoint::from_shared(format!("http://{replica}")).unwrap().connect_lazy();
        let answer = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
        let serves = answer.is_ok_and(|it| it.get_ref().status() == ServingStatus::Serving.into());
        serving.store(serves, Relaxed);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn balance(listener: TcpListener, targets: Vec<(SocketAddr, Arc<AtomicBool>)>) {
    let next = AtomicUsize::new(0);
    let mut connections = JoinSet::new();
    loop {
        let (mut client, _) = listener.accept().await.unwrap();
        let turn = next.fetch_add(1, Relaxed);
        let in_turn: Vec<_> = (0..targets.len())
            .map(|nth| &targets[(turn + nth) % targets.len()])
            .filter(|(_, serving)| serving.load(Relaxed))
            .map(|(target, _)| *target)
            .collect();
        connections.spawn(async move {
            // Without a serving replica the client's connection is closed.
            for target in in_turn {
                if let Ok(mut server) = TcpStream::connect(target).await {
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                    return;
                }
            }
        });
    }
}

#[tokio::test]
async fn a_rolling_restart_causes_no_caller_an_error() {
    // A quarter of the drain is for the health checks to notice the stop.
    let mut broker = BrokerUnderTest::new("20s").await;
    let other = broker.setup.replica();
    let mut second = other.serve().await;
    let balancer = Balancer::in_front_of(&[broker.setup.grpc, other.grpc]).await;
    balancer.until_all_serve().await;
    let stop = CancellationToken::new();
    let mut callers = vec![];
    for _ in 0..4 {
        let client =
            TestClient::connect(&format!("http://{}", balancer.address), &broker.bearer).await;
        callers.push(call_repeatedly(client, stop.clone()));
    }
    for _ in 0..2 {
        for (setup, serve) in [(&broker.setup, &mut broker.serve), (&other, &mut second)] {
            serve.signal(Signal::SIGTERM);
            assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
            *serve = setup.serve().await;
            balancer.until_all_serve().await;
        }
    }
    stop.cancel();
    for caller in callers {
        let (answered, refused) = caller.await.unwrap();
        assert!(refused.is_none(), "after {answered} answers: {refused:?}");
        assert!(answered > 0);
    }
}
