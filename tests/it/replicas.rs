//! What replicas know of each other: a replica counts as the only one only if no other one can serve or issue.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use tempfile::TempDir;
use token_broker::{
    app::AppConfig,
    config::DatabaseUrl,
    dev::simulator::Faults,
    domain::clock::{Clock, ManualClock},
    store::instances::{self, EarlierProcess, Heartbeat},
};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    harness::{
        broker::{Fixture, code_and_reason},
        database::TestDatabase,
        database_proxy::DatabaseProxy,
        eventually,
        http::http,
    },
    outages::{health, until_readiness_says},
};

impl Fixture {
    /// Stores a replica that is alive for the whole test, and knows of no other one.
    async fn add_unaware_replica(&self, heartbeat_at: &str) {
        self.database
            .sql(&format!(
                "insert into instances (id, start_nonce, replica, version, key_ids, started_at, heartbeat_at)
                 values ('i-other', 'other', 1, '0', '{{}}', now(), {heartbeat_at})"
            ))
            .await;
    }

    fn second_config(&self, proxy: &DatabaseProxy, home: &TempDir) -> AppConfig {
        let mut config = self.config();
        config.settings.database_url = DatabaseUrl::new(proxy.url()).unwrap();
        config.settings.state_dir = home.path().to_owned();
        config
    }
}

#[tokio::test]
async fn a_replica_knows_of_another_one_as_soon_as_that_one_serves() {
    let manual = ManualClock::new(Clock::System.now());
    let fixture = Fixture::with(Clock::Manual(manual.clone()), Faults::default()).await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    let homes = [TempDir::new().unwrap(), TempDir::new().unwrap()];
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let first = fixture.start_with(fixture.second_config(&proxy, &homes[0])).await;
    let token = first.client(&bearer).await.get("acme").await.unwrap();

    let second = fixture.start_with(fixture.second_config(&proxy, &homes[1])).await;
    // Postgres stops at the moment at which the second replica is ready.
    proxy.disconnect();
    for broker in [&first, &second] {
        until_readiness_says(broker, "serving what is known").await;
    }
    // Neither of the two issues, so the tokens of both stay live to their end.
    manual.advance(Duration::from_secs(59 * 60 + 30));
    for broker in [&first, &second] {
        let served = broker.client(&bearer).await.get("acme").await.unwrap();
        assert_eq!(served.access_token, token.access_token);
    }
    assert!(fixture.upstream.is_live(&token.access_token));
    assert_eq!(fixture.upstream.requests(), 1);

    // A replica that stops is no longer counted.
    proxy.forward();
    until_readiness_says(&second, "\"answers\"").await;
    second.stop().await;
    eventually("heartbeats after the second one's end", async || {
        let later: bool = sqlx::query_scalar(
            "select max(heartbeat_at) filter (where stopped_at is null)
                 > max(stopped_at) + interval '1500 milliseconds' from instances",
        )
        .fetch_one(fixture.database.pool())
        .await
        .unwrap();
        later.then_some(())
    })
    .await;
    proxy.disconnect();
    until_readiness_says(&first, "issuing goes on without it").await;
    first.stop().await;
}

#[tokio::test]
async fn a_replica_does_not_serve_before_all_that_are_alive_know_of_it() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.add_unaware_replica("now() + interval '1 hour'").await;
    let acknowledged = AtomicBool::new(false);
    let starting = async {
        let broker = fixture.start().await;
        assert!(acknowledged.load(Relaxed), "it serves although the other one does not know of it");
        broker
    };
    let acknowledging = async {
        eventually("its announcement", async || {
            let announced: i64 = sqlx::query_scalar(
                "select count(*) from instances where id <> 'i-other' and 'other' = any (seen)",
            )
            .fetch_one(fixture.database.pool())
            .await
            .unwrap();
            (announced == 1).then_some(())
        })
        .await;
        // It heartbeats, and goes on waiting.
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(fixture.upstream.requests(), 0);
        acknowledged.store(true, Relaxed);
        fixture
            .database
            .sql(
                "update instances set seen =
                     array(select start_nonce from instances where id <> 'i-other')
                 where id = 'i-other'",
            )
            .await;
    };
    let (broker, ()) = tokio::join!(starting, acknowledging);
    broker.client(&bearer).await.get("acme").await.unwrap();
    broker.stop().await;
}

/// Part of the promise that two processes never act under one identity: of those that read the same row of an earlier
/// process, one takes it over, and the others see that it has changed.
#[tokio::test]
async fn a_row_that_has_changed_since_it_was_read_is_not_taken_over() {
    let database = TestDatabase::new().await;
    let pool = database.pool();
    let announce = async |start: &str, earlier: Option<&EarlierProcess>| {
        let heartbeat = Heartbeat {
            instance: "i-1",
            start,
            replica: 1,
            version: "1",
            key_ids: &[],
            used_key_ids: &[],
            started_at: Clock::System.now(),
            chain: "chain",
            seq: 0,
            seen: &[],
        };
        let taken = instances::announce(pool, &heartbeat, earlier).await.unwrap();
        let now = instances::earlier_process(pool, "i-1").await.unwrap().unwrap();
        assert_eq!(now.start.as_deref() == Some(start), taken, "{start}");
        (taken, now)
    };
    let (taken, first) = announce("first", None).await;
    assert!(taken);
    assert!(!announce("also new", None).await.0, "another one was there first");
    let (taken, second) = announce("second", Some(&first)).await;
    assert!(taken);
    assert!(!announce("as late", Some(&first)).await.0, "another one has taken it over");
    database.sql("update instances set heartbeat_at = heartbeat_at + interval '1 second'").await;
    assert!(!announce("third", Some(&second)).await.0, "it is alive");
}

