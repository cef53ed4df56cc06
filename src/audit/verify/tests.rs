use chrono::{DateTime, TimeDelta};
use proptest::prelude::*;

use super::*;
use crate::{
    audit::{
        chain::{ChainLink, tests::link},
        checkpoint::PrunedRun,
        record::{Event, Record},
    },
    crypto::Keyring,
};

/// Two chains of an instance, the second linked to the first, with what is claimed of both.
struct Log {
    keyring: Keyring,
    claims: Vec<(Claim, ChainHead)>,
    cuts: Vec<PruningReceipt>,
    heads: Vec<SignedCheckpoint>,
    events: Vec<StoredEvent>,
}

const FIRST: &str = "c00000001-0123456789abcdef";
const SECOND: &str = "c00000002-0123456789abcdef";

impl Log {
    /// Chains of that many records.
    fn of(first: i64, second: i64) -> Self {
        let keyring = Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap();
        let (claims, cuts, heads, events) = (vec![], vec![], vec![], vec![]);
        let mut log = Self { keyring, claims, cuts, heads, events };
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
            let mut event = StoredEvent::unplaced(Record::new(at, Event::GetToken), link);
            event.place(&mut head);
            self.events.push(event);
        }
        let claim =
            Claim { last_seq: Some(head.seq), last_hash: Some(head.hash), ..Claim::of(link) };
        self.claims.push((claim, link.root()));
        head
    }

    fn at(&mut self, chain: &str, seq: i64) -> &mut StoredEvent {
        self.events.iter_mut().find(|event| event.chain == chain && event.seq == seq).unwrap()
    }

    fn remove(&mut self, chain: &str, range: std::ops::RangeInclusive<i64>) {
        self.events.retain(|event| event.chain != chain || !range.contains(&event.seq));
    }

    /// Makes a chain consistent again from a record on, as somebody would who knows how it is made.
    fn rewrite_from(&mut self, chain: &str, seq: i64) {
        let mut head = if seq == 1 { link().root() } else { self.at(chain, seq - 1).head() };
        for event in self.events.iter_mut().filter(|it| it.chain == chain && it.seq >= seq) {
            event.place(&mut head);
        }
    }

    fn sign(&mut self, chain: &str, seq: i64) {
        let head = self.at(chain, seq).head();
        self.heads.push(SignedCheckpoint::new(&self.keyring, chain, head, DateTime::UNIX_EPOCH));
    }

    /// Removes records as retention does.
    fn prune(&mut self, chain: &str, range: std::ops::RangeInclusive<i64>) {
        let (first, last) = (self.at(chain, *range.start()).clone(), self.at(chain, *range.end()));
        let run = PrunedRun { first_seq: first.seq, prev_hash: first.prev_hash, last: last.head() };
        self.cuts.push(PruningReceipt::new(&self.keyring, chain, run, DateTime::UNIX_EPOCH));
        self.remove(chain, range);
    }

    fn verdict(&self, extent: Extent) -> Verdict {
        let mut verifier = Verifier::new(extent, Some(VerifyingKeys::from(&self.keyring)));
        for (claim, root) in &self.claims {
            verifier.chain(claim.clone(), *root);
        }
        for cut in &self.cuts {
            verifier.cut(cut.clone());
        }
        for head in &self.heads {
            verifier.head(head);
        }
        for event in &self.events {
            verifier.record(event);
        }
        verifier.finish()
    }

    /// What is found in the whole of it.
    fn faults(&self) -> Vec<(String, Fault)> {
        let verdict = self.verdict(Extent::Whole);
        verdict.findings.into_iter().map(|finding| (finding.chain, finding.fault)).collect()
    }
}

fn one(chain: &str, fault: Fault) -> Vec<(String, Fault)> {
    vec![(chain.to_owned(), fault)]
}

#[test]
fn a_log_that_nobody_touched_holds_and_is_counted() {
    let mut log = Log::of(10, 5);
    log.sign(FIRST, 4);
    log.sign(FIRST, 10);
    let verdict = log.verdict(Extent::Whole);
    assert!(verdict.holds(), "{verdict:?}");
    assert_eq!((verdict.records(), verdict.notices), (15, vec![]));
    let [first, second] = &verdict.chains[..] else { panic!("two chains") };
    assert_eq!((first.records, first.last_seq, first.heads, first.signed_seq), (10, 10, 2, 10));
    assert_eq!((second.records, second.last_seq, second.heads), (5, 5, 0));
    assert_eq!(first.times.unwrap().1, DateTime::UNIX_EPOCH + TimeDelta::seconds(9));
}

