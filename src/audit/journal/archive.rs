//! A journal that is read and not written: that of a replica that is gone, or of one that runs.

use std::{path::Path, sync::Arc};

use super::{
    JournalError, LocalChain,
    files::{Directory, Files},
    reader::ChainReader,
    recover::{Tail, TornTail, recover},
    segments::Segments,
};
use crate::{
    audit::chain::{ChainHead, ChainLink},
    files::state_dir::StateDir,
};

/// The journal in a state directory, as it was when it was opened. Nothing there is changed: a torn
/// tail is passed over, and told of.
pub struct Archive {
    segments: Arc<Segments>,
    torn: Option<TornTail>,
}

impl Archive {
    /// Opens the journal below the state directory `path`, for as long as `state_dir` is held; without
    /// one, another process may be writing to it. Blocks on I/O.
    ///
    /// # Errors
    /// [`JournalError::Damaged`] when a record that was on disk is not what was written.
    pub fn open(path: &Path, state_dir: Option<StateDir>) -> Result<Self, JournalError> {
        Self::open_on(Arc::new(Directory::existing(&StateDir::journal_below(path))), state_dir)
    }

    pub(super) fn open_on(
        files: Arc<dyn Files>,
        state_dir: Option<StateDir>,
    ) -> Result<Self, JournalError> {
        let found = recover(&*files, Tail::Leave)?;
        Ok(Self { segments: Segments::new(files, found.catalog, state_dir), torn: found.torn })
    }

    /// The chains of which there are segments, in the order of starts.
    #[must_use]
    pub fn chains(&self) -> Vec<LocalChain> {
        self.segments.catalog().chains()
    }

    /// What the last segment ends in that does not follow.
    #[must_use]
    pub fn torn(&self) -> Option<&TornTail> {
        self.torn.as_ref()
    }

    /// Reads the records of a chain that follow `after`.
    #[must_use]
    pub fn reader(&self, link: Arc<ChainLink>, after: ChainHead) -> ChainReader {
        ChainReader::new(Arc::clone(&self.segments), link, after)
    }
}
