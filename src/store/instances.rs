//! The replicas, and the keys that they publish.

use std::time::Duration;

use sqlx::PgPool;

use super::{StoreError, interval};
use crate::domain::clock::Timestamp;

/// What a replica tells of itself.
#[derive(Clone, Debug)]
pub struct Heartbeat<'a> {
    /// The instance.
    pub instance: &'a str,
    /// Its number in generations.
    pub replica: u16,
    /// The release that runs.
    pub version: &'a str,
    /// The keys that its keyring holds.
    pub key_ids: &'a [String],
    /// When it started.
    pub started_at: Timestamp,
    /// The chain that its journal writes.
    pub chain: &'a str,
    /// The last durable record of that.
    pub seq: i64,
}

/// Tells that the replica lives, by the database's clock.
///
/// # Errors
/// When the database cannot be reached.
pub async fn beat(pool: &PgPool, beat: &Heartbeat<'_>) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::instances::beat
        insert into instances
            (id, replica, version, key_ids, started_at, heartbeat_at, journal_chain, journal_seq)
        values ($1, $2, $3, $4, $5, clock_timestamp(), $6, $7)
        on conflict (id) do update set replica = excluded.replica, version = excluded.version,
            key_ids = excluded.key_ids, started_at = excluded.started_at,
            heartbeat_at = excluded.heartbeat_at, stopped_at = null,
            journal_chain = excluded.journal_chain, journal_seq = excluded.journal_seq",
        beat.instance,
        i32::from(beat.replica),
        beat.version,
        beat.key_ids,
        beat.started_at,
        beat.chain,
        beat.seq,
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// How many other replicas told within the last `within` that they live, and have not stopped since.
///
/// # Errors
/// When the database cannot be reached.
pub async fn others(pool: &PgPool, instance: &str, within: Duration) -> Result<i64, StoreError> {
    let others = sqlx::query_scalar!(
        r#"-- store::instances::others
        select count(*) as "others!" from instances
        where id <> $1 and stopped_at is null and heartbeat_at > clock_timestamp() - $2::interval"#,
        instance,
        interval(within),
    )
    .fetch_one(pool)
    .await?;
    Ok(others)
}

/// Tells that the replica stopped on purpose.
///
/// # Errors
/// When the database cannot be reached.
pub async fn stopped(pool: &PgPool, instance: &str) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::instances::stopped
        update instances set stopped_at = clock_timestamp() where id = $1",
        instance,
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Publishes the public halves of the intake keys, for `account add` and `account seal`.
///
/// # Errors
/// When the database cannot be reached.
pub async fn publish_intake_keys(
    pool: &PgPool,
    keys: &[(String, Vec<u8>)],
    primary: &str,
) -> Result<(), StoreError> {
    for (id, public) in keys {
        sqlx::query!(
            "-- store::instances::publish_intake_keys
            insert into intake_keys (key_id, public_key, is_primary) values ($1, $2, $1 = $3)
            on conflict (key_id) do update
            set public_key = excluded.public_key, is_primary = excluded.is_primary",
            id,
            public,
            primary,
        )
        .execute(pool)
        .await?;
    }
    Ok(())
}
