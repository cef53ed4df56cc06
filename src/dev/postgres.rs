//! A Postgres of `dev`'s and the tests' own: found on the machine or downloaded, private to its
//! user, and gone with the process that started it.
//!
//! It listens on a Unix socket in a directory that only its user may enter, and on no port: two
//! never collide, and nobody else on the machine gets in. As root it runs as an unprivileged user,
//! because Postgres refuses to run as root.
//!
//! Between this process and the server stands a small [guard](guard()): this binary, run again with
//! a hidden command. It holds a pipe from its parent, so it learns of the parent's end however that
//! comes, SIGKILL included; then it stops the server and removes a temporary directory. Ctrl-C
//! reaches neither of them: each leads a process group of its own. Should the guard itself be
//! killed by SIGKILL, the next start removes what it left, and a server without its directory ends
//! by itself within a minute.

mod cluster;
mod guard;
mod installation;

use std::{
    env,
    fmt::Write as _,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::Stdio,
};

use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, ChildStdout, Command},
};

pub use self::{
    guard::guard,
    installation::{Installation, InstallationError},
};

/// The hidden command that runs [`guard()`].
pub const GUARD_COMMAND: &str = "postgres-guard";

/// The database that every embedded server has.
pub const DATABASE: &str = "token_broker";

/// Socket files are named by port, even where no port is open.
const SOCKET_NAME: &str = ".s.PGSQL.5432";

/// What `sun_path` holds, without its closing NUL.
const SOCKET_PATH_LIMIT: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// Where an embedded Postgres keeps its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a new directory under the system's temporary one, removed at the end. Nothing is synced
    /// to disk: it survives its processes' crashes, not the machine's.
    Temporary,
    /// In this directory, made if it is missing, and kept.
    Kept(PathBuf),
}

/// Why an embedded Postgres did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// No usable Postgres.
    #[error(transparent)]
    Installation(#[from] InstallationError),
    /// The directory's name is too long for a Unix socket in it.
    #[error(
        "{} is too long for a Unix socket: its path would have {length} bytes, {limit} are possible",
        directory.display()
    )]
    SocketPathTooLong {
        /// The directory that was asked for.
        directory: PathBuf,
        /// How long the socket's path would be.
        length: usize,
        /// How long it may be.
        limit: usize,
    },
    /// The guard process cannot be run.
    #[error("the guard of the embedded postgres, {}, cannot be run: {source}", program.display())]
    Guard {
        /// The program that was to become the guard.
        program: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The guard's own words, with the end of the server's log.
    #[error("the embedded postgres did not start: {0}")]
    Server(String),
}

/// A running Postgres. Dropping it lets the guard end it soon after; [`stop`](Self::stop) waits.
#[derive(Debug)]
pub struct EmbeddedPostgres {
    /// Its standard input is what the guard watches.
    guard: Child,
    directory: PathBuf,
    pid: u32,
}

impl EmbeddedPostgres {
    /// Starts a Postgres that is installed here, or downloads one. Takes about a second where the
    /// directory is new.
    ///
    /// `program` is the broker's own binary, whose [`GUARD_COMMAND`] runs [`guard()`].
    ///
    /// # Errors
    /// When there is no usable Postgres or it does not start; nothing is left running then.
    pub async fn start(place: Place, program: &Path) -> Result<Self, StartError> {
        let installation = Installation::find_or_download().await?;
        Self::start_from(&installation, place, program).await
    }

    /// Starts the Postgres of this installation.
    ///
    /// # Errors
    /// When it does not start; nothing is left running then.
    pub async fn start_from(
        installation: &Installation,
        place: Place,
        program: &Path,
    ) -> Result<Self, StartError> {
        let unusable = |source| StartError::Guard { program: program.to_owned(), source };
        let (keeping, directory) = match place {
            Place::Temporary => ("temporary", cluster::temporary_directory().map_err(unusable)?),
            Place::Kept(directory) => ("kept", std::path::absolute(directory).map_err(unusable)?),
        };
        check_socket_path(&directory)?;

        let mut guard = Command::new(program)
            .args([GUARD_COMMAND, keeping])
            .args([installation.binaries(), &directory])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(unusable)?;
        let stdout = guard.stdout.take();
        match report(stdout).await.map_err(unusable)? {
            Ok(pid) => Ok(Self { guard, directory, pid }),
            Err(words) => {
                // It has cleaned up when it is gone.
                let _ = guard.wait().await;
                Err(StartError::Server(words))
            }
        }
    }

    /// The URL of one of its databases, as sqlx and libpq take it.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        let mut host = String::new();
        for &byte in self.directory.as_os_str().as_bytes() {
            if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
                host.push(char::from(byte));
            } else {
                // Writing to a string cannot fail.
                let _ = write!(host, "%{byte:02X}");
            }
        }
        // The port names the socket's file, whatever PGPORT says.
        format!("postgresql:///{database}?host={host}&port=5432&user=postgres")
    }

    /// A shell line that opens one of its databases in `psql`.
    #[must_use]
    pub fn psql_line(&self, database: &str) -> String {
        format!("psql '{}'", self.url(database))
    }

    /// The directory with its data, socket and log.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The process id of the server.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The process id of the guard, as long as nobody waited for its end.
    #[must_use]
    pub fn guard_pid(&self) -> Option<u32> {
        self.guard.id()
    }

    /// Stops the server, ending its connections, and waits until it is gone, and with it a
    /// temporary directory.
    pub async fn stop(mut self) {
        // `wait` closes the guard's standard input first.
        let _ = self.guard.wait().await;
    }
}

/// What the guard says: the server's process id, or why there is none.
async fn report(stdout: Option<ChildStdout>) -> io::Result<Result<u32, String>> {
    let mut stdout = BufReader::new(stdout.ok_or(io::ErrorKind::BrokenPipe)?);
    let mut words = String::new();
    stdout.read_line(&mut words).await?;
    if let Some(pid) = words.strip_prefix(guard::READY).and_then(|pid| pid.trim().parse().ok()) {
        return Ok(Ok(pid));
    }
    stdout.read_to_string(&mut words).await?;
    if words.is_empty() {
        words.push_str("its guard ended without a word");
    }
    Ok(Err(words.trim_end().to_owned()))
}

fn check_socket_path(directory: &Path) -> Result<(), StartError> {
    let length = directory.join(SOCKET_NAME).as_os_str().len();
    if length <= SOCKET_PATH_LIMIT {
        return Ok(());
    }
    Err(StartError::SocketPathTooLong {
        directory: directory.to_owned(),
        length,
        limit: SOCKET_PATH_LIMIT,
    })
}

/// The system's temporary directory.
fn temporary_root() -> PathBuf {
    env::temp_dir()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_path_may_fill_the_limit_and_no_more() {
        let room = SOCKET_PATH_LIMIT - "/".len() - SOCKET_NAME.len();
        let fits = PathBuf::from(format!("/{}", "d".repeat(room - 1)));
        let one_more = PathBuf::from(format!("/{}", "d".repeat(room)));

        assert!(check_socket_path(&fits).is_ok());
        let error = check_socket_path(&one_more).unwrap_err().to_string();
        assert!(error.contains("too long for a Unix socket"), "{error}");
    }
}
