//! The composition of the whole: what `serve` and `dev` run, and what the tests run in process.

mod figures;
mod plan;

use std::{
    future::Future,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use ipnet::IpNet;
use sqlx::PgPool;
use thiserror::Error;
use tokio::{
    net::TcpListener,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::{error, info, warn};

use crate::{
    audit::{
        journal::{Journal, JournalError, JournalSettings},
        record::{Event, Record},
        ship::Shipper,
    },
    broker::Broker,
    cache::Cache,
    clock::Clock,
    directory::Directory,
    follow::{Follower, Identity},
    grpc::{self, TokenServer, audit::Desk},
    limit::CallerRates,
    load::Loader,
    ops::{self, Ops},
    proto::token_service_server::SERVICE_NAME,
    refresh::{Issuing, Refresher, Waker},
    schedule::Policy,
    seal::{Keyring, SealError},
    state_dir::{StateDir, StateDirError},
    store::{Database, StoreError, accounts, instances, leases::Claimant},
    telemetry::Metrics,
    upstream::{Client, SetUpError, Settings as UpstreamSettings},
};

/// How much longer than an attempt a lease lasts: time to store the token.
const LEASE_BEYOND_ATTEMPT: Duration = Duration::from_secs(20);
/// The pause between two tries to reach the database at the start.
const REACH_AGAIN: Duration = Duration::from_secs(1);
/// How long the audit log may take to be delivered once everything else has ended.
const DELIVER_WITHIN: Duration = Duration::from_secs(5);
/// How long the record of the start may take to become durable.
const RECORD_WITHIN: Duration = Duration::from_secs(10);

/// All that a broker is made of.
pub struct Plan {
    /// Where the database is.
    pub database: Database,
    /// How many connections refresh and following share.
    pub connections: u32,
    /// Whether to bring the schema up to date first.
    pub migrate: bool,
    /// The journal's and the instance's home.
    pub state_dir: PathBuf,
    /// The keys.
    pub keyring: Arc<Keyring>,
    /// The upstream.
    pub upstream: UpstreamSettings,
    /// Whether the upstream ends older tokens when it issues a new one.
    pub ends_older: bool,
    /// Attempts a second of all replicas together.
    pub upstream_rate: f64,
    /// Attempts at once of all replicas together.
    pub upstream_concurrency: usize,
    /// The addresses that tokens should name; empty for any.
    pub expected_egress: Vec<IpNet>,
    /// When tokens are replaced.
    pub policy: Policy,
    /// The audit journal.
    pub journal: JournalSettings,
    /// Calls a second of a caller that has no rate of its own.
    pub caller_rate: u32,
    /// The deadline of a call that brings none.
    pub default_deadline: Duration,
    /// The longest deadline that a call may bring.
    pub longest_deadline: Duration,
    /// How long connections may take to end.
    pub drain: Duration,
    /// How long grants are trusted without the database.
    pub max_staleness: Duration,
    /// Time.
    pub clock: Clock,
}

/// Why a broker cannot start. Each names what to put right.
#[derive(Debug, Error)]
pub enum StartError {
    /// The state directory.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The record of the start was not written.
    #[error(
        "the start cannot be recorded in the audit journal: is the state directory's disk full?"
    )]
    NotRecorded,
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The upstream's client.
    #[error(transparent)]
    Upstream(#[from] SetUpError),
    /// The keyring is not the one that sealed what is stored.
    #[error("the keyring does not open the secret of account {account}: {error}")]
    WrongKeyring {
        /// The account.
        account: String,
        /// What is wrong.
        error: SealError,
    },
    /// A listener.
    #[error("cannot listen: {0}")]
    Listen(#[from] std::io::Error),
    /// The build.
    #[error("the service cannot be described: {0}")]
    Descriptors(#[from] tonic_reflection::server::Error),
    /// A signal came before the start was over.
    #[error("stopped before the start was over")]
    Stopped,
}

/// A broker that runs.
pub struct App {
    /// Where gRPC is served.
    pub grpc_address: SocketAddr,
    /// Where operators look.
    pub ops_address: SocketAddr,
    journal: Journal,
    clock: Clock,
    health: HealthReporter,
    ready: Arc<AtomicBool>,
    /// Ends the front door, the streams and the refresher.
    stop: CancellationToken,
    /// Ends following and the operators' face, once nobody is served any more.
    stop_following: CancellationToken,
    /// Ends delivery, once the journal is closed.
    stop_delivery: CancellationToken,
    serving: Vec<JoinHandle<()>>,
    following: Vec<JoinHandle<()>>,
    delivery: JoinHandle<()>,
    calls: TaskTracker,
    failed: CancellationToken,
}

impl App {
    /// Starts a broker that serves gRPC on `grpc` and operators on `ops`. Returns once it is ready;
    /// a database that cannot be reached yet is waited for, with `/readyz` telling so, until
    /// `give_up`.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is left running then.
    pub async fn start(
        plan: Plan,
        grpc: TcpListener,
        ops: TcpListener,
        give_up: &CancellationToken,
    ) -> Result<Self, StartError> {
        let (grpc_address, ops_address) = (grpc.local_addr()?, ops.local_addr()?);
        let state_dir = StateDir::open(&plan.state_dir)?;
        let journal = open_journal(&state_dir, plan.journal, plan.clock.clone()).await?;
        let world = World::new(&plan, &state_dir, journal.clone())?;

        let stop_following = CancellationToken::new();
        let ops = tokio::spawn(ops::serve(ops, world.ops(), stop_following.clone()));
        let started = world.start(plan, &state_dir, grpc, &stop_following, give_up).await;
        match started {
            Ok(started) => Ok(Self {
                grpc_address,
                ops_address,
                journal,
                clock: world.clock,
                health: started.health,
                ready: world.ready,
                stop: started.stop,
                stop_following,
                stop_delivery: started.stop_delivery,
                serving: started.serving,
                following: vec![started.following, ops],
                delivery: started.delivery,
                calls: started.calls,
                failed: started.failed,
            }),
            Err(error) => {
                stop_following.cancel();
                let _ = ops.await;
                journal.close().await;
                Err(error)
            }
        }
    }

    /// Returns when a part of the broker has ended by itself, which is a bug: stop the process.
    pub async fn failed(&self) {
        self.failed.cancelled().await;
    }

    /// Stops in order: health tells it, connections and attempts end, the stop is recorded, and the
    /// journal is delivered as far as the database is there.
    pub async fn stop(self) {
        self.ready.store(false, Ordering::Relaxed);
        self.health.set_service_status("", ServingStatus::NotServing).await;
        self.health.set_service_status(SERVICE_NAME, ServingStatus::NotServing).await;
        self.stop.cancel();
        for task in self.serving {
            let _ = task.await;
        }
        // Calls whose connection was cut write their records still.
        self.calls.close();
        if timeout(DELIVER_WITHIN, self.calls.wait()).await.is_err() {
            warn!("some calls did not end");
        }
        self.stop_following.cancel();
        for task in self.following {
            let _ = task.await;
        }
        let stopped = Record::new(self.clock.now(), Event::Stopped);
        if self.journal.append(stopped).durable(DELIVER_WITHIN).await.is_err() {
            warn!("the stop could not be recorded");
        }
        if timeout(RECORD_WITHIN, self.journal.close()).await.is_err() {
            warn!("the journal did not close in time");
        }
        self.stop_delivery.cancel();
        let _ = self.delivery.await;
        info!("stopped");
    }
}

async fn open_journal(
    state_dir: &StateDir,
    settings: JournalSettings,
    clock: Clock,
) -> Result<Journal, StartError> {
    let state_dir = state_dir.clone();
    let opened =
        tokio::task::spawn_blocking(move || Journal::open(&state_dir, settings, clock)).await;
    match opened {
        Ok(opened) => Ok(opened?),
        Err(bug) => std::panic::resume_unwind(bug.into_panic()),
    }
}

/// What exists before the database has been reached.
struct World {
    pool: PgPool,
    cache: Arc<Cache>,
    directory: Arc<Directory>,
    loader: Arc<Loader>,
    journal: Journal,
    metrics: Arc<Metrics>,
    upstream: Client,
    upstream_skew_ms: Arc<AtomicI64>,
    ready: Arc<AtomicBool>,
    clock: Clock,
}

/// What runs once everything was loaded.
struct Started {
    health: HealthReporter,
    stop: CancellationToken,
    stop_delivery: CancellationToken,
    serving: Vec<JoinHandle<()>>,
    following: JoinHandle<()>,
    delivery: JoinHandle<()>,
    calls: TaskTracker,
    failed: CancellationToken,
}

impl World {
    fn new(plan: &Plan, state_dir: &StateDir, journal: Journal) -> Result<Self, StartError> {
        let pool = plan.database.pool(plan.connections);
        let cache = Arc::new(Cache::default());
        let loader =
            Loader::new(pool.clone(), plan.keyring.clone(), cache.clone(), plan.clock.clone());
        info!(instance = state_dir.instance(), upstream = %plan.upstream.target,
            version = env!("CARGO_PKG_VERSION"), "starting");
        Ok(Self {
            pool,
            cache,
            directory: Arc::new(Directory::default()),
            loader: Arc::new(loader),
            journal,
            metrics: Arc::new(Metrics::new(env!("CARGO_PKG_VERSION"))),
            upstream: Client::new(plan.upstream.clone(), plan.clock.clone())?,
            upstream_skew_ms: Arc::new(AtomicI64::new(figures::NO_SKEW)),
            ready: Arc::new(AtomicBool::new(false)),
            clock: plan.clock.clone(),
        })
    }

    fn ops(&self) -> Ops {
        figures::export(self);
        Ops { readiness: figures::readiness(self), metrics: self.metrics.clone() }
    }

    async fn start(
        &self,
        plan: Plan,
        state_dir: &StateDir,
        grpc: TcpListener,
        stop_following: &CancellationToken,
        give_up: &CancellationToken,
    ) -> Result<Started, StartError> {
        let started_at = self.clock.now();
        let grpc_address = grpc.local_addr()?;
        until_reached(give_up, || self.prepare(&plan)).await?;
        let started = Record::new(started_at, Event::Started)
            .with("version", env!("CARGO_PKG_VERSION"))
            .with("upstream", plan.upstream.target.to_string());
        self.journal
            .append(started)
            .durable(RECORD_WITHIN)
            .await
            .map_err(|_| StartError::NotRecorded)?;

        let (refresher, waker) = Refresher::new(self.issuing(&plan, state_dir));
        let follower = self.follower(&plan, state_dir, waker.clone());
        let snapshot = until_reached(give_up, || async { Ok(follower.start().await?) }).await?;
        let stop = CancellationToken::new();
        let calls = TaskTracker::new();
        let (routes, health) = self.routes(&plan, waker, stop.clone(), calls.clone())?;

        let failed = CancellationToken::new();
        let stop_delivery = CancellationToken::new();
        let shipper = Shipper::new(
            self.journal.clone(),
            plan.database.connection().clone(),
            self.clock.clone(),
        )
        .drain(DELIVER_WITHIN);
        let watch = |name, token: &CancellationToken, task| {
            watch_over(name, task, token.clone(), failed.clone())
        };
        let serving = vec![
            watch("refresh", &stop, Box::pin(refresher.run(stop.clone())) as std::pin::Pin<Box<_>>),
            watch(
                "grpc",
                &stop,
                Box::pin(grpc::server::serve(grpc, routes, stop.clone(), plan.drain)),
            ),
        ];
        let following = watch(
            "follow",
            stop_following,
            Box::pin(follower.run(snapshot, stop_following.clone())),
        );
        let delivery =
            watch("deliver", &stop_delivery, Box::pin(shipper.run(stop_delivery.clone())));
        health.set_service_status("", ServingStatus::Serving).await;
        health.set_service_status(SERVICE_NAME, ServingStatus::Serving).await;
        self.ready.store(true, Ordering::Relaxed);
        info!(grpc = ?grpc_address, "ready");
        Ok(Started { health, stop, stop_delivery, serving, following, delivery, calls, failed })
    }

    /// Proves that this is our database: its schema, its upstream, its keyring.
    async fn prepare(&self, plan: &Plan) -> Result<(), StartError> {
        if plan.migrate {
            plan.database.migrate().await?;
        }
        plan.database.check_schema().await?;
        instances::belong_to(&self.pool, &plan.upstream.target.to_string()).await?;
        for stored in accounts::sealed_samples(&self.pool).await? {
            plan.keyring
                .open_secret(stored.id, stored.version, &stored.sealed)
                .map_err(|error| StartError::WrongKeyring { account: stored.name, error })?;
        }
        let keys: Vec<_> = plan
            .keyring
            .intake_publics()
            .iter()
            .map(|key| (key.key_id().to_string(), key.bytes().to_vec()))
            .collect();
        let primary = plan.keyring.intake_public();
        instances::publish_intake_keys(&self.pool, &keys, primary.key_id().as_str()).await?;
        Ok(())
    }

    fn issuing(&self, plan: &Plan, state_dir: &StateDir) -> Issuing {
        Issuing {
            cache: self.cache.clone(),
            loader: self.loader.clone(),
            pool: self.pool.clone(),
            keyring: plan.keyring.clone(),
            upstream: self.upstream.clone(),
            journal: self.journal.clone(),
            clock: self.clock.clone(),
            policy: plan.policy,
            claimant: Claimant {
                instance: state_dir.instance().to_owned(),
                replica: state_dir.replica(),
                lease: plan.upstream.timeout + LEASE_BEYOND_ATTEMPT,
                floor: plan.policy.min_issue_interval,
                rate: plan.upstream_rate,
                concurrency: plan.upstream_concurrency,
            },
            ends_older: plan.ends_older,
            expected_egress: plan.expected_egress.clone(),
            metrics: self.metrics.clone(),
            upstream_skew_ms: self.upstream_skew_ms.clone(),
            claims_fail: AtomicBool::new(false),
        }
    }

    fn follower(&self, plan: &Plan, state_dir: &StateDir, waker: Waker) -> Follower {
        Follower {
            identity: Identity {
                instance: state_dir.instance().to_owned(),
                replica: state_dir.replica(),
                key_ids: plan.keyring.key_ids().iter().map(ToString::to_string).collect(),
                started_at: self.clock.now(),
            },
            database: plan.database.clone(),
            pool: self.pool.clone(),
            keyring: plan.keyring.clone(),
            loader: self.loader.clone(),
            cache: self.cache.clone(),
            directory: self.directory.clone(),
            waker,
            journal: self.journal.clone(),
            clock: self.clock.clone(),
        }
    }

    fn routes(
        &self,
        plan: &Plan,
        waker: Waker,
        stop: CancellationToken,
        calls: TaskTracker,
    ) -> Result<(tonic::service::Routes, HealthReporter), StartError> {
        let broker = Broker {
            cache: self.cache.clone(),
            directory: self.directory.clone(),
            clock: self.clock.clone(),
            policy: plan.policy,
            max_staleness: plan.max_staleness,
            waker,
            pool: self.pool.clone(),
        };
        let server = TokenServer {
            broker,
            journal: self.journal.clone(),
            api_base_url: plan.upstream.target.base_url().into(),
            stop,
        };
        let desk = Desk {
            journal: self.journal.clone(),
            directory: self.directory.clone(),
            rates: CallerRates::default(),
            default_rate: plan.caller_rate,
            default_deadline: plan.default_deadline,
            longest_deadline: plan.longest_deadline,
            clock: self.clock.clone(),
            epoch: Instant::now(),
            metrics: self.metrics.clone(),
            calls,
        };
        Ok(grpc::routes(server, Arc::new(desk))?)
    }
}

/// Does `step` again and again while the database cannot be reached.
async fn until_reached<T, F: Future<Output = Result<T, StartError>>>(
    give_up: &CancellationToken,
    step: impl Fn() -> F,
) -> Result<T, StartError> {
    let mut told = false;
    loop {
        let done = tokio::select! {
            () = give_up.cancelled() => return Err(StartError::Stopped),
            done = step() => done,
        };
        match done {
            Err(StartError::Store(StoreError::Unreachable(why))) => {
                if !std::mem::replace(&mut told, true) {
                    warn!(%why, "the database cannot be reached yet; waiting for it");
                }
                tokio::time::sleep(REACH_AGAIN).await;
            }
            done => return done,
        }
    }
}

/// Runs `task`; if it ends before `stop`, by a panic or by itself, the whole broker has failed.
fn watch_over(
    name: &'static str,
    task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>,
    stop: CancellationToken,
    failed: CancellationToken,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let ended = tokio::spawn(task).await;
        if !stop.is_cancelled() {
            error!(part = name, panicked = ended.is_err(), "a part of the broker has ended");
            failed.cancel();
        }
    })
}
