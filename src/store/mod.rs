//! Postgres: the one place that speaks SQL.

pub mod accounts;
pub mod admin;
pub mod audit;
pub mod callers;
pub mod changes;
pub mod deployment;
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
use thiserror::Error;
use tokio::time::timeout;

use self::migrate::Schema;

/// How long a statement may take before the server ends it: a hung statement must not hold a
/// worker.
const STATEMENT_TIMEOUT: &str = "30s";

/// `undefined_table`.
const NO_TABLE: &str = "42P01";
/// How long a connection that is given back to the pool has to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// What can go wrong with the database. No message holds a row, a parameter or a URL.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The server cannot be reached, ended the connection, or all connections are busy.
    #[error("the database cannot be reached: {0}")]
    Unreachable(String),
    /// The database refused a value: the trigger's or constraint's own words.
    #[error("{0}")]
    Refused(String),
    /// Nothing there has that name.
    #[error("{0}")]
    NotFound(String),
    /// The schema is not the one that this release needs.
    #[error("{0}")]
    Schema(String),
    /// Anything else the server says: its code and message, without the detail, which can quote
    /// rows.
    #[error("the database refused a statement ({code}): {message}")]
    Database {
        /// The `SQLSTATE`.
        code: String,
        /// The server's message.
        message: String,
    },
    /// The database was restored, or another one took its place, since it was last looked at.
    #[error("the database is not the same any more: {0}")]
    Replaced(&'static str),
    /// A value in a row cannot be what it is: somebody wrote past the triggers.
    #[error("{0}")]
    Corrupt(String),
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(error) => {
                let code = error.code().unwrap_or_default().into_owned();
                let message = error.message().to_owned();
                match code.as_str() {
                    "23514" | "23505" | "42501" => Self::Refused(message),
                    // The server goes down, starts, or has no place left.
                    NO_TABLE => Self::Schema(format!("{message}: run `token-broker migrate`")),
                    "57P01" | "57P02" | "57P03" | "53300" => Self::Unreachable(message),
                    _ => Self::Database { code, message },
                }
            }
            sqlx::Error::RowNotFound => Self::NotFound("no such row".into()),
            sqlx::Error::PoolTimedOut => {
                Self::Unreachable("no connection became free in time".into())
            }
            sqlx::Error::Io(error) => Self::Unreachable(error.to_string()),
            sqlx::Error::Tls(error) => Self::Unreachable(format!("TLS: {error}")),
            sqlx::Error::PoolClosed => Self::Unreachable("the pool is closed".into()),
            sqlx::Error::ColumnDecode { index, .. } => {
                Self::Corrupt(format!("column {index} holds an unexpected value"))
            }
            error => Self::Unreachable(error.to_string()),
        }
    }
}

/// The longest that one step of refresh or following waits for the database. The server's own
/// limits do not help when the connection to it is what hangs.
const STEP_WITHIN: Duration = Duration::from_secs(10);

/// Does `step`, or gives it up as [`StoreError::Unreachable`] after ten seconds.
///
/// # Errors
/// The step's own, too.
pub async fn within<T>(step: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let late = |_| Err(StoreError::Unreachable("no answer within 10 s".into()));
    timeout(STEP_WITHIN, step).await.unwrap_or_else(late)
}

/// A duration as Postgres takes it.
fn interval(duration: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(duration.as_micros()).unwrap_or(i64::MAX),
    }
}

/// Where the database is and how it is reached, checked but not yet connected.
#[derive(Clone, Debug)]
pub struct Database {
    options: PgConnectOptions,
}

impl Database {
    /// Reads a `postgresql://` URL. Off loopback, a server is reached only by verified TLS unless
    /// the URL says otherwise with `sslmode`.
    ///
    /// # Errors
    /// Says what is wrong with the URL, never the URL: it may hold a password.
    pub fn new(url: &str, application_name: &str) -> Result<Self, StoreError> {
        let malformed = || {
            StoreError::Refused("DATABASE_URL is not a postgresql://user@host/database URL".into())
        };
        let parsed = url::Url::parse(url).map_err(|_| malformed())?;
        if !matches!(parsed.scheme(), "postgres" | "postgresql") {
            return Err(malformed());
        }
        let mut options = PgConnectOptions::from_str(url).map_err(|_| malformed())?;
        let local = options.get_socket().is_some()
            || matches!(options.get_host(), "localhost" | "127.0.0.1" | "::1" | "[::1]")
            || options.get_host().starts_with('/');
        let told = parsed.query_pairs().any(|(key, _)| key == "sslmode" || key == "ssl-mode");
        if !told {
            options =
                options.ssl_mode(if local { PgSslMode::Prefer } else { PgSslMode::VerifyFull });
        }
        // A commit that the server may forget would void the audit log's promise.
        options = options.application_name(application_name).options([
            ("statement_timeout", STATEMENT_TIMEOUT),
            ("synchronous_commit", "on"),
            ("timezone", "UTC"),
        ]);
        Ok(Self { options })
    }

    /// The options of one connection outside the pool.
    #[must_use]
    pub fn connection(&self) -> &PgConnectOptions {
        &self.options
    }

    /// A pool that connects when it is first used.
    #[must_use]
    pub fn pool(&self, connections: u32) -> PgPool {
        PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(Duration::from_secs(5))
            // A connection that is given back is asked whether it still answers, for which sqlx has
            // no limit. One that fell silent would keep its place in the pool until TCP gives up.
            .after_release(|connection, _| {
                Box::pin(async move {
                    let answers = timeout(ANSWER_WITHIN, connection.ping()).await;
                    answers.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map(|()| true)
                })
            })
            .connect_lazy_with(self.options.clone())
    }

    /// Connects once: a pool would try on for seconds, and then only say that no connection became free.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] with the reason at once.
    pub async fn reach(&self) -> Result<(), StoreError> {
        Ok(self.options.connect().await?.close().await?)
    }

    /// Applies the migrations that are missing, or that changed: see [`migrate`].
    ///
    /// # Errors
    /// When the server cannot be reached or a migration fails.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        Schema::of_this_release()?.apply(self).await
    }

    /// Checks that the schema has every migration of this release.
    ///
    /// # Errors
    /// [`StoreError::Schema`] names what is missing and the command that applies it.
    pub async fn check_schema(&self) -> Result<(), StoreError> {
        Schema::of_this_release()?.check(self).await
    }
}
