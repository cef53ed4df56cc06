//! The state directory, which outlives the process. One process uses it at a time. It holds the
//! replica's identity, the audit journal, and the facts that a start needs about earlier processes.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use aws_lc_rs::{digest, rand};
use parking_lot::Mutex;
use thiserror::Error;

use super::{atomic, given_path::shown};

/// Why a state directory cannot be used.
#[derive(Debug, Error)]
pub enum StateDirError {
    /// Another process uses the directory.
    #[error("the state directory {} is in use by another process", shown(.0))]
    InUse(PathBuf),
    /// The file with the instance id holds something else.
    #[error("{} does not hold an instance id (i- and 16 hexadecimal digits)", shown(.0))]
    Malformed(PathBuf),
    /// The directory was replaced by that of another replica while this process used it.
    #[error(
        "the state directory {} was replaced by that of another replica, or by one with another instance id",
        shown(.0)
    )]
    Foreign(PathBuf),
    /// The file system refused an operation.
    #[error("the state directory cannot be used: {}: {error}", shown(path))]
    Io {
        /// The file or directory that could not be read or written.
        path: PathBuf,
        /// The cause.
        #[source]
        error: io::Error,
    },
}

/// A state directory that this process holds until the last clone is dropped. Cheap to clone.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
    instance: Arc<str>,
    /// Identifies this process among all that used the directory or a copy of it.
    start: Arc<str>,
    /// The starts of earlier processes that held the same lock, so that they have ended.
    ended_starts: Arc<[String]>,
    /// The lock, last, and those of directories that were moved away. The kernel releases a lock when the file is
    /// closed, also when the process is killed.
    locks: Arc<Mutex<Vec<File>>>,
}

impl StateDir {
    /// Locks the directory `path` for this process. Creates it (mode 0700) and its instance id if they
    /// are missing. Blocks on disk.
    ///
    /// # Errors
    /// [`StateDirError`], of which [`StateDirError::InUse`] means that another process holds the lock.
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
        let lock = lock_directory(path)?;
        let instance_path = path.join("instance");
        let instance = match read_instance_id(&instance_path).map_err(failed(&instance_path))? {
            Some(instance) => instance,
            None => create_instance_id(path).map_err(failed(&instance_path))?,
        };
        if !is_instance_id(&instance) {
            return Err(StateDirError::Malformed(instance_path));
        }
        let starts_path = path.join("starts");
        let (start, ended_starts) =
            register_start(&starts_path, &lock).map_err(failed(&starts_path))?;
        Ok(Self {
            path: path.to_owned(),
            instance: instance.into(),
            start: start.into(),
            ended_starts: ended_starts.into(),
            locks: Arc::new(Mutex::new(vec![lock])),
        })
    }

    /// Ensures that the directory's path leads to a directory that this process has locked and that has its
    /// identity. Restores what another program removed, so that a later start continues as this replica. Blocks on
    /// disk.
    ///
    /// # Errors
    /// [`StateDirError::InUse`] if another process has locked the directory that is there now,
    /// [`StateDirError::Foreign`] if it has another identity, and errors of the file system.
    pub fn reclaim(&self) -> Result<(), StateDirError> {
        let lock_path = self.path.join("lock");
        let mut locks = self.locks.lock();
        let is_held = locks.last().is_some_and(|lock| is_at(lock, &lock_path));
        if !is_held {
            tracing::error!(
                directory = %self.path.display(),
                "another program removed, moved or replaced the state directory, or its lock: it is restored"
            );
            let lock = lock_directory(&self.path)?;
            // The lock of a directory that was moved is still needed, so that no other process uses that.
            locks.retain(|lock| lock.metadata().is_ok_and(|lock| lock.nlink() > 0));
            locks.push(lock);
        }
        let instance_path = self.path.join("instance");
        match read_instance_id(&instance_path).map_err(failed(&instance_path))? {
            Some(found) if *found == *self.instance => {}
            Some(_) => return Err(StateDirError::Foreign(self.path.clone())),
            None => {
                write_instance_id(&self.path, &self.instance).map_err(failed(&instance_path))?;
            }
        }
        let starts_path = self.path.join("starts");
        if is_held && starts_path.exists() {
            return Ok(());
        }
        let lock = locks.last().expect("a lock is held, or was pushed above");
        let starts = self.ended_starts.iter().map(String::as_str).chain([&*self.start]);
        write_starts(&starts_path, lock, starts).map_err(failed(&starts_path))
    }

    /// Returns a random number that identifies this process among all that used the directory or a copy of
    /// it.
    #[must_use]
    pub fn start(&self) -> &str {
        &self.start
    }

    /// Returns the starts of earlier processes that are known to have ended, since they held the lock that this
    /// process holds. Those that used another copy of the directory, or used it before the system was
    /// restarted, are not among them.
    #[must_use]
    pub fn ended_starts(&self) -> &[String] {
        &self.ended_starts
    }

    /// Returns this replica's identity, which was generated at random and stays the same at each start.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Returns a number that is derived from the identity. Two replicas may have the same number: the heartbeat
    /// chooses another one then.
    #[must_use]
    pub fn replica(&self) -> u16 {
        let digest = digest::digest(&digest::SHA256, self.instance.as_bytes());
        digest.as_ref().iter().take(2).fold(0, |number, byte| number << 8 | u16::from(*byte))
    }

    /// Returns the path of the list of accounts for which tokens were issued without the database.
    #[must_use]
    pub fn intent_log_file(&self) -> PathBuf {
        self.path.join("issued-alone")
    }

    /// Returns the path of the file that identifies the database which this replica used last.
    #[must_use]
    pub fn database_file(&self) -> PathBuf {
        self.path.join("database")
    }

    /// Returns the directory of the audit journal's segments.
    #[must_use]
    pub fn journal_dir(&self) -> PathBuf {
        Self::journal_below(&self.path)
    }

    /// Returns the directory of the journal's segments below the state directory `path`, without
    /// locking that.
    #[must_use]
    pub fn journal_below(path: &Path) -> PathBuf {
        path.join("journal")
    }

    /// Returns the path of the file with signed checkpoints of the audit log, for copies elsewhere.
    #[must_use]
    pub fn checkpoints_file(&self) -> PathBuf {
        self.path.join("audit-heads.jsonl")
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> StateDirError {
    let path = path.to_owned();
    move |error| StateDirError::Io { path, error }
}

/// Returns whether `path` leads to the open `file`. It does not if either cannot be examined.
fn is_at(file: &File, path: &Path) -> bool {
    let identity = |it: fs::Metadata| (it.dev(), it.ino());
    let there = fs::metadata(path).map(identity);
    file.metadata().map(identity).is_ok_and(|open| there.is_ok_and(|there| there == open))
}

/// Creates the directory `path` if it does not exist, and locks it.
fn lock_directory(path: &Path) -> Result<File, StateDirError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed(path))?;
    let lock_path = path.join("lock");
    let lock = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(failed(&lock_path))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(StateDirError::InUse(path.to_owned())),
        Err(TryLockError::Error(error)) => Err(failed(&lock_path)(error)),
    }
}

