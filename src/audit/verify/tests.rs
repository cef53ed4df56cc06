use chrono::{DateTime, TimeDelta};
use proptest::prelude::*;

use super::{report::MAX_LISTED_FINDINGS, *};
use crate::{
    audit::{
        chain::{ChainLink, tests::link},
        checkpoint::PrunedRange,
        record::{Event, Record},
    },
    crypto::Keyring,
};

/// Two chains of an instance, the second linked to the first, with the claims about both.
struct Log {
    keyring: Keyring,
    claims: Vec<(ChainClaim, ChainHead)>,
    receipts: Vec<PruningReceipt>,
    checkpoints: Vec<SignedCheckpoint>,
    events: Vec<StoredEvent>,
}

const FIRST: &str = "c00000001-0123456789abcdef";
const SECOND: &str = "c00000002-0123456789abcdef";

impl Log {
    /// Returns a log of two chains with `first` and `second` records.
    fn of(first: i64, second: i64) -> Self {
        let keyring = Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap();
        let (claims, receipts, checkpoints, events) = (vec![], vec![], vec![], vec![]);
        let mut log = Self { keyring, claims, receipts, checkpoints, events };
        let end = log.append(&link(), first);
        let linked = ChainLink {
            chain: SECOND.into(),
            linked_chain: Some(FIRST.into()),
            linked_seq: end.seq,
            linked_hash: end.hash,
            ..link()
        };
        log.append(&linked, second);
        log
    }

    fn append(&mut self, link: &ChainLink, records: i64) -> ChainHead {
        let mut head = link.root();
        for nth in 0..records {
            let at = DateTime::UNIX_EPOCH + TimeDelta::seconds(nth);
            let mut event = StoredEvent::from_record(Record::new(at, Event::GetToken), link);
            event.link_after(&mut head);
            self.events.push(event);
        }
        let claim = ChainClaim {
            last_seq: Some(head.seq),
            last_hash: Some(head.hash),
            ..ChainClaim::of(link)
        };
        self.claims.push((claim, link.root()));
        head
    }

    fn at(&mut self, chain: &str, seq: i64) -> &mut StoredEvent {
        self.events.iter_mut().find(|event| event.chain == chain && event.seq == seq).unwrap()
    }

    fn remove(&mut self, chain: &str, range: std::ops::RangeInclusive<i64>) {
        self.events.retain(|event| event.chain != chain || !range.contains(&event.seq));
    }

    /// Recomputes all hashes from record `seq` on, as a forger with knowledge of the format would.
    fn rewrite_from(&mut self, chain: &str, seq: i64) {
        let mut head = if seq == 1 { link().root() } else { self.at(chain, seq - 1).head() };
        for event in self.events.iter_mut().filter(|it| it.chain == chain && it.seq >= seq) {
            event.link_after(&mut head);
        }
    }

    fn sign(&mut self, chain: &str, seq: i64) {
        let head = self.at(chain, seq).head();
        self.checkpoints.push(SignedCheckpoint::new(
            &self.keyring,
            chain,
            head,
            DateTime::UNIX_EPOCH,
        ));
    }

    /// Removes records as retention does.
    fn prune(&mut self, chain: &str, seqs: std::ops::RangeInclusive<i64>) {
        let (first, last) = (self.at(chain, *seqs.start()).clone(), self.at(chain, *seqs.end()));
        let range =
            PrunedRange { first_seq: first.seq, prev_hash: first.prev_hash, last: last.head() };
        self.receipts.push(PruningReceipt::new(&self.keyring, chain, range, DateTime::UNIX_EPOCH));
        self.remove(chain, seqs);
    }

    fn report(&self, extent: Extent) -> VerificationReport {
        self.report_at(extent, None)
    }

