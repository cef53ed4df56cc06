//! Queries of audit events, in pages.

use sqlx::PgPool;
use tracing::instrument;

use super::{
    filter::EventFilter,
    row::{Decoded, EventRow},
};
use crate::{audit::chain::StoredEvent, domain::clock::Timestamp, store::StoreError};

/// Returns up to `limit` events after the position `after` (`at`, `chain`, `seq`), in the order of
/// these three.
///
/// Within a chain, records are delivered in order. But a replica that could not reach Postgres for some
/// time delivers its records late, before positions that were read already. A reader that must not miss
/// events therefore reads again from some time before the last position, and skips the events that it
/// has seen already, by `chain` and `seq`.
///
/// # Errors
/// When the statement fails.
#[instrument(level = "debug", skip_all, fields(limit))]
pub async fn events_after(
    pool: &PgPool,
    filter: &EventFilter,
    after: Option<(Timestamp, String, i64)>,
    limit: i64,
) -> Result<Vec<Decoded<StoredEvent>>, StoreError> {
    let (since, until) = filter.times(after.as_ref().map(|(at, ..)| *at));
    let (after_at, after_chain, after_seq) =
        after.map_or((None, None, None), |(at, chain, seq)| (Some(at), Some(chain), Some(seq)));
    let rows = sqlx::query_as!(
        EventRow,
        r#"/* store::audit::events_after */
        select instance as "instance?", chain, seq,
            case when at >= '1970-01-01 00:00:00+00' and at < '10000-01-01 00:00:00+00' then at end as "at?",
            event as "event?", caller, caller_kind, peer, account, outcome as "outcome?", reason,
            generation, token_fingerprint, trace_id, latency_us, count as "count?",
            detail::text as "detail?", prev_hash as "prev_hash?", hash as "hash?"
        from audit_events
        where at >= $1 and at < $2
            and ($3::text is null or account = $3)
            and ($4::text is null or caller = $4)
            and ($5::text[] is null or event = any($5))
            and ($6::text is null or outcome = $6)
            and ($7::timestamptz is null or (at, chain, seq) > ($7, $8, $9::bigint))
        order by at, chain, seq
        limit $10"#,
        since,
        until,
        filter.account.as_deref(),
        filter.caller.as_deref(),
        filter.events.as_deref(),
        filter.outcome.as_deref(),
        after_at,
        after_chain,
        after_seq,
        limit,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(EventRow::decode).collect())
}

/// Returns the last `n` events, in the order of [`events_after`].
///
/// # Errors
/// As [`events_after`].
#[instrument(level = "debug", skip_all, fields(n))]
pub async fn latest_events(
    pool: &PgPool,
    filter: &EventFilter,
    n: i64,
) -> Result<Vec<Decoded<StoredEvent>>, StoreError> {
    let (since, until) = filter.times(None);
    let rows = sqlx::query_as!(
        EventRow,
        r#"/* store::audit::latest_events */
        select instance as "instance?", chain, seq,
            case when at >= '1970-01-01 00:00:00+00' and at < '10000-01-01 00:00:00+00' then at end as "at?",
            event as "event?", caller, caller_kind, peer, account, outcome as "outcome?", reason,
            generation, token_fingerprint, trace_id, latency_us, count as "count?",
            detail::text as "detail?", prev_hash as "prev_hash?", hash as "hash?"
        from audit_events
        where at >= $1 and at < $2
            and ($3::text is null or account = $3)
            and ($4::text is null or caller = $4)
            and ($5::text[] is null or event = any($5))
            and ($6::text is null or outcome = $6)
        order by at desc, chain desc, seq desc
        limit $7"#,
        since,
        until,
        filter.account.as_deref(),
        filter.caller.as_deref(),
        filter.events.as_deref(),
        filter.outcome.as_deref(),
        n,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().rev().map(EventRow::decode).collect())
}
