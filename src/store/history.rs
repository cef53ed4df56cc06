//! What a database says of its history: which server it is in, how far it got, and whether it still has what
//! was seen in it before.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use tracing::instrument;

use super::{
    StoreError,
    deployment::{self, DeliveredChains, Deployment},
};
use crate::audit::chain::ChainHead;

/// How many of the newest changes are read when nothing is known of earlier ones.
const NEWEST_CHANGES: i64 = 64;
/// The most new changes that one reading returns, one for each transaction.
const NEW_CHANGES: i64 = 256;

/// Where a database is, and how far its server's write-ahead log got.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ServerPosition {
    /// The number that `initdb` gave to the server's data. Standbys have that of their primary.
    pub system_identifier: i64,
    /// The database's number in the server.
    pub database_oid: i64,
    /// When the server was started, in microseconds since 1970.
    pub started_at: i64,
    /// The timeline, which grows by one with each promotion and each recovery to a point in time; `None` if
    /// the server does not tell.
    pub timeline: Option<i64>,
    /// How many bytes of the write-ahead log were on disk; `None` if the server does not tell.
    pub wal: Option<i64>,
}

/// A row of `changes`, as it must remain.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SeenChange {
    /// The row's number.
    pub id: i64,
    /// The first 16 hexadecimal digits of a SHA-256 over the columns that never change.
    pub digest: String,
    /// Table, operation and subject, for people.
    pub what: String,
}

/// What of a database is to be read, because it was seen before.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// The names of the audit chains.
    pub chains: Vec<String>,
    /// The numbers of the changes.
    pub changes: Vec<i64>,
    /// Accounts with the generation that their stored token had.
    pub tokens: Vec<(i64, i64)>,
    /// The snapshot of the last reading in the same session.
    pub snapshot: Option<String>,
    /// What counts as stored in the table `deployment` if its row was deleted. Without it, such a database is
    /// refused.
    pub deployment: Option<Deployment>,
}

/// What a database says of its history.
#[derive(Clone, Debug)]
pub struct DatabaseHistory {
    /// The identity that is stored in the database.
    pub deployment: Deployment,
    /// Whether it is not stored, and [`Expected::deployment`] was taken instead.
    pub identity_is_missing: bool,
    /// The server and its position, which was read before everything else.
    pub server: ServerPosition,
    /// The last delivered record of each expected audit chain that the database has.
    pub delivered: BTreeMap<String, ChainHead>,
    /// The expected audit chains whose row is malformed, so that it proves nothing.
    pub malformed_chains: BTreeSet<String>,
    /// The digest of each expected change that the database has.
    pub known_changes: BTreeMap<i64, String>,
    /// Changes that were committed since [`Expected::snapshot`], one for each transaction; without a snapshot,
    /// the newest ones.
    pub new_changes: Vec<SeenChange>,
    /// How many of the expected tokens are stored with a lower generation; `None` if another transaction has
    /// locked them.
    pub older_tokens: Option<i64>,
    /// The snapshot from which the next reading in the same session continues.
    pub snapshot: String,
}

/// Reads what the database says of its history.
///
/// # Errors
/// Returns the database's error, for example [`StoreError::UndefinedTable`] in a database without the schema.
#[instrument(level = "debug", skip_all)]
pub async fn read(
    connection: &mut PgConnection,
    expected: &Expected,
) -> Result<DatabaseHistory, StoreError> {
    // The position comes first: what is read afterwards may be newer than it, but not older.
    let server = server_position(connection).await?;
    let (deployment, identity_is_missing) =
        match (deployment::read(connection).await, &expected.deployment) {
            (Err(StoreError::NotFound(_)), Some(deployment)) => (deployment.clone(), true),
            (read, _) => (read?, false),
        };
    let DeliveredChains { heads, malformed } =
        deployment::delivered(connection, &expected.chains).await?;
    let known_changes = known_changes(connection, &expected.changes).await?;
    let older_tokens = match older_tokens(connection, &expected.tokens).await {
        // A lock on `tokens` must not keep revocations from being followed. The other evidence has to do so far.
        Err(error) if error.is_delayed() => None,
        counted => Some(counted?),
    };
    let (new_changes, snapshot) = new_changes(connection, expected.snapshot.as_deref()).await?;
    Ok(DatabaseHistory {
        deployment,
        identity_is_missing,
        server,
        delivered: heads,
        malformed_chains: malformed,
        known_changes,
        new_changes,
        older_tokens,
        snapshot,
    })
}

