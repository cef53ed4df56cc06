//! Measures how many `GetToken` calls a second are answered over HTTP/2 on loopback.
//!
//!     cargo bench --bench answers --features bench [-- SECONDS A WINDOW]
//!
//! The servers under test are the broker with each kind of journal (`fsync`, `write`, and with the
//! feature `bench` one that writes nothing), and a bare tonic server that sends the same response. They
//! are measured in turns, so that changes in the machine's speed affect all of them alike.
//!
//! Then the broker with `fsync` is measured with more and more callers, each of which sends its next call
//! when the last one is answered. With three times as many callers as at the peak, the rate should still be
//! nine tenths of the peak.
//!
//! Then a caller with one call at a time is measured alone, and beside a caller without grants that asks for
//! 1,000 patterns over 10,000 accounts, in streams and lists, as often as it can. Both should be alike.
//!
//! Clients and servers share the machine, and the delivery of audit records to Postgres takes about as
//! much of its time again. So Postgres is paused during the measurements, except in the rows that say
//! "delivering".
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark prints its results, and panics when it fails"
)]

#[expect(dead_code, reason = "the tests use what this benchmark does not")]
#[path = "../tests/harness/mod.rs"]
mod harness;

use std::{
    env,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::Request;
use prost::Message;
use token_broker::{
    api::proto::{
        GetTokenRequest, GetTokenResponse, ListAccountsRequest, ListAccountsResponse,
        ReportRejectedTokenRequest, ReportRejectedTokenResponse, WatchTokensRequest,
        WatchTokensResponse,
        token_service_server::{TokenService, TokenServiceServer},
    },
    audit::journal::SyncMode,
    crypto::bearer::Bearer,
};
use tokio::{net::TcpListener, runtime, task::JoinSet};
use tonic::{Response, Status};

use self::harness::{
    broker::{Fixture, TestBroker},
    database::embedded_server_pid,
    eventually,
    http::http,
    process::PausedProcesses,
};

/// How many connections the clients open.
const CONNECTIONS: usize = 8;
/// How many calls each connection has in flight, when the servers are compared.
const IN_FLIGHT: usize = 25;
/// How many calls each connection has in flight, when the load is increased.
const LOADS: [usize; 6] = [1, 5, 25, 50, 100, 200];
/// How often each server is measured.
const ROUNDS: usize = 5;
/// How long each measurement takes by default, in seconds.
const WINDOW: u64 = 2;

/// A server to measure.
struct Server {
    name: &'static str,
    address: SocketAddr,
    bearer: String,
    /// The address of the HTTP endpoints for operators; `None` for the bare server.
    ops: Option<SocketAddr>,
    /// Whether Postgres runs during the measurement, so that audit records are delivered.
    delivering: bool,
    /// Calls answered a second, one entry for each round.
    rates: Vec<f64>,
}

fn main() {
    let window = env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(WINDOW);
    let runtime = |threads| {
        runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().unwrap()
    };
    let window = Duration::from_secs(window);
    let (server_runtime, client_runtime) = (runtime(2), runtime(2));
    let Setup { brokers, fixtures, mut servers } = server_runtime.block_on(start());
    let postgres = embedded_server_pid().expect("Postgres can be paused: unset DATABASE_URL");
    for round in 0..ROUNDS {
        let count = servers.len();
        for nth in 0..count {
            let server = &mut servers[(nth + round) % count];
            let paused = (!server.delivering).then(|| PausedProcesses::pause(postgres));
            let rate = client_runtime.block_on(measure(server, IN_FLIGHT, window));
            drop(paused);
            server.rates.push(rate);
            if let Some(ops) = server.ops {
                client_runtime.block_on(wait_for_delivery(ops));
            }
        }
    }
    for server in &mut servers {
        server.rates.sort_by(f64::total_cmp);
    }
    let median = |server: &Server| server.rates[ROUNDS / 2];
    let bare = servers.iter().find(|it| it.ops.is_none()).map_or(f64::NAN, median);
    println!(
        "{:<36} {:>10} {:>10} {:>10} {:>7}",
        "answers/s", "least", "median", "most", "of bare"
    );
    for server in &servers {
        let (least, most) = (server.rates[0], server.rates[ROUNDS - 1]);
        let (name, median) = (server.name, median(server));
        println!("{name:<36} {least:>10.0} {median:>10.0} {most:>10.0} {:>7.2}", median / bare);
    }
    let fsync = servers.iter().find(|it| it.name == "fsync").unwrap();
    let paused = PausedProcesses::pause(postgres);
    measure_overload(&client_runtime, fsync, window);
    drop(paused);
    let neighbours = server_runtime.block_on(Neighbours::start());
    client_runtime.block_on(neighbours.measure(window));
    server_runtime.block_on(neighbours.broker.stop());
    server_runtime.block_on(async {
        for broker in brokers {
            broker.stop().await;
        }
        drop(fixtures);
    });
}

/// Prints the calls answered a second with more and more callers, up to three times as many as at the
/// peak.
fn measure_overload(client_runtime: &runtime::Runtime, server: &Server, window: Duration) {
    let rate = |in_flight| {
        let mut rates: Vec<_> =
            (0..3).map(|_| client_runtime.block_on(measure(server, in_flight, window))).collect();
        rates.sort_by(f64::total_cmp);
        rates[1]
    };
    println!("\n{:<36} {:>10}", "callers of the broker with fsync", "answers/s");
    let (mut peak, mut at) = (0.0, 0);
    for in_flight in LOADS {
        let rate = rate(in_flight);
        println!("{:<36} {rate:>10.0}", CONNECTIONS * in_flight);
        if rate > peak {
            (peak, at) = (rate, in_flight);
        }
    }
    let overloaded = rate(3 * at);
    println!(
        "{:<36} {overloaded:>10.0} {:>7.2} of the peak",
        format!("{}, three times the peak's", 3 * CONNECTIONS * at),
        overloaded / peak
    );
}

/// A broker with many accounts, a caller who may use one of them, and a caller without grants.
struct Neighbours {
    broker: TestBroker,
    caller: Bearer,
    nobody: Bearer,
    _fixture: Fixture,
}

impl Neighbours {
    const ACCOUNTS: usize = 10_000;
    const PATTERNS: usize = 1_000;
    /// How many streams and lists the caller without grants has open at a time.
    const TASKS: usize = 8;

    async fn start() -> Self {
        let fixture = Fixture::new().await;
        let caller = fixture.add_caller("bench", &["acme"]).await;
        let nobody = fixture.add_caller("nobody", &[]).await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        // They are disabled, so that no tokens are issued for them.
        let many = format!(
            "insert into accounts (name, client_id, client_secret, enabled)
             select 'many-' || n, 'many-' || n, 'SK.1', false
             from generate_series(1, {}) n",
            Self::ACCOUNTS
        );
        fixture.database.sql(&many).await;
        let broker = fixture.start().await;
        let client = broker.client(&caller).await;
        eventually("a token", async || client.get("acme").await.ok()).await;
        eventually("all accounts", async || {
            let (_, metrics) = http(broker.app.ops_address, "GET", "/metrics", "").await;
            let mut lines = metrics.lines();
            let accounts = lines.find_map(|it| it.strip_prefix("token_broker_accounts "))?;
            (accounts.parse::<usize>().ok()? > Self::ACCOUNTS).then_some(())
        })
        .await;
        Self { broker, caller, nobody, _fixture: fixture }
    }

    /// Prints how long calls take, alone and beside the caller without grants.
    async fn measure(&self, window: Duration) {
        println!("\n{:<36} {:>10} {:>10}", "a call, in microseconds", "p50", "p99");
        self.print_latency("alone", window).await;
        let patterns: Vec<_> = (0..Self::PATTERNS).map(|n| format!("*{n}")).collect();
        let mut tasks = JoinSet::new();
        for _ in 0..Self::TASKS {
            let (client, accounts) = (self.broker.client(&self.nobody).await, patterns.clone());
            tasks.spawn(async move {
                loop {
                    let watch = client.request(WatchTokensRequest { accounts: accounts.clone() });
                    let stream = client.grpc.clone().watch_tokens(watch).await;
                    let list = client.request(ListAccountsRequest::default());
                    let listed = client.grpc.clone().list_accounts(list).await;
                    if stream.is_err() || listed.is_err() {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
            });
        }
        self.print_latency("beside 1,000 patterns of nobody", window).await;
        tasks.shutdown().await;
    }

    async fn print_latency(&self, name: &str, window: Duration) {
        let mut send = connect(self.broker.app.grpc_address).await;
        let bearer = format!("Bearer {}", self.caller.expose());
        let (began, mut latencies) = (Instant::now(), vec![]);
        while began.elapsed() < window {
            let called = Instant::now();
            assert!(call(&mut send, &bearer).await.is_some(), "a call was refused");
            latencies.push(called.elapsed().as_micros());
        }
        latencies.sort_unstable();
        let at = |percent| latencies[latencies.len() * percent / 100];
        println!("{name:<36} {:>10} {:>10}", at(50), at(99));
    }
}

/// The brokers under test, what they run on, and the servers to measure.
struct Setup {
    brokers: Vec<TestBroker>,
    fixtures: Vec<Fixture>,
    servers: Vec<Server>,
}

async fn start() -> Setup {
    let kinds = [("fsync", SyncMode::Fsync), ("write", SyncMode::Write)];
    #[cfg(feature = "bench")]
    let kinds = kinds.into_iter().chain([("nothing written", SyncMode::Nothing)]);
    let mut setup = Setup { brokers: vec![], fixtures: vec![], servers: vec![] };
    let mut response = None;
    for (name, sync) in kinds {
        let fixture = Fixture::new().await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let bearer = fixture.add_caller("bench", &["*"]).await;
        let mut config = fixture.config();
        config.settings.audit_sync = sync;
        config.settings.caller_rate = 10_000_000;
        let broker = fixture.start_with(config).await;
        let server = |name, delivering| Server {
            name,
            address: broker.app.grpc_address,
            bearer: format!("Bearer {}", bearer.expose()),
            ops: Some(broker.app.ops_address),
            delivering,
            rates: vec![],
        };
        let without_delivery = server(name, false);
        response = Some(first_response(&without_delivery).await);
        setup.servers.push(without_delivery);
        match sync {
            SyncMode::Fsync => setup.servers.push(server("fsync, delivering", true)),
            SyncMode::Write => setup.servers.push(server("write, delivering", true)),
            #[cfg(feature = "bench")]
            SyncMode::Nothing => {}
        }
        setup.brokers.push(broker);
        setup.fixtures.push(fixture);
    }
    setup.servers.push(Server {
        name: "a bare tonic server",
        address: serve_bare(response.unwrap()).await,
        bearer: String::new(),
        ops: None,
        delivering: false,
        rates: vec![],
    });
    if !cfg!(feature = "bench") {
        println!("the row \"nothing written\" is skipped: it needs --features bench");
    }
    setup
}

/// Waits until the server has a token, and returns the response that contains it.
async fn first_response(server: &Server) -> GetTokenResponse {
    eventually("a token", async || {
        let frame = call(&mut connect(server.address).await, &server.bearer).await?;
        Some(GetTokenResponse::decode(&frame[5..]).unwrap())
    })
    .await
}

/// Returns how many calls a second are answered.
async fn measure(server: &Server, in_flight: usize, window: Duration) -> f64 {
    let (answers, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let mut callers = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let send = connect(server.address).await;
        for _ in 0..in_flight {
            let (mut send, bearer) = (send.clone(), server.bearer.clone());
            let (answers, stop) = (answers.clone(), stop.clone());
            callers.spawn(async move {
                while !stop.load(Relaxed) {
                    assert!(call(&mut send, &bearer).await.is_some(), "a call was refused");
                    answers.fetch_add(1, Relaxed);
                }
            });
        }
    }
    // The measurement begins when the load is steady. As many calls are in flight at its start as at
    // its end.
    tokio::time::sleep(window / 4).await;
    let (before, begun) = (answers.load(Relaxed), Instant::now());
    tokio::time::sleep(window).await;
    let (after, took) = (answers.load(Relaxed), begun.elapsed());
    stop.store(true, Relaxed);
    while let Some(ended) = callers.join_next().await {
        ended.unwrap();
    }
    #[expect(clippy::cast_precision_loss, reason = "the rate is only printed")]
    let rate = (after - before) as f64 / took.as_secs_f64();
    rate
}

async fn connect(address: SocketAddr) -> h2::client::SendRequest<Bytes> {
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (send, connection) = h2::client::Builder::new()
        // With a small window, the server would send responses in many small frames, which count
        // against the client's limits.
        .initial_connection_window_size(8 << 20)
        .handshake(stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    send.ready().await.unwrap()
}

/// Calls `GetToken`, and returns the gRPC frame of the response if the status is OK.
async fn call(send: &mut h2::client::SendRequest<Bytes>, bearer: &str) -> Option<Bytes> {
    // The frame of a GetTokenRequest for `acme`.
    const BODY: &[u8] = b"\0\0\0\0\x06\x0a\x04acme";
    let request = Request::post("http://127.0.0.1/token_broker.v1.TokenService/GetToken")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", bearer)
        .body(())
        .unwrap();
    let mut ready = send.clone().ready().await.unwrap();
    let (answer, mut stream) = ready.send_request(request, false).unwrap();
    stream.send_data(Bytes::from_static(BODY), true).unwrap();
    let mut body = answer.await.unwrap().into_body();
    let mut frame = None;
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        frame = Some(data);
    }
    let trailers = body.trailers().await.unwrap();
    frame.filter(|_| trailers.is_some_and(|it| it["grpc-status"] == "0"))
}

/// Waits until all audit records of a broker are in Postgres.
async fn wait_for_delivery(ops: SocketAddr) {
    eventually("the delivery of all records", async || {
        let (_, metrics) = http(ops, "GET", "/metrics", "").await;
        let mut lines = metrics.lines();
        let gauge = lines.find(|line| line.starts_with("token_broker_undelivered_records "));
        gauge.unwrap().ends_with(" 0").then_some(())
    })
    .await;
}

/// A service that sends the same response to each call.
struct BareService(GetTokenResponse);

#[tonic::async_trait]
impl TokenService for BareService {
    type WatchTokensStream = tokio_stream::Empty<Result<WatchTokensResponse, Status>>;

    async fn get_token(
        &self,
        _: tonic::Request<GetTokenRequest>,
    ) -> Result<Response<GetTokenResponse>, Status> {
        Ok(Response::new(self.0.clone()))
    }

    async fn watch_tokens(
        &self,
        _: tonic::Request<WatchTokensRequest>,
    ) -> Result<Response<Self::WatchTokensStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn report_rejected_token(
        &self,
        _: tonic::Request<ReportRejectedTokenRequest>,
    ) -> Result<Response<ReportRejectedTokenResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_accounts(
        &self,
        _: tonic::Request<ListAccountsRequest>,
    ) -> Result<Response<ListAccountsResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

async fn serve_bare(response: GetTokenResponse) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = tonic::transport::Server::builder()
        .add_service(TokenServiceServer::new(BareService(response)))
        .serve_with_incoming(incoming);
    tokio::spawn(server);
    address
}
