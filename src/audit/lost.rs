//! Durable records that were lost: another program removed them from the journal before Postgres had them.

use super::{
    chain::StoredEvent,
    record::{Event, Record},
};
use crate::domain::clock::Timestamp;

const CHAIN: &str = "lost_chain";
const FIRST: &str = "lost_first";
const LAST: &str = "lost_last";

/// A range of records of a chain that is neither in Postgres nor in a journal any more.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LostRecords {
    /// Name of the chain.
    pub chain: String,
    /// `seq` of the first of them.
    pub first: i64,
    /// `seq` of the last of them.
    pub last: i64,
}

impl LostRecords {
    /// Returns how many they are.
    #[must_use]
    pub fn count(&self) -> i64 {
        self.last - self.first + 1
    }

    /// Returns the `audit_gap` record that names them.
    #[must_use]
    pub fn record(&self, at: Timestamp) -> Record {
        let mut record = Record::new(at, Event::AuditGap)
            .outcome("data_loss", "AUDIT_RECORDS_LOST")
            .with(CHAIN, &self.chain)
            .with(FIRST, self.first.to_string())
            .with(LAST, self.last.to_string());
        record.count = self.count();
        record
    }

    /// Returns the records that `event` names as lost; `None` if it names none.
    #[must_use]
    pub fn of(event: &StoredEvent) -> Option<Self> {
        if event.event != Event::AuditGap.as_str() {
            return None;
        }
        let number = |key| event.detail.get(key)?.parse().ok();
        let (first, last) = (number(FIRST)?, number(LAST)?);
        Some(Self { chain: event.detail.get(CHAIN)?.clone(), first, last })
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::audit::chain::tests::link;

    #[test]
    fn the_record_of_lost_records_names_them() {
        let lost = LostRecords { chain: link().chain, first: 58, last: 257 };
        let stored = StoredEvent::from_record(lost.record(DateTime::UNIX_EPOCH), &link());
        assert_eq!((stored.count, LostRecords::of(&stored)), (200, Some(lost)));
        let gap = Record::new(DateTime::UNIX_EPOCH, Event::AuditGap);
        assert_eq!(LostRecords::of(&StoredEvent::from_record(gap, &link())), None);
    }
}
