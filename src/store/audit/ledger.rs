//! The audit log at one moment, with all that is claimed of it: what is proven and exported.

use std::collections::BTreeMap;

use futures_util::{Stream, StreamExt};
use sqlx::{PgPool, Postgres, Transaction, types::Json};

use super::{EventFilter, Row, StoredEvent, digest};
use crate::{
    audit::{
        checkpoint::{PruningReceipt, Signature, SignedCheckpoint},
        verify::Claim,
    },
    store::StoreError,
};

/// The audit log as one snapshot shows it, however long reading it takes. Retention waits for it.
pub struct Ledger(Transaction<'static, Postgres>);

impl Ledger {
    /// Takes a snapshot.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn open(pool: &PgPool) -> Result<Self, StoreError> {
        let begin = "begin isolation level repeatable read, read only";
        let mut transaction = pool.begin_with(begin).await?;
        // Before the snapshot is taken, so that retention removes no day that it shows.
        sqlx::query!(
            "/* store::audit::ledger::open */ lock table audit_events in access share mode"
        )
        .execute(&mut *transaction)
        .await?;
        sqlx::query!(
            "/* store::audit::ledger::open */
            select set_config('statement_timeout', '0', true)"
        )
        .fetch_one(&mut *transaction)
        .await?;
        Ok(Self(transaction))
    }

    /// What the database says of each chain.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn claims(&mut self) -> Result<Vec<Claim>, StoreError> {
        let rows = sqlx::query!(
            "/* store::audit::ledger::claims */
            select chain, instance, started_at, linked_chain, linked_hash, delivered_seq,
                delivered_hash, retired
            from audit_chains order by chain"
        )
        .fetch_all(&mut *self.0)
        .await?;
        rows.into_iter()
            .map(|row| {
                let read = |bytes| digest("audit_chains", &row.chain, bytes);
                Ok(Claim {
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

    /// What retention says that it removed.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn cuts(&mut self) -> Result<Vec<PruningReceipt>, StoreError> {
        let rows = sqlx::query!(
            "/* store::audit::ledger::cuts */
            select chain, first_seq, prev_hash, last_seq, hash, at, key_id, signature
            from audit_cuts order by chain, first_seq"
        )
        .fetch_all(&mut *self.0)
        .await?;
        rows.into_iter()
            .map(|row| {
                let id = format_args!("{} {}", row.chain, row.first_seq);
                Ok(PruningReceipt {
                    prev_hash: digest("audit_cuts", id, &row.prev_hash)?,
                    hash: digest("audit_cuts", id, &row.hash)?,
                    chain: row.chain,
                    first_seq: row.first_seq,
                    last_seq: row.last_seq,
                    at: row.at,
                    signature: Signature { key_id: row.key_id, signature: row.signature },
                })
            })
            .collect()
    }

    /// The signed heads.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn heads(&mut self) -> Result<Vec<SignedCheckpoint>, StoreError> {
        let rows = sqlx::query!(
            "/* store::audit::ledger::heads */
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

    /// The records that `filter` lets through, by time, which is nearly the order of each chain.
    pub fn events<'a>(
        &'a mut self,
        filter: &'a EventFilter,
    ) -> impl Stream<Item = Result<StoredEvent, StoreError>> + 'a {
        let (since, until) = filter.times(None);
        sqlx::query_as!(
            Row,
            r#"/* store::audit::ledger::events */
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
