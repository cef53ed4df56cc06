//! Delivery of the journal to Postgres: each record exactly once, in order, whatever it contains.

mod odd_rows;
mod retention;

use std::time::Duration;

use chrono::{DateTime, TimeDelta};
use sqlx::{Connection, PgConnection, PgPool};
use token_broker::{
    audit::{
        chain::StoredEvent,
        journal::{Journal, JournalSettings},
        record::{Event, Record},
    },
    domain::clock::{Clock, Timestamp},
    files::state_dir::StateDir,
    services::journal_delivery::{CHANGE_ID, JournalDelivery},
    store::{
        Database,
        audit::{Decoded, EventFilter, events_after, latest_events, register_chain},
    },
};
use tokio_util::sync::CancellationToken;

use crate::harness::{database::TestDatabase, eventually};

const AMPLE: Duration = Duration::from_secs(30);

/// Returns the records of rows, all of which must be records.
fn decoded(rows: Vec<Decoded<StoredEvent>>) -> Vec<StoredEvent> {
    rows.into_iter().map(Result::unwrap).collect()
}

/// A journal in a directory of its own, and the database that it is delivered to.
struct JournalFixture {
    database: Database,
    pool: PgPool,
    journal: Journal,
    state_dir: StateDir,
    _dir: tempfile::TempDir,
}

impl JournalFixture {
    fn new(url: &str) -> Self {
        Self::with(url, JournalSettings::default())
    }

    fn with(url: &str, settings: JournalSettings) -> Self {
        let database = Database::new(url, "token-broker test").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let state_dir = StateDir::open(dir.path()).unwrap();
        let journal = Journal::open(&state_dir, settings, Clock::System).unwrap();
        Self { pool: database.pool(2), database, journal, state_dir, _dir: dir }
    }

    fn delivery(&self) -> JournalDelivery {
        JournalDelivery::new(self.journal.clone(), self.database.clone()).drain(AMPLE)
    }

    /// Delivers everything that is durable.
    async fn drain(&self) {
        let stop = CancellationToken::new();
        stop.cancel();
        self.delivery().run(stop).await;
        assert_eq!(self.journal.stats().undelivered, 0);
    }

    async fn events(&self) -> Vec<StoredEvent> {
        let events = events_after(&self.pool, &EventFilter::default(), None, i64::MAX).await;
        decoded(events.unwrap())
    }
}

fn day(nth: i64) -> Timestamp {
    DateTime::UNIX_EPOCH + TimeDelta::days(20_000 + nth)
}

fn call(nth: i64) -> Record {
    let at = day(0) + TimeDelta::seconds(nth);
    Record::new(at, Event::GetToken).requested_account(&format!("acme-{nth}"))
}

async fn append(journal: &Journal, record: Record) {
    journal.append(record).durable(AMPLE).await.unwrap();
}

async fn append_all(journal: &Journal, records: impl Iterator<Item = Record>) {
    for appended in records.map(|record| journal.append(record)).collect::<Vec<_>>() {
        appended.durable(AMPLE).await.unwrap();
    }
}

