//! Timeouts and retries of operations on the database.

use std::time::Duration;

use tokio::time::timeout;
use tracing::debug;

use super::StoreError;

/// How long one step of the refresher or the change feed waits for the database. The server's own timeouts
/// do not apply when the connection hangs.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a transaction is tried that the server aborts because of other transactions.
const TRANSACTION_ATTEMPTS: usize = 3;

/// Runs `step`, and drops it after ten seconds. Whether its statements were committed is unknown then.
///
/// # Errors
/// Returns the step's own error, or [`StoreError::TimedOut`] after ten seconds.
pub async fn within<T>(step: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let late = StoreError::TimedOut { reason: "no answer within 10 s" };
    timeout(STEP_TIMEOUT, step).await.unwrap_or(Err(late))
}

/// Runs `transaction`, up to three times in all if the server aborts it by a serialization failure or a
/// deadlock. There is no pause between the tries. It must be one whole transaction, or one statement
/// outside of a transaction, and must have no effect outside the database.
///
/// # Errors
/// Returns the transaction's last error.
pub(super) async fn repeat_on_conflict<T, F: Future<Output = Result<T, StoreError>>>(
    mut transaction: impl FnMut() -> F,
) -> Result<T, StoreError> {
    for _ in 1..TRANSACTION_ATTEMPTS {
        match transaction().await {
            Err(error) if error.is_retryable() => debug!(%error, "repeating a transaction"),
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
