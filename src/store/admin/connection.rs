//! The admin's session with the database, shared by all commands.

use sqlx::{PgPool, Postgres, Transaction};
use tracing::instrument;

use crate::store::{Database, StoreError};

/// The person who makes a change, and the reason. Both are recorded in the audit log with each change.
#[derive(Clone, Debug, Default)]
pub struct Attribution {
    /// The person, if known. The database's login is recorded in any case.
    pub actor: Option<String>,
    /// The reason, such as a ticket's number.
    pub reason: Option<String>,
}

/// A session in which an admin's command reads and writes accounts, callers and audit chains.
///
/// Every method returns the database's error as [`StoreError`]; the sections `# Errors` name only
/// the kinds that a command handles.
#[derive(Clone, Debug)]
pub struct Admin {
    pub(super) pool: PgPool,
    /// Keeps the pool up with a URL that is read from a file.
    _database: Database,
    attribution: Attribution,
}

impl Admin {
    /// Connects to `database`. Changes are recorded with `attribution`.
    ///
    /// # Errors
    /// Returns at once why the database cannot be reached or refuses the login.
    #[instrument(level = "debug", skip_all)]
    pub async fn connect(
        database: &Database,
        attribution: Attribution,
    ) -> Result<Self, StoreError> {
        database.check_connection().await?;
        Ok(Self { pool: database.pool(1), _database: database.clone(), attribution })
    }

    /// Returns the session's pool of one connection, for reads outside of this module, such as those of the
    /// audit log.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Begins a transaction in which the triggers record the attribution with each change.
    pub(super) async fn begin(&self) -> Result<Transaction<'static, Postgres>, StoreError> {
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

/// Returns whether `error` is a violation of the unique constraint with the name `constraint`.
pub(super) fn violates(error: &sqlx::Error, constraint: &str) -> bool {
    error
        .as_database_error()
        .is_some_and(|error| error.is_unique_violation() && error.constraint() == Some(constraint))
}

/// Returns [`StoreError::NotFound`] with the text `missing` if a statement affected no row.
pub(super) fn ensure_affected(
    rows: u64,
    missing: impl FnOnce() -> String,
) -> Result<(), StoreError> {
    if rows == 0 { Err(StoreError::NotFound(missing())) } else { Ok(()) }
}
