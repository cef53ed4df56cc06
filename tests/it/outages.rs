//! The broker while the database is unreachable or does not answer, and after it answers again.

use std::{net::SocketAddr, time::Duration};

use token_broker::{
    api::proto::{GetTokenRequest, token_service_server::SERVICE_NAME},
    app::AppConfig,
    config::DatabaseUrl,
    crypto::{KeyKind, Keyring},
    dev::simulator::Faults,
    domain::clock::{Clock, ManualClock},
};
use tonic::{Code, transport::Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt;

use crate::harness::{
    TEST_TIMEOUT,
    broker::{Fixture, TestBroker, code_and_reason},
    database_proxy::DatabaseProxy,
    eventually,
    http::http,
};

impl Fixture {
    /// Stores a heartbeat of another replica, which stays recent for the whole test.
    async fn add_another_replica(&self) {
        self.database
            .sql(
                "insert into instances (id, replica, version, key_ids, started_at, heartbeat_at)
                 values ('i-other', 1, '0', '{}', now(), now() + interval '1 hour')",
            )
            .await;
    }

    /// Returns the configuration of a broker that reaches its database through `proxy`.
    fn config_through(&self, proxy: &DatabaseProxy) -> AppConfig {
        let mut config = self.config();
        config.settings.database_url = DatabaseUrl::new(proxy.url()).unwrap();
        config
    }
}

#[tokio::test]
async fn a_database_that_stopped_answering_is_used_again_once_it_answers() {
    let fixture = Fixture::new().await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    // With a pool of one connection, a single step that never returns it would block all others.
    let broker = fixture
        .start_with(AppConfig { pool_connections: 1, ..fixture.config_through(&proxy) })
        .await;
    let client = broker.client(&bearer).await;

    proxy.blackhole();
    until_readiness_says(&broker, "does not answer").await;
    proxy.forward();

    fixture.add_account("acme", "id-1", "SK.1").await;
    eventually("a token", async || client.get("acme").await.ok()).await;
    broker.stop().await;
}

/// Starts a broker whose connections fall silent while a statement of the start waits for a lock of the table `locked`.
/// New connections work.
async fn start_while_connections_fall_silent(locked: &str) {
    let fixture = Fixture::new().await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    let mut lock = fixture.database.pool().begin().await.unwrap();
    let statement = format!("lock table {locked} in access exclusive mode");
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut *lock).await.unwrap();
    let silence = async {
        eventually("a statement that waits", async || {
            let waiting: i64 = sqlx::query_scalar(
                "select count(*) from pg_locks l join pg_stat_activity a using (pid)
                 where not l.granted and a.datname = current_database()",
            )
            .fetch_one(fixture.database.pool())
            .await
            .unwrap();
            (waiting > 0).then_some(())
        })
        .await;
        proxy.blackhole();
        proxy.forward();
        lock.rollback().await.unwrap();
    };
    let start = fixture.start_with(fixture.config_through(&proxy));
    let both = Box::pin(async { tokio::join!(start, silence) });
    let started = tokio::time::timeout(TEST_TIMEOUT, both).await;
    started.unwrap_or_else(|_| panic!("{locked}: the start hangs")).0.stop().await;
}

/// A server that stops answering in the middle of a start delays the start, and does not hold it up for ever.
#[tokio::test]
async fn a_start_goes_on_over_new_connections_when_the_old_ones_fall_silent() {
    tokio::join!(
        start_while_connections_fall_silent("_sqlx_migrations"),
        start_while_connections_fall_silent("accounts"),
    );
}

/// Waits until the answer of `/readyz` contains `text`.
pub(crate) async fn until_readiness_says(broker: &TestBroker, text: &str) {
    eventually(&format!("`{text}` in readiness"), async || {
        let (_, body) = http(broker.app.ops_address, "GET", "/readyz", "").await;
        body.contains(text).then_some(())
    })
    .await;
}

/// Returns the token service's status in gRPC's health service.
pub(crate) async fn health(grpc: SocketAddr) -> ServingStatus {
    let channel = Endpoint::from_shared(format!("http://{grpc}")).unwrap().connect().await.unwrap();
    let mut client = HealthClient::new(channel);
    let request = HealthCheckRequest { service: SERVICE_NAME.into() };
    client.check(request).await.unwrap().into_inner().status()
}

