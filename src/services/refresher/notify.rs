//! Tells the other replicas that tokens changed.

use sqlx::PgPool;
use tracing::warn;

use crate::store::{tokens, within};

/// Notifies the other replicas, so that they load new tokens at once. A failure is only logged: they
/// find the tokens at their next poll.
pub(super) async fn notify_replicas(pool: &PgPool) {
    if let Err(error) = within(tokens::notify(pool)).await {
        warn!(%error, "the other replicas are not notified; they will find out by polling");
    }
}
