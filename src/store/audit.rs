//! The audit log in Postgres: chains and their positions, the events, and reading them.

mod ledger;

use std::{collections::BTreeMap, fmt::Display};

use chrono::{DateTime, NaiveDate};
use sqlx::{Connection, PgConnection, PgPool, types::Json};

pub use self::ledger::Ledger;
pub use crate::audit::chain::StoredEvent;
use crate::{
    audit::{
        chain::{ChainHead, ChainLink, Digest},
        checkpoint::SignedCheckpoint,
    },
    domain::clock::Timestamp,
    store::StoreError,
};

/// Makes a chain known, unless it is, and tells how far it is delivered.
///
/// # Errors
/// [`StoreError::Conflict`] when the chain's name is taken by another chain, or its position is no
/// hash.
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
        let message = format!("audit chain {} is known with another start", link.chain);
        return Err(StoreError::Conflict { message, cause: None });
    }
    Ok(ChainHead {
        seq: row.delivered_seq,
        hash: digest("audit_chains", &link.chain, &row.delivered_hash)?,
    })
}

/// Makes the partition of a UTC day, unless it is there.
///
/// Outside the delivery's transaction: making one locks out everybody else for a moment.
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
/// last of them; both or neither. `change_ids` are the rows of `changes` that become events here.
///
/// `false` if the chain's position is not `after`: somebody else has moved it, and nothing was done.
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

