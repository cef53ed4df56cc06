//! The journals that can be delivered.

use std::sync::Arc;

use crate::audit::{
    chain::{ChainHead, ChainLink},
    journal::{Archive, ChainReader, Journal, LocalChain},
};

/// A journal to deliver from: the live one of this process, or an archive.
pub(super) trait JournalSource: Sync {
    fn chains(&self) -> Vec<LocalChain>;
    fn reader(&self, link: Arc<ChainLink>, after: ChainHead) -> ChainReader;
    /// Returns the head before the first record after a gap that begins with record `seq`, if there is one.
    fn after_gap(&self, chain: &str, seq: i64) -> Option<ChainHead>;
    /// Notes the position of a chain in Postgres. Called whenever the position is read or moves.
    fn mark_delivered(&self, chain: &str, seq: i64);
}

impl JournalSource for Journal {
    fn chains(&self) -> Vec<LocalChain> {
        self.chains()
    }

    fn reader(&self, link: Arc<ChainLink>, after: ChainHead) -> ChainReader {
        self.reader(link, after)
    }

    fn after_gap(&self, chain: &str, seq: i64) -> Option<ChainHead> {
        self.after_gap(chain, seq)
    }

    fn mark_delivered(&self, chain: &str, seq: i64) {
        self.mark_delivered(chain, seq);
    }
}

impl JournalSource for Archive {
    fn chains(&self) -> Vec<LocalChain> {
        self.chains()
    }

    fn reader(&self, link: Arc<ChainLink>, after: ChainHead) -> ChainReader {
        self.reader(link, after)
    }

    fn after_gap(&self, chain: &str, seq: i64) -> Option<ChainHead> {
        self.after_gap(chain, seq)
    }

    /// Does nothing, since an archive is not changed. A broker that starts on it reads the positions from
    /// Postgres.
    fn mark_delivered(&self, _chain: &str, _seq: i64) {}
}
