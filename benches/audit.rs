//! How fast the audit log is: appending, delivery to Postgres, and proof. Runs a Postgres of its own, or
//! that of `DATABASE_URL`, in a database that must be empty.
//!
//!     cargo bench --bench audit [-- RECORDS]
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench prints, and ends at a fault"
)]

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
    dev::postgres::{DATABASE, EmbeddedPostgres, Place},
    domain::{account::AccountName, clock::Clock, token::Generation},
    files::state_dir::StateDir,
    services::journal_delivery::JournalDelivery,
    store::Database,
};
use tokio_util::sync::CancellationToken;

const PROGRAM: &str = env!("CARGO_BIN_EXE_token-broker");
const RECORDS: usize = 400_000;
const IN_FLIGHT: usize = 200;
const AMPLE: Duration = Duration::from_mins(10);

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
    let postgres = match env::var("DATABASE_URL") {
        Ok(_) => None,
        Err(_) => {
            Some(EmbeddedPostgres::start(Place::Temporary, Path::new(PROGRAM)).await.unwrap())
        }
    };
    let url =
        postgres.as_ref().map_or_else(|| env::var("DATABASE_URL").unwrap(), |it| it.url(DATABASE));
    let database = Database::new(&url, "bench").unwrap();
    database.migrate().await.unwrap();

    let home = tempfile::tempdir().unwrap();
    println!("{:<44} {:>12}", "", "records/s");
    for (name, sync) in [("fsync", SyncMode::Fsync), ("write", SyncMode::Write)] {
        let journal = open(&home.path().join(name), sync);
        let took = append(&journal, records).await;
        row(&format!("append, {IN_FLIGHT} in flight, {name}"), records, took);
        journal.close().await;
    }

    // The journal of `write`, which a new start finds undelivered, as after hours without Postgres.
    let state = home.path().join("write");
    let journal = open(&state, SyncMode::Fsync);
    let delivered = deliver(&journal, &database).await;
    row("delivery of a backlog", records, delivered);
    journal.close().await;
    let journal = open(&home.path().join("fsync"), SyncMode::Fsync);
    let (delivered, served) = tokio::join!(deliver(&journal, &database), serve_for(&journal));
    row("delivery of a backlog while serving", records, delivered);
    println!("{:<44} {:>12.0}", "  and durable appends meanwhile", served);
    journal.close().await;

    let keyring = home.path().join("keyring");
    Keyring::create_file(&keyring, Clock::System.now()).unwrap();
    let run = |arguments: &[&str], out: Stdio| {
        let begun = Instant::now();
        let mut command = Command::new(PROGRAM);
        command.args(arguments).env("DATABASE_URL", &url).stdout(out).stderr(Stdio::null());
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
    if let Some(postgres) = postgres {
        postgres.stop().await;
    }
}

fn row(name: &str, records: usize, took: Duration) {
    #[expect(clippy::cast_precision_loss, reason = "a rate for eyes")]
    let rate = records as f64 / took.as_secs_f64();
    println!("{name:<44} {rate:>12.0}");
}

fn open(path: &Path, sync: SyncMode) -> Journal {
    let state_dir = StateDir::open(path).unwrap();
    let settings = JournalSettings { sync, ..JournalSettings::default() };
    Journal::open(&state_dir, settings, Clock::System).unwrap()
}

/// A record as a served call makes it.
fn call(nth: usize) -> Record {
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

async fn append(journal: &Journal, records: usize) -> Duration {
    let begun = Instant::now();
    let each = records / IN_FLIGHT;
    let callers: Vec<_> = (0..IN_FLIGHT)
        .map(|caller| {
            let journal = journal.clone();
            tokio::spawn(async move {
                for nth in 0..each {
                    journal.append(call(caller * each + nth)).durable(AMPLE).await.unwrap();
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    begun.elapsed()
}

async fn deliver(journal: &Journal, database: &Database) -> Duration {
    let begun = Instant::now();
    let stop = CancellationToken::new();
    let shipper = JournalDelivery::new(journal.clone(), database.connection().clone()).drain(AMPLE);
    let shipping = tokio::spawn(shipper.run(stop.clone()));
    while !journal.earlier_chains_delivered() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = begun.elapsed();
    stop.cancel();
    shipping.await.unwrap();
    took
}

/// Appends at 2,000 a second until the backlog is delivered; how many a second became durable.
async fn serve_for(journal: &Journal) -> f64 {
    let (begun, mut served) = (Instant::now(), 0_u32);
    let mut ticks = tokio::time::interval(Duration::from_millis(5));
    while !journal.earlier_chains_delivered() {
        ticks.tick().await;
        for appended in (0..10).map(|nth| journal.append(call(nth))).collect::<Vec<_>>() {
            appended.durable(AMPLE).await.unwrap();
            served += 1;
        }
    }
    f64::from(served) / begun.elapsed().as_secs_f64()
}