fn is_instance_id(text: &str) -> bool {
    text.strip_prefix("i-")
        .is_some_and(|hex| hex.len() == 16 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn read_instance_id(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Generates an instance id and makes it durable before it is used: if a crash lost it, records would
/// name an unknown instance.
fn create_instance_id(dir: &Path) -> io::Result<String> {
    let instance = format!("i-{}", random_hex()?);
    write_instance_id(dir, &instance)?;
    Ok(instance)
}

fn write_instance_id(dir: &Path, instance: &str) -> io::Result<()> {
    atomic::replace(&dir.join("instance"), format!("{instance}\n").as_bytes())
}

/// How many starts the file lists. Usually the last one is the one that the database knows; after starts that
/// did not reach the database, it is an earlier one.
const LISTED_STARTS: usize = 20;

/// Adds a random start to the file `path`, and returns it with the starts that were listed before.
///
/// The first line of the file identifies the file `lock` on this system. In a copy of the directory, the lock is
/// another file, and who holds the original's is not known: then no earlier start is returned.
fn register_start(path: &Path, lock: &File) -> io::Result<(String, Vec<String>)> {
    let start = random_hex()?;
    let identity = lock_identity(lock)?;
    let listed = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    let mut lines = listed.lines();
    let ended: Vec<_> = if lines.next() == Some(&identity) {
        lines.map(ToOwned::to_owned).collect()
    } else {
        vec![]
    };
    let kept = ended.iter().skip((ended.len() + 1).saturating_sub(LISTED_STARTS));
    write_starts(path, lock, kept.map(String::as_str).chain([&*start]))?;
    Ok((start, ended))
}

/// Writes the file of starts, which belong to the processes that held `lock`.
fn write_starts<'a>(
    path: &Path,
    lock: &File,
    starts: impl Iterator<Item = &'a str>,
) -> io::Result<()> {
    let mut text = format!("{}\n", lock_identity(lock)?);
    for start in starts {
        text.push_str(start);
        text.push('\n');
    }
    atomic::replace(path, text.as_bytes())
}

/// Returns a line that no other lock file has: not a copy of it, nor the same file seen from another system, where
/// its lock may not be shared, nor before a restart.
fn lock_identity(lock: &File) -> io::Result<String> {
    let metadata = lock.metadata()?;
    // Only Linux has this file. Elsewhere, the numbers of device and file identify the lock.
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Ok(format!("lock {}:{} {}", metadata.dev(), metadata.ino(), boot.trim_end()))
}

fn random_hex() -> io::Result<String> {
    let mut random = [0; 8];
    rand::fill(&mut random).map_err(|_| io::Error::other("no random numbers"))?;
    Ok(hex::encode(random))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_keeps_its_identity_from_start_to_start() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/b");
        let first = StateDir::open(&path).unwrap();
        let (instance, replica) = (first.instance().to_owned(), first.replica());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        drop(first);
        let again = StateDir::open(&path).unwrap();
        assert_eq!(again.instance(), instance);
        assert_eq!(again.replica(), replica);
    }

    #[test]
    fn a_second_holder_is_refused_until_the_last_clone_of_the_first_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::open(dir.path()).unwrap();
        let clone = first.clone();
        drop(first);
        let refused = StateDir::open(dir.path()).unwrap_err();
        assert!(matches!(refused, StateDirError::InUse(_)), "{refused}");
        drop(clone);
        StateDir::open(dir.path()).unwrap();
    }

    #[test]
    fn earlier_starts_are_known_to_have_ended_but_not_those_of_a_copys_original() {
        let parent = tempfile::tempdir().unwrap();
        let (path, copy) = (parent.path().join("original"), parent.path().join("copy"));
        let first = StateDir::open(&path).unwrap();
        let (instance, start) = (first.instance().to_owned(), first.start().to_owned());
        assert_eq!(first.ended_starts(), [""; 0]);
        fs::create_dir(&copy).unwrap();
        for name in ["lock", "instance", "starts"] {
            fs::copy(path.join(name), copy.join(name)).unwrap();
        }
        let copied = StateDir::open(&copy).unwrap();
        assert_eq!(copied.instance(), instance);
        assert_eq!(copied.ended_starts(), [""; 0], "the original is in use");
        drop(first);
        let mut starts = vec![start];
        for _ in 0..LISTED_STARTS + 5 {
            let again = StateDir::open(&path).unwrap();
            assert!(!starts.contains(&again.start().to_owned()));
            let known = starts.len().min(LISTED_STARTS);
            assert_eq!(again.ended_starts(), &starts[starts.len() - known..]);
            starts.push(again.start().to_owned());
        }
    }

    #[test]
    fn what_is_removed_or_moved_is_restored_so_that_the_next_start_is_the_same_replica() {
        let parent = tempfile::tempdir().unwrap();
        let (path, moved) = (parent.path().join("state"), parent.path().join("moved"));
        let held = StateDir::open(&path).unwrap();
        let removals: [&dyn Fn(); 6] = [
            &|| fs::remove_file(path.join("lock")).unwrap(),
            &|| fs::remove_file(path.join("instance")).unwrap(),
            &|| fs::remove_file(path.join("starts")).unwrap(),
            &|| fs::remove_dir_all(&path).unwrap(),
            &|| fs::rename(&path, &moved).unwrap(),
            &|| {
                fs::remove_dir_all(&path).unwrap();
                fs::create_dir(&path).unwrap();
            },
        ];
        for (n, remove) in removals.iter().enumerate() {
            remove();
            held.reclaim().unwrap();
            held.reclaim().unwrap();
            for path in [&path, &moved].into_iter().filter(|path| path.exists()) {
                let second = StateDir::open(path).unwrap_err();
                assert!(matches!(second, StateDirError::InUse(_)), "{n}: {second}");
            }
        }
        let (instance, start) = (held.instance().to_owned(), held.start().to_owned());
        drop(held);
        let next = StateDir::open(&path).unwrap();
        assert_eq!(next.instance(), instance);
        assert!(next.ended_starts().contains(&start));
    }

    #[test]
    fn a_directory_that_another_process_or_replica_has_taken_is_not_reclaimed() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let held = StateDir::open(&path).unwrap();
        fs::remove_dir_all(&path).unwrap();
        let other = StateDir::open(&path).unwrap();
        assert!(matches!(held.reclaim(), Err(StateDirError::InUse(_))));
        drop(other);
        assert!(matches!(held.reclaim(), Err(StateDirError::Foreign(_))));
        fs::remove_dir_all(&path).unwrap();
        held.reclaim().unwrap();
    }

    #[test]
    fn an_instance_file_that_holds_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("instance"), "i-not hex").unwrap();
        assert!(matches!(StateDir::open(dir.path()), Err(StateDirError::Malformed(_))));
    }
}