#[tokio::test]
async fn a_full_journal_refuses_calls_is_shown_in_health_and_recovers_once_delivered() {
    let fixture = Fixture::new().await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let mut config = fixture.config_through(&proxy);
    config.journal_segment_bytes = 4 << 10;
    config.settings.journal_max_bytes = 32 << 10;
    let broker = fixture.start_with(config).await;
    let (grpc, ops) = (broker.app.grpc_address, broker.app.ops_address);
    let client = broker.client(&bearer).await;
    client.get("acme").await.unwrap();
    assert_eq!(health(grpc).await, ServingStatus::Serving);

    // Without the database no record can be delivered, and undelivered records must not be deleted.
    proxy.disconnect();
    let mut answered = 0;
    let refused = loop {
        match client.get("acme").await {
            Ok(_) => answered += 1,
            Err(refused) => break refused,
        }
        assert!(answered < 1_000, "the journal never filled");
    };
    assert_eq!(code_and_reason(&refused), "Unavailable AUDIT_UNAVAILABLE");
    assert_eq!(http(ops, "GET", "/readyz", "").await.0, 503);
    eventually("the health NOT_SERVING", async || {
        (health(grpc).await == ServingStatus::NotServing).then_some(())
    })
    .await;

    proxy.forward();
    eventually("a token again", async || client.get("acme").await.ok()).await;
    eventually("the health SERVING", async || {
        (health(grpc).await == ServingStatus::Serving).then_some(())
    })
    .await;
    broker.stop().await;
    let recorded = fixture.audit_events("event = 'get_token' and outcome = 'ok'").await.len();
    assert!(recorded >= answered + 2, "{recorded} recorded of {answered} answered");
}

#[tokio::test]
async fn a_partitioned_replica_serves_tokens_to_their_end_and_then_refuses_at_once() {
    let manual = ManualClock::new(Clock::System.now());
    let fixture = Fixture::with(Clock::Manual(manual.clone()), Faults::default()).await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.add_another_replica().await;
    let broker = fixture.start_with(fixture.config_through(&proxy)).await;
    let client = broker.client(&bearer).await;
    let token = client.get("acme").await.unwrap();

    proxy.disconnect();
    until_readiness_says(&broker, "serving what is known").await;
    // The other replica may have issued. A token that is issued here would end its token.
    manual.advance(Duration::from_mins(59));
    assert_eq!(client.get("acme").await.unwrap().generation, token.generation);
    manual.advance(Duration::from_mins(1));
    let refused = client.get("acme").await.unwrap_err();
    assert_eq!(code_and_reason(&refused), "Unavailable DATABASE_UNAVAILABLE");
    assert!(refused.get_error_details().retry_info().is_some());
    assert_eq!(fixture.upstream.requests(), 1);

    proxy.forward();
    until_readiness_says(&broker, "\"answers\"").await;
    manual.advance(Duration::from_secs(1));
    let next = client.get("acme").await.unwrap();
    assert!(next.generation > token.generation);
    assert_eq!(fixture.upstream.requests(), 2);
    broker.stop().await;
}

