//! What the database belongs to, and whether it is still where it was.

use std::collections::BTreeMap;

use sqlx::{PgPool, Postgres, Transaction};

use super::StoreError;
use crate::audit::chain::{ChainHead, Digest};

/// Which database this is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Home {
    /// The deployment's own id.
    pub id: String,
    /// How often a restored database was accepted.
    pub epoch: i64,
}

/// The database as it stands.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Deployment {
    /// Which it says that it is.
    pub home: Home,
    /// The upstream whose accounts it has.
    pub upstream: String,
    /// Whether it lies elsewhere than when it was used last.
    pub moved: bool,
}

/// The database that belongs to `upstream`, or to the one that it was first used with.
///
/// # Errors
/// When the database cannot be reached.
pub async fn open(pool: &PgPool, upstream: &str) -> Result<Deployment, StoreError> {
    sqlx::query!(
        "-- store::deployment::open
        insert into deployment (upstream) values ($1) on conflict (single) do nothing",
        upstream,
    )
    .execute(pool)
    .await?;
    // Until a release that knows of places has used it, it has none.
    sqlx::query!(
        "-- store::deployment::open
        update deployment set system_identifier = c.system_identifier, database_oid = d.oid::bigint
        from pg_control_system() c, pg_database d
        where d.datname = current_database() and deployment.system_identifier is null",
    )
    .execute(pool)
    .await?;
    let row = sqlx::query!(
        r#"-- store::deployment::open
        select p.id, p.epoch, p.upstream, (p.system_identifier, p.database_oid)
            is distinct from (c.system_identifier, d.oid::bigint) as "moved!"
        from deployment p, pg_control_system() c, pg_database d
        where d.datname = current_database()"#,
    )
    .fetch_one(pool)
    .await?;
    let home = Home { id: row.id, epoch: row.epoch };
    Ok(Deployment { home, upstream: row.upstream, moved: row.moved })
}

/// Makes this database, wherever it lies and whatever state it is in, the deployment's own. Its
/// tokens go if they are another upstream's; with `ends_older` the others are doubtful, since later
/// ones may have been issued. Returns its new home.
///
/// # Errors
/// When the database cannot be reached.
pub async fn accept(pool: &PgPool, upstream: &str, ends_older: bool) -> Result<Home, StoreError> {
    let mut transaction = pool.begin().await?;
    sqlx::query!(
        "-- store::deployment::accept
        delete from tokens where exists (select from deployment where upstream <> $1)",
        upstream,
    )
    .execute(&mut *transaction)
    .await?;
    if ends_older {
        doubt_all(&mut transaction).await?;
    }
    let row = sqlx::query!(
        "-- store::deployment::accept
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
    Ok(Home { id: row.id, epoch: row.epoch })
}

async fn doubt_all(transaction: &mut Transaction<'_, Postgres>) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::deployment::doubt_all
        update refreshes set suspect = true, changed = pg_current_xact_id()
        where account_id in (select account_id from tokens)",
    )
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

/// How far each of `chains` that the database knows is delivered.
///
/// # Errors
/// When the database cannot be reached.
pub async fn delivered(
    pool: &PgPool,
    chains: &[String],
) -> Result<BTreeMap<String, ChainHead>, StoreError> {
    let rows = sqlx::query!(
        "-- store::deployment::delivered
        select chain, delivered_seq, delivered_hash from audit_chains where chain = any($1)",
        chains,
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            let hash = Digest::from_bytes(&row.delivered_hash).ok_or_else(|| {
                StoreError::Corrupt(format!("audit_chains: {} has no SHA-256", row.chain))
            })?;
            Ok((row.chain, ChainHead { seq: row.delivered_seq, hash }))
        })
        .collect()
}

/// The upstream that the database belongs to, once a broker has run on it; `None` also where there
/// is no schema yet.
///
/// # Errors
/// When the database cannot be reached.
pub async fn upstream(pool: &PgPool) -> Result<Option<String>, StoreError> {
    let upstream = sqlx::query_scalar!(
        "-- store::deployment::upstream
        select upstream from deployment"
    )
    .fetch_optional(pool)
    .await;
    match upstream.map_err(StoreError::from) {
        Err(StoreError::Schema(_)) => Ok(None),
        upstream => upstream,
    }
}
