//! The identity of the database: the deployment and the upstream that it belongs to, and whether it is still
//! in the server in which it was last used.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::{Connection, PgConnection, PgExecutor, PgPool, Postgres, Transaction};

use tracing::instrument;

use super::StoreError;
use crate::{
    audit::chain::{ChainHead, Digest},
    domain::clock::Timestamp,
};

/// How often the acceptance of a database is tried if the server aborts it because of other transactions.
const ACCEPT_ATTEMPTS: usize = 3;

/// The identity of a database. It changes when a restored database or a copy is accepted in its place.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DatabaseIdentity {
    /// The id of the deployment, made at the first start.
    pub id: String,
    /// How often a restored database or a copy was accepted.
    pub epoch: i64,
}

/// The identity that is stored in the database, and whether it can be trusted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Deployment {
    /// The stored identity. A copy has the identity of its original.
    pub identity: DatabaseIdentity,
    /// The upstream to which its accounts belong.
    pub upstream: String,
    /// Whether the database is in another server, or has another `oid`, than when it was last used.
    pub moved: bool,
}

/// Assigns a database that was never used to `upstream`. Changes nothing in any other database.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn assign(connection: &mut PgConnection, upstream: &str) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::deployment::assign
        insert into deployment (upstream) values ($1) on conflict (single) do nothing",
        upstream,
    )
    .execute(&mut *connection)
    .await?;
    // A row that was just inserted does not contain the server and the database yet.
    sqlx::query!(
        "-- store::deployment::assign
        update deployment set system_identifier = c.system_identifier, database_oid = d.oid::bigint
        from pg_control_system() c, pg_database d
        where d.datname = current_database() and deployment.system_identifier is null",
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Returns the identity that is stored in the database.
///
/// # Errors
/// Returns [`StoreError::NotFound`] if the database was never assigned, and the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn read(connection: &mut PgConnection) -> Result<Deployment, StoreError> {
    let row = sqlx::query!(
        r#"-- store::deployment::read
        select p.id, p.epoch, p.upstream, (p.system_identifier, p.database_oid)
            is distinct from (c.system_identifier, d.oid::bigint) as "moved!"
        from deployment p, pg_control_system() c, pg_database d
        where d.datname = current_database()"#,
    )
    .fetch_optional(connection)
    .await?;
    let never = || StoreError::NotFound("the table `deployment` has no row".into());
    let row = row.ok_or_else(never)?;
    let identity = DatabaseIdentity { id: row.id, epoch: row.epoch };
    Ok(Deployment { identity, upstream: row.upstream, moved: row.moved })
}

/// Whether the database that a session is connected to still has the expected identity.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IdentityCheck {
    /// It has.
    Same,
    /// It has no identity: its row was deleted.
    Missing,
    /// It has another identity, or is elsewhere than where it was used last.
    Different,
}

/// Compares the identity of the database with `expected`.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn check(
    executor: impl PgExecutor<'_>,
    expected: &DatabaseIdentity,
) -> Result<IdentityCheck, StoreError> {
    let same = sqlx::query_scalar!(
        r#"-- store::deployment::check
        select (p.id, p.epoch, p.system_identifier, p.database_oid)
            is not distinct from ($1::text, $2::bigint, c.system_identifier, d.oid::bigint) as "same!"
        from deployment p, pg_control_system() c, pg_database d
        where d.datname = current_database()"#,
        expected.id,
        expected.epoch,
    )
    .fetch_optional(executor)
    .await?;
    Ok(match same {
        Some(true) => IdentityCheck::Same,
        Some(false) => IdentityCheck::Different,
        None => IdentityCheck::Missing,
    })
}

/// Writes the identity and the upstream again, after their row was deleted. Call it only on a session on
/// which [`check`] has found the identity before: it cannot have changed to another database since.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn restore_identity(
    executor: impl PgExecutor<'_>,
    identity: &DatabaseIdentity,
    upstream: &str,
) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::deployment::restore_identity
        insert into deployment (upstream, id, epoch, system_identifier, database_oid)
        select $3, $1, $2, c.system_identifier, d.oid::bigint
        from pg_control_system() c, pg_database d
        where d.datname = current_database()
        on conflict (single) do nothing",
        identity.id,
        identity.epoch,
        upstream,
    )
    .execute(executor)
    .await?;
    Ok(())
}

