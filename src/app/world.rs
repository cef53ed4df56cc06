//! What a broker stands on, and how it starts.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use sqlx::PgPool;
use tokio::{net::TcpListener, runtime::Handle, task::JoinHandle, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic_health::server::HealthReporter;
use tracing::info;

use super::{
    AppConfig, DELIVER_WITHIN, RECORD_WITHIN, StartError, gauges,
    health::Health,
    proof, restored,
    supervise::{until_reached, watch_over},
};
use crate::{
    api::{
        grpc::{
            self, TokenServer,
            audit::AuditLayer,
            server::{ConnectionLimiter, ConnectionServer, Workers},
        },
        ops::Ops,
    },
    audit::{
        checkpoint_signer::CheckpointSigner,
        journal::Journal,
        record::{Event, Record},
    },
    domain::{account::AccountId, clock::Clock},
    files::state_dir::StateDir,
    services::{
        account_cache::AccountCache,
        account_loader::AccountLoader,
        caller_directory::CallerDirectory,
        caller_rates::CallerRates,
        change_feed::{ChangeFeed, ReplicaIdentity},
        connectivity::DatabaseConnectivity,
        journal_delivery::JournalDelivery,
        keyed_semaphore::KeyedSemaphore,
        refresher::{Issuing, Outage, PendingTokens, RefreshTrigger, Refresher},
        refusal_aggregator::RefusalAggregator,
        retention::Retention,
        token_provider::TokenProvider,
    },
    store::{
        accounts,
        deployment::DatabaseIdentity,
        instances,
        leases::{self, LeaseHolder},
        within,
    },
    telemetry::Metrics,
    tls::Tls,
    upstream::Client,
};

/// How much longer than an attempt a lease lasts: time to store the token.
const LEASE_BEYOND_ATTEMPT: Duration = Duration::from_secs(20);
/// The calls that may wait at once until it is recorded that they are refused.
const MOST_REFUSED: usize = 10_000;
/// How much longer than the longest call a connection may take that was told to finish.
const LEAVE_BEYOND_DEADLINE: Duration = Duration::from_secs(30);

/// What exists before the database has been reached.
pub(super) struct World {
    pub(super) pool: PgPool,
    pub(super) cache: Arc<AccountCache>,
    pub(super) directory: Arc<CallerDirectory>,
    pub(super) reach: Arc<DatabaseConnectivity>,
    pub(super) outage: Arc<Outage>,
    pub(super) loader: Arc<AccountLoader>,
    pub(super) journal: Journal,
    pub(super) metrics: Arc<Metrics>,
    pub(super) upstream: Client,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) upstream_skew_ms: Arc<AtomicI64>,
    pub(super) ready: Arc<AtomicBool>,
    pub(super) clock: Clock,
}

/// What runs once everything was loaded.
pub(super) struct Started {
    pub(super) health: Health,
    pub(super) guests: Arc<ConnectionLimiter>,
    pub(super) workers: Arc<Workers>,
    pub(super) stop: CancellationToken,
    pub(super) stop_delivery: CancellationToken,
    pub(super) serving: Vec<JoinHandle<()>>,
    pub(super) following: Vec<JoinHandle<()>>,
    pub(super) delivery: JoinHandle<()>,
    pub(super) notary: Arc<CheckpointSigner>,
    pub(super) calls: TaskTracker,
    pub(super) failed: CancellationToken,
}

impl World {
    pub(super) fn new(
        plan: &AppConfig,
        state_dir: &StateDir,
        journal: Journal,
    ) -> Result<Self, StartError> {
        let pool = plan.database.pool(plan.connections);
        let cache = Arc::new(AccountCache::default());
        let loader = AccountLoader::new(
            pool.clone(),
            plan.keyring.clone(),
            cache.clone(),
            plan.clock.clone(),
        );
        info!(instance = state_dir.instance(), upstream = %plan.upstream.target,
            version = env!("CARGO_PKG_VERSION"), "starting");
        Ok(Self {
            pool,
            cache,
            directory: Arc::new(CallerDirectory::default()),
            reach: Arc::new(DatabaseConnectivity::new(plan.ends_older)),
            outage: Arc::default(),
            loader: Arc::new(loader),
            journal,
            metrics: Arc::new(Metrics::new(env!("CARGO_PKG_VERSION"))),
            upstream: Client::new(plan.upstream.clone(), plan.clock.clone())?,
            tls: plan
                .tls
                .clone()
                .map(|files| Tls::load(files, plan.clock.clone()))
                .transpose()?
                .map(Arc::new),
            upstream_skew_ms: Arc::new(AtomicI64::new(gauges::NO_SKEW)),
            ready: Arc::new(AtomicBool::new(false)),
            clock: plan.clock.clone(),
        })
    }

