//! Answers a second over HTTP/2 on loopback: the broker with `fsync`, with `write`, with nothing written,
//! and a bare tonic server that gives the same answer, in turns, so that the machine's moods meet all alike.
//!
//!     cargo bench --bench answers --features bench [-- SECONDS A WINDOW]
//!
//! Then the broker with `fsync` and ever more callers, each of whom asks again when it is answered: at three times as
//! many as at its peak it must still give nine tenths of the answers.
//!
//! Clients and servers share the machine. Delivery to Postgres takes as much again: the rows that say
//! so measure with it, the others while Postgres stands still.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench prints, and ends at a fault"
)]

use std::{
    env, fs,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::Request;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use prost::Message;
use sqlx::{AssertSqlSafe, PgPool};
use token_broker::{
    api::proto::{
        GetTokenRequest, GetTokenResponse, ListAccountsRequest, ListAccountsResponse,
        ReportRejectedTokenRequest, ReportRejectedTokenResponse, WatchTokensRequest,
        WatchTokensResponse,
        token_service_server::{TokenService, TokenServiceServer},
    },
    app::{App, AppConfig},
    audit::journal::SyncMode,
    config::DatabaseUrl,
    crypto::{Keyring, bearer::Bearer},
    dev::{
        postgres::{DATABASE, EmbeddedPostgres, Place},
        simulator::{Faults, Options, Simulator},
    },
    domain::clock::Clock,
    store::Database,
};
use tokio::{net::TcpListener, runtime, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status};

const PROGRAM: &str = env!("CARGO_BIN_EXE_token-broker");
const CONNECTIONS: usize = 8;
const IN_FLIGHT: usize = 25;
/// How many calls each of the connections has in flight, from few to many.
const LOADS: [usize; 6] = [1, 5, 25, 50, 100, 200];
const ROUNDS: usize = 5;
const WINDOW: u64 = 2;

/// A server under measurement.
struct Contender {
    name: &'static str,
    address: SocketAddr,
    bearer: String,
    ops: Option<SocketAddr>,
    /// Whether Postgres works meanwhile.
    delivering: bool,
    rates: Vec<f64>,
}

fn main() {
    let window = env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(WINDOW);
    let runtime = |threads| {
        runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().unwrap()
    };
    let (serving, calling) = (runtime(2), runtime(2));
    let (postgres, apps, mut contenders, _homes) = serving.block_on(start());
    for round in 0..ROUNDS {
        let all = contenders.len();
        for nth in 0..all {
            let contender = &mut contenders[(nth + round) % all];
            let standstill = (!contender.delivering).then(|| Standstill::of(postgres.pid()));
            let window = Duration::from_secs(window);
            let rate = calling.block_on(measure(contender, IN_FLIGHT, window));
            drop(standstill);
            contender.rates.push(rate);
            if let Some(ops) = contender.ops {
                drain(ops);
            }
        }
    }
    for contender in &mut contenders {
        contender.rates.sort_by(f64::total_cmp);
    }
    let median = |contender: &Contender| contender.rates[ROUNDS / 2];
    let bare = contenders.iter().find(|it| it.ops.is_none()).map_or(f64::NAN, median);
    println!(
        "{:<36} {:>10} {:>10} {:>10} {:>7}",
        "answers/s", "least", "median", "most", "of bare"
    );
    for contender in &contenders {
        let (least, most) = (contender.rates[0], contender.rates[ROUNDS - 1]);
        let (name, median) = (contender.name, median(contender));
        println!("{name:<36} {least:>10.0} {median:>10.0} {most:>10.0} {:>7.2}", median / bare);
    }
    let fsync = contenders.iter().find(|it| it.name == "fsync").unwrap();
    let standstill = Standstill::of(postgres.pid());
    overload(&calling, fsync, Duration::from_secs(window));
    drop(standstill);
    serving.block_on(async {
        for app in apps {
            app.stop().await;
        }
        postgres.stop().await;
    });
}

/// How the answers a second hold out against more callers than the peak takes.
fn overload(calling: &runtime::Runtime, contender: &Contender, window: Duration) {
    let rate = |in_flight| {
        let mut rates: Vec<_> =
            (0..3).map(|_| calling.block_on(measure(contender, in_flight, window))).collect();
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

type Ground = (EmbeddedPostgres, Vec<App>, Vec<Contender>, Vec<tempfile::TempDir>);

async fn start() -> Ground {
    let postgres = EmbeddedPostgres::start(Place::Temporary, Path::new(PROGRAM)).await.unwrap();
    let options = Options { faults: Faults::default(), ..Options::default() };
    let upstream = Simulator::start_on_loopback(options).await.unwrap();
    let admin = Database::new(&postgres.url(DATABASE), "bench").unwrap().pool(1);
    let (mut apps, mut contenders, mut homes) = (vec![], vec![], vec![]);
    let kinds = [("fsync", SyncMode::Fsync), ("write", SyncMode::Write)];
    #[cfg(feature = "bench")]
    let kinds = kinds.into_iter().chain([("nothing written", SyncMode::Nothing)]);
    let mut answer = None;
    for (nth, (name, sync)) in kinds.into_iter().enumerate() {
        let (database, id) = (format!("bench_{nth}"), format!("id-{nth}"));
        upstream.add_account(&id, "SK.1");
        let create = AssertSqlSafe(format!("create database {database}"));
        sqlx::raw_sql(create).execute(&admin).await.unwrap();
        let url = postgres.url(&database);
        let database = Database::new(&url, "bench").unwrap();
        database.migrate().await.unwrap();
        let pool = database.pool(1);
        let home = tempfile::tempdir().unwrap();
        let (app, bearer) = serve(&url, &pool, home.path(), &upstream, &id, sync).await;
        let contender = |name, delivering| Contender {
            name,
            address: app.grpc_address,
            bearer: format!("Bearer {}", bearer.expose()),
            ops: Some(app.ops_address),
            delivering,
            rates: vec![],
        };
        let first = contender(name, false);
        answer = Some(until_served(&first).await);
        contenders.push(first);
        match sync {
            SyncMode::Fsync => contenders.push(contender("fsync, delivering", true)),
            SyncMode::Write => contenders.push(contender("write, delivering", true)),
            #[cfg(feature = "bench")]
            SyncMode::Nothing => {}
        }
        apps.push(app);
        homes.push(home);
    }
    contenders.push(Contender {
        name: "a bare tonic server",
        address: serve_bare(answer.unwrap()).await,
        bearer: String::new(),
        ops: None,
        delivering: false,
        rates: vec![],
    });
    if !cfg!(feature = "bench") {
        println!("without --features bench there is no row for nothing written");
    }
    // It is called once for each account: it may end with this.
    std::mem::forget(upstream);
    (postgres, apps, contenders, homes)
}

async fn serve(
    database_url: &str,
    pool: &PgPool,
    home: &Path,
    upstream: &Simulator,
    client_id: &str,
    sync: SyncMode,
) -> (App, Bearer) {
    let bearer = Bearer::generate();
    let insert =
        "insert into accounts (name, client_id, client_secret) values ('acme', $1, 'SK.1')";
    sqlx::query(insert).bind(client_id).execute(pool).await.unwrap();
    sqlx::raw_sql(
        "insert into callers (name) values ('bench');
         insert into grants (caller_id, pattern) select id, '*' from callers",
    )
    .execute(pool)
    .await
    .unwrap();
    let insert = "insert into caller_credentials (caller_id, kind, bearer_sha256)
        select id, 'bearer', $1 from callers";
    sqlx::query(insert).bind(bearer.sha256().as_slice()).execute(pool).await.unwrap();
    let keyring = Arc::new(Keyring::parse(&Keyring::generate(Clock::System.now())).unwrap());
    let target = upstream.base_url().parse().unwrap();
    let database_url = DatabaseUrl::new(database_url).unwrap();
    let mut plan = AppConfig::local(database_url, target, home.to_owned(), keyring);
    plan.settings.audit_sync = sync;
    plan.settings.caller_rate = 10_000_000;
    let listen = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = App::start(plan, listen().await, listen().await, &CancellationToken::new()).await;
    (app.unwrap(), bearer)
}

async fn until_served(contender: &Contender) -> GetTokenResponse {
    loop {
        let mut send = connect(contender.address).await;
        if let Some(answer) = ask(&mut send, &contender.bearer).await {
            return GetTokenResponse::decode(&answer[5..]).unwrap();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// How many answers a second there are.
async fn measure(contender: &Contender, in_flight: usize, window: Duration) -> f64 {
    let (answers, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let mut callers = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let send = connect(contender.address).await;
        for _ in 0..in_flight {
            let (mut send, bearer) = (send.clone(), contender.bearer.clone());
            let (answers, stop) = (answers.clone(), stop.clone());
            callers.spawn(async move {
                while !stop.load(Relaxed) {
                    assert!(ask(&mut send, &bearer).await.is_some(), "a call was refused");
                    answers.fetch_add(1, Relaxed);
                }
            });
        }
    }
    // What is under way at the start and at the end counts neither more nor less than elsewhere.
    tokio::time::sleep(window / 4).await;
    let (before, begun) = (answers.load(Relaxed), Instant::now());
    tokio::time::sleep(window).await;
    let (after, took) = (answers.load(Relaxed), begun.elapsed());
    stop.store(true, Relaxed);
    while let Some(ended) = callers.join_next().await {
        ended.unwrap();
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate for eyes")]
    let rate = (after - before) as f64 / took.as_secs_f64();
    rate
}

async fn connect(address: SocketAddr) -> h2::client::SendRequest<Bytes> {
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (send, connection) = h2::client::Builder::new()
        // Answers in small pieces, as a full window makes them, count against the client's own bounds.
        .initial_connection_window_size(8 << 20)
        .handshake(stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    send.ready().await.unwrap()
}

/// One call; the answer's frame if its status is OK.
async fn ask(send: &mut h2::client::SendRequest<Bytes>, bearer: &str) -> Option<Bytes> {
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

/// Waits until all records of a broker have reached Postgres.
fn drain(ops: SocketAddr) {
    use std::io::{Read, Write};
    loop {
        let mut stream = std::net::TcpStream::connect(ops).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let line = text.lines().find(|line| line.starts_with("token_broker_undelivered_records "));
        if line.unwrap().ends_with(" 0") {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The same answer, from memory, with nothing done for it.
struct Bare(GetTokenResponse);

#[tonic::async_trait]
impl TokenService for Bare {
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

async fn serve_bare(answer: GetTokenResponse) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = tonic::transport::Server::builder()
        .add_service(TokenServiceServer::new(Bare(answer)))
        .serve_with_incoming(incoming);
    tokio::spawn(server);
    address
}

/// Postgres and its children, standing still while this lives.
struct Standstill(Vec<Pid>);

impl Standstill {
    fn of(parent: u32) -> Self {
        let mut stopped = vec![parent];
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let of =
                stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
            if of == Some(parent) {
                stopped.extend(entry.file_name().to_str().and_then(|pid| pid.parse::<u32>().ok()));
            }
        }
        let stopped: Vec<_> =
            stopped.into_iter().map(|pid| Pid::from_raw(pid.try_into().unwrap())).collect();
        for pid in &stopped {
            let _ = kill(*pid, Signal::SIGSTOP);
        }
        Self(stopped)
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill(*pid, Signal::SIGCONT);
        }
    }
}
