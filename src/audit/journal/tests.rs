//! What the tests of the journal share; they stand by subject in `tests/`.

mod archive;
mod damage;
mod delivery;
mod durable;
mod failing;
mod order;

use std::time::Instant;

use chrono::DateTime;

use super::{faults::Disk, *};
use crate::audit::{chain::StoredEvent, record::Event};

const AMPLE: Duration = Duration::from_secs(20);

fn settings() -> JournalSettings {
    JournalSettings::default()
}

fn open(disk: &Disk, settings: JournalSettings) -> Result<Journal, JournalError> {
    Journal::open_on(Arc::new(disk.clone()), "i-0123456789abcdef", None, settings, Clock::System)
}

fn call(nth: usize) -> Record {
    Record::new(DateTime::UNIX_EPOCH, Event::GetToken).account_as_asked(&format!("acme-{nth}"))
}

fn issue(nth: usize) -> Record {
    Record::new(DateTime::UNIX_EPOCH, Event::TokenIssued).account_as_asked(&format!("acme-{nth}"))
}

async fn append(journal: &Journal, record: Record) -> Result<(), AuditUnavailable> {
    journal.append(record).durable(AMPLE).await
}

/// Every durable record of `chain`, each checked against the one before.
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
    let patience = Instant::now() + AMPLE;
    while !holds() {
        assert!(Instant::now() < patience, "it never came about");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