    /// Verifies the log at the second `now`, when signed heads are required, or without them.
    fn report_at(&self, extent: Extent, now: Option<i64>) -> VerificationReport {
        let mut verifier = Verifier::new(extent, Some(VerifyingKeys::from(&self.keyring)));
        if let Some(now) = now {
            verifier.require_signed_heads(DateTime::UNIX_EPOCH + TimeDelta::seconds(now));
        }
        for (claim, root) in &self.claims {
            verifier.add_chain(claim.clone(), *root);
        }
        for receipt in &self.receipts {
            verifier.add_receipt(receipt.clone());
        }
        for checkpoint in &self.checkpoints {
            verifier.add_checkpoint(checkpoint);
        }
        for event in &self.events {
            verifier.add_record(event);
        }
        verifier.finish()
    }

    /// The faults found when the whole log is shown.
    fn faults(&self) -> Vec<(String, Fault)> {
        let report = self.report(Extent::Whole);
        report.findings.into_iter().map(|finding| (finding.chain, finding.fault)).collect()
    }
}

fn one(chain: &str, fault: Fault) -> Vec<(String, Fault)> {
    vec![(chain.to_owned(), fault)]
}

/// A record that cannot be decoded is one fault. If its hashes can be read, its neighbours are verified.
#[test]
fn a_record_that_cannot_be_read_is_a_fault_and_the_chain_is_followed_through_it() {
    let log = Log::of(5, 0);
    for with_hashes in [true, false] {
        let mut verifier = Verifier::new(Extent::Whole, None);
        for (claim, root) in &log.claims {
            verifier.add_chain(claim.clone(), *root);
        }
        for event in &log.events {
            if event.seq != 3 {
                verifier.add_record(event);
                continue;
            }
            let mut row = *Unreadable::row("audit_events", FIRST, 3, "detail is null");
            if with_hashes {
                (row.prev_hash, row.hash) = (Some(event.prev_hash), Some(event.hash));
            }
            verifier.add_unreadable(&row);
        }
        let report = verifier.finish();
        let names: Vec<_> = report.findings.iter().map(|it| it.fault.name()).collect();
        let expected: &[_] = if with_hashes { &["unreadable"] } else { &["missing", "unreadable"] };
        let sorted: std::collections::BTreeSet<_> = names.iter().copied().collect();
        assert_eq!(sorted, expected.iter().copied().collect(), "{:?}", report.findings);
        assert_eq!(report.chains[0].records, if with_hashes { 5 } else { 4 });
    }
}

#[test]
fn an_unmodified_log_holds_and_is_counted() {
    let mut log = Log::of(10, 5);
    log.sign(FIRST, 4);
    log.sign(FIRST, 10);
    let report = log.report(Extent::Whole);
    assert!(report.holds(), "{report:?}");
    assert_eq!((report.records(), report.notices), (15, vec![]));
    let [first, second] = &report.chains[..] else { panic!("two chains") };
    assert_eq!((first.records, first.last_seq, first.heads, first.signed_seq), (10, 10, 2, 10));
    assert_eq!((second.records, second.last_seq, second.heads), (5, 5, 0));
    assert_eq!(first.times.unwrap().1, DateTime::UNIX_EPOCH + TimeDelta::seconds(9));
}

#[test]
fn an_edit_is_found_at_its_record() {
    let mut log = Log::of(10, 5);
    log.at(FIRST, 3).caller = Some("somebody else".into());
    assert_eq!(log.faults(), one(FIRST, Fault::Altered { seq: 3 }));
    // Now the hash matches the edited content.
    let edited = log.at(FIRST, 3);
    edited.hash = edited.computed_hash();
    assert_eq!(log.faults(), one(FIRST, Fault::Replaced { seq: 3 }));
    // Now all later hashes are recomputed too, so that the chain ends with another hash.
    log.rewrite_from(FIRST, 4);
    let end = Fault::PredecessorEndMismatch { last: 10, successor: SECOND.into() };
    let position = Fault::DeliveredHashMismatch { seq: 10 };
    assert_eq!(log.faults(), [(FIRST.into(), position), (FIRST.into(), end)]);
}

