//! Postgres: the only module that contains SQL.
//!
//! Every statement is checked against the schema at compile time (`sqlx::query!`), and begins with a
//! comment that names its function, so that a statement in the server's log can be found here.

pub mod accounts;
pub mod admin;
pub mod audit;
pub mod callers;
pub mod changes;
pub mod deployment;
mod error;
mod execution;
pub mod instances;
pub mod leases;
pub mod migrate;
pub mod retention;
pub mod tokens;

use std::{str::FromStr, time::Duration};

use sqlx::{
    ConnectOptions, Connection, PgPool, Postgres, Transaction,
    postgres::{PgConnectOptions, PgPoolOptions, PgSslMode, types::PgInterval},
};
use tokio::time::timeout;

use self::migrate::Schema;
pub use self::{
    error::{DatabaseCause, StoreError},
    execution::within,
};

/// How long a statement may take before the server cancels it, so that a statement that waits for a lock
/// does not occupy its connection for ever.
const STATEMENT_TIMEOUT: &str = "30s";

/// How long the ping of a connection may take when it is returned to the pool.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a pool waits for a free or a new connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long [`Database::probe`] waits for the server.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

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

/// The options for connections to the database. Creating a value opens no connection.
#[derive(Clone, Debug)]
pub struct Database {
    options: PgConnectOptions,
}

impl Database {
    /// Reads a `postgresql://` URL. A server that is not on loopback must have a certificate that is
    /// valid for its name, unless the URL sets another `sslmode`. `application_name` identifies the
    /// sessions in the server's logs and views.
    ///
    /// # Errors
    /// Returns [`StoreError::InvalidUrl`], which never quotes the URL: it may hold a password.
    pub fn new(url: &str, application_name: &str) -> Result<Self, StoreError> {
        let malformed = || StoreError::InvalidUrl;
        let parsed = url::Url::parse(url).map_err(|_| malformed())?;
        if !matches!(parsed.scheme(), "postgres" | "postgresql") {
            return Err(malformed());
        }
        let mut options = PgConnectOptions::from_str(url).map_err(|_| malformed())?;
        let local = options.get_socket().is_some()
            || matches!(options.get_host(), "localhost" | "127.0.0.1" | "::1" | "[::1]")
            || options.get_host().starts_with('/');
        let has_mode = parsed.query_pairs().any(|(key, _)| key == "sslmode" || key == "ssl-mode");
        if !has_mode {
            options =
                options.ssl_mode(if local { PgSslMode::Prefer } else { PgSslMode::VerifyFull });
        }
        // With `synchronous_commit` off, a crash of the server could forget audit records that were
        // reported as stored, and tokens that were already served.
        options = options.application_name(application_name).options([
            ("statement_timeout", STATEMENT_TIMEOUT),
            ("synchronous_commit", "on"),
            ("timezone", "UTC"),
        ]);
        Ok(Self { options })
    }

    /// Returns the options for a connection outside of any pool.
    #[must_use]
    pub fn connection(&self) -> &PgConnectOptions {
        &self.options
    }

    /// Returns a pool of at most `connections` connections, which it opens when they are needed. Acquiring
    /// one fails after five seconds.
    #[must_use]
    pub fn pool(&self, connections: u32) -> PgPool {
        PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            // sqlx pings a connection that is returned, without a timeout. If its peer does not answer any
            // more, the connection would occupy a slot of the pool until TCP gives up.
            .after_release(|connection, _| {
                Box::pin(async move {
                    let answers = timeout(PING_TIMEOUT, connection.ping()).await;
                    answers.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map(|()| true)
                })
            })
            .connect_lazy_with(self.options.clone())
    }

    /// Opens a connection and closes it again, to check the options. Unlike a pool, it does not retry, and
    /// it returns the reason of a failure.
    ///
    /// # Errors
    /// Returns why the server cannot be reached or refuses the login.
    pub async fn check_connection(&self) -> Result<(), StoreError> {
        Ok(self.options.connect().await?.close().await?)
    }

    /// Checks on a new connection, within three seconds, whether the server answers at all. A lost session
    /// or a slow statement on another connection does not show that. A server that refuses the login does
    /// answer.
    ///
    /// # Errors
    /// Returns [`StoreError::ConnectionLost`] or [`StoreError::TimedOut`] if the server does not answer.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let answer = async {
            let mut connection = self.options.connect().await?;
            // A connection pooler in between may accept connections although its server does not answer.
            connection.ping().await?;
            Ok(connection.close().await?)
        };
        let late = StoreError::TimedOut { reason: "no answer within 3 s" };
        match timeout(PROBE_TIMEOUT, answer).await.unwrap_or(Err(late)) {
            Err(error) if error.may_be_outage() => Err(error),
            _ => Ok(()),
        }
    }

    /// Applies the migrations that are missing or have changed: see [`migrate`].
    ///
    /// # Errors
    /// When the server cannot be reached or a migration fails.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        Schema::of_this_release()?.apply(&self.options).await
    }

    /// Checks that the schema has every migration of this release.
    ///
    /// # Errors
    /// [`StoreError::Schema`] names what is missing and the command that applies it.
    pub async fn check_schema(&self) -> Result<(), StoreError> {
        Schema::of_this_release()?.check(&self.options).await
    }
}
