//! How connections to the database are opened, and what is checked of one before it is used.

use std::{str::FromStr, time::Duration};

use sqlx::{
    ConnectOptions, Connection, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions, PgSslMode},
};
use tokio::time::timeout;

use super::StoreError;

/// How long a statement may take before the server cancels it, so that a statement that waits for a lock
/// does not occupy its connection for ever.
const STATEMENT_TIMEOUT: &str = "30s";

/// How long the ping of a connection may take when it is returned to the pool.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a pool waits for a free or a new connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long [`Database::probe`] waits for the server.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

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

    /// Returns the server and the database that the options name: host, port and database, without the user. A
    /// Unix socket counts as a host by its directory.
    #[must_use]
    pub fn location(&self) -> String {
        let options = &self.options;
        let socket = options.get_socket().map(|path| path.display().to_string());
        let host = socket.unwrap_or_else(|| options.get_host().to_owned());
        let database = options.get_database().unwrap_or_else(|| options.get_username());
        format!("{host}:{}/{database}", options.get_port())
    }

    /// Opens a connection outside of any pool, ready to be used.
    ///
    /// # Errors
    /// Returns why the server cannot be reached, refuses the login, or cannot be used.
    pub async fn open(&self) -> Result<PgConnection, StoreError> {
        let mut connection = self.options.connect().await?;
        prepare(&mut connection).await?;
        Ok(connection)
    }

    /// Opens a connection for a task that relies on what it has read before: see [`Session`].
    ///
    /// # Errors
    /// Like [`Self::open`].
    pub async fn session(&self) -> Result<Session, StoreError> {
        Ok(Session { connection: self.open().await? })
    }

    /// Returns a pool of at most `connections` connections, which it opens when they are needed. Acquiring
    /// one fails after five seconds.
    #[must_use]
    pub fn pool(&self, connections: u32) -> PgPool {
        PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .after_connect(|connection, _| Box::pin(prepare(connection)))
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
        Ok(self.open().await?.close().await?)
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
}

/// Makes a new connection ready to be used. Every connection passes through here, those of pools too.
async fn prepare(_connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    Ok(())
}

/// A connection whose owner relies on what it has read before, for example on a snapshot of which it asks
/// for what was committed since.
///
/// Once the connection is lost, nothing that was read over it may be relied on: the server may have crashed
/// and use the same transaction numbers again, or another server may have taken its place. So open a new
/// session then, and read everything anew.
#[derive(Debug)]
pub struct Session {
    connection: PgConnection,
}

impl Session {
    /// Returns the connection for the next statement.
    ///
    /// # Errors
    /// Returns [`StoreError::ConnectionLost`] if the session must not be used any more.
    pub fn connection(&mut self) -> Result<&mut PgConnection, StoreError> {
        Ok(&mut self.connection)
    }
}
