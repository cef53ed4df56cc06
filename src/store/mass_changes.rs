//! The permission to change many rows of accounts, callers, credentials or grants with one statement.
//!
//! The triggers of `migrations/repeatable/7_mass_changes.sql` refuse such a statement, since a condition that is wrong
//! would harm everybody, unless its session says for how many rows it is meant.

use sqlx::PgConnection;
use tracing::instrument;

use super::StoreError;

/// The setting of a session that says how many rows one statement may change.
pub const MAX_CHANGED_ROWS: &str = "token_broker.max_changed_rows";

/// Allows each statement of the present transaction to change up to `rows` rows; `None` means any number.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn allow(connection: &mut PgConnection, rows: Option<u32>) -> Result<(), StoreError> {
    // The largest number that the triggers read.
    let rows = rows.map_or_else(|| "9".repeat(18), |rows| rows.to_string());
    sqlx::query!(
        "-- store::mass_changes::allow
        select pg_catalog.set_config($1, $2, true)",
        MAX_CHANGED_ROWS,
        rows,
    )
    .fetch_one(connection)
    .await?;
    Ok(())
}
