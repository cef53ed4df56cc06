//! Follows what admins and other replicas commit: seals what was written into the intake column,
//! loads what changed, wakes the refresher, and writes changes into the audit log.

use std::{sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

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
        deployment::Home,
        instances::{self, Heartbeat},
        leases, within,
    },
};

/// How often everything is looked at; a notification only makes it sooner. The contract promises
/// that an admin's statement takes effect within a second.
const POLL: Duration = Duration::from_millis(500);
/// The pause before a lost listening connection is made anew.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);
/// How often the replica tells that it lives, and when accounts were last asked for.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// A replica that has not told so for this long is not there: three heartbeats were missed.
const ABSENT_AFTER: Duration = Duration::from_secs(30);
/// For how many accounts that is told at once.
const NOTED: usize = 500;
/// How many changes are written into the audit log at once.
const CHANGES: i64 = 500;
/// How long these may take to become durable.
const RECORD_WITHIN: Duration = Duration::from_secs(5);

/// What a replica tells of itself.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The instance.
    pub instance: String,
    /// Its number in generations.
    pub replica: u16,
    /// The keys that its keyring holds.
    pub key_ids: Vec<String>,
    /// When it started.
    pub started_at: Timestamp,
}

/// Whether changes are to be taken again that this instance took before.
#[derive(Clone, Copy, Debug)]
enum Retake {
    /// Those that it took are in the journal.
    No,
    /// Taking was cut off by an error: what was taken is not known.
    Partitioned,
    /// Once so many records of this start, and all of earlier starts, are in Postgres.
    After(u64),
}

/// All that following needs.
pub struct ChangeFeed {
    /// Who we are.
    pub identity: Identity,
    /// Where to listen.
    pub database: Database,
    /// Which database that is.
    pub home: Home,
    /// Where to read.
    pub pool: PgPool,
    /// Opens what `account seal` sealed, and seals it for the row.
    pub keyring: Arc<Keyring>,
    /// Brings the cache to what the database has.
    pub loader: Arc<AccountLoader>,
    /// The accounts.
    pub cache: Arc<AccountCache>,
    /// The callers.
    pub directory: Arc<CallerDirectory>,
    /// Where it is told whether the database answers.
    pub reach: Arc<DatabaseConnectivity>,
    /// The refresher.
    pub waker: RefreshTrigger,
    /// The audit log.
    pub journal: Journal,
    /// Time.
    pub clock: Clock,
}

