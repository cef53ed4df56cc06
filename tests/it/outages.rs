//! The database away, silent, and back.

use token_broker::{app::Plan, store::Database};

use crate::harness::{broker::World, eventually, http::http, proxy::Proxy};

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