#[test]
fn a_chain_that_is_rewritten_consistently_contradicts_its_checkpoints() {
    let mut log = Log::of(0, 5);
    log.sign(SECOND, 4);
    log.at(SECOND, 2).account = Some("another".into());
    let edited = log.at(SECOND, 2);
    edited.hash = edited.computed_hash();
    log.rewrite_from(SECOND, 3);
    let forged = log.at(SECOND, 5).hash;
    log.claims[1].0.last_hash = Some(forged);
    assert_eq!(log.faults(), one(SECOND, Fault::CheckpointMismatch { seq: 4 }));
    // A checkpoint that the forger edits does not help him: he has no signing key.
    log.checkpoints[0].hash = log.at(SECOND, 4).hash;
    let found = log.faults();
    assert!(matches!(&found[..], [(_, Fault::InvalidCheckpoint { seq: 4, .. })]), "{found:?}");
}

#[test]
fn deleted_records_are_found_at_the_start_in_the_middle_and_at_the_end() {
    let mut log = Log::of(10, 5);
    log.remove(FIRST, 4..=6);
    assert_eq!(log.faults(), one(FIRST, Fault::Missing { first: 4, last: 6 }));
    let mut log = Log::of(10, 5);
    log.remove(FIRST, 1..=1);
    assert_eq!(log.faults(), one(FIRST, Fault::Missing { first: 1, last: 1 }));
    let mut log = Log::of(10, 5);
    log.remove(SECOND, 4..=5);
    assert_eq!(log.faults(), one(SECOND, Fault::Missing { first: 4, last: 5 }));
}

#[test]
fn a_truncated_chain_is_found_by_a_checkpoint_and_by_its_successor() {
    let mut log = Log::of(10, 5);
    log.sign(SECOND, 5);
    log.remove(SECOND, 3..=5);
    let last = log.at(SECOND, 2).hash;
    (log.claims[1].0.last_seq, log.claims[1].0.last_hash) = (Some(2), Some(last));
    assert_eq!(log.faults(), one(SECOND, Fault::EndsBeforeCheckpoint { last: 2, head: 5 }));

    let mut log = Log::of(10, 5);
    log.remove(FIRST, 8..=10);
    let last = log.at(FIRST, 7).hash;
    (log.claims[0].0.last_seq, log.claims[0].0.last_hash) = (Some(7), Some(last));
    let end = Fault::PredecessorEndMismatch { last: 7, successor: SECOND.into() };
    assert_eq!(log.faults(), one(FIRST, end));
}

#[test]
fn an_absent_chain_is_found_by_its_successor_or_by_a_checkpoint() {
    let mut log = Log::of(10, 5);
    log.remove(FIRST, 1..=10);
    let claim = log.claims.remove(0);
    let missing = Fault::PredecessorMissing { successor: SECOND.into() };
    assert_eq!(log.faults(), one(FIRST, missing));
    // Its successor does not name it.
    log.claims[0].0.linked_chain = None;
    assert_eq!(log.faults(), one(SECOND, Fault::PredecessorUnnamed));
    log.claims.push(claim);
    let mut log = Log::of(0, 5);
    log.sign(SECOND, 5);
    log.remove(SECOND, 1..=5);
    log.claims.pop();
    assert_eq!(log.faults(), one(SECOND, Fault::ChainAbsent));
}

#[test]
fn an_inserted_and_a_duplicated_record_are_found() {
    let mut log = Log::of(10, 5);
    let again = log.at(FIRST, 4).clone();
    log.events.push(again);
    assert_eq!(log.faults(), one(FIRST, Fault::Duplicate { seq: 4 }));

    let mut log = Log::of(10, 5);
    let mut head = log.at(SECOND, 5).head();
    let mut more = log.at(SECOND, 5).clone();
    more.link_after(&mut head);
    log.events.push(more);
    assert_eq!(log.faults(), one(SECOND, Fault::BeyondDeliveredPosition { seq: 6 }));
}

#[test]
fn swapped_records_are_found() {
    let mut log = Log::of(10, 5);
    (log.at(FIRST, 4).seq, log.at(FIRST, 5).seq) = (40, 4);
    log.at(FIRST, 40).seq = 5;
    let altered = |seq| (FIRST.to_owned(), Fault::Altered { seq });
    let found = log.faults();
    assert!(found.contains(&altered(4)) && found.contains(&altered(5)), "{found:?}");
    assert_eq!(found[0].1.seq(), 4);
}

