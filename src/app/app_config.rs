//! What a broker is made of, and what the settings come to.

use std::{num::NonZeroUsize, path::PathBuf, sync::Arc, thread, time::Duration};

use ipnet::IpNet;
use rustix::process::Resource;

use crate::{
    audit::journal::{JournalSettings, SyncMode},
    config::{AuditSync, Settings},
    crypto::Keyring,
    domain::{clock::Clock, refresh_policy::RefreshPolicy},
    store::{Database, StoreError},
    tls::TlsFiles,
    upstream::{Settings as UpstreamSettings, Target},
};

/// Connections that refresh and following share; delivery has one of its own, and so has listening.
const CONNECTIONS: u32 = 10;
const LOCAL_CONNECTIONS: u32 = 5;
/// The size at which a journal segment is ended.
const SEGMENT: u64 = 64 << 20;
/// How long delivered segments are kept, for whoever ships them elsewhere too.
const KEPT: Duration = Duration::from_hours(7 * 24);

/// Connections at once, if there are descriptors for them.
const MOST_CONNECTIONS: usize = 10_000;
/// Calls that may wait for tokens at once: of some 20 KiB each, 200 MiB.
const MOST_WAITS: usize = 10_000;
/// Streams that may be open at once, of some 20 KiB each too.
const MOST_STREAMS: usize = 10_000;
/// How long callers and balancers are given to see that the broker is about to stop, at most.
const GRACE: Duration = Duration::from_secs(5);

/// All that a broker is made of.
pub struct AppConfig {
    /// Where the database is.
    pub database: Database,
    /// How many connections refresh and following share.
    pub connections: u32,
    /// Whether to bring the schema up to date first.
    pub migrate: bool,
    /// Whether to go on with a database that is not as it was left.
    pub accept_restored: bool,
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
    pub policy: RefreshPolicy,
    /// The audit journal.
    pub journal: JournalSettings,
    /// How long audit records are kept that are not changes; `None` for ever.
    pub audit_retention: Option<Duration>,
    /// How long those of changes are; no shorter.
    pub change_retention: Option<Duration>,
    /// What TLS is served with; without it, plain text.
    pub tls: Option<TlsFiles>,
    /// Whose connections begin with a header of the PROXY protocol.
    pub balancers: Vec<IpNet>,
    /// Whose SPIFFE IDs count.
    pub trust_domain: Option<Arc<str>>,
    /// Connections at once; more wait to be accepted.
    pub most_connections: usize,
    /// How many threads serve connections.
    pub workers: NonZeroUsize,
    /// Calls that may wait for tokens at once; more are shed.
    pub most_waits: usize,
    /// `WatchTokens` streams that may be open at once; more are shed.
    pub most_streams: usize,
    /// How long a stop lets callers find out, while they are still answered.
    pub grace: Duration,
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

impl AppConfig {
    /// The plan that `settings` ask for, with the keys of `keyring`.
    ///
    /// # Errors
    /// When the database's URL is malformed.
    pub fn new(
        settings: &Settings,
        keyring: Arc<Keyring>,
        migrate: bool,
        accept_restored: bool,
    ) -> Result<Self, StoreError> {
        let database = settings.database_url.database("token-broker")?;
        let target = settings.upstream.clone();
        let state_dir = settings.state_dir.clone();
        Ok(Self {
            connections: CONNECTIONS,
            migrate,
            accept_restored,
            upstream: UpstreamSettings {
                target: target.clone(),
                bind_address: settings.upstream_bind_address,
                proxy: settings.upstream_proxy.clone().map(|proxy| proxy.0),
                timeout: settings.upstream_timeout,
            },
            ends_older: settings.new_token_ends_older,
            upstream_rate: settings.upstream_rate,
            upstream_concurrency: settings.upstream_concurrency,
            expected_egress: settings.expected_egress.clone(),
            policy: RefreshPolicy {
                refresh_at: settings.refresh_at,
                min_issue_interval: settings.min_issue_interval,
            },
            journal: JournalSettings {
                sync: match settings.audit_sync {
                    AuditSync::Fsync => SyncMode::Fsync,
                    AuditSync::Write => SyncMode::Write,
                },
                segment_bytes: SEGMENT.min(settings.journal_max_bytes / 4),
                max_bytes: settings.journal_max_bytes,
                retention: KEPT,
            },
            audit_retention: settings.audit_retention,
            change_retention: settings.change_retention,
            tls: settings.tls.clone(),
            balancers: settings.proxy_protocol_from.clone(),
            trust_domain: settings.trust_domain.as_deref().map(Into::into),
            grace: GRACE.min(settings.drain / 4),
            caller_rate: settings.caller_rate,
            default_deadline: settings.deadline_default,
            longest_deadline: settings.deadline_max,
            drain: settings.drain,
            max_staleness: settings.max_authorization_staleness,
            ..Self::local(database, target, state_dir, keyring)
        })
    }

    /// The plan of a broker that is alone on its machine: it serves in plain text, may issue for an account
    /// each second, and stops at once, without giving callers time to find out.
    #[must_use]
    pub fn local(
        database: Database,
        target: Target,
        state_dir: PathBuf,
        keyring: Arc<Keyring>,
    ) -> Self {
        Self {
            database,
            connections: LOCAL_CONNECTIONS,
            migrate: false,
            accept_restored: false,
            state_dir,
            keyring,
            upstream: UpstreamSettings {
                target,
                bind_address: None,
                proxy: None,
                timeout: Duration::from_secs(10),
            },
            ends_older: true,
            upstream_rate: 20.0,
            upstream_concurrency: 8,
            expected_egress: Vec::new(),
            policy: RefreshPolicy { refresh_at: 0.75, min_issue_interval: Duration::from_secs(1) },
            journal: JournalSettings::default(),
            audit_retention: None,
            change_retention: None,
            tls: None,
            balancers: Vec::new(),
            trust_domain: None,
            most_connections: most_connections(
                rustix::process::getrlimit(Resource::Nofile).current,
            ),
            workers: thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            most_waits: MOST_WAITS,
            most_streams: MOST_STREAMS,
            grace: Duration::ZERO,
            caller_rate: 1_000,
            default_deadline: Duration::from_secs(5),
            longest_deadline: Duration::from_mins(1),
            drain: Duration::from_secs(5),
            max_staleness: Duration::from_hours(24),
            clock: Clock::System,
        }
    }
}

/// As many connections as the process may have descriptors for, beside its own: files, Postgres, the
/// upstream, operators.
fn most_connections(descriptors: Option<u64>) -> usize {
    const OWN: usize = 256;
    let descriptors = descriptors.and_then(|most| usize::try_from(most).ok());
    descriptors
        .map_or(MOST_CONNECTIONS, |most| most.saturating_sub(OWN).clamp(64, MOST_CONNECTIONS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_the_broker_s_own() {
        assert_eq!(most_connections(None), 10_000);
        assert_eq!(most_connections(Some(u64::MAX)), 10_000);
        assert_eq!(most_connections(Some(1_024)), 768);
        assert_eq!(most_connections(Some(100)), 64);
    }
}
