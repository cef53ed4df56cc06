//! The files of a journal and what is known of them, for its writer and its readers alike.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{catalog::Catalog, files::Files};
use crate::files::state_dir::StateDir;

/// The files of a journal and what is known of them.
pub(super) struct Segments {
    pub(super) files: Arc<dyn Files>,
    catalog: Mutex<Catalog>,
    /// The directory stays locked until the last writer and reader have gone.
    _state_dir: Option<StateDir>,
}

impl Segments {
    pub(super) fn new(
        files: Arc<dyn Files>,
        catalog: Catalog,
        state_dir: Option<StateDir>,
    ) -> Arc<Self> {
        Arc::new(Self { files, catalog: Mutex::new(catalog), _state_dir: state_dir })
    }

    pub(super) fn catalog(&self) -> MutexGuard<'_, Catalog> {
        // Held for a look or a note; nothing panics in between.
        self.catalog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
