//! The directory of one embedded server: its owner and lock, and the command lines of the programs
//! that work in it.
//!
//! | file | contents |
//! |---|---|
//! | `guard` | locked by the guard process as long as it runs |
//! | `log` | the output of `initdb` and the server |
//! | `data` | Postgres' data directory; it is complete if it exists |
//! | `data.new` | a data directory that `initdb` has not finished |
//! | `.s.PGSQL.5432` | the server's socket |

use std::{
    env,
    ffi::OsStr,
    fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::Duration,
};

use nix::unistd::{Uid, User, geteuid};
use tokio::process::Command;

/// The name of the database that every embedded server has.
pub const DATABASE: &str = "token_broker";

/// Prefix of the names of temporary directories. It is short because a socket's path must be.
const TEMPORARY_PREFIX: &str = "tb-pg-";

/// How much of the end of the log an error message shows, in bytes.
const LOG_TAIL: u64 = 2_000;

/// The server settings that do not depend on the directory.
const SETTINGS: &[&str] = &[
    "listen_addresses=",
    "unix_socket_permissions=0700",
    "max_connections=200",
    "shared_buffers=32MB",
    "synchronous_commit=on",
    "logging_collector=off",
    "log_connections=off",
    "log_min_messages=warning",
    // The text of a failed statement may contain a client secret.
    "log_min_error_statement=panic",
];

/// Returns a random path in the system's temporary directory for a new cluster.
pub(super) fn new_temporary_path() -> io::Result<PathBuf> {
    let mut unique = [0_u8; 6];
    aws_lc_rs::rand::fill(&mut unique).map_err(io::Error::other)?;
    Ok(env::temp_dir().join(format!("{TEMPORARY_PREFIX}{}", hex::encode(unique))))
}

/// The directory of one server, locked by this process. Dropping it removes a temporary directory.
pub(super) struct Cluster {
    programs: PathBuf,
    directory: PathBuf,
    temporary: bool,
    user: ServerUser,
    /// It is only kept open, because closing the file releases the lock.
    _lock: File,
}

impl Cluster {
    /// Creates `directory` if it does not exist, makes the user that runs the server its owner, and
    /// locks it. A temporary directory must not exist yet. `programs` is the directory of
    /// Postgres' programs.
    pub(super) fn open(programs: PathBuf, directory: PathBuf, temporary: bool) -> io::Result<Self> {
        let user = ServerUser::find()?;
        if temporary {
            DirBuilder::new().mode(0o700).create(&directory)?;
        } else {
            fs::create_dir_all(&directory)?;
            fs::set_permissions(&directory, Permissions::from_mode(0o700))?;
        }
        let lock = lock(&directory)?;
        let cluster = Self { programs, directory, temporary, user, _lock: lock };
        cluster.user.take_ownership(&cluster.directory)?;
        // `is_abandoned` takes a directory with a log for one that has been locked before.
        cluster.open_log()?;
        Ok(cluster)
    }

    /// Whether the directory contains a complete data directory from an earlier run.
    pub(super) fn is_initialised(&self) -> bool {
        self.data().exists()
    }

    /// Returns the `initdb` command, which creates the data directory under the name `data.new`.
    /// Removes what an interrupted `initdb` left there.
    pub(super) fn initdb(&self) -> io::Result<Command> {
        remove(&self.new_data())?;
        let mut command = self.command("initdb")?;
        command.arg("-D").arg(self.new_data()).args([
            "--username=postgres",
            // The permissions of the directory restrict who can connect.
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-instructions",
        ]);
        if self.temporary {
            command.arg("--no-sync");
        }
        Ok(command)
    }

    /// Returns the command that creates the database, and the statement to write to its standard
    /// input. The command runs `postgres` in single-user mode on `data.new`.
    pub(super) fn create_database(&self) -> io::Result<(Command, String)> {
        let mut command = self.command("postgres")?;
        command.arg("--single").arg("-D").arg(self.new_data());
        command.args(["-c", self.fsync()]).arg("postgres").stdin(Stdio::piped());
        Ok((command, format!("create database {DATABASE}\n")))
    }

    /// Renames `data.new` to `data`, now that it is complete.
    pub(super) fn finish_initialisation(&self) -> io::Result<()> {
        fs::rename(self.new_data(), self.data())
    }

    /// Returns the command that runs the server.
    pub(super) fn server(&self) -> io::Result<Command> {
        let mut command = self.command("postgres")?;
        command.arg("-D").arg(self.data()).arg("-k").arg(&self.directory);
        for setting in SETTINGS.iter().chain([&self.fsync()]) {
            command.args(["-c", setting]);
        }
        Ok(command)
    }

