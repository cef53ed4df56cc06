//! A disk for tests: it fills up, fails, and forgets at a crash what was not synced.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard},
};

use chrono::DateTime;

use super::files::{Appending, Files, Listed};

/// A disk in memory; clones share it.
#[derive(Clone, Default)]
pub(crate) struct Disk(Arc<Mutex<State>>);

#[derive(Default)]
pub(crate) struct State {
    pub(crate) files: BTreeMap<String, Stored>,
    /// How many more syncs fail.
    pub(crate) failing_syncs: usize,
    /// How many more cuts and removals fail.
    pub(crate) failing_cuts: usize,
    /// How many more bytes there is room for.
    pub(crate) room: Option<usize>,
    pub(crate) read_only: bool,
    pub(crate) syncs: usize,
    /// Appends wait here while a test holds it.
    pub(crate) gate: Option<Arc<Mutex<()>>>,
}

#[derive(Clone, Default)]
pub(crate) struct Stored {
    pub(crate) bytes: Vec<u8>,
    synced: usize,
    named: bool,
}

impl Disk {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// What a machine finds after losing its power: of each file whose name was synced, the synced
    /// bytes and the first `luck` of those that were not.
    pub(crate) fn after_power_loss(&self, luck: usize) -> Self {
        let mut files = self.state().files.clone();
        files.retain(|_, file| file.named);
        for file in files.values_mut() {
            file.bytes.truncate(file.synced + luck);
            file.synced = file.bytes.len();
        }
        Self(Arc::new(Mutex::new(State { files, ..State::default() })))
    }

    /// The names and texts of the files whose names end in `ending`.
    pub(crate) fn texts(&self, ending: &str) -> Vec<(String, String)> {
        let state = self.state();
        let files = state.files.iter().filter(|(name, _)| name.ends_with(ending));
        files.map(|(n, f)| (n.clone(), String::from_utf8_lossy(&f.bytes).into_owned())).collect()
    }
}

impl State {
    fn writable(&mut self, wanted: usize) -> io::Result<usize> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let Some(room) = &mut self.room else { return Ok(wanted) };
        let given = wanted.min(*room);
        *room -= given;
        Ok(given)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.syncs += 1;
        if self.failing_syncs > 0 {
            self.failing_syncs -= 1;
            return Err(io::Error::other("injected: the sync failed"));
        }
        Ok(())
    }

    fn cut(&mut self) -> io::Result<()> {
        if self.failing_cuts > 0 {
            self.failing_cuts -= 1;
            return Err(io::Error::other("injected: the cut failed"));
        }
        Ok(())
    }

    fn file(&mut self, name: &str) -> io::Result<&mut Stored> {
        self.files.get_mut(name).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Files for Disk {
    fn list(&self) -> io::Result<Vec<Listed>> {
        let listed = |(name, file): (&String, &Stored)| Listed {
            name: name.clone(),
            len: file.bytes.len() as u64,
            modified: DateTime::UNIX_EPOCH,
        };
        Ok(self.state().files.iter().map(listed).collect())
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn Appending>> {
        let mut state = self.state();
        state.writable(0)?;
        if state.files.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        state.files.insert(name.to_owned(), Stored::default());
        Ok(Box::new(Handle { disk: self.clone(), name: name.to_owned() }))
    }

    fn read(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut state = self.state();
        let bytes = &state.file(name)?.bytes;
        let from = usize::try_from(offset).unwrap().min(bytes.len());
        Ok(bytes[from..(from + len).min(bytes.len())].to_vec())
    }

    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        let mut state = self.state();
        state.cut()?;
        let file = state.file(name)?;
        file.bytes.truncate(usize::try_from(len).unwrap());
        file.synced = file.bytes.len();
        Ok(())
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        if state.writable(bytes.len())? < bytes.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file = Stored { bytes: bytes.to_vec(), synced: bytes.len(), named: true };
        state.files.insert(name.to_owned(), file);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        state.cut()?;
        state.files.remove(name).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn free(&self) -> io::Result<u64> {
        Ok(self.state().room.map_or(u64::MAX, |room| room as u64))
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.state();
        state.sync()?;
        state.files.values_mut().for_each(|file| file.named = true);
        Ok(())
    }
}

struct Handle {
    disk: Disk,
    name: String,
}

impl Appending for Handle {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let gate = self.disk.state().gate.clone();
        let _held = gate.as_ref().map(|gate| gate.lock().unwrap());
        let mut state = self.disk.state();
        let given = state.writable(bytes.len())?;
        state.file(&self.name)?.bytes.extend_from_slice(&bytes[..given]);
        if given < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.disk.state();
        state.sync()?;
        let file = state.file(&self.name)?;
        file.synced = file.bytes.len();
        Ok(())
    }
}
