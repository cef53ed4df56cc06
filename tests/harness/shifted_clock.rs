//! Processes whose wall clock is shifted, and can be shifted while they run: a broker, or a Postgres.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Stdio,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use token_broker::store::Database;
use tokio::process::{Child, Command};

use super::{eventually, process::shared_directory};

/// A wall clock that a test shifts, and the library that shows it to processes.
pub(crate) struct ShiftedClock {
    directory: TempDir,
    file: File,
}

impl ShiftedClock {
    /// Builds the library; returns `None`, and says so, if there is no C compiler.
    pub(crate) fn build() -> Option<Self> {
        // Postgres runs as another user, who must be able to read the library.
        let directory = shared_directory();
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/harness/shifted_clock.c");
        let library = directory.path().join("shifted_clock.so");
        let built = std::process::Command::new("cc")
            .args(["-shared", "-fPIC", "-O2", "-o"])
            .args([library.as_path(), Path::new(source)])
            .output();
        match built {
            Ok(built) => assert!(built.status.success(), "{built:?}"),
            Err(error) => {
                super::note_skipped(&format!(
                    "no clock can be shifted without a C compiler: cc: {error}"
                ));
                return None;
            }
        }
        let shift = directory.path().join("shift");
        fs::write(&shift, 0_i64.to_ne_bytes()).unwrap();
        let file = File::options().write(true).open(shift).unwrap();
        Some(Self { directory, file })
    }

    /// Sets by how many seconds the clock is ahead of the machine's.
    pub(crate) fn set_ahead(&self, seconds: i64) {
        self.file.write_all_at(&seconds.to_ne_bytes(), 0).unwrap();
    }

    /// Returns the environment variables that give this clock to a process.
    pub(crate) fn variables(&self) -> [(&'static str, String); 2] {
        let path = |name| self.directory.path().join(name).to_str().unwrap().to_owned();
        [("LD_PRELOAD", path("shifted_clock.so")), ("TEST_CLOCK_SHIFT", path("shift"))]
    }
}

/// A Postgres whose clock is shifted, with an empty database. Dropping it stops the server.
pub(crate) struct ShiftedPostgres {
    server: Child,
    url: String,
    _directory: TempDir,
}

impl ShiftedPostgres {
    /// Starts a server with the programs and the user of the embedded one, which creates its data.
    pub(crate) async fn start(clock: &ShiftedClock) -> Self {
        use token_broker::dev::postgres::{DATABASE, DataLocation, EmbeddedPostgres};

        let directory = shared_directory();
        let location = DataLocation::Persistent(directory.path().join("pg"));
        let program = Path::new(env!("CARGO_BIN_EXE_token-broker"));
        let embedded = EmbeddedPostgres::start(location, program).await.unwrap();
        let url = embedded.url(DATABASE);
        let postgres = fs::read_link(format!("/proc/{}/exe", embedded.pid())).unwrap();
        let data: PathBuf = embedded.directory().join("data");
        embedded.stop().await;

        let owner = fs::metadata(&data).unwrap();
        let server = Command::new(postgres)
            .env_clear()
            .envs(clock.variables())
            .env("LC_ALL", "C")
            .arg("-D")
            .arg(&data)
            .arg("-k")
            .arg(data.parent().unwrap())
            .args(["-c", "listen_addresses=", "-c", "fsync=off"])
            .current_dir(&data)
            .uid(owner.uid())
            .gid(owner.gid())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(directory.path().join("log")).unwrap())
            .process_group(0)
            .spawn()
            .unwrap();
        let pool = Database::new(&url, "test").unwrap().pool(1);
        eventually("the server with the shifted clock", async || {
            sqlx::query("select 1").execute(&pool).await.ok()
        })
        .await;
        pool.close().await;
        Self { server, url, _directory: directory }
    }

    /// Returns the URL of the database.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for ShiftedPostgres {
    fn drop(&mut self) {
        // An immediate stop, which also ends the server's children.
        if let Some(pid) = self.server.id().and_then(|pid| pid.try_into().ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGQUIT);
        }
        for _ in 0..250 {
            if !matches!(self.server.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
