//! Follows what admins and other replicas commit to the database.
//!
//! The feed polls the database; a notification starts the next poll at once. Each poll seals client
//! secrets that admins have written, loads the accounts and callers that have changed, asks the refresher
//! to reschedule the accounts, and writes the changes into the audit journal. The feed also stores this
//! replica's heartbeat, and reports to [`DatabaseConnectivity`] whether the database answers.

use std::{sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{
    audit::{
        journal::Journal,
        record::{Event, Record},
    },
    crypto::{Keyring, SEALED_PREFIX},
    domain::{
        account::AccountId,
        clock::{Clock, Timestamp},
        secret::ClientSecret,
    },
    services::{
        account_cache::AccountCache, account_loader::AccountLoader,
        caller_directory::CallerDirectory, connectivity::DatabaseConnectivity,
        refresher::RefreshTrigger,
    },
    store::{
        Database, StoreError,
        accounts::{self, Intake},
        callers,
        changes::{self, Change, ChangeListener},
        deployment::DatabaseIdentity,
        instances::{self, Heartbeat},
        leases, within,
    },
};

/// The pause between two polls; a notification ends it early. An admin's statement must take effect within
/// a second even if its notification is lost.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// The pause before a lost listening connection is opened again.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);
/// How long [`ChangeFeed::run`] tries to store, at its end, that this instance has stopped.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// The pause between two heartbeats. Each also stores when accounts were last requested.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
/// A replica whose last heartbeat is older than this (three intervals) counts as stopped.
const ABSENT_AFTER: Duration = Duration::from_secs(30);
/// The most accounts whose time of the last request is stored by one statement.
const REQUESTS_BATCH: usize = 500;
/// The most changes that are claimed for the audit journal at once.
const CHANGES_BATCH: i64 = 500;
/// How long the records of one such batch may take to become durable.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);

/// What a replica reports about itself in its heartbeat.
#[derive(Clone, Debug)]
pub struct ReplicaIdentity {
    /// The id of the instance, which belongs to its state directory.
    pub instance: String,
    /// The number of the replica, which is part of the generations of its tokens.
    pub replica: u16,
    /// The ids of the keys in its keyring.
    pub key_ids: Vec<String>,
    /// When the process started.
    pub started_at: Timestamp,
}

/// Whether this instance has claimed changes in the database that may be missing in its journal, so that
/// it must claim them again to record them.
///
/// Audit records in Postgres contain the ids of their changes. So once all records of the journal have been
/// delivered, a claimed change without an audit record is known to be missing in the journal. Until then, no
/// changes are claimed.
#[derive(Clone, Copy, Debug)]
enum Reclaim {
    /// Every claimed change is in the journal.
    NotNeeded,
    /// Recording was interrupted, and it is not known which changes were claimed.
    Needed,
    /// Changes are claimed again once Postgres has all records of earlier processes, and this many of the
    /// present one.
    AfterDelivery(u64),
}

/// The task that follows the database, with its dependencies.
pub struct ChangeFeed {
    /// What this replica reports about itself.
    pub replica: ReplicaIdentity,
    /// The options for the connections that listen and probe.
    pub database: Database,
    /// The identity that the database must keep.
    pub database_identity: DatabaseIdentity,
    /// The pool for all other statements.
    pub pool: PgPool,
    /// Opens values that `account seal` has sealed, and seals secrets for their rows.
    pub keyring: Arc<Keyring>,
    /// Loads changed accounts into the cache.
    pub loader: Arc<AccountLoader>,
    /// The accounts, with the times at which they were last requested.
    pub cache: Arc<AccountCache>,
    /// The callers, which the feed replaces.
    pub directory: Arc<CallerDirectory>,
    /// Receives whether the database answers.
    pub connectivity: Arc<DatabaseConnectivity>,
    /// Asks the refresher to reschedule a changed account.
    pub refresh: RefreshTrigger,
    /// The audit journal, in which changes are recorded.
    pub journal: Journal,
    /// The clock by which callers are confirmed and requests are selected.
    pub clock: Clock,
}

impl ChangeFeed {
    /// Loads all accounts and callers, and returns the snapshot from which [`Self::run`] continues. It must
    /// complete before calls are served.
    ///
    /// # Errors
    /// Returns the database's error.
    pub async fn start(&self) -> Result<String, StoreError> {
        let snapshot = changes::snapshot(&self.pool).await?;
        // Only one process at a time can lock the state directory that the instance belongs to, so the
        // leases of an earlier process have no holder.
        leases::release_all(&self.pool, &self.replica.instance).await?;
        self.seal_intake().await?;
        let accounts = self.loader.load_all().await?;
        self.load_callers().await?;
        // This replica and the others must know of each other before a token is issued.
        self.send_heartbeat().await?;
        info!(accounts, "accounts and callers are loaded");
        Ok(snapshot)
    }

    /// Follows the database from `snapshot` until `stop` is cancelled. Returns earlier only if the database
    /// was replaced by another one; the broker must then stop.
    pub async fn run(self, snapshot: String, stop: CancellationToken) {
        let notified = Notify::new();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.listen(&notified) => {}
            () = self.poll(snapshot, &notified) => {}
            () = self.keep_alive() => {}
        }
        let stopped = instances::mark_stopped(&self.pool, &self.replica.instance);
        if !matches!(timeout(STOP_TIMEOUT, stopped).await, Ok(Ok(()))) {
            debug!("cannot store in the database that this instance has stopped");
        }
    }

    /// Forwards notifications of the database to `notified`. Never returns.
    async fn listen(&self, notified: &Notify) {
        loop {
            if let Ok(mut listener) = ChangeListener::connect(&self.database).await {
                // Notifications were lost while there was no connection, so poll once.
                notified.notify_one();
                while listener.wait().await.is_ok() {
                    notified.notify_one();
                }
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }

    /// Polls until the database has been replaced by another one.
    async fn poll(&self, mut snapshot: String, notified: &Notify) {
        // An earlier process may have claimed changes and ended before it had recorded them.
        let mut reclaim = Reclaim::AfterDelivery(0);
        loop {
            match self.poll_once(&mut snapshot, &mut reclaim).await {
                Ok(()) => {}
                Err(error @ StoreError::Replaced(_)) => {
                    error!(%error, "the broker stops, since its cached accounts and tokens may be outdated");
                    return;
                }
                Err(error) => self.report_failure(&error).await,
            }
            tokio::select! {
                () = tokio::time::sleep(POLL_INTERVAL) => {}
                () = notified.notified() => {}
            }
        }
    }

    /// Reports a failed poll to `connectivity`.
    ///
    /// The database counts as lost only if the server does not answer at all, since a replica may then issue
    /// without leases. A refused statement, for example because of a missing privilege, proves that the
    /// server answers. A lost session or a statement that took too long proves nothing, so the server is
    /// probed. The probe tells why no connection can be opened, for example because of the password.
    async fn report_failure(&self, error: &StoreError) {
        if !error.may_be_outage() {
            return self.connectivity.mark_failing(&error.to_string());
        }
        match self.database.probe().await {
            Ok(()) => self.connectivity.mark_failing(&error.to_string()),
            Err(why) if why.may_be_outage() => self.connectivity.mark_lost(&why.to_string()),
            Err(why) => self.connectivity.mark_failing(&why.to_string()),
        }
    }

    /// Loads all changes that were committed since `snapshot`, which advances only after all of them were
    /// loaded. Then records the changes in the journal, unless `reclaim` requires to wait.
    async fn poll_once(
        &self,
        snapshot: &mut String,
        reclaim: &mut Reclaim,
    ) -> Result<(), StoreError> {
        self.seal_intake().await?;
        let committed =
            within(changes::since(&self.pool, snapshot, &self.database_identity)).await?;
        if !committed.accounts.is_empty() {
            self.loader.load(&committed.accounts).await?;
            for id in &committed.accounts {
                self.refresh.wake(AccountId(*id));
            }
        }
        if committed.access {
            self.load_callers().await?;
        }
        *snapshot = committed.snapshot;
        self.directory.confirm(self.clock.now());
        self.connectivity.mark_connected();
        let again = match *reclaim {
            Reclaim::NotNeeded if !committed.unrecorded => return Ok(()),
            Reclaim::NotNeeded => false,
            Reclaim::Needed => {
                *reclaim = Reclaim::AfterDelivery(self.journal.stats().appended);
                return Ok(());
            }
            Reclaim::AfterDelivery(count) if !self.has_delivered(count) => return Ok(()),
            Reclaim::AfterDelivery(_) => true,
        };
        // This remains set if recording fails or is cancelled.
        *reclaim = Reclaim::Needed;
        self.record_changes(again).await?;
        *reclaim = Reclaim::NotNeeded;
        Ok(())
    }

    /// Returns whether the first `count` records of this process, and all of earlier ones, are in Postgres.
    fn has_delivered(&self, count: u64) -> bool {
        let stats = self.journal.stats();
        let delivered = stats.durable.saturating_sub(stats.undelivered);
        self.journal.earlier_chains_delivered() && delivered + stats.failed >= count
    }

    async fn load_callers(&self) -> Result<(), StoreError> {
        self.directory.replace(within(callers::load(&self.pool)).await?);
        self.directory.confirm(self.clock.now());
        Ok(())
    }

    /// Seals the client secrets in the intake column, and empties the column.
    async fn seal_intake(&self) -> Result<(), StoreError> {
        let mut sealed = 0;
        loop {
            let batch =
                within(accounts::seal_intake(&self.pool, |intake| self.seal(intake))).await?;
            if batch == 0 {
                break;
            }
            sealed += batch;
        }
        if sealed > 0 {
            info!(accounts = sealed, "secrets were sealed and the intake column emptied");
        }
        Ok(())
    }

    /// Seals the value of an intake column for its row, or returns why the value is refused, without quoting
    /// it.
    fn seal(&self, intake: &Intake) -> Result<Vec<u8>, String> {
        let secret = if intake.value.starts_with(SEALED_PREFIX) {
            let opened = self.keyring.open_intake(&intake.client_id, &intake.value);
            opened.map_err(|error| error.to_string())?
        } else {
            ClientSecret::new(&intake.value).map_err(|error| error.to_string())?
        };
        Ok(self.keyring.seal_secret(intake.id, intake.version, &secret))
    }

    /// Claims changes and appends their records to the journal until none are left. With `reclaim`, claims
    /// only one batch, which includes the changes that this instance has claimed before.
    async fn record_changes(&self, reclaim: bool) -> Result<(), StoreError> {
        loop {
            let claimed =
                changes::claim(&self.pool, &self.replica.instance, reclaim, CHANGES_BATCH);
            let claimed = within(claimed).await?;
            let more = claimed.len() >= usize::try_from(CHANGES_BATCH).unwrap_or(usize::MAX);
            let records: Vec<_> = claimed
                .into_iter()
                .map(|change| self.journal.append(audit_record(&change)))
                .collect();
            let until = Instant::now() + RECORD_TIMEOUT;
            for appended in records {
                // After a timeout the journal still writes the record later: only records of calls may be
                // dropped.
                let _ = appended.durable(until.saturating_duration_since(Instant::now())).await;
            }
            // Claiming again would return the same full batch. The rest is recorded after the next start.
            if !more || reclaim {
                return Ok(());
            }
        }
    }

    /// Sends a heartbeat at each interval. Never returns.
    async fn keep_alive(&self) {
        loop {
            tokio::time::sleep(HEARTBEAT_INTERVAL).await;
            match within(self.send_heartbeat()).await {
                Ok(()) => {}
                // The next poll detects whether the database answers.
                Err(error) if error.may_be_outage() => {
                    debug!(%error, "the heartbeat cannot be stored");
                }
                Err(error) => {
                    warn!(%error, "the database refuses the heartbeat: other replicas do not see this one");
                    self.connectivity.heartbeat_refused();
                }
            }
        }
    }

    /// Stores a heartbeat and the times at which accounts were last requested from this replica, and counts
    /// the other replicas.
    async fn send_heartbeat(&self) -> Result<(), StoreError> {
        let heartbeat = Heartbeat {
            instance: &self.replica.instance,
            replica: self.replica.replica,
            version: env!("CARGO_PKG_VERSION"),
            key_ids: &self.replica.key_ids,
            started_at: self.replica.started_at,
            chain: &self.journal.chain().chain,
            seq: self.journal.head().seq,
        };
        let (ids, moments) = self.requests_since(self.clock.now() - 2 * HEARTBEAT_INTERVAL);
        instances::store_heartbeat(&self.pool, &heartbeat).await?;
        let others = instances::count_others(&self.pool, heartbeat.instance, ABSENT_AFTER).await?;
        self.connectivity.heartbeat_stored(others);
        for (ids, moments) in ids.chunks(REQUESTS_BATCH).zip(moments.chunks(REQUESTS_BATCH)) {
            accounts::note_requests(&self.pool, ids, moments).await?;
        }
        Ok(())
    }

    /// Returns the ids of the accounts that were last requested at or after `since`, and these times in the
    /// same order.
    fn requests_since(&self, since: Timestamp) -> (Vec<i64>, Vec<Timestamp>) {
        let since = since.timestamp_millis();
        self.cache
            .all()
            .iter()
            .filter(|account| account.requested_ms() >= since)
            .filter_map(|account| {
                let requested = Timestamp::from_timestamp_millis(account.requested_ms())?;
                Some((account.id().0, requested))
            })
            .unzip()
    }
}

/// Returns the audit record of a change.
fn audit_record(change: &Change) -> Record {
    let event = match (change.table.as_str(), change.operation.as_str()) {
        ("accounts", "insert") => Event::AccountRegistered,
        ("accounts", "delete") => Event::AccountRemoved,
        ("accounts", _) => Event::AccountChanged,
        ("grants", _) => Event::GrantChanged,
        ("audit_events", _) => Event::AuditPruned,
        ("audit_chains", _) => Event::ChainRetired,
        ("audit_retention", _) => Event::RetentionChanged,
        _ => Event::CallerChanged,
    };
    let mut record = Record::new(change.at, event)
        .with("change_id", change.id.to_string())
        .with("table", &change.table)
        .with("operation", &change.operation);
    record = match change.table.as_str() {
        "accounts" => record.requested_account(&change.subject),
        "audit_events" => record.with("day", &change.subject),
        "audit_chains" => record.with("chain", &change.subject),
        "audit_retention" => record,
        _ => record.with("caller", &change.subject),
    };
    for (key, value) in &change.detail {
        record = record.with(key, value);
    }
    record
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chrono::DateTime;

    use super::*;

    fn change(table: &str, operation: &str) -> Change {
        Change {
            id: 7,
            at: DateTime::UNIX_EPOCH,
            table: table.into(),
            operation: operation.into(),
            subject: "acme".into(),
            detail: BTreeMap::from([("session_user".into(), "jane".into())]),
        }
    }

    #[test]
    fn a_change_is_recorded_as_the_event_of_its_table_with_the_login_that_made_it() {
        for (table, operation, event) in [
            ("accounts", "insert", "account_registered"),
            ("accounts", "update", "account_changed"),
            ("accounts", "delete", "account_removed"),
            ("callers", "insert", "caller_changed"),
            ("caller_credentials", "delete", "caller_changed"),
            ("grants", "update", "grant_changed"),
            ("audit_events", "prune", "audit_pruned"),
            ("audit_chains", "retire", "chain_retired"),
            ("audit_retention", "update", "retention_changed"),
        ] {
            let record = audit_record(&change(table, operation));
            assert_eq!(record.event.as_str(), event);
            assert_eq!(record.detail["session_user"], "jane");
            assert_eq!(record.detail["change_id"], "7");
        }
    }
}
