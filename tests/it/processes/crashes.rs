//! Crashes of brokers and stopped databases under load: every answer is recorded exactly once.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use nix::sys::signal::Signal;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::harness::{
    broker::{Fixture, TestClient},
    eventually,
    process::BrokerSetup,
};

/// Calls repeatedly until `stop`. Returns how often each generation was received.
async fn count_received(
    client: TestClient,
    received: Arc<AtomicU64>,
    stop: CancellationToken,
) -> BTreeMap<i64, i64> {
    let mut generations = BTreeMap::new();
    while !stop.is_cancelled() {
        match client.get("acme").await {
            Ok(token) => {
                *generations.entry(token.generation.try_into().unwrap()).or_default() += 1;
                received.fetch_add(1, Relaxed);
            }
            // No broker runs at the moment: do not retry in a busy loop.
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
    generations
}

/// Returns how often the audit log says that `caller` received each generation.
async fn count_recorded(pool: &PgPool, caller: &str) -> BTreeMap<i64, i64> {
    let rows: Vec<(i64, i64)> = sqlx::query_as(
        "select generation, sum(count)::bigint from audit_events
         where event = 'get_token' and outcome = 'ok' and caller = $1 group by generation",
    )
    .bind(caller)
    .fetch_all(pool)
    .await
    .unwrap();
    rows.into_iter().collect()
}

/// Returns the chains in which a sequence number is missing or occurs twice.
async fn inconsistent_chains(pool: &PgPool) -> Vec<(String, i64, i64, i64)> {
    sqlx::query_as(
        "select chain, count(*), count(distinct seq), max(seq) - min(seq) + 1 from audit_events
         group by chain having count(*) <> max(seq) - min(seq) + 1 or count(*) <> count(distinct seq)",
    )
    .fetch_all(pool)
    .await
    .unwrap()
}

#[tokio::test]
async fn every_token_received_from_a_broker_that_is_killed_repeatedly_is_recorded_once() {
    const CALLERS: [&str; 2] = ["one", "other"];
    const KILLS: u64 = 3;
    let fixture = Fixture::new().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let bearers = [
        fixture.add_caller(CALLERS[0], &["*"]).await,
        fixture.add_caller(CALLERS[1], &["*"]).await,
    ];
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let mut serve = setup.serve().await;

    let (received, stop) = (Arc::new(AtomicU64::new(0)), CancellationToken::new());
    let mut clients = vec![];
    for bearer in &bearers {
        let client = TestClient::connect(&setup.endpoint(), bearer).await;
        clients.push(tokio::spawn(count_received(client, received.clone(), stop.clone())));
    }
    for kill in 1..=KILLS {
        let enough = received.load(Relaxed) + 200;
        eventually("answers", async || (received.load(Relaxed) >= enough).then_some(())).await;
        if kill == 2 {
            // Make the calls receive tokens of more than one generation.
            fixture.database.sql("update accounts set reissue_requested_at = now()").await;
        }
        serve.kill().await;
        serve = setup.serve().await;
    }
    let enough = received.load(Relaxed) + 200;
    eventually("answers", async || (received.load(Relaxed) >= enough).then_some(())).await;
    stop.cancel();
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());

    for (caller, client) in CALLERS.into_iter().zip(clients) {
        let (received, recorded) =
            (client.await.unwrap(), count_recorded(fixture.database.pool(), caller).await);
        for (generation, times) in &received {
            let known = recorded.get(generation).copied().unwrap_or_default();
            assert!(known >= *times, "{caller} {generation}: {known} of {times} are recorded");
        }
        // For each call in progress, a killed broker may have recorded an answer that never arrived.
        let sum = |counts: &BTreeMap<i64, i64>| counts.values().sum::<i64>().unsigned_abs();
        assert!(sum(&recorded) <= sum(&received) + KILLS + 1, "{received:?} {recorded:?}");
    }
    assert_eq!(inconsistent_chains(fixture.database.pool()).await, []);
}

#[cfg(feature = "embedded-postgres")]
#[tokio::test]
async fn while_postgres_is_stopped_tokens_are_served_and_their_records_are_delivered_later() {
    use token_broker::{
        dev::{
            postgres::DATABASE,
            simulator::{Simulator, SimulatorOptions},
        },
        store::Database,
    };

    use crate::harness::{database::start_embedded_postgres, http::http, process::PausedProcesses};

    let postgres = start_embedded_postgres().await;
    let url = postgres.url(DATABASE);
    let upstream = Simulator::start_on_loopback(SimulatorOptions::default()).await.unwrap();
    upstream.add_account("id-1", "SK.1");
    let mut setup = BrokerSetup::new(&url, &upstream.base_url()).await;
    setup.run(&["migrate"]).await.ok();
    let mut serve = setup.serve().await;
    let added = ["account", "add", "acme", "--client-id", "id-1", "--wait"];
    setup.run_with_secret(&added, "SK.1").await.ok();
    let bearer = setup.run(&["caller", "add", "demo", "--bearer"]).await.ok();
    setup.run(&["caller", "grant", "demo", "*"]).await.ok();
    setup.set_from_file("TOKEN_BROKER_BEARER", &bearer);
    let bearer = token_broker::crypto::bearer::Bearer::parse(&bearer).unwrap();
    let client = TestClient::connect(&setup.endpoint(), &bearer).await;
    let first = eventually("the grant", async || client.get("acme").await.ok()).await;

    let paused = PausedProcesses::pause(postgres.pid());
    // A call that waited for the database would exceed its deadline of 5 s. Call until the broker itself
    // reports that the database does not answer.
    let mut calls = 1;
    eventually("a broker that has noticed", async || {
        for _ in 0..20 {
            assert_eq!(client.get("acme").await.unwrap().access_token, first.access_token);
            calls += 1;
        }
        let (status, body) = http(setup.ops, "GET", "/readyz", "").await;
        assert_eq!(status, 200, "{body}");
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        body.to_string().contains("does not answer").then_some(())
    })
    .await;
    drop(paused);

    let pool = Database::new(&url, "test").unwrap().pool(1);
    eventually("all records", async || {
        let recorded = count_recorded(&pool, "demo").await.values().sum::<i64>();
        assert!(recorded <= calls, "{recorded} records of {calls} calls");
        (recorded == calls).then_some(())
    })
    .await;
    assert_eq!(inconsistent_chains(&pool).await, []);
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
    assert_eq!(upstream.requests(), 1);
    pool.close().await;
    postgres.stop().await;
}