/// Keeps a signed head, unless it is there.
///
/// # Errors
/// When the database cannot be reached.
pub async fn keep_head(
    connection: &mut PgConnection,
    head: &SignedCheckpoint,
) -> Result<(), StoreError> {
    sqlx::query!(
        "/* store::audit::keep_head */
        insert into audit_heads (chain, seq, hash, at, key_id, signature)
        values ($1, $2, $3, $4, $5, $6)
        on conflict (chain, seq) do nothing",
        head.chain,
        head.seq,
        &head.hash.0,
        head.at,
        head.signature.key_id,
        head.signature.signature,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Which events to read; what is absent does not limit.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct EventFilter {
    /// The account's name.
    pub account: Option<String>,
    /// The caller's name.
    pub caller: Option<String>,
    /// The kind of event.
    pub event: Option<String>,
    /// The outcome.
    pub outcome: Option<String>,
    /// From this time on.
    pub since: Option<Timestamp>,
    /// Before this time.
    pub until: Option<Timestamp>,
    /// Of tokens with one of these fingerprints. Only [`Ledger::events`] heeds it.
    pub fingerprints: Option<Vec<String>>,
}

impl EventFilter {
    /// The times as bounds that are always there, so that the planner leaves partitions out. No
    /// event lies outside the default ones.
    fn times(&self, after: Option<Timestamp>) -> (Timestamp, Timestamp) {
        const YEAR_10000: i64 = 253_402_300_800;
        let since = self.since.unwrap_or_default().max(after.unwrap_or_default());
        let end = || DateTime::from_timestamp_secs(YEAR_10000).unwrap_or(Timestamp::MAX_UTC);
        (since, self.until.unwrap_or_else(end))
    }
}

/// Up to `limit` events behind `after` (`at`, `chain`, `seq`), in that order, which is nearly that of
/// time.
///
/// Within a chain nothing arrives late, but a replica that was cut off from Postgres delivers its
/// chain later, behind what was read already. A follower that must miss nothing therefore goes back
/// some time with each `after`, and leaves out what it has seen by `chain` and `seq`.
pub async fn events_after(
    pool: &PgPool,
    filter: &EventFilter,
    after: Option<(Timestamp, String, i64)>,
    limit: i64,
) -> Result<Vec<StoredEvent>, StoreError> {
    let (since, until) = filter.times(after.as_ref().map(|(at, ..)| *at));
    let (after_at, after_chain, after_seq) =
        after.map_or((None, None, None), |(at, chain, seq)| (Some(at), Some(chain), Some(seq)));
    let rows = sqlx::query_as!(
        Row,
        r#"/* store::audit::events_after */
        select instance, chain, seq, at, event, caller, caller_kind, peer, account, outcome, reason,
            generation, token_fingerprint, trace_id, latency_us, count,
            detail as "detail: Json<BTreeMap<String, String>>", prev_hash, hash
        from audit_events
        where at >= $1 and at < $2
            and ($3::text is null or account = $3)
            and ($4::text is null or caller = $4)
            and ($5::text is null or event = $5)
            and ($6::text is null or outcome = $6)
            and ($7::timestamptz is null or (at, chain, seq) > ($7, $8, $9::bigint))
        order by at, chain, seq
        limit $10"#,
        since,
        until,
        filter.account.as_deref(),
        filter.caller.as_deref(),
        filter.event.as_deref(),
        filter.outcome.as_deref(),
        after_at,
        after_chain,
        after_seq,
        limit,
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(StoredEvent::try_from).collect()
}

/// The last `n` events, in the order of [`events_after`].
pub async fn latest_events(
    pool: &PgPool,
    filter: &EventFilter,
    n: i64,
) -> Result<Vec<StoredEvent>, StoreError> {
    let (since, until) = filter.times(None);
    let rows = sqlx::query_as!(
        Row,
        r#"/* store::audit::latest_events */
        select instance, chain, seq, at, event, caller, caller_kind, peer, account, outcome, reason,
            generation, token_fingerprint, trace_id, latency_us, count,
            detail as "detail: Json<BTreeMap<String, String>>", prev_hash, hash
        from audit_events
        where at >= $1 and at < $2
            and ($3::text is null or account = $3)
            and ($4::text is null or caller = $4)
            and ($5::text is null or event = $5)
            and ($6::text is null or outcome = $6)
        order by at desc, chain desc, seq desc
        limit $7"#,
        since,
        until,
        filter.account.as_deref(),
        filter.caller.as_deref(),
        filter.event.as_deref(),
        filter.outcome.as_deref(),
        n,
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().rev().map(StoredEvent::try_from).collect()
}

/// A row as Postgres has it.
pub(super) struct Row {
    pub(super) instance: String,
    pub(super) chain: String,
    pub(super) seq: i64,
    pub(super) at: Timestamp,
    pub(super) event: String,
    pub(super) caller: Option<String>,
    pub(super) caller_kind: Option<String>,
    pub(super) peer: Option<String>,
    pub(super) account: Option<String>,
    pub(super) outcome: String,
    pub(super) reason: Option<String>,
    pub(super) generation: Option<i64>,
    pub(super) token_fingerprint: Option<String>,
    pub(super) trace_id: Option<String>,
    pub(super) latency_us: Option<i64>,
    pub(super) count: i64,
    pub(super) detail: Json<BTreeMap<String, String>>,
    pub(super) prev_hash: Vec<u8>,
    pub(super) hash: Vec<u8>,
}

impl TryFrom<Row> for StoredEvent {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let id = format_args!("{} {}", row.chain, row.seq);
        Ok(Self {
            prev_hash: digest("audit_events", id, &row.prev_hash)?,
            hash: digest("audit_events", id, &row.hash)?,
            instance: row.instance,
            chain: row.chain,
            seq: row.seq,
            at: row.at,
            event: row.event.into(),
            caller: row.caller,
            caller_kind: row.caller_kind.map(Into::into),
            peer: row.peer,
            account: row.account,
            outcome: row.outcome.into(),
            reason: row.reason,
            generation: row.generation,
            token_fingerprint: row.token_fingerprint,
            trace_id: row.trace_id,
            latency_us: row.latency_us,
            count: row.count,
            detail: row.detail.0,
        })
    }
}

fn digest(table: &'static str, id: impl Display, bytes: &[u8]) -> Result<Digest, StoreError> {
    Digest::from_bytes(bytes)
        .ok_or_else(|| StoreError::unreadable_row(table, id, "a hash is not a SHA-256"))
}
