//! The journal's delivery to Postgres: each record exactly once, in order, whatever it holds.
//!
//! Each test gets the URL of a freshly migrated database of its own.

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
        audit::{EventFilter, events_after, latest_events, register_chain},
    },
};
use tokio_util::sync::CancellationToken;

use crate::harness::{database::TestDatabase, eventually};

const AMPLE: Duration = Duration::from_secs(30);

/// A journal in a directory of its own, and a database.
struct World {
    database: Database,
    pool: PgPool,
    journal: Journal,
    state_dir: StateDir,
    _dir: tempfile::TempDir,
}

impl World {
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

    fn shipper(&self) -> JournalDelivery {
        let options = self.database.connection().clone();
        JournalDelivery::new(self.journal.clone(), options).drain(AMPLE)
    }

    /// Delivers all that is durable.
    async fn drain(&self) {
        let stop = CancellationToken::new();
        stop.cancel();
        self.shipper().run(stop).await;
        assert_eq!(self.journal.stats().undelivered, 0);
    }

    async fn events(&self) -> Vec<StoredEvent> {
        events_after(&self.pool, &EventFilter::default(), None, i64::MAX).await.unwrap()
    }
}

fn day(nth: i64) -> Timestamp {
    DateTime::UNIX_EPOCH + TimeDelta::days(20_000 + nth)
}

fn call(nth: i64) -> Record {
    let at = day(0) + TimeDelta::seconds(nth);
    Record::new(at, Event::GetToken).account_as_asked(&format!("acme-{nth}"))
}

async fn append(journal: &Journal, record: Record) {
    journal.append(record).durable(AMPLE).await.unwrap();
}

async fn append_all(journal: &Journal, records: impl Iterator<Item = Record>) {
    for appended in records.map(|record| journal.append(record)).collect::<Vec<_>>() {
        appended.durable(AMPLE).await.unwrap();
    }
}

/// Each chain is whole from its link on, and every hash is that of what was read back.
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

/// What Postgres reads back hashes as what the journal wrote, whatever bytes came in.
#[tokio::test(flavor = "multi_thread")]
async fn what_postgres_reads_back_has_the_hash_that_was_written() {
    let own = TestDatabase::new().await;
    let database = own.url();
    let world = World::new(database);
    let strange = ["", "\0", "a\0b\nc\\d", "\u{feff}한\u{202e}", "\"{}'", &"ü".repeat(5_000)];
    for (nth, text) in (0..).zip(strange) {
        let mut record = Record::new(day(nth) + TimeDelta::nanoseconds(1_999), Event::GetToken);
        // Past the setters, as nobody should.
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
        append(&world.journal, record).await;
    }
    for at in [DateTime::<chrono::Utc>::MIN_UTC, DateTime::<chrono::Utc>::MAX_UTC] {
        append(&world.journal, Record::new(at, Event::Started)).await;
    }
    world.drain().await;
    let events = world.events().await;
    assert_eq!(events.len(), 8);
    assert_chains_hold(&world.journal, &events);
}

/// Chains of several starts arrive, each whole, and a position that is known is gone on from.
#[tokio::test(flavor = "multi_thread")]
async fn every_chain_is_delivered_whole_and_once() {
    let own = TestDatabase::new().await;
    let database = own.url();
    let settings = JournalSettings { segment_bytes: 20_000, ..JournalSettings::default() };
    let mut world = World::with(database, settings);
    append_all(&world.journal, (0..1_200).map(call)).await;
    world.journal.close().await;
    world.journal = Journal::open(&world.state_dir, settings, Clock::System).unwrap();
    append_all(&world.journal, (1_200..1_900).map(call)).await;
    world.drain().await;
    world.drain().await;
    append_all(&world.journal, (1_900..2_000).map(call)).await;
    world.drain().await;
    let events = world.events().await;
    assert_eq!(events.len(), 2_000);
    assert_chains_hold(&world.journal, &events);
    let chain = &world.journal.chains()[1];
    assert_eq!(chain.link.linked_seq, 1_200);
    let last = events.iter().find(|e| e.chain != chain.link.chain && e.seq == 1_200).unwrap();
    assert_eq!(chain.link.linked_hash, last.hash);
}

