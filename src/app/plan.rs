//! What the settings come to.

use std::{sync::Arc, time::Duration};

use super::Plan;
use crate::{
    audit::journal::{JournalSettings, Sync},
    clock::Clock,
    config::{AuditSync, Settings},
    schedule::Policy,
    seal::Keyring,
    store::StoreError,
    upstream::Settings as UpstreamSettings,
};

/// Connections that refresh and following share; delivery has one of its own, and so has listening.
const CONNECTIONS: u32 = 10;
/// The size at which a journal segment is ended.
const SEGMENT: u64 = 64 << 20;
/// How long delivered segments are kept, for whoever ships them elsewhere too.
const KEPT: Duration = Duration::from_hours(7 * 24);

impl Plan {
    /// The plan that `settings` ask for, with the keys of `keyring`.
    ///
    /// # Errors
    /// When the database's URL is malformed.
    pub fn new(
        settings: &Settings,
        keyring: Arc<Keyring>,
        migrate: bool,
    ) -> Result<Self, StoreError> {
        Ok(Self {
            database: settings.database_url.database("token-broker")?,
            connections: CONNECTIONS,
            migrate,
            state_dir: settings.state_dir.clone(),
            keyring,
            upstream: UpstreamSettings {
                target: settings.upstream.clone(),
                bind_address: settings.upstream_bind_address,
                proxy: settings.upstream_proxy.clone().map(|proxy| proxy.0),
                timeout: settings.upstream_timeout,
            },
            ends_older: settings.new_token_ends_older,
            upstream_rate: settings.upstream_rate,
            upstream_concurrency: settings.upstream_concurrency,
            expected_egress: settings.expected_egress.clone(),
            policy: Policy {
                refresh_at: settings.refresh_at,
                min_issue_interval: settings.min_issue_interval,
            },
            journal: JournalSettings {
                sync: match settings.audit_sync {
                    AuditSync::Fsync => Sync::Fsync,
                    AuditSync::Write => Sync::Write,
                },
                segment_bytes: SEGMENT.min(settings.journal_max_bytes / 4),
                max_bytes: settings.journal_max_bytes,
                retention: KEPT,
            },
            caller_rate: settings.caller_rate,
            default_deadline: settings.deadline_default,
            longest_deadline: settings.deadline_max,
            drain: settings.drain,
            max_staleness: settings.max_authorization_staleness,
            clock: Clock::System,
        })
    }
}
