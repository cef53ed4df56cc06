//! The replicas that use the database.
//!
//! No trigger checks these rows, and the role of the broker may write any time into them, also one that cannot be
//! decoded, such as `infinity`. A replica with such a heartbeat counts as silent.

use std::time::Duration;

use sqlx::PgPool;
use tracing::instrument;

use super::{StoreError, begin, interval};
use crate::domain::clock::{Timestamp, until_from};

/// What a replica reports about itself.
#[derive(Clone, Debug)]
pub struct Heartbeat<'a> {
    /// The id of the instance, which belongs to its state directory.
    pub instance: &'a str,
    /// The random number of this start of the process.
    pub start: &'a str,
    /// The number of the replica, which is part of the generations of its tokens.
    pub replica: u16,
    /// The release that runs.
    pub version: &'a str,
    /// The ids of the keys in its keyring that are not retired.
    pub key_ids: &'a [String],
    /// The ids of the keys that it may still make values with, or needs for secrets that it holds.
    pub used_key_ids: &'a [String],
    /// When the process started.
    pub started_at: Timestamp,
    /// The audit chain that its journal writes.
    pub chain: &'a str,
    /// The number of that chain's last durable record.
    pub seq: i64,
    /// The starts of the other replicas that this one knows of.
    pub seen: &'a [String],
}

/// The row of an instance before a process of it announces itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EarlierProcess {
    /// The random number of its start; `None` if its release has none.
    pub start: Option<String>,
    /// Its last heartbeat; the beginning of 1970 if the row holds a time that cannot be read.
    pub heartbeat_at: Timestamp,
    /// How long ago the last heartbeat was stored, by the database's clock; zero if that was set back.
    pub silent_for: Duration,
    /// Whether it reported that it stopped.
    pub stopped: bool,
}

/// Returns the last process of `instance`, if there was one.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn earlier_process(
    pool: &PgPool,
    instance: &str,
) -> Result<Option<EarlierProcess>, StoreError> {
    let row = sqlx::query!(
        r#"-- store::instances::earlier_process
        select start_nonce,
            case when heartbeat_at between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then heartbeat_at else 'epoch' end as "heartbeat_at!",
            stopped_at is not null as "stopped!", clock_timestamp() as "now!"
        from instances where id = $1"#,
        instance,
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|row| EarlierProcess {
        start: row.start_nonce,
        heartbeat_at: row.heartbeat_at,
        silent_for: until_from(row.heartbeat_at, row.now),
        stopped: row.stopped,
    }))
}

/// What the last process of an instance reported of its audit chain.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ReportedChain {
    /// Name of the chain.
    pub chain: String,
    /// `seq` of its last record, as it was reported.
    pub seq: i64,
    /// `seq` of its last record in Postgres; 0 if the chain is not known there.
    pub delivered_seq: i64,
}

/// Returns what the last process of `instance` reported of its audit chain; `None` if it reported nothing, or if the
/// chain is retired.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn reported_chain(
    pool: &PgPool,
    instance: &str,
) -> Result<Option<ReportedChain>, StoreError> {
    Ok(sqlx::query_as!(
        ReportedChain,
        r#"-- store::instances::reported_chain
        select i.journal_chain as "chain!", i.journal_seq as "seq!",
            coalesce(c.delivered_seq, 0) as "delivered_seq!"
        from instances i left join audit_chains c on c.chain = i.journal_chain
        where i.id = $1 and i.journal_chain is not null and i.journal_seq is not null and c.retired is null"#,
        instance,
    )
    .fetch_optional(pool)
    .await?)
}

