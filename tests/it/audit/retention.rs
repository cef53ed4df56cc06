//! Retention: expired records are removed, and the log still verifies.

use std::sync::Arc;

use futures_util::TryStreamExt;
use sqlx::Row;
use token_broker::{
    audit::verify::{Extent, VerificationReport, Verifier},
    crypto::{Keyring, LiveKeyring, VerifyingKeys},
    domain::clock::ManualClock,
    services::retention::Retention,
    store::audit::{AuditSnapshot, EventFilter},
};

use super::*;

const DAY: Duration = Duration::from_hours(24);

/// A database with records of past days.
struct PastRecords {
    fixture: JournalFixture,
    database: TestDatabase,
    keyring: Arc<Keyring>,
    /// The time of the whole test: midnight may pass while it runs.
    now: Timestamp,
}

impl PastRecords {
    /// Creates five calls and two changes for each of the last `days` days.
    async fn of(days: i64) -> Self {
        let database = TestDatabase::new().await;
        let fixture = JournalFixture::new(database.url());
        let now = Clock::System.now();
        for back in (1..=days).rev() {
            for nth in 0..7 {
                let at = now - TimeDelta::days(back);
                let event = if nth % 3 == 2 { Event::GrantChanged } else { Event::GetToken };
                append(&fixture.journal, Record::new(at, event)).await;
            }
        }
        fixture.drain().await;
        database.sql("update audit_retention set calls_days = 1, changes_days = 1").await;
        let keyring = Keyring::generate(Clock::System.now());
        Self { fixture, database, keyring: Arc::new(Keyring::parse(&keyring).unwrap()), now }
    }

    /// Runs a broker's retention once.
    async fn run_retention(&self, calls: Option<Duration>, changes: Option<Duration>) {
        let retention = Retention {
            database: self.fixture.database.clone(),
            keyring: Arc::new(LiveKeyring::new(self.keyring.clone())),
            clock: Clock::Manual(ManualClock::new(self.now)),
            calls,
            changes,
        };
        retention.remove_expired().await;
    }

    /// The number of records by kind and age in days, such as `get_token 3`.
    async fn counts(&self) -> Vec<(String, i64)> {
        sqlx::query(
            "select event || ' ' || ($1::timestamptz::date - at::date), count(*) from audit_events
             group by 1 order by 1",
        )
        .bind(self.now)
        .fetch_all(&self.fixture.pool)
        .await
        .unwrap()
        .into_iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect()
    }

