//! Postgres: the only module that contains SQL.
//!
//! Every statement is checked against the schema at compile time (`sqlx::query!`), and begins with a
//! comment that names the function it is in, so that a line of the server's log leads here.

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
    ConnectOptions, Connection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions, PgSslMode, types::PgInterval},
};
use tokio::time::timeout;

use self::migrate::Schema;
pub use self::{
    error::{DatabaseCause, StoreError},
    execution::within,
};

/// How long a statement may take before the server ends it, so that one that waits for a lock does
/// not keep its connection for ever.
const STATEMENT_TIMEOUT: &str = "30s";

/// How long a connection that is given back to the pool may take to answer a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the pool waits for a free connection, or for a new one.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long [`Database::probe`] waits for the server.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Converts a duration to an `interval`, whose resolution is a microsecond.
fn interval(duration: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(duration.as_micros()).unwrap_or(i64::MAX),
    }
}

/// The options with which the database is connected to. Making one opens no connection.
#[derive(Clone, Debug)]
pub struct Database {
    options: PgConnectOptions,
}

impl Database {
    /// Reads a `postgresql://` URL. A server that is not on loopback must have a certificate that is
    /// valid for its name, unless the URL says otherwise with `sslmode`. `application_name` is how
    /// the server's logs and views name the sessions.
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

    /// Returns a pool of at most `connections` that connects when it is first used. Whoever asks it
    /// for a connection waits for at most five seconds.
    #[must_use]
    pub fn pool(&self, connections: u32) -> PgPool {
        PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            // sqlx pings a connection that is given back, without a limit. One whose peer fell silent
            // would be missing from the pool until TCP gives up.
            .after_release(|connection, _| {
                Box::pin(async move {
                    let answers = timeout(PING_TIMEOUT, connection.ping()).await;
                    answers.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map(|()| true)
                })
            })
            .connect_lazy_with(self.options.clone())
    }

    /// Connects once and disconnects. A pool would try for seconds, and then only say that no
    /// connection became free.
    ///
    /// # Errors
    /// Returns at once why the server cannot be reached or refuses the login.
    pub async fn reach(&self) -> Result<(), StoreError> {
        Ok(self.options.connect().await?.close().await?)
    }

    /// Asks on a connection of its own whether the server answers at all, for at most three seconds:
    /// one session that is lost, or one statement that takes long, says nothing about the others.
    /// A server that refuses the login answers.
    ///
    /// # Errors
    /// Returns the lost connection or the timeout.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let answer = async {
            let mut connection = self.options.connect().await?;
            // A connection pooler in between may accept connections while its server is away.
            connection.ping().await?;
            Ok(connection.close().await?)
        };
        let late = StoreError::TimedOut { reason: "no answer within 3 s" };
        match timeout(PROBE_TIMEOUT, answer).await.unwrap_or(Err(late)) {
            Err(error) if error.may_be_outage() => Err(error),
            _ => Ok(()),
        }
    }

    /// Applies the migrations that are missing, or that changed: see [`migrate`].
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
