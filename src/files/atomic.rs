//! Atomic replacement of a file: a reader, and a process that starts after a crash, finds the old
//! content or the new one as a whole.
//!
//! The new content is written to a temporary file in the same directory and synced; the temporary
//! file is renamed over the target; the directory is synced, since a rename that is not on disk is
//! undone by a crash. The functions block on disk, so async code calls them on a thread for blocking work.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Replaces the file at `target` by one that holds `contents` and that its owner alone may read.
/// Returns once this is on disk.
///
/// A temporary file that an interrupted call left behind is overwritten. Callers make sure that no
/// two calls replace the same file at once.
///
/// # Errors
/// Those of the file system. The file at `target` is then the old one or, if the directory could not
/// be synced, the new one.
pub fn replace(target: &Path, contents: &[u8]) -> io::Result<()> {
    let mut replacement = Replacement::create(target, OpenOptions::new().truncate(true))?;
    replacement.file().write_all(contents)?;
    replacement.commit()
}

/// Who may use a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Access {
    /// The permissions, such as 0o600.
    pub mode: u32,
    /// The number of the group; the process's own if this is `None`.
    pub group: Option<u32>,
}

/// Like [`replace`], but gives the file to a group and sets its permissions, before it has its name.
///
/// # Errors
/// Those of the file system, for example because the process is not a member of the group.
pub fn replace_with_access(target: &Path, contents: &[u8], access: Access) -> io::Result<()> {
    let mut replacement = Replacement::create(target, OpenOptions::new().truncate(true))?;
    // A file that a crash left behind may have other permissions than a new one.
    replacement.file().set_permissions(Permissions::from_mode(0o600))?;
    replacement.file().write_all(contents)?;
    if let Some(group) = access.group {
        std::os::unix::fs::fchown(replacement.file(), None, Some(group))?;
    }
    replacement.file().set_permissions(Permissions::from_mode(access.mode))?;
    replacement.commit()
}

/// A file that is being written and will replace another one. If it is dropped without
/// [`Replacement::commit`], it is removed and the other file stays.
#[derive(Debug)]
#[must_use = "without `commit` the target is not replaced"]
pub struct Replacement {
    target: PathBuf,
    temporary: PathBuf,
    file: File,
    committed: bool,
}

impl Replacement {
    /// Begins a replacement of `target` that excludes any other of this kind: waits until the one that is under way
    /// ends. A temporary file that an interrupted one left behind is overwritten. Read the target only now.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn exclusive(target: &Path) -> io::Result<Self> {
        loop {
            let replacement = Self::create(target, OpenOptions::new().truncate(false))?;
            // The kernel releases the lock when the file is closed, also by a kill.
            if let Err(error) = replacement.file.lock() {
                return Err(replacement.abandon(error));
            }
            // The one that held the lock has renamed or removed the file that was locked here now.
            let is_current = |metadata: fs::Metadata| {
                let ours = replacement.file.metadata()?;
                Ok((ours.dev(), ours.ino()) == (metadata.dev(), metadata.ino()))
            };
            match fs::symlink_metadata(&replacement.temporary).and_then(is_current) {
                Ok(true) => {
                    replacement.file.set_len(0)?;
                    return Ok(replacement);
                }
                Ok(false) => drop(replacement.abandon(io::ErrorKind::Other.into())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    drop(replacement.abandon(error));
                }
                Err(error) => return Err(replacement.abandon(error)),
            }
        }
    }

    /// Leaves the temporary file alone, which is another replacement's, and returns `error`.
    fn abandon(mut self, error: io::Error) -> io::Error {
        self.committed = true;
        error
    }

    fn create(target: &Path, options: &mut OpenOptions) -> io::Result<Self> {
        let temporary = temporary_path(target);
        let file = options.create(true).write(true).mode(0o600).open(&temporary)?;
        Ok(Self { target: target.to_owned(), temporary, file, committed: false })
    }

    /// The file to write to.
    #[must_use]
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Renames the file over its target, and returns once this is on disk.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn commit(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.temporary, &self.target)?;
        self.committed = true;
        sync_parent(&self.target)
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.committed {
            // The caller has the error that ended the replacement. If the file stays behind, the next
            // replacement overwrites it.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// The path of the temporary file beside `target`: `.NAME.new`.
#[must_use]
pub fn temporary_path(target: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(".new");
    target.with_file_name(name)
}

/// Syncs the directory of the file at `path`, so that the file's name is durable, or its removal. The
/// content must be synced separately.
///
/// # Errors
/// Those of opening and syncing the directory.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_replaced_file_holds_the_new_content_and_nothing_is_left_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("state");
        replace(&target, b"a longer first content").unwrap();
        replace(&target, b"second").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"second");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names(directory.path()), ["state"]);
    }

    #[test]
    fn a_replaced_file_has_the_permissions_that_are_asked_for_whatever_was_left_behind() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("state");
        fs::write(temporary_path(&target), "half").unwrap();
        for mode in [0o640, 0o600, 0o444] {
            replace_with_access(&target, b"whole", Access { mode, group: None }).unwrap();
            assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, mode);
            assert_eq!(fs::read(&target).unwrap(), b"whole");
        }
    }

    #[test]
    fn a_temporary_file_that_a_crash_left_behind_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("state");
        fs::write(temporary_path(&target), "half of something longer").unwrap();
        replace(&target, b"whole").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"whole");
    }

    #[test]
    fn an_abandoned_replacement_leaves_the_old_content() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("state");
        replace(&target, b"old").unwrap();
        let mut replacement = Replacement::exclusive(&target).unwrap();
        replacement.file().write_all(b"new").unwrap();
        drop(replacement);
        assert_eq!(fs::read(&target).unwrap(), b"old");
        assert_eq!(names(directory.path()), ["state"]);
    }

    #[test]
    fn exclusive_replacements_take_turns_and_none_is_lost() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("state");
        replace(&target, b"").unwrap();
        // One was killed while it wrote.
        fs::write(temporary_path(&target), "half of something longer").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        let mut replacement = Replacement::exclusive(&target).unwrap();
                        let old = fs::read(&target).unwrap();
                        replacement.file().write_all(&[old.as_slice(), b"."].concat()).unwrap();
                        replacement.commit().unwrap();
                        // Another one is abandoned.
                        drop(Replacement::exclusive(&target).unwrap());
                    }
                });
            }
        });
        assert_eq!(fs::read(&target).unwrap(), [b'.'; 40]);
        assert_eq!(names(directory.path()), ["state"]);
    }
}