#[test]
fn only_ranges_with_a_valid_receipt_count_as_removed_by_retention() {
    let mut log = Log::of(10, 5);
    log.sign(FIRST, 3);
    log.sign(FIRST, 6);
    log.prune(FIRST, 1..=4);
    log.prune(FIRST, 6..=6);
    log.prune(FIRST, 8..=10);
    let report = log.report(Extent::Whole);
    assert!(report.holds(), "{report:?}");
    let first = &report.chains[0];
    assert_eq!((first.records, first.removed, first.last_seq), (2, 8, 10));
    assert_eq!((first.heads, first.signed_seq), (1, 6));

    // More was removed than the receipts cover.
    log.remove(FIRST, 5..=5);
    assert_eq!(log.faults(), one(FIRST, Fault::Missing { first: 5, last: 5 }));
    log.remove(FIRST, 7..=7);
    let missing = |seq| (FIRST.to_owned(), Fault::Missing { first: seq, last: seq });
    assert_eq!(log.faults(), [missing(5), missing(7)]);
    // A receipt that somebody widened is not valid.
    log.receipts[0].last_seq = 5;
    let found = log.faults();
    assert!(matches!(found[0].1, Fault::InvalidReceipt { first: 1, last: 5, .. }), "{found:?}");
    assert_eq!(found[1..], [(FIRST.into(), Fault::Missing { first: 1, last: 5 }), missing(7)]);
}

#[test]
fn a_record_between_removed_ranges_cannot_be_changed() {
    let mut log = Log::of(10, 0);
    log.prune(FIRST, 4..=6);
    log.prune(FIRST, 8..=10);
    let kept = log.at(FIRST, 7);
    kept.reason = Some("another".into());
    kept.hash = kept.computed_hash();
    assert_eq!(log.faults(), one(FIRST, Fault::Replaced { seq: 7 }));
}

#[test]
fn records_that_appear_where_retention_removed_them_are_found() {
    let mut log = Log::of(10, 0);
    let mut forged = log.at(FIRST, 3).clone();
    log.prune(FIRST, 1..=6);
    forged.caller = Some("mallory".into());
    forged.hash = forged.computed_hash();
    log.events.push(forged);
    let fault = one(FIRST, Fault::PresentAfterPruning { seq: 3 });
    assert_eq!(log.faults(), fault);
    log.events.rotate_right(1);
    assert_eq!(log.faults(), fault);
}

#[test]
fn an_emptied_or_made_up_chain_does_not_hide_missing_records() {
    // Its row says that it was always empty, and begins with the hash that it ended with.
    let mut log = Log::of(10, 5);
    log.remove(FIRST, 1..=10);
    let end = log.claims[1].0.linked_hash;
    let (claim, root) = &mut log.claims[0];
    (claim.last_seq, claim.last_hash) = (Some(0), Some(end));
    (claim.linked_hash, claim.linked_chain) = (end, Some("c00000000-0".into()));
    *root = claim.root();
    assert!(!log.faults().is_empty());
    // A made-up chain ends with the hash that the truncated one ended with.
    let mut log = Log::of(10, 5);
    log.remove(FIRST, 8..=10);
    let last = log.at(FIRST, 7).hash;
    (log.claims[0].0.last_seq, log.claims[0].0.last_hash) = (Some(7), Some(last));
    let end = log.claims[1].0.linked_hash;
    let made_up = ChainClaim {
        chain: "c00000009-0".into(),
        linked_chain: Some(FIRST.into()),
        linked_hash: end,
        last_seq: Some(0),
        last_hash: Some(end),
        ..ChainClaim::of(&link())
    };
    let root = made_up.root();
    log.claims.push((made_up, root));
    let successor = SECOND.into();
    assert_eq!(log.faults(), one(FIRST, Fault::PredecessorEndMismatch { last: 7, successor }));
}

