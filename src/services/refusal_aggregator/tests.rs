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

/// A refusal of `account` to a caller at `peer`, `second` seconds after the epoch.
fn refusal(second: i64, peer: &str, account: &str) -> Record {
    let at = DateTime::UNIX_EPOCH + TimeDelta::seconds(second);
    let mut record = Record::new(at, Event::GetToken)
        .requested_account(account)
        .outcome("permission_denied", "NOT_GRANTED");
    record.peer = Some(peer.into());
    record.trace_id = Some(format!("{second:032}"));
    record.latency_us = Some(second);
    record
}

#[test]
fn a_kind_gets_a_burst_of_individual_records_and_then_one_per_second() {
    let mut state = KindState::default();
    let individual = |state: &mut KindState, at| (0..100).filter(|_| state.try_spend(at)).count();
    assert_eq!(individual(&mut state, Duration::ZERO), 20);
    assert_eq!(individual(&mut state, Duration::from_millis(999)), 0);
    assert_eq!(individual(&mut state, Duration::from_secs(1)), 1);
    assert!(!state.is_idle(Duration::from_secs(20)));
    assert!(state.is_idle(Duration::from_secs(21)));
    assert_eq!(individual(&mut state, Duration::from_mins(1)), 20);
}

#[test]
fn the_origin_is_the_caller_or_the_address_or_the_ipv6_network() {
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
fn an_aggregated_record_keeps_what_its_refusals_have_in_common() {
    let mut refusals =
        AggregatedRefusal::new(refusal(5, "127.0.0.1:1", "acme").with("refused", "ended"));
    refusals.add(refusal(3, "127.0.0.1:2", "acme").with("refused", "ended").with("more", "x"));
    refusals.add(refusal(9, "127.0.0.1:1", "acme").with("refused", "ended"));
    let record = refusals.into_record();
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
fn an_aggregated_record_names_the_first_accounts_of_several() {
    let mut refusals = AggregatedRefusal::new(refusal(0, "127.0.0.1:1", "a\nb"));
    for nth in 0..30 {
        refusals.add(refusal(nth, "127.0.0.2:1", &format!("acme-{nth:02}")));
    }
    let record = refusals.into_record();
    assert_eq!((record.account, record.peer), (None, None));
    let accounts = &record.detail["accounts"];
    assert!(accounts.starts_with("a\\u{a}b,acme-00,acme-01,"), "{accounts}");
    assert!(accounts.ends_with(",acme-14,…"), "{accounts}");
}

/// A journal in a directory of its own, and an aggregator that writes to it.
struct Fixture {
    aggregator: RefusalAggregator,
    state_dir: StateDir,
    _directory: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let state_dir = StateDir::open(directory.path()).unwrap();
        let journal = Journal::open(&state_dir, JournalSettings::default(), Clock::System).unwrap();
        Self {
            aggregator: RefusalAggregator::new(journal, TaskTracker::new()),
            state_dir,
            _directory: directory,
        }
    }

    /// The records that are in the journal's files now.
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
    let fixture = Fixture::new();
    let began = Instant::now();
    let refusals = (0..3 * EACH).map(|nth| {
        let refusal = refusal(nth, &format!("127.0.0.{}:{nth}", nth % 3 + 1), "acme");
        fixture.aggregator.record(refusal, DURABLE_WITHIN)
    });
    let answered = join_all(refusals).await;
    assert!(answered.iter().all(Result::is_ok));
    // The journal is still open, and the answered refusals are on disk already.
    let written = fixture.written();
    for origin in 1..=3 {
        let peer = format!("127.0.0.{origin}");
        let of_it = written.iter().filter(|it| it.peer.as_ref().unwrap().starts_with(&peer));
        let counts: Vec<_> = of_it.map(|it| it.count).collect();
        assert_eq!(counts.iter().sum::<i64>(), EACH);
        // There are 20 in the burst, and then per second one individual record and four aggregated ones.
        let most = 20 + 5 * (began.elapsed().as_secs() + 1);
        assert!(counts.len() as u64 <= most, "{counts:?}");
    }
}

#[tokio::test]
async fn every_caller_gets_the_error_when_an_aggregated_record_cannot_be_written() {
    let fixture = Fixture::new();
    fixture.aggregator.0.journal.close().await;
    let refusals = (0..30).map(|nth| {
        fixture.aggregator.record(refusal(nth, "[::1]:1", "a"), AGGREGATION_WINDOW * 40)
    });
    for answered in join_all(refusals).await {
        assert_eq!(answered, Err(AuditUnavailable::Unwritable));
    }
}

#[tokio::test]
async fn a_refusal_whose_caller_disconnected_is_counted_too() {
    let fixture = Fixture::new();
    for nth in 0..30 {
        drop(fixture.aggregator.choose_record(refusal(nth, "127.0.0.1:1", "acme"), Duration::ZERO));
    }
    fixture.aggregator.0.tasks.close();
    fixture.aggregator.0.tasks.wait().await;
    assert_eq!(fixture.written().iter().map(|it| it.count).sum::<i64>(), 10);
}

#[tokio::test]
async fn beyond_the_limit_of_kinds_refusals_are_aggregated_by_reason() {
    let fixture = Fixture::new();
    let choose_record = |nth: usize, second| {
        let peer = format!("{}:1", std::net::Ipv4Addr::from_bits(u32::try_from(nth).unwrap()));
        fixture.aggregator.choose_record(refusal(0, &peer, "acme"), Duration::from_secs(second))
    };
    for nth in 0..MAX_KINDS {
        assert!(matches!(choose_record(nth, 0), RecordedIn::Individual(_)));
    }
    for nth in 0..3 {
        assert!(matches!(choose_record(MAX_KINDS + nth, 0), RecordedIn::Aggregated(_)));
    }
    {
        let kinds = fixture.aggregator.0.kinds.lock();
        assert_eq!(kinds.states.len(), MAX_KINDS + 1);
        let any = kinds.states.iter().find(|(kind, _)| kind.origin == Origin::Any).unwrap().1;
        let merged = format!("{:?}", any.pending.as_ref().unwrap().refusal);
        assert!(merged.contains("count: 3"), "{merged}");
    }
    // Idle kinds are removed.
    assert!(matches!(choose_record(MAX_KINDS, 1), RecordedIn::Individual(_)));
    assert_eq!(fixture.aggregator.0.kinds.lock().states.len(), 2);
}
