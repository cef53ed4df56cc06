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
    /// The chain's position in Postgres is not where it was: another process delivers the chain, or the
    /// position belongs to another journal's records.
    #[error("the position of audit chain {0} was moved by somebody else")]
    PositionConflict(String),
    /// A blocking task did not complete, because the process ends.
    #[error("reading the journal was interrupted")]
    Interrupted,
}