    pub(super) fn ops(&self) -> Ops {
        gauges::export(self);
        Ops { readiness: gauges::readiness(self), metrics: self.metrics.clone() }
    }

    pub(super) async fn start(
        &self,
        plan: AppConfig,
        state_dir: &StateDir,
        grpc: TcpListener,
        stop_following: &CancellationToken,
        give_up: &CancellationToken,
    ) -> Result<Started, StartError> {
        let started_at = self.clock.now();
        until_reached(give_up, || Self::check_schema(&plan)).await?;
        self.reach.found();
        let recognise = || restored::recognise(&self.pool, &plan, state_dir, &self.journal);
        let recognised = until_reached(give_up, recognise).await?;
        until_reached(give_up, || self.bring_keys(&plan)).await?;
        let started = Record::new(started_at, Event::Started)
            .with("version", env!("CARGO_PKG_VERSION"))
            .with("upstream", plan.upstream.target.to_string());
        self.journal
            .append(started)
            .durable(RECORD_WITHIN)
            .await
            .map_err(|_| StartError::NotRecorded)?;

        if let Some(accepted) = recognised.accepted {
            let accepted = self.journal.append(accepted).durable(RECORD_WITHIN).await;
            accepted.map_err(|_| StartError::NotRecorded)?;
        }
        let unstored = Arc::new(PendingTokens::new(state_dir, plan.ends_older));
        let lost = unstored.of_earlier_process().await.map_err(StartError::IssuedAlone)?;
        until_reached(give_up, || self.suspect(&lost)).await?;
        unstored.forget_earlier_process().await.map_err(StartError::IssuedAlone)?;
        let (refresher, waker) = Refresher::new(self.issuing(&plan, state_dir, unstored));
        let follower = self.follower(&plan, state_dir, recognised.home, waker.clone());
        let snapshot = until_reached(give_up, || async { Ok(follower.start().await?) }).await?;
        let stop = CancellationToken::new();
        let calls = TaskTracker::new();
        let folds = RefusalAggregator::new(self.journal.clone(), calls.clone());
        let (routes, health) = self.routes(&plan, waker, calls.clone(), folds.clone())?;
        let guests = Arc::new(ConnectionLimiter::default());
        let failed = CancellationToken::new();
        let workers = Workers::start(plan.workers, &failed).map_err(StartError::Workers)?;
        let workers = Arc::new(workers);
        let door = ConnectionServer {
            routes,
            balancers: plan.balancers.as_slice().into(),
            tls: self.tls.clone(),
            guests: guests.clone(),
            workers: workers.clone(),
            most: plan.most_connections,
            leave_within: plan.longest_deadline + LEAVE_BEYOND_DEADLINE,
            folds,
            clock: self.clock.clone(),
        };

        let stop_delivery = CancellationToken::new();
        let notary = CheckpointSigner::new(
            self.journal.clone(),
            plan.keyring.clone(),
            self.clock.clone(),
            state_dir,
        );
        let shipper =
            JournalDelivery::new(self.journal.clone(), plan.database.connection().clone())
                .notary(notary.clone())
                .drain(DELIVER_WITHIN);
        let watch = |name, token: &CancellationToken, task| {
            watch_over(name, task, token.clone(), failed.clone())
        };
        let serving = vec![
            watch("refresh", &stop, Box::pin(refresher.run(stop.clone())) as Pin<Box<_>>),
            watch(
                "grpc",
                &stop,
                Box::pin(grpc::server::serve(grpc, door, stop.clone(), plan.drain)),
            ),
        ];
        let mut following = vec![
            watch(
                "follow",
                stop_following,
                Box::pin(follower.run(snapshot, stop_following.clone())) as Pin<Box<_>>,
            ),
            watch(
                "retention",
                stop_following,
                Box::pin(self.retention(&plan).run(stop_following.clone())),
            ),
            watch("notary", stop_following, Box::pin(notary.clone().run(stop_following.clone()))),
        ];
        if let Some(tls) = self.tls.clone() {
            let follow = Box::pin(tls.follow(stop_following.clone()));
            following.push(watch("tls", stop_following, follow));
        }
        let delivery =
            watch("deliver", &stop_delivery, Box::pin(shipper.run(stop_delivery.clone())));
        let health = Health::follow(health, self.journal.clone()).await;
        self.ready.store(true, Ordering::Relaxed);
        Ok(Started {
            health,
            guests,
            workers,
            stop,
            stop_delivery,
            serving,
            following,
            delivery,
            notary,
            calls,
            failed,
        })
    }

