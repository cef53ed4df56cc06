//! What retention is about to remove, record by record, until it is known which runs it makes.

use super::{
    chain::{ChainHead, StoredEvent},
    checkpoint::PrunedRun,
};

/// Runs of records that follow each other. Each record is checked before it goes: what was tampered
/// with is evidence, and stays.
#[derive(Debug, Default)]
pub struct Runs {
    found: Vec<(String, PrunedRun)>,
    records: i64,
    /// The first record that is not what was written.
    tampered: Option<(String, i64)>,
}

impl Runs {
    /// Adds a record. They come by chain and number.
    pub fn add(&mut self, event: &StoredEvent) {
        self.records += 1;
        let tampered = event.computed_hash() != event.hash;
        let begun = match self.found.last_mut() {
            Some((chain, run)) if *chain == event.chain && event.seq <= run.last.seq + 1 => {
                let follows = event.seq == run.last.seq + 1 && event.prev_hash == run.last.hash;
                run.last = event.head();
                follows
            }
            _ => {
                let run = PrunedRun {
                    first_seq: event.seq,
                    prev_hash: event.prev_hash,
                    last: ChainHead { seq: event.seq, hash: event.hash },
                };
                self.found.push((event.chain.clone(), run));
                true
            }
        };
        if self.tampered.is_none() && (tampered || !begun) {
            self.tampered = Some((event.chain.clone(), event.seq));
        }
    }

    /// How many records there are.
    #[must_use]
    pub fn records(&self) -> i64 {
        self.records
    }

    /// The runs, each with its chain; or, as an error, the chain and number of the first record that
    /// is not what was written.
    ///
    /// # Errors
    /// When any record was tampered with.
    pub fn finish(self) -> Result<Vec<(String, PrunedRun)>, (String, i64)> {
        match self.tampered {
            Some(tampered) => Err(tampered),
            None => Ok(self.found),
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
            let mut event = StoredEvent::unplaced(record, &link);
            event.place(&mut head);
            event
        };
        (0..records).map(|_| event()).collect()
    }

    fn runs(events: &[StoredEvent]) -> Result<Vec<(String, PrunedRun)>, (String, i64)> {
        let mut runs = Runs::default();
        for event in events {
            runs.add(event);
        }
        runs.finish()
    }

    #[test]
    fn records_that_follow_each_other_make_a_run_for_each_chain() {
        let (one, other) = (chain("c1", 5), chain("c2", 2));
        let gap = [&one[..2], &one[3..], &other[..]].concat();
        let found = runs(&gap).unwrap();
        let places: Vec<_> =
            found.iter().map(|(chain, run)| (&**chain, run.first_seq, run.last.seq)).collect();
        assert_eq!(places, [("c1", 1, 2), ("c1", 4, 5), ("c2", 1, 2)]);
        assert_eq!(found[1].1.prev_hash, one[2].hash);
        assert_eq!(runs(&[]), Ok(vec![]));
    }

    #[test]
    fn what_was_tampered_with_is_named_and_makes_no_run() {
        let tampered = |edit: fn(&mut Vec<StoredEvent>)| {
            let mut events = chain("c1", 5);
            edit(&mut events);
            runs(&events).map_err(|(_, seq)| seq)
        };
        assert_eq!(tampered(|it| it[2].count = 9), Err(3));
        let refit = |it: &mut Vec<StoredEvent>| {
            it[2].count = 9;
            it[2].hash = it[2].computed_hash();
        };
        assert_eq!(tampered(refit), Err(4));
        assert_eq!(tampered(|it| it.insert(2, it[1].clone())), Err(2));
    }

    proptest! {
        #[test]
        fn every_record_that_goes_is_in_exactly_one_run(goes in proptest::collection::vec(any::<bool>(), 0..40)) {
            let going: Vec<_> = chain("c1", goes.len())
                .into_iter()
                .zip(&goes)
                .filter_map(|(event, goes)| goes.then_some(event))
                .collect();
            let found = runs(&going).unwrap();
            let numbers: Vec<_> =
                found.iter().flat_map(|(_, run)| run.first_seq..=run.last.seq).collect();
            prop_assert_eq!(numbers, going.iter().map(|event| event.seq).collect::<Vec<_>>());
        }
    }
}
