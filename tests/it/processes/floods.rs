//! Clients that abuse what HTTP/2 lets them do. Whatever they send, another client's calls all succeed,
//! memory stays bounded, and descriptors return.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use futures_util::future::join_all;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::harness::{
    TEST_TIMEOUT,
    broker::{Fixture, TestClient},
    certificates::{BROKER_DNS_NAME, TestCa, connect_tls, write_tls_files},
    eventually,
    process::{BrokerProcess, BrokerSetup},
    raw_http2::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, HEADERS, NONE, PING, RST_STREAM,
        RawHttp2Client, SETTINGS, WINDOW_UPDATE, call, frame, goaway, header, message,
    },
};

const GET_TOKEN: &str = "/token_broker.v1.TokenService/GetToken";
const CHECK: &str = "/grpc.health.v1.Health/Check";
const WATCH_HEALTH: &str = "/grpc.health.v1.Health/Watch";
const ENHANCE_YOUR_CALM: u32 = 0xb;
/// How much more memory than before all floods together may take, in KiB. Without bounds each of
/// several takes more by itself.
const MOST_MEMORY: u64 = 256 * 1024;

/// A client that does nothing wrong, and calls all the while.
struct Victim {
    calls: Arc<AtomicU64>,
    stop: CancellationToken,
    calling: JoinHandle<()>,
}

impl Victim {
    fn start(client: TestClient) -> Self {
        let (calls, stop) = (Arc::new(AtomicU64::new(0)), CancellationToken::new());
        let calling = tokio::spawn({
            let (calls, stop) = (calls.clone(), stop.clone());
            async move {
                while !stop.is_cancelled() {
                    client.get("acme").await.expect("a call during a flood");
                    calls.fetch_add(1, Relaxed);
                }
            }
        });
        Self { calls, stop, calling }
    }

    /// Returns once it was answered some times more.
    async fn goes_on(&self, during: &str) {
        let so_far = self.calls.load(Relaxed);
        eventually(during, async || {
            let failed = self.calling.is_finished();
            (failed || self.calls.load(Relaxed) > so_far + 20).then_some(())
        })
        .await;
        assert!(!self.calling.is_finished(), "a call failed during: {during}");
    }

    async fn stop(self) {
        self.stop.cancel();
        self.calling.await.unwrap();
    }
}

struct Stage {
    _world: Fixture,
    setup: BrokerSetup,
    serve: BrokerProcess,
    bearer: String,
    victim: Victim,
    /// Before anything happened.
    descriptors: usize,
    memory: u64,
}

impl Stage {
    async fn new() -> Self {
        let fixture = Fixture::new().await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
        let serve = setup.serve().await;
        let client = TestClient::connect(&setup.endpoint(), &bearer).await;
        eventually("a token", async || client.get("acme").await.ok()).await;
        let victim = Victim::start(client);
        victim.goes_on("the beginning").await;
        let (descriptors, memory) = (serve.open_descriptors(), serve.peak_memory());
        let bearer = format!("Bearer {}", bearer.expose());
        Self { _world: fixture, setup, serve, bearer, victim, descriptors, memory }
    }

    fn address(&self) -> SocketAddr {
        self.setup.grpc
    }

    /// The connections of a flood are gone, and nothing is left of them.
    async fn recovered(&self, flood: &str) {
        self.victim.goes_on(flood).await;
        eventually(&format!("the descriptors of: {flood}"), async || {
            // Those of the pool come and go.
            (self.serve.open_descriptors() <= self.descriptors + 16).then_some(())
        })
        .await;
        let grown = self.serve.peak_memory().saturating_sub(self.memory);
        assert!(grown <= MOST_MEMORY, "{flood}: {grown} KiB");
    }

    async fn stop(mut self) {
        self.victim.stop().await;
        self.serve.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!(self.serve.wait().await.code(), Some(0), "{}", self.serve.stderr());
    }
}

/// Odd numbers, as clients have them.
fn streams(count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(|nth| 2 * nth + 1)
}

/// Sends again and again what `next` makes, until the server has had enough.
async fn until_refused(
    mut raw: RawHttp2Client,
    most: u32,
    next: impl Fn(u32) -> Vec<u8>,
) -> Vec<Frame> {
    for stream in streams(most) {
        if !raw.send(&next(stream)).await {
            break;
        }
    }
    // What it has not read yet may all have found room on the way.
    raw.read_to_end().await
}

