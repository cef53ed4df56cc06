//! What the command line reads and writes on behalf of an admin.
//!
//! Each write is one transaction that says who acts and why; the database's triggers record it in
//! `changes`, and the broker follows from there. A refused value comes back in the trigger's words.

mod accounts;
mod callers;
mod chains;
mod overview;

use sqlx::{PgPool, Postgres, Transaction};

pub use self::{
    accounts::{AccountDetails, AccountSummary, NewAccount, Outcome, Rotation, Selection},
    callers::{
        BearerSummary, CallerDetails, CallerSummary, CredentialDetails, GrantDetails, NewBearer,
        NewCaller, NewGrant,
    },
    chains::OpenChain,
    overview::{InstanceSummary, LastIssue, Load, PublishedKey},
};
use super::{Database, StoreError};

/// Who acts, and why; both go into the audit log.
#[derive(Clone, Debug, Default)]
pub struct Attribution {
    /// The person, where it is known.
    pub actor: Option<String>,
    /// Such as a ticket's number.
    pub reason: Option<String>,
}

/// An admin's hands in the database.
#[derive(Clone, Debug)]
pub struct Admin {
    pool: PgPool,
    attribution: Attribution,
}

impl Admin {
    /// Connects.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] with the reason at once.
    pub async fn connect(
        database: &Database,
        attribution: Attribution,
    ) -> Result<Self, StoreError> {
        database.reach().await?;
        Ok(Self { pool: database.pool(1), attribution })
    }

    /// For what reads the audit log.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// A transaction whose changes carry the attribution.
    async fn begin(&self) -> Result<Transaction<'static, Postgres>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        sqlx::query!(
            "/* store::admin::begin */
             select set_config('token_broker.actor', $1, true) as actor,
                 set_config('token_broker.reason', $2, true) as reason",
            self.attribution.actor.as_deref().unwrap_or_default(),
            self.attribution.reason.as_deref().unwrap_or_default(),
        )
        .fetch_one(&mut *transaction)
        .await?;
        Ok(transaction)
    }
}

/// Whether `error` is the violation of the unique constraint of that name.
fn violates(error: &sqlx::Error, constraint: &str) -> bool {
    error
        .as_database_error()
        .is_some_and(|error| error.is_unique_violation() && error.constraint() == Some(constraint))
}

/// [`StoreError::NotFound`] with `missing`, if a statement met no row.
fn ensure_affected(rows: u64, missing: impl FnOnce() -> String) -> Result<(), StoreError> {
    if rows == 0 { Err(StoreError::NotFound(missing())) } else { Ok(()) }
}
