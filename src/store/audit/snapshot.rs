//! Consistent snapshots of the audit log, for verification and export.

use std::collections::BTreeMap;

use futures_util::{Stream, StreamExt};
use sqlx::{PgPool, Postgres, Transaction, types::Json};
use tracing::instrument;

use super::{
    filter::EventFilter,
    row::{EventRow, digest},
};
use crate::{
    audit::{
        chain::StoredEvent,
        checkpoint::{PruningReceipt, Signature, SignedCheckpoint},
        verify::ChainClaim,
    },
    store::StoreError,
};

/// A transaction that shows the whole audit log as of one time, however long reading it takes. Retention
/// removes no records until it ends.
pub struct AuditSnapshot(Transaction<'static, Postgres>);

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

    /// Returns what the database claims about each chain, by name.
    ///
    /// # Errors
    /// When the statement fails, or a row holds a malformed hash.
    #[instrument(level = "debug", skip_all)]
    pub async fn claims(&mut self) -> Result<Vec<ChainClaim>, StoreError> {
        let rows = sqlx::query!(
            "/* store::audit::snapshot::claims */
            select chain, instance, started_at, linked_chain, linked_hash, delivered_seq,
                delivered_hash, retired
            from audit_chains order by chain"
        )
        .fetch_all(&mut *self.0)
        .await?;
        rows.into_iter()
            .map(|row| {
                let read = |bytes| digest("audit_chains", &row.chain, bytes);
                Ok(ChainClaim {
                    linked_hash: read(&row.linked_hash)?,
                    last_hash: Some(read(&row.delivered_hash)?),
                    chain: row.chain,
                    instance: row.instance,
                    started_at: row.started_at,
                    linked_chain: row.linked_chain,
                    last_seq: Some(row.delivered_seq),
                    retired: row.retired,
                })
            })
            .collect()
    }

    /// Returns the receipts of the ranges that retention removed, by chain and number.
    ///
    /// # Errors
    /// When the statement fails, or a row holds a malformed hash.
    #[instrument(level = "debug", skip_all)]
    pub async fn receipts(&mut self) -> Result<Vec<PruningReceipt>, StoreError> {
        let rows = sqlx::query!(
            "/* store::audit::snapshot::receipts */
            select chain, first_seq, prev_hash, last_seq, hash, at, key_id, signature
            from audit_pruning_receipts order by chain, first_seq"
        )
        .fetch_all(&mut *self.0)
        .await?;
        rows.into_iter()
            .map(|row| {
                let id = format_args!("{} {}", row.chain, row.first_seq);
                Ok(PruningReceipt {
                    prev_hash: digest("audit_pruning_receipts", id, &row.prev_hash)?,
                    hash: digest("audit_pruning_receipts", id, &row.hash)?,
                    chain: row.chain,
                    first_seq: row.first_seq,
                    last_seq: row.last_seq,
                    at: row.at,
                    signature: Signature { key_id: row.key_id, signature: row.signature },
                })
            })
            .collect()
    }

    /// Returns the signed checkpoints, by chain and number.
    ///
    /// # Errors
    /// When the statement fails, or a row holds a malformed hash.
    #[instrument(level = "debug", skip_all)]
    pub async fn checkpoints(&mut self) -> Result<Vec<SignedCheckpoint>, StoreError> {
        let rows = sqlx::query!(
            "/* store::audit::snapshot::checkpoints */
            select chain, seq, hash, at, key_id, signature from audit_heads order by chain, seq"
        )
        .fetch_all(&mut *self.0)
        .await?;
        rows.into_iter()
            .map(|row| {
                let id = format_args!("{} {}", row.chain, row.seq);
                Ok(SignedCheckpoint {
                    hash: digest("audit_heads", id, &row.hash)?,
                    chain: row.chain,
                    seq: row.seq,
                    at: row.at,
                    signature: Signature { key_id: row.key_id, signature: row.signature },
                })
            })
            .collect()
    }

    /// Streams the records that `filter` selects, by time. Within each chain, that is nearly the order of
    /// numbers. An item is an error when the statement fails, or a row holds a malformed hash.
    pub fn events<'a>(
        &'a mut self,
        filter: &'a EventFilter,
    ) -> impl Stream<Item = Result<StoredEvent, StoreError>> + 'a {
        let (since, until) = filter.times(None);
        sqlx::query_as!(
            EventRow,
            r#"/* store::audit::snapshot::events */
            select instance, chain, seq, at, event, caller, caller_kind, peer, account, outcome,
                reason, generation, token_fingerprint, trace_id, latency_us, count,
                detail as "detail: Json<BTreeMap<String, String>>", prev_hash, hash
            from audit_events
            where at >= $1 and at < $2
                and ($3::text is null or account = $3)
                and ($4::text is null or caller = $4)
                and ($5::text is null or event = $5)
                and ($6::text is null or outcome = $6)
                and ($7::text[] is null or token_fingerprint = any($7))
            order by at, chain, seq"#,
            since,
            until,
            filter.account.as_deref(),
            filter.caller.as_deref(),
            filter.event.as_deref(),
            filter.outcome.as_deref(),
            filter.fingerprints.as_deref(),
        )
        .fetch(&mut *self.0)
        .map(|row| row?.try_into())
    }
}
