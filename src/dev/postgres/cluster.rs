//! One database directory: who owns it, how it is made, and how its server is run.
//!
//! | in it | what |
//! |---|---|
//! | `guard` | locked by the guard as long as it lives |
//! | `log` | what `initdb` and the server say |
//! | `data` | the data directory, complete or not there |
//! | `.s.PGSQL.5432` | the socket |

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

use super::{DATABASE, temporary_root};

/// Temporary directories begin with this: short, since socket paths are.
const TEMPORARY_PREFIX: &str = "tb-pg-";

/// As much of the log's end as an error shows, in bytes.
const LOG_TAIL: u64 = 2_000;

/// What every server is told, beyond its place.
const SETTINGS: &[&str] = &[
    "listen_addresses=",
    "unix_socket_permissions=0700",
    "max_connections=200",
    "shared_buffers=32MB",
    "synchronous_commit=on",
    "logging_collector=off",
    "log_connections=off",
    "log_min_messages=warning",
    // A failed statement may hold a client's secret.
    "log_min_error_statement=panic",
];

/// A name that no directory under the temporary one has.
pub(super) fn temporary_directory() -> io::Result<PathBuf> {
    let mut unique = [0_u8; 6];
    aws_lc_rs::rand::fill(&mut unique).map_err(io::Error::other)?;
    Ok(temporary_root().join(format!("{TEMPORARY_PREFIX}{}", hex::encode(unique))))
}

/// A claimed database directory. Dropped, it goes if it is temporary.
pub(super) struct Cluster {
    binaries: PathBuf,
    directory: PathBuf,
    temporary: bool,
    owner: Owner,
    /// Held, not used: the lock ends with it.
    _lock: File,
}

impl Cluster {
    /// Makes `directory` if it is missing, hands it to the user that will run the server, and locks
    /// it.
    pub(super) fn claim(
        binaries: PathBuf,
        directory: PathBuf,
        temporary: bool,
    ) -> io::Result<Self> {
        let owner = Owner::find()?;
        if temporary {
            DirBuilder::new().mode(0o700).create(&directory)?;
        } else {
            fs::create_dir_all(&directory)?;
            fs::set_permissions(&directory, Permissions::from_mode(0o700))?;
        }
        let lock = lock(&directory)?;
        let cluster = Self { binaries, directory, temporary, owner, _lock: lock };
        cluster.owner.take(&cluster.directory)?;
        // From here on a leftover is told from a directory about to be locked.
        cluster.log()?;
        Ok(cluster)
    }

    /// Is there data from an earlier run?
    pub(super) fn is_initialised(&self) -> bool {
        self.data().exists()
    }

    /// The command that makes the data directory, under another name.
    pub(super) fn initdb(&self) -> io::Result<Command> {
        remove(&self.new_data())?;
        let mut command = self.command("initdb")?;
        command.arg("-D").arg(self.new_data()).args([
            "--username=postgres",
            // The directory's permissions say who gets in.
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

    /// The command that, told so on its standard input, makes the database.
    pub(super) fn single_user(&self) -> io::Result<(Command, String)> {
        let mut command = self.command("postgres")?;
        command.arg("--single").arg("-D").arg(self.new_data());
        command.args(["-c", self.fsync()]).arg("postgres").stdin(Stdio::piped());
        Ok((command, format!("create database {DATABASE}\n")))
    }

    /// Gives the data directory its name, now that it is complete.
    pub(super) fn finish(&self) -> io::Result<()> {
        fs::rename(self.new_data(), self.data())
    }

    /// The command that runs the server.
    pub(super) fn server(&self) -> io::Result<Command> {
        let mut command = self.command("postgres")?;
        command.arg("-D").arg(self.data()).arg("-k").arg(&self.directory);
        for setting in SETTINGS.iter().chain([&self.fsync()]) {
            command.args(["-c", setting]);
        }
        Ok(command)
    }

    /// Does the server with this process id accept connections? It says so in its pid file.
    pub(super) fn is_ready(&self, pid: u32) -> bool {
        let Ok(file) = fs::read_to_string(self.data().join("postmaster.pid")) else {
            return false;
        };
        let mut lines = file.lines().map(str::trim);
        lines.next().and_then(|line| line.parse().ok()) == Some(pid)
            && lines.any(|line| line == "ready")
    }

    /// The end of the log.
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

    /// One of Postgres' programs: as the owner, in a process group of its own, with nothing of our
    /// environment that could steer it or is none of its business.
    fn command(&self, program: &str) -> io::Result<Command> {
        let mut command = Command::new(self.binaries.join(program));
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
            .stdout(self.log()?)
            .stderr(self.log()?)
            .process_group(0);
        if let Some(user) = &self.owner.0 {
            // As root this drops the supplementary groups as well.
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        Ok(command)
    }

    fn log(&self) -> io::Result<File> {
        let path = self.directory.join("log");
        let log = OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
        Ok(log)
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
        // A killed server's last children may still write for a moment.
        for _ in 0..20 {
            if remove(&self.directory).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The user that runs the server where we are root.
struct Owner(Option<User>);

impl Owner {
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

    fn take(&self, path: &Path) -> io::Result<()> {
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

/// Removes the temporary directories whose guards were killed. Their servers, if any still run, end
/// by themselves when they miss their pid file: killing a process by a number in a file would be
/// killing by hearsay.
pub(super) fn remove_leftovers() {
    let (Ok(entries), Ok(owner)) = (fs::read_dir(temporary_root()), Owner::find()) else {
        return;
    };
    for entry in entries.flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX)
            && entry
                .metadata()
                .is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == owner.uid().as_raw());
        if ours && is_abandoned(&entry.path()) {
            let _ = remove(&entry.path());
        }
    }
}

/// The log is made after the lock is taken: with a log and without a lock, there is no guard.
fn is_abandoned(directory: &Path) -> bool {
    directory.join("log").exists()
        && File::open(directory.join("guard")).is_ok_and(|lock| lock.try_lock().is_ok())
}

fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Reads the word that says whether a directory is kept.
pub(super) fn is_temporary(word: &OsStr) -> Option<bool> {
    match word.to_str()? {
        "temporary" => Some(true),
        "kept" => Some(false),
        _ => None,
    }
}
