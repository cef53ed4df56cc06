//! The changes that were committed since a snapshot, the changes to record in the audit log, and the
//! notifications that announce both.

use std::{collections::BTreeMap, io};

use sqlx::{PgPool, postgres::PgListener};

use tracing::instrument;

use super::{Database, StoreError, deployment::DatabaseIdentity, tokens};
use crate::domain::clock::Timestamp;

/// The channel on which the triggers announce changes.
const CHANNEL: &str = "token_broker_changes";

/// The changes that were committed between two snapshots.
#[derive(Debug)]
pub struct CommittedChanges {
    /// The later snapshot, as `pg_snapshot` text, from which the next call continues.
    pub snapshot: String,
    /// The ids of accounts that were inserted, changed or deleted, or whose token or refresh state
    /// changed; sorted, each once.
    pub accounts: Vec<i64>,
    /// Whether callers, credentials or grants changed.
    pub access: bool,
    /// Whether there are changes that no instance has claimed for the audit log yet.
    pub unrecorded: bool,
}

/// Returns the present snapshot, from which [`since`] can continue. Take it before loading accounts, so that
/// [`since`] returns what is committed during the load.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn snapshot(pool: &PgPool) -> Result<String, StoreError> {
    let snapshot = sqlx::query_scalar!(
        r#"-- store::changes::snapshot
        select pg_current_snapshot()::text as "snapshot!""#
    )
    .fetch_one(pool)
    .await?;
    Ok(snapshot)
}

/// Returns the changes that were committed after `snapshot` was taken.
///
/// A row is new if its transaction is not visible in the snapshot. Its time or id would not be enough: with
/// them, a transaction that commits late could be missed. Rows that were restored from another server's dump
/// may have transaction ids from the future of this server. They were loaded at the start, and are ignored
/// here.
///
/// # Errors
/// Returns [`StoreError::Replaced`] if the database's identity is not `expected`, or the database is in a
/// state from before `snapshot`; otherwise the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn since(
    pool: &PgPool,
    snapshot: &str,
    expected: &DatabaseIdentity,
) -> Result<CommittedChanges, StoreError> {
    let rows = sqlx::query!(
        r#"-- store::changes::since
        with latest as (select pg_current_snapshot() as now, $1::text::pg_snapshot as before),
        touched as (
            select changed, table_name as source, row_id from changes
            union all select changed, 'accounts', account_id from tokens
            union all select changed, 'accounts', account_id from refreshes
        )
        select distinct source, row_id, null::text as snapshot, null::boolean as unrecorded,
            null::boolean as elsewhere, null::boolean as earlier
        from touched, latest
        where changed >= pg_snapshot_xmin((select before from latest))
            and changed < pg_snapshot_xmax((select now from latest))
            and not pg_visible_in_snapshot(changed, before)
        union all
        select null, null, now::text,
            exists (select from changes where audited_at is null and recorder is null),
            not exists (select from deployment p, pg_control_system() c, pg_database d
                where p.id = $2 and p.epoch = $3 and p.system_identifier = c.system_identifier
                    and d.datname = current_database() and p.database_oid = d.oid::bigint),
            pg_snapshot_xmax(now) < pg_snapshot_xmax(before)
        from latest"#,
        snapshot,
        expected.id,
        expected.epoch,
    )
    .fetch_all(pool)
    .await?;
    let mut committed = CommittedChanges {
        snapshot: snapshot.to_owned(),
        accounts: Vec::new(),
        access: false,
        unrecorded: false,
    };
    for row in rows {
        match (row.source.as_deref(), row.row_id) {
            (Some("accounts"), Some(id)) => committed.accounts.push(id),
            // These tables are not cached. Their changes are only recorded in the audit log.
            (Some("audit_events" | "audit_chains" | "audit_retention"), _) => {}
            (Some(_), _) => committed.access = true,
            (None, _) if row.elsewhere.unwrap_or_default() => {
                return Err(StoreError::Replaced(
                    "another one is in its place, or it was accepted as \
                    restored by another replica",
                ));
            }
            (None, _) if row.earlier.unwrap_or_default() => {
                return Err(StoreError::Replaced("it went back in time"));
            }
            (None, _) => {
                committed.snapshot = row.snapshot.unwrap_or(committed.snapshot);
                committed.unrecorded = row.unrecorded.unwrap_or_default();
            }
        }
    }
    committed.accounts.sort_unstable();
    committed.accounts.dedup();
    Ok(committed)
}

