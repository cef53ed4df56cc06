//! The segment files of a journal and their catalog, shared by its writer and its readers.

use std::{io, sync::Arc};

use parking_lot::{Mutex, MutexGuard};

use super::{catalog::Catalog, storage::JournalStorage};
use crate::files::state_dir::StateDir;

pub(super) struct SegmentStore {
    pub(super) storage: Arc<dyn JournalStorage>,
    catalog: Mutex<Catalog>,
    /// Keeps the state directory locked until the writer and all readers are gone.
    state_dir: Option<StateDir>,
}

impl SegmentStore {
    pub(super) fn new(
        storage: Arc<dyn JournalStorage>,
        catalog: Catalog,
        state_dir: Option<StateDir>,
    ) -> Arc<Self> {
        Arc::new(Self { storage, catalog: Mutex::new(catalog), state_dir })
    }

    /// Locks the catalog. Never held across I/O.
    pub(super) fn catalog(&self) -> MutexGuard<'_, Catalog> {
        self.catalog.lock()
    }

    /// Ensures that the path of the state directory leads to one that this process has locked.
    pub(super) fn reclaim_state_dir(&self) -> io::Result<()> {
        self.state_dir.as_ref().map_or(Ok(()), |it| it.reclaim().map_err(io::Error::other))
    }
}
