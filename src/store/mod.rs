//! Postgres: the only module that contains SQL.
//!
//! Every statement is checked against the schema at compile time (`sqlx::query!`), and begins with a
//! comment that names its function, so that a statement in the server's log can be found here.

pub mod accounts;
pub mod admin;
pub mod audit;
pub mod callers;
pub mod changes;
mod connect_options;
mod connection;
mod database_url;
pub mod deployment;
mod distrust;
mod error;
mod execution;
pub mod history;
pub mod instances;
pub mod intake;
pub mod intake_keys;
pub mod leases;
mod lenient;
mod location;
pub mod mass_changes;
pub mod migrate;
mod pooler;
pub mod retention;
pub mod schema_trust;
mod session_limits;
mod session_settings;
pub mod tokens;
mod trust;

use std::time::Duration;

use sqlx::{PgPool, Postgres, Transaction, postgres::types::PgInterval};

pub use self::{
    connection::{Database, MAX_LIFETIME, Session},
    error::{DatabaseCause, StoreError},
    execution::within,
    lenient::{Readable, UnusableRow},
    location::Location,
    trust::{Answer, TrustGate, TrustLock},
};

/// Begins a transaction that waits for each lock for half a second at most. Admins can hold locks for as long
/// as they like, and what the broker does after a call to the upstream must not depend on them.
///
/// The limit is shorter than `deadlock_timeout`, one second by default: in a deadlock with an admin's
/// transaction, the broker's is the one that ends.
const BEGIN: &str = "begin; set local lock_timeout = '500ms'";

/// Begins a transaction whose statements fail with [`StoreError::Locked`] if they wait for a lock longer than
/// [`BEGIN`] says.
async fn begin(pool: &PgPool) -> Result<Transaction<'static, Postgres>, StoreError> {
    Ok(pool.begin_with(BEGIN).await?)
}

/// Converts a duration to an `interval`, whose resolution is a microsecond.
fn interval(duration: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(duration.as_micros()).unwrap_or(i64::MAX),
    }
}