/// Checks that each chain is complete from its link on, and that the hash of each event matches the
/// content that was read back.
fn assert_chains_hold(journal: &Journal, events: &[StoredEvent]) {
    let chains = journal.chains();
    for chain in &chains {
        let mut head = chain.link.root();
        let mut own: Vec<_> = events.iter().filter(|e| e.chain == chain.link.chain).collect();
        own.sort_by_key(|event| event.seq);
        for event in own {
            assert_eq!(event.follows(head), Ok(()), "{event:?}");
            head = event.head();
        }
        assert_eq!(head.seq, chain.last_seq);
    }
    let known: i64 = chains.iter().map(|chain| chain.last_seq).sum();
    assert_eq!(i64::try_from(events.len()).unwrap(), known);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_read_back_from_postgres_have_the_hashes_that_the_journal_wrote() {
    let test_database = TestDatabase::new().await;
    let database = test_database.url();
    let fixture = JournalFixture::new(database);
    let strange = ["", "\0", "a\0b\nc\\d", "\u{feff}한\u{202e}", "\"{}'", &"ü".repeat(5_000)];
    for (nth, text) in (0..).zip(strange) {
        let mut record = Record::new(day(nth) + TimeDelta::nanoseconds(1_999), Event::GetToken);
        // Set directly, without the setters that sanitize.
        record.caller = Some(text.into());
        record.caller_kind = Some("bearer");
        record.peer = Some(text.into());
        record.account = Some(text.into());
        record.reason = Some(text.into());
        record.trace_id = Some(text.into());
        record.token_fingerprint = Some(text.into());
        record.generation = Some(i64::MAX);
        record.latency_us = Some(i64::MIN);
        record.count = i64::MAX;
        record.detail.extend([(text.into(), text.into()), ("z".into(), "1".into())]);
        record.detail.insert("aa".into(), "2".into());
        append(&fixture.journal, record).await;
    }
    for at in [DateTime::<chrono::Utc>::MIN_UTC, DateTime::<chrono::Utc>::MAX_UTC] {
        append(&fixture.journal, Record::new(at, Event::Started)).await;
    }
    fixture.drain().await;
    let events = fixture.events().await;
    assert_eq!(events.len(), 8);
    assert_chains_hold(&fixture.journal, &events);
}

/// Chains of several starts are delivered, and delivery continues from a known position.
#[tokio::test(flavor = "multi_thread")]
async fn every_chain_is_delivered_completely_and_once() {
    let test_database = TestDatabase::new().await;
    let database = test_database.url();
    let settings = JournalSettings { segment_bytes: 20_000, ..JournalSettings::default() };
    let mut fixture = JournalFixture::with(database, settings);
    append_all(&fixture.journal, (0..1_200).map(call)).await;
    fixture.journal.close().await;
    fixture.journal = Journal::open(&fixture.state_dir, settings, Clock::System).unwrap();
    append_all(&fixture.journal, (1_200..1_900).map(call)).await;
    fixture.drain().await;
    fixture.drain().await;
    append_all(&fixture.journal, (1_900..2_000).map(call)).await;
    fixture.drain().await;
    let events = fixture.events().await;
    assert_eq!(events.len(), 2_000);
    assert_chains_hold(&fixture.journal, &events);
    let chain = &fixture.journal.chains()[1];
    assert_eq!(chain.link.linked_seq, 1_200);
    let last = events.iter().find(|e| e.chain != chain.link.chain && e.seq == 1_200).unwrap();
    assert_eq!(chain.link.linked_hash, last.hash);
}

#[tokio::test(flavor = "multi_thread")]
async fn terminated_connections_neither_lose_nor_duplicate_records() {
    let test_database = TestDatabase::new().await;
    let database = test_database.url();
    let fixture = JournalFixture::new(database);
    let stop = CancellationToken::new();
    let running = tokio::spawn(fixture.delivery().run(stop.clone()));
    let mut admin = PgConnection::connect(database).await.unwrap();
    for round in 0..20 {
        append_all(&fixture.journal, (round * 250..(round + 1) * 250).map(call)).await;
        sqlx::query(
            "select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and pid <> pg_backend_pid()
                and query like '%store::audit::%'",
        )
        .execute(&mut admin)
        .await
        .unwrap();
    }
    fixture.journal.close().await;
    stop.cancel();
    tokio::time::timeout(AMPLE, running).await.unwrap().unwrap();
    let fresh = fixture.database.pool(1);
    let events = events_after(&fresh, &EventFilter::default(), None, i64::MAX).await;
    let events = decoded(events.unwrap());
    assert_eq!(events.len(), 5_000);
    assert_chains_hold(&fixture.journal, &events);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_deliveries_of_one_journal_duplicate_nothing() {
    let test_database = TestDatabase::new().await;
    let database = test_database.url();
    let fixture = JournalFixture::new(database);
    let stop = CancellationToken::new();
    let first = tokio::spawn(fixture.delivery().run(stop.clone()));
    let second = tokio::spawn(fixture.delivery().run(stop.clone()));
    for round in 0..10 {
        append_all(&fixture.journal, (round * 100..(round + 1) * 100).map(call)).await;
    }
    fixture.journal.close().await;
    stop.cancel();
    tokio::time::timeout(AMPLE, async { (first.await.unwrap(), second.await.unwrap()) })
        .await
        .unwrap();
    let events = fixture.events().await;
    assert_eq!(events.len(), 1_000);
    assert_chains_hold(&fixture.journal, &events);
}

/// A database that was restored to an earlier state gets the records that it lost.
#[tokio::test(flavor = "multi_thread")]
async fn delivery_to_a_restored_database_continues_from_its_position() {
    let test_database = TestDatabase::new().await;
    let database = test_database.url();
    let fixture = JournalFixture::new(database);
    append_all(&fixture.journal, (0..100).map(call)).await;
    fixture.drain().await;
    let mut admin = PgConnection::connect(database).await.unwrap();
    let hash = fixture.events().await[59].hash.0;
    for statement in [
        "alter table audit_events disable trigger all",
        "delete from audit_events where seq > 60",
        "alter table audit_events enable trigger all",
    ] {
        sqlx::raw_sql(statement).execute(&mut admin).await.unwrap();
    }
    sqlx::query("update audit_chains set delivered_seq = 60, delivered_hash = $1")
        .bind(&hash[..])
        .execute(&mut admin)
        .await
        .unwrap();
    append_all(&fixture.journal, (100..120).map(call)).await;
    fixture.drain().await;
    let events = fixture.events().await;
    assert_eq!(events.len(), 120);
    assert_chains_hold(&fixture.journal, &events);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_with_another_hash_stops_the_delivery_of_the_chain() {
    let test_database = TestDatabase::new().await;
    let database = test_database.url();
    let fixture = JournalFixture::new(database);
    append_all(&fixture.journal, (0..10).map(call)).await;
    fixture.drain().await;
    let mut admin = PgConnection::connect(database).await.unwrap();
    sqlx::query("update audit_chains set delivered_hash = $1")
        .bind(&[7_u8; 32][..])
        .execute(&mut admin)
        .await
        .unwrap();
    append_all(&fixture.journal, (10..20).map(call)).await;
    let stop = CancellationToken::new();
    stop.cancel();
    fixture.delivery().run(stop).await;
    assert_eq!(fixture.events().await.len(), 10);
    assert_eq!(fixture.journal.stats().undelivered, 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_another_instance_registered_is_refused() {
    let test_database = TestDatabase::new().await;
    let database = test_database.url();
    let fixture = JournalFixture::new(database);
    let mut connection = PgConnection::connect(database).await.unwrap();
    let mut link = fixture.journal.chain().clone();
    let registered = register_chain(&mut connection, &link).await.unwrap();
    assert_eq!(registered, link.root());
    assert_eq!(register_chain(&mut connection, &link).await.unwrap(), link.root());
    link.instance = "i-fedcba9876543210".into();
    assert!(register_chain(&mut connection, &link).await.is_err());
}

/// `audited_at` is set in the rows of `changes` whose events were delivered, and in no others.
#[tokio::test(flavor = "multi_thread")]
async fn delivered_changes_are_marked_as_audited() {
    let test_database = TestDatabase::new().await;
    let database = test_database.url();
    let fixture = JournalFixture::new(database);
    sqlx::query("insert into callers (name) values ('billing'), ('search'), ('web')")
        .execute(&fixture.pool)
        .await
        .unwrap();
    let changes: Vec<(i64, Timestamp)> = sqlx::query_as("select id, at from changes order by id")
        .fetch_all(&fixture.pool)
        .await
        .unwrap();
    assert_eq!(changes.len(), 3);
    for (id, at) in &changes[..2] {
        let record = Record::new(*at, Event::CallerChanged).with(CHANGE_ID, id.to_string());
        append(&fixture.journal, record).await;
    }
    // The record of another change that had the same number before the database was restored.
    let (id, at) = changes[2];
    let earlier = at - Duration::from_hours(1);
    let record = Record::new(earlier, Event::CallerChanged).with(CHANGE_ID, id.to_string());
    append(&fixture.journal, record).await;
    fixture.drain().await;
    let audited: Vec<i64> =
        sqlx::query_scalar("select id from changes where audited_at is not null order by id")
            .fetch_all(&fixture.pool)
            .await
            .unwrap();
    assert_eq!(audited, [changes[0].0, changes[1].0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_database_blocks_neither_the_journal_nor_the_end_of_delivery() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgresql://nobody@{}/nowhere", silent.local_addr().unwrap());
    let fixture = JournalFixture::new(&url);
    let stop = CancellationToken::new();
    let delivery = fixture.delivery().drain(Duration::from_millis(50));
    let running = tokio::spawn(delivery.run(stop.clone()));
    append_all(&fixture.journal, (0..1_000).map(call)).await;
    assert!(fixture.journal.is_writable());
    fixture.journal.close().await;
    stop.cancel();
    tokio::time::timeout(AMPLE, running).await.unwrap().unwrap();
    assert_eq!(fixture.journal.stats().undelivered, 1_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_selected_by_filter_and_read_in_pages() {
    let test_database = TestDatabase::new().await;
    let database = test_database.url();
    let fixture = JournalFixture::new(database);
    for nth in 0..10 {
        let mut record = call(nth % 5);
        record.at = day(nth);
        record.caller = Some(format!("caller-{}", nth % 2));
        append(&fixture.journal, record).await;
    }
    fixture.drain().await;
    let all = fixture.events().await;
    let mut paged: Vec<StoredEvent> = Vec::new();
    loop {
        let after = paged.last().map(|event| (event.at, event.chain.clone(), event.seq));
        let page = events_after(&fixture.pool, &EventFilter::default(), after, 3).await.unwrap();
        if page.is_empty() {
            break;
        }
        paged.extend(decoded(page));
    }
    assert_eq!(paged, all);
    let count = async |filter: EventFilter| {
        events_after(&fixture.pool, &filter, None, 100).await.unwrap().len()
    };
    let none = EventFilter::default;
    assert_eq!(count(EventFilter { account: Some("acme-1".into()), ..none() }).await, 2);
    assert_eq!(count(EventFilter { caller: Some("caller-0".into()), ..none() }).await, 5);
    assert_eq!(count(EventFilter { events: Some(vec!["started".into()]), ..none() }).await, 0);
    assert_eq!(count(EventFilter { outcome: Some("ok".into()), ..none() }).await, 10);
    let (since, until) = (Some(day(2)), Some(day(5)));
    assert_eq!(count(EventFilter { since, until, ..none() }).await, 3);
    let latest = decoded(latest_events(&fixture.pool, &none(), 4).await.unwrap());
    assert_eq!(latest, all[6..]);
    // The JSON of `audit tail --json` parses back to the same record.
    let line = serde_json::to_string(&latest[0]).unwrap();
    assert_eq!(serde_json::from_str::<StoredEvent>(&line).unwrap(), latest[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_dropped_during_delivery_is_created_again() {
    let test_database = TestDatabase::new().await;
    let fixture = JournalFixture::new(test_database.url());
    let stop = CancellationToken::new();
    let running = tokio::spawn(fixture.delivery().run(stop.clone()));
    append(&fixture.journal, Record::new(day(0), Event::GetToken)).await;
    eventually("delivery", async || (fixture.events().await.len() == 1).then_some(())).await;
    // Delivery has already created the next day's partition, and remembers that it exists.
    test_database.sql("drop table audit_events_20241005").await;
    append_all(&fixture.journal, (0..3).map(|_| Record::new(day(1), Event::GetToken))).await;
    fixture.journal.close().await;
    stop.cancel();
    tokio::time::timeout(AMPLE, running).await.unwrap().unwrap();
    let events = fixture.events().await;
    assert_eq!(events.len(), 4);
    assert_chains_hold(&fixture.journal, &events);
}

/// Records that neither the database nor the journal has any more stay a gap, and delivery goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_database_gets_the_records_that_the_journal_still_has() {
    let test_database = TestDatabase::new().await;
    let settings =
        JournalSettings { segment_bytes: 8_000, max_bytes: 32_000, ..JournalSettings::default() };
    let fixture = JournalFixture::with(test_database.url(), settings);
    for round in 0..10 {
        append_all(&fixture.journal, (round * 20..(round + 1) * 20).map(call)).await;
        fixture.drain().await;
    }
    let hash = fixture.events().await[9].hash.0;
    test_database
        .sql(
            "set session_replication_role = replica; delete from audit_events where seq > 10;
         set session_replication_role = origin",
        )
        .await;
    sqlx::query("update audit_chains set delivered_seq = 10, delivered_hash = $1")
        .bind(&hash[..])
        .execute(&fixture.pool)
        .await
        .unwrap();
    append_all(&fixture.journal, (200..220).map(call)).await;
    let first = fixture.journal.chains()[0].before.seq + 1;
    assert!(first > 11, "the first segments were deleted to make room");
    fixture.drain().await;
    let seqs: Vec<_> = fixture.events().await.iter().map(|event| event.seq).collect();
    assert_eq!(seqs, (1..=10).chain(first..=220).collect::<Vec<_>>());
}
