//! The directory that outlives the process: one process at a time, one identity.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use aws_lc_rs::{digest, rand};
use thiserror::Error;

/// Why a state directory cannot be used.
#[derive(Debug, Error)]
pub enum StateDirError {
    /// Another process has it.
    #[error("the state directory {0} is in use by another process")]
    InUse(PathBuf),
    /// The instance file holds something else.
    #[error("{0} does not hold an instance id (i- and 16 hexadecimal digits)")]
    Malformed(PathBuf),
    /// The file system refused.
    #[error("the state directory cannot be used: {path}: {error}")]
    Io {
        /// What could not be read or written.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// A state directory that belongs to this process until the last clone is dropped.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
    instance: Arc<str>,
    /// The kernel lets go of the lock when the file is closed, also by SIGKILL.
    _lock: Arc<File>,
}

impl StateDir {
    /// Takes `path` for this process; makes it, for the owner alone, and its instance id if they are
    /// not there.
    ///
    /// # Errors
    /// [`StateDirError::InUse`] when another process has it.
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| StateDirError::Io { path, error }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed(path))?;
        let lock_path = path.join("lock");
        let lock = private().truncate(false).open(&lock_path).map_err(failed(&lock_path))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => StateDirError::InUse(path.to_owned()),
            TryLockError::Error(error) => failed(&lock_path)(error),
        })?;
        let instance_path = path.join("instance");
        let instance = match read_instance(&instance_path).map_err(failed(&instance_path))? {
            Some(instance) => instance,
            None => make_instance(path).map_err(failed(&instance_path))?,
        };
        if !is_instance(&instance) {
            return Err(StateDirError::Malformed(instance_path));
        }
        Ok(Self { path: path.to_owned(), instance: instance.into(), _lock: Arc::new(lock) })
    }

    /// This replica's identity: random, and the same at each start.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// A number for this replica, derived from its identity; two replicas may share one.
    #[must_use]
    pub fn replica(&self) -> u16 {
        let digest = digest::digest(&digest::SHA256, self.instance.as_bytes());
        digest.as_ref().iter().take(2).fold(0, |number, byte| number << 8 | u16::from(*byte))
    }

    /// Where it is noted for which accounts tokens were issued without the database.
    #[must_use]
    pub fn issued_alone_file(&self) -> PathBuf {
        self.path.join("issued-alone")
    }

    /// Where it is noted which database this replica had.
    #[must_use]
    pub fn database_file(&self) -> PathBuf {
        self.path.join("database")
    }

    /// Where the audit journal's segments lie.
    #[must_use]
    pub fn journal_dir(&self) -> PathBuf {
        Self::journal_below(&self.path)
    }

    /// Where they lie below the state directory `path`.
    #[must_use]
    pub fn journal_below(path: &Path) -> PathBuf {
        path.join("journal")
    }

    /// Where signed heads of the audit log are kept, so that copies can be made of them.
    #[must_use]
    pub fn heads_file(&self) -> PathBuf {
        self.path.join("audit-heads.jsonl")
    }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.create(true).write(true).mode(0o600);
    options
}

fn is_instance(text: &str) -> bool {
    text.strip_prefix("i-")
        .is_some_and(|hex| hex.len() == 16 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn read_instance(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Draws an id and has it on disk under its name before it is used: an id that a crash takes back
/// would leave records of an instance that never was.
fn make_instance(dir: &Path) -> io::Result<String> {
    let mut random = [0; 8];
    rand::fill(&mut random).map_err(|_| io::Error::other("no random numbers"))?;
    let instance = format!("i-{}", hex::encode(random));
    let draft = dir.join("instance.new");
    let mut file = private().truncate(true).open(&draft)?;
    writeln!(file, "{instance}")?;
    file.sync_all()?;
    std::fs::rename(&draft, dir.join("instance"))?;
    File::open(dir)?.sync_all()?;
    Ok(instance)
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
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        drop(first);
        let again = StateDir::open(&path).unwrap();
        assert_eq!(again.instance(), instance);
        assert_eq!(again.replica(), replica);
    }

    #[test]
    fn a_second_holder_is_refused_until_the_last_clone_of_the_first_is_gone() {
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
    fn an_instance_file_that_holds_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("instance"), "i-not hex").unwrap();
        assert!(matches!(StateDir::open(dir.path()), Err(StateDirError::Malformed(_))));
    }
}
