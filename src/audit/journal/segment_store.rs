//! The segment files of a journal and their catalog, shared by its writer and its readers.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::{catalog::Catalog, storage::JournalStorage};
use crate::files::state_dir::StateDir;

pub(super) struct SegmentStore {
    pub(super) storage: Arc<dyn JournalStorage>,
    catalog: Mutex<Catalog>,
    /// Keeps the state directory locked until the writer and all readers are gone.
    _state_dir: Option<StateDir>,
}

impl SegmentStore {
    pub(super) fn new(
        storage: Arc<dyn JournalStorage>,
        catalog: Catalog,
        state_dir: Option<StateDir>,
    ) -> Arc<Self> {
        Arc::new(Self { storage, catalog: Mutex::new(catalog), _state_dir: state_dir })
    }

    /// Locks the catalog. Never held across I/O.
    pub(super) fn catalog(&self) -> MutexGuard<'_, Catalog> {
        self.catalog.lock()
    }
}
