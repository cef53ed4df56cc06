//! Postgres crashes and uses transaction numbers again: the broker reloads everything, and misses nothing.

use std::path::Path;

use nix::{sys::signal::Signal, unistd::Pid};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use token_broker::{
    crypto::bearer::Bearer,
    dev::{
        postgres::{DATABASE, DataLocation, EmbeddedPostgres},
        simulator::{Simulator, SimulatorOptions},
    },
    store::Database,
};
use tonic::Code;

use crate::harness::{
    broker::TestClient,
    eventually,
    process::{BrokerSetup, shared_directory},
};

/// Number of crashes.
const CRASHES: usize = 3;
/// Number of transactions that are rolled back before each crash, whose numbers are used again after it.
const ROLLED_BACK: usize = 200;
const PROGRAM: &str = env!("CARGO_BIN_EXE_token-broker");

/// Uses transaction numbers in another database, and leaves nothing that Postgres would flush to its log.
async fn use_up_transaction_numbers(url: &str) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    for _ in 0..ROLLED_BACK {
        let roll_back = "begin; select pg_current_xact_id(); rollback";
        sqlx::raw_sql(roll_back).execute(&mut connection).await.unwrap();
    }
    connection.close().await.unwrap();
}

/// After any lost connection everything is read anew: a change whose transaction has a number that the broker
/// has seen before the crash is followed, and the broker goes on.
#[tokio::test]
async fn a_crash_of_postgres_that_reuses_transaction_numbers_costs_a_reload_and_hides_no_revocation()
 {
    let directory = shared_directory();
    let location = DataLocation::Persistent(directory.path().join("pg"));
    let program = Path::new(PROGRAM);
    let mut postgres = EmbeddedPostgres::start(location.clone(), program).await.unwrap();
    let url = postgres.url(DATABASE);
    let upstream = Simulator::start_on_loopback(SimulatorOptions::default()).await.unwrap();
    upstream.add_account("id-1", "SK.1");
    let setup = BrokerSetup::new(&url, &upstream.base_url()).await;
    setup.run(&["migrate"]).await.ok();
    let mut serve = setup.serve().await;
    let added = ["account", "add", "acme", "--client-id", "id-1", "--wait"];
    setup.run_with_secret(&added, "SK.1").await.ok();
    let mut clients = vec![];
    for number in 0..=CRASHES {
        let name = format!("caller-{number}");
        let bearer = setup.run(&["caller", "add", &name, "--bearer"]).await.ok();
        setup.run(&["caller", "grant", &name, "*"]).await.ok();
        let client = TestClient::connect(&setup.endpoint(), &Bearer::parse(&bearer).unwrap()).await;
        eventually("the grant", async || client.get("acme").await.ok()).await;
        clients.push(client);
    }

    for number in 0..CRASHES {
        use_up_transaction_numbers(&postgres.url("postgres")).await;
        // The broker polls after that, so that its snapshot covers these numbers.
        tokio::time::sleep(std::time::Duration::from_millis(1_200)).await;
        let pid = Pid::from_raw(postgres.pid().try_into().unwrap());
        nix::sys::signal::kill(pid, Signal::SIGQUIT).unwrap();
        drop(postgres);
        postgres = eventually("postgres again", async || {
            EmbeddedPostgres::start(location.clone(), program).await.ok()
        })
        .await;
        let pool = Database::new(&url, "admin").unwrap().pool(1);
        let disable = format!("update callers set enabled = false where name = 'caller-{number}'");
        eventually("the revocation", async || {
            sqlx::query(AssertSqlSafe(disable.clone())).execute(&pool).await.ok()
        })
        .await;
        pool.close().await;
        eventually("a refusal", async || {
            let refused = clients[number].get("acme").await.err()?;
            (refused.code() == Code::Unauthenticated).then_some(())
        })
        .await;
        clients[CRASHES].get("acme").await.unwrap();
    }
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
    postgres.stop().await;
}