#[test]
fn a_chain_that_is_not_delivered_to_its_end_yet_is_a_notice_and_no_fault() {
    let mut log = Log::of(10, 0);
    log.remove(FIRST, 8..=10);
    let last = log.at(FIRST, 7).hash;
    (log.claims[0].0.last_seq, log.claims[0].0.last_hash) = (Some(7), Some(last));
    let report = log.report(Extent::Whole);
    assert!(report.holds(), "{report:?}");
    assert!(report.notices[0].contains("is not delivered to its end"), "{:?}", report.notices);
}

#[test]
fn an_empty_first_chain_that_was_never_registered_is_no_fault() {
    let mut log = Log::of(0, 5);
    log.claims.remove(0);
    assert_eq!(log.faults(), []);
}

#[test]
fn all_faults_are_counted_per_chain_though_the_report_lists_a_thousand() {
    let mut log = Log::of(i64::try_from(MAX_LISTED_FINDINGS).unwrap() + 5, 5);
    for event in &mut log.events {
        event.count += 1;
    }
    let report = log.report(Extent::Whole);
    let faults: Vec<_> = report.chains.iter().map(|chain| chain.faults).collect();
    assert_eq!(faults, [MAX_LISTED_FINDINGS as u64 + 5, 5]);
    assert_eq!(report.findings.len(), MAX_LISTED_FINDINGS);
}

#[test]
fn a_copied_state_directory_is_a_notice() {
    let mut log = Log::of(10, 5);
    let (mut other, root) = log.claims[1].clone();
    other.chain = "c00000002-fedcba9876543210".into();
    (other.last_seq, other.last_hash) = (None, None);
    log.claims.push((other, root));
    let report = log.report(Extent::Whole);
    assert!(report.holds(), "{report:?}");
    assert!(report.notices[0].contains("was copied"), "{:?}", report.notices);
}

#[test]
fn each_record_of_a_partial_log_is_verified_and_absent_ones_are_counted() {
    let mut log = Log::of(10, 5);
    log.remove(FIRST, 1..=3);
    log.remove(FIRST, 6..=6);
    let report = log.report(Extent::Partial);
    assert!(report.holds(), "{report:?}");
    assert!(report.notices[0].contains("(4 records"), "{:?}", report.notices);
    let edited = log.at(FIRST, 5);
    edited.count = 9;
    edited.hash = edited.computed_hash();
    assert!(log.report(Extent::Partial).holds(), "its successor is not there");
    let edited = log.at(FIRST, 8);
    edited.count = 9;
    edited.hash = edited.computed_hash();
    assert_eq!(log.report(Extent::Partial).findings[0].fault, Fault::Replaced { seq: 8 });
}

#[test]
fn a_record_counts_as_missing_once_too_many_wait_for_it() {
    let mut verifier = Verifier::new(Extent::Whole, None);
    let log = Log::of(2, 0);
    verifier.add_chain(log.claims[0].0.clone(), log.claims[0].1);
    let chain = verifier.chains.get_mut(FIRST).unwrap();
    let mut faults = vec![];
    for seq in [5, 6, 9] {
        let StoredEvent { at, prev_hash, hash, .. } = log.events[0];
        let record = RecordHashes { prev_hash, hash, hash_matches: true };
        chain.add_record(seq, Some(at), record, Extent::Whole, &mut |fault| faults.push(fault));
    }
    assert_eq!((chain.waiting(), faults.len()), (3, 0));
    verifier.waiting = 3;
    // First the earlier half is released, then the rest.
    verifier.release_waiting();
    assert_eq!((verifier.waiting, verifier.chains[FIRST].waiting()), (1, 1));
    verifier.release_waiting();
    verifier.release_waiting();
    assert_eq!((verifier.waiting, verifier.chains[FIRST].waiting()), (0, 0));
    let missing: Vec<_> = verifier.findings.listed.iter().map(|it| &it.fault).collect();
    assert!(missing.contains(&&Fault::Missing { first: 1, last: 4 }), "{missing:?}");
    assert!(missing.contains(&&Fault::Missing { first: 7, last: 8 }), "{missing:?}");
}