/// The heads of answers.
fn headers(frames: &[Frame]) -> impl Iterator<Item = &Frame> {
    frames.iter().filter(|frame| frame.0 == HEADERS)
}

fn assert_calm(flood: &str, frames: &[Frame], says: &str) {
    let told = goaway(frames);
    // What the server said last is lost if the client still sends when it closes.
    if let Some((code, why)) = told {
        assert!(code == ENHANCE_YOUR_CALM && why == says, "{flood}: {code} {why}");
    }
}

#[tokio::test]
async fn frames_that_cost_a_server_more_than_a_client_end_that_client_alone() {
    let stage = Stage::new().await;
    let address = stage.address();
    let open = call(GET_TOKEN, None);

    let flood = "rapid reset";
    let frames = until_refused(RawHttp2Client::connect(address).await, 200_000, |stream| {
        let cancelled = frame(RST_STREAM, NONE, stream, &8_u32.to_be_bytes());
        [frame(HEADERS, END_HEADERS | END_STREAM, stream, &open), cancelled].concat()
    })
    .await;
    assert_calm(flood, &frames, "too_many_resets");
    stage.recovered(flood).await;

    let flood = "resets that the server is made to send";
    let frames = until_refused(RawHttp2Client::connect(address).await, 200_000, |stream| {
        // A window beyond all bounds is an error of the stream's.
        let beyond = frame(WINDOW_UPDATE, NONE, stream, &0x7fff_ffff_u32.to_be_bytes());
        [frame(HEADERS, END_HEADERS, stream, &open), beyond].concat()
    })
    .await;
    assert_calm(flood, &frames, "too_many_internal_resets");
    stage.recovered(flood).await;

    let flood = "headers that never end";
    let mut raw = RawHttp2Client::connect(address).await;
    assert!(raw.send(&frame(HEADERS, NONE, 1, &open)).await);
    let frames = until_refused(raw, 100_000, |_| frame(CONTINUATION, NONE, 1, &[])).await;
    assert_calm(flood, &frames, "too_many_continuations");
    stage.recovered(flood).await;

    let flood = "headers that never end and say something";
    let mut raw = RawHttp2Client::connect(address).await;
    assert!(raw.send(&frame(HEADERS, NONE, 1, &open)).await);
    let more = header("x", &"y".repeat(4_000));
    let frames = until_refused(raw, 100_000, |_| frame(CONTINUATION, NONE, 1, &more)).await;
    assert!(goaway(&frames).is_none_or(|(code, _)| code != 0), "{flood}");
    stage.recovered(flood).await;

    let flood = "data of nothing";
    let mut raw = RawHttp2Client::connect(address).await;
    let admitted = call(GET_TOKEN, Some(&stage.bearer));
    assert!(raw.send(&frame(HEADERS, END_HEADERS, 1, &admitted)).await);
    let frames = until_refused(raw, 200_000, |_| frame(DATA, NONE, 1, &[]).repeat(10)).await;
    assert_calm(flood, &frames, "too_many_data_frames");
    stage.recovered(flood).await;

    for (flood, bytes) in [
        ("pings", frame(PING, NONE, 0, &[0; 8])),
        ("settings", frame(SETTINGS, NONE, 0, &[0, 4, 0, 0, 0xff, 0xff])),
        ("priorities", frame(2, NONE, 1, &[0, 0, 0, 3, 1])),
        ("frames of an unknown kind", frame(0xbe, NONE, 0, &[0; 100])),
    ] {
        let mut raw = RawHttp2Client::connect(address).await;
        // Some of them are borne with: what they cost is answered as they come, or nothing.
        for _ in 0..1_000 {
            if !raw.send(&bytes.repeat(100)).await {
                break;
            }
        }
        stage.victim.goes_on(flood).await;
        drop(raw);
        stage.recovered(flood).await;
    }
    stage.stop().await;
}