/// Returns where the database is. Some managed services do not tell the position of the write-ahead log.
///
/// # Errors
/// Returns the database's error.
pub async fn server_position(connection: &mut PgConnection) -> Result<ServerPosition, StoreError> {
    let row = sqlx::query!(
        r#"-- store::history::server_position
        select c.system_identifier as "system_identifier!", d.oid::bigint as "oid!",
            (extract(epoch from pg_postmaster_start_time()) * 1000000)::bigint as "started_at!"
        from pg_control_system() c, pg_database d where d.datname = current_database()"#,
    )
    .fetch_one(&mut *connection)
    .await?;
    let mut position = ServerPosition {
        system_identifier: row.system_identifier,
        database_oid: row.oid,
        started_at: row.started_at,
        timeline: None,
        wal: None,
    };
    let wal = sqlx::query!(
        r#"-- store::history::server_position
        select pg_walfile_name(lsn) as "file!", pg_wal_lsn_diff(lsn, '0/0')::bigint as "wal!"
        from pg_current_wal_flush_lsn() as lsn"#,
    )
    .fetch_one(connection)
    .await;
    match wal.map_err(StoreError::from) {
        Ok(row) => {
            let timeline = row.file.get(..8).and_then(|hex| i64::from_str_radix(hex, 16).ok());
            (position.timeline, position.wal) = (timeline, Some(row.wal));
        }
        Err(StoreError::MissingPrivilege(_)) => {}
        // Feature not supported.
        Err(error) if error.sqlstate() == Some("0A000") => {}
        Err(error) => return Err(error),
    }
    Ok(position)
}

/// Returns the digests of those of the changes `ids` that exist.
async fn known_changes(
    connection: &mut PgConnection,
    ids: &[i64],
) -> Result<BTreeMap<i64, String>, StoreError> {
    if ids.is_empty() {
        return Ok(BTreeMap::new());
    }
    // Times are digested as numbers, since their text depends on settings of the session.
    let rows = sqlx::query!(
        r#"-- store::history::known_changes
        select id, substr(encode(sha256(convert_to(concat_ws(' ', id, changed, extract(epoch from at),
            table_name, operation, row_id, subject, session_user_name, what), 'UTF8')), 'hex'), 1, 16)
            as "digest!"
        from changes where id = any($1)"#,
        ids,
    )
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(|row| (row.id, row.digest)).collect())
}

/// Returns the changes that were committed after `snapshot`, one for each transaction, since a transaction is
/// lost as a whole; without a snapshot, the newest changes. Also returns the snapshot to continue from.
///
/// # Errors
/// Returns the database's error.
pub async fn new_changes(
    connection: &mut PgConnection,
    snapshot: Option<&str>,
) -> Result<(Vec<SeenChange>, String), StoreError> {
    let now = sqlx::query_scalar!(
        r#"-- store::history::new_changes
        select pg_current_snapshot()::text as "now!""#
    )
    .fetch_one(&mut *connection)
    .await?;
    let rows = sqlx::query!(
        r#"-- store::history::new_changes
        with found as (
            (select max(id) as id from changes
            where changed >= pg_snapshot_xmin($1::text::pg_snapshot)
                and changed < pg_snapshot_xmax($2::text::pg_snapshot)
                and not pg_visible_in_snapshot(changed, $1::text::pg_snapshot)
            group by changed order by id desc limit $4)
            union all
            (select id from changes where $1 is null order by id desc limit $3)
        )
        select id as "id!", table_name || ' ' || operation || ' ' || subject as "what!"
        from found join changes using (id) order by id"#,
        snapshot,
        now,
        NEWEST_CHANGES,
        NEW_CHANGES,
    )
    .fetch_all(&mut *connection)
    .await?;
    let ids: Vec<_> = rows.iter().map(|row| row.id).collect();
    let mut digests = known_changes(connection, &ids).await?;
    let changes = rows.into_iter().filter_map(|row| {
        let digest = digests.remove(&row.id)?;
        Some(SeenChange { id: row.id, digest, what: row.what })
    });
    Ok((changes.collect(), now))
}

/// Counts the accounts of `tokens` whose stored token has a lower generation than given there. Accounts and
/// tokens that were deleted do not count, nor does a number that no token can have.
async fn older_tokens(
    connection: &mut PgConnection,
    tokens: &[(i64, i64)],
) -> Result<i64, StoreError> {
    if tokens.is_empty() {
        return Ok(0);
    }
    let (accounts, generations): (Vec<_>, Vec<_>) = tokens.iter().copied().unzip();
    let older = sqlx::query_scalar!(
        r#"-- store::history::older_tokens
        select count(*) as "older!"
        from unnest($1::bigint[], $2::bigint[]) as seen (account_id, generation)
        join tokens using (account_id)
        where tokens.generation < seen.generation and tokens.generation >= 0"#,
        &accounts,
        &generations,
    )
    .fetch_one(connection)
    .await?;
    Ok(older)
}