    async fn verify(&self) -> VerificationReport {
        let mut verifier = Verifier::new(Extent::Whole, Some(VerifyingKeys::from(&*self.keyring)));
        let mut snapshot = AuditSnapshot::open(&self.fixture.pool).await.unwrap();
        for claim in snapshot.claims().await.unwrap() {
            let claim = claim.unwrap();
            let root = claim.root();
            verifier.add_chain(claim, root);
        }
        for receipt in snapshot.receipts().await.unwrap() {
            verifier.add_receipt(receipt.unwrap());
        }
        let filter = EventFilter::default();
        let events: Vec<_> = snapshot.events(&filter).try_collect().await.unwrap();
        for event in &events {
            verifier.add_record(event.as_ref().unwrap());
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
async fn calls_are_removed_before_changes_and_the_rest_verifies() {
    let past = PastRecords::of(5).await;
    past.run_retention(Some(3 * DAY), Some(4 * DAY)).await;
    let remaining = past.counts().await;
    let expected = [
        ("get_token 1", 5),
        ("get_token 2", 5),
        ("get_token 3", 5),
        ("grant_changed 1", 2),
        ("grant_changed 2", 2),
        ("grant_changed 3", 2),
        ("grant_changed 4", 2),
    ];
    assert_eq!(remaining, days(&expected));
    let report = past.verify().await;
    assert!(report.holds(), "{report:?}");
    assert_eq!((report.records(), report.chains[0].removed), (23, 12));

    // Each removal leaves a row in `changes`, which becomes an event.
    let recorded: Vec<(String, String, String)> = sqlx::query_as(
        "select operation, what->>'records', what->>'changes' from changes
         where table_name = 'audit_events' order by id",
    )
    .fetch_all(&past.fixture.pool)
    .await
    .unwrap();
    let row = |records: &str, changes: &str| ("prune".into(), records.into(), changes.into());
    assert_eq!(recorded, [row("7", "removed"), row("5", "kept")]);

    // A second run removes nothing; with shorter settings it removes the rest.
    past.run_retention(Some(3 * DAY), Some(4 * DAY)).await;
    assert_eq!(past.counts().await, remaining);
    past.run_retention(Some(DAY), Some(DAY)).await;
    assert_eq!(past.counts().await, days(&[("get_token 1", 5), ("grant_changed 1", 2)]));
    let report = past.verify().await;
    assert!(report.holds(), "{report:?}");
    assert_eq!((report.records(), report.chains[0].removed), (7, 28));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_retention_settings_nothing_is_removed() {
    let past = PastRecords::of(2).await;
    past.run_retention(None, None).await;
    assert_eq!(past.fixture.events().await.len(), 14);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_calls_are_removed_where_changes_are_kept_for_ever() {
    let past = PastRecords::of(3).await;
    past.run_retention(Some(DAY), None).await;
    let expected = [
        ("get_token 1", 5),
        ("grant_changed 1", 2),
        ("grant_changed 2", 2),
        ("grant_changed 3", 2),
    ];
    assert_eq!(past.counts().await, days(&expected));
    assert!(past.verify().await.holds());
    // The remaining records still cannot be changed or removed by hand.
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
async fn a_day_with_a_tampered_record_is_kept_as_evidence() {
    let past = PastRecords::of(3).await;
    past.sql(
        "set session_replication_role = replica;
         update audit_events set caller = 'mallory' where seq = 2;
         set session_replication_role = origin",
    )
    .await;
    past.run_retention(Some(DAY), Some(DAY)).await;
    let remaining: Vec<i64> = past.fixture.events().await.iter().map(|event| event.seq).collect();
    assert_eq!(
        remaining,
        (1..=7).chain(15..=21).collect::<Vec<_>>(),
        "the tampered day and the last"
    );
    let report = past.verify().await;
    assert_eq!(report.faults, 1, "{report:?}");
    assert!(report.findings[0].fault.to_string().contains("record 2 was altered"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_removes_no_records_without_receipts() {
    let past = PastRecords::of(3).await;
    let day = |back| (past.now - TimeDelta::days(back)).format("%Y-%m-%d").to_string();
    for (back, words) in
        [(3, "have no signed pruning receipt"), (0, "not old enough"), (1, "not old enough")]
    {
        let prune = format!("select audit_prune('{}', true)", day(back));
        let error = past.database.try_sql(&prune).await.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(past.fixture.events().await.len(), 21);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_keeps_records_for_its_minimum_retention_whatever_the_settings() {
    let past = PastRecords::of(4).await;
    let set_minimum =
        async |values: &str| past.sql(&format!("update audit_retention set {values}")).await;
    set_minimum("calls_days = 2, changes_days = 3").await;
    past.run_retention(Some(DAY), Some(DAY)).await;
    let kept = [
        ("get_token 1", 5),
        ("get_token 2", 5),
        ("grant_changed 1", 2),
        ("grant_changed 2", 2),
        ("grant_changed 3", 2),
    ];
    assert_eq!(past.counts().await, days(&kept));
    // Direct calls of the database's functions are refused too, also with unusual dates.
    for day in [past.now.format("%Y-%m-%d BC").to_string(), "-infinity".into(), "infinity".into()] {
        for call in ["audit_prune($, true)", "audit_lock_day($)", "audit_ensure_partition($)"] {
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
    set_minimum("changes_days = 3, calls_days = 2").await;
    let recorded: Vec<(String, String)> = sqlx::query_as(
        "select what->>'calls_days', what->>'changes_days' from changes
         where table_name = 'audit_retention' order by id",
    )
    .fetch_all(&past.fixture.pool)
    .await
    .unwrap();
    let row = |calls: &str, changes: &str| (calls.into(), changes.into());
    assert_eq!(recorded, [row("30 → 1", "30 → 1"), row("1 → 2", "1 → 3")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn days_that_are_locked_by_a_reader_are_removed_at_the_next_run() {
    let past = PastRecords::of(5).await;
    let mut reading = past.fixture.pool.begin().await.unwrap();
    sqlx::query("select count(*) from audit_events").fetch_one(&mut *reading).await.unwrap();
    past.run_retention(Some(DAY), Some(DAY)).await;
    assert_eq!(past.fixture.events().await.len(), 35);
    let receipts: i64 = sqlx::query_scalar("select count(*) from audit_pruning_receipts")
        .fetch_one(&past.fixture.pool)
        .await
        .unwrap();
    assert_eq!(receipts, 0, "records that could not be removed have no receipts");
    drop(reading);
    past.run_retention(Some(DAY), Some(DAY)).await;
    assert_eq!(past.fixture.events().await.len(), 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_is_created_while_others_are_read_and_written() {
    let past = PastRecords::of(1).await;
    // A long-running report.
    let mut reading = past.fixture.pool.begin().await.unwrap();
    sqlx::query("select count(*) from audit_events").fetch_one(&mut *reading).await.unwrap();
    append(&past.fixture.journal, Record::new(day(0), Event::GetToken)).await;
    past.fixture.drain().await;
    drop(reading);
    let partitions: Vec<String> = sqlx::query_scalar(
        "select relname::text from pg_class where relname in
         ('audit_events_20241004', 'audit_events_20241005') order by 1",
    )
    .fetch_all(&past.fixture.pool)
    .await
    .unwrap();
    // The next day's partition exists before it is needed.
    assert_eq!(partitions, ["audit_events_20241004", "audit_events_20241005"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_run_retention_at_once_remove_each_record_once() {
    let past = PastRecords::of(4).await;
    let removals = (0..4).map(|_| past.run_retention(Some(DAY), Some(DAY)));
    futures_util::future::join_all(removals).await;
    // A replica that finds another removing records leaves the rest to it, or to its next run.
    eventually("the rest", async || {
        past.run_retention(Some(DAY), Some(DAY)).await;
        (past.fixture.events().await.len() == 7).then_some(())
    })
    .await;
    let report = past.verify().await;
    assert!(report.holds(), "{report:?}");
    assert_eq!(report.chains[0].removed, 21);
}
