//! The end of a broker: within its limit, whatever its peers do, without a lost record, and without an
//! error where another replica is there.

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

/// A broker with an account and a caller.
struct Stage {
    fixture: Fixture,
    setup: BrokerSetup,
    serve: BrokerProcess,
    bearer: Bearer,
}

impl Stage {
    async fn new(drain: &str) -> Self {
        let fixture = Fixture::new().await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        let mut setup =
            BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
        setup.set("TOKEN_BROKER_DRAIN", drain);
        let serve = setup.serve().await;
        let stage = Self { fixture, setup, serve, bearer };
        let client = stage.client().await;
        eventually("a token", async || client.get("acme").await.ok()).await;
        stage
    }

    async fn client(&self) -> TestClient {
        TestClient::connect(&self.setup.endpoint(), &self.bearer).await
    }

    fn authorization(&self) -> String {
        format!("Bearer {}", self.bearer.expose())
    }

    /// A client that has a stream of tokens, and does nothing of what it is told.
    async fn zombie(&self) -> RawHttp2Client {
        let mut raw = RawHttp2Client::connect(self.setup.grpc).await;
        let watch = call(WATCH_TOKENS, Some(&self.authorization()));
        let asks = frame(DATA, END_STREAM, 1, &message(b"\x0a\x04acme"));
        assert!(raw.send(&[frame(HEADERS, END_HEADERS, 1, &watch), asks].concat()).await);
        let pushed = |frames: &[_]| frames.iter().any(|frame: &(u8, _, _, _)| frame.0 == DATA);
        raw.wait_for("the first token", pushed).await;
        raw
    }

    /// A client that has asked for much, and reads nothing of it.
    async fn deaf(&self) -> TcpStream {
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

    /// Every record is delivered, and follows from what was signed.
    async fn verify(&self) {
        let heads = self.setup.directory.path().join("state/audit-heads.jsonl");
        self.setup.run(&["audit", "verify", "--head", heads.to_str().unwrap()]).await.ok();
    }
}

/// Calls until it is refused or cut off; how often it was answered, and what it heard at last.
fn call_on(client: TestClient, stop: CancellationToken) -> JoinHandle<(usize, Option<Status>)> {
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
async fn a_stop_ends_in_its_time_though_peers_are_dead_and_loses_no_record() {
    let mut stage = Stage::new("2s").await;
    let (zombie, deaf) = (stage.zombie().await, stage.deaf().await);
    let silent = TcpStream::connect(stage.setup.grpc).await.unwrap();
    let mut unfinished = RawHttp2Client::connect(stage.setup.grpc).await;
    let begun = call(GET_TOKEN, Some(&stage.authorization()));
    assert!(unfinished.send(&frame(HEADERS, END_HEADERS, 1, &begun)).await);
    let mut callers = vec![];
    for _ in 0..3 {
        callers.push(call_on(stage.client().await, CancellationToken::new()));
    }
    let of_callers = "event = 'get_token' and outcome = 'ok' and caller = 'demo'";
    eventually("load", async || {
        (stage.fixture.audit_events(of_callers).await.len() > 300).then_some(())
    })
    .await;

    stage.serve.signal(Signal::SIGTERM);
    assert_eq!(stage.serve.wait().await.code(), Some(0), "{}", stage.serve.stderr());
    let said = stage.serve.stderr();
    assert!(said.contains("some connections did not end in time and are cut"), "{said}");
    drop((zombie, deaf, silent, unfinished));
    let mut answered = 0;
    for caller in callers {
        let (answers, _) = caller.await.unwrap();
        answered += answers;
    }
    // One of the first, 100 of the deaf one, and those of the callers: what they heard is recorded.
    let recorded = stage.fixture.audit_events(of_callers).await.len();
    assert!(recorded > answered, "{answered} answered, {recorded} recorded");
    let last = stage.fixture.audit_events("event = 'stopped'").await;
    assert_eq!(last.len(), 1, "the stop is delivered");
    stage.verify().await;
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once_and_the_next_start_delivers() {
    // Longer than the test would wait.
    let mut stage = Stage::new("5m").await;
    let _zombie = stage.zombie().await;
    stage.serve.signal(Signal::SIGTERM);
    eventually("that it stops", async || {
        stage.serve.stderr().contains("stopping; a second signal").then_some(())
    })
    .await;
    stage.serve.signal(Signal::SIGTERM);
    assert_eq!(stage.serve.wait().await.code(), Some(1), "{}", stage.serve.stderr());
    assert!(stage.serve.stderr().contains("stopped at once"), "{}", stage.serve.stderr());
    stage.serve = stage.setup.serve().await;
    stage.serve.signal(Signal::SIGTERM);
    assert_eq!(stage.serve.wait().await.code(), Some(0), "{}", stage.serve.stderr());
    stage.verify().await;
}

#[tokio::test]
async fn watchers_get_a_clean_end_and_hold_no_stop() {
    // Longer than the test would wait.
    let mut stage = Stage::new("4m").await;
    let client = stage.client().await;
    let watch = WatchTokensRequest { accounts: vec!["acme".into()] };
    let tokens = client.grpc.clone().watch_tokens(client.request(watch)).await.unwrap();
    let mut tokens = tokens.into_inner();
    assert!(tokens.message().await.unwrap().is_some());
    let channel = Endpoint::from_shared(stage.setup.endpoint()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel);
    let states = health.watch(HealthCheckRequest::default()).await.unwrap();
    let mut states = states.into_inner();
    assert_eq!(states.message().await.unwrap().unwrap().status(), ServingStatus::Serving.into());
    stage.serve.signal(Signal::SIGTERM);
    let told = states.message().await.unwrap().unwrap();
    assert_eq!(told.status(), ServingStatus::NotServing.into());
    assert_eq!(states.message().await.unwrap_err().code(), tonic::Code::Unavailable);
    // No token is pushed any more, and no error is told.
    assert!(tokens.message().await.unwrap().is_none());
    assert_eq!(stage.serve.wait().await.code(), Some(0), "{}", stage.serve.stderr());
    let said = stage.serve.stderr();
    assert!(!said.contains("did not end in time"), "{said}");
    stage.verify().await;
}

/// A balancer for connections: new ones go in turns to those replicas whose health says that they serve.
struct Balancer {
    address: SocketAddr,
    serving: Vec<Arc<AtomicBool>>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Balancer {
    async fn before(replicas: &[SocketAddr]) -> Self {
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
        let in_turn = (0..targets.len()).map(|nth| &targets[(turn + nth) % targets.len()]);
        // With nobody there, the client's connection ends.
        let Some((target, _)) = in_turn.clone().find(|(_, serving)| serving.load(Relaxed)) else {
            continue;
        };
        let target = *target;
        connections.spawn(async move {
            if let Ok(mut server) = TcpStream::connect(target).await {
                let _ = copy_bidirectional(&mut client, &mut server).await;
            }
        });
    }
}

#[tokio::test]
async fn a_rolling_restart_costs_no_caller_an_error() {
    let mut stage = Stage::new("8s").await;
    let other = stage.setup.replica();
    let mut second = other.serve().await;
    let balancer = Balancer::before(&[stage.setup.grpc, other.grpc]).await;
    balancer.until_all_serve().await;
    let stop = CancellationToken::new();
    let mut callers = vec![];
    for _ in 0..4 {
        let client =
            TestClient::connect(&format!("http://{}", balancer.address), &stage.bearer).await;
        callers.push(call_on(client, stop.clone()));
    }
    for _ in 0..2 {
        for (setup, serve) in [(&stage.setup, &mut stage.serve), (&other, &mut second)] {
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