impl ChangeFeed {
    /// Loads everything once, and returns from where to follow. Call it before serving.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn start(&self) -> Result<String, StoreError> {
        let snapshot = changes::snapshot(&self.pool).await?;
        // The state directory is ours alone, so an earlier process of this instance is gone.
        leases::release_all(&self.pool, &self.identity.instance).await?;
        self.seal_intake().await?;
        let accounts = self.loader.load_all().await?;
        self.load_callers().await?;
        // Before anything is issued, the others can know that we are there, and we of them.
        self.tell().await?;
        info!(accounts, "accounts and callers are loaded");
        Ok(snapshot)
    }

    /// Follows from `snapshot` until `stop`.
    pub async fn run(self, snapshot: String, stop: CancellationToken) {
        let notified = Notify::new();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.listen(&notified) => {}
            () = self.poll(snapshot, &notified) => {}
            () = self.beat() => {}
        }
        let stopped = instances::stopped(&self.pool, &self.identity.instance);
        if !matches!(timeout(LISTEN_AGAIN, stopped).await, Ok(Ok(()))) {
            debug!("the end of this instance cannot be told to the database");
        }
    }

    /// Passes notifications on. Never ends.
    async fn listen(&self, notified: &Notify) {
        loop {
            if let Ok(mut listener) = ChangeListener::connect(&self.database).await {
                // What was committed while nobody listened is found by this look.
                notified.notify_one();
                while listener.wait().await.is_ok() {
                    notified.notify_one();
                }
            }
            tokio::time::sleep(LISTEN_AGAIN).await;
        }
    }

    /// Looks again and again. Ends when the database is not the same any more.
    async fn poll(&self, mut snapshot: String, notified: &Notify) {
        // What this instance took before it was stopped, and did not record, is taken again once.
        let mut retake = Retake::After(0);
        loop {
            match self.look(&mut snapshot, &mut retake).await {
                Ok(()) => {}
                Err(error @ StoreError::Replaced(_)) => {
                    error!(%error, "the broker ends: nothing that it knows may be true any more");
                    return;
                }
                Err(error) => self.reach.mark_lost(&error.to_string()),
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = notified.notified() => {}
            }
        }
    }

    /// One look at everything that was committed since `snapshot`, which moves on only when all of
    /// it was taken in.
    ///
    /// Whether changes that were taken for the audit log reached the journal can be said only once
    /// all that the journal held has arrived in Postgres: until then `retake` has none taken.
    async fn look(&self, snapshot: &mut String, retake: &mut Retake) -> Result<(), StoreError> {
        self.seal_intake().await?;
        let committed = within(changes::since(&self.pool, snapshot, &self.home)).await?;
        if !committed.accounts.is_empty() {
            self.loader.load(&committed.accounts).await?;
            for id in &committed.accounts {
                self.waker.wake(AccountId(*id));
            }
        }
        if committed.access {
            self.load_callers().await?;
        }
        *snapshot = committed.snapshot;
        self.directory.confirm(self.clock.now());
        self.reach.mark_connected();
        let again = match *retake {
            Retake::No if !committed.unrecorded => return Ok(()),
            Retake::No => false,
            Retake::Partitioned => {
                *retake = Retake::After(self.journal.stats().appended);
                return Ok(());
            }
            Retake::After(mark) if !self.has_delivered(mark) => return Ok(()),
            Retake::After(_) => true,
        };
        *retake = Retake::Partitioned;
        self.record_changes(again).await?;
        *retake = Retake::No;
        Ok(())
    }

    /// Whether `count` records of this start, and all of earlier ones, are in Postgres.
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

    /// Seals what an admin wrote for its row, or says why it cannot be.
    fn seal(&self, intake: &Intake) -> Result<Vec<u8>, String> {
        let secret = if intake.value.starts_with(SEALED_PREFIX) {
            let opened = self.keyring.open_intake(&intake.client_id, &intake.value);
            opened.map_err(|error| error.to_string())?
        } else {
            ClientSecret::new(&intake.value).map_err(|error| error.to_string())?
        };
        Ok(self.keyring.seal_secret(intake.id, intake.version, &secret))
    }

    /// Writes changes into the audit log until there are none left.
    async fn record_changes(&self, again: bool) -> Result<(), StoreError> {
        loop {
            let taken = changes::take(&self.pool, &self.identity.instance, again, CHANGES);
            let taken = within(taken).await?;
            let more = taken.len() >= usize::try_from(CHANGES).unwrap_or(usize::MAX);
            let records: Vec<_> =
                taken.into_iter().map(|change| self.journal.append(record(&change))).collect();
            let until = Instant::now() + RECORD_WITHIN;
            for appended in records {
                // A record that is not a call is kept until it can be written.
                let _ = appended.durable(until.saturating_duration_since(Instant::now())).await;
            }
            // Taken again, a full batch would be the same one: the rest waits for the next start.
            if !more || again {
                return Ok(());
            }
        }
    }

    /// Tells again and again that the replica lives, and when accounts were last asked for. Never
    /// ends.
    async fn beat(&self) {
        loop {
            tokio::time::sleep(HEARTBEAT).await;
            if let Err(error) = within(self.tell()).await {
                debug!(%error, "the heartbeat cannot be told");
            }
        }
    }

    async fn tell(&self) -> Result<(), StoreError> {
        let beat = Heartbeat {
            instance: &self.identity.instance,
            replica: self.identity.replica,
            version: env!("CARGO_PKG_VERSION"),
            key_ids: &self.identity.key_ids,
            started_at: self.identity.started_at,
            chain: &self.journal.chain().chain,
            seq: self.journal.head().seq,
        };
        let (ids, moments) = self.requests_since(self.clock.now() - 2 * HEARTBEAT);
        instances::beat(&self.pool, &beat).await?;
        self.reach
            .heartbeat_stored(instances::others(&self.pool, beat.instance, ABSENT_AFTER).await?);
        for (ids, moments) in ids.chunks(NOTED).zip(moments.chunks(NOTED)) {
            accounts::note_requests(&self.pool, ids, moments).await?;
        }
        Ok(())
    }

    /// The accounts that were asked for since `since`, and when.
    fn requests_since(&self, since: Timestamp) -> (Vec<i64>, Vec<Timestamp>) {
        let since = since.timestamp_millis();
        self.cache
            .all()
            .iter()
            .filter(|slot| slot.requested_ms() >= since)
            .filter_map(|slot| {
                Some((slot.id().0, Timestamp::from_timestamp_millis(slot.requested_ms())?))
            })
            .unzip()
    }
}

/// The audit record of a change.
fn record(change: &Change) -> Record {
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
    fn a_change_becomes_the_event_of_its_table_with_who_made_it() {
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
            let record = record(&change(table, operation));
            assert_eq!(record.event.as_str(), event);
            assert_eq!(record.detail["session_user"], "jane");
            assert_eq!(record.detail["change_id"], "7");
        }
    }
}
