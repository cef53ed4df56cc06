//! Broker and Postgres are killed, suspended and stopped under load, in an order that a seed determines:
//! every received token is recorded, and every record is delivered once.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::Duration,
};

use nix::{sys::signal::Signal, unistd::Pid};
use sqlx::PgPool;
use token_broker::{
    audit::{chain::StoredEvent, journal::Archive},
    crypto::bearer::Bearer,
    dev::{
        postgres::{DATABASE, DataLocation, EmbeddedPostgres},
        simulator::{Simulator, SimulatorOptions},
    },
    store::{
        Database,
        audit::{EventFilter, events_after},
    },
};
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::harness::{
    broker::TestClient,
    eventually,
    process::{BrokerProcess, BrokerSetup, PausedProcesses, shared_directory},
    rng::TestRng,
};

/// Number of disruptions.
const DISRUPTIONS: u64 = 6;
const PROGRAM: &str = env!("CARGO_BIN_EXE_token-broker");

/// Numbers of calls.
#[derive(Default)]
struct Counts {
    sent: AtomicI64,
    answered: AtomicI64,
}

/// Calls repeatedly until `stop` is cancelled, and cancels some calls before they are answered. Returns how
/// often each generation was received.
async fn call(
    client: TestClient,
    mut random: TestRng,
    counts: Arc<Counts>,
    stop: CancellationToken,
) -> BTreeMap<i64, i64> {
    let mut received = BTreeMap::new();
    while !stop.is_cancelled() {
        let account = if random.below(8) == 0 { "unknown" } else { "acme" };
        let limit = match random.below(8) {
            0 => Duration::from_micros(random.below(2_000)),
            _ => Duration::from_mins(1),
        };
        counts.sent.fetch_add(1, Relaxed);
        match timeout(limit, client.get(account)).await {
            Ok(Ok(token)) => {
                *received.entry(token.generation.try_into().unwrap()).or_default() += 1;
                counts.answered.fetch_add(1, Relaxed);
            }
            Ok(Err(refused)) if refused.code() == tonic::Code::NotFound => {
                counts.answered.fetch_add(1, Relaxed);
            }
            // No broker is running: wait before the next call.
            Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(_) => {}
        }
    }
    received
}

/// The broker, its Postgres, and the counts of calls.
struct Deployment {
    postgres: Option<EmbeddedPostgres>,
    location: DataLocation,
    setup: BrokerSetup,
    serve: Option<BrokerProcess>,
    counts: Arc<Counts>,
}

impl Deployment {
    async fn start_postgres(&mut self) {
        // Child processes of a killed server may take a moment to end.
        let location = self.location.clone();
        let started = eventually("postgres again", async || {
            EmbeddedPostgres::start(location.clone(), Path::new(PROGRAM)).await.ok()
        });
        self.postgres = Some(started.await);
    }

    /// Makes a change as an admin, which becomes an audit event.
    async fn change_accounts(&self) {
        let pool = Database::new(&self.postgres().url(DATABASE), "admin").unwrap().pool(1);
        let change = "update accounts set description = description || '.'";
        eventually("a change", async || sqlx::query(change).execute(&pool).await.ok()).await;
        pool.close().await;
    }

    fn postgres(&self) -> &EmbeddedPostgres {
        self.postgres.as_ref().unwrap()
    }

    async fn disrupt(&mut self, random: &mut TestRng) {
        let so_far = self.counts.answered.load(Relaxed);
        eventually("answers", async || {
            (self.counts.answered.load(Relaxed) >= so_far + 50).then_some(())
        })
        .await;
        self.change_accounts().await;
        tokio::time::sleep(random.millis(300)).await;
        match random.below(5) {
            0 | 1 => {
                self.serve.take().unwrap().kill().await;
                self.serve = Some(self.setup.serve().await);
            }
            2 => {
                let mut serve = self.serve.take().unwrap();
                serve.signal(Signal::SIGTERM);
                assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
                self.serve = Some(self.setup.serve().await);
            }
            3 => {
                let killed = self.postgres.take().unwrap();
                let pid = Pid::from_raw(killed.pid().try_into().unwrap());
                nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
                drop(killed);
                tokio::time::sleep(random.millis(500)).await;
                self.start_postgres().await;
            }
            _ => {
                let paused = PausedProcesses::pause(self.postgres().pid());
                tokio::time::sleep(random.millis(1_500)).await;
                drop(paused);
            }
        }
    }
}

/// All records in the journal of the state directory.
fn journaled(state: &Path) -> Vec<StoredEvent> {
    let archive = Archive::open(state, None).unwrap();
    let mut events = vec![];
    for chain in archive.chains() {
        let mut reader = archive.reader(Arc::clone(&chain.link), chain.before);
        loop {
            let more = reader.read().unwrap();
            if more.is_empty() {
                break;
            }
            events.extend(more);
        }
    }
    events
}

async fn delivered(pool: &PgPool) -> Vec<StoredEvent> {
    let events = events_after(pool, &EventFilter::default(), None, i64::MAX).await.unwrap();
    events.into_iter().map(Result::unwrap).collect()
}

