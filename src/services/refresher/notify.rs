//! Notifies the other replicas of new tokens.

use sqlx::PgPool;
use tracing::warn;

use crate::store::{tokens, within};

/// Notifies the other replicas, so that they load new tokens at once. A failure is only logged, since
/// the replicas load the tokens at their next poll.
pub(super) async fn notify_replicas(pool: &PgPool) {
    if let Err(error) = within(tokens::notify(pool)).await {
        warn!(%error, "the other replicas cannot be notified; they load the new tokens at their next poll");
    }
}
