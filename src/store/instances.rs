//! The replicas that use the database.

use std::time::Duration;

use sqlx::PgPool;
use tracing::instrument;

use super::{StoreError, interval};
use crate::domain::clock::Timestamp;

/// What a replica reports about itself.
#[derive(Clone, Debug)]
pub struct Heartbeat<'a> {
    /// The id of the instance, which belongs to its state directory.
    pub instance: &'a str,
    /// The number of the replica, which is part of the generations of its tokens.
    pub replica: u16,
    /// The release that runs.
    pub version: &'a str,
    /// The ids of the keys in its keyring.
    pub key_ids: &'a [String],
    /// When the process started.
    pub started_at: Timestamp,
    /// The audit chain that its journal writes.
    pub chain: &'a str,
    /// The number of that chain's last durable record.
    pub seq: i64,
}

/// Stores a heartbeat, with the time of the database's clock.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn store_heartbeat(pool: &PgPool, heartbeat: &Heartbeat<'_>) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::instances::store_heartbeat
        insert into instances
            (id, replica, version, key_ids, started_at, heartbeat_at, journal_chain, journal_seq)
        values ($1, $2, $3, $4, $5, clock_timestamp(), $6, $7)
        on conflict (id) do update set replica = excluded.replica, version = excluded.version,
            key_ids = excluded.key_ids, started_at = excluded.started_at,
            heartbeat_at = excluded.heartbeat_at, stopped_at = null,
            journal_chain = excluded.journal_chain, journal_seq = excluded.journal_seq",
        heartbeat.instance,
        i32::from(heartbeat.replica),
        heartbeat.version,
        heartbeat.key_ids,
        heartbeat.started_at,
        heartbeat.chain,
        heartbeat.seq,
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Counts the replicas other than `instance` that stored a heartbeat within the last `period` and have
/// not stopped.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn count_others(
    pool: &PgPool,
    instance: &str,
    period: Duration,
) -> Result<i64, StoreError> {
    let others = sqlx::query_scalar!(
        r#"-- store::instances::count_others
        select count(*) as "others!" from instances
        where id <> $1 and stopped_at is null and heartbeat_at > clock_timestamp() - $2::interval"#,
        instance,
        interval(period),
    )
    .fetch_one(pool)
    .await?;
    Ok(others)
}

/// Stores that the replica has stopped, so that the others do not count it until its last heartbeat is too
/// old.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn mark_stopped(pool: &PgPool, instance: &str) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::instances::mark_stopped
        update instances set stopped_at = clock_timestamp() where id = $1",
        instance,
    )
    .execute(pool)
    .await?;
    Ok(())
}
