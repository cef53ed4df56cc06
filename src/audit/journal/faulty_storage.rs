//! Storage in memory for tests. It can fail, fill up, and lose at a crash what was not synced.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
};

use chrono::DateTime;
use parking_lot::{Mutex, MutexGuard};

use super::storage::{FileInfo, FileState, JournalStorage, SegmentFile};

/// Storage in memory. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct FaultyStorage(Arc<Mutex<FaultState>>);

#[derive(Default)]
pub(crate) struct FaultState {
    pub(crate) files: BTreeMap<String, StoredFile>,
    /// How many of the next syncs fail.
    pub(crate) failing_syncs: usize,
    /// How many of the next truncations and removals fail.
    pub(crate) failing_removals: usize,
    /// How many more bytes can be written; `None` for no limit.
    pub(crate) room: Option<usize>,
    pub(crate) read_only: bool,
    /// The names of files that cannot be read.
    pub(crate) unreadable: BTreeSet<String>,
    pub(crate) syncs: usize,
    /// Number of files that were created.
    created: u64,
    /// Appends lock this first, so that a test can block them.
    pub(crate) gate: Option<Arc<Mutex<()>>>,
}

#[derive(Clone, Default)]
pub(crate) struct StoredFile {
    pub(crate) bytes: Vec<u8>,
    synced: usize,
    name_synced: bool,
    /// The number of the file, which no other file has.
    number: u64,
}

impl StoredFile {
    fn state(&self) -> FileState {
        FileState { identity: (0, self.number), len: self.bytes.len() as u64, modified: (0, 0) }
    }
}

impl FaultyStorage {
    pub(crate) fn state(&self) -> MutexGuard<'_, FaultState> {
        self.0.lock()
    }

    /// Returns the storage as it is after a power failure. It has the files whose names were synced, each
    /// with its synced bytes and the first `surviving` of the unsynced ones.
    pub(crate) fn after_power_loss(&self, surviving: usize) -> Self {
        let mut files = self.state().files.clone();
        files.retain(|_, file| file.name_synced);
        for file in files.values_mut() {
            file.bytes.truncate(file.synced + surviving);
            file.synced = file.bytes.len();
        }
        Self(Arc::new(Mutex::new(FaultState { files, ..FaultState::default() })))
    }

    /// Returns the names and contents of the files whose names end in `ending`.
    pub(crate) fn texts(&self, ending: &str) -> Vec<(String, String)> {
        let state = self.state();
        let files = state.files.iter().filter(|(name, _)| name.ends_with(ending));
        files.map(|(n, f)| (n.clone(), String::from_utf8_lossy(&f.bytes).into_owned())).collect()
    }
}

impl FaultState {
    fn reserve(&mut self, wanted: usize) -> io::Result<usize> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let Some(room) = &mut self.room else { return Ok(wanted) };
        let fitting = wanted.min(*room);
        *room -= fitting;
        Ok(fitting)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.syncs += 1;
        if self.failing_syncs > 0 {
            self.failing_syncs -= 1;
            return Err(io::Error::other("injected: the sync failed"));
        }
        Ok(())
    }

    fn fail_removal(&mut self) -> io::Result<()> {
        if self.failing_removals > 0 {
            self.failing_removals -= 1;
            return Err(io::Error::other("injected: the removal failed"));
        }
        Ok(())
    }

    /// Returns an empty file with a number of its own.
    fn new_file(&mut self) -> StoredFile {
        self.created += 1;
        StoredFile { number: self.created, ..StoredFile::default() }
    }

    fn file(&mut self, name: &str) -> io::Result<&mut StoredFile> {
        self.files.get_mut(name).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl JournalStorage for FaultyStorage {
    fn list(&self) -> io::Result<Vec<FileInfo>> {
        let listed = |(name, file): (&String, &StoredFile)| FileInfo {
            name: name.clone(),
            len: file.bytes.len() as u64,
            modified: DateTime::UNIX_EPOCH,
        };
        Ok(self.state().files.iter().map(listed).collect())
    }

    fn create_directory(&self) -> io::Result<()> {
        Ok(())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn SegmentFile>> {
        let mut state = self.state();
        state.reserve(0)?;
        if state.files.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = state.new_file();
        state.files.insert(name.to_owned(), file);
        Ok(Arc::new(Handle { disk: self.clone(), name: name.to_owned() }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn SegmentFile>> {
        self.state().file(name)?;
        Ok(Arc::new(Handle { disk: self.clone(), name: name.to_owned() }))
    }

    fn state_of(&self, name: &str) -> io::Result<FileState> {
        Ok(self.state().file(name)?.state())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state();
        let file = state.files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.files.insert(to.to_owned(), file);
        Ok(())
    }

    fn read(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut state = self.state();
        if state.unreadable.contains(name) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let bytes = &state.file(name)?.bytes;
        let from = usize::try_from(offset).unwrap().min(bytes.len());
        Ok(bytes[from..(from + len).min(bytes.len())].to_vec())
    }

    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        let mut state = self.state();
        state.fail_removal()?;
        let file = state.file(name)?;
        file.bytes.truncate(usize::try_from(len).unwrap());
        file.synced = file.bytes.len();
        Ok(())
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        if state.reserve(bytes.len())? < bytes.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file = StoredFile {
            bytes: bytes.to_vec(),
            synced: bytes.len(),
            name_synced: true,
            ..state.new_file()
        };
        state.files.insert(name.to_owned(), file);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        state.fail_removal()?;
        state.files.remove(name).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        Ok(self.state().room.map_or(u64::MAX, |room| room as u64))
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.state();
        state.sync()?;
        state.files.values_mut().for_each(|file| file.name_synced = true);
        Ok(())
    }
}

struct Handle {
    disk: FaultyStorage,
    name: String,
}

impl SegmentFile for Handle {
    fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let gate = self.disk.state().gate.clone();
        let _held = gate.as_ref().map(|gate| gate.lock());
        let mut state = self.disk.state();
        let fitting = state.reserve(bytes.len())?;
        state.file(&self.name)?.bytes.extend_from_slice(&bytes[..fitting]);
        if fitting < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.state();
        state.sync()?;
        let file = state.file(&self.name)?;
        file.synced = file.bytes.len();
        Ok(())
    }

    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.disk.read(&self.name, offset, len)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.disk.truncate(&self.name, len)
    }

    fn state(&self) -> io::Result<FileState> {
        self.disk.state_of(&self.name)
    }
}
