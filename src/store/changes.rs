//! The changes that were committed since a snapshot, the changes to record in the audit log, and the
//! notifications that announce both.

use std::{collections::BTreeMap, io};

use sqlx::{PgExecutor, postgres::PgListener, types::Json};
use tracing::instrument;

use super::{
    Database, StoreError,
    lenient::{Lenient, LenientTime},
    tokens,
    trust::{Trust, TrustGate},
    within,
};
use crate::domain::clock::Timestamp;

/// The channel on which the triggers announce changes.
const CHANNEL: &str = "token_broker_changes";

/// What was announced in the table `changes` since a snapshot.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Announced {
    /// The present snapshot, as `pg_snapshot` text, from which the next call continues.
    pub snapshot: String,
    /// The ids of the accounts that were inserted, changed or deleted; sorted, each once.
    pub accounts: Vec<i64>,
    /// Whether callers, credentials or grants changed.
    pub access: bool,
    /// What was taken away, as far as `changes` alone tells it.
    pub withdrawn: Withdrawn,
}

/// What recorded changes took away, or may have taken away. It is known also while the tables themselves cannot
/// be read.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Withdrawn {
    /// The ids of accounts that are disabled.
    pub disabled_accounts: Vec<i64>,
    /// The ids of accounts that were deleted.
    pub deleted_accounts: Vec<i64>,
    /// The ids of callers that were disabled or deleted.
    pub callers: Vec<i64>,
    /// The ids of credentials that were changed or deleted.
    pub credentials: Vec<i64>,
    /// The ids of grants that were changed or deleted.
    pub grants: Vec<i64>,
}

/// The accounts of whose rows in a table the broker has written one since a snapshot.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Touched {
    /// The present snapshot, as `pg_snapshot` text, from which the next call continues.
    pub snapshot: String,
    /// The ids of the accounts, sorted, each once.
    pub accounts: Vec<i64>,
}

/// Returns the present snapshot, from which the functions below can continue. Take it before loading what
/// they follow, so that they return what is committed during the load. It says nothing about another
/// session: see [`Session`](super::Session).
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn snapshot(executor: impl PgExecutor<'_>) -> Result<String, StoreError> {
    let snapshot = sqlx::query_scalar!(
        r#"-- store::changes::snapshot
        select pg_current_snapshot()::text as "snapshot!""#
    )
    .fetch_one(executor)
    .await?;
    Ok(snapshot)
}

/// Returns the changes that admins committed after `snapshot` was taken, as the triggers announced them.
///
/// A row is new if its transaction is not visible in the snapshot. Its time or id would not be enough: with
/// them, a transaction that commits late could be missed. Rows that were restored from another server's dump
/// may have transaction ids from the future of this server. They were loaded when the session was opened,
/// and are ignored here.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn announced(
    executor: impl PgExecutor<'_>,
    snapshot: &str,
) -> Result<Announced, StoreError> {
    let row = sqlx::query!(
        r#"-- store::changes::announced
        with latest as (select pg_current_snapshot() as now, $1::text::pg_snapshot as before),
        touched as (
            select distinct on (table_name, row_id) table_name, row_id, operation = 'delete' as deleted,
                operation <> 'insert' as changed,
                what ->> 'state' like '% enabled=''f'' %' as disabled
            from changes, latest
            where changed >= pg_snapshot_xmin((select before from latest))
                and changed < pg_snapshot_xmax((select now from latest))
                and not pg_visible_in_snapshot(changed, before)
            order by table_name, row_id, id desc
        )
        select now::text as "snapshot!",
            array(select row_id from touched where table_name = 'accounts' order by row_id)
                as "accounts!",
            exists (select from touched where table_name in ('callers', 'caller_credentials', 'grants'))
                as "access!",
            array(select row_id from touched where table_name = 'accounts' and disabled and not deleted)
                as "disabled_accounts!",
            array(select row_id from touched where table_name = 'accounts' and deleted)
                as "deleted_accounts!",
            array(select row_id from touched where table_name = 'callers' and (deleted or disabled))
                as "callers!",
            array(select row_id from touched where table_name = 'caller_credentials' and changed)
                as "credentials!",
            array(select row_id from touched where table_name = 'grants' and changed) as "grants!"
        from latest"#,
        snapshot,
    )
    .fetch_one(executor)
    .await?;
    Ok(Announced {
        snapshot: row.snapshot,
        accounts: row.accounts,
        access: row.access,
        withdrawn: Withdrawn {
            disabled_accounts: row.disabled_accounts,
            deleted_accounts: row.deleted_accounts,
            callers: row.callers,
            credentials: row.credentials,
            grants: row.grants,
        },
    })
}