/// Its connections killed again and again under load, the shipper delivers each record once.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_die_lose_and_double_nothing() {
    let own = TestDatabase::new().await;
    let database = own.url();
    let world = World::new(database);
    let stop = CancellationToken::new();
    let shipping = tokio::spawn(world.shipper().run(stop.clone()));
    let mut admin = PgConnection::connect(database).await.unwrap();
    for round in 0..20 {
        append_all(&world.journal, (round * 250..(round + 1) * 250).map(call)).await;
        sqlx::query(
            "select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and pid <> pg_backend_pid()
                and query like '%store::audit::%'",
        )
        .execute(&mut admin)
        .await
        .unwrap();
    }
    world.journal.close().await;
    stop.cancel();
    tokio::time::timeout(AMPLE, shipping).await.unwrap().unwrap();
    let fresh = world.database.pool(1);
    let events = events_after(&fresh, &EventFilter::default(), None, i64::MAX).await.unwrap();
    assert_eq!(events.len(), 5_000);
    assert_chains_hold(&world.journal, &events);
}

/// Two shippers of one journal take turns: none of them doubles what the other delivered.
#[tokio::test(flavor = "multi_thread")]
async fn two_shippers_of_one_journal_double_nothing() {
    let own = TestDatabase::new().await;
    let database = own.url();
    let world = World::new(database);
    let stop = CancellationToken::new();
    let first = tokio::spawn(world.shipper().run(stop.clone()));
    let second = tokio::spawn(world.shipper().run(stop.clone()));
    for round in 0..10 {
        append_all(&world.journal, (round * 100..(round + 1) * 100).map(call)).await;
    }
    world.journal.close().await;
    stop.cancel();
    tokio::time::timeout(AMPLE, async { (first.await.unwrap(), second.await.unwrap()) })
        .await
        .unwrap();
    let events = world.events().await;
    assert_eq!(events.len(), 1_000);
    assert_chains_hold(&world.journal, &events);
}

/// A database that went back to an earlier position gets again what it forgot.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_database_is_delivered_to_from_its_own_position() {
    let own = TestDatabase::new().await;
    let database = own.url();
    let world = World::new(database);
    append_all(&world.journal, (0..100).map(call)).await;
    world.drain().await;
    let mut admin = PgConnection::connect(database).await.unwrap();
    let hash = world.events().await[59].hash.0;
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
    append_all(&world.journal, (100..120).map(call)).await;
    world.drain().await;
    let events = world.events().await;
    assert_eq!(events.len(), 120);
    assert_chains_hold(&world.journal, &events);
}

/// A position that another journal has made is not gone on from.
#[tokio::test(flavor = "multi_thread")]
async fn a_position_of_another_history_stops_the_chain() {
    let own = TestDatabase::new().await;
    let database = own.url();
    let world = World::new(database);
    append_all(&world.journal, (0..10).map(call)).await;
    world.drain().await;
    let mut admin = PgConnection::connect(database).await.unwrap();
    sqlx::query("update audit_chains set delivered_hash = $1")
        .bind(&[7_u8; 32][..])
        .execute(&mut admin)
        .await
        .unwrap();
    append_all(&world.journal, (10..20).map(call)).await;
    let stop = CancellationToken::new();
    stop.cancel();
    world.shipper().run(stop).await;
    assert_eq!(world.events().await.len(), 10);
    assert_eq!(world.journal.stats().undelivered, 10);
}

/// A chain's name cannot be taken over.
#[tokio::test(flavor = "multi_thread")]
async fn a_chain_known_with_another_start_is_refused() {
    let own = TestDatabase::new().await;
    let database = own.url();
    let world = World::new(database);
    let mut connection = PgConnection::connect(database).await.unwrap();
    let mut link = world.journal.chain().clone();
    let registered = register_chain(&mut connection, &link).await.unwrap();
    assert_eq!(registered, link.root());
    assert_eq!(register_chain(&mut connection, &link).await.unwrap(), link.root());
    link.instance = "i-fedcba9876543210".into();
    assert!(register_chain(&mut connection, &link).await.is_err());
}

/// Rows of `changes` whose events are delivered say so, those alone, and in the same transaction.
#[tokio::test(flavor = "multi_thread")]
async fn delivered_changes_are_marked_as_audited() {
    let own = TestDatabase::new().await;
    let database = own.url();
    let world = World::new(database);
    sqlx::query("insert into callers (name) values ('billing'), ('search'), ('web')")
        .execute(&world.pool)
        .await
        .unwrap();
    let ids: Vec<i64> = sqlx::query_scalar("select id from changes order by id")
        .fetch_all(&world.pool)
        .await
        .unwrap();
    assert_eq!(ids.len(), 3);
    for id in &ids[..2] {
        let record = Record::new(day(0), Event::CallerChanged).with(CHANGE_ID, id.to_string());
        append(&world.journal, record).await;
    }
    world.drain().await;
    let audited: Vec<i64> =
        sqlx::query_scalar("select id from changes where audited_at is not null order by id")
            .fetch_all(&world.pool)
            .await
            .unwrap();
    assert_eq!(audited, ids[..2]);
}

