//! The limits of a session's statements.

use std::time::Duration;

use super::{Session, StoreError};

impl Session {
    /// Sets how long each statement may wait for a lock, and how long it may take in all. A statement that
    /// exceeds them fails, and the session remains usable.
    ///
    /// # Errors
    /// Returns the database's error.
    pub async fn limit(&mut self, lock: Duration, statement: Duration) -> Result<(), StoreError> {
        sqlx::query!(
            r#"-- store::session_limits::limit
            select set_config('lock_timeout', $1, false) as lock,
                set_config('statement_timeout', $2, false) as statement"#,
            lock.as_millis().to_string(),
            statement.as_millis().to_string(),
        )
        .fetch_one(self.connection()?)
        .await?;
        Ok(())
    }
}
