//! The journal's directory, as little of it as the journal needs; a trait, so that tests can have
//! a disk that fails.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::domain::clock::Timestamp;

/// A file in the directory.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) len: u64,
    pub(super) modified: Timestamp,
}

/// A directory of flat files.
pub(super) trait Files: Send + Sync + 'static {
    /// What is there.
    fn list(&self) -> io::Result<Vec<Listed>>;
    /// Makes a file that was not there, for appending. Its name is on disk after [`Files::sync_dir`].
    fn create(&self, name: &str) -> io::Result<Box<dyn Appending>>;
    /// Reads up to `len` bytes from `offset`; fewer only at the file's end.
    fn read(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>>;
    /// Cuts a file and has that on disk.
    fn truncate(&self, name: &str, len: u64) -> io::Result<()>;
    /// Puts `bytes` in the place of a file, whole or not at all, and has that on disk.
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Has the names on disk.
    fn sync_dir(&self) -> io::Result<()>;
    /// How many bytes the disk still takes.
    fn free(&self) -> io::Result<u64>;
}

/// A file open for appending.
pub(super) trait Appending: Send {
    /// Appends all of `bytes`; after an error some may be there.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Has what was appended on disk.
    fn sync(&mut self) -> io::Result<()>;
}

/// A real directory.
pub(super) struct Directory {
    path: PathBuf,
}

impl Directory {
    /// Makes the directory, for the owner alone, if it is not there.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        if let Some(parent) = path.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(Self { path: path.to_owned() })
    }

    /// A directory that is there, or whose absence its first use tells.
    pub(super) fn existing(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }
}

impl Files for Directory {
    fn list(&self) -> io::Result<Vec<Listed>> {
        let mut listed = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            // No name of the journal's own is anything but UTF-8.
            if let (true, Ok(name)) = (metadata.is_file(), entry.file_name().into_string()) {
                let modified = metadata.modified()?.into();
                listed.push(Listed { name, len: metadata.len(), modified });
            }
        }
        Ok(listed)
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn Appending>> {
        let mut options = OpenOptions::new();
        let file = options.append(true).create_new(true).mode(0o600).open(self.path.join(name))?;
        Ok(Box::new(file))
    }

    fn read(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let file = File::open(self.path.join(name))?;
        let mut bytes = vec![0; len];
        let mut filled = 0;
        while filled < len {
            match file.read_at(&mut bytes[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.path.join(name))?;
        file.set_len(len)?;
        file.sync_all()
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let draft = self.path.join(format!("{name}.new"));
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&draft, self.path.join(name))?;
        self.sync_dir()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn free(&self) -> io::Result<u64> {
        let disk = rustix::fs::statvfs(&self.path)?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }
}

impl Appending for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}