/// Nothing that was read over a lost session tells what happened after it, so all access is read anew before the
/// database counts as connected. The triggers announce none of these changes, as none is announced whose transaction
/// has a number that the broker has seen before a crash.
#[tokio::test]
async fn access_is_read_anew_before_a_database_that_was_lost_counts_as_connected() {
    let fixture = Fixture::new().await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start_with(fixture.config_through(&proxy)).await;
    let client = broker.client(&bearer).await;
    // Everything is also read from time to time, which may hide once that it was not read anew.
    for round in 0..4 {
        for (what, restore, code) in [
            ("callers set enabled = false", "callers set enabled = true", Code::Unauthenticated),
            (
                "accounts set enabled = false",
                "accounts set enabled = true",
                Code::FailedPrecondition,
            ),
            ("grants set rights = '{list}'", "grants set rights = '{get}'", Code::PermissionDenied),
        ] {
            eventually("a token", async || client.get("acme").await.ok()).await;
            proxy.disconnect();
            until_readiness_says(&broker, "issuing goes on without it").await;
            fixture.database.sql_past_triggers(&format!("update {what}")).await;
            proxy.forward();
            until_readiness_says(&broker, "\"answers\"").await;
            let answer = client.get("acme").await.map_err(|refused| refused.code());
            assert_eq!(answer.unwrap_err(), code, "{what}, round {round}");
            fixture.database.sql(&format!("update {restore}")).await;
        }
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_waiting_call_is_refused_at_once_when_the_database_is_lost() {
    let fixture = Fixture::new().await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.add_another_replica().await;
    let broker = fixture.start_with(fixture.config_through(&proxy)).await;
    let client = broker.client(&bearer).await;
    let token = client.get("acme").await.unwrap();

    // No newer token is due, so only the outage can end this wait before its deadline.
    let waiting = tokio::spawn({
        let client = client.clone();
        async move {
            let newer = GetTokenRequest {
                account: "acme".into(),
                newer_than_generation: token.generation,
                ..Default::default()
            };
            client.get_with(newer).await
        }
    });
    proxy.disconnect();
    let refused = waiting.await.unwrap().unwrap_err();
    assert_eq!(code_and_reason(&refused), "Unavailable DATABASE_UNAVAILABLE");
    broker.stop().await;
}

/// Returns the generation of the stored token.
async fn stored_generation(fixture: &Fixture) -> u64 {
    let generation: i64 = sqlx::query_scalar("select generation from tokens")
        .fetch_one(fixture.database.pool())
        .await
        .unwrap();
    generation.unsigned_abs()
}

#[tokio::test]
async fn a_sole_replica_keeps_tokens_fresh_without_the_database_and_stores_them_later() {
    let manual = ManualClock::new(Clock::System.now());
    let fixture = Fixture::with(Clock::Manual(manual.clone()), Faults::default()).await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start_with(fixture.config_through(&proxy)).await;
    let client = broker.client(&bearer).await;
    let first = client.get("acme").await.unwrap();
    let mut calls = 1;

    proxy.disconnect();
    until_readiness_says(&broker, "issuing goes on without it").await;
    let mut served = first.clone();
    for life in 1..=3 {
        // The refresh is due but not mandatory, so the sole replica still waits for the database.
        manual.advance(Duration::from_mins(50));
        assert_eq!(client.get("acme").await.unwrap().generation, served.generation);
        manual.advance(Duration::from_secs(9 * 60 + 30));
        let next = eventually("the next token", async || {
            calls += 1;
            let token = client.get("acme").await.unwrap();
            (token.generation > served.generation).then_some(token)
        })
        .await;
        calls += 1;
        assert!(fixture.upstream.is_live(&next.access_token));
        assert_eq!(fixture.upstream.requests(), 1 + life);
        served = next;
    }
    assert_eq!(stored_generation(&fixture).await, first.generation);

    proxy.forward();
    eventually("the pending token is stored", async || {
        (stored_generation(&fixture).await == served.generation).then_some(())
    })
    .await;
    broker.stop().await;
    assert_eq!(fixture.audit_events("event = 'token_issued'").await.len(), 4);
    assert_eq!(
        fixture.audit_events("event = 'token_issued' and detail ? 'database'").await.len(),
        3
    );
    assert_eq!(fixture.audit_events("event = 'get_token'").await.len(), calls);

    let broker = fixture.start().await;
    let after = broker.client(&bearer).await.get("acme").await.unwrap();
    assert_eq!(after.access_token, served.access_token);
    assert_eq!(fixture.upstream.requests(), 4);
    broker.stop().await;
}

/// What waits to be stored while keys are rotated needs the old key no longer than the rest.
#[tokio::test]
async fn a_token_that_was_issued_before_a_key_was_promoted_is_stored_with_the_new_one() {
    let manual = ManualClock::new(Clock::System.now());
    let mut fixture = Fixture::with(Clock::Manual(manual.clone()), Faults::default()).await;
    let directory = tempfile::TempDir::new().unwrap();
    let file = directory.path().join("keyring");
    Keyring::create_file(&file, fixture.clock.now()).unwrap();
    fixture.keyring = Keyring::load(&file).unwrap().into();
    fixture.database.publish(&fixture.keyring.intake_public()).await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let config = AppConfig { keyring_file: Some(file.clone()), ..fixture.config_through(&proxy) };
    let broker = fixture.start_with(config).await;
    let client = broker.client(&bearer).await;
    let first = client.get("acme").await.unwrap();

    proxy.disconnect();
    until_readiness_says(&broker, "issuing goes on without it").await;
    manual.advance(Duration::from_mins(59) + Duration::from_secs(30));
    let next = eventually("the next token", async || {
        let token = client.get("acme").await.unwrap();
        (token.generation > first.generation).then_some(token)
    })
    .await;
    let (new, _) = Keyring::add_to_file(&file, KeyKind::Sealing, fixture.clock.now()).unwrap();
    Keyring::promote_in_file(&file, &new).unwrap();
    broker.app.reload().await;
    proxy.forward();
    eventually("the pending token is stored", async || {
        (stored_generation(&fixture).await == next.generation).then_some(())
    })
    .await;
    let sealed: Vec<u8> = sqlx::query_scalar("select sealed_token from tokens")
        .fetch_one(fixture.database.pool())
        .await
        .unwrap();
    assert_eq!(Keyring::sealed_with(&sealed), Ok(new));
    broker.stop().await;
}

#[tokio::test]
async fn a_token_that_was_issued_without_the_database_and_lost_is_replaced_at_the_next_start() {
    let manual = ManualClock::new(Clock::System.now());
    let fixture = Fixture::with(Clock::Manual(manual.clone()), Faults::default()).await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start_with(fixture.config_through(&proxy)).await;
    let client = broker.client(&bearer).await;
    let stored = client.get("acme").await.unwrap();

    proxy.disconnect();
    until_readiness_says(&broker, "issuing goes on without it").await;
    manual.advance(Duration::from_secs(59 * 60 + 30));
    let lost = eventually("the next token", async || {
        let token = client.get("acme").await.unwrap();
        (token.generation > stored.generation).then_some(token)
    })
    .await;
    broker.stop().await;
    assert!(!fixture.upstream.is_live(&stored.access_token));
    // By its times alone, the stored token would count as live.
    fixture.database.sql("update tokens set expires_at = expires_at + interval '10 hours'").await;

    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    manual.advance(Duration::from_secs(1));
    let next = eventually("a live token", async || {
        let token = client.get("acme").await.unwrap();
        fixture.upstream.is_live(&token.access_token).then_some(token)
    })
    .await;
    assert_ne!(next.access_token, lost.access_token);
    broker.stop().await;
}

#[tokio::test]
async fn a_token_that_was_issued_as_the_database_was_lost_is_served_and_stored_later() {
    let fixture = Fixture::new().await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_another_replica().await;
    let broker = fixture.start_with(fixture.config_through(&proxy)).await;
    let client = broker.client(&bearer).await;
    let latency = Duration::from_secs(2);
    fixture.upstream.set_faults(Faults { latency, ..Faults::default() });
    fixture.add_account("acme", "id-1", "SK.1").await;
    eventually("a call under way", async || (fixture.upstream.requests() == 1).then_some(())).await;
    proxy.disconnect();
    until_readiness_says(&broker, "serving what is known").await;

    let token = eventually("the token", async || client.get("acme").await.ok()).await;
    assert_eq!(fixture.upstream.live_token("id-1"), Some(token.access_token));
    proxy.forward();
    eventually("the token is stored", async || {
        let stored: Option<i64> = sqlx::query_scalar("select generation from tokens")
            .fetch_optional(fixture.database.pool())
            .await
            .unwrap();
        (stored.map(i64::unsigned_abs) == Some(token.generation)).then_some(())
    })
    .await;
    fixture.wait_for_state("acme", "fresh").await;
    assert_eq!(fixture.upstream.requests(), 1);
    broker.stop().await;
}
