//! Finds the contiguous ranges among the records that retention is about to remove.

use super::{
    chain::{ChainHead, StoredEvent},
    checkpoint::PrunedRange,
    unreadable::Unreadable,
    verify::is_valid_seq,
};

/// A record that is not what was written: it cannot be decoded, its hash does not match its content, or it
/// does not follow the record before it. Retention keeps its whole day as evidence.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TamperedRecord {
    /// The record's chain.
    pub chain: String,
    /// The record's number.
    pub seq: i64,
}

/// Collects records into contiguous ranges, and checks the hash of each and its link to the record
/// before it.
#[derive(Debug, Default)]
pub struct PrunedRangeCollector {
    ranges: Vec<(String, PrunedRange)>,
    records: i64,
    /// The first record that is not what was written.
    tampered: Option<TamperedRecord>,
}

impl PrunedRangeCollector {
    /// Adds a record. Records must be added by chain and, within a chain, by number.
    pub fn add(&mut self, event: &StoredEvent) {
        self.records += 1;
        let hash_matches = event.computed_hash() == event.hash;
        let follows = match self.ranges.last_mut() {
            // A number that does not exceed the last one is a duplicate and begins no new range.
            Some((chain, range))
                if *chain == event.chain && event.seq <= range.last.seq.saturating_add(1) =>
            {
                let follows = event.seq.checked_sub(1) == Some(range.last.seq)
                    && event.prev_hash == range.last.hash;
                range.last = event.head();
                follows
            }
            _ => {
                let range = PrunedRange {
                    first_seq: event.seq,
                    prev_hash: event.prev_hash,
                    last: ChainHead { seq: event.seq, hash: event.hash },
                };
                self.ranges.push((event.chain.clone(), range));
                true
            }
        };
        if !(hash_matches && follows && is_valid_seq(event.seq)) {
            self.note_tampered(&event.chain, event.seq);
        }
    }

    /// Adds a record that cannot be decoded, and so is not what was written.
    pub fn add_unreadable(&mut self, row: &Unreadable) {
        self.records += 1;
        self.note_tampered(&row.chain, row.seq);
    }

    fn note_tampered(&mut self, chain: &str, seq: i64) {
        self.tampered.get_or_insert_with(|| TamperedRecord { chain: chain.to_owned(), seq });
    }

    /// Returns how many records were added.
    #[must_use]
    pub fn records(&self) -> i64 {
        self.records
    }

    /// Returns the ranges, each with the name of its chain.
    ///
    /// # Errors
    /// Returns the first record that is not what was written, if there is one.
    pub fn finish(self) -> Result<Vec<(String, PrunedRange)>, TamperedRecord> {
        match self.tampered {
            Some(tampered) => Err(tampered),
            None => Ok(self.ranges),
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;
    use crate::audit::{
        chain::{ChainLink, tests::link},
        record::{Event, Record},
    };

    fn chain(name: &str, records: usize) -> Vec<StoredEvent> {
        let link = ChainLink { chain: name.into(), ..link() };
        let mut head = link.root();
        let mut event = || {
            let record = Record::new(DateTime::UNIX_EPOCH, Event::GetToken);
            let mut event = StoredEvent::from_record(record, &link);
            event.link_after(&mut head);
            event
        };
        (0..records).map(|_| event()).collect()
    }

    fn ranges_of(events: &[StoredEvent]) -> Result<Vec<(String, PrunedRange)>, TamperedRecord> {
        let mut ranges = PrunedRangeCollector::default();
        for event in events {
            ranges.add(event);
        }
        ranges.finish()
    }

    #[test]
    fn contiguous_records_make_one_range_per_chain() {
        let (one, other) = (chain("c1", 5), chain("c2", 2));
        let gap = [&one[..2], &one[3..], &other[..]].concat();
        let found = ranges_of(&gap).unwrap();
        let bounds: Vec<_> = found
            .iter()
            .map(|(chain, range)| (&**chain, range.first_seq, range.last.seq))
            .collect();
        assert_eq!(bounds, [("c1", 1, 2), ("c1", 4, 5), ("c2", 1, 2)]);
        assert_eq!(found[1].1.prev_hash, one[2].hash);
        assert_eq!(ranges_of(&[]), Ok(vec![]));
    }

    #[test]
    fn a_tampered_record_is_named_and_no_ranges_are_returned() {
        let tampered = |edit: fn(&mut Vec<StoredEvent>)| {
            let mut events = chain("c1", 5);
            edit(&mut events);
            ranges_of(&events).map_err(|record| record.seq)
        };
        assert_eq!(tampered(|it| it[2].count = 9), Err(3));
        let rehashed = |it: &mut Vec<StoredEvent>| {
            it[2].count = 9;
            it[2].hash = it[2].computed_hash();
        };
        assert_eq!(tampered(rehashed), Err(4));
        assert_eq!(tampered(|it| it.insert(2, it[1].clone())), Err(2));
    }

    #[test]
    fn a_row_that_cannot_be_read_or_has_an_impossible_number_keeps_its_day() {
        let mut ranges = PrunedRangeCollector::default();
        ranges.add_unreadable(&Unreadable::row("audit_events", "c1", 4, "detail is null"));
        ranges.add(&chain("c1", 1)[0]);
        assert_eq!(ranges.records(), 2);
        assert_eq!(ranges.finish(), Err(TamperedRecord { chain: "c1".into(), seq: 4 }));
        for seq in [0, -1, i64::MIN, i64::MAX] {
            let mut events = chain("c1", 2);
            for event in &mut events {
                event.seq = seq;
                event.hash = event.computed_hash();
            }
            assert_eq!(ranges_of(&events).map_err(|record| record.seq), Err(seq));
        }
    }

    proptest! {
        #[test]
        fn every_record_is_in_exactly_one_range(removed in proptest::collection::vec(any::<bool>(), 0..40)) {
            let pruned: Vec<_> = chain("c1", removed.len())
                .into_iter()
                .zip(&removed)
                .filter_map(|(event, removed)| removed.then_some(event))
                .collect();
            let found = ranges_of(&pruned).unwrap();
            let numbers: Vec<_> =
                found.iter().flat_map(|(_, range)| range.first_seq..=range.last.seq).collect();
            prop_assert_eq!(numbers, pruned.iter().map(|event| event.seq).collect::<Vec<_>>());
        }
    }
}
