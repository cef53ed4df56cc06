//! Two processes never act under one identity: a copied state directory is noticed, one of the two processes ends
//! with an error that says what to do, and a plain restart is not delayed.

use std::path::Path;

use nix::sys::signal::Signal;

use crate::harness::{
    broker::{Fixture, TestClient},
    eventually,
    process::{BrokerProcess, BrokerSetup},
};

/// Copies the state directory of `original` into that of a new replica.
async fn clone_of(original: &BrokerSetup) -> BrokerSetup {
    let copy = original.replica();
    let (from, to) = (original.directory.path().join("state"), copy.directory.path().join("state"));
    copy_directory(&from, &to).await;
    copy
}

async fn copy_directory(from: &Path, to: &Path) {
    let mut command = tokio::process::Command::new("cp");
    command.arg("-a").args([from, to]);
    assert!(command.status().await.unwrap().success());
}

#[tokio::test]
async fn a_process_on_a_copied_state_directory_refuses_to_start_while_the_original_runs() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let original = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let mut serve = original.serve().await;
    let client = TestClient::connect(&original.endpoint(), &bearer).await;
    let token = client.get("acme").await.unwrap();

    let copy = clone_of(&original).await;
    let mut refused = BrokerProcess::start(copy.command(&["serve"]));
    assert_eq!(refused.wait().await.code(), Some(1), "{}", refused.stderr());
    let stderr = refused.stderr();
    assert!(stderr.contains("another process is running with the identity i-"), "{stderr}");
    assert!(stderr.contains("give this one an empty state directory of its own"), "{stderr}");
    assert_eq!(client.get("acme").await.unwrap().generation, token.generation);

    // A restart after SIGKILL knows by the lock that its predecessor has ended.
    serve.signal(Signal::SIGKILL);
    serve.wait().await;
    let mut serve = original.serve().await;
    assert!(!serve.stderr().contains("waiting up to 30 s"), "{}", serve.stderr());
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
    assert_eq!(fixture.audit_events("event = 'started'").await.len(), 2);
    assert_eq!(fixture.upstream.requests(), 1);
    // The original has stopped, so the copy may go on in its place.
    let mut serve = copy.serve().await;
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
}

#[tokio::test]
async fn a_paused_process_that_was_replaced_by_one_on_a_copy_ends_and_issues_nothing() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let original = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let mut paused = original.serve().await;
    let copy = clone_of(&original).await;
    paused.signal(Signal::SIGSTOP);
    // As if the pause had lasted for a minute already.
    fixture.database.sql("update instances set heartbeat_at = now() - interval '1 minute'").await;
    let mut serve = copy.serve().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let client = TestClient::connect(&copy.endpoint(), &bearer).await;
    let token = eventually("a token", async || client.get("acme").await.ok()).await;

    paused.signal(Signal::SIGCONT);
    assert_eq!(paused.wait().await.code(), Some(1), "{}", paused.stderr());
    let stderr = paused.stderr();
    assert!(stderr.contains("another process is running with the identity i-"), "{stderr}");
    assert_eq!(client.get("acme").await.unwrap().generation, token.generation);
    assert_eq!(fixture.upstream.requests(), 1);
    // The end of the one must not report the other as stopped.
    let stopped: bool = sqlx::query_scalar("select stopped_at is not null from instances")
        .fetch_one(fixture.database.pool())
        .await
        .unwrap();
    assert!(!stopped);
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
}

#[tokio::test]
async fn of_two_copies_that_start_at_the_same_time_one_serves() {
    let fixture = Fixture::new().await;
    let original = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let mut serve = original.serve().await;
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
    let copies = [clone_of(&original).await, clone_of(&original).await];
    let mut processes =
        copies.each_ref().map(|copy| BrokerProcess::start(copy.command(&["serve"])));
    let refused = |process: &BrokerProcess| {
        process.stderr().contains("another process is running with the identity i-")
    };
    eventually("the end of one", async || processes.iter().any(refused).then_some(())).await;
    let (one, other) = {
        let [first, second] = &mut processes;
        if refused(first) { (first, second) } else { (second, first) }
    };
    assert_eq!(one.wait().await.code(), Some(1), "{}", one.stderr());
    eventually("the other is ready", async || other.stderr().contains("ready").then_some(())).await;
    other.signal(Signal::SIGTERM);
    assert_eq!(other.wait().await.code(), Some(0), "{}", other.stderr());
}
