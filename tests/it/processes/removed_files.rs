//! Other programs remove, move, truncate or replace files of the state directory of a running broker: every answer
//! that was received is recorded and delivered, or the loss is recorded.

use std::{
    fs::{self, File},
    io::ErrorKind::NotFound,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::Duration,
};

use nix::sys::signal::Signal;
use token_broker::{
    audit::{
        chain::{ChainHead, Digest},
        checkpoint::SignedCheckpoint,
    },
    crypto::{Keyring, bearer::Bearer},
    domain::clock::Clock,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::harness::{
    broker::{Fixture, TestClient},
    database_proxy::DatabaseProxy,
    eventually,
    http::http,
    process::{BrokerProcess, BrokerSetup},
};

/// What another program does: its name, and a function of the state directory.
type Disturbance = (&'static str, fn(&Path));

/// What is done to the state directory, under load.
const DISTURBANCES: &[Disturbance] = &[
    ("the files are removed", |state| each(state, |file| drop(fs::remove_file(file)))),
    ("the files are moved", |state| each(state, moved)),
    ("the files are moved, and created empty", |state| {
        each(state, |file| {
            moved(file);
            let _ = File::create(file);
        });
    }),
    ("the files are copied and truncated", |state| {
        each(state, |file| {
            let _ = fs::copy(file, file.with_extension("1"));
            let _ = File::create(file);
        });
    }),
    ("the directory is removed", |state| {
        // The broker may create a file in it meanwhile.
        while fs::remove_dir_all(state.join("journal")).is_err_and(|error| error.kind() != NotFound)
        {
        }
    }),
    ("the directory is replaced", |state| {
        let old = state.join(format!("old-{}", fs::read_dir(state).unwrap().count()));
        fs::rename(state.join("journal"), old).unwrap();
        // The broker may have been faster.
        let _ = fs::create_dir(state.join("journal"));
    }),
    ("the state directory is emptied", |state| {
        for entry in fs::read_dir(state).unwrap() {
            let path = entry.unwrap().path();
            // A temporary file may be gone already.
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }),
    ("the state directory is moved", |state| {
        fs::rename(state, state.with_extension("old")).unwrap();
    }),
];

fn each(state: &Path, disturb: impl Fn(&Path)) {
    for entry in fs::read_dir(state.join("journal")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|it| it == "jsonl") {
            disturb(&path);
        }
    }
}

/// Moves a file, unless the broker has removed it meanwhile.
fn moved(file: &Path) {
    let _ = fs::rename(file, file.with_extension("1"));
}

/// A broker under load, which reaches its database through a proxy.
struct Load {
    fixture: Fixture,
    proxy: DatabaseProxy,
    setup: BrokerSetup,
    serve: BrokerProcess,
    received: Arc<AtomicI64>,
    stop: CancellationToken,
    callers: Vec<JoinHandle<()>>,
}

impl Load {
    async fn start() -> Self {
        let fixture = Fixture::new().await;
        let proxy = DatabaseProxy::start(fixture.database.url()).await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        let setup = BrokerSetup::new(proxy.url(), &fixture.upstream.base_url()).await;
        let serve = setup.serve().await;
        let (received, stop) = (Arc::default(), CancellationToken::new());
        let client = TestClient::connect(&setup.endpoint(), &bearer).await;
        eventually("a token", async || client.get("acme").await.ok()).await;
        let mut load = Self { fixture, proxy, setup, serve, received, stop, callers: vec![] };
        load.received.fetch_add(1, Relaxed);
        for _ in 0..2 {
            load.call(&bearer).await;
        }
        load
    }

    async fn call(&mut self, bearer: &Bearer) {
        let client = TestClient::connect(&self.setup.endpoint(), bearer).await;
        let (received, stop) = (self.received.clone(), self.stop.clone());
        self.callers.push(tokio::spawn(async move {
            while !stop.is_cancelled() {
                match client.get("acme").await {
                    Ok(_) => drop(received.fetch_add(1, Relaxed)),
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        }));
    }

    async fn until_more_received(&self, more: i64) {
        let enough = self.received.load(Relaxed) + more;
        eventually("answers", async || (self.received.load(Relaxed) >= enough).then_some(())).await;
    }

    fn state(&self) -> PathBuf {
        self.setup.directory.path().join("state")
    }

    async fn readyz(&self) -> String {
        http(self.setup.ops, "GET", "/readyz", "").await.1
    }

    async fn recorded(&self) -> i64 {
        let query = "select coalesce(sum(count), 0)::bigint from audit_events
            where event = 'get_token' and outcome = 'ok'";
        sqlx::query_scalar(query).fetch_one(self.fixture.database.pool()).await.unwrap()
    }

    /// Ends the calls and the broker, and returns its exit code.
    async fn end(&mut self) -> Option<i32> {
        self.stop.cancel();
        for caller in self.callers.drain(..) {
            caller.await.unwrap();
        }
        self.serve.signal(Signal::SIGTERM);
        self.serve.wait().await.code()
    }

    /// Runs a command that reaches the database directly.
    async fn verify(&mut self) -> crate::harness::process::CommandOutput {
        let direct = self.fixture.database.url().to_owned();
        self.setup.set("DATABASE_URL", &direct);
        self.setup.run(&["audit", "verify"]).await
    }
}

/// Promise 34: a journal file that was removed, moved or truncated is noticed before the next answer leaves, and what
/// is not delivered is written again.
#[tokio::test]
async fn whatever_other_programs_do_to_the_state_directory_every_answer_is_recorded_and_delivered()
{
    let mut load = Load::start().await;
    for (what, disturb) in DISTURBANCES {
        load.until_more_received(50).await;
        disturb(&load.state());
        load.until_more_received(50).await;
        eventually(what, async || load.state().join("lock").exists().then_some(())).await;
        let journal = load.readyz().await;
        assert!(
            journal.contains("can be written") && !journal.contains("lost"),
            "{what}: {journal}"
        );
        load.serve.assert_running();
    }
    // Without Postgres, what is undelivered exists in the journal only.
    load.proxy.disconnect();
    for (what, disturb) in DISTURBANCES {
        load.until_more_received(50).await;
        let _ = fs::remove_dir_all(load.state().with_extension("old"));
        disturb(&load.state());
        load.until_more_received(50).await;
        eventually(what, async || load.state().join("lock").exists().then_some(())).await;
    }
    DISTURBANCES[0].1(&load.state());
    load.proxy.forward();
    let log = load.serve.stderr();
    assert!(log.contains("its records were written again"), "{log}");
    assert_eq!(load.end().await, Some(0), "{}", load.serve.stderr());
    let received = load.received.load(Relaxed);
    let recorded = load.recorded().await;
    assert_eq!(recorded, received, "all calls were answered");
    load.verify().await.ok();
    // The next start is the same replica, and continues the log.
    let mut serve = load.setup.serve().await;
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
    load.verify().await.ok();
    let instances: i64 = sqlx::query_scalar("select count(*) from instances")
        .fetch_one(load.fixture.database.pool())
        .await
        .unwrap();
    assert_eq!(instances, 1);
}

/// The files vanish while the database is away, and then the broker is stopped or killed.
#[tokio::test]
async fn undelivered_records_survive_a_stop_or_a_kill_after_their_files_were_removed() {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut load = Load::start().await;
        load.proxy.disconnect();
        load.until_more_received(50).await;
        DISTURBANCES[0].1(&load.state());
        load.until_more_received(50).await;
        load.stop.cancel();
        for caller in load.callers.drain(..) {
            caller.await.unwrap();
        }
        load.serve.signal(signal);
        load.serve.wait().await;
        let received = load.received.load(Relaxed);
        let state = load.state();
        let direct = load.fixture.database.url().to_owned();
        load.setup.set("DATABASE_URL", &direct);
        load.setup.run(&["audit", "ship", state.to_str().unwrap()]).await.ok();
        assert_eq!(load.recorded().await, received, "{signal}");
        load.setup.run(&["audit", "verify"]).await.ok();
    }
}

/// What is done to the open files while nothing is delivered, without another trace than their contents.
const OVERWRITINGS: &[Disturbance] = &[
    ("the files are overwritten in place", |state| {
        each(state, |file| {
            let Ok(opened) = File::options().write(true).open(file) else { return };
            let len = usize::try_from(opened.metadata().unwrap().len()).unwrap();
            let _ = opened.write_all_at(&vec![b'x'; len], 0);
        });
    }),
    ("the files are truncated and extended", |state| {
        each(state, |file| {
            let Ok(len) = fs::metadata(file).map(|it| it.len()) else { return };
            let _ = File::create(file).and_then(|opened| opened.set_len(len));
        });
    }),
    ("a record is edited in place", |state| {
        each(state, |file| {
            let Ok(text) = fs::read_to_string(file) else { return };
            let Some(at) = text.rfind("get_token") else { return };
            let Ok(opened) = File::options().write(true).open(file) else { return };
            let _ = opened.write_all_at(b"got_token", at as u64);
        });
    }),
];

/// Promise 34, while a lock in Postgres holds delivery back: the broker delivers all the same, or keeps files that the
/// next start can deliver.
#[tokio::test]
async fn files_that_are_overwritten_in_place_before_their_delivery_are_written_again_from_memory() {
    for ends_locked in [false, true] {
        let mut load = Load::start().await;
        let mut lock = load.fixture.database.pool().begin().await.unwrap();
        sqlx::query("lock table audit_events in exclusive mode").execute(&mut *lock).await.unwrap();
        for (what, overwrite) in OVERWRITINGS {
            load.until_more_received(50).await;
            overwrite(&load.state());
            load.until_more_received(50).await;
            let ready = load.readyz().await;
            assert!(!ready.contains("records are lost"), "{what}: {ready}");
        }
        if ends_locked {
            OVERWRITINGS[0].1(&load.state());
            assert_eq!(load.end().await, Some(0), "{}", load.serve.stderr());
            lock.rollback().await.unwrap();
        } else {
            lock.rollback().await.unwrap();
            let received = load.received.load(Relaxed);
            eventually("delivery", async || (load.recorded().await >= received).then_some(()))
                .await;
            assert_eq!(load.end().await, Some(0), "{}", load.serve.stderr());
        }
        let received = load.received.load(Relaxed);
        let mut serve = load.setup.serve().await;
        eventually("delivery", async || (load.recorded().await >= received).then_some(())).await;
        serve.signal(Signal::SIGTERM);
        assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
        assert_eq!(load.recorded().await, received);
        load.verify().await.ok();
    }
}

#[tokio::test]
async fn a_delivered_chain_whose_files_are_gone_is_no_error() {
    let mut load = Load::start().await;
    assert_eq!(load.end().await, Some(0));
    let mut serve = load.setup.serve().await;
    each(&load.state(), |file| {
        if file.to_string_lossy().contains("c00000001-") {
            fs::remove_file(file).unwrap();
        }
    });
    eventually("the notice", async || {
        serve.stderr().contains("was removed before its time").then_some(())
    })
    .await;
    // A further record makes delivery look at all chains.
    load.fixture.add_account("other", "id-2", "SK.2").await;
    eventually("its record", async || {
        let recorded = load.fixture.audit_events("event = 'token_issued'").await;
        (recorded.len() == 2).then_some(())
    })
    .await;
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
    assert!(!serve.stderr().contains("cannot be read any further"), "{}", serve.stderr());
}

/// Promise 34: `audit verify` finds records that an instance claimed and Postgres lacks, also after the instance has
/// started again.
#[tokio::test]
async fn records_that_a_replica_reported_and_that_nobody_has_any_more_are_named_by_the_verification()
 {
    let mut load = Load::start().await;
    load.until_more_received(20).await;
    assert_eq!(load.end().await, Some(0));
    load.verify().await.ok();
    // The replica had reported more than it delivered, and its files were removed while it was stopped.
    let chain: String = sqlx::query_scalar("select chain from audit_chains")
        .fetch_one(load.fixture.database.pool())
        .await
        .unwrap();
    let delivered: i64 = sqlx::query_scalar("select delivered_seq from audit_chains")
        .fetch_one(load.fixture.database.pool())
        .await
        .unwrap();
    load.fixture.database.sql("update instances set journal_seq = journal_seq + 200").await;
    let reported: i64 = sqlx::query_scalar("select journal_seq from instances")
        .fetch_one(load.fixture.database.pool())
        .await
        .unwrap();
    DISTURBANCES[0].1(&load.state());
    let missing =
        format!("chain {chain}: records {} to {reported} are missing: replica i-", delivered + 1);
    let output = load.verify().await.failed();
    assert!(output.contains(&missing), "{output}");
    assert!(output.contains("it does NOT hold"), "{output}");

    // The next start replaces what was reported, and so records the loss.
    let mut serve = load.setup.serve().await;
    eventually("the record", async || {
        let recorded = load
            .fixture
            .audit_events("event = 'audit_gap' and outcome = 'data_loss' and detail ? 'lost_chain'")
            .await;
        (recorded.len() == 1).then_some(())
    })
    .await;
    serve.signal(Signal::SIGTERM);
    serve.wait().await;
    assert!(serve.stderr().contains("AUDIT RECORDS ARE LOST"), "{}", serve.stderr());
    let output = load.verify().await.failed();
    assert!(output.contains(&missing), "{output}");
}

/// Heartbeats end with the database, but heads are signed in the state directory without it.
#[tokio::test]
async fn records_that_only_a_signed_head_of_the_state_directory_knows_of_are_recorded_as_lost_once()
{
    let mut load = Load::start().await;
    load.until_more_received(20).await;
    assert_eq!(load.end().await, Some(0));
    let pool = load.fixture.database.pool();
    let chain: String =
        sqlx::query_scalar("select chain from audit_chains").fetch_one(pool).await.unwrap();
    let delivered: i64 =
        sqlx::query_scalar("select delivered_seq from audit_chains").fetch_one(pool).await.unwrap();
    let keyring_file = load.setup.settings().find(|(name, _)| name.ends_with("KEYRING_FILE"));
    let keyring = Keyring::load(Path::new(keyring_file.unwrap().1)).unwrap();
    let head = ChainHead { seq: delivered + 200, hash: Digest::ZERO };
    let head = SignedCheckpoint::new(&keyring, &chain, head, Clock::System.wall());
    let line = serde_json::to_string(&head).unwrap() + "\n";
    let heads = load.state().join("audit-heads.jsonl");
    fs::write(&heads, fs::read_to_string(&heads).unwrap() + &line).unwrap();
    DISTURBANCES[0].1(&load.state());

    let recorded = async || {
        let lost = "event = 'audit_gap' and outcome = 'data_loss' and detail ? 'lost_chain'";
        load.fixture.audit_events(lost).await.len()
    };
    for start in 0..2 {
        let mut serve = load.setup.serve().await;
        eventually("the record", async || (recorded().await == 1).then_some(())).await;
        serve.signal(Signal::SIGTERM);
        serve.wait().await;
        let is_logged = serve.stderr().contains("AUDIT RECORDS ARE LOST");
        assert_eq!(is_logged, start == 0, "{}", serve.stderr());
    }
    assert_eq!(recorded().await, 1);
    let missing = format!("chain {chain}: records {} to {} ", delivered + 1, delivered + 200);
    let output = load.verify().await.failed();
    assert!(output.contains(&missing), "{output}");
}
