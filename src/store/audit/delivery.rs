//! The writes of journal delivery: chains, records, and checkpoints.

use std::collections::BTreeMap;

use chrono::NaiveDate;
use sqlx::{Connection, PgConnection, types::Json};
use tracing::instrument;

use crate::{
    audit::{
        chain::{ChainHead, ChainLink, Digest, StoredEvent},
        checkpoint::SignedCheckpoint,
    },
    store::StoreError,
};

/// Inserts the row of a chain unless it exists, and returns the chain's delivered position.
///
/// # Errors
/// [`StoreError::Conflict`] when the row has another instance or another link;
/// [`StoreError::UnreadableRow`] when its position is none; otherwise when a statement fails.
#[instrument(level = "debug", skip_all, fields(chain = link.chain))]
pub async fn register_chain(
    connection: &mut PgConnection,
    link: &ChainLink,
) -> Result<ChainHead, StoreError> {
    sqlx::query!(
        "/* store::audit::register_chain */
        insert into audit_chains
            (chain, instance, started_at, linked_chain, linked_hash, delivered_hash)
        values ($1, $2, $3, $4, $5, $5)
        on conflict (chain) do nothing",
        link.chain,
        link.instance,
        link.started_at,
        link.linked_chain,
        &link.linked_hash.0,
    )
    .execute(&mut *connection)
    .await?;
    let row = sqlx::query!(
        "/* store::audit::register_chain */
        select instance, linked_hash, delivered_seq, delivered_hash
        from audit_chains where chain = $1",
        link.chain,
    )
    .fetch_one(connection)
    .await?;
    if row.instance != link.instance || row.linked_hash != link.linked_hash.0 {
        let chain = &link.chain;
        let message = format!("audit chain {chain} is registered with another instance or link");
        return Err(StoreError::Conflict { message, cause: None });
    }
    let unreadable = |why| StoreError::unreadable_row("audit_chains", &link.chain, why);
    let hash = Digest::from_bytes(&row.delivered_hash)
        .ok_or_else(|| unreadable("delivered_hash is not a SHA-256"))?;
    if !(0..i64::MAX).contains(&row.delivered_seq) {
        return Err(unreadable("delivered_seq is not a number that a record can have"));
    }
    Ok(ChainHead { seq: row.delivered_seq, hash })
}

