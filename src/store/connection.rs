//! How connections to the database are opened, and what is checked of one before it is used.

use std::{
    fmt,
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use secrecy::{ExposeSecret, SecretString};
use sqlx::{
    ConnectOptions, Connection, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::{
    task,
    time::{Instant, timeout},
};
use tracing::{info, warn};

use super::{
    Location, StoreError,
    connect_options::{PasswordFiles, connect_options, known_part},
    distrust,
    history::SeenChange,
    pooler, session_settings,
    trust::{Trust, TrustGate},
};

/// How long the ping of a connection may take when it is returned to the pool.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long opening a connection may take, and how long a pool waits for a free or a new one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long [`Database::probe`] waits for the server.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// After this time a pool's connection is replaced when it is free, so that a changed address or login takes effect.
pub const MAX_LIFETIME: Duration = Duration::from_mins(5);
/// The pause between two readings of the URL and the password files, for the pools.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);
/// How long a new connection waits for the file of the URL. If that takes longer, the last URL is used.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(1);

/// A function that returns the present URL, or a text for admins that says why it cannot be determined and
/// does not quote it. May block.
type UrlSource = Box<dyn Fn() -> Result<SecretString, String> + Send + Sync>;

/// The access to the database. Creating a value opens no connection; clones share their state.
///
/// The URL is read again from its source at each new connection, and once a second for the pools. So a
/// password can be rotated while the broker runs. While the source cannot be read, the last URL stays in
/// use.
///
/// A connection that leads to a standby, or to a server whose transactions are read-only, is refused as
/// [`StoreError::Unverified`].
#[derive(Clone)]
pub struct Database {
    shared: Arc<Shared>,
    /// Lets connections pass only to the verified database; `None` for commands, which rely on nothing that
    /// they read earlier.
    gate: Option<TrustGate>,
    /// Whether a standby may be used, which is enough to read.
    only_reads: bool,
}

struct Shared {
    application_name: String,
    source: Option<UrlSource>,
    login: Mutex<Login>,
    /// Taken while the source is read, so that not more than one thread is blocked by a file system that
    /// hangs.
    reloading: Mutex<()>,
    /// The pools that get new options when the URL changes.
    pools: Mutex<Vec<PgPool>>,
    /// Whether the task runs that reloads the URL for the pools.
    watched: AtomicBool,
}

/// The URL in use, and what follows from it.
struct Login {
    url: SecretString,
    password_files: PasswordFiles,
    options: PgConnectOptions,
    /// Why the URL could not be read again, if it could not.
    problem: Option<String>,
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The options contain the password.
        f.debug_struct("Database")
            .field("application_name", &self.shared.application_name)
            .finish_non_exhaustive()
    }
}

impl Database {
    /// Reads a `postgresql://` URL. A server that is not on loopback must have a certificate that is
    /// valid for its name, unless the URL sets another `sslmode`. `application_name` identifies the
    /// sessions in the server's logs and views. If the URL has no password, blocks to read libpq's password
    /// file.
    ///
    /// # Errors
    /// Returns [`StoreError::InvalidUrl`], which never quotes the URL: it may hold a password.
    pub fn new(url: &str, application_name: &str) -> Result<Self, StoreError> {
        Self::from_source(url, application_name, None)
    }

    /// Returns where the options say that the tables are.
    #[must_use]
    pub fn location(&self) -> Location {
        Location::of(&self.shared.login.lock().options)
    }

    /// Like [`Self::new`], with a function that returns the present URL whenever it is called. It may block.
    /// Its error is a text for admins, which must not quote the URL.
    ///
    /// # Errors
    /// Like [`Self::new`].
    pub fn with_source(
        url: &str,
        application_name: &str,
        source: impl Fn() -> Result<SecretString, String> + Send + Sync + 'static,
    ) -> Result<Self, StoreError> {
        Self::from_source(url, application_name, Some(Box::new(source)))
    }

    fn from_source(
        url: &str,
        application_name: &str,
        source: Option<UrlSource>,
    ) -> Result<Self, StoreError> {
        let login = Login {
            password_files: PasswordFiles::now(),
            options: connect_options(url, application_name)?,
            url: url.into(),
            problem: None,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                application_name: application_name.to_owned(),
                source,
                login: Mutex::new(login),
                reloading: Mutex::new(()),
                pools: Mutex::default(),
                watched: AtomicBool::new(false),
            }),
            gate: None,
            only_reads: false,
        })
    }

    /// Returns the same access for connections that `gate` must admit. Those that it admitted before are not
    /// used any more once it is closed.
    #[must_use]
    pub fn gated(&self, gate: TrustGate) -> Self {
        Self { gate: Some(gate), ..self.clone() }
    }

    /// Returns the same access for connections that only read. They may lead to a standby.
    #[must_use]
    pub fn only_reads(&self) -> Self {
        Self { only_reads: true, ..self.clone() }
    }

    /// Notes that a change was committed, so that the history guard remembers it at once.
    pub fn note_change(&self) {
        if let Some(gate) = &self.gate {
            gate.note_change();
        }
    }

    /// Hands changes to the history guard that were read over a session, and are about to take effect in this
    /// process. So the guard misses them in a database that lost them, even if its own session is lost before it
    /// reads them.
    pub fn note_changes(&self, changes: Vec<SeenChange>) {
        if let Some(gate) = &self.gate {
            gate.note_changes(changes);
        }
    }

    /// Returns the trust under which connections are admitted at present, if there is a gate.
    ///
    /// # Errors
    /// Returns [`StoreError::Unverified`] while the gate is closed.
    pub(super) fn trust(&self) -> Result<Option<(TrustGate, Trust)>, StoreError> {
        let trust = |gate: &TrustGate| Ok((gate.clone(), gate.trust()?));
        self.gate.as_ref().map(trust).transpose()
    }

    /// Checks that `url` can be used.
    ///
    /// # Errors
    /// Returns [`StoreError::InvalidUrl`], which never quotes the URL.
    pub fn check_url(url: &str) -> Result<(), StoreError> {
        known_part(url).map(drop)
    }

    /// Opens a connection outside of any pool, ready to be used. Fails after five seconds.
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
        // The future is large, and is a part of many others.
        in_time(Box::pin(async {
            let mut connection = self.connect().await?;
            prepare(&mut connection).await?;
            let trust = self.admit(&mut connection).await?;
            Ok(Session { connection, trust })
        }))
        .await
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

    /// Returns a pool of at most `connections` connections, which it opens when they are needed. Acquiring
    /// one fails after five seconds. As long as this value or a clone of it exists, the pool keeps up with
    /// the URL, and is not closed unless that is asked for.
    #[must_use]
    pub fn pool(&self, connections: u32) -> PgPool {
        let pool = self.fixed_pool(connections);
        let mut pools = self.shared.pools.lock();
        pools.retain(|pool| !pool.is_closed());
        pools.push(pool.clone());
        drop(pools);
        self.watch();
        pool
    }

    /// Returns a pool of one connection that uses the present URL as long as it exists.
    pub(super) async fn pool_of_present_url(&self) -> PgPool {
        self.reload().await;
        self.fixed_pool(1)
    }

    fn fixed_pool(&self, connections: u32) -> PgPool {
        let (gate, opened_by, only_reads) = (self.gate.clone(), self.gate.clone(), self.only_reads);
        PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(CONNECT_TIMEOUT)
            .max_lifetime(MAX_LIFETIME)
            .idle_timeout(MAX_LIFETIME)
            .after_connect(move |connection, _| {
                let (gate, only_reads) = (opened_by.clone(), only_reads);
                Box::pin(async move { prepare_pooled(connection, gate, only_reads).await })
            })
            .before_acquire(move |_, meta| {
                let covered =
                    gate.as_ref().is_none_or(|gate| gate.covers(meta.age, Instant::now()));
                Box::pin(async move { Ok(covered && !distrust::applies_to_age(meta.age)) })
            })
            // sqlx pings a connection that is returned, without a timeout. If its peer does not answer any
            // more, the connection would occupy a slot of the pool until TCP gives up.
            .after_release(|connection, _| {
                Box::pin(async move {
                    let answers = timeout(PING_TIMEOUT, connection.ping()).await;
                    answers.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map(|()| true)
                })
            })
            .connect_lazy_with(self.shared.login.lock().options.clone())
    }

    /// Checks that the server takes the login, and that a connection pooler in between, if there is one,
    /// keeps sessions. Unlike a pool, it does not retry, and it returns the reason of a failure.
    ///
    /// # Errors
    /// Returns why the server cannot be reached, refuses the login, or cannot be used.
    pub async fn check_connection(&self) -> Result<(), StoreError> {
        in_time(Box::pin(self.check_pooler())).await?;
        Ok(self.open().await?.close().await?)
    }

    /// Checks on new connections that statements of a connection reach the same session of the server.
    async fn check_pooler(&self) -> Result<(), StoreError> {
        let mut one = self.connect().await?;
        let mut other = match self.connect().await {
            Ok(other) => other,
            Err(error) => {
                warn!(%error, "a second connection cannot be opened, so it is not checked whether a \
                    connection pooler keeps sessions");
                return Ok(one.close().await?);
            }
        };
        let kept = pooler::keeps_sessions(&mut one, &mut other).await?;
        pooler::close([one, other]).await;
        if kept {
            Ok(())
        } else {
            Err(StoreError::UnusableSession(pooler::KEEPS_NO_SESSIONS.into()))
        }
    }

    /// Checks within three seconds whether a new connection can be opened and used. A lost session or a slow
    /// statement on another connection does not show that, and a pool does not tell why it has no
    /// connection.
    ///
    /// # Errors
    /// Returns why not. Use [`StoreError::may_be_outage`] to tell whether the server answers at all.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let late = StoreError::TimedOut { reason: "no answer within 3 s" };
        let opened = timeout(PROBE_TIMEOUT, self.open()).await.unwrap_or(Err(late));
        Ok(opened?.close().await?)
    }

    /// Opens a connection that is not prepared.
    async fn connect(&self) -> Result<PgConnection, StoreError> {
        self.reload().await;
        let options = self.shared.login.lock().options.clone();
        // Boxed, since the future is large and part of many others.
        Box::pin(options.connect()).await.map_err(StoreError::of_login)
    }

    /// Starts the task that reloads the URL for the pools, if it does not run. It ends when no clone of this
    /// value exists any more.
    fn watch(&self) {
        if self.shared.watched.swap(true, Ordering::Relaxed) {
            return;
        }
        let shared = Arc::downgrade(&self.shared);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(RELOAD_INTERVAL).await;
                let Some(shared) = shared.upgrade() else { return };
                reload(&shared).await;
            }
        });
    }

    /// Reads the URL and the password files again, and gives new options to the pools if something has
    /// changed. Waits no longer than a second. Cancel safe.
    pub async fn reload(&self) {
        reload(&self.shared).await;
    }
}

