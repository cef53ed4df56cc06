//! Read-only access to the journal of a lost replica, or of one that is running.

use std::{path::Path, sync::Arc};

use super::{
    catalog::LocalChain,
    error::JournalError,
    reader::ChainReader,
    recover::{TornTail, TornTailAction, recover},
    segment_store::SegmentStore,
    storage::{Directory, JournalStorage},
};
use crate::{
    audit::chain::{ChainHead, ChainLink},
    files::state_dir::StateDir,
};

/// The journal in a state directory as it was when it was opened. Nothing in the directory is
/// changed: a torn tail is skipped and reported by [`Archive::torn`].
pub struct Archive {
    segments: Arc<SegmentStore>,
    torn: Option<TornTail>,
    damaged: Vec<JournalError>,
}

impl Archive {
    /// Opens the journal in the state directory `path`. The archive keeps the lock `state_dir` for
    /// as long as it lives; without one, another process may be writing to the journal. Blocks on
    /// I/O.
    ///
    /// # Errors
    /// [`JournalError::Io`] when the directory cannot be read. Segments whose headers cannot be read are left
    /// out, see [`Archive::damaged`]; other damage is an error of its reader.
    pub fn open(path: &Path, state_dir: Option<StateDir>) -> Result<Self, JournalError> {
        Self::open_on(Arc::new(Directory::existing(&StateDir::journal_below(path))), state_dir)
    }

    pub(super) fn open_on(
        storage: Arc<dyn JournalStorage>,
        state_dir: Option<StateDir>,
    ) -> Result<Self, JournalError> {
        let recovered = recover(&*storage, TornTailAction::Leave)?;
        let segments = SegmentStore::new(storage, recovered.catalog, state_dir);
        Ok(Self { segments, torn: recovered.torn, damaged: recovered.damaged })
    }

    /// Returns the chains that have segments here, in the order of starts.
    #[must_use]
    pub fn chains(&self) -> Vec<LocalChain> {
        self.segments.catalog().chains()
    }

    /// Returns the faults of the segments that are left out because their headers cannot be read. Their
    /// records appear as missing.
    #[must_use]
    pub fn damaged(&self) -> &[JournalError] {
        &self.damaged
    }

    /// Returns the torn tail of the last segment, if there is one.
    #[must_use]
    pub fn torn(&self) -> Option<&TornTail> {
        self.torn.as_ref()
    }

    /// Returns the head before the first record of `chain` that is present after a gap which begins with record
    /// `seq`; `None` if there is no gap.
    #[must_use]
    pub fn after_gap(&self, chain: &str, seq: i64) -> Option<ChainHead> {
        self.segments.catalog().after_gap(chain, seq)
    }

    /// Returns a reader of the records of a chain after `after`.
    #[must_use]
    pub fn reader(&self, link: Arc<ChainLink>, after: ChainHead) -> ChainReader {
        ChainReader::new(Arc::clone(&self.segments), link, after)
    }
}
