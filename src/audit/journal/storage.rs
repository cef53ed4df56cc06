//! The directory operations that a journal needs, as a trait: tests replace it by storage that
//! fails.
//!
//! Everything here blocks on I/O.

use std::{
    fs::{self, DirBuilder, File, Metadata, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{domain::clock::Timestamp, files::atomic};

/// A file of the directory.
#[derive(Clone, Debug)]
pub(super) struct FileInfo {
    pub(super) name: String,
    pub(super) len: u64,
    pub(super) modified: Timestamp,
}

/// What identifies a file and changes whenever its content does, unless somebody sets the time back.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct FileState {
    /// The numbers of the device and of the file on it. No other file gets them while the file is open.
    pub(super) identity: (u64, u64),
    /// Length in bytes.
    pub(super) len: u64,
    /// When its content was changed last, in seconds and nanoseconds.
    pub(super) modified: (i64, i64),
}

/// A directory of files, without subdirectories. Every `name` is that of a file in it.
pub(super) trait JournalStorage: Send + Sync + 'static {
    /// Lists all files.
    fn list(&self) -> io::Result<Vec<FileInfo>>;
    /// Creates the directory again if it does not exist any more.
    fn create_directory(&self) -> io::Result<()>;
    /// Creates a file for appending. Fails if it exists. Its name is durable only after
    /// [`JournalStorage::sync_dir`].
    fn create(&self, name: &str) -> io::Result<Arc<dyn SegmentFile>>;
    /// Opens a file for reading.
    fn open(&self, name: &str) -> io::Result<Arc<dyn SegmentFile>>;
    /// Returns the state of the file that the name leads to.
    fn state_of(&self, name: &str) -> io::Result<FileState>;
    /// Renames a file, and replaces the one that has the new name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Reads `len` bytes from `offset`; fewer only at the end of the file.
    fn read(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>>;
    /// Truncates a file and syncs it.
    fn truncate(&self, name: &str, len: u64) -> io::Result<()>;
    /// Replaces the contents of a file atomically and durably; creates the file if it does not
    /// exist.
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes the names of created, renamed and removed files durable.
    fn sync_dir(&self) -> io::Result<()>;
    /// Returns how many bytes are free in the file system.
    fn free_bytes(&self) -> io::Result<u64>;
}

/// An open file. It stays the same file when its name is removed, or leads to another one.
pub(super) trait SegmentFile: Send + Sync {
    /// Appends `bytes`. After an error, a part of them may be in the file.
    fn append(&self, bytes: &[u8]) -> io::Result<()>;
    /// Syncs what was appended to disk.
    fn sync(&self) -> io::Result<()>;
    /// Reads `len` bytes from `offset`; fewer only at the end of the file.
    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>>;
    /// Truncates the file and syncs it.
    fn truncate(&self, len: u64) -> io::Result<()>;
    /// Returns the state of the file.
    fn state(&self) -> io::Result<FileState>;
}

/// A directory of the file system.
pub(super) struct Directory {
    path: PathBuf,
}

impl Directory {
    /// Creates the directory with mode 0700 if it does not exist, and makes its name durable.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        atomic::sync_parent(path)?;
        Ok(Self { path: path.to_owned() })
    }

    /// Returns a directory without checking that it exists: the first operation fails if it does
    /// not.
    pub(super) fn existing(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }
}

impl JournalStorage for Directory {
    fn list(&self) -> io::Result<Vec<FileInfo>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            // The journal uses only names in UTF-8.
            if let (true, Ok(name)) = (metadata.is_file(), entry.file_name().into_string()) {
                let modified = metadata.modified()?.into();
                files.push(FileInfo { name, len: metadata.len(), modified });
            }
        }
        Ok(files)
    }

    fn create_directory(&self) -> io::Result<()> {
        Self::open(&self.path).map(drop)
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn SegmentFile>> {
        let mut options = OpenOptions::new();
        options.read(true).append(true).create_new(true).mode(0o600);
        Ok(Arc::new(options.open(self.path.join(name))?))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn SegmentFile>> {
        Ok(Arc::new(File::open(self.path.join(name))?))
    }

    fn state_of(&self, name: &str) -> io::Result<FileState> {
        Ok(state(&fs::metadata(self.path.join(name))?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn read(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        SegmentFile::read(&File::open(self.path.join(name))?, offset, len)
    }

    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.path.join(name))?;
        file.set_len(len)?;
        file.sync_all()
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        atomic::replace(&self.path.join(name), bytes)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let stats = rustix::fs::statvfs(&self.path)?;
        Ok(stats.f_bavail.saturating_mul(stats.f_frsize))
    }
}

impl SegmentFile for File {
    fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let mut file = self;
        file.write_all(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut filled = 0;
        while filled < len {
            match self.read_at(&mut bytes[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.set_len(len)?;
        self.sync_all()
    }

    fn state(&self) -> io::Result<FileState> {
        Ok(state(&self.metadata()?))
    }
}

fn state(metadata: &Metadata) -> FileState {
    FileState {
        identity: (metadata.dev(), metadata.ino()),
        len: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    }
}
