//! Retention: what is over goes, what it proves stays.

use std::sync::Arc;

use futures_util::TryStreamExt;
use sqlx::Row;
use token_broker::{
    audit::verify::{Extent, Verdict, Verifier},
    crypto::{Keyring, VerifyingKeys},
    domain::clock::ManualClock,
    services::retention::Retention,
    store::audit::{EventFilter, Ledger},
};

use super::*;

const DAY: Duration = Duration::from_hours(24);

/// The journal's world with days of records in the past.
struct Past {
    world: World,
    database: TestDatabase,
    keyring: Arc<Keyring>,
    /// One moment for all: midnight may pass meanwhile.
    now: Timestamp,
}

impl Past {
    /// Each of the `days` last days has five calls and two changes, among each other.
    async fn of(days: i64) -> Self {
        let database = TestDatabase::new().await;
        let world = World::new(database.url());
        let now = Clock::System.now();
        for back in (1..=days).rev() {
            for nth in 0..7 {
                let at = now - TimeDelta::days(back);
                let event = if nth % 3 == 2 { Event::GrantChanged } else { Event::GetToken };
                append(&world.journal, Record::new(at, event)).await;
            }
        }
        world.drain().await;
        database.sql("update audit_retention set calls_days = 1, changes_days = 1").await;
        let keyring = Keyring::generate(Clock::System.now());
        Self { world, database, keyring: Arc::new(Keyring::parse(&keyring).unwrap()), now }
    }

    /// Has a broker's retention run once.
    async fn retain(&self, calls: Option<Duration>, changes: Option<Duration>) {
        let retention = Retention {
            database: self.world.database.clone(),
            keyring: self.keyring.clone(),
            clock: Clock::Manual(ManualClock::new(self.now)),
            calls,
            changes,
        };
        retention.remove_all().await;
    }

    /// How many records there are of each kind, by how many days they are past.
    async fn left(&self) -> Vec<(String, i64)> {
        sqlx::query(
            "select event || ' ' || ($1::timestamptz::date - at::date), count(*) from audit_events
             group by 1 order by 1",
        )
        .bind(self.now)
        .fetch_all(&self.world.pool)
        .await
        .unwrap()
        .into_iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect()
    }

    async fn verdict(&self) -> Verdict {
        let mut verifier = Verifier::new(Extent::Whole, Some(VerifyingKeys::from(&*self.keyring)));
        let mut ledger = Ledger::open(&self.world.pool).await.unwrap();
        for claim in ledger.claims().await.unwrap() {
            let root = claim.root();
            verifier.chain(claim, root);
        }
        for cut in ledger.cuts().await.unwrap() {
            verifier.cut(cut);
        }
        let filter = EventFilter::default();
        let events: Vec<_> = ledger.events(&filter).try_collect().await.unwrap();
        for event in &events {
            verifier.record(event);
        }
        verifier.finish()
    }

    async fn sql(&self, statements: &str) {
        self.database.sql(statements).await;
    }
}

