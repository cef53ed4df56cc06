//! A log that nobody reads, or that cannot be written, stops nothing: serving, issuing, health, revocation and
//! the stop go on, and the lines that are lost are counted.

use std::{
    fs::{File, OpenOptions},
    io::{self, PipeReader, Read, Write},
    sync::Arc,
    thread,
};

use nix::sys::signal::Signal;
use parking_lot::Mutex;
use tonic::Code;

use crate::harness::{
    broker::{Fixture, TestClient},
    eventually,
    http::http,
    process::{BrokerProcess, BrokerSetup, program},
};

/// How many bytes a pipe holds, unless it was set otherwise.
const PIPE_BYTES: usize = 64 << 10;

/// Returns a pipe that is full and not read, for the output of a process.
pub(super) fn full_pipe() -> (PipeReader, io::PipeWriter) {
    let (reader, writer) = io::pipe().unwrap();
    let mut filler = writer.try_clone().unwrap();
    // If the pipe holds less, this thread waits for the reader like everybody else.
    thread::spawn(move || filler.write_all(&vec![b'\n'; PIPE_BYTES]));
    (reader, writer)
}

/// Reads the pipe to its end on another thread. Returns what was read so far.
fn read_in_background(mut pipe: PipeReader) -> Arc<Mutex<Vec<u8>>> {
    let read = Arc::new(Mutex::new(Vec::new()));
    let all = read.clone();
    thread::spawn(move || {
        let mut part = [0; 4096];
        while let Ok(length @ 1..) = pipe.read(&mut part) {
            all.lock().extend_from_slice(&part[..length]);
        }
    });
    read
}

fn text(read: &Mutex<Vec<u8>>) -> String {
    String::from_utf8_lossy(&read.lock()).into_owned()
}

async fn dropped_lines(setup: &BrokerSetup) -> u64 {
    let (_, metrics) = http(setup.ops, "GET", "/metrics", "").await;
    let count =
        |line: &str| line.strip_prefix("token_broker_log_lines_dropped_total ")?.parse().ok();
    metrics.lines().find_map(count).unwrap()
}

/// Sets up a broker with a good account, forty accounts that fail, and a caller, that logs as much as it can.
async fn chatty_setup() -> (Fixture, BrokerSetup, token_broker::crypto::bearer::Bearer) {
    let fixture = Fixture::new().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    for n in 0..40 {
        fixture.add_account(&format!("bad-{n}"), &format!("bad-{n}"), "SK.wrong").await;
    }
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let mut setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    setup.set("RUST_LOG", "trace");
    setup.set("TOKEN_BROKER_DRAIN", "2s");
    (fixture, setup, bearer)
}

#[tokio::test]
async fn a_log_that_nobody_reads_stops_nothing_and_tells_later_how_much_is_missing() {
    let (fixture, setup, bearer) = chatty_setup().await;
    let (reader, writer) = full_pipe();
    setup.publish_key().await;
    let serve = BrokerProcess::start_with_stderr(setup.command(&["serve"]), writer);
    let mut serve = setup.until_ready(serve).await;
    let client = TestClient::connect(&setup.endpoint(), &bearer).await;
    let token = async |account: &str| client.get(account).await.ok();
    eventually("a token", async || token("acme").await).await;
    eventually("dropped lines", async || (dropped_lines(&setup).await > 0).then_some(())).await;

    // A new account gets its token, a replaced one too, and a revocation is followed.
    fixture.add_account("new", "id-2", "SK.2").await;
    eventually("the new account's token", async || token("new").await).await;
    let other = fixture.add_caller("other", &["*"]).await;
    let other = TestClient::connect(&setup.endpoint(), &other).await;
    eventually("the new caller", async || other.get("acme").await.ok()).await;
    fixture.database.sql("update callers set enabled = false where name = 'other'").await;
    eventually("the revocation", async || {
        other.get("acme").await.is_err_and(|it| it.code() == Code::Unauthenticated).then_some(())
    })
    .await;
    for path in ["/livez", "/readyz"] {
        assert_eq!(http(setup.ops, "GET", path, "").await.0, 200, "{path}");
    }

    // Once somebody reads, the log goes on, and its last lines are written before the process ends.
    let log = read_in_background(reader);
    eventually("the report", async || text(&log).contains("log lines were dropped").then_some(()))
        .await;
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0));
    eventually("the last line", async || text(&log).contains("\"stopped\"").then_some(())).await;
    let reported: u64 = text(&log)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|line| line["target"] == "token_broker::telemetry")
        .filter_map(|line| line["dropped"].as_u64())
        .sum();
    assert!(reported > 0);
}

#[tokio::test]
async fn a_broker_whose_log_is_never_read_stops_in_time() {
    let (_fixture, setup, bearer) = chatty_setup().await;
    let (_reader, writer) = full_pipe();
    setup.publish_key().await;
    let serve = BrokerProcess::start_with_stderr(setup.command(&["serve"]), writer);
    let mut serve = setup.until_ready(serve).await;
    let client = TestClient::connect(&setup.endpoint(), &bearer).await;
    eventually("a token", async || client.get("acme").await.ok()).await;
    eventually("dropped lines", async || (dropped_lines(&setup).await > 0).then_some(())).await;
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0));
}

#[tokio::test]
async fn a_start_that_fails_ends_although_nobody_reads_the_error() {
    let (_reader, writer) = full_pipe();
    let mut serve = BrokerProcess::start_with_stderr(program(&["serve"]), writer);
    assert_eq!(serve.wait().await.code(), Some(2));
}

#[tokio::test]
async fn a_log_that_cannot_be_written_stops_nothing_and_is_counted() {
    let full_disk = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    let closed = || File::from(std::os::fd::OwnedFd::from(io::pipe().unwrap().1));
    for stderr in [full_disk(), closed()] {
        let (_fixture, setup, bearer) = chatty_setup().await;
        setup.publish_key().await;
        let serve = BrokerProcess::start_with_stderr(setup.command(&["serve"]), stderr);
        let mut serve = setup.until_ready(serve).await;
        let client = TestClient::connect(&setup.endpoint(), &bearer).await;
        eventually("a token", async || client.get("acme").await.ok()).await;
        assert!(dropped_lines(&setup).await > 0);
        serve.signal(Signal::SIGTERM);
        assert_eq!(serve.wait().await.code(), Some(0));
    }
}
