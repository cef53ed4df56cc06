//! The journals that can be delivered.

use std::{pin::Pin, sync::Arc};

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
    /// Writes the records of a segment that cannot be read again, if they are in memory. Returns whether reading is
    /// worth another try.
    fn restore<'a>(&'a self, segment: &'a str) -> Pin<Box<dyn Future<Output = bool> + Send + 'a>>;
    /// Notes why a chain cannot be read to its end, or that it can.
    fn note_reading(&self, chain: &str, problem: Option<&str>);
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

    fn restore<'a>(&'a self, segment: &'a str) -> Pin<Box<dyn Future<Output = bool> + Send + 'a>> {
        Box::pin(self.restore(segment))
    }

    fn note_reading(&self, chain: &str, problem: Option<&str>) {
        self.note_reading(chain, problem);
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

    fn restore<'a>(&'a self, _segment: &'a str) -> Pin<Box<dyn Future<Output = bool> + Send + 'a>> {
        Box::pin(std::future::ready(false))
    }

    fn note_reading(&self, _chain: &str, _problem: Option<&str>) {}
}
