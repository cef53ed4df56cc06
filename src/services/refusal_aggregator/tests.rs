use std::fs;

use chrono::{DateTime, TimeDelta};
use futures_util::future::join_all;
use tempfile::TempDir;

use super::*;
use crate::{
    audit::{chain::StoredEvent, journal::JournalSettings},
    domain::clock::Clock,
    files::state_dir::StateDir,
};

/// A refusal of `account` to who calls from `peer`, `second` seconds after a fixed moment.
fn refusal(second: i64, peer: &str, account: &str) -> Record {
    let at = DateTime::UNIX_EPOCH + TimeDelta::seconds(second);
    let mut record = Record::new(at, Event::GetToken)
        .account_as_asked(account)
        .outcome("permission_denied", "NOT_GRANTED");
    record.peer = Some(peer.into());
    record.trace_id = Some(format!("{second:032}"));
    record.latency_us = Some(second);
    record
}

#[test]
fn an_origin_has_a_few_records_at_once_and_then_one_a_second() {
    let mut state = State::default();
    let alone = |state: &mut State, at| (0..100).filter(|_| state.pays(at)).count();
    assert_eq!(alone(&mut state, Duration::ZERO), 20);
    assert_eq!(alone(&mut state, Duration::from_millis(999)), 0);
    assert_eq!(alone(&mut state, Duration::from_secs(1)), 1);
    assert!(!state.is_idle(Duration::from_secs(20)));
    assert!(state.is_idle(Duration::from_secs(21)));
    assert_eq!(alone(&mut state, Duration::from_mins(1)), 20);
}

#[test]
fn a_caller_is_one_origin_and_so_is_an_ipv6_network() {
    let origin = |peer: &str| Origin::of(&refusal(0, peer, "acme"));
    assert_eq!(origin("127.0.0.1:1"), origin("127.0.0.1:2"));
    assert_eq!(origin("127.0.0.1:1"), origin("[::ffff:127.0.0.1]:2"));
    assert_ne!(origin("127.0.0.1:1"), origin("127.0.0.2:1"));
    assert_eq!(origin("[2001:db8::1]:1"), origin("[2001:db8::ffff:2]:1"));
    assert_ne!(origin("[2001:db8::1]:1"), origin("[2001:db8:0:1::1]:1"));
    assert_eq!(origin("nowhere"), Origin::Any);
    let known = Record { caller: Some("billing".into()), ..refusal(0, "127.0.0.1:1", "acme") };
    assert_eq!(Origin::of(&known), Origin::Caller("billing".into()));
}

#[test]
fn a_folded_record_keeps_what_its_refusals_have_in_common() {
    let mut folded =
        AggregatedRefusal::new(refusal(5, "127.0.0.1:1", "acme").with("refused", "ended"));
    folded.join(refusal(3, "127.0.0.1:2", "acme").with("refused", "ended").with("more", "x"));
    folded.join(refusal(9, "127.0.0.1:1", "acme").with("refused", "ended"));
    let record = folded.record();
    assert_eq!(record.count, 3);
    assert_eq!(record.at.timestamp(), 3);
    assert_eq!(record.peer.as_deref(), Some("127.0.0.1"));
    assert_eq!(record.account.as_deref(), Some("acme"));
    assert_eq!((record.trace_id, record.latency_us), (None, None));
    let detail: Vec<_> =
        record.detail.iter().map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!(detail, ["refused=ended", "until=1970-01-01T00:00:09+00:00"]);
}

#[test]
fn of_several_accounts_the_first_few_are_named() {
    let mut folded = AggregatedRefusal::new(refusal(0, "127.0.0.1:1", "a\nb"));
    for nth in 0..30 {
        folded.join(refusal(nth, "127.0.0.2:1", &format!("acme-{nth:02}")));
    }
    let record = folded.record();
    assert_eq!((record.account, record.peer), (None, None));
    let accounts = &record.detail["accounts"];
    assert!(accounts.starts_with("a\\u{a}b,acme-00,acme-01,"), "{accounts}");
    assert!(accounts.ends_with(",acme-14,…"), "{accounts}");
}

/// A journal in a directory of its own, and what folds for it.
struct Office {
    folds: RefusalAggregator,
    state_dir: StateDir,
    _home: TempDir,
}