#[test]
fn a_chain_without_a_signed_head_is_reported_once_it_should_have_one() {
    let unsigned = |log: &Log, now| -> Vec<String> {
        let findings = log.report_at(Extent::Whole, Some(now)).findings;
        let unsigned = findings.into_iter().filter(|it| it.fault == Fault::Unsigned);
        unsigned.map(|it| it.chain).collect()
    };
    let hour = 3_600;
    let mut log = Log::of(8, 3);
    assert_eq!(unsigned(&log, 60), [""; 0], "its first head may still come");
    assert_eq!(unsigned(&log, hour), [FIRST, SECOND]);
    assert_eq!(unsigned(&log, -hour), [FIRST, SECOND], "times in the future do not help");
    log.sign(FIRST, 2);
    assert_eq!(unsigned(&log, hour), [SECOND]);
    // The hash of a chain's first record covers the chain before.
    log.checkpoints.clear();
    log.sign(SECOND, 1);
    assert_eq!(unsigned(&log, hour), [""; 0]);
    // Another key's signature is none.
    log.keyring = Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap();
    assert_eq!(unsigned(&log, hour), [FIRST, SECOND]);
    log.prune(SECOND, 1..=2);
    assert_eq!(unsigned(&log, hour), [""; 0], "a receipt is signed too");
    // Without keys, and for a part of the log, nobody can tell.
    let report = Log::of(2, 0).report_at(Extent::Partial, Some(hour));
    assert!(report.holds(), "{report:?}");
}

/// With a cost that grows with the square of their number, this would take hours.
#[test]
fn many_made_up_chains_with_records_that_wait_are_verified_in_linear_time() {
    let mut verifier = Verifier::new(Extent::Whole, None);
    verifier.max_waiting = 5_000;
    let log = Log::of(2_000, 0);
    verifier.add_chain(log.claims[0].0.clone(), log.claims[0].1);
    let mut honest = log.events.chunks(2);
    for n in 0..300_000 {
        let StoredEvent { at, prev_hash, hash, .. } = log.events[0];
        let record = RecordHashes { prev_hash, hash, hash_matches: true };
        verifier.follow(&format!("made-up-{n}"), 7, Some(at), record);
        // Records of a real chain come in between, in nearly the right order, and none of them is missed.
        if n % 300 == 0 {
            for event in honest.next().into_iter().flatten().rev() {
                verifier.add_record(event);
            }
        }
    }
    let report = verifier.finish();
    let found = report.chains.iter().find(|it| it.chain == FIRST).unwrap();
    assert_eq!((found.records, found.faults), (2_000, 0));
    assert!(report.faults >= 300_000);
}