#[tokio::test]
async fn streams_that_are_opened_and_left_hurt_nobody() {
    let stage = Stage::new().await;
    let address = stage.address();
    for (flood, block) in [
        ("calls without a credential whose message never comes", call(GET_TOKEN, None)),
        ("calls with a credential whose message never comes", call(GET_TOKEN, Some(&stage.bearer))),
        ("health checks whose message never comes", call(CHECK, None)),
    ] {
        let floods = (0..20).map(|_| async {
            let mut raw = RawHttp2Client::connect(address).await;
            // Twice as many as a connection may have.
            for stream in streams(2_000) {
                if !raw.send(&frame(HEADERS, END_HEADERS, stream, &block)).await {
                    break;
                }
            }
            raw
        });
        let held = join_all(floods).await;
        stage.victim.goes_on(flood).await;
        drop(held);
        stage.recovered(flood).await;
    }

    let flood = "health that is watched by one client on many streams";
    let mut raw = RawHttp2Client::connect(address).await;
    let watch = call(WATCH_HEALTH, None);
    for stream in streams(100) {
        let asks = frame(DATA, END_STREAM, stream, &message(&[]));
        let opened = [frame(HEADERS, END_HEADERS, stream, &watch), asks].concat();
        assert!(raw.send(&opened).await);
    }
    // Each has an answer: 16 the first state, the others that they are shed.
    raw.wait_for(flood, |frames| headers(frames).count() == 100).await;
    let states = |frames: &[Frame]| frames.iter().filter(|frame| frame.0 == DATA).count();
    raw.wait_for(flood, |frames| states(frames) == 16).await;
    stage.victim.goes_on(flood).await;
    raw.wait_for(flood, |frames| states(frames) == 16).await;
    drop(raw);
    stage.recovered(flood).await;

    let flood = "answers that nobody reads";
    // No answer may be sent, and each is asked for.
    let no_window = [0, 4, 0, 0, 0, 0];
    let floods = (0..5).map(|_| async {
        let mut raw = RawHttp2Client::with_settings(address, &no_window).await;
        let (block, asks) = (call(GET_TOKEN, Some(&stage.bearer)), message(b"\x0a\x04acme"));
        for stream in streams(1_000) {
            let asks = frame(DATA, END_STREAM, stream, &asks);
            let asked = [frame(HEADERS, END_HEADERS, stream, &block), asks].concat();
            assert!(raw.send(&asked).await);
        }
        raw
    });
    let held = join_all(floods).await;
    stage.victim.goes_on(flood).await;
    drop(held);
    stage.recovered(flood).await;
    stage.stop().await;
}

#[tokio::test]
async fn who_does_not_read_or_does_not_go_on_is_cut() {
    let stage = Stage::new().await;
    let address = stage.address();
    let flood = "answers that nobody reads, without a credential and with one";
    let no_window = [0, 4, 0, 0, 0, 0];
    let mut unread = vec![];
    let list = call("/token_broker.v1.TokenService/ListAccounts", Some(&stage.bearer));
    for block in [call(CHECK, None), list] {
        let mut raw = RawHttp2Client::with_settings(address, &no_window).await;
        for stream in streams(500) {
            let asks = frame(DATA, END_STREAM, stream, &message(&[]));
            let asked = [frame(HEADERS, END_HEADERS, stream, &block), asks].concat();
            assert!(raw.send(&asked).await);
        }
        raw.wait_for(flood, |frames| headers(frames).count() > 0).await;
        unread.push(raw);
    }
    stage.victim.goes_on(flood).await;

    let flood = "messages of streams that do not go on";
    let mut begun = vec![];
    for block in [
        call(WATCH_HEALTH, None),
        call("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", None),
        call("/token_broker.v1.TokenService/WatchTokens", Some(&stage.bearer)),
    ] {
        let mut raw = RawHttp2Client::connect(address).await;
        let part = [&[0][..], &4_000_u32.to_be_bytes(), &[b'x'; 3_999]].concat();
        let part = frame(DATA, NONE, 1, &part);
        assert!(raw.send(&[frame(HEADERS, END_HEADERS, 1, &block), part].concat()).await);
        begun.push(raw);
    }
    for raw in begun {
        // The stream is over, and the connection is not.
        let over =
            |frame: &Frame| frame.2 == 1 && (frame.1 & END_STREAM != 0 || frame.0 == RST_STREAM);
        raw.wait_for(flood, |frames| frames.iter().any(over)).await;
    }
    for raw in unread {
        raw.read_to_end().await;
    }
    stage.recovered(flood).await;
    stage.stop().await;
}