/// A change to accounts, access or the audit log's retention, as its trigger recorded it.
#[derive(Debug)]
pub struct Change {
    /// The number of the row in `changes`.
    pub id: i64,
    /// When the trigger recorded the change.
    pub at: Timestamp,
    /// The table: `accounts`, `callers`, `caller_credentials`, `grants`, `audit_events`, `audit_chains`
    /// or `audit_retention`.
    pub table: String,
    /// `insert`, `update` or `delete`; `prune` for the removal of a day's events, `retire` for a chain.
    pub operation: String,
    /// The name of the account, caller or chain that was changed, or the day that was removed.
    pub subject: String,
    /// The login that made the change and the changed values, never secrets.
    pub detail: BTreeMap<String, String>,
}

/// Claims up to `limit` changes for recording in the journal of `instance`, and returns them in order. These
/// are changes that no instance has claimed. With `reclaim`, they include changes that this instance has
/// claimed before and that are not in the audit log.
///
/// No other instance can claim a claimed change, since only the journal of the first one shows whether the
/// change was recorded. Use `reclaim` only after all records of the journal have been delivered.
///
/// # Errors
/// Returns the database's error. If the connection was lost, the claim may have been committed.
#[instrument(level = "debug", skip_all, fields(reclaim))]
pub async fn claim(
    pool: &PgPool,
    instance: &str,
    reclaim: bool,
    limit: i64,
) -> Result<Vec<Change>, StoreError> {
    let rows = sqlx::query!(
        r#"-- store::changes::claim
        with mine as (
            select id from changes
            where audited_at is null and (recorder is null or ($2 and recorder = $1))
            order by id limit $3 for update skip locked
        )
        update changes c set recorder = $1 from mine where c.id = mine.id
        returning c.id, c.at, c.table_name, c.operation, c.subject, c.session_user_name,
            c.client_address, c.application_name, c.actor, c.reason,
            c.what as "what: sqlx::types::Json<BTreeMap<String, String>>""#,
        instance,
        reclaim,
        limit,
    )
    .fetch_all(pool)
    .await?;
    let mut changes: Vec<_> = rows
        .into_iter()
        .map(|row| {
            let mut detail = row.what.0;
            let who = [
                ("session_user", Some(row.session_user_name)),
                ("client_address", row.client_address),
                ("application", row.application_name),
                ("actor", row.actor),
                ("reason", row.reason),
            ];
            detail
                .extend(who.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))));
            Change {
                id: row.id,
                at: row.at,
                table: row.table_name,
                operation: row.operation,
                subject: row.subject,
                detail,
            }
        })
        .collect();
    changes.sort_by_key(|change| change.id);
    Ok(changes)
}

/// A session that listens for the notifications of changes and of new tokens. A notification has no
/// content: it means that the next poll will find changes. If one is lost, they are found by the next
/// regular poll.
pub struct ChangeListener {
    listener: PgListener,
    /// The database, whose guard remembers changes as soon as they are announced.
    database: Database,
}

impl ChangeListener {
    /// Opens a connection of its own and starts to listen.
    ///
    /// # Errors
    /// Returns the database's error.
    #[instrument(level = "debug", skip_all)]
    pub async fn connect(database: &Database) -> Result<Self, StoreError> {
        let pool = database.pool_of_present_url().await;
        let mut listener = PgListener::connect_with(&pool).await?;
        // A new listener takes the URL that is valid then.
        listener.eager_reconnect(false);
        listener.listen_all([CHANNEL, tokens::CHANNEL]).await?;
        Ok(Self { listener, database: database.clone() })
    }

    /// Waits for a notification. Cancel safe.
    ///
    /// # Errors
    /// When the connection is lost. Create a new listener then, after a pause.
    pub async fn wait(&mut self) -> Result<(), StoreError> {
        match self.listener.try_recv().await? {
            Some(_) => {
                self.database.note_change();
                Ok(())
            }
            None => Err(sqlx::Error::Io(io::ErrorKind::UnexpectedEof.into()).into()),
        }
    }
}
