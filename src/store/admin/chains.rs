//! Retirement of the audit chains of a lost replica, which will deliver no more records.

use tracing::instrument;

use super::connection::{Admin, ensure_affected};
use crate::{domain::clock::Timestamp, store::StoreError};

/// A chain of which more records may exist than were delivered.
#[derive(Clone, Debug)]
pub struct OpenChain {
    /// Name of the chain.
    pub chain: String,
    /// When it was opened; absent if that is not a time between the years 1970 and 9999.
    pub started_at: Option<Timestamp>,
    /// `seq` of the last record in Postgres.
    pub delivered_seq: i64,
    /// `seq` of the last record that the instance reported in its heartbeat; `None` if it reported
    /// no record of this chain.
    pub reported_seq: Option<i64>,
    /// Time of the instance's last heartbeat; absent if that is not a time between the years 1970 and 9999.
    pub heartbeat_at: Option<Timestamp>,
    /// Whether the instance runs: it sent a heartbeat within the last minute and has not stopped.
    pub live: bool,
    /// Whether the instance was stopped in the regular way.
    pub stopped: bool,
    /// Which records may be missing, as noted by an earlier retirement; `None` if there was none.
    pub retired: Option<String>,
}

/// An instance that reported records which Postgres does not have.
#[derive(Clone, Debug)]
pub struct UndeliveredReport {
    /// The instance.
    pub instance: String,
    /// The chain that it writes, or wrote last.
    pub chain: String,
    /// `seq` of the last record that it reported.
    pub reported_seq: i64,
    /// `seq` of the last record in Postgres; 0 if the chain is not known there.
    pub delivered_seq: i64,
    /// Whether the instance runs: it sent a heartbeat within the last minute and has not stopped.
    pub live: bool,
    /// Whether its last heartbeat is so young that it certainly reaches the database.
    pub connected: bool,
}

impl Admin {
    /// Returns the instances that reported records which Postgres does not have, unless the chain is retired.
    ///
    /// # Errors
    /// Returns the database's error.
    #[instrument(level = "debug", skip_all)]
    pub async fn undelivered_reports(&self) -> Result<Vec<UndeliveredReport>, StoreError> {
        Ok(sqlx::query_as!(
            UndeliveredReport,
            r#"/* store::admin::undelivered_reports */
            select i.id as instance, i.journal_chain as "chain!", i.journal_seq as "reported_seq!",
                coalesce(c.delivered_seq, 0) as "delivered_seq!",
                coalesce(i.stopped_at is null
                    and i.heartbeat_at > clock_timestamp() - interval '1 minute'
                    and i.heartbeat_at <= timestamptz '9999-12-31 00:00Z', false) as "live!",
                coalesce(i.heartbeat_at > clock_timestamp() - interval '5 seconds', false) as "connected!"
            from instances i
            left join audit_chains c on c.chain = i.journal_chain
            where i.journal_chain is not null and c.retired is null
                and i.journal_seq > coalesce(c.delivered_seq, 0)
            order by i.id"#,
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Returns the chains of an instance that no other chain is known to continue: the last one,
    /// and those that were not delivered completely. They are in the order in which they were
    /// opened.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when no chain of the instance is known.
    #[instrument(level = "debug", skip_all, fields(instance))]
    pub async fn open_chains(&self, instance: &str) -> Result<Vec<OpenChain>, StoreError> {
        let chains = sqlx::query_as!(
            OpenChain,
            r#"/* store::admin::open_chains */
            select c.chain, c.delivered_seq,
                case when c.started_at >= '1970-01-01 00:00:00+00'
                    and c.started_at < '10000-01-01 00:00:00+00' then c.started_at end as started_at,
                c.retired,
                case when i.journal_chain = c.chain then i.journal_seq end as reported_seq,
                case when i.heartbeat_at between timestamptz '1970-01-01 00:00Z'
                    and timestamptz '9999-12-31 00:00Z' then i.heartbeat_at end as "heartbeat_at?",
                coalesce(i.stopped_at is not null, false) as "stopped!",
                coalesce(i.stopped_at is null
                    and i.heartbeat_at > clock_timestamp() - interval '1 minute'
                    and i.heartbeat_at <= timestamptz '9999-12-31 00:00Z', false) as "live!"
            from audit_chains c
            left join instances i on i.id = c.instance
            where c.instance = $1 and not exists (
                select from audit_chains n
                where n.linked_chain = c.chain and n.linked_hash = c.delivered_hash
                    and n.chain <> c.chain)
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

    /// Retires a chain, of which no more records will be delivered. `what` says which records may be
    /// missing. A trigger records the change, which a broker then writes to the audit log.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is no such chain.
    #[instrument(level = "debug", skip_all, fields(chain))]
    pub async fn retire_chain(&self, chain: &str, what: &str) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        let retired = sqlx::query!(
            "/* store::admin::retire_chain */
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