/// Stores the first heartbeat of a process, and makes the instance's row its own. Returns `false`, and stores
/// nothing, if the row has changed since it was read as `earlier`.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn announce(
    pool: &PgPool,
    heartbeat: &Heartbeat<'_>,
    earlier: Option<&EarlierProcess>,
) -> Result<bool, StoreError> {
    let mut transaction = begin(pool).await?;
    let stored = sqlx::query!(
        "-- store::instances::announce
        insert into instances (id, start_nonce, replica, version, key_ids, started_at, heartbeat_at,
            announced_at, journal_chain, journal_seq, seen, used_key_ids)
        values ($1, $2, $3, $4, $5, $6, clock_timestamp(), clock_timestamp(), $7, $8, $9, $12)
        on conflict (id) do update set start_nonce = excluded.start_nonce, replica = excluded.replica,
            version = excluded.version, key_ids = excluded.key_ids, started_at = excluded.started_at,
            heartbeat_at = excluded.heartbeat_at, announced_at = excluded.announced_at,
            stopped_at = null, journal_chain = excluded.journal_chain,
            journal_seq = excluded.journal_seq, seen = excluded.seen, used_key_ids = excluded.used_key_ids
        where instances.start_nonce is not distinct from $10
            -- As it was read by `earlier_process`.
            and case when instances.heartbeat_at
                    between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then instances.heartbeat_at else 'epoch' end = $11",
        heartbeat.instance,
        heartbeat.start,
        i32::from(heartbeat.replica),
        heartbeat.version,
        heartbeat.key_ids,
        heartbeat.started_at,
        heartbeat.chain,
        heartbeat.seq,
        heartbeat.seen,
        earlier.and_then(|earlier| earlier.start.as_deref()),
        earlier.map(|earlier| earlier.heartbeat_at),
        heartbeat.used_key_ids,
    )
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(stored.rows_affected() == 1)
}

/// Stores a heartbeat, with the time of the database's clock. Returns `false`, and stores nothing, if the
/// instance's row is not this process's: another process has taken the instance over, or the row was deleted.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn store_heartbeat(pool: &PgPool, heartbeat: &Heartbeat<'_>) -> Result<bool, StoreError> {
    let mut transaction = begin(pool).await?;
    let stored = sqlx::query!(
        "-- store::instances::store_heartbeat
        update instances set version = $3, key_ids = $4, heartbeat_at = clock_timestamp(),
            stopped_at = null, journal_chain = $5, journal_seq = $6, seen = $7, used_key_ids = $8
        where id = $1 and start_nonce = $2",
        heartbeat.instance,
        heartbeat.start,
        heartbeat.version,
        heartbeat.key_ids,
        heartbeat.chain,
        heartbeat.seq,
        heartbeat.seen,
        heartbeat.used_key_ids,
    )
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(stored.rows_affected() == 1)
}

/// Another replica, as its row shows it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OtherReplica {
    /// The id of its instance.
    pub instance: String,
    /// The random number of its start; `None` if its release has none.
    pub start: Option<String>,
    /// Its replica number.
    pub replica: i32,
    /// Its last heartbeat.
    pub heartbeat_at: Timestamp,
    /// How long ago the last heartbeat was stored, by the database's clock; zero if that was set back.
    pub silent_for: Duration,
    /// Whether it knew of this process before it stored that heartbeat.
    pub knows_us: bool,
}

/// Returns the replicas other than `instance` that stored a heartbeat within the last `period`, or are among
/// `alive`, and have not stopped. `start` is the start of the process that asks. A heartbeat whose time cannot be read is none.
///
/// A release without announcements counts the replicas right after each heartbeat. So it knows of this process
/// once it has stored one after this process's announcement.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn others(
    pool: &PgPool,
    instance: &str,
    start: &str,
    period: Duration,
    alive: &[String],
) -> Result<Vec<OtherReplica>, StoreError> {
    let mut transaction = begin(pool).await?;
    let rows = sqlx::query!(
        r#"-- store::instances::others
        select id, start_nonce, replica, heartbeat_at, clock_timestamp() as "now!",
            case when start_nonce is null then heartbeat_at > coalesce(
                (select announced_at from instances where id = $1 and start_nonce = $2), 'infinity')
            else coalesce($2 = any (seen), false) end as "knows_us!"
        from instances
        where id <> $1 and stopped_at is null
            and (heartbeat_at > clock_timestamp() - $3::interval or id = any($4))
            and heartbeat_at between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'"#,
        instance,
        start,
        interval(period),
        alive,
    )
    .fetch_all(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(rows
        .into_iter()
        .map(|row| OtherReplica {
            instance: row.id,
            start: row.start_nonce,
            replica: row.replica,
            heartbeat_at: row.heartbeat_at,
            silent_for: until_from(row.heartbeat_at, row.now),
            knows_us: row.knows_us,
        })
        .collect())
}

/// Stores that the process with this `start` has stopped, so that the others do not count it until its last
/// heartbeat is too old.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn mark_stopped(pool: &PgPool, instance: &str, start: &str) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::instances::mark_stopped
        update instances set stopped_at = clock_timestamp() where id = $1 and start_nonce = $2",
        instance,
        start,
    )
    .execute(pool)
    .await?;
    Ok(())
}