#[tokio::test]
async fn a_replica_that_was_killed_delays_no_start_but_nothing_is_served_without_the_database() {
    let fixture = Fixture::new().await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    let home = TempDir::new().unwrap();
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    // It may have been killed, or it may be paused and count as the only one when it goes on.
    fixture.add_unaware_replica("now()").await;
    let broker = fixture.start_with(fixture.second_config(&proxy, &home)).await;
    let client = broker.client(&bearer).await;
    client.get("acme").await.unwrap();

    proxy.disconnect();
    until_readiness_says(&broker, "nothing is served").await;
    // Another replica serves, so callers should be sent there.
    assert_eq!(http(broker.app.ops_address, "GET", "/readyz", "").await.0, 503);
    eventually("health", async || {
        (health(broker.app.grpc_address).await == ServingStatus::NotServing).then_some(())
    })
    .await;
    let refused = client.get("acme").await.unwrap_err();
    assert_eq!(code_and_reason(&refused), "Unavailable DATABASE_UNAVAILABLE");

    proxy.forward();
    until_readiness_says(&broker, "\"answers\"").await;
    assert_eq!(http(broker.app.ops_address, "GET", "/readyz", "").await.0, 200);
    eventually("health", async || {
        (health(broker.app.grpc_address).await == ServingStatus::Serving).then_some(())
    })
    .await;
    client.get("acme").await.unwrap();
    assert_eq!(fixture.upstream.requests(), 1);
    broker.stop().await;
}

/// The login of the broker may write any time into `instances`.
#[tokio::test]
async fn a_row_with_a_time_that_cannot_be_read_stops_no_replica_and_no_start() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let insert = async |id: &str, heartbeat_at: &str| {
        let statement = format!(
            "insert into instances (id, start_nonce, replica, version, key_ids, started_at, heartbeat_at,
                 announced_at, seen)
             values ('{id}', '{id}', 1, '0', '{{NULL}}', {heartbeat_at}, {heartbeat_at}, {heartbeat_at},
                 '{{NULL}}')"
        );
        fixture.database.sql(&statement).await;
    };
    for (id, heartbeat_at) in [
        ("i-later", "'infinity'"),
        ("i-last", "'294276-01-01Z'"),
        ("i-first", "'-infinity'"),
        ("i-gone", "now() - interval '10 minutes'"),
    ] {
        insert(id, heartbeat_at).await;
    }
    let broker = fixture.start().await;
    broker.client(&bearer).await.get("acme").await.unwrap();

    insert("i-while-it-runs", "'infinity'").await;
    let inserted: String =
        sqlx::query_scalar("select now()::text").fetch_one(fixture.database.pool()).await.unwrap();
    eventually("later heartbeats", async || {
        let later: bool = sqlx::query_scalar(
            "select coalesce(max(heartbeat_at) > $1::timestamptz + interval '3 seconds', false) from instances
             where id not in ('i-later', 'i-last', 'i-while-it-runs')",
        )
        .bind(&inserted)
        .fetch_one(fixture.database.pool())
        .await
        .unwrap();
        later.then_some(())
    })
    .await;
    broker.client(&bearer).await.get("acme").await.unwrap();
    broker.stop().await;

    // The row of this instance, of a process that ended and of an unknown one.
    for start in ["start_nonce", "'unknown'"] {
        let statement = format!(
            "update instances set heartbeat_at = 'infinity', stopped_at = null, start_nonce = {start}
             where id not in ('i-later', 'i-last', 'i-first', 'i-gone', 'i-while-it-runs')"
        );
        fixture.database.sql(&statement).await;
        let broker = fixture.start().await;
        broker.client(&bearer).await.get("acme").await.unwrap();
        broker.stop().await;
    }
}

#[tokio::test]
async fn replicas_with_the_same_number_issue_under_different_ones() {
    let fixture = Fixture::new().await;
    let first = fixture.start().await;
    first.stop().await;
    fixture
        .database
        .sql(
            "insert into instances (id, start_nonce, replica, version, key_ids, started_at, heartbeat_at, seen)
             select 'i-other', 'other', replica, '0', '{}', now(), now(), '{}' from instances",
        )
        .await;
    let again = fixture.start().await;
    let numbers: i64 = sqlx::query_scalar("select count(distinct replica) from instances")
        .fetch_one(fixture.database.pool())
        .await
        .unwrap();
    assert_eq!(numbers, 2);
    again.stop().await;
}