#[tokio::test]
async fn received_tokens_are_recorded_and_delivered_once_whichever_process_is_killed() {
    let mut random = TestRng::for_test(
        "received_tokens_are_recorded_and_delivered_once_whichever_process_is_killed",
    );
    let directory = shared_directory();
    let location = DataLocation::Persistent(directory.path().join("pg"));
    let postgres = EmbeddedPostgres::start(location.clone(), Path::new(PROGRAM)).await.unwrap();
    let url = postgres.url(DATABASE);
    let upstream = Simulator::start_on_loopback(SimulatorOptions::default()).await.unwrap();
    upstream.add_account("id-1", "SK.1");
    let setup = BrokerSetup::new(&url, &upstream.base_url()).await;
    setup.run(&["migrate"]).await.ok();
    let serve = setup.serve().await;
    let added = ["account", "add", "acme", "--client-id", "id-1", "--wait"];
    setup.run_with_secret(&added, "SK.1").await.ok();
    let state = setup.directory.path().join("state");

    let (counts, stop) = (Arc::new(Counts::default()), CancellationToken::new());
    let mut callers: Vec<(String, JoinHandle<_>)> = vec![];
    for caller in ["one", "two", "three"] {
        let bearer = setup.run(&["caller", "add", caller, "--bearer"]).await.ok();
        setup.run(&["caller", "grant", caller, "*"]).await.ok();
        let client = TestClient::connect(&setup.endpoint(), &Bearer::parse(&bearer).unwrap()).await;
        eventually("the grant", async || {
            counts.sent.fetch_add(1, Relaxed);
            client.get("acme").await.ok()
        })
        .await;
        let calling = call(client, random.fork(), counts.clone(), stop.clone());
        callers.push((caller.to_owned(), tokio::spawn(calling)));
    }
    let mut deployment =
        Deployment { postgres: Some(postgres), location, setup, serve: Some(serve), counts };
    for _ in 0..DISRUPTIONS {
        deployment.disrupt(&mut random).await;
    }
    deployment.change_accounts().await;
    stop.cancel();
    let mut received = BTreeMap::new();
    for (caller, calling) in callers {
        received.insert(caller, calling.await.unwrap());
    }
    let mut serve = deployment.serve.take().unwrap();
    let pool = Database::new(&url, "test").unwrap().pool(2);
    // Stopping delivers only within a time limit, so delivery is awaited before.
    let expected = journaled(&state).len();
    eventually("delivery", async || {
        let query = "select count(*), (select count(*) from changes where audited_at is null)
            from audit_events";
        let (events, unaudited): (i64, i64) = sqlx::query_as(query).fetch_one(&pool).await.ok()?;
        (usize::try_from(events).unwrap() >= expected && unaudited == 0).then_some(())
    })
    .await;
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());

    // The journal and Postgres have the same records, each once.
    let (journaled, delivered) = (journaled(&state), delivered(&pool).await);
    assert_eq!(journaled.len(), delivered.len());
    let positions = |events: &[StoredEvent]| -> BTreeSet<_> {
        events.iter().map(|event| (event.chain.clone(), event.seq, event.hash.0)).collect()
    };
    assert_eq!(positions(&journaled), positions(&delivered));
    // Each change is recorded once.
    let changes: Vec<i64> =
        sqlx::query_scalar("select id from changes order by id").fetch_all(&pool).await.unwrap();
    let mut recorded_changes: Vec<i64> = delivered
        .iter()
        .filter_map(|event| Some(event.detail.get("change_id")?.parse().unwrap()))
        .collect();
    recorded_changes.sort_unstable();
    assert_eq!(recorded_changes, changes);
    // Each received token is recorded, and each recorded call was sent.
    let calls = delivered.iter().filter(|event| event.event == "get_token");
    let mut recorded = BTreeMap::<(&str, i64), i64>::new();
    let mut all = 0;
    for event in calls {
        all += event.count;
        if let (Some(caller), Some(generation), "ok") =
            (&event.caller, event.generation, &*event.outcome)
        {
            *recorded.entry((caller, generation)).or_default() += event.count;
        }
    }
    for (caller, generations) in &received {
        for (generation, times) in generations {
            let known = recorded.get(&(caller, *generation)).copied().unwrap_or_default();
            assert!(known >= *times, "{caller} {generation}: {known} of {times} are recorded");
        }
    }
    let (sent, answered) =
        (deployment.counts.sent.load(Relaxed), deployment.counts.answered.load(Relaxed));
    assert!(answered <= all && all <= sent, "{answered} answered, {all} recorded, {sent} sent");
    assert!(answered < sent, "no call was cancelled");

    let heads = state.join("audit-heads.jsonl");
    deployment.setup.run(&["audit", "verify", "--head", heads.to_str().unwrap()]).await.ok();
    deployment.setup.run(&["audit", "verify", "--journal", state.to_str().unwrap()]).await.ok();
    pool.close().await;
    deployment.postgres.take().unwrap().stop().await;
}