/// Creates the partition of a UTC day unless it exists.
///
/// Call this outside of the transaction that delivers: creating a partition locks the table
/// briefly.
///
/// # Errors
/// When the statement fails.
#[instrument(level = "debug", skip_all, fields(%day))]
pub async fn ensure_partition(
    connection: &mut PgConnection,
    day: NaiveDate,
) -> Result<(), StoreError> {
    sqlx::query!(
        "/* store::audit::ensure_partition */
        select audit_ensure_partition($1)",
        day,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Inserts `events`, which follow `after` in `link`'s chain, and moves the chain's position to the
/// last of them, in one transaction. `change_ids` are the rows of `changes` that these events
/// record.
///
/// Returns `false`, and changes nothing, if the chain's position is not `after`, since another process
/// has moved it.
///
/// # Errors
/// When a statement fails. If the commit fails, its outcome is unknown: read the position again.
#[instrument(level = "debug", skip_all, fields(chain = link.chain, after = after.seq, events = events.len()))]
pub async fn deliver(
    connection: &mut PgConnection,
    link: &ChainLink,
    after: ChainHead,
    events: &[StoredEvent],
    change_ids: &[i64],
) -> Result<bool, StoreError> {
    let Some(last) = events.last() else { return Ok(true) };
    let mut transaction = connection.begin().await?;
    if !move_position(&mut transaction, &link.chain, after, last.head()).await? {
        transaction.rollback().await?;
        return Ok(false);
    }
    insert_events(&mut transaction, link, events).await?;
    if !change_ids.is_empty() {
        mark_changes(&mut transaction, change_ids).await?;
    }
    transaction.commit().await?;
    Ok(true)
}

async fn move_position(
    connection: &mut PgConnection,
    chain: &str,
    from: ChainHead,
    to: ChainHead,
) -> Result<bool, StoreError> {
    let moved = sqlx::query!(
        "/* store::audit::move_position */
        update audit_chains
        set delivered_seq = $4, delivered_hash = $5, delivered_at = now()
        where chain = $1 and delivered_seq = $2 and delivered_hash = $3",
        chain,
        from.seq,
        &from.hash.0,
        to.seq,
        &to.hash.0,
    )
    .execute(connection)
    .await?;
    Ok(moved.rows_affected() == 1)
}

async fn insert_events(
    connection: &mut PgConnection,
    link: &ChainLink,
    events: &[StoredEvent],
) -> Result<(), StoreError> {
    fn column<'a, T>(events: &'a [StoredEvent], of: impl Fn(&'a StoredEvent) -> T) -> Vec<T> {
        events.iter().map(of).collect()
    }
    sqlx::query!(
        "/* store::audit::insert_events */
        insert into audit_events
            (instance, chain, seq, at, event, caller, caller_kind, peer, account, outcome, reason,
             generation, token_fingerprint, trace_id, latency_us, count, detail, prev_hash, hash)
        select $1, $2, * from unnest(
            $3::bigint[], $4::timestamptz[], $5::text[], $6::text[], $7::text[], $8::text[],
            $9::text[], $10::text[], $11::text[], $12::bigint[], $13::text[], $14::text[],
            $15::bigint[], $16::bigint[], $17::jsonb[], $18::bytea[], $19::bytea[])",
        link.instance,
        link.chain,
        &column(events, |e| e.seq),
        &column(events, |e| e.at),
        &column(events, |e| &*e.event) as &[&str],
        &column(events, |e| e.caller.as_deref()) as &[Option<&str>],
        &column(events, |e| e.caller_kind.as_deref()) as &[Option<&str>],
        &column(events, |e| e.peer.as_deref()) as &[Option<&str>],
        &column(events, |e| e.account.as_deref()) as &[Option<&str>],
        &column(events, |e| &*e.outcome) as &[&str],
        &column(events, |e| e.reason.as_deref()) as &[Option<&str>],
        &column(events, |e| e.generation) as &[Option<i64>],
        &column(events, |e| e.token_fingerprint.as_deref()) as &[Option<&str>],
        &column(events, |e| e.trace_id.as_deref()) as &[Option<&str>],
        &column(events, |e| e.latency_us) as &[Option<i64>],
        &column(events, |e| e.count),
        &column(events, |e| Json(&e.detail)) as &[Json<&BTreeMap<String, String>>],
        &column(events, |e| &e.prev_hash.0[..]) as &[&[u8]],
        &column(events, |e| &e.hash.0[..]) as &[&[u8]],
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn mark_changes(connection: &mut PgConnection, ids: &[i64]) -> Result<(), StoreError> {
    sqlx::query!(
        "/* store::audit::mark_changes */
        update changes set audited_at = now() where id = any($1) and audited_at is null",
        ids,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Inserts a signed checkpoint unless it exists.
///
/// # Errors
/// When the statement fails.
#[instrument(level = "debug", skip_all, fields(chain = checkpoint.chain, seq = checkpoint.seq))]
pub async fn store_checkpoint(
    connection: &mut PgConnection,
    checkpoint: &SignedCheckpoint,
) -> Result<(), StoreError> {
    sqlx::query!(
        "/* store::audit::store_checkpoint */
        insert into audit_heads (chain, seq, hash, at, key_id, signature)
        values ($1, $2, $3, $4, $5, $6)
        on conflict (chain, seq) do nothing",
        checkpoint.chain,
        checkpoint.seq,
        &checkpoint.hash.0,
        checkpoint.at,
        checkpoint.signature.key_id,
        checkpoint.signature.signature,
    )
    .execute(connection)
    .await?;
    Ok(())
}
