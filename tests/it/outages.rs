//! The database away, silent, and back.

use std::net::SocketAddr;

use token_broker::{
    app::Plan, audit::journal::JournalSettings, proto::token_service_server::SERVICE_NAME,
    store::Database,
};
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::harness::{
    broker::{World, refusal},
    eventually,
    http::http,
    proxy::Proxy,
};

impl World {
    /// A broker that reaches its database by `proxy`.
    fn plan_by(&self, proxy: &Proxy) -> Plan {
        Plan { database: Database::new(proxy.url(), "token-broker").unwrap(), ..self.plan() }
    }
}

#[tokio::test]
async fn a_database_that_fell_silent_is_used_again_once_it_answers() {
    let world = World::new().await;
    let proxy = Proxy::to(world.database.url()).await;
    let bearer = world.caller("demo", &["*"]).await;
    // One connection: a single step that never gave its own back would end all use of the database.
    let broker = world.start_with(Plan { connections: 1, ..world.plan_by(&proxy) }).await;
    let client = broker.client(&bearer).await;

    proxy.fall_silent();
    eventually("the database is not heard of", async || {
        let (_, body) = http(broker.app.ops_address, "GET", "/readyz", "").await;
        body.contains("not heard of").then_some(())
    })
    .await;
    proxy.open();

    world.register("acme", "id-1", "SK.1").await;
    eventually("a token", async || client.get("acme").await.ok()).await;
    broker.stop().await;
}

/// What gRPC's health service says of the token service.
async fn health(grpc: SocketAddr) -> ServingStatus {
    let channel = Endpoint::from_shared(format!("http://{grpc}")).unwrap().connect().await.unwrap();
    let mut client = HealthClient::new(channel);
    let asked = HealthCheckRequest { service: SERVICE_NAME.into() };
    client.check(asked).await.unwrap().into_inner().status()
}

#[tokio::test]
async fn a_full_journal_fails_closed_shows_in_health_and_recovers_once_it_is_delivered() {
    let world = World::new().await;
    let proxy = Proxy::to(world.database.url()).await;
    let bearer = world.caller("demo", &["*"]).await;
    world.register("acme", "id-1", "SK.1").await;
    let mut plan = world.plan_by(&proxy);
    plan.journal = JournalSettings { segment_bytes: 4 << 10, max_bytes: 32 << 10, ..plan.journal };
    let broker = world.start_with(plan).await;
    let (grpc, ops) = (broker.app.grpc_address, broker.app.ops_address);
    let client = broker.client(&bearer).await;
    client.get("acme").await.unwrap();
    assert_eq!(health(grpc).await, ServingStatus::Serving);

    // Nothing is delivered any more, so nothing may be deleted.
    proxy.cut();
    let mut answered = 0;
    let refused = loop {
        match client.get("acme").await {
            Ok(_) => answered += 1,
            Err(refused) => break refused,
        }
        assert!(answered < 1_000, "the journal never filled");
    };
    assert_eq!(refusal(&refused), "Unavailable AUDIT_UNAVAILABLE");
    assert_eq!(http(ops, "GET", "/readyz", "").await.0, 503);
    eventually("health that says it", async || {
        (health(grpc).await == ServingStatus::NotServing).then_some(())
    })
    .await;

    proxy.open();
    eventually("a token again", async || client.get("acme").await.ok()).await;
    eventually("health that says it", async || {
        (health(grpc).await == ServingStatus::Serving).then_some(())
    })
    .await;
    broker.stop().await;
    let told = world.audit("event = 'get_token' and outcome = 'ok'").await.len();
    assert!(told >= answered + 2, "{told} recorded of {answered} answered");
}