#[test]
fn an_edit_is_found_at_its_record() {
    let mut log = Log::of(10, 5);
    log.at(FIRST, 3).caller = Some("somebody else".into());
    assert_eq!(log.faults(), one(FIRST, Fault::Altered { seq: 3 }));
    // With a hash that fits what it says now.
    let edited = log.at(FIRST, 3);
    edited.hash = edited.computed_hash();
    assert_eq!(log.faults(), one(FIRST, Fault::Replaced { seq: 3 }));
    // With all hashes after it made anew: the end is another one then.
    log.rewrite_from(FIRST, 4);
    let end = Fault::EndsOtherwise { last: 10, successor: SECOND.into() };
    let position = Fault::NotThePosition { seq: 10 };
    assert_eq!(log.faults(), [(FIRST.into(), position), (FIRST.into(), end)]);
}

#[test]
fn a_chain_that_is_forged_whole_contradicts_its_signed_heads() {
    let mut log = Log::of(0, 5);
    log.sign(SECOND, 4);
    log.at(SECOND, 2).account = Some("another".into());
    let edited = log.at(SECOND, 2);
    edited.hash = edited.computed_hash();
    log.rewrite_from(SECOND, 3);
    let forged = log.at(SECOND, 5).hash;
    log.claims[1].0.last_hash = Some(forged);
    assert_eq!(log.faults(), one(SECOND, Fault::Contradicted { seq: 4 }));
    // Nor does a head of the forger's own help, without the key.
    log.heads[0].hash = log.at(SECOND, 4).hash;
    let found = log.faults();
    assert!(matches!(&found[..], [(_, Fault::UnprovenHead { seq: 4, .. })]), "{found:?}");
}

