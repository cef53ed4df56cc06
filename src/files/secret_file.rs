//! A file for a secret that exists nowhere else.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use super::atomic;

/// A new file that holds a secret and that its owner alone may read. It is on disk before what it opens is
/// registered elsewhere. Unless [`SecretFile::keep`] is called, it is removed again.
#[derive(Debug)]
#[must_use = "without `keep` the file is removed"]
pub struct SecretFile {
    path: PathBuf,
    kept: bool,
}

impl SecretFile {
    /// Writes `secret` and a line feed into a new file at `path`, with mode 0600. Returns once this is on
    /// disk. Blocks on disk.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] if there is anything at `path`, also a symbolic link that leads
    /// nowhere; otherwise the errors of the file system, after which the file does not exist.
    pub fn create(path: &Path, secret: &str) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
        // From here on the file is removed if anything fails.
        let created = Self { path: path.to_owned(), kept: false };
        file.write_all(secret.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        atomic::sync_parent(path)?;
        Ok(created)
    }

    /// Leaves the file where it is.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for SecretFile {
    fn drop(&mut self) {
        if !self.kept {
            // Nobody has registered the secret. So if the file stays behind, it opens nothing.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn the_file_is_readable_by_its_owner_alone_and_stays_only_if_it_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bearer");
        drop(SecretFile::create(&path, "secret").unwrap());
        assert!(!path.exists());
        SecretFile::create(&path, "secret").unwrap().keep();
        assert_eq!(fs::read_to_string(&path).unwrap(), "secret\n");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn whatever_exists_at_the_path_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        let (nowhere, folder) = (directory.path().join("nowhere"), directory.path().join("folder"));
        fs::write(&file, "old").unwrap();
        symlink(&nowhere, &link).unwrap();
        fs::create_dir(&folder).unwrap();
        for path in [&file, &link, &folder] {
            let error = SecretFile::create(path, "secret").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{}", path.display());
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "old");
        assert!(!nowhere.exists() && link.is_symlink());
    }
}