/// Accepts this database as the deployment's own, whatever its server and state, and returns its new
/// identity. Replicas that expect the former identity stop.
///
/// Tokens of another upstream are deleted. If the upstream revokes older tokens when it issues a new
/// one (`ends_older`), the other tokens are marked as possibly revoked: newer ones may have been
/// issued since this state of the database.
///
/// # Errors
/// Returns the database's error. Nothing is changed then, unless the connection was lost during the
/// commit.
#[instrument(level = "debug", skip_all)]
pub async fn accept(
    connection: &mut PgConnection,
    upstream: &str,
    ends_older: bool,
) -> Result<DatabaseIdentity, StoreError> {
    let mut accepted = try_accept(connection, upstream, ends_older).await;
    for _ in 1..ACCEPT_ATTEMPTS {
        if !accepted.as_ref().is_err_and(StoreError::is_retryable) {
            break;
        }
        accepted = try_accept(connection, upstream, ends_older).await;
    }
    accepted
}

async fn try_accept(
    connection: &mut PgConnection,
    upstream: &str,
    ends_older: bool,
) -> Result<DatabaseIdentity, StoreError> {
    let mut transaction = connection.begin().await?;
    sqlx::query!(
        "-- store::deployment::try_accept
        delete from tokens where exists (select from deployment where upstream <> $1)",
        upstream,
    )
    .execute(&mut *transaction)
    .await?;
    if ends_older {
        mark_all_possibly_revoked(&mut transaction).await?;
    }
    let row = sqlx::query!(
        "-- store::deployment::try_accept
        update deployment set upstream = $1, epoch = epoch + 1,
            system_identifier = c.system_identifier, database_oid = d.oid::bigint
        from pg_control_system() c, pg_database d
        where d.datname = current_database()
        returning id, epoch",
        upstream,
    )
    .fetch_one(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(DatabaseIdentity { id: row.id, epoch: row.epoch })
}

async fn mark_all_possibly_revoked(
    transaction: &mut Transaction<'_, Postgres>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::deployment::mark_all_possibly_revoked
        update refreshes set possibly_revoked = true, changed = pg_current_xact_id()
        where account_id in (select account_id from tokens)",
    )
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

/// What the database says of audit chains.
#[derive(Clone, Debug, Default)]
pub struct DeliveredChains {
    /// The last delivered record of each chain that the database has.
    pub heads: BTreeMap<String, ChainHead>,
    /// The chains whose row holds no hash, or no number that a record can have.
    pub malformed: BTreeSet<String>,
}

/// Returns the last delivered record of each of `chains`. Chains that are not in the database are left out.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn delivered(
    connection: &mut PgConnection,
    chains: &[String],
) -> Result<DeliveredChains, StoreError> {
    let rows = sqlx::query!(
        "-- store::deployment::delivered
        select chain, delivered_seq, delivered_hash from audit_chains where chain = any($1)",
        chains,
    )
    .fetch_all(connection)
    .await?;
    let mut delivered = DeliveredChains::default();
    for row in rows {
        let is_number = (0..i64::MAX).contains(&row.delivered_seq);
        match Digest::from_bytes(&row.delivered_hash).filter(|_| is_number) {
            Some(hash) => {
                delivered.heads.insert(row.chain, ChainHead { seq: row.delivered_seq, hash });
            }
            None => {
                delivered.malformed.insert(row.chain);
            }
        }
    }
    Ok(delivered)
}

/// Returns the database's present time.
///
/// # Errors
/// When the database cannot be reached or refuses the statement.
pub async fn present_time(pool: &PgPool) -> Result<Timestamp, StoreError> {
    let now = sqlx::query_scalar!(
        r#"-- store::deployment::present_time
        select clock_timestamp() as "now!""#
    )
    .fetch_one(pool)
    .await?;
    Ok(now)
}

/// Returns the upstream that the database belongs to; `None` before the first start of a broker, or if there
/// is no schema yet.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn upstream(pool: &PgPool) -> Result<Option<String>, StoreError> {
    let upstream = sqlx::query_scalar!(
        "-- store::deployment::upstream
        select upstream from deployment"
    )
    .fetch_optional(pool)
    .await;
    match upstream.map_err(StoreError::from) {
        Err(StoreError::UndefinedTable(_)) => Ok(None),
        upstream => upstream,
    }
}
