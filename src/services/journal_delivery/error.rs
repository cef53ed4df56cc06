//! Errors of delivery.

use std::time::Duration;

use thiserror::Error;

use crate::store::StoreError;

/// Why delivery was interrupted.
#[derive(Debug, Error)]
pub enum DeliveryError {
    /// A statement failed, or the connection.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The database did not answer within this time.
    #[error("the database did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The chain's position in Postgres is not the one that was read before: another process has delivered
    /// records of the chain.
    #[error("another process moved the delivered position of audit chain {0}")]
    PositionConflict(String),
    /// The blocking task that reads the journal did not complete: it panicked, or the runtime shuts down.
    #[error("reading the journal was interrupted")]
    Interrupted,
}
