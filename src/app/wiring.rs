//! Builds the services from the components and the settings.

use std::{sync::Arc, time::Duration};

use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;
use tonic_health::server::HealthReporter;

use super::{app_config::AppConfig, components::Components, error::StartError};
use crate::{
    api::grpc::{
        self, TokenServiceHandler,
        audit::AuditLayer,
        server::{ConnectionLimiter, ConnectionServer, WorkerThreads},
    },
    audit::checkpoint_signer::CheckpointSigner,
    files::state_dir::StateDir,
    services::{
        account_upkeep::AccountUpkeep,
        caller_rates::CallerRates,
        change_feed::ChangeFeed,
        database_clock::DatabaseClockWatch,
        heartbeat::{HeartbeatTask, ReplicaIdentity},
        history::{HistoryGuard, HistorySettings, Witnesses},
        journal_delivery::JournalDelivery,
        keyed_semaphore::KeyedSemaphore,
        refresher::{
            IssueInfrastructure, IssueSettings, IssueState, PendingTokens, RefreshTrigger,
            TokenIssuer,
        },
        refusal_aggregator::RefusalAggregator,
        retention::Retention,
        token_provider::TokenProvider,
        trust_monitor::TrustMonitor,
    },
    store::{deployment::DatabaseIdentity, leases::LeaseHolder},
};

/// The most refused calls that wait for their records to become durable at the same time.
const MAX_REFUSED_CALLS: usize = 10_000;
/// The most names and patterns that all open streams together watch. Each takes up to 500 bytes: 100 MiB in all.
const MAX_WATCHED_PATTERNS: usize = 200_000;
/// How much longer than the longest deadline of a call a connection may stay open after the server has
/// asked the client to close it.
const CLOSE_BEYOND_DEADLINE: Duration = Duration::from_secs(30);

/// The gRPC server before it accepts connections, and the handles that stop it.
pub(super) struct GrpcServer {
    pub(super) server: ConnectionServer,
    pub(super) health: HealthReporter,
    pub(super) limiter: Arc<ConnectionLimiter>,
    /// The threads that serve connections.
    pub(super) workers: Arc<WorkerThreads>,
    /// The calls that have not appended their audit records yet.
    pub(super) calls: TaskTracker,
}

impl Components {
    /// Returns the issuer of tokens. It keeps in `pending` the tokens that are not stored yet. Their generations
    /// contain the number `replica`.
    pub(super) fn token_issuer(
        &self,
        config: &AppConfig,
        state_dir: &StateDir,
        replica: u16,
        pending: Arc<PendingTokens>,
    ) -> TokenIssuer {
        let settings = &config.settings;
        let issue_settings = IssueSettings {
            holder: LeaseHolder {
                instance: state_dir.instance().to_owned(),
                start: state_dir.start().to_owned(),
                replica,
                lease_duration: config.lease_duration(),
                policy: settings.refresh_policy(),
                rate: settings.upstream_rate,
                concurrency: settings.upstream_concurrency,
            },
            new_token_ends_older: settings.new_token_ends_older,
            expected_egress: settings.expected_egress.clone(),
        };
        let infrastructure = IssueInfrastructure {
            pool: self.pool.clone(),
            keyring: self.keys.keyring.clone(),
            upstream: self.upstream.clone(),
            journal: self.journal.clone(),
            clock: self.clock.clone(),
            database_clock: self.database_clock.clone(),
            metrics: self.metrics.clone(),
            upstream_skew_ms: self.upstream_skew_ms.clone(),
        };
        let state = IssueState {
            cache: self.cache.clone(),
            loader: self.loader.clone(),
            connectivity: self.connectivity.clone(),
            pending,
            outage: self.outage.clone(),
        };
        TokenIssuer::new(issue_settings, infrastructure, state)
    }

    /// Returns the guard that verifies the database and watches it.
    pub(super) fn history_guard(&self, config: &AppConfig, state_dir: &StateDir) -> HistoryGuard {
        let settings = HistorySettings {
            upstream: config.settings.upstream.to_string(),
            accept_restored: config.accept_restored,
            new_token_ends_older: config.settings.new_token_ends_older,
        };
        let witnesses = Witnesses { journal: self.journal.clone(), cache: self.cache.clone() };
        HistoryGuard::new(
            self.unverified_database.clone(),
            self.gate.clone(),
            settings,
            witnesses,
            state_dir.database_file(),
            self.clock.clone(),
        )
    }

    /// Returns the feed that follows the changes in the database, which must have this identity.
    pub(super) fn change_feed(
        &self,
        config: &AppConfig,
        state_dir: &StateDir,
        database_identity: DatabaseIdentity,
        trigger: RefreshTrigger,
    ) -> ChangeFeed {
        ChangeFeed {
            instance: state_dir.instance().to_owned(),
            database: self.database.clone(),
            database_identity,
            upstream: config.settings.upstream.to_string(),
            pool: self.pool.clone(),
            keyring: self.keys.keyring.clone(),
            loader: self.loader.clone(),
            cache: self.cache.clone(),
            directory: self.directory.clone(),
            health: self.feed_health.clone(),
            connectivity: self.connectivity.clone(),
            refresh: trigger,
            journal: self.journal.clone(),
            clock: self.clock.clone(),
        }
    }

    /// Returns the task that looks at the database's clock.
    pub(super) fn database_clock_watch(&self) -> DatabaseClockWatch {
        DatabaseClockWatch {
            clock: self.database_clock.clone(),
            pool: self.pool.clone(),
            cache: self.cache.clone(),
        }
    }

