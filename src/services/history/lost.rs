//! Reads from the journal what the database has lost.

use std::collections::BTreeMap;

use super::mismatch::LostRecords;
use crate::audit::{
    chain::ChainHead,
    journal::{Journal, LocalChain, ReadError, with_causes},
};

/// Reads from the journal the delivered records that the database lacks. `delivered` has the last sequence
/// number of each chain that was delivered, and `found` the last record that is in the database. Reads the
/// files on a thread for blocking work.
pub(super) async fn lost_records(
    journal: Journal,
    delivered: BTreeMap<String, i64>,
    found: BTreeMap<String, ChainHead>,
) -> LostRecords {
    let read = move || {
        let mut lost = LostRecords::default();
        for chain in journal.chains() {
            let name = &chain.link.chain;
            let from = found.get(name).copied().unwrap_or_else(|| chain.link.root());
            let until = delivered.get(name).copied().unwrap_or(0);
            if let Err(error) = read_lost(&journal, &chain, from, until, &mut lost) {
                lost.unreadable = Some(with_causes(&error));
            }
        }
        lost
    };
    match tokio::task::spawn_blocking(read).await {
        Ok(lost) => lost,
        Err(bug) => std::panic::resume_unwind(bug.into_panic()),
    }
}

/// Adds to `lost` the records of `chain` after `from`, up to the sequence number `until`.
fn read_lost(
    journal: &Journal,
    chain: &LocalChain,
    from: ChainHead,
    until: i64,
    lost: &mut LostRecords,
) -> Result<(), ReadError> {
    if from.seq >= until {
        return Ok(());
    }
    let mut reader = journal.reader(chain.link.clone(), from);
    loop {
        let events = reader.read()?;
        if events.is_empty() {
            return Ok(());
        }
        for event in &events {
            if event.seq > until {
                return Ok(());
            }
            lost.add(event);
        }
    }
}