proptest! {
    /// An export with arbitrary numbers is read to its end.
    #[test]
    fn no_numbers_make_verification_hang_or_panic(
        seqs in proptest::collection::vec(prop_oneof![any::<i64>(), -2_i64..9, Just(i64::MAX - 1)], 6),
        bounds in proptest::collection::vec(prop_oneof![any::<i64>(), -2_i64..9], 4),
        part in any::<bool>(),
    ) {
        let mut log = Log::of(6, 0);
        for pair in bounds.chunks(2) {
            let range = PrunedRange {
                first_seq: pair[0],
                prev_hash: Digest::ZERO,
                last: ChainHead { seq: pair[1], hash: Digest::ZERO },
            };
            log.receipts.push(PruningReceipt::new(&log.keyring, FIRST, range, DateTime::UNIX_EPOCH));
            let head = ChainHead { seq: pair[0], hash: Digest::ZERO };
            log.checkpoints.push(SignedCheckpoint::new(&log.keyring, FIRST, head, DateTime::UNIX_EPOCH));
        }
        for (event, seq) in log.events.iter_mut().zip(seqs) {
            event.seq = seq;
        }
        log.claims[0].0.last_seq = Some(bounds[0]);
        let _ = log.report(if part { Extent::Partial } else { Extent::Whole });
    }

    #[test]
    fn the_order_of_records_does_not_matter(
        (first, second) in (0_i64..40, 0_i64..40),
        keys in proptest::collection::vec(any::<u16>(), 80),
    ) {
        let mut log = Log::of(first, second);
        let mut order: Vec<_> = log.events.drain(..).zip(keys).collect();
        order.sort_by_key(|(_, key)| *key);
        log.events = order.into_iter().map(|(event, _)| event).collect();
        prop_assert_eq!(log.faults(), vec![]);
    }

    /// The first finding is at most one record away from the change.
    #[test]
    fn any_change_of_one_record_is_found(
        seq in 1_i64..=20,
        what in 0..6,
        rehash in any::<bool>(),
    ) {
        let mut log = Log::of(20, 3);
        let event = log.at(FIRST, seq);
        match what {
            0 => event.count += 1,
            1 => event.at += TimeDelta::microseconds(1),
            2 => event.account = Some("another".into()),
            3 => event.prev_hash.0[0] ^= 1,
            4 => drop(event.detail.insert("more".into(), String::new())),
            _ => event.hash.0[31] ^= 1,
        }
        if rehash && what != 5 {
            event.hash = event.computed_hash();
        }
        let found = log.faults();
        prop_assert!(!found.is_empty());
        let first = found[0].1.seq();
        prop_assert!((seq - 1..=seq + 1).contains(&first), "{first} for {seq}: {found:?}");
    }

    #[test]
    fn a_log_holds_whichever_ranges_retention_removed(
        removed in proptest::collection::vec(any::<bool>(), 30),
    ) {
        let mut log = Log::of(30, 2);
        let mut seq = 1;
        for run in removed.chunk_by(|a, b| a == b) {
            let last = seq + i64::try_from(run.len()).unwrap() - 1;
            if run[0] {
                log.prune(FIRST, seq..=last);
            }
            seq = last + 1;
        }
        prop_assert_eq!(log.faults(), vec![]);
    }
}

#[test]
fn a_chain_that_ends_before_what_its_instance_reported_or_recorded_as_lost_does_not_hold() {
    let found = |extent, reported: &[(&str, i64)], retired: Option<&str>, lost: Option<i64>| {
        let mut log = Log::of(5, 0);
        log.claims[0].0.retired = retired.map(Into::into);
        if let Some(last) = lost {
            let lost = LostRecords { chain: FIRST.into(), first: 6, last };
            let link = ChainLink { chain: SECOND.into(), ..link() };
            let mut event = StoredEvent::from_record(lost.record(DateTime::UNIX_EPOCH), &link);
            event.link_after(&mut link.root());
            log.events.push(event);
        }
        let mut verifier = Verifier::new(extent, None);
        for (claim, root) in &log.claims {
            verifier.add_chain(claim.clone(), *root);
        }
        for (chain, seq) in reported {
            verifier.add_reported_end(chain, "i-1", *seq);
        }
        for event in &log.events {
            verifier.add_record(event);
        }
        let findings = verifier.finish().findings;
        let ends = findings.into_iter().filter_map(|finding| match finding.fault {
            Fault::EndsBeforeReport { last, reported, .. } => Some((finding.chain, last, reported)),
            _ => None,
        });
        ends.collect::<Vec<_>>()
    };
    let ends = |chain: &str, last, reported| vec![(chain.to_owned(), last, reported)];
    assert_eq!(found(Extent::Whole, &[(FIRST, 5)], None, None), []);
    assert_eq!(found(Extent::Whole, &[(FIRST, 3)], None, None), []);
    assert_eq!(found(Extent::Whole, &[(FIRST, 7), (FIRST, 6)], None, None), ends(FIRST, 5, 7));
    assert_eq!(found(Extent::Whole, &[("c3", 2)], None, None), ends("c3", 0, 2), "none came");
    assert_eq!(found(Extent::Whole, &[(FIRST, 7)], Some("retired"), None), [], "it is known");
    assert_eq!(found(Extent::Whole, &[], None, Some(9)), ends(FIRST, 5, 9));
    assert_eq!(found(Extent::Whole, &[], None, Some(5)), [], "they were delivered later");
    assert_eq!(found(Extent::Partial, &[(FIRST, 7)], None, Some(9)), []);
}
