//! A broker is set up, used and stopped as from a shell: by its environment, files, commands and signals.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::{
    database::TestDatabase,
    eventually,
    http::http,
    process::{BrokerProcess, BrokerSetup, program},
};

const SIMULATED: &str = r#"[
    {"client_id": "acmeId", "client_secret": "SK.acme"},
    {"client_id": "typoId", "client_secret": "SK.right"}
]"#;

/// Starts `simulate` with two accounts. Returns the process and its base URL.
async fn simulate(directory: &std::path::Path) -> (BrokerProcess, String) {
    let accounts = directory.join("accounts.json");
    std::fs::write(&accounts, SIMULATED).unwrap();
    let accounts = accounts.to_str().unwrap();
    let listen = ["--listen", "127.0.0.1:0", "--accounts-file", accounts];
    let mut command = program(&["simulate", "--token-life", "1h"]);
    command.args(listen);
    let mut process = BrokerProcess::start(command);
    let url = process.wait_for_stdout("\n").await.trim().to_owned();
    (process, url)
}

/// Returns a database without the broker's schema.
async fn empty_database() -> TestDatabase {
    let database = TestDatabase::new().await;
    database.sql("drop schema public cascade; create schema public").await;
    database
}

/// Asks the simulated upstream whether `token` is live.
async fn is_live(upstream: &str, token: &str) -> bool {
    let address = upstream.split('/').nth(2).unwrap().parse().unwrap();
    let question = format!(r#"{{"token": "{token}"}}"#);
    let (status, answer) = http(address, "POST", "/simulator/live", &question).await;
    assert_eq!(status, 200, "{answer}");
    serde_json::from_str::<Value>(&answer).unwrap()["live"] == true
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "each step depends on the one before it")]
async fn a_broker_is_set_up_used_and_stopped_only_by_environment_files_and_commands() {
    let database = empty_database().await;
    let directory = tempfile::TempDir::new().unwrap();
    let (_simulator, upstream) = simulate(directory.path()).await;
    let mut setup = BrokerSetup::new(database.url(), &upstream).await;
    setup.set_from_file("DATABASE_URL", database.url());
    setup.set("TOKEN_BROKER_DRAIN", "2s");

    // Without a schema the broker does not start, and the error says what to do.
    let refused = setup.run(&["serve"]).await.failed();
    assert!(refused.contains("token-broker migrate"), "{refused}");
    for _ in 0..2 {
        setup.run(&["migrate"]).await.ok();
    }
    // The settings name a keyring, so its intake key was published.
    let again = setup.run(&["keys", "publish"]).await;
    assert!(again.stderr.contains("is published already"), "{again:?}");
    let mut serve = setup.serve().await;
    assert!(setup.run(&["health"]).await.ok().contains("serving"));

    let bearer = setup.run(&["caller", "add", "billing", "--bearer"]).await.ok();
    setup.set_from_file("TOKEN_BROKER_BEARER", &bearer);
    setup.run(&["caller", "grant", "billing", "acme*", "typo"]).await.ok();
    let added = ["account", "add", "acme", "--client-id", "acmeId", "--wait"];
    let printed = setup.run_with_secret(&added, "SK.acme").await.ok();
    assert!(printed.starts_with("acme: fresh, token until "), "{printed}");
    let added = ["account", "add", "typo", "--client-id", "typoId", "--wait"];
    let printed = setup.run_with_secret(&added, "SK.wrong").await.failed();
    assert!(printed.contains("typo: rejected: 61006") && printed.contains("hint: "), "{printed}");

    // Counts the calls, to compare them with the audit log.
    let mut calls = 0;
    let mut get = async |arguments: &[&str]| {
        calls += 1;
        setup.run(&[&["token", "get"], arguments].concat()).await
    };
    // The broker learns of new callers and grants a moment later.
    let token = eventually("the grant to be known", async || {
        let ran = get(&["acme"]).await;
        (ran.code == Some(0)).then(|| ran.ok())
    })
    .await;
    assert!(is_live(&upstream, &token).await);
    let refused = get(&["typo"]).await.failed();
    assert!(refused.contains("CREDENTIAL_REJECTED"), "{refused}");
    let refused = get(&["other"]).await.failed();
    assert!(refused.contains("NOT_GRANTED"), "{refused}");

    let list: Value =
        serde_json::from_str(&setup.run(&["account", "list", "--json"]).await.ok()).unwrap();
    let states: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|account| (account["name"].as_str().unwrap(), account["state"].as_str().unwrap()))
        .collect();
    assert_eq!(states, [("acme", "fresh"), ("typo", "rejected")]);
    let checked = setup.run(&["check"]).await.ok();
    assert!(checked.contains("ok ") && !checked.contains("FAIL"), "{checked}");

    let rotated = ["account", "rotate", "typo", "--wait", "--reason", "T-1"];
    let ran = setup.run_with_secret(&rotated, "SK.right").await;
    assert!(ran.stderr.contains("is written") && !ran.stderr.contains("already:"), "{ran:?}");
    assert!(ran.ok().starts_with("typo: fresh"));
    let again = setup.run_with_secret(&["account", "rotate", "typo", "--wait"], "SK.right").await;
    assert!(again.stderr.contains("had this API KEY already: nothing was tried"), "{again:?}");
    assert!(again.ok().starts_with("typo: fresh"));
    assert!(is_live(&upstream, &get(&["typo"]).await.ok()).await);

    let generation = |json: String| {
        let token: Value = serde_json::from_str(&json).unwrap();
        token["generation"].as_str().unwrap().parse::<u64>().unwrap()
    };
    let before = generation(get(&["acme", "--json"]).await.ok());
    let mut watch =
        BrokerProcess::start(setup.command(&["token", "get", "acme", "--watch", "--json"]));
    watch.wait_for_stdout("access_token").await;
    setup.run(&["account", "reissue", "acme", "--wait"]).await.ok();
    let reissued = get(&["acme", "--json"]).await.ok();
    assert!(generation(reissued) > before);
    setup.run(&["account", "disable", "acme"]).await.ok();
    let ended = watch.wait_for_stdout("\"ended\"").await;
    assert!(ended.contains("disabled"), "{ended}");
    assert_eq!(ended.matches("access_token").count(), 2, "{ended}");
    let refused = get(&["acme"]).await.failed();
    assert!(refused.contains("ACCOUNT_DISABLED"), "{refused}");

    let events = eventually("all calls in the log", async || {
        let ran = setup.run(&["audit", "tail", "--json", "-n", "1000"]).await.ok();
        let events: Vec<Value> =
            ran.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let made = events.iter().filter(|event| event["event"] == "get_token").count();
        (made == calls).then_some(events)
    })
    .await;
    for event in
        ["started", "account_registered", "account_changed", "token_issued", "issue_failed"]
    {
        assert!(events.iter().any(|it| it["event"] == event), "{event}");
    }
    assert!(events.iter().any(|event| event["detail"]["reason"] == "T-1"));

    let mut second =
        setup.command(&["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"]);
    second.kill_on_drop(true);
    let refused = crate::harness::process::run(second, "").await.failed();
    assert!(refused.contains("is in use by another process"), "{refused}");

    // The watch is still open. It must not delay the stop beyond the drain.
    let signalled = Instant::now();
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
    let took = signalled.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert_eq!(watch.wait().await.code(), Some(1));
    setup.run(&["health"]).await.failed();

    let recorded: i64 =
        sqlx::query_scalar("select count(*) from audit_events where event = 'get_token'")
            .fetch_one(database.pool())
            .await
            .unwrap();
    assert_eq!(usize::try_from(recorded).unwrap(), calls);
    let latest: String =
        sqlx::query_scalar("select event from audit_events order by seq desc limit 1")
            .fetch_one(database.pool())
            .await
            .unwrap();
    assert_eq!(latest, "stopped");
}

#[tokio::test]
async fn a_stop_while_the_database_does_not_answer_is_not_a_failure() {
    let mut setup = BrokerSetup::new(
        "postgresql://127.0.0.1:9/nobody?sslmode=disable",
        "http://127.0.0.1:9/api/1.1",
    )
    .await;
    setup.set("RUST_LOG", "info");
    let mut serve = BrokerProcess::start(setup.command(&["serve"]));
    eventually("a broker that waits", async || {
        serve.stderr().contains("cannot be reached yet").then_some(())
    })
    .await;
    assert_eq!(http(setup.ops, "GET", "/readyz", "").await.0, 503);
    assert_eq!(http(setup.ops, "GET", "/livez", "").await.0, 200);

    serve.signal(Signal::SIGTERM);

    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
}
