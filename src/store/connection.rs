//! How connections to the database are opened, and what is checked of one before it is used.

use std::{io, str::FromStr, time::Duration};

use sqlx::{
    ConnectOptions, Connection, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions, PgSslMode},
};
use tokio::time::{Instant, timeout};

use super::{
    StoreError,
    trust::{Trust, TrustGate},
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

/// The options for connections to the database. Creating a value opens no connection.
///
/// A connection that leads to a standby, or to a server whose transactions are read-only, is refused as
/// [`StoreError::Unverified`].
#[derive(Clone, Debug)]
pub struct Database {
    options: PgConnectOptions,
    /// Lets connections pass only to the verified database; `None` for commands, which rely on nothing that
    /// they read earlier.
    gate: Option<TrustGate>,
    /// Whether a standby may be used, which is enough to read.
    only_reads: bool,
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
        Ok(Self { options, gate: None, only_reads: false })
    }

    /// Returns the same options for connections that `gate` must admit. Those that it admitted before are not
    /// used any more once it is closed.
    #[must_use]
    pub fn gated(&self, gate: TrustGate) -> Self {
        Self { gate: Some(gate), ..self.clone() }
    }

    /// Returns the same options for connections that only read. They may lead to a standby.
    #[must_use]
    pub fn only_reads(&self) -> Self {
        Self { only_reads: true, ..self.clone() }
    }

    /// Notes that the database announced a change.
    pub(super) fn note_change(&self) {
        if let Some(gate) = &self.gate {
            gate.note_change();
        }
    }

    /// Opens a connection outside of any pool, ready to be used.
    ///
    /// # Errors
    /// Returns why the server cannot be reached, refuses the login, or cannot be used.
    pub async fn open(&self) -> Result<PgConnection, StoreError> {
        Ok(self.session().await?.connection)
    }

    /// Opens a connection for a task that relies on what it has read before: see [`Session`].
    ///
    /// # Errors
    /// Like [`Self::open`].
    pub async fn session(&self) -> Result<Session, StoreError> {
        if let Some(gate) = &self.gate {
            gate.trust()?;
        }
        let mut connection = self.options.connect().await?;
        prepare(&mut connection).await?;
        let trust = self.admit(&mut connection).await?;
        Ok(Session { connection, trust })
    }

    /// Checks where a connection leads that was just opened.
    ///
    /// # Errors
    /// Returns [`StoreError::Unverified`] if it must not be used, and the database's error.
    async fn admit(
        &self,
        connection: &mut PgConnection,
    ) -> Result<Option<(TrustGate, Trust)>, StoreError> {
        if !self.only_reads {
            refuse_standby(connection).await?;
        }
        let Some(gate) = &self.gate else { return Ok(None) };
        Ok(Some((gate.clone(), gate.admit(connection).await?)))
    }

    /// Makes a new connection of a pool ready to be used. If the gate is closed, it waits until the gate opens:
    /// the pool's own limit ends the wait.
    async fn prepare_pooled(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        prepare(connection).await?;
        if let Some(gate) = &self.gate {
            gate.opened().await;
        }
        match self.admit(connection).await {
            Ok(_) => Ok(()),
            // The pool logs the error, closes the connection and opens another one.
            Err(error) => Err(sqlx::Error::Io(io::Error::other(error.to_string()))),
        }
    }

    /// Returns a pool of at most `connections` connections, which it opens when they are needed. Acquiring
    /// one fails after five seconds.
    #[must_use]
    pub fn pool(&self, connections: u32) -> PgPool {
        let (database, gate) = (self.clone(), self.gate.clone());
        PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .after_connect(move |connection, _| {
                let database = database.clone();
                Box::pin(async move { database.prepare_pooled(connection).await })
            })
            .before_acquire(move |_, metadata| {
                let covered =
                    gate.as_ref().is_none_or(|gate| gate.covers(metadata.age, Instant::now()));
                Box::pin(async move { Ok(covered) })
            })
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

    /// Checks on a new connection, within three seconds, whether the server answers at all and may be used. A
    /// lost session or a slow statement on another connection does not show that. A server that refuses the
    /// login does answer.
    ///
    /// # Errors
    /// Returns [`StoreError::ConnectionLost`] or [`StoreError::TimedOut`] if the server does not answer, and
    /// [`StoreError::Unverified`] if it must not be used.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let answer = async {
            let mut connection = self.options.connect().await?;
            // A connection pooler in between may accept connections although its server does not answer.
            connection.ping().await?;
            self.admit(&mut connection).await?;
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

/// Refuses a connection that leads to a standby, or whose transactions are read-only.
async fn refuse_standby(connection: &mut PgConnection) -> Result<(), StoreError> {
    let row = sqlx::query!(
        r#"-- store::connection::refuse_standby
        select pg_is_in_recovery() as "standby!",
            current_setting('transaction_read_only')::boolean as "read_only!""#,
    )
    .fetch_one(connection)
    .await?;
    let reason = match (row.standby, row.read_only) {
        (true, _) => "its address leads to a standby, not to the primary",
        (false, true) => "its transactions are read-only",
        (false, false) => return Ok(()),
    };
    Err(StoreError::Unverified { reason: reason.into() })
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
    /// The gate that admitted the connection, and the trust under which it did.
    trust: Option<(TrustGate, Trust)>,
}

impl Session {
    /// Returns the connection for the next statement.
    ///
    /// # Errors
    /// Returns [`StoreError::Unverified`], which counts as a lost connection, if the session must not be used
    /// any more.
    pub fn connection(&mut self) -> Result<&mut PgConnection, StoreError> {
        if let Some((gate, trust)) = &self.trust {
            gate.holds(*trust)?;
        }
        Ok(&mut self.connection)
    }

    /// Closes the session. An error is of no consequence: the server notices that the connection is gone.
    ///
    /// # Errors
    /// Returns the driver's error.
    pub async fn close(self) -> Result<(), StoreError> {
        Ok(self.connection.close().await?)
    }
}
