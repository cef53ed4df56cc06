//! A database server for one test alone. The test may crash it, copy it to a standby, and promote that.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, MetadataExt, chown},
    path::{Path, PathBuf},
    process::Stdio,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use token_broker::dev::postgres::{DATABASE, DataLocation, EmbeddedPostgres, Installation};
use tokio::process::Command;

use super::eventually;

/// A server with its data in a directory. Dropping this value stops the server.
pub(crate) struct OwnServer {
    directory: PathBuf,
    server: Option<EmbeddedPostgres>,
}

impl OwnServer {
    /// Starts a new server in `directory`, which is created.
    pub(crate) async fn start(directory: PathBuf) -> Self {
        let mut server = Self { directory, server: None };
        server.start_again().await;
        server
    }

    /// Starts a standby of this server in `directory`, which is created. It follows until it is promoted.
    pub(crate) async fn standby(&self, directory: PathBuf) -> Self {
        let owner = fs::metadata(self.data()).unwrap();
        fs::DirBuilder::new().mode(0o700).create(&directory).unwrap();
        chown(&directory, Some(owner.uid()), Some(owner.gid())).unwrap();
        let installation = Installation::find_or_download().await.unwrap();
        let copied = Command::new(installation.programs().join("pg_basebackup"))
            .arg("--host")
            .arg(&self.directory)
            .arg("--pgdata")
            .arg(directory.join("data"))
            .args(["--port=5432", "--username=postgres", "--write-recovery-conf"])
            .args(["--checkpoint=fast", "--no-sync"])
            .current_dir("/")
            .uid(owner.uid())
            .gid(owner.gid())
            .stdin(Stdio::null())
            .output()
            .await
            .unwrap();
        assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
        Self::start(directory).await
    }

    /// Returns the URL of the broker's database.
    pub(crate) fn url(&self) -> String {
        self.running().url(DATABASE)
    }

    /// Returns the directory of the server's data.
    pub(crate) fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// Runs statements in the broker's database.
    pub(crate) async fn sql(&self, statements: &str) {
        self.try_sql(statements).await.unwrap();
    }

    /// Like [`sql`](Self::sql), but returns the error when that fails.
    pub(crate) async fn try_sql(&self, statements: &str) -> sqlx::Result<()> {
        let mut connection = PgConnection::connect(&self.running().url(DATABASE)).await?;
        sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(&mut connection).await?;
        connection.close().await
    }

    /// Returns the text that a query in the broker's database returns.
    pub(crate) async fn text(&self, query: &str) -> String {
        let mut connection = self.connect(DATABASE).await;
        sqlx::query_scalar(AssertSqlSafe(query.to_owned()))
            .fetch_one(&mut connection)
            .await
            .unwrap()
    }

    pub(crate) async fn connect(&self, database: &str) -> PgConnection {
        PgConnection::connect(&self.running().url(database)).await.unwrap()
    }

    /// Waits until a standby has everything that this server has written by now.
    pub(crate) async fn until_followed_by(&self, standby: &Self) {
        let written = self.text("select pg_current_wal_flush_lsn()::text").await;
        let query = format!("select (pg_last_wal_replay_lsn() >= '{written}')::text");
        eventually("the standby follows", async || {
            (standby.text(&query).await == "true").then_some(())
        })
        .await;
    }

    /// Makes a standby a primary.
    pub(crate) async fn promote(&self) {
        assert_eq!(self.text("select pg_promote()::text").await, "true");
    }

    /// Stops the server as `pg_ctl stop -m immediate` does: without a checkpoint, like a crash.
    pub(crate) async fn crash(&mut self) {
        let running = self.server.take().unwrap();
        kill(Pid::from_raw(running.pid().try_into().unwrap()), Signal::SIGQUIT).unwrap();
        running.stop().await;
    }

    /// Stops the server as `pg_ctl stop -m fast` does.
    pub(crate) async fn stop(&mut self) {
        self.server.take().unwrap().stop().await;
    }

    /// Starts a server that was stopped.
    pub(crate) async fn start_again(&mut self) {
        let location = DataLocation::Persistent(self.directory.clone());
        let program = Path::new(env!("CARGO_BIN_EXE_token-broker"));
        // Child processes of a crashed server may take a moment to end.
        let started = eventually("a server", async || {
            EmbeddedPostgres::start(location.clone(), program).await.ok()
        });
        self.server = Some(started.await);
    }

    fn running(&self) -> &EmbeddedPostgres {
        self.server.as_ref().unwrap()
    }
}
