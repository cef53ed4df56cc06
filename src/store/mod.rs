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
pub mod deployment;
mod distrust;
mod error;
mod execution;
pub mod history;
pub mod instances;
pub mod intake;
pub mod leases;
mod lenient;
pub mod migrate;
mod pooler;
pub mod retention;
mod session_limits;
mod session_settings;
pub mod tokens;
mod trust;

use std::time::Duration;

use sqlx::postgres::types::PgInterval;

pub use self::{
    connection::{Database, Session},
    error::{DatabaseCause, StoreError},
    execution::within,
    lenient::{Readable, UnusableRow},
    trust::{TrustGate, TrustLock},
};

/// Converts a duration to an `interval`, whose resolution is a microsecond.
fn interval(duration: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(duration.as_micros()).unwrap_or(i64::MAX),
    }
}