#[tokio::test]
async fn what_is_too_large_or_no_http_2_at_all_is_refused_and_forgotten() {
    let stage = Stage::new().await;
    let address = stage.address();

    let flood = "messages that are too large";
    let floods = (0..20).map(|_| async {
        let mut raw = RawHttp2Client::connect(address).await;
        let block = call(GET_TOKEN, Some(&stage.bearer));
        let part = frame(DATA, NONE, 1, &[b'x'; 16 * 1024]);
        let begun = [&[0][..], &(1_u32 << 30).to_be_bytes()].concat();
        raw.send(&frame(HEADERS, END_HEADERS, 1, &block)).await;
        raw.send(&frame(DATA, NONE, 1, &begun)).await;
        // What comes after the refusal is taken and forgotten.
        for _ in 0..256 {
            if !raw.send(&part).await {
                break;
            }
        }
        // Whichever is first: the message is refused, or what was sent beyond the window is.
        let over = |frame: &Frame| frame.2 == 1 && [HEADERS, RST_STREAM].contains(&frame.0);
        let refused = |frames: &[Frame]| {
            goaway(frames).is_some_and(|(code, _)| code != 0) || frames.iter().any(over)
        };
        raw.wait_for_or_end(flood, refused).await;
        raw
    });
    drop(join_all(floods).await);
    stage.recovered(flood).await;

    let flood = "headers that are too large";
    let mut raw = RawHttp2Client::connect(address).await;
    let block = [call(GET_TOKEN, None), header("x", &"y".repeat(15_000))].concat();
    let more = header("z", &"y".repeat(8_000));
    assert!(raw.send(&frame(HEADERS, NONE, 1, &block)).await);
    assert!(raw.send(&frame(CONTINUATION, END_HEADERS, 1, &more)).await);
    // 431, or the end of the stream.
    let refused = |frame: &Frame| frame.2 == 1 && [HEADERS, RST_STREAM].contains(&frame.0);
    raw.wait_for(flood, |frames| frames.iter().any(refused)).await;
    drop(raw);
    stage.recovered(flood).await;

    let flood = "garbage";
    let garbage: Vec<u8> =
        (0..65_536_u32).map(|nth| nth.wrapping_mul(2_654_435_769).to_le_bytes()[2]).collect();
    let floods = (0..50).map(|nth| {
        let garbage = &garbage;
        async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // It is closed at once, or as soon as it is no HTTP/2.
            let _ = stream.write_all(&garbage[nth * 7..]).await;
            let mut said = vec![];
            let _ =
                timeout(TEST_TIMEOUT, stream.read_to_end(&mut said)).await.expect("it is closed");
        }
    });
    join_all(floods).await;
    let floods = (0..50).map(|nth| {
        let garbage = &garbage;
        async move {
            let mut raw = RawHttp2Client::connect(address).await;
            raw.send(&garbage[nth * 11..]).await;
            raw.read_to_end().await
        }
    });
    join_all(floods).await;
    stage.recovered(flood).await;
    stage.stop().await;
}

#[tokio::test]
async fn who_says_nothing_is_not_waited_for() {
    let stage = Stage::new().await;
    let flood = "silent sockets";
    let silent = (0..300).map(|_| TcpStream::connect(stage.address()));
    let silent: Vec<_> = join_all(silent).await.into_iter().map(Result::unwrap).collect();
    stage.victim.goes_on(flood).await;
    for mut stream in silent {
        let closed = timeout(TEST_TIMEOUT, stream.read(&mut [0; 1])).await.expect("it is closed");
        assert!(closed.is_ok_and(|read| read == 0), "nothing is said to them");
    }
    stage.recovered(flood).await;
    stage.stop().await;
}

#[tokio::test]
async fn a_handshake_that_does_not_go_on_is_given_up_while_others_come_in() {
    let fixture = Fixture::new().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let mut setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let ours = TestCa::new("ours");
    let files = write_tls_files(setup.directory.path(), &ours.issue(&[BROKER_DNS_NAME]), &[]);
    setup.set_tls(&files);
    let mut serve = setup.serve().await;
    let before = serve.open_descriptors();
    // The beginning of a ClientHello, and no more.
    let slow = (0..200).map(|_| async {
        let mut stream = TcpStream::connect(setup.grpc).await.unwrap();
        stream.write_all(&[22, 3, 1, 2, 0, 1, 0, 1]).await.unwrap();
        stream
    });
    let slow = join_all(slow).await;
    for _ in 0..20 {
        connect_tls(setup.grpc.port(), &ours, None).await.expect("another client's handshake");
    }
    for mut stream in slow {
        let _ = timeout(TEST_TIMEOUT, stream.read_to_end(&mut vec![])).await.expect("it is closed");
    }
    eventually("the descriptors", async || (serve.open_descriptors() <= before + 16).then_some(()))
        .await;
    serve.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
}
