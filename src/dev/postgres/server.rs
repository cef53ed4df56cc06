//! The parent's side of an embedded server: starting the guard and waiting until the server is ready.

use std::{
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

use super::{
    cluster,
    guard::{GUARD_COMMAND, READY_PREFIX},
    installation::{Installation, InstallationError},
};

/// The name of the socket's file. It contains a port number even though no port is open.
const SOCKET_NAME: &str = ".s.PGSQL.5432";

/// The longest path of a Unix socket in bytes: the size of `sun_path` without the terminating NUL.
const SOCKET_PATH_LIMIT: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// Where an embedded server keeps its data, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataLocation {
    /// A new directory in the system's temporary directory, removed when the server stops. Nothing
    /// is synced to disk: the data survives a crash of the server but not of the machine.
    Temporary,
    /// This directory, created if it does not exist. The data stays when the server stops.
    Persistent(PathBuf),
}

/// Why an embedded server did not start.
#[derive(Debug, Error)]
pub enum EmbeddedPostgresError {
    /// No usable Postgres programs were found.
    #[error(transparent)]
    Installation(#[from] InstallationError),
    /// The path of the directory is too long for a Unix socket inside it.
    #[error(
        "{} is too long for a Unix socket: its path would have {length} bytes, {limit} are possible",
        directory.display()
    )]
    SocketPathTooLong {
        /// The requested directory.
        directory: PathBuf,
        /// The length that the socket's path would have, in bytes.
        length: usize,
        /// The longest possible path of a socket, in bytes.
        limit: usize,
    },
    /// The guard process could not be started, or its output could not be read.
    #[error("the guard of the embedded postgres, {}, cannot be run: {source}", program.display())]
    Guard {
        /// The program that was to run as the guard.
        program: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The guard reported that the server did not start. The text ends with the end of the server's
    /// log.
    #[error("the embedded postgres did not start: {0}")]
    Server(String),
}

/// A running embedded server.
///
/// Dropping it makes the guard stop the server soon afterwards; [`stop`](Self::stop) also waits
/// until that is done.
#[derive(Debug)]
pub struct EmbeddedPostgres {
    /// The guard process. It stops the server when its standard input is closed.
    guard: Child,
    directory: PathBuf,
    pid: u32,
}

impl EmbeddedPostgres {
    /// Starts a server with the programs that [`Installation::find_or_download`] returns, and waits
    /// until it accepts connections. In a new directory this takes about a second, plus the time of
    /// a download if one is needed.
    ///
    /// `program` is the path of the `token-broker` program, which is run with [`GUARD_COMMAND`].
    ///
    /// If the future is dropped, the guard stops what it started.
    ///
    /// # Errors
    /// When no usable programs are found, or when the server does not start. No process is left
    /// running then.
    pub async fn start(
        location: DataLocation,
        program: &Path,
    ) -> Result<Self, EmbeddedPostgresError> {
        let installation = Installation::find_or_download().await?;
        let guard_error =
            |source| EmbeddedPostgresError::Guard { program: program.to_owned(), source };
        let (lifetime, directory) = match location {
            DataLocation::Temporary => {
                ("temporary", cluster::new_temporary_path().map_err(guard_error)?)
            }
            DataLocation::Persistent(directory) => {
                ("persistent", std::path::absolute(directory).map_err(guard_error)?)
            }
        };
        check_socket_path(&directory)?;

        let mut guard = Command::new(program)
            .args([GUARD_COMMAND, lifetime])
            .args([installation.programs(), &directory])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(guard_error)?;
        let stdout = guard.stdout.take();
        match read_report(stdout).await.map_err(guard_error)? {
            Ok(pid) => Ok(Self { guard, directory, pid }),
            Err(message) => {
                // The guard removes a temporary directory before it ends.
                let _ = guard.wait().await;
                Err(EmbeddedPostgresError::Server(message))
            }
        }
    }

    /// Returns the URL of one of the server's databases, in the form that both sqlx and libpq accept.
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
        // The port selects the socket's file. Without it, libpq would take PGPORT.
        format!("postgresql:///{database}?host={host}&port=5432&user=postgres")
    }

    /// Returns the directory that holds the server's data, socket and log.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the process id of the server.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns the process id of the guard; `None` once its end has been waited for.
    #[must_use]
    pub fn guard_pid(&self) -> Option<u32> {
        self.guard.id()
    }

    /// Stops the server, which closes its connections, and waits until the server is gone and a
    /// temporary directory is removed. This takes at most 20 seconds.
    pub async fn stop(mut self) {
        // `wait` closes the guard's standard input first.
        let _ = self.guard.wait().await;
    }
}

/// Reads the guard's report: the server's process id, or a message that says why the server did not
/// start.
async fn read_report(stdout: Option<ChildStdout>) -> io::Result<Result<u32, String>> {
    let mut stdout = BufReader::new(stdout.ok_or(io::ErrorKind::BrokenPipe)?);
    let mut report = String::new();
    stdout.read_line(&mut report).await?;
    if let Some(pid) = report.strip_prefix(READY_PREFIX).and_then(|pid| pid.trim().parse().ok()) {
        return Ok(Ok(pid));
    }
    stdout.read_to_string(&mut report).await?;
    if report.is_empty() {
        report.push_str("its guard ended without a report");
    }
    Ok(Err(report.trim_end().to_owned()))
}

fn check_socket_path(directory: &Path) -> Result<(), EmbeddedPostgresError> {
    let length = directory.join(SOCKET_NAME).as_os_str().len();
    if length <= SOCKET_PATH_LIMIT {
        return Ok(());
    }
    Err(EmbeddedPostgresError::SocketPathTooLong {
        directory: directory.to_owned(),
        length,
        limit: SOCKET_PATH_LIMIT,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_path_of_the_longest_possible_length_is_accepted_and_a_longer_one_is_not() {
        let room = SOCKET_PATH_LIMIT - "/".len() - SOCKET_NAME.len();
        let longest = PathBuf::from(format!("/{}", "d".repeat(room - 1)));
        let too_long = PathBuf::from(format!("/{}", "d".repeat(room)));

        assert!(check_socket_path(&longest).is_ok());
        let error = check_socket_path(&too_long).unwrap_err().to_string();
        assert!(error.contains("too long for a Unix socket"), "{error}");
    }
}
