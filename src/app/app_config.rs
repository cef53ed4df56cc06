//! The configuration of a broker: the operator's settings, the keyring, and limits that are not settings.

use std::{num::NonZeroUsize, path::PathBuf, sync::Arc, thread, time::Duration};

use rustix::process::{Resource, getrlimit};

use crate::{
    audit::journal::JournalSettings,
    config::{DatabaseUrl, Settings},
    crypto::Keyring,
    domain::{
        clock::Clock,
        plausible_time::{AttemptTimeLimits, LEASE_BEYOND_ATTEMPT},
    },
    upstream::Target,
};

/// The number of connections in the pool that the refresher, the heartbeat and other tasks with short
/// statements share. Each duty of the change feed, its listener, the delivery of the journal and the guard of the
/// database's history use a connection of their own.
const POOL_CONNECTIONS: u32 = 10;
/// The number of connections in that pool when broker and database share a machine.
const LOCAL_POOL_CONNECTIONS: u32 = 5;
/// The size in bytes at which the journal starts another segment.
const JOURNAL_SEGMENT_BYTES: u64 = 64 << 20;
/// How long delivered segments of the journal are kept, so that operators can copy them.
const JOURNAL_RETENTION: Duration = Duration::from_hours(7 * 24);
/// The size in bytes of the undelivered records that the journal keeps in memory too.
const JOURNAL_MEMORY_BYTES: usize = 64 << 20;

/// The most connections of callers at once, if the process may have enough file descriptors.
const MAX_CONNECTIONS: usize = 10_000;
/// The most calls that wait for a token at once. Each takes about 20 KiB: 200 MiB in all.
const MAX_WAITING_CALLS: usize = 10_000;
/// The most `WatchTokens` streams at once. Each takes about 20 KiB too.
const MAX_STREAMS: usize = 10_000;
/// The longest [`AppConfig::shutdown_notice`]. It is a quarter of the drain if that is shorter.
const MAX_SHUTDOWN_NOTICE: Duration = Duration::from_secs(5);

/// The configuration of a broker.
#[derive(Debug)]
pub struct AppConfig {
    /// The operator's settings. `listen`, `ops_listen`, `keyring_file` and `log_format` are not used
    /// here: the command has acted on them already, or has copied them.
    pub settings: Settings,
    /// The keyring at the start.
    pub keyring: Arc<Keyring>,
    /// The keyring's file, which is read again when it changes; `None` if the keyring was not read from a file.
    pub keyring_file: Option<PathBuf>,
    /// Whether to apply missing migrations at the start, and to publish the keyring's intake key. Without it, a
    /// schema that is too old and a missing key are errors.
    pub migrate: bool,
    /// Whether to accept a database that differs from the one that this replica used last: see
    /// [`DatabaseMismatch`](super::DatabaseMismatch).
    pub accept_restored: bool,
    /// The number of connections in the pool that the refresher and other tasks with short statements
    /// share.
    pub pool_connections: u32,
    /// The size in bytes at which the journal starts another segment; at most a quarter of
    /// `settings.journal_max_bytes` is used.
    pub journal_segment_bytes: u64,
    /// The most connections of callers at once. Further ones wait until an earlier one is closed.
    pub max_connections: usize,
    /// The number of threads that serve connections.
    pub workers: NonZeroUsize,
    /// The most calls that wait for a token at once. Further ones are refused as `OVERLOADED`.
    pub max_waiting_calls: usize,
    /// The most `WatchTokens` streams at once. Further ones are refused as `OVERLOADED`.
    pub max_streams: usize,
    /// How long a stop goes on answering calls while health already says `NOT_SERVING`, so that load
    /// balancers stop sending new ones.
    pub shutdown_notice: Duration,
    /// The clock of all services. Tests set it.
    pub clock: Clock,
}

impl AppConfig {
    /// Returns the configuration of a broker that runs by `settings`.
    #[must_use]
    pub fn new(settings: Settings, keyring: Arc<Keyring>) -> Self {
        Self {
            migrate: false,
            accept_restored: false,
            pool_connections: POOL_CONNECTIONS,
            journal_segment_bytes: JOURNAL_SEGMENT_BYTES,
            max_connections: max_connections(getrlimit(Resource::Nofile).current),
            workers: thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            max_waiting_calls: MAX_WAITING_CALLS,
            max_streams: MAX_STREAMS,
            shutdown_notice: MAX_SHUTDOWN_NOTICE.min(settings.drain / 4),
            clock: Clock::System,
            keyring_file: Some(settings.keyring_file.clone()),
            settings,
            keyring,
        }
    }

    /// Returns the configuration of a broker on a developer's machine, as in `dev`, tests and benches. It
    /// has the default settings, except that an account may issue each second, that a stop drains for 5 s
    /// at most and does not wait for load balancers, that the pool is smaller, and that the keyring does not change.
    #[must_use]
    pub fn local(
        database_url: DatabaseUrl,
        upstream: Target,
        state_dir: PathBuf,
        keyring: Arc<Keyring>,
    ) -> Self {
        let keyring_file = state_dir.join("keyring");
        let settings = Settings {
            min_issue_interval: Duration::from_secs(1),
            drain: Duration::from_secs(5),
            ..Settings::with_defaults(database_url, keyring_file, upstream, state_dir)
        };
        Self {
            pool_connections: LOCAL_POOL_CONNECTIONS,
            shutdown_notice: Duration::ZERO,
            keyring_file: None,
            ..Self::new(settings, keyring)
        }
    }

    /// Returns the rules that bound the times of stored attempts.
    pub(super) fn time_limits(&self) -> AttemptTimeLimits {
        AttemptTimeLimits { policy: self.settings.refresh_policy() }
    }

    /// Returns how long a lease of this replica lasts.
    pub(super) fn lease_duration(&self) -> Duration {
        self.settings.upstream_timeout + LEASE_BEYOND_ATTEMPT
    }

    /// Returns the settings of the audit journal.
    pub(super) fn journal(&self) -> JournalSettings {
        let max_bytes = self.settings.journal_max_bytes;
        JournalSettings {
            sync: self.settings.audit_sync,
            segment_bytes: self.journal_segment_bytes.min(max_bytes / 4),
            max_bytes,
            retention: JOURNAL_RETENTION,
            memory_bytes: JOURNAL_MEMORY_BYTES,
        }
    }
}

/// Returns the most connections of callers for a process that may have `descriptors` open files, or any
/// number if that is `None`. Some descriptors are reserved for the journal, Postgres, the upstream and
/// `/metrics`. The result is at least 64 even if the limit is lower.
fn max_connections(descriptors: Option<u64>) -> usize {
    const RESERVED: usize = 256;
    let descriptors = descriptors.and_then(|most| usize::try_from(most).ok());
    descriptors
        .map_or(MAX_CONNECTIONS, |most| most.saturating_sub(RESERVED).clamp(64, MAX_CONNECTIONS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_files_and_other_connections() {
        assert_eq!(max_connections(None), 10_000);
        assert_eq!(max_connections(Some(u64::MAX)), 10_000);
        assert_eq!(max_connections(Some(1_024)), 768);
        assert_eq!(max_connections(Some(100)), 64);
    }
}