/// Returns the accounts whose token was stored after `snapshot` was taken, by the rule of [`announced`].
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn new_tokens(
    executor: impl PgExecutor<'_>,
    snapshot: &str,
) -> Result<Touched, StoreError> {
    let touched = sqlx::query_as!(
        Touched,
        r#"-- store::changes::new_tokens
        with latest as (select pg_current_snapshot() as now, $1::text::pg_snapshot as before)
        select now::text as "snapshot!",
            array(select account_id from tokens
                where changed >= pg_snapshot_xmin((select before from latest))
                    and changed < pg_snapshot_xmax((select now from latest))
                    and not pg_visible_in_snapshot(changed, before)
                order by account_id) as "accounts!"
        from latest"#,
        snapshot,
    )
    .fetch_one(executor)
    .await?;
    Ok(touched)
}

/// Returns the accounts whose refresh state changed after `snapshot` was taken, by the rule of
/// [`announced`].
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn new_refresh_states(
    executor: impl PgExecutor<'_>,
    snapshot: &str,
) -> Result<Touched, StoreError> {
    let touched = sqlx::query_as!(
        Touched,
        r#"-- store::changes::new_refresh_states
        with latest as (select pg_current_snapshot() as now, $1::text::pg_snapshot as before)
        select now::text as "snapshot!",
            array(select account_id from refreshes
                where changed >= pg_snapshot_xmin((select before from latest))
                    and changed < pg_snapshot_xmax((select now from latest))
                    and not pg_visible_in_snapshot(changed, before)
                order by account_id) as "accounts!"
        from latest"#,
        snapshot,
    )
    .fetch_one(executor)
    .await?;
    Ok(touched)
}

/// Returns whether there are changes that no instance has claimed for the audit log yet.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn any_unclaimed(executor: impl PgExecutor<'_>) -> Result<bool, StoreError> {
    let any = sqlx::query_scalar!(
        r#"-- store::changes::any_unclaimed
        select exists (select from changes where audited_at is null and recorder is null) as "any!""#
    )
    .fetch_one(executor)
    .await?;
    Ok(any)
}

/// A change to accounts, access or the audit log's retention, as its trigger recorded it.
#[derive(Debug)]
pub struct Change {
    /// The number of the row in `changes`.
    pub id: i64,
    /// When the trigger recorded the change; `None` if the row has no valid time.
    pub at: Option<Timestamp>,
    /// The table: `accounts`, `callers`, `caller_credentials`, `grants`, `audit_events`, `audit_chains`
    /// or `audit_retention`.
    pub table: String,
    /// `insert`, `update` or `delete`; `prune` for the removal of a day's events, `retire` for a chain, `baseline`
    /// for a row that a migration found.
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
    executor: impl PgExecutor<'_>,
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
        returning c.id, c.at as "at: LenientTime", c.table_name, c.operation, c.subject,
            c.session_user_name, c.client_address, c.application_name, c.actor, c.reason,
            c.what as "what: Lenient<Json<BTreeMap<String, String>>>""#,
        instance,
        reclaim,
        limit,
    )
    .fetch_all(executor)
    .await?;
    let mut changes: Vec<_> = rows
        .into_iter()
        .map(|row| {
            // A row that somebody inserted by hand must not prevent the others from being recorded.
            let unreadable = || Json(BTreeMap::from([("what".into(), "unreadable".into())]));
            let mut detail = row.what.or(()).unwrap_or_else(|()| unreadable()).0;
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
                at: row.at.or(()).ok(),
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
    /// The gate that admitted the connection, and the trust under which it did.
    trust: Option<(TrustGate, Trust)>,
}

impl ChangeListener {
    /// Opens a connection of its own and starts to listen.
    ///
    /// # Errors
    /// Returns the database's error.
    #[instrument(level = "debug", skip_all)]
    pub async fn connect(database: &Database) -> Result<Self, StoreError> {
        let trust = database.trust()?;
        let pool = database.pool_of_present_url().await;
        let listener = within(async {
            let mut listener = PgListener::connect_with(&pool).await?;
            // A new listener takes the URL that is valid then.
            listener.eager_reconnect(false);
            listener.listen_all([CHANNEL, tokens::CHANNEL]).await?;
            Ok(listener)
        });
        Ok(Self { listener: listener.await?, database: database.clone(), trust })
    }

    /// Waits for a notification. Cancel safe.
    ///
    /// # Errors
    /// When the connection is lost, or must not be used any more. Create a new listener then, after a pause.
    pub async fn wait(&mut self) -> Result<(), StoreError> {
        let trust = self.trust.clone();
        let untrusted = async {
            match trust {
                Some((gate, trust)) => {
                    gate.ended(trust).await;
                    gate.holds(trust)
                }
                None => std::future::pending().await,
            }
        };
        let received = tokio::select! {
            received = self.listener.try_recv() => received?,
            ended = untrusted => return ended,
        };
        match received {
            Some(_) => {
                self.database.note_change();
                Ok(())
            }
            None => Err(sqlx::Error::Io(io::ErrorKind::UnexpectedEof.into()).into()),
        }
    }
}