impl Office {
    fn open() -> Self {
        let home = TempDir::new().unwrap();
        let state_dir = StateDir::open(home.path()).unwrap();
        let journal = Journal::open(&state_dir, JournalSettings::default(), Clock::System).unwrap();
        Self { folds: RefusalAggregator::new(journal, TaskTracker::new()), state_dir, _home: home }
    }

    /// What is in the journal by now.
    fn written(&self) -> Vec<StoredEvent> {
        let segments = fs::read_dir(self.state_dir.journal_dir()).unwrap();
        segments
            .map(|segment| segment.unwrap().path())
            .filter(|path| path.extension().is_some_and(|it| it == "jsonl"))
            .flat_map(|path| {
                let text = fs::read_to_string(path).unwrap();
                text.lines().skip(1).map(str::to_owned).collect::<Vec<_>>()
            })
            .map(|line| serde_json::from_str(&line).unwrap())
            .collect()
    }
}

#[tokio::test]
async fn every_refusal_is_counted_on_disk_before_it_is_answered_and_a_flood_makes_few_records() {
    const EACH: i64 = 400;
    let office = Office::open();
    let began = Instant::now();
    let refusals = (0..3 * EACH).map(|nth| {
        let refusal = refusal(nth, &format!("127.0.0.{}:{nth}", nth % 3 + 1), "acme");
        office.folds.recorded(refusal, RECORD_WITHIN)
    });
    let answered = join_all(refusals).await;
    assert!(answered.iter().all(Result::is_ok));
    // Nothing has been closed: what is answered is on disk.
    let written = office.written();
    for origin in 1..=3 {
        let peer = format!("127.0.0.{origin}");
        let of_it = written.iter().filter(|it| it.peer.as_ref().unwrap().starts_with(&peer));
        let counts: Vec<_> = of_it.map(|it| it.count).collect();
        assert_eq!(counts.iter().sum::<i64>(), EACH);
        // Twenty at once; and for each second one more, and four with counts.
        let most = 20 + 5 * (began.elapsed().as_secs() + 1);
        assert!(counts.len() as u64 <= most, "{counts:?}");
    }
}

#[tokio::test]
async fn who_waits_for_a_folded_record_that_cannot_be_written_hears_of_it() {
    let office = Office::open();
    office.folds.0.journal.close().await;
    let refusals =
        (0..30).map(|nth| office.folds.recorded(refusal(nth, "[::1]:1", "a"), WINDOW * 40));
    for answered in join_all(refusals).await {
        assert_eq!(answered, Err(AuditUnavailable::Unwritable));
    }
}

#[tokio::test]
async fn a_refusal_whose_asker_has_gone_is_counted_too() {
    let office = Office::open();
    for nth in 0..30 {
        drop(office.folds.way_of(refusal(nth, "127.0.0.1:1", "acme"), Duration::ZERO));
    }
    office.folds.0.tasks.close();
    office.folds.0.tasks.wait().await;
    assert_eq!(office.written().iter().map(|it| it.count).sum::<i64>(), 10);
}

#[tokio::test]
async fn beyond_so_many_origins_the_rest_is_folded_by_reason() {
    let office = Office::open();
    let way_of = |nth: usize, second| {
        let peer = format!("{}:1", std::net::Ipv4Addr::from_bits(u32::try_from(nth).unwrap()));
        office.folds.way_of(refusal(0, &peer, "acme"), Duration::from_secs(second))
    };
    for nth in 0..MOST_KINDS {
        assert!(matches!(way_of(nth, 0), Way::Alone(_)));
    }
    for nth in 0..3 {
        assert!(matches!(way_of(MOST_KINDS + nth, 0), Way::AggregatedRefusal(_)));
    }
    {
        let kinds = office.folds.0.kinds();
        assert_eq!(kinds.states.len(), MOST_KINDS + 1);
        let any = kinds.states.iter().find(|(kind, _)| kind.origin == Origin::Any).unwrap().1;
        let folded = format!("{:?}", any.open.as_ref().unwrap().folded);
        assert!(folded.contains("count: 3"), "{folded}");
    }
    // The others are forgotten once they have been quiet.
    assert!(matches!(way_of(MOST_KINDS, 1), Way::Alone(_)));
    assert_eq!(office.folds.0.kinds().states.len(), 2);
}
