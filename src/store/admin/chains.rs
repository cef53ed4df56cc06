//! Chains of replicas that will deliver nothing more.

use super::connection::{Admin, ensure_affected};
use crate::{domain::clock::Timestamp, store::StoreError};

/// A chain that may not be there to its end, and what is known of that.
#[derive(Clone, Debug)]
pub struct OpenChain {
    /// The chain.
    pub chain: String,
    /// When it was opened.
    pub started_at: Timestamp,
    /// The last record that reached Postgres.
    pub delivered_seq: i64,
    /// The last record that the instance told of, if it told of any of this chain.
    pub told_seq: Option<i64>,
    /// When it told so.
    pub heartbeat_at: Option<Timestamp>,
    /// Whether it still runs: it was heard of in the last minute and has not stopped.
    pub live: bool,
    /// Whether it was stopped in order.
    pub stopped: bool,
    /// What was said of it before.
    pub retired: Option<String>,
}

impl Admin {
    /// The chains of an instance that no other is known to go on from: the last one, and those that were
    /// not delivered to their end, in the order in which they were opened.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when no chain is known of it.
    pub async fn open_chains(&self, instance: &str) -> Result<Vec<OpenChain>, StoreError> {
        let chains = sqlx::query_as!(
            OpenChain,
            r#"/* store::admin::open_chains */
            select c.chain, c.started_at, c.delivered_seq, c.retired,
                case when i.journal_chain = c.chain then i.journal_seq end as told_seq,
                i.heartbeat_at as "heartbeat_at?",
                coalesce(i.stopped_at is not null, false) as "stopped!",
                coalesce(i.stopped_at is null
                    and i.heartbeat_at > clock_timestamp() - interval '1 minute', false) as "live!"
            from audit_chains c
            left join instances i on i.id = c.instance
            where c.instance = $1 and not exists (
                select from audit_chains n
                where n.linked_chain = c.chain and n.linked_hash = c.delivered_hash)
            -- Names sort as chains were opened.
            order by c.chain"#,
            instance,
        )
        .fetch_all(&self.pool)
        .await?;
        if chains.is_empty() {
            let unknown = format!("no audit chain of instance {instance} is known");
            return Err(StoreError::NotFound(unknown));
        }
        Ok(chains)
    }

    /// Says that nothing more will come of a chain, and what that means; it becomes an audit event.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when it is not known.
    pub async fn retire(&self, chain: &str, what: &str) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        let retired = sqlx::query!(
            "/* store::admin::retire */
            update audit_chains set retired = $2, retired_at = clock_timestamp() where chain = $1",
            chain,
            what,
        )
        .execute(&mut *transaction)
        .await?;
        ensure_affected(retired.rows_affected(), || format!("there is no audit chain {chain}"))?;
        Ok(transaction.commit().await?)
    }
}
