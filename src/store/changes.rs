//! Following what others commit, and the changes that become audit events.

use std::collections::BTreeMap;

use sqlx::{PgPool, postgres::PgListener};

use super::{Database, StoreError, deployment::Home, tokens};
use crate::domain::clock::Timestamp;

/// The channel on which the triggers tell of changes.
const CHANNEL: &str = "token_broker_changes";

/// What was committed since a snapshot.
#[derive(Debug)]
pub struct Committed {
    /// The snapshot up to which this tells, to be given to the next call.
    pub snapshot: String,
    /// Accounts that were inserted, changed, deleted, or whose token or attempt changed.
    pub accounts: Vec<i64>,
    /// Whether callers, credentials or grants changed.
    pub access: bool,
    /// Whether there are changes that no instance has taken for the audit log yet.
    pub unrecorded: bool,
}

/// The snapshot of this moment: the start for [`since`]. Take it before loading anything.
///
/// # Errors
/// When the database cannot be reached.
pub async fn snapshot(pool: &PgPool) -> Result<String, StoreError> {
    let snapshot = sqlx::query_scalar!(
        r#"-- store::changes::snapshot
        select pg_current_snapshot()::text as "snapshot!""#
    )
    .fetch_one(pool)
    .await?;
    Ok(snapshot)
}

/// What was committed after `snapshot` was taken.
///
/// Rows are told apart by whether their transaction was visible in the snapshot, not by time or
/// number: a transaction that commits late is not missed, and one that is still open holds nothing
/// up. Rows restored from another server's dump may carry transaction numbers of the future; those
/// were loaded at the start and are passed over.
///
/// # Errors
/// [`StoreError::Replaced`] when this is not `home` any more, or is in a state of before `snapshot`;
/// and when the database cannot be reached.
pub async fn since(pool: &PgPool, snapshot: &str, home: &Home) -> Result<Committed, StoreError> {
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
        home.id,
        home.epoch,
    )
    .fetch_all(pool)
    .await?;
    let mut committed = Committed {
        snapshot: snapshot.to_owned(),
        accounts: Vec::new(),
        access: false,
        unrecorded: false,
    };
    for row in rows {
        match (row.source.as_deref(), row.row_id) {
            (Some("accounts"), Some(id)) => committed.accounts.push(id),
            // Only to be recorded.
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

/// One change, as its trigger wrote it.
#[derive(Debug)]
pub struct Change {
    /// Its number.
    pub id: i64,
    /// When it was made.
    pub at: Timestamp,
    /// `accounts`, `callers`, `caller_credentials`, `grants`, `audit_events` or `audit_chains`.
    pub table: String,
    /// `insert`, `update` or `delete`; `prune` of a day's events, `retire` of a chain.
    pub operation: String,
    /// The name of the account, caller or chain, or the day.
    pub subject: String,
    /// Who and what, as flat strings.
    pub detail: BTreeMap<String, String>,
}

/// Takes up to `limit` changes for `instance` to record: those that nobody has taken, and, with
/// `again`, those that it took before and that did not reach the audit log.
///
/// A change stays with the instance that took it: only its journal can tell whether it was
/// recorded. Ask `again` only when all that the journal held before was delivered.
///
/// # Errors
/// When the database cannot be reached.
pub async fn take(
    pool: &PgPool,
    instance: &str,
    again: bool,
    limit: i64,
) -> Result<Vec<Change>, StoreError> {
    let rows = sqlx::query!(
        r#"-- store::changes::take
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
        again,
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

/// Listens for the notifications of changes and of tokens. Each only says: look now. Polling finds
/// all of it too.
pub struct ChangeListener(PgListener);

impl ChangeListener {
    /// Connects and listens.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn connect(database: &Database) -> Result<Self, StoreError> {
        let pool = database.pool(1);
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.listen_all([CHANNEL, tokens::CHANNEL]).await?;
        Ok(Self(listener))
    }

    /// Waits for a notification, or for the loss of the connection: both mean that it is time to
    /// look.
    ///
    /// # Errors
    /// When the connection cannot be made anew; connect again after a pause.
    pub async fn wait(&mut self) -> Result<(), StoreError> {
        self.0.try_recv().await?;
        Ok(())
    }
}