    /// Returns the task that tells the other replicas that this one is alive.
    pub(super) fn heartbeat(&self, state_dir: &StateDir) -> HeartbeatTask {
        let replica = ReplicaIdentity {
            instance: state_dir.instance().to_owned(),
            start: state_dir.start().to_owned(),
            replica: state_dir.replica(),
            started_at: self.clock.wall(),
        };
        let (pool, connectivity) = (self.pool.clone(), self.connectivity.clone());
        let (ended, health) = (state_dir.ended_starts().to_vec(), self.feed_health.clone());
        HeartbeatTask::new(
            replica,
            self.keys.clone(),
            ended,
            pool,
            connectivity,
            health,
            self.journal.clone(),
        )
    }

    /// Returns the service that updates rows of accounts that may be locked.
    pub(super) fn account_upkeep(&self) -> AccountUpkeep {
        AccountUpkeep {
            pool: self.pool.clone(),
            cache: self.cache.clone(),
            clock: self.database_clock.clone(),
        }
    }

    /// Returns the service that deletes old audit records.
    pub(super) fn retention(&self, config: &AppConfig) -> Retention {
        Retention {
            database: self.database.clone(),
            keyring: self.keys.keyring.clone(),
            clock: self.clock.clone(),
            calls: config.settings.audit_retention,
            changes: config.settings.change_retention,
        }
    }

    /// Returns the service that checks whether the database can be trusted.
    pub(super) fn trust_monitor(&self) -> TrustMonitor {
        TrustMonitor {
            pool: self.pool.clone(),
            keyring: self.keys.keyring.clone(),
            trust: self.trust.clone(),
        }
    }

    /// Returns the service that signs checkpoints of the audit log.
    pub(super) fn checkpoint_signer(&self, state_dir: &StateDir) -> Arc<CheckpointSigner> {
        let (journal, keyring) = (self.journal.clone(), self.keys.keyring.clone());
        CheckpointSigner::new(journal, keyring, self.clock.clone(), state_dir)
    }

    /// Returns the service that copies the journal to Postgres. After it is stopped, it goes on for up to
    /// `drain`.
    pub(super) fn journal_delivery(
        &self,
        signer: Arc<CheckpointSigner>,
        drain: Duration,
    ) -> JournalDelivery {
        JournalDelivery::new(self.journal.clone(), self.database.clone())
            .checkpoint_signer(signer)
            .drain(drain)
    }

    /// Builds the gRPC server and starts its worker threads.
    ///
    /// # Errors
    /// When the threads cannot be created, or the protobuf descriptors cannot be decoded. No thread runs
    /// then.
    pub(super) fn grpc(
        &self,
        config: &AppConfig,
        trigger: RefreshTrigger,
    ) -> Result<GrpcServer, StartError> {
        let calls = TaskTracker::new();
        let refusals = RefusalAggregator::new(self.journal.clone(), calls.clone());
        let rates = Arc::new(CallerRates::new(config.settings.caller_rate));
        let audit = self.audit_layer(config, calls.clone(), refusals.clone(), rates.clone());
        let handler = TokenServiceHandler {
            provider: self.token_provider(config, trigger, rates),
            journal: self.journal.clone(),
            api_base_url: config.settings.upstream.base_url().into(),
        };
        let (routes, health) = grpc::routes(handler, Arc::new(audit))?;
        let limiter = Arc::new(ConnectionLimiter::default());
        let workers =
            WorkerThreads::start(config.workers, &self.failed).map_err(StartError::Workers)?;
        let workers = Arc::new(workers);
        let server = ConnectionServer {
            routes,
            balancers: config.settings.proxy_protocol_from.as_slice().into(),
            tls: self.tls.clone(),
            limiter: limiter.clone(),
            workers: workers.clone(),
            max_connections: config.max_connections,
            drain_timeout: config.settings.deadline_max + CLOSE_BEYOND_DEADLINE,
            refusals,
            clock: self.clock.clone(),
        };
        Ok(GrpcServer { server, health, limiter, workers, calls })
    }

    fn token_provider(
        &self,
        config: &AppConfig,
        trigger: RefreshTrigger,
        rates: Arc<CallerRates>,
    ) -> TokenProvider {
        TokenProvider {
            cache: self.cache.clone(),
            callers: self.directory.clone(),
            clock: self.clock.clone(),
            database_clock: self.database_clock.clone(),
            policy: config.settings.refresh_policy(),
            max_staleness: config.settings.max_authorization_staleness,
            connectivity: self.connectivity.clone(),
            wait_permits: Arc::new(KeyedSemaphore::new(config.max_waiting_calls)),
            stream_permits: Arc::new(KeyedSemaphore::new(config.max_streams)),
            pattern_permits: Arc::new(KeyedSemaphore::new(MAX_WATCHED_PATTERNS)),
            rates,
            refresh_trigger: trigger,
            pool: self.pool.clone(),
            runtime: Handle::current(),
        }
    }

    fn audit_layer(
        &self,
        config: &AppConfig,
        calls: TaskTracker,
        refusals: RefusalAggregator,
        rates: Arc<CallerRates>,
    ) -> AuditLayer {
        let settings = &config.settings;
        AuditLayer {
            journal: self.journal.clone(),
            refusals,
            callers: self.directory.clone(),
            trust_domain: settings.trust_domain.as_deref().map(Into::into),
            rates,
            default_deadline: settings.deadline_default,
            max_deadline: settings.deadline_max,
            clock: self.clock.clone(),
            database_clock: self.database_clock.clone(),
            metrics: self.metrics.clone(),
            calls,
            refusal_waits: Arc::new(KeyedSemaphore::new(MAX_REFUSED_CALLS)),
        }
    }
}