#[test]
fn what_was_deleted_is_found_wherever_it_was() {
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
fn an_end_that_was_cut_off_with_its_position_is_found_by_a_head_and_by_the_chain_after_it() {
    let mut log = Log::of(10, 5);
    log.sign(SECOND, 5);
    log.remove(SECOND, 3..=5);
    let last = log.at(SECOND, 2).hash;
    (log.claims[1].0.last_seq, log.claims[1].0.last_hash) = (Some(2), Some(last));
    assert_eq!(log.faults(), one(SECOND, Fault::CutShort { last: 2, head: 5 }));

    let mut log = Log::of(10, 5);
    log.remove(FIRST, 8..=10);
    let last = log.at(FIRST, 7).hash;
    (log.claims[0].0.last_seq, log.claims[0].0.last_hash) = (Some(7), Some(last));
    let end = Fault::EndsOtherwise { last: 7, successor: SECOND.into() };
    assert_eq!(log.faults(), one(FIRST, end));
}

#[test]
fn a_chain_that_is_gone_is_found_by_the_one_after_it_or_by_a_head() {
    let mut log = Log::of(10, 5);
    log.remove(FIRST, 1..=10);
    let claim = log.claims.remove(0);
    let missing = Fault::ChainMissing { successor: SECOND.into() };
    assert_eq!(log.faults(), one(FIRST, missing));
    // Its successor denies it.
    log.claims[0].0.linked_chain = None;
    assert_eq!(log.faults(), one(SECOND, Fault::NoBefore));
    log.claims.push(claim);
    let mut log = Log::of(0, 5);
    log.sign(SECOND, 5);
    log.remove(SECOND, 1..=5);
    log.claims.pop();
    assert_eq!(log.faults(), one(SECOND, Fault::NotHere));
}

#[test]
fn an_insertion_and_a_repetition_are_found() {
    let mut log = Log::of(10, 5);
    let again = log.at(FIRST, 4).clone();
    log.events.push(again);
    assert_eq!(log.faults(), one(FIRST, Fault::Twice { seq: 4 }));

    let mut log = Log::of(10, 5);
    let mut head = log.at(SECOND, 5).head();
    let mut more = log.at(SECOND, 5).clone();
    more.place(&mut head);
    log.events.push(more);
    assert_eq!(log.faults(), one(SECOND, Fault::BeyondPosition { seq: 6 }));
}

#[test]
fn records_that_change_places_are_found() {
    let mut log = Log::of(10, 5);
    (log.at(FIRST, 4).seq, log.at(FIRST, 5).seq) = (40, 4);
    log.at(FIRST, 40).seq = 5;
    let altered = |seq| (FIRST.to_owned(), Fault::Altered { seq });
    let found = log.faults();
    assert!(found.contains(&altered(4)) && found.contains(&altered(5)), "{found:?}");
    assert_eq!(found[0].1.seq(), 4);
}

#[test]
fn what_retention_removed_is_bridged_by_its_signed_cuts_and_by_no_others() {
    let mut log = Log::of(10, 5);
    log.sign(FIRST, 3);
    log.sign(FIRST, 6);
    log.prune(FIRST, 1..=4);
    log.prune(FIRST, 6..=6);
    log.prune(FIRST, 8..=10);
    let verdict = log.verdict(Extent::Whole);
    assert!(verdict.holds(), "{verdict:?}");
    let first = &verdict.chains[0];
    assert_eq!((first.records, first.removed, first.last_seq), (2, 8, 10));
    assert_eq!((first.heads, first.signed_seq), (1, 6));

    // More was removed than was signed.
    log.remove(FIRST, 5..=5);
    assert_eq!(log.faults(), one(FIRST, Fault::Missing { first: 5, last: 5 }));
    log.remove(FIRST, 7..=7);
    let missing = |seq| (FIRST.to_owned(), Fault::Missing { first: seq, last: seq });
    assert_eq!(log.faults(), [missing(5), missing(7)]);
    // A cut that somebody widened is none.
    log.cuts[0].last_seq = 5;
    let found = log.faults();
    assert!(matches!(found[0].1, Fault::UnprovenCut { first: 1, last: 5, .. }), "{found:?}");
    assert_eq!(found[1..], [(FIRST.into(), Fault::Missing { first: 1, last: 5 }), missing(7)]);
}

#[test]
fn what_stayed_beside_a_cut_cannot_be_changed() {
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
    let fault = one(FIRST, Fault::NotRemoved { seq: 3 });
    assert_eq!(log.faults(), fault);
    log.events.rotate_right(1);
    assert_eq!(log.faults(), fault);
}

#[test]
fn an_emptied_chain_does_not_stand_for_what_it_had() {
    // Its row says that it always was empty, and began where it ended.
    let mut log = Log::of(10, 5);
    log.remove(FIRST, 1..=10);
    let end = log.claims[1].0.linked_hash;
    let (claim, root) = &mut log.claims[0];
    (claim.last_seq, claim.last_hash) = (Some(0), Some(end));
    (claim.linked_hash, claim.linked_chain) = (end, Some("c00000000-0".into()));
    *root = claim.root();
    assert!(!log.faults().is_empty());
    // A made up one ends where the truncated one did.
    let mut log = Log::of(10, 5);
    log.remove(FIRST, 8..=10);
    let last = log.at(FIRST, 7).hash;
    (log.claims[0].0.last_seq, log.claims[0].0.last_hash) = (Some(7), Some(last));
    let end = log.claims[1].0.linked_hash;
    let made_up = Claim {
        chain: "c00000009-0".into(),
        linked_chain: Some(FIRST.into()),
        linked_hash: end,
        last_seq: Some(0),
        last_hash: Some(end),
        ..Claim::of(&link())
    };
    let root = made_up.root();
    log.claims.push((made_up, root));
    let successor = SECOND.into();
    assert_eq!(log.faults(), one(FIRST, Fault::EndsOtherwise { last: 7, successor }));
}

#[test]
fn a_chain_that_is_still_delivered_is_a_notice_and_no_fault() {
    let mut log = Log::of(10, 0);
    log.remove(FIRST, 8..=10);
    let last = log.at(FIRST, 7).hash;
    (log.claims[0].0.last_seq, log.claims[0].0.last_hash) = (Some(7), Some(last));
    let verdict = log.verdict(Extent::Whole);
    assert!(verdict.holds(), "{verdict:?}");
    assert!(verdict.notices[0].contains("is not delivered to its end"), "{:?}", verdict.notices);
}

#[test]
fn an_empty_first_chain_that_nobody_heard_of_is_not_missed() {
    let mut log = Log::of(0, 5);
    log.claims.remove(0);
    assert_eq!(log.faults(), []);
}

#[test]
fn faults_are_counted_for_each_chain_however_many_there_are() {
    let mut log = Log::of(i64::try_from(MOST_FINDINGS).unwrap() + 5, 5);
    for event in &mut log.events {
        event.count += 1;
    }
    let verdict = log.verdict(Extent::Whole);
    let faults: Vec<_> = verdict.chains.iter().map(|chain| chain.faults).collect();
    assert_eq!(faults, [MOST_FINDINGS as u64 + 5, 5]);
    assert_eq!(verdict.findings.len(), MOST_FINDINGS);
}

#[test]
fn a_directory_that_was_copied_is_noticed() {
    let mut log = Log::of(10, 5);
    let (mut other, root) = log.claims[1].clone();
    other.chain = "c00000002-fedcba9876543210".into();
    (other.last_seq, other.last_hash) = (None, None);
    log.claims.push((other, root));
    let verdict = log.verdict(Extent::Whole);
    assert!(verdict.holds(), "{verdict:?}");
    assert!(verdict.notices[0].contains("was copied"), "{:?}", verdict.notices);
}

#[test]
fn of_a_part_each_record_is_proven_and_what_is_absent_is_counted() {
    let mut log = Log::of(10, 5);
    log.remove(FIRST, 1..=3);
    log.remove(FIRST, 6..=6);
    let verdict = log.verdict(Extent::Part);
    assert!(verdict.holds(), "{verdict:?}");
    assert!(verdict.notices[0].contains("(4 records"), "{:?}", verdict.notices);
    let edited = log.at(FIRST, 5);
    edited.count = 9;
    edited.hash = edited.computed_hash();
    assert!(log.verdict(Extent::Part).holds(), "its successor is not there");
    let edited = log.at(FIRST, 8);
    edited.count = 9;
    edited.hash = edited.computed_hash();
    assert_eq!(log.verdict(Extent::Part).findings[0].fault, Fault::Replaced { seq: 8 });
}

#[test]
fn what_never_comes_is_missing_once_too_much_waits_for_it() {
    let mut verifier = Verifier::new(Extent::Whole, None);
    let log = Log::of(2, 0);
    verifier.chain(log.claims[0].0.clone(), log.claims[0].1);
    let walk = verifier.walks.get_mut(FIRST).unwrap();
    let mut told = vec![];
    for seq in [5, 6, 9] {
        let mut event = log.events[0].clone();
        event.seq = seq;
        walk.record(&event, true, Extent::Whole, &mut |fault| told.push(fault));
    }
    assert_eq!((walk.waiting(), told.len()), (3, 0));
    verifier.waiting = 3;
    // The earlier half is not waited for any more, then the rest.
    verifier.give_up_waiting();
    assert_eq!((verifier.waiting, verifier.walks[FIRST].waiting()), (1, 1));
    verifier.give_up_waiting();
    verifier.give_up_waiting();
    assert_eq!((verifier.waiting, verifier.walks[FIRST].waiting()), (0, 0));
    let missing: Vec<_> = verifier.findings.told.iter().map(|it| &it.fault).collect();
    assert!(missing.contains(&&Fault::Missing { first: 1, last: 4 }), "{missing:?}");
    assert!(missing.contains(&&Fault::Missing { first: 7, last: 8 }), "{missing:?}");
}

proptest! {
    /// Whatever an export says of itself, it is read to its end.
    #[test]
    fn no_numbers_make_the_proof_hang_or_panic(
        seqs in proptest::collection::vec(prop_oneof![any::<i64>(), -2_i64..9, Just(i64::MAX - 1)], 6),
        cuts in proptest::collection::vec(prop_oneof![any::<i64>(), -2_i64..9], 4),
        part in any::<bool>(),
    ) {
        let mut log = Log::of(6, 0);
        for pair in cuts.chunks(2) {
            let run = PrunedRun {
                first_seq: pair[0],
                prev_hash: Digest::ZERO,
                last: ChainHead { seq: pair[1], hash: Digest::ZERO },
            };
            log.cuts.push(PruningReceipt::new(&log.keyring, FIRST, run, DateTime::UNIX_EPOCH));
            let head = ChainHead { seq: pair[0], hash: Digest::ZERO };
            log.heads.push(SignedCheckpoint::new(&log.keyring, FIRST, head, DateTime::UNIX_EPOCH));
        }
        for (event, seq) in log.events.iter_mut().zip(seqs) {
            event.seq = seq;
        }
        log.claims[0].0.last_seq = Some(cuts[0]);
        let _ = log.verdict(if part { Extent::Part } else { Extent::Whole });
    }

    #[test]
    fn the_order_in_which_records_are_shown_does_not_matter(
        (first, second) in (0_i64..40, 0_i64..40),
        keys in proptest::collection::vec(any::<u16>(), 80),
    ) {
        let mut log = Log::of(first, second);
        let mut order: Vec<_> = log.events.drain(..).zip(keys).collect();
        order.sort_by_key(|(_, key)| *key);
        log.events = order.into_iter().map(|(event, _)| event).collect();
        prop_assert_eq!(log.faults(), vec![]);
    }

    /// Whatever is done to one record, somebody notices, and no later than at the record after it.
    #[test]
    fn no_single_change_goes_unnoticed(
        seq in 1_i64..=20,
        what in 0..6,
        fitting in any::<bool>(),
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
        if fitting && what != 5 {
            event.hash = event.computed_hash();
        }
        let found = log.faults();
        prop_assert!(!found.is_empty());
        let first = found[0].1.seq();
        prop_assert!((seq - 1..=seq + 1).contains(&first), "{first} for {seq}: {found:?}");
    }

    #[test]
    fn any_days_that_retention_removes_leave_a_log_that_holds(
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
