//! Limits on how long and how often a step with the database is tried.

use std::time::Duration;

use tokio::time::timeout;
use tracing::debug;

use super::StoreError;

/// How long one step of refreshing or of the change feed waits for the database. The server's own
/// limits do not help when the connection to it hangs.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a transaction is tried that the server keeps ending because of other transactions.
const TRANSACTION_ATTEMPTS: usize = 3;

/// Runs `step`, and drops it when it takes longer than ten seconds. Whether what it had sent was
/// committed is unknown then.
///
/// # Errors
/// Returns the step's own error, and [`StoreError::TimedOut`] when the time is over.
pub async fn within<T>(step: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let late = StoreError::TimedOut { reason: "no answer within 10 s" };
    timeout(STEP_TIMEOUT, step).await.unwrap_or(Err(late))
}

/// Runs `transaction`, and repeats it at once when the server ended it by a serialization failure or
/// a deadlock, up to three times in all. It must be one whole transaction, or one statement outside
/// any, and must have no effect outside the database.
///
/// # Errors
/// Returns the transaction's last error.
pub(super) async fn repeat_on_conflict<T, F: Future<Output = Result<T, StoreError>>>(
    mut transaction: impl FnMut() -> F,
) -> Result<T, StoreError> {
    for _ in 1..TRANSACTION_ATTEMPTS {
        match transaction().await {
            Err(error) if error.is_retryable() => debug!(%error, "a transaction is repeated"),
            done => return done,
        }
    }
    transaction().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_error_that_is_no_conflict_is_not_tried_again() {
        let mut attempts = 0;
        let outcome: Result<(), _> = repeat_on_conflict(|| {
            attempts += 1;
            std::future::ready(Err(StoreError::NotFound("none".into())))
        })
        .await;
        assert!(matches!(outcome, Err(StoreError::NotFound(_))));
        assert_eq!(attempts, 1);
    }
}
