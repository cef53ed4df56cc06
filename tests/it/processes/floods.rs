//! Clients that abuse HTTP/2. Whatever they send, all calls of another client succeed, memory stays bounded,
//! and file descriptors are released.

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
/// How much the peak memory may grow during all floods of a test, in KiB. Without limits, several of the
/// floods would each take more.
const MAX_MEMORY_GROWTH: u64 = 256 * 1024;

/// A well-behaved client that calls all the time.
struct BystanderClient {
    calls: Arc<AtomicU64>,
    stop: CancellationToken,
    calling: JoinHandle<()>,
}

impl BystanderClient {
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

    /// Returns once more than 20 further calls were answered. Panics if one failed.
    async fn is_still_served(&self, during: &str) {
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

/// A broker process with an account, a caller, and a bystander whose calls must all succeed.
struct BrokerUnderTest {
    _fixture: Fixture,
    setup: BrokerSetup,
    serve: BrokerProcess,
    /// The bearer of the floods.
    bearer: String,
    bystander: BystanderClient,
    /// The open file descriptors before the first flood.
    descriptors: usize,
    /// The peak memory before the first flood, in KiB.
    memory: u64,
}

impl BrokerUnderTest {
    async fn new() -> Self {
        let fixture = Fixture::new().await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        // The floods are another caller's than the bystander's, which calls as fast as it can.
        let bearer = fixture.add_caller("flood", &["*"]).await;
        let bystanders_bearer = fixture.add_caller("bystander", &["*"]).await;
        fixture
            .database
            .sql("update callers set rate_limit = 100000 where name = 'bystander'")
            .await;
        let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
        let serve = setup.serve().await;
        let client = TestClient::connect(&setup.endpoint(), &bystanders_bearer).await;
        eventually("a token", async || client.get("acme").await.ok()).await;
        let bystander = BystanderClient::start(client);
        bystander.is_still_served("the beginning").await;
        let (descriptors, memory) = (serve.open_descriptors(), serve.peak_memory());
        let bearer = format!("Bearer {}", bearer.expose());
        Self { _fixture: fixture, setup, serve, bearer, bystander, descriptors, memory }
    }

    fn address(&self) -> SocketAddr {
        self.setup.grpc
    }

    /// Checks that the bystander is served, that the descriptors of a flood are released, and that the memory is
    /// bounded.
    async fn assert_recovered(&self, flood: &str) {
        self.bystander.is_still_served(flood).await;
        eventually(&format!("the descriptors of: {flood}"), async || {
            // The number of database connections varies.
            (self.serve.open_descriptors() <= self.descriptors + 16).then_some(())
        })
        .await;
        let grown = self.serve.peak_memory().saturating_sub(self.memory);
        assert!(grown <= MAX_MEMORY_GROWTH, "{flood}: {grown} KiB");
    }

    async fn stop(mut self) {
        self.bystander.stop().await;
        self.serve.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!(self.serve.wait().await.code(), Some(0), "{}", self.serve.stderr());
    }
}

/// Returns the stream numbers that clients use: the odd ones.
fn streams(count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(|nth| 2 * nth + 1)
}

/// Sends the frames that `next` returns for one stream after another: for `max` streams, or until the server
/// closes the connection. Returns what the server sent.
async fn until_refused(
    mut raw: RawHttp2Client,
    max: u32,
    next: impl Fn(u32) -> Vec<u8>,
) -> Vec<Frame> {
    for stream in streams(max) {
        if !raw.send(&next(stream)).await {
            break;
        }
    }
    // The sends may have succeeded into buffers, so wait for the server's end in any case.
    raw.read_to_end().await
}

/// Returns the HEADERS frames.
fn headers(frames: &[Frame]) -> impl Iterator<Item = &Frame> {
    frames.iter().filter(|frame| frame.0 == HEADERS)
}

/// Checks that a GOAWAY, if one arrived, has the code `ENHANCE_YOUR_CALM` and the debug data `expected`.
fn assert_enhance_your_calm(flood: &str, frames: &[Frame], expected: &str) {
    // The GOAWAY is lost if the client still sends when the server closes.
    if let Some((code, debug_data)) = goaway(frames) {
        assert!(
            code == ENHANCE_YOUR_CALM && debug_data == expected,
            "{flood}: {code} {debug_data}"
        );
    }
}

#[tokio::test]
async fn floods_of_cheap_frames_close_only_the_connection_that_sends_them() {
    let broker = BrokerUnderTest::new().await;
    let address = broker.address();
    let open = call(GET_TOKEN, None);

    let flood = "rapid reset";
    let frames = until_refused(RawHttp2Client::connect(address).await, 200_000, |stream| {
        let cancelled = frame(RST_STREAM, NONE, stream, &8_u32.to_be_bytes());
        [frame(HEADERS, END_HEADERS | END_STREAM, stream, &open), cancelled].concat()
    })
    .await;
    assert_enhance_your_calm(flood, &frames, "too_many_resets");
    broker.assert_recovered(flood).await;

    let flood = "resets that the server is made to send";
    let frames = until_refused(RawHttp2Client::connect(address).await, 200_000, |stream| {
        // A window beyond 2^31 - 1 is an error of the stream, which the server resets.
        let beyond = frame(WINDOW_UPDATE, NONE, stream, &0x7fff_ffff_u32.to_be_bytes());
        [frame(HEADERS, END_HEADERS, stream, &open), beyond].concat()
    })
    .await;
    assert_enhance_your_calm(flood, &frames, "too_many_internal_resets");
    broker.assert_recovered(flood).await;

    let flood = "headers that never end";
    let mut raw = RawHttp2Client::connect(address).await;
    assert!(raw.send(&frame(HEADERS, NONE, 1, &open)).await);
    let frames = until_refused(raw, 100_000, |_| frame(CONTINUATION, NONE, 1, &[])).await;
    assert_enhance_your_calm(flood, &frames, "too_many_continuations");
    broker.assert_recovered(flood).await;

    let flood = "headers that never end and are not empty";
    let mut raw = RawHttp2Client::connect(address).await;
    assert!(raw.send(&frame(HEADERS, NONE, 1, &open)).await);
    let more = header("x", &"y".repeat(4_000));
    let frames = until_refused(raw, 100_000, |_| frame(CONTINUATION, NONE, 1, &more)).await;
    assert!(goaway(&frames).is_none_or(|(code, _)| code != 0), "{flood}");
    broker.assert_recovered(flood).await;

    let flood = "empty data frames";
    let mut raw = RawHttp2Client::connect(address).await;
    let admitted = call(GET_TOKEN, Some(&broker.bearer));
    assert!(raw.send(&frame(HEADERS, END_HEADERS, 1, &admitted)).await);
    let frames = until_refused(raw, 200_000, |_| frame(DATA, NONE, 1, &[]).repeat(10)).await;
    assert_enhance_your_calm(flood, &frames, "too_many_data_frames");
    broker.assert_recovered(flood).await;

    for (flood, bytes) in [
        ("pings", frame(PING, NONE, 0, &[0; 8])),
        ("settings", frame(SETTINGS, NONE, 0, &[0, 4, 0, 0, 0xff, 0xff])),
        ("priorities", frame(2, NONE, 1, &[0, 0, 0, 3, 1])),
        ("frames of an unknown kind", frame(0xbe, NONE, 0, &[0; 100])),
    ] {
        let mut raw = RawHttp2Client::connect(address).await;
        // The server may tolerate frames that cost it little.
        for _ in 0..1_000 {
            if !raw.send(&bytes.repeat(100)).await {
                break;
            }
        }
        broker.bystander.is_still_served(flood).await;
        drop(raw);
        broker.assert_recovered(flood).await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn streams_that_are_opened_and_left_do_not_affect_others() {
    let broker = BrokerUnderTest::new().await;
    let address = broker.address();
    for (flood, block) in [
        ("calls without a credential whose message never comes", call(GET_TOKEN, None)),
        (
            "calls with a credential whose message never comes",
            call(GET_TOKEN, Some(&broker.bearer)),
        ),
        ("health checks whose message never comes", call(CHECK, None)),
    ] {
        let floods = (0..20).map(|_| async {
            let mut raw = RawHttp2Client::connect(address).await;
            // Twice as many as a connection may have streams.
            for stream in streams(2_000) {
                if !raw.send(&frame(HEADERS, END_HEADERS, stream, &block)).await {
                    break;
                }
            }
            raw
        });
        let held = join_all(floods).await;
        broker.bystander.is_still_served(flood).await;
        drop(held);
        broker.assert_recovered(flood).await;
    }

    let flood = "one client that watches health on many streams";
    let mut raw = RawHttp2Client::connect(address).await;
    let watch = call(WATCH_HEALTH, None);
    for stream in streams(100) {
        let asks = frame(DATA, END_STREAM, stream, &message(&[]));
        let opened = [frame(HEADERS, END_HEADERS, stream, &watch), asks].concat();
        assert!(raw.send(&opened).await);
    }
    // Each stream is answered: 16 with the first state, the others are shed.
    raw.wait_for(flood, |frames| headers(frames).count() == 100).await;
    let states = |frames: &[Frame]| frames.iter().filter(|frame| frame.0 == DATA).count();
    raw.wait_for(flood, |frames| states(frames) == 16).await;
    broker.bystander.is_still_served(flood).await;
    raw.wait_for(flood, |frames| states(frames) == 16).await;
    drop(raw);
    broker.assert_recovered(flood).await;

    let flood = "responses that are not read";
    // A window of 0 forbids the server to send data.
    let no_window = [0, 4, 0, 0, 0, 0];
    let floods = (0..5).map(|_| async {
        let mut raw = RawHttp2Client::with_settings(address, &no_window).await;
        let (block, asks) = (call(GET_TOKEN, Some(&broker.bearer)), message(b"\x0a\x04acme"));
        for stream in streams(1_000) {
            let asks = frame(DATA, END_STREAM, stream, &asks);
            let asked = [frame(HEADERS, END_HEADERS, stream, &block), asks].concat();
            assert!(raw.send(&asked).await);
        }
        raw
    });
    let held = join_all(floods).await;
    broker.bystander.is_still_served(flood).await;
    drop(held);
    broker.assert_recovered(flood).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_disconnected_and_an_unfinished_message_ends_its_stream() {
    let broker = BrokerUnderTest::new().await;
    let address = broker.address();
    let flood = "responses that are not read, without a credential and with one";
    let no_window = [0, 4, 0, 0, 0, 0];
    let mut unread = vec![];
    let list = call("/token_broker.v1.TokenService/ListAccounts", Some(&broker.bearer));
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
    broker.bystander.is_still_served(flood).await;

    let flood = "messages of streams that are never finished";
    let mut begun = vec![];
    for block in [
        call(WATCH_HEALTH, None),
        call("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", None),
        call("/token_broker.v1.TokenService/WatchTokens", Some(&broker.bearer)),
    ] {
        let mut raw = RawHttp2Client::connect(address).await;
        let part = [&[0][..], &4_000_u32.to_be_bytes(), &[b'x'; 3_999]].concat();
        let part = frame(DATA, NONE, 1, &part);
        assert!(raw.send(&[frame(HEADERS, END_HEADERS, 1, &block), part].concat()).await);
        begun.push(raw);
    }
    for raw in begun {
        // The stream has ended, and the connection has not.
        let stream_ended =
            |frame: &Frame| frame.2 == 1 && (frame.1 & END_STREAM != 0 || frame.0 == RST_STREAM);
        raw.wait_for(flood, |frames| frames.iter().any(stream_ended)).await;
    }
    for raw in unread {
        raw.read_to_end().await;
    }
    broker.assert_recovered(flood).await;
    broker.stop().await;
}

#[tokio::test]
async fn too_large_messages_and_headers_and_bytes_that_are_not_http_2_are_refused() {
    let broker = BrokerUnderTest::new().await;
    let address = broker.address();

    let flood = "messages that are too large";
    let floods = (0..20).map(|_| async {
        let mut raw = RawHttp2Client::connect(address).await;
        let block = call(GET_TOKEN, Some(&broker.bearer));
        let part = frame(DATA, NONE, 1, &[b'x'; 16 * 1024]);
        let begun = [&[0][..], &(1_u32 << 30).to_be_bytes()].concat();
        raw.send(&frame(HEADERS, END_HEADERS, 1, &block)).await;
        raw.send(&frame(DATA, NONE, 1, &begun)).await;
        // What is sent after the refusal is read and discarded.
        for _ in 0..256 {
            if !raw.send(&part).await {
                break;
            }
        }
        // Whichever is first: the message is refused, or the data beyond the window is.
        let stream_ended = |frame: &Frame| frame.2 == 1 && [HEADERS, RST_STREAM].contains(&frame.0);
        let refused = |frames: &[Frame]| {
            goaway(frames).is_some_and(|(code, _)| code != 0) || frames.iter().any(stream_ended)
        };
        raw.wait_for_or_end(flood, refused).await;
        raw
    });
    drop(join_all(floods).await);
    broker.assert_recovered(flood).await;

    let flood = "headers that are too large";
    let mut raw = RawHttp2Client::connect(address).await;
    let block = [call(GET_TOKEN, None), header("x", &"y".repeat(15_000))].concat();
    let more = header("z", &"y".repeat(8_000));
    assert!(raw.send(&frame(HEADERS, NONE, 1, &block)).await);
    assert!(raw.send(&frame(CONTINUATION, END_HEADERS, 1, &more)).await);
    // The server answers 431 or resets the stream.
    let refused = |frame: &Frame| frame.2 == 1 && [HEADERS, RST_STREAM].contains(&frame.0);
    raw.wait_for(flood, |frames| frames.iter().any(refused)).await;
    drop(raw);
    broker.assert_recovered(flood).await;

    let flood = "garbage";
    let garbage: Vec<u8> =
        (0..65_536_u32).map(|nth| nth.wrapping_mul(2_654_435_769).to_le_bytes()[2]).collect();
    let floods = (0..50).map(|nth| {
        let garbage = &garbage;
        async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // The connection is closed at the first byte that differs from the preface.
            let _ = stream.write_all(&garbage[nth * 7..]).await;
            let mut received = vec![];
            let closed = stream.read_to_end(&mut received);
            let _ = timeout(TEST_TIMEOUT, closed).await.expect("it is closed");
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
    broker.assert_recovered(flood).await;
    broker.stop().await;
}

#[tokio::test]
async fn silent_connections_are_closed() {
    let broker = BrokerUnderTest::new().await;
    let flood = "silent connections";
    let silent = (0..300).map(|_| TcpStream::connect(broker.address()));
    let silent: Vec<_> = join_all(silent).await.into_iter().map(Result::unwrap).collect();
    broker.bystander.is_still_served(flood).await;
    for mut stream in silent {
        let closed = timeout(TEST_TIMEOUT, stream.read(&mut [0; 1])).await.expect("it is closed");
        assert!(closed.is_ok_and(|read| read == 0), "they receive nothing");
    }
    broker.assert_recovered(flood).await;
    broker.stop().await;
}

#[tokio::test]
async fn unfinished_tls_handshakes_time_out_while_others_succeed() {
    let fixture = Fixture::new().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let mut setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let ours = TestCa::new("ours");
    let files = write_tls_files(setup.directory.path(), &ours.issue(&[BROKER_DNS_NAME]), &[]);
    setup.set_tls(&files);
    let mut serve = setup.serve().await;
    let before = serve.open_descriptors();
    // Each client sends the beginning of a ClientHello and no more.
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