    /// Whether the server with this process id accepts connections, according to its pid file; a standby accepts
    /// those that only read.
    pub(super) fn is_ready(&self, pid: u32) -> bool {
        let Ok(file) = fs::read_to_string(self.data().join("postmaster.pid")) else {
            return false;
        };
        let mut lines = file.lines().map(str::trim);
        lines.next().and_then(|line| line.parse().ok()) == Some(pid)
            && lines.any(|line| line == "ready" || line == "standby")
    }

    /// Returns the last [`LOG_TAIL`] bytes of the log, or a text that says why it cannot be read.
    pub(super) fn log_tail(&self) -> String {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(self.directory.join("log"))?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL)))?;
            let mut tail = Vec::new();
            file.read_to_end(&mut tail)?;
            Ok(tail)
        };
        match read() {
            Ok(tail) => String::from_utf8_lossy(&tail).trim().to_owned(),
            Err(error) => format!("its log cannot be read: {error}"),
        }
    }

    /// Returns a command that runs one of Postgres' programs as the server's user, in a process
    /// group of its own, with its output appended to the log. Of this process's environment the
    /// program gets only three variables: others, such as `PGDATA`, would change what it does.
    fn command(&self, program: &str) -> io::Result<Command> {
        let mut command = Command::new(self.programs.join(program));
        command
            .env_clear()
            .envs(
                ["PATH", "LD_LIBRARY_PATH", "TZ"]
                    .iter()
                    .filter_map(|name| Some((name, env::var_os(name)?))),
            )
            .env("LC_ALL", "C")
            .current_dir(&self.directory)
            .stdin(Stdio::null())
            .stdout(self.open_log()?)
            .stderr(self.open_log()?)
            .process_group(0);
        if let Some(user) = &self.user.0 {
            // As root, setting the user also drops the supplementary groups.
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        Ok(command)
    }

    fn open_log(&self) -> io::Result<File> {
        let path = self.directory.join("log");
        OpenOptions::new().append(true).create(true).mode(0o600).open(&path)
    }

    fn fsync(&self) -> &'static str {
        if self.temporary { "fsync=off" } else { "fsync=on" }
    }

    fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    fn new_data(&self) -> PathBuf {
        self.directory.join("data.new")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.temporary {
            return;
        }
        // The children of a killed server may still write files for a moment, which makes the
        // removal fail. Retry for up to a second.
        for _ in 0..20 {
            if remove(&self.directory).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The user that runs the server if this process is root's; `None` if the server runs as the
/// current user.
struct ServerUser(Option<User>);

impl ServerUser {
    fn find() -> io::Result<Self> {
        if !geteuid().is_root() {
            return Ok(Self(None));
        }
        for name in ["postgres", "nobody"] {
            if let Some(user) = User::from_name(name)? {
                return Ok(Self(Some(user)));
            }
        }
        Err(io::Error::other(
            "postgres refuses to run as root, and there is neither a user postgres nor nobody",
        ))
    }

    fn uid(&self) -> Uid {
        self.0.as_ref().map_or_else(geteuid, |user| user.uid)
    }

    fn take_ownership(&self, path: &Path) -> io::Result<()> {
        let Some(user) = &self.0 else { return Ok(()) };
        chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
    }
}

fn lock(directory: &Path) -> io::Result<File> {
    let path = directory.join("guard");
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path)?;
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => io::Error::other("another process uses the directory"),
        TryLockError::Error(error) => error,
    })?;
    Ok(file)
}

/// Removes the temporary directories whose guards were killed. A server that still runs in one of
/// them is not killed: the process id in its pid file may belong to another process by now. It ends
/// by itself, within a minute, when it finds its pid file missing.
pub(super) fn remove_abandoned() {
    let (Ok(entries), Ok(user)) = (fs::read_dir(env::temp_dir()), ServerUser::find()) else {
        return;
    };
    for entry in entries.flatten() {
        let is_ours = entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX)
            && entry
                .metadata()
                .is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == user.uid().as_raw());
        if is_ours && is_abandoned(&entry.path()) {
            let _ = remove(&entry.path());
        }
    }
}

/// Whether the directory's guard is gone. The guard creates the log after it has taken the lock, so
/// a directory without a log belongs to a guard that is about to lock it.
fn is_abandoned(directory: &Path) -> bool {
    directory.join("log").exists()
        && File::open(directory.join("guard")).is_ok_and(|lock| lock.try_lock().is_ok())
}

/// Removes a directory if it exists.
fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Parses the guard's argument that says whether the directory is temporary.
pub(super) fn parse_lifetime(argument: &OsStr) -> Option<bool> {
    match argument.to_str()? {
        "temporary" => Some(true),
        "persistent" => Some(false),
        _ => None,
    }
}
