//! The dependencies of issuing, in three groups: settings, infrastructure and shared state.

use std::sync::{Arc, atomic::AtomicI64};

use ipnet::IpNet;
use sqlx::PgPool;

use super::{outage::Outage, pending::PendingTokens};
use crate::{
    audit::journal::Journal,
    crypto::LiveKeyring,
    domain::clock::Clock,
    services::{
        account_cache::AccountCache, account_loader::AccountLoader,
        connectivity::DatabaseConnectivity, database_clock::DatabaseClock,
    },
    store::leases::LeaseHolder,
    telemetry::Metrics,
    upstream::UpstreamClient,
};

/// The settings of issuing.
#[derive(Clone, Debug)]
pub struct IssueSettings {
    /// This replica as a holder of leases, with the refresh policy and the limits of all replicas.
    pub holder: LeaseHolder,
    /// Whether the upstream ends older tokens when it issues a new one.
    pub new_token_ends_older: bool,
    /// The networks that should contain a token's allowed address; empty if any address is expected.
    pub expected_egress: Vec<IpNet>,
}

/// The infrastructure: database, upstream, audit log, keys, clock and metrics.
pub struct IssueInfrastructure {
    /// The database.
    pub pool: PgPool,
    /// Opens client secrets and seals tokens.
    pub keyring: Arc<LiveKeyring>,
    /// Issues tokens.
    pub upstream: UpstreamClient,
    /// Records issues and failures.
    pub journal: Journal,
    /// The local clock.
    pub clock: Clock,
    /// The database's clock, by which generations are numbered.
    pub database_clock: Arc<DatabaseClock>,
    /// Counts issues by their result.
    pub metrics: Arc<Metrics>,
    /// How far the upstream's clock was ahead of the local one at the last issue, in milliseconds. The
    /// issuer sets it.
    pub upstream_skew_ms: Arc<AtomicI64>,
}

/// State that the refresher shares with the rest of the broker.
pub struct IssueState {
    /// The accounts, whose snapshots show the results of attempts.
    pub cache: Arc<AccountCache>,
    /// Loads an account into the cache when the cached one turns out to be outdated.
    pub loader: Arc<AccountLoader>,
    /// Whether the database answers.
    pub connectivity: Arc<DatabaseConnectivity>,
    /// The tokens that are not stored yet.
    pub pending: Arc<PendingTokens>,
    /// Whether the upstream is in an outage.
    pub outage: Arc<Outage>,
}