fn days(counts: &[(&str, i64)]) -> Vec<(String, i64)> {
    counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_go_before_changes_and_what_is_left_is_proven() {
    let past = Past::of(5).await;
    past.retain(Some(3 * DAY), Some(4 * DAY)).await;
    let left = past.left().await;
    let expected = [
        ("get_token 1", 5),
        ("get_token 2", 5),
        ("get_token 3", 5),
        ("grant_changed 1", 2),
        ("grant_changed 2", 2),
        ("grant_changed 3", 2),
        ("grant_changed 4", 2),
    ];
    assert_eq!(left, days(&expected));
    let verdict = past.verdict().await;
    assert!(verdict.holds(), "{verdict:?}");
    assert_eq!((verdict.records(), verdict.chains[0].removed), (23, 12));

    // It becomes an event by the row that the removal left in `changes`.
    let told: Vec<(String, String, String)> = sqlx::query_as(
        "select operation, what->>'records', what->>'changes' from changes
         where table_name = 'audit_events' order by id",
    )
    .fetch_all(&past.world.pool)
    .await
    .unwrap();
    let row = |records: &str, changes: &str| ("prune".into(), records.into(), changes.into());
    assert_eq!(told, [row("7", "removed"), row("5", "kept")]);

    // Nothing is over any more; then the rest is.
    past.retain(Some(3 * DAY), Some(4 * DAY)).await;
    assert_eq!(past.left().await, left);
    past.retain(Some(DAY), Some(DAY)).await;
    assert_eq!(past.left().await, days(&[("get_token 1", 5), ("grant_changed 1", 2)]));
    let verdict = past.verdict().await;
    assert!(verdict.holds(), "{verdict:?}");
    assert_eq!((verdict.records(), verdict.chains[0].removed), (7, 28));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_retention_nothing_goes() {
    let past = Past::of(2).await;
    past.retain(None, None).await;
    assert_eq!(past.world.events().await.len(), 14);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_alone_go_where_changes_are_kept_for_ever() {
    let past = Past::of(3).await;
    past.retain(Some(DAY), None).await;
    let expected = [
        ("get_token 1", 5),
        ("grant_changed 1", 2),
        ("grant_changed 2", 2),
        ("grant_changed 3", 2),
    ];
    assert_eq!(past.left().await, days(&expected));
    assert!(past.verdict().await.holds());
    // What stayed can still not be changed, nor removed by hand.
    for statement in
        ["update audit_events set count = 2", "delete from audit_events", "truncate audit_events"]
    {
        let error = past.database.try_sql(statement).await.unwrap_err().to_string();
        assert!(error.contains("append-only"), "{error}");
    }
    let partition = "truncate audit_events_";
    let day = (past.now - TimeDelta::days(3)).format("%Y%m%d");
    let error = past.database.try_sql(&format!("{partition}{day}")).await.unwrap_err();
    assert!(error.to_string().contains("append-only"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_with_a_record_that_was_tampered_with_stays_as_evidence() {
    let past = Past::of(3).await;
    past.sql(
        "set session_replication_role = replica;
         update audit_events set caller = 'mallory' where seq = 2;
         set session_replication_role = origin",
    )
    .await;
    past.retain(Some(DAY), Some(DAY)).await;
    let left: Vec<i64> = past.world.events().await.iter().map(|event| event.seq).collect();
    assert_eq!(left, (1..=7).chain(15..=21).collect::<Vec<_>>(), "the tampered day and the last");
    let verdict = past.verdict().await;
    assert_eq!(verdict.faults, 1, "{verdict:?}");
    assert!(verdict.findings[0].fault.to_string().contains("record 2 was altered"));
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_no_cut_tells_of_are_not_removed_whoever_asks() {
    let past = Past::of(3).await;
    let day = |back| (past.now - TimeDelta::days(back)).format("%Y-%m-%d").to_string();
    for (back, words) in [(3, "have no signed cut"), (0, "not old enough"), (1, "not old enough")] {
        let prune = format!("select audit_prune('{}', true)", day(back));
        let error = past.database.try_sql(&prune).await.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(past.world.events().await.len(), 21);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_database_is_to_keep_stays_whatever_a_broker_is_told() {
    let past = Past::of(4).await;
    let least = async |least: &str| past.sql(&format!("update audit_retention set {least}")).await;
    least("calls_days = 2, changes_days = 3").await;
    past.retain(Some(DAY), Some(DAY)).await;
    let kept = [
        ("get_token 1", 5),
        ("get_token 2", 5),
        ("grant_changed 1", 2),
        ("grant_changed 2", 2),
        ("grant_changed 3", 2),
    ];
    assert_eq!(past.left().await, days(&kept));
    // Nor when it asks the database itself, in whatever calendar.
    for day in [past.now.format("%Y-%m-%d BC").to_string(), "-infinity".into(), "infinity".into()] {
        for call in ["audit_prune($, true)", "audit_hold($)", "audit_ensure_partition($)"] {
            let call = format!("select {}", call.replace('$', &format!("'{day}'")));
            let error = past.database.try_sql(&call).await.unwrap_err().to_string();
            assert!(error.contains("no audit record is of"), "{call}: {error}");
        }
    }
    for (back, changes_too) in [(2, false), (2, true), (3, true)] {
        let day = (past.now - TimeDelta::days(back)).format("%Y-%m-%d");
        let prune = format!("select audit_prune('{day}', {changes_too})");
        let error = past.database.try_sql(&prune).await.unwrap_err().to_string();
        assert!(error.contains("not old enough"), "{error}");
    }
    for (statement, words) in [
        ("delete from audit_retention", "append-only"),
        ("truncate audit_retention", "append-only"),
        ("insert into audit_retention default values", "audit_retention_pkey"),
        ("update audit_retention set calls_days = 0", "audit_retention_at_least_a_day"),
        ("update audit_retention set calls_days = 4", "audit_retention_changes_as_long"),
    ] {
        let error = past.database.try_sql(statement).await.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    least("changes_days = 3, calls_days = 2").await;
    let told: Vec<(String, String)> = sqlx::query_as(
        "select what->>'calls_days', what->>'changes_days' from changes
         where table_name = 'audit_retention' order by id",
    )
    .fetch_all(&past.world.pool)
    .await
    .unwrap();
    let row = |calls: &str, changes: &str| (calls.into(), changes.into());
    assert_eq!(told, [row("30 → 1", "30 → 1"), row("1 → 2", "1 → 3")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn days_that_somebody_reads_for_long_go_the_next_time() {
    let past = Past::of(5).await;
    let mut reading = past.world.pool.begin().await.unwrap();
    sqlx::query("select count(*) from audit_events").fetch_one(&mut *reading).await.unwrap();
    past.retain(Some(DAY), Some(DAY)).await;
    assert_eq!(past.world.events().await.len(), 35);
    let cuts: i64 = sqlx::query_scalar("select count(*) from audit_cuts")
        .fetch_one(&past.world.pool)
        .await
        .unwrap();
    assert_eq!(cuts, 0, "what could not be removed has no cut");
    drop(reading);
    past.retain(Some(DAY), Some(DAY)).await;
    assert_eq!(past.world.events().await.len(), 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_is_made_while_others_are_read_and_written() {
    let past = Past::of(1).await;
    // A report that takes long.
    let mut reading = past.world.pool.begin().await.unwrap();
    sqlx::query("select count(*) from audit_events").fetch_one(&mut *reading).await.unwrap();
    append(&past.world.journal, Record::new(day(0), Event::GetToken)).await;
    past.world.drain().await;
    drop(reading);
    let partitions: Vec<String> = sqlx::query_scalar(
        "select relname::text from pg_class where relname in
         ('audit_events_20241004', 'audit_events_20241005') order by 1",
    )
    .fetch_all(&past.world.pool)
    .await
    .unwrap();
    // The next day's is there before anybody needs it.
    assert_eq!(partitions, ["audit_events_20241004", "audit_events_20241005"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_remove_at_once_remove_each_record_once() {
    let past = Past::of(4).await;
    let removals = (0..4).map(|_| past.retain(Some(DAY), Some(DAY)));
    futures_util::future::join_all(removals).await;
    // Those that found another at it leave the rest to it, or to the next time.
    eventually("the rest", async || {
        past.retain(Some(DAY), Some(DAY)).await;
        (past.world.events().await.len() == 7).then_some(())
    })
    .await;
    let verdict = past.verdict().await;
    assert!(verdict.holds(), "{verdict:?}");
    assert_eq!(verdict.chains[0].removed, 21);
}
