//! Helpers for the journal's tests, which are in `tests/` by subject.

mod archive;
mod damage;
mod delivery;
mod durable;
mod failing;
mod order;
mod unreadable;
mod vanished;

use std::time::Instant;

use chrono::DateTime;

use parking_lot::Mutex;

use super::{faulty_storage::FaultyStorage, *};
use crate::audit::{chain::StoredEvent, record::Event};

const AMPLE: Duration = Duration::from_secs(20);

fn settings() -> JournalSettings {
    JournalSettings::default()
}

fn open(disk: &FaultyStorage, settings: JournalSettings) -> Result<Journal, JournalError> {
    Journal::open_on(Arc::new(disk.clone()), "i-0123456789abcdef", None, settings, Clock::System)
}

fn call(nth: usize) -> Record {
    Record::new(DateTime::UNIX_EPOCH, Event::GetToken).requested_account(&format!("acme-{nth}"))
}

fn issue(nth: usize) -> Record {
    Record::new(DateTime::UNIX_EPOCH, Event::TokenIssued).requested_account(&format!("acme-{nth}"))
}

async fn append(journal: &Journal, record: Record) -> Result<(), AuditUnavailable> {
    journal.append(record).durable(AMPLE).await
}

/// Reads all durable records of `chain`. The reader checks each against the one before.
fn read(journal: &Journal, chain: &LocalChain) -> Result<Vec<StoredEvent>, ReadError> {
    let mut reader = journal.reader(Arc::clone(&chain.link), chain.link.root());
    let mut events = Vec::new();
    loop {
        let more = reader.read()?;
        if more.is_empty() {
            return Ok(events);
        }
        events.extend(more);
    }
}

fn read_all(journal: &Journal) -> Vec<StoredEvent> {
    journal.chains().iter().flat_map(|chain| read(journal, chain).unwrap()).collect()
}

fn accounts(events: &[StoredEvent]) -> Vec<&str> {
    events.iter().filter_map(|event| event.account.as_deref()).collect()
}

async fn until(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + AMPLE;
    while !holds() {
        assert!(Instant::now() < deadline, "the condition was not met in time");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