/// See [`Database::reload`].
async fn reload(shared: &Arc<Shared>) {
    let shared = shared.clone();
    let reloading = task::spawn_blocking(move || shared.reload());
    let _ = timeout(RELOAD_TIMEOUT, reloading).await;
}

impl Shared {
    /// Like [`Database::reload`]. Blocks. Does nothing if another thread is doing the same.
    fn reload(&self) {
        let Some(_only_one) = self.reloading.try_lock() else { return };
        let read = match &self.source {
            Some(source) => source(),
            None => Ok(self.login.lock().url.clone()),
        };
        let changed = read.and_then(|url| self.changed_login(url));
        let mut login = self.login.lock();
        match changed {
            Ok(None) => login.problem = None,
            Ok(Some(new)) => {
                info!("the database's URL or password was read again and has changed");
                *login = new;
                for pool in &*self.pools.lock() {
                    pool.set_connect_options(login.options.clone());
                }
            }
            Err(problem) if login.problem.as_ref() != Some(&problem) => {
                warn!(
                    problem,
                    "the database's URL cannot be read again; the last one stays in use"
                );
                login.problem = Some(problem);
            }
            Err(_) => {}
        }
    }

    /// Returns the login by `url`, or `None` if it is the one in use.
    fn changed_login(&self, url: SecretString) -> Result<Option<Login>, String> {
        let password_files = PasswordFiles::now();
        let login = self.login.lock();
        if login.url.expose_secret() == url.expose_secret()
            && login.password_files == password_files
        {
            return Ok(None);
        }
        drop(login);
        let options = connect_options(url.expose_secret(), &self.application_name)
            .map_err(|error| error.to_string())?;
        Ok(Some(Login { url, password_files, options, problem: None }))
    }
}

/// Runs `opening`, for at most five seconds.
async fn in_time<T>(opening: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let late = StoreError::TimedOut { reason: "no connection could be opened within 5 s" };
    timeout(CONNECT_TIMEOUT, opening).await.unwrap_or(Err(late))
}

/// Makes a new connection ready to be used. Every connection passes through here, those of pools too.
async fn prepare(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    session_settings::establish(connection).await
}

/// Makes a new connection of a pool ready to be used. While the gate is closed, it waits until the gate opens:
/// the pool's own limit ends the wait.
async fn prepare_pooled(
    connection: &mut PgConnection,
    gate: Option<TrustGate>,
    only_reads: bool,
) -> Result<(), sqlx::Error> {
    prepare(connection).await?;
    let admitted = async {
        if !only_reads {
            refuse_standby(connection).await?;
        }
        let Some(gate) = gate else { return Ok(()) };
        gate.opened().await;
        gate.admit(connection).await.map(drop)
    };
    // The pool logs the error, closes the connection and opens another one.
    admitted.await.map_err(|error: StoreError| sqlx::Error::Io(io::Error::other(error.to_string())))
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
    Err(StoreError::Unverified { reason: reason.into(), primary_answers: false })
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