    async fn check_schema(plan: &AppConfig) -> Result<(), StartError> {
        if plan.migrate {
            plan.database.migrate().await?;
        }
        Ok(plan.database.check_schema().await?)
    }

    /// Proves that the keyring is the database's, and publishes what admins seal with.
    async fn bring_keys(&self, plan: &AppConfig) -> Result<(), StartError> {
        proof::prove(&plan.keyring, &accounts::sealed_samples(&self.pool).await?)?;
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

    /// Marks the stored tokens of `accounts` as possibly ended: an earlier process issued for them
    /// what it could not store.
    async fn suspect(&self, accounts: &[AccountId]) -> Result<(), StartError> {
        for account in accounts {
            within(leases::suspect(&self.pool, *account, None)).await?;
        }
        Ok(())
    }

    fn issuing(
        &self,
        plan: &AppConfig,
        state_dir: &StateDir,
        unstored: Arc<PendingTokens>,
    ) -> Issuing {
        Issuing {
            cache: self.cache.clone(),
            loader: self.loader.clone(),
            pool: self.pool.clone(),
            keyring: plan.keyring.clone(),
            upstream: self.upstream.clone(),
            journal: self.journal.clone(),
            clock: self.clock.clone(),
            policy: plan.policy,
            claimant: LeaseHolder {
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
            reach: self.reach.clone(),
            unstored,
            outage: self.outage.clone(),
        }
    }

    fn follower(
        &self,
        plan: &AppConfig,
        state_dir: &StateDir,
        database_identity: DatabaseIdentity,
        waker: RefreshTrigger,
    ) -> ChangeFeed {
        ChangeFeed {
            replica: ReplicaIdentity {
                instance: state_dir.instance().to_owned(),
                replica: state_dir.replica(),
                key_ids: plan.keyring.key_ids().iter().map(ToString::to_string).collect(),
                started_at: self.clock.now(),
            },
            database: plan.database.clone(),
            database_identity,
            pool: self.pool.clone(),
            keyring: plan.keyring.clone(),
            loader: self.loader.clone(),
            cache: self.cache.clone(),
            directory: self.directory.clone(),
            connectivity: self.reach.clone(),
            refresh: waker,
            journal: self.journal.clone(),
            clock: self.clock.clone(),
        }
    }

    fn retention(&self, plan: &AppConfig) -> Retention {
        Retention {
            database: plan.database.clone(),
            keyring: plan.keyring.clone(),
            clock: self.clock.clone(),
            calls: plan.audit_retention,
            changes: plan.change_retention,
        }
    }

    fn routes(
        &self,
        plan: &AppConfig,
        waker: RefreshTrigger,
        calls: TaskTracker,
        folds: RefusalAggregator,
    ) -> Result<(tonic::service::Routes, HealthReporter), StartError> {
        let broker = TokenProvider {
            cache: self.cache.clone(),
            directory: self.directory.clone(),
            clock: self.clock.clone(),
            policy: plan.policy,
            max_staleness: plan.max_staleness,
            reach: self.reach.clone(),
            waits: Arc::new(KeyedSemaphore::new(plan.most_waits)),
            streams: Arc::new(KeyedSemaphore::new(plan.most_streams)),
            waker,
            pool: self.pool.clone(),
            runtime: Handle::current(),
        };
        let server = TokenServer {
            broker,
            journal: self.journal.clone(),
            api_base_url: plan.upstream.target.base_url().into(),
        };
        let desk = AuditLayer {
            journal: self.journal.clone(),
            folds,
            directory: self.directory.clone(),
            trust_domain: plan.trust_domain.clone(),
            rates: CallerRates::default(),
            default_rate: plan.caller_rate,
            default_deadline: plan.default_deadline,
            longest_deadline: plan.longest_deadline,
            clock: self.clock.clone(),
            epoch: Instant::now(),
            metrics: self.metrics.clone(),
            calls,
            refused: Arc::new(KeyedSemaphore::new(MOST_REFUSED)),
        };
        Ok(grpc::routes(server, Arc::new(desk))?)
    }
}
