//! The components of a broker that are created before the database has answered. The services are built
//! from them, and share their state.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicI64},
};

use sqlx::PgPool;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::{app_config::AppConfig, error::StartError};
use crate::{
    audit::journal::Journal,
    crypto::LiveKeyring,
    domain::clock::Clock,
    files::state_dir::StateDir,
    services::{
        account_cache::AccountCache,
        account_loader::AccountLoader,
        caller_directory::CallerDirectory,
        connectivity::DatabaseConnectivity,
        database_clock::DatabaseClock,
        feed_health::FeedHealth,
        key_usage::KeyUsage,
        keyring_watch::{KeyringHealth, KeyringWatch},
        refresher::{Outage, PendingTokens},
        trust_monitor::Trust,
    },
    store::{Database, TrustGate},
    telemetry::Metrics,
    tls::Tls,
    upstream::UpstreamClient,
};

/// The name of the broker's connections in `pg_stat_activity`.
const APPLICATION_NAME: &str = "token-broker";
/// The value of [`Components::upstream_skew_ms`] before the first issue.
pub(super) const UNKNOWN_SKEW: i64 = i64::MIN;

/// The components of one broker. Most of them are handles, whose clones share their state.
pub(super) struct Components {
    /// The options for connections to the verified database.
    pub(super) database: Database,
    /// The options for connections that were not verified: for the schema, and for the history guard.
    pub(super) unverified_database: Database,
    /// Lets connections of `database` and `pool` pass while the history guard trusts the database.
    pub(super) gate: TrustGate,
    /// The pool that the refresher and other tasks with short statements share.
    pub(super) pool: PgPool,
    pub(super) cache: Arc<AccountCache>,
    pub(super) directory: Arc<CallerDirectory>,
    pub(super) connectivity: Arc<DatabaseConnectivity>,
    pub(super) feed_health: Arc<FeedHealth>,
    pub(super) outage: Arc<Outage>,
    pub(super) trust: Trust,
    /// The keyring in use, with what it is needed for.
    pub(super) keys: KeyUsage,
    /// The tokens that are not stored yet.
    pub(super) pending: Arc<PendingTokens>,
    /// Follows the keyring's file; `None` if there is none.
    pub(super) keyring_watch: Option<Arc<KeyringWatch>>,
    pub(super) keyring_health: KeyringHealth,
    pub(super) loader: Arc<AccountLoader>,
    pub(super) journal: Journal,
    pub(super) metrics: Arc<Metrics>,
    pub(super) upstream: UpstreamClient,
    pub(super) tls: Option<Arc<Tls>>,
    /// By how many milliseconds the upstream's clock was ahead of this machine's at the last issue.
    pub(super) upstream_skew_ms: Arc<AtomicI64>,
    /// Whether calls are served. It is true from the end of the start until the stop begins.
    pub(super) serving: Arc<AtomicBool>,
    /// Cancelled when a task or a thread has ended by itself, which is a bug or, for the history guard
    /// and the change feed, means that the database was replaced. The process ends then.
    pub(super) failed: CancellationToken,
    pub(super) clock: Clock,
    /// The database's clock, compared with `clock`.
    pub(super) database_clock: Arc<DatabaseClock>,
}

impl Components {
    /// Creates the components. Blocks while it reads the TLS files, and opens no connection.
    ///
    /// # Errors
    /// When the TLS files, the database's URL or the upstream's settings are invalid.
    pub(super) fn new(
        config: &AppConfig,
        state_dir: &StateDir,
        journal: Journal,
    ) -> Result<Self, StartError> {
        let settings = &config.settings;
        info!(instance = state_dir.instance(), upstream = %settings.upstream,
            version = env!("CARGO_PKG_VERSION"), "starting");
        let unverified_database = settings.database_url.database(APPLICATION_NAME)?;
        let gate = TrustGate::default();
        let database = unverified_database.gated(gate.clone());
        let pool = database.pool(config.pool_connections);
        let cache = Arc::new(AccountCache::default());
        let feed_health = Arc::new(FeedHealth::default());
        let database_clock = Arc::new(DatabaseClock::new(config.clock.clone()));
        let keyring = Arc::new(LiveKeyring::new(config.keyring.clone()));
        let pending = Arc::new(PendingTokens::new(state_dir, config.settings.new_token_ends_older));
        let keys =
            KeyUsage { keyring: keyring.clone(), cache: cache.clone(), pending: pending.clone() };
        let (trust, keyring_health) = (Trust::default(), KeyringHealth::default());
        let keyring_watch = config.keyring_file.clone().map(|file| {
            Arc::new(KeyringWatch {
                file,
                usage: keys.clone(),
                trust: trust.clone(),
                journal: journal.clone(),
                clock: config.clock.clone(),
                health: keyring_health.clone(),
                recording: Mutex::default(),
            })
        });
        let loader = AccountLoader::new(
            pool.clone(),
            keyring,
            cache.clone(),
            feed_health.clone(),
            database_clock.clone(),
            config.time_limits(),
        );
        let tls = settings.tls.clone();
        Ok(Self {
            database,
            unverified_database,
            gate,
            pool,
            cache,
            directory: Arc::new(CallerDirectory::default()),
            connectivity: Arc::new(DatabaseConnectivity::new(settings.new_token_ends_older)),
            feed_health,
            outage: Arc::default(),
            trust,
            keys,
            pending,
            keyring_watch,
            keyring_health,
            loader: Arc::new(loader),
            journal,
            metrics: Arc::new(Metrics::new(env!("CARGO_PKG_VERSION"))),
            upstream: UpstreamClient::new(settings.upstream_client(), config.clock.clone())?,
            tls: tls.map(|files| Tls::load(files, config.clock.clone())).transpose()?.map(Arc::new),
            upstream_skew_ms: Arc::new(AtomicI64::new(UNKNOWN_SKEW)),
            serving: Arc::new(AtomicBool::new(false)),
            failed: CancellationToken::new(),
            clock: config.clock.clone(),
            database_clock,
        })
    }
}
