//! Measures the audit log: appending to the journal, delivery to Postgres, verification and export, all
//! in records a second. It uses a new database on the server of `DATABASE_URL`, or on an embedded one.
//!
//!     cargo bench --bench audit [-- RECORDS]
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark prints its results, and panics when it fails"
)]

#[expect(dead_code, reason = "the tests use what this benchmark does not")]
#[path = "../tests/harness/mod.rs"]
mod harness;

use std::{
    env, fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use token_broker::{
    audit::{
        journal::{Journal, JournalSettings, SyncMode},
        record::{Event, Record},
    },
    crypto::Keyring,
    domain::{account::AccountName, clock::Clock, token::Generation},
    files::state_dir::StateDir,
    services::journal_delivery::JournalDelivery,
    store::Database,
};
use tokio_util::sync::CancellationToken;

use self::harness::database::TestDatabase;

const PROGRAM: &str = env!("CARGO_BIN_EXE_token-broker");
/// How many records are appended by default.
const RECORDS: usize = 400_000;
/// How many tasks append records, each waiting until its record is durable.
const IN_FLIGHT: usize = 200;
/// A time limit that is never reached.
const NO_LIMIT: Duration = Duration::from_mins(10);

fn main() {
    let records = env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(RECORDS);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(measure(records));
}

async fn measure(records: usize) {
    let test_database = TestDatabase::new().await;
    let url = test_database.url();
    let database = Database::new(url, "bench").unwrap();

    let home = tempfile::tempdir().unwrap();
    println!("{:<44} {:>12}", "", "records/s");
    for (name, sync) in [("fsync", SyncMode::Fsync), ("write", SyncMode::Write)] {
        let journal = open(&home.path().join(name), sync);
        let took = append(&journal, records).await;
        row(&format!("append, {IN_FLIGHT} in flight, {name}"), records, took);
        journal.close().await;
    }

    // The records that the journal `write` holds have not been delivered, as after an outage of
    // Postgres. Opening the journal again makes them the backlog of earlier chains.
    let state = home.path().join("write");
    let journal = open(&state, SyncMode::Fsync);
    let delivered = deliver(&journal, &database).await;
    row("delivery of a backlog", records, delivered);
    journal.close().await;
    let journal = open(&home.path().join("fsync"), SyncMode::Fsync);
    let (delivered, appended) =
        tokio::join!(deliver(&journal, &database), append_during_delivery(&journal));
    row("delivery of a backlog while serving", records, delivered);
    println!("{:<44} {:>12.0}", "  and durable appends meanwhile", appended);
    journal.close().await;

    let keyring = home.path().join("keyring");
    Keyring::create_file(&keyring, Clock::System.now()).unwrap();
    let run = |arguments: &[&str], out: Stdio| {
        let begun = Instant::now();
        let mut command = Command::new(PROGRAM);
        command.args(arguments).env("DATABASE_URL", url).stdout(out).stderr(Stdio::null());
        let status = command.env("TOKEN_BROKER_KEYRING_FILE", &keyring).status().unwrap();
        assert!(status.success(), "{arguments:?}: {status}");
        begun.elapsed()
    };
    let export = home.path().join("export.jsonl");
    let took = run(&["audit", "verify"], Stdio::null());
    row("verify, Postgres", 2 * records, took);
    let took = run(&["audit", "verify", "--journal", state.to_str().unwrap()], Stdio::null());
    row("verify, journal", records, took);
    let took = run(&["audit", "export"], fs::File::create(&export).unwrap().into());
    row("export", 2 * records, took);
    let took = run(&["audit", "verify", "--export", export.to_str().unwrap()], Stdio::null());
    row("verify, export", 2 * records, took);
}

fn row(name: &str, records: usize, took: Duration) {
    #[expect(clippy::cast_precision_loss, reason = "the rate is only printed")]
    let rate = records as f64 / took.as_secs_f64();
    println!("{name:<44} {rate:>12.0}");
}

fn open(path: &Path, sync: SyncMode) -> Journal {
    let state_dir = StateDir::open(path).unwrap();
    let settings = JournalSettings { sync, ..JournalSettings::default() };
    Journal::open(&state_dir, settings, Clock::System).unwrap()
}

/// Returns a record as the broker writes it for a `GetToken` call.
fn call_record(nth: usize) -> Record {
    let account: AccountName = format!("account-{}", nth % 1_000).parse().unwrap();
    let at = Clock::System.now();
    let mut record = Record::new(at, Event::GetToken)
        .account(&account)
        .token(Generation(112_538_995_867_648_000), "f1234abcd:0123456789abcdef0123456789abcdef");
    record.caller = Some("billing".into());
    record.caller_kind = Some("bearer");
    record.peer = Some("10.1.2.3:45678".into());
    record.latency_us = Some(412);
    record
}

/// Appends `records` records, and returns how long it took until all were durable.
async fn append(journal: &Journal, records: usize) -> Duration {
    let begun = Instant::now();
    let each = records / IN_FLIGHT;
    let callers: Vec<_> = (0..IN_FLIGHT)
        .map(|caller| {
            let journal = journal.clone();
            tokio::spawn(async move {
                for nth in 0..each {
                    journal
                        .append(call_record(caller * each + nth))
                        .durable(NO_LIMIT)
                        .await
                        .unwrap();
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    begun.elapsed()
}

/// Delivers the records of earlier chains, and returns how long it took.
async fn deliver(journal: &Journal, database: &Database) -> Duration {
    let begun = Instant::now();
    let stop = CancellationToken::new();
    let delivery = JournalDelivery::new(journal.clone(), database.clone()).drain(NO_LIMIT);
    let task = tokio::spawn(delivery.run(stop.clone()));
    while !journal.earlier_chains_delivered() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = begun.elapsed();
    stop.cancel();
    task.await.unwrap();
    took
}

/// Appends 2,000 records a second until the backlog is delivered, and returns how many of them became
/// durable a second.
async fn append_during_delivery(journal: &Journal) -> f64 {
    let (begun, mut durable) = (Instant::now(), 0_u32);
    let mut ticks = tokio::time::interval(Duration::from_millis(5));
    while !journal.earlier_chains_delivered() {
        ticks.tick().await;
        for appended in (0..10).map(|nth| journal.append(call_record(nth))).collect::<Vec<_>>() {
            appended.durable(NO_LIMIT).await.unwrap();
            durable += 1;
        }
    }
    f64::from(durable) / begun.elapsed().as_secs_f64()
}