/// A server that hangs does not hold the journal up, and the drain ends within its limit.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_database_holds_nobody_up() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgresql://nobody@{}/nowhere", silent.local_addr().unwrap());
    let world = World::new(&url);
    let stop = CancellationToken::new();
    let shipper = world.shipper().drain(Duration::from_millis(50));
    let shipping = tokio::spawn(shipper.run(stop.clone()));
    append_all(&world.journal, (0..1_000).map(call)).await;
    assert!(world.journal.is_writable());
    world.journal.close().await;
    stop.cancel();
    tokio::time::timeout(AMPLE, shipping).await.unwrap().unwrap();
    assert_eq!(world.journal.stats().undelivered, 1_000);
}

/// Reading back: filters, the order, and going on from where one was.
#[tokio::test(flavor = "multi_thread")]
async fn events_are_read_by_filter_and_in_pages() {
    let own = TestDatabase::new().await;
    let database = own.url();
    let world = World::new(database);
    for nth in 0..10 {
        let mut record = call(nth % 5);
        record.at = day(nth);
        record.caller = Some(format!("caller-{}", nth % 2));
        append(&world.journal, record).await;
    }
    world.drain().await;
    let all = world.events().await;
    let mut paged: Vec<StoredEvent> = Vec::new();
    loop {
        let after = paged.last().map(|event| (event.at, event.chain.clone(), event.seq));
        let page = events_after(&world.pool, &EventFilter::default(), after, 3).await.unwrap();
        if page.is_empty() {
            break;
        }
        paged.extend(page);
    }
    assert_eq!(paged, all);
    let count = async |filter: EventFilter| {
        events_after(&world.pool, &filter, None, 100).await.unwrap().len()
    };
    let none = EventFilter::default;
    assert_eq!(count(EventFilter { account: Some("acme-1".into()), ..none() }).await, 2);
    assert_eq!(count(EventFilter { caller: Some("caller-0".into()), ..none() }).await, 5);
    assert_eq!(count(EventFilter { event: Some("started".into()), ..none() }).await, 0);
    assert_eq!(count(EventFilter { outcome: Some("ok".into()), ..none() }).await, 10);
    let (since, until) = (Some(day(2)), Some(day(5)));
    assert_eq!(count(EventFilter { since, until, ..none() }).await, 3);
    let latest = latest_events(&world.pool, &none(), 4).await.unwrap();
    assert_eq!(latest, all[6..]);
    // What serves as `audit tail --json` reads back as the same record.
    let line = serde_json::to_string(&latest[0]).unwrap();
    assert_eq!(serde_json::from_str::<StoredEvent>(&line).unwrap(), latest[0]);
}

/// A partition that somebody dropped while the shipper was connected is made again.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_missing_is_made_again() {
    let own = TestDatabase::new().await;
    let world = World::new(own.url());
    let stop = CancellationToken::new();
    let shipping = tokio::spawn(world.shipper().run(stop.clone()));
    append(&world.journal, Record::new(day(0), Event::GetToken)).await;
    eventually("delivery", async || (world.events().await.len() == 1).then_some(())).await;
    // The shipper knows this day's to be there, since it made it ahead.
    own.sql("drop table audit_events_20241005").await;
    append_all(&world.journal, (0..3).map(|_| Record::new(day(1), Event::GetToken))).await;
    world.journal.close().await;
    stop.cancel();
    tokio::time::timeout(AMPLE, shipping).await.unwrap().unwrap();
    let events = world.events().await;
    assert_eq!(events.len(), 4);
    assert_chains_hold(&world.journal, &events);
}

/// What the database lost and the journal has not any more stays a gap, and holds up nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_database_gets_what_the_journal_still_has() {
    let own = TestDatabase::new().await;
    let settings =
        JournalSettings { segment_bytes: 8_000, max_bytes: 32_000, ..JournalSettings::default() };
    let world = World::with(own.url(), settings);
    for round in 0..10 {
        append_all(&world.journal, (round * 20..(round + 1) * 20).map(call)).await;
        world.drain().await;
    }
    let hash = world.events().await[9].hash.0;
    own.sql(
        "set session_replication_role = replica; delete from audit_events where seq > 10;
         set session_replication_role = origin",
    )
    .await;
    sqlx::query("update audit_chains set delivered_seq = 10, delivered_hash = $1")
        .bind(&hash[..])
        .execute(&world.pool)
        .await
        .unwrap();
    append_all(&world.journal, (200..220).map(call)).await;
    let first = world.journal.chains()[0].before.seq + 1;
    assert!(first > 11, "the first segments went for want of room");
    world.drain().await;
    let seqs: Vec<_> = world.events().await.iter().map(|event| event.seq).collect();
    assert_eq!(seqs, (1..=10).chain(first..=220).collect::<Vec<_>>());
}
