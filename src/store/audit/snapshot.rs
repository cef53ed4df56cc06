//! Consistent snapshots of the audit log, for verification and export.

use futures_util::{Stream, StreamExt};
use sqlx::{PgPool, Postgres, Transaction};
use tracing::instrument;

use super::{
    filter::EventFilter,
    row::{Decoded, EventRow, digest},
};
use crate::{
    audit::{
        chain::StoredEvent,
        checkpoint::{PruningReceipt, Signature, SignedCheckpoint},
        unreadable::Unreadable,
        verify::ChainClaim,
    },
    store::StoreError,
};

/// The fault of a row whose time is infinite, or outside of the years that a record may have.
const NO_TIME: &str = "its time is not between the years 1970 and 9999";

/// A transaction that shows the whole audit log as of one time, however long reading it takes. Retention
/// removes no records until it ends.
pub struct AuditSnapshot(pub(super) Transaction<'static, Postgres>);

impl AuditSnapshot {
    /// Begins a transaction with repeatable-read isolation and without a time limit for statements or
    /// for pauses between them.
    ///
    /// # Errors
    /// When a statement fails.
    #[instrument(level = "debug", skip_all)]
    pub async fn open(pool: &PgPool) -> Result<Self, StoreError> {
        let begin = "begin isolation level repeatable read, read only";
        let mut transaction = pool.begin_with(begin).await?;
        // Locked before the first query takes the snapshot, so that retention does not remove a day
        // that the snapshot shows.
        sqlx::query!(
            "/* store::audit::snapshot::open */ lock table audit_events in access share mode"
        )
        .execute(&mut *transaction)
        .await?;
        sqlx::query!(
            "/* store::audit::snapshot::open */
            select set_config('statement_timeout', '0', true) as statement,
                set_config('idle_in_transaction_session_timeout', '0', true) as idle"
        )
        .fetch_one(&mut *transaction)
        .await?;
        Ok(Self(transaction))
    }

    /// Ends the transaction, for which retention waits.
    ///
    /// # Errors
    /// When the statement fails.
    pub async fn close(self) -> Result<(), StoreError> {
        Ok(self.0.rollback().await?)
    }

    /// Returns the ids of the keys by which the log's fingerprints were computed, other than `known`. Reads all
    /// records.
    ///
    /// # Errors
    /// When the statement fails.
    #[instrument(level = "debug", skip_all)]
    pub async fn other_fingerprint_keys(
        &mut self,
        known: &[String],
    ) -> Result<Vec<String>, StoreError> {
        Ok(sqlx::query_scalar!(
            r#"/* store::audit::snapshot::other_fingerprint_keys */
            select distinct left(split_part(token_fingerprint, ':', 1), 64) as "key!"
            from audit_events
            where token_fingerprint is not null
                and split_part(token_fingerprint, ':', 1) <> all ($1::text[])
            order by 1 limit 10"#,
            known
        )
        .fetch_all(&mut *self.0)
        .await?)
    }

    /// Returns what the database claims about each chain, by name.
    ///
    /// # Errors
    /// When the statement fails.
    #[instrument(level = "debug", skip_all)]
    pub async fn claims(&mut self) -> Result<Vec<Decoded<ChainClaim>>, StoreError> {
        const TABLE: &str = "audit_chains";
        let rows = sqlx::query!(
            r#"/* store::audit::snapshot::claims */
            select chain, instance as "instance?",
                case when started_at >= '1970-01-01 00:00:00+00'
                    and started_at < '10000-01-01 00:00:00+00' then started_at end as started_at,
                linked_chain, linked_hash as "linked_hash?", delivered_seq as "delivered_seq?",
                delivered_hash as "delivered_hash?", retired
            from audit_chains order by chain"#
        )
        .fetch_all(&mut *self.0)
        .await?;
        let decoded = rows.into_iter().map(|row| -> Decoded<ChainClaim> {
            let fault = |why: &str| Unreadable::row(TABLE, &row.chain, 0, why);
            let read = |column, bytes: &Option<Vec<u8>>| {
                digest(TABLE, &row.chain, 0, column, bytes.as_deref())
            };
            Ok(ChainClaim {
                linked_hash: read("linked_hash", &row.linked_hash)?,
                last_hash: Some(read("delivered_hash", &row.delivered_hash)?),
                started_at: row.started_at.ok_or_else(|| fault(NO_TIME))?,
                last_seq: Some(row.delivered_seq.ok_or_else(|| fault("delivered_seq is null"))?),
                instance: row.instance.ok_or_else(|| fault("instance is null"))?,
                chain: row.chain,
                linked_chain: row.linked_chain,
                retired: row.retired,
            })
        });
        Ok(decoded.collect())
    }

    /// Returns the receipts of the ranges that retention removed, by chain and number.
    ///
    /// # Errors
    /// When the statement fails.
    #[instrument(level = "debug", skip_all)]
    pub async fn receipts(&mut self) -> Result<Vec<Decoded<PruningReceipt>>, StoreError> {
        const TABLE: &str = "audit_pruning_receipts";
        let rows = sqlx::query!(
            r#"/* store::audit::snapshot::receipts */
            select chain, first_seq, prev_hash as "prev_hash?", last_seq, hash as "hash?",
                case when at >= '1970-01-01 00:00:00+00' and at < '10000-01-01 00:00:00+00'
                    then at end as at,
                key_id as "key_id?", signature as "signature?"
            from audit_pruning_receipts order by chain, first_seq"#
        )
        .fetch_all(&mut *self.0)
        .await?;
        let decoded = rows.into_iter().map(|row| -> Decoded<PruningReceipt> {
            let fault = |why: &str| Unreadable::row(TABLE, &row.chain, row.first_seq, why);
            let read = |column, bytes: &Option<Vec<u8>>| {
                digest(TABLE, &row.chain, row.first_seq, column, bytes.as_deref())
            };
            Ok(PruningReceipt {
                prev_hash: read("prev_hash", &row.prev_hash)?,
                hash: read("hash", &row.hash)?,
                at: row.at.ok_or_else(|| fault(NO_TIME))?,
                signature: Signature {
                    key_id: row.key_id.ok_or_else(|| fault("key_id is null"))?,
                    signature: row.signature.ok_or_else(|| fault("signature is null"))?,
                },
                chain: row.chain,
                first_seq: row.first_seq,
                last_seq: row.last_seq,
            })
        });
        Ok(decoded.collect())
    }

    /// Returns the signed checkpoints, by chain and number.
    ///
    /// # Errors
    /// When the statement fails.
    #[instrument(level = "debug", skip_all)]
    pub async fn checkpoints(&mut self) -> Result<Vec<Decoded<SignedCheckpoint>>, StoreError> {
        const TABLE: &str = "audit_heads";
        let rows = sqlx::query!(
            r#"/* store::audit::snapshot::checkpoints */
            select chain, seq, hash as "hash?",
                case when at >= '1970-01-01 00:00:00+00' and at < '10000-01-01 00:00:00+00'
                    then at end as at,
                key_id as "key_id?", signature as "signature?"
            from audit_heads order by chain, seq"#
        )
        .fetch_all(&mut *self.0)
        .await?;
        let decoded = rows.into_iter().map(|row| -> Decoded<SignedCheckpoint> {
            let fault = |why: &str| Unreadable::row(TABLE, &row.chain, row.seq, why);
            Ok(SignedCheckpoint {
                hash: digest(TABLE, &row.chain, row.seq, "hash", row.hash.as_deref())?,
                at: row.at.ok_or_else(|| fault(NO_TIME))?,
                signature: Signature {
                    key_id: row.key_id.ok_or_else(|| fault("key_id is null"))?,
                    signature: row.signature.ok_or_else(|| fault("signature is null"))?,
                },
                chain: row.chain,
                seq: row.seq,
            })
        });
        Ok(decoded.collect())
    }

    /// Streams the records that `filter` selects, by time. Within each chain, that is nearly the order of
    /// numbers. An item is an error when the statement fails. Without bounds of time, every row is read,
    /// whatever its time is.
    pub fn events<'a>(
        &'a mut self,
        filter: &'a EventFilter,
    ) -> impl Stream<Item = Result<Decoded<StoredEvent>, StoreError>> + 'a {
        sqlx::query_as!(
            EventRow,
            r#"/* store::audit::snapshot::events */
            select instance as "instance?", chain, seq,
            case when at >= '1970-01-01 00:00:00+00' and at < '10000-01-01 00:00:00+00' then at end as "at?",
            event as "event?", caller, caller_kind, peer, account, outcome as "outcome?", reason,
            generation, token_fingerprint, trace_id, latency_us, count as "count?",
            detail::text as "detail?", prev_hash as "prev_hash?", hash as "hash?"
            from audit_events
            where at >= coalesce($1, '-infinity'::timestamptz)
                and at <= coalesce($2::timestamptz - interval '1 microsecond', 'infinity'::timestamptz)
                and ($3::text is null or account = $3)
                and ($4::text is null or caller = $4)
                and ($5::text[] is null or event = any($5))
                and ($6::text is null or outcome = $6)
                and ($7::text[] is null or token_fingerprint = any($7))
            order by at, chain, seq"#,
            filter.since,
            filter.until,
            filter.account.as_deref(),
            filter.caller.as_deref(),
            filter.events.as_deref(),
            filter.outcome.as_deref(),
            filter.fingerprints.as_deref(),
        )
        .fetch(&mut *self.0)
        .map(|row| Ok(row?.decode()))
    }
}
