//! The commands `audit verify`, `export`, `who`, `ship` and `retire` on the log of a real broker.

use std::{fs, path::Path, process::Stdio};

use nix::sys::signal::Signal;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::harness::{
    broker::{Fixture, TestClient},
    database::TestDatabase,
    database_proxy::DatabaseProxy,
    eventually,
    process::{BrokerSetup, CommandOutput},
};

/// A broker that was started and stopped twice, so that its log has two chains, and a token of it.
struct StoppedBroker {
    fixture: Fixture,
    setup: BrokerSetup,
    token: String,
    /// The log lines of both starts.
    log: String,
}

impl StoppedBroker {
    async fn new() -> Self {
        let fixture = Fixture::new().await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
        let (mut token, mut log) = (String::new(), String::new());
        for _ in 0..2 {
            let mut serve = setup.serve().await;
            let client = TestClient::connect(&setup.endpoint(), &bearer).await;
            token =
                eventually("a token", async || client.get("acme").await.ok()).await.access_token;
            for _ in 0..5 {
                client.get("acme").await.unwrap();
                client.get("unknown").await.unwrap_err();
            }
            serve.signal(Signal::SIGTERM);
            assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
            log += &serve.stderr();
        }
        Self { fixture, setup, token, log }
    }

    fn state(&self) -> std::path::PathBuf {
        self.setup.directory.path().join("state")
    }

    /// The file of signed checkpoints.
    fn heads(&self) -> String {
        self.state().join("audit-heads.jsonl").to_str().unwrap().to_owned()
    }

    /// Names of the two chains, in order.
    async fn chains(&self) -> [String; 2] {
        let chains: Vec<String> =
            sqlx::query_scalar("select chain from audit_chains order by chain")
                .fetch_all(self.fixture.database.pool())
                .await
                .unwrap();
        chains.try_into().unwrap()
    }

    /// A copy of the database that a superuser tampered with. The commands use it from now on.
    async fn tampered(&mut self, what: &str) -> TestDatabase {
        let copy = self.fixture.database.copy().await;
        copy.sql(&format!("set session_replication_role = replica; {what}")).await;
        self.setup.set("DATABASE_URL", copy.url());
        copy
    }

    async fn verify(&self, more: &[&str]) -> CommandOutput {
        self.setup.run(&[&["audit", "verify"], more].concat()).await
    }

    fn file(&self, name: &str, text: &str) -> String {
        let file = self.setup.directory.path().join(name);
        fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    }
}

/// Runs `docs/verify.py`, a verifier that shares no code with the broker.
async fn python(arguments: &[&str]) -> Option<CommandOutput> {
    let verifier = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/verify.py");
    let mut command = Command::new("python3");
    command.arg(verifier).args(arguments).stdin(Stdio::null());
    match command.output().await {
        Ok(output) => {
            let text = |bytes| String::from_utf8(bytes).unwrap();
            let (code, stdout) = (output.status.code(), text(output.stdout));
            Some(CommandOutput { code, stdout, stderr: text(output.stderr) })
        }
        Err(error) => {
            // Python is required where changes are checked before they are merged.
            assert!(std::env::var_os("CI").is_none(), "python3: {error}");
            None
        }
    }
}

#[tokio::test]
async fn a_log_verifies_in_the_database_in_the_journal_and_in_an_export_by_two_verifiers() {
    let stopped = StoppedBroker::new().await;
    let heads = stopped.heads();
    let ran = stopped.verify(&["--head", &heads]).await;
    assert!(ran.stderr.contains("2 chains: all of it holds"), "{ran:?}");
    assert!(!ran.stderr.contains("note:"), "{ran:?}");
    let table = ran.ok();
    assert_eq!(table.lines().count(), 3, "{table}");

    let journal = stopped.state();
    stopped.verify(&["--journal", journal.to_str().unwrap(), "--head", &heads]).await.ok();

    let export = stopped.setup.run(&["audit", "export"]).await.ok();
    let export = stopped.file("export.jsonl", &export);
    let keys = stopped.setup.run(&["keys", "public", "--signing"]).await.ok();
    let keys = stopped.file("keys.pem", &keys);
    let verified = ["--export", &export, "--whole", "--keys", &keys, "--head", &heads, "--json"];
    let ran = stopped.verify(&verified).await.ok();
    let report: serde_json::Value = serde_json::from_str(&ran).unwrap();
    assert_eq!((&report["holds"], &report["notices"]), (&true.into(), &serde_json::json!([])));
    // The broker's log has the same checkpoints.
    let log = stopped.file("broker.log", &stopped.log);
    let by_log = ["--export", &export, "--keys", &keys, "--head", &log, "--json"];
    assert_eq!(stopped.verify(&by_log).await.ok(), ran);
    let events = sqlx::query_scalar::<_, i64>("select count(*) from audit_events");
    let events = events.fetch_one(stopped.fixture.database.pool()).await.unwrap();
    assert_eq!(report["records"], events);
    for chain in report["chains"].as_array().unwrap() {
        assert_eq!(
            chain["signed_seq"], chain["last_seq"],
            "the last checkpoint covers the end: {chain}"
        );
    }

    if let Some(ran) = python(&["--keys", &keys, "--heads", &heads, &export]).await {
        let output = ran.ok();
        for chain in report["chains"].as_array().unwrap() {
            let (chain, seq, hash) = (&chain["chain"], &chain["last_seq"], &chain["last_hash"]);
            let line = format!("{} {seq} {}", chain.as_str().unwrap(), hash.as_str().unwrap());
            assert!(output.contains(&line), "{output}");
        }
        let compared = output.lines().last().unwrap();
        let (count, of) = compared.split_once(" of ").unwrap();
        assert!(count != "0" && of.starts_with(&format!("{count} checkpoints")), "{compared}");
    }
    // Without a key or a checkpoint in what was given, nothing would be verified with it.
    for (option, given, message) in
        [("--keys", &heads, "there is no key in"), ("--heads", &keys, "there is no checkpoint in")]
    {
        if let Some(ran) = python(&[option, given, &export]).await {
            let output = ran.failed();
            assert!(output.contains(message), "{output}");
        }
    }
}

/// Whoever holds an export cannot hide that records are missing by calling the file a part of the log.
#[tokio::test]
async fn a_thinned_export_does_not_pass_for_the_log() {
    let stopped = StoppedBroker::new().await;
    let export = stopped.setup.run(&["audit", "export"]).await.ok();
    let lines: Vec<_> = export.lines().collect();
    let is_record = |line: &&str| line.contains("\"event\":");
    let records = lines.iter().filter(|line| is_record(line)).count();
    let second = lines.iter().position(is_record).unwrap() + 1;
    let part = "a part of the log: missing records cannot be detected";
    let thinned = |header: Option<&str>, end: bool, removed: Option<usize>| {
        let kept = lines.iter().enumerate().filter(|(n, line)| {
            *n > 0 && removed != Some(*n) && (end || !line.contains("\"end\":"))
        });
        let left = records - usize::from(removed.is_some());
        let kept = kept.map(|(_, line)| {
            line.replace(&format!("{{\"records\":{records}}}"), &format!("{{\"records\":{left}}}"))
        });
        let header = header.map(ToOwned::to_owned);
        header.into_iter().chain(kept).map(|line| line + "\n").collect::<String>()
    };
    let whole = lines[0];
    assert!(whole.contains("\"whole\":true"), "{whole}");
    let partial = whole.replace("\"whole\":true", "\"whole\":false");
    let without = whole.replace(",\"whole\":true", "").replace("\"whole\":true,", "");
    // Header, whether the end is there, which line is removed; what it says, also with --part.
    for (name, header, end, removed, says, as_part) in [
        ("nothing removed", Some(whole), true, None, "", true),
        ("a record removed", Some(whole), true, Some(second), "is missing", false),
        ("called a part", Some(&*partial), true, Some(second), part, true),
        ("called nothing", Some(&*without), true, Some(second), part, true),
        ("without header and end", None, false, Some(second), part, true),
        ("without a header", None, true, Some(second), part, true),
        ("without an end", Some(&*partial), false, Some(second), "is incomplete", false),
        ("called a part, nothing removed", Some(&*partial), true, None, part, true),
    ] {
        let file = stopped.file("thinned.jsonl", &thinned(header, end, removed));
        let Some(ran) = python(&[&file]).await else { return };
        assert_eq!(ran.code, Some(i32::from(!says.is_empty())), "{name}: {ran:?}");
        assert!(ran.stdout.contains(says), "{name}: {ran:?}");
        let ran = python(&["--part", &file]).await.unwrap();
        assert_eq!(ran.code, Some(i32::from(!as_part)), "{name}: {ran:?}");
    }
}

#[tokio::test]
async fn any_tampering_with_the_log_is_found_and_named() {
    let mut stopped = StoppedBroker::new().await;
    let (heads, [first, last]) = (stopped.heads(), stopped.chains().await);
    stopped.fixture.database.pool().close().await;
    let of_first = format!("chain = '{first}'");
    let cases = [
        (format!("update audit_events set caller = 'm' where {of_first} and seq = 3"), &first, "record 3 was altered"),
        (format!("update audit_events set detail = '{{\"a\":\"b\"}}' where {of_first} and seq = 1"), &first, "record 1 was altered"),
        (format!("delete from audit_events where {of_first} and seq = 4"), &first, "record 4 is missing"),
        (
            format!("update audit_events set seq = 9 - seq where {of_first} and seq in (4, 5)"),
            &first,
            "record 4 was altered",
        ),
        (
            format!("create temp table again as select * from audit_events where {of_first} and seq = 2;
                update again set at = at + interval '1 s'; insert into audit_events select * from again"
            ),
            &first,
            "record 2 was altered",
        ),
        (format!("delete from audit_events where {of_first} and seq > 5"), &first, "are missing"),
        (
            format!("delete from audit_events where {of_first}; delete from audit_heads where {of_first};
                delete from audit_chains where {of_first}"),
            &first,
            "it is missing as a whole",
        ),
        (
            format!("delete from audit_events where {of_first}; delete from audit_heads where {of_first};
                delete from audit_chains where {of_first}; update audit_chains set linked_chain = null"),
            &last,
            "names none",
        ),
        (format!("update audit_heads set seq = seq - 1 where chain = '{last}'"), &last, "is not valid"),
        (
            format!("insert into audit_pruning_receipts (chain, first_seq, prev_hash, last_seq, hash, at, key_id, signature)
                select chain, seq, prev_hash, seq, hash, at, 'h', '' from audit_events where {of_first} and seq = 4;
                delete from audit_events where {of_first} and seq = 4"),
            &first,
            "the receipt for records 4 to 4 is not valid",
        ),
    ];
    for (tampering, chain, words) in cases {
        let _copy = stopped.tampered(&tampering).await;
        let output = stopped.verify(&[]).await.failed();
        // Changes whose records are gone are named, too.
        let line = output.lines().find(|line| line.starts_with("chain ")).unwrap();
        assert!(
            line.starts_with(&format!("chain {chain}: ")) && line.contains(words),
            "{tampering}: {output}"
        );
    }

    // Consistent tampering, also with what the replicas reported, is found by checkpoints that were stored elsewhere.
    for (tampering, words) in [
        (
            format!("delete from audit_events where chain = '{last}' and seq > 5;
                delete from audit_heads where chain = '{last}';
                update audit_chains set delivered_seq = 5, delivered_hash = (select hash from audit_events
                    where chain = '{last}' and seq = 5) where chain = '{last}'; delete from instances"),
            "it ends with record 5, and a signed head is of record",
        ),
        (
            format!("delete from audit_events where chain = '{last}';
                delete from audit_heads where chain = '{last}'; delete from audit_chains where chain = '{last}';
                delete from instances"),
            "there is a signed head of it, and nothing else",
        ),
    ] {
        let _copy = stopped.tampered(&tampering).await;
        stopped.verify(&[]).await.ok();
        let output = stopped.verify(&["--head", &heads]).await.failed();
        assert!(output.contains(&format!("chain {last}: {words}")), "{output}");
    }
}

#[tokio::test]
async fn a_changed_or_truncated_export_or_journal_is_refused() {
    let stopped = StoppedBroker::new().await;
    let [first, _] = stopped.chains().await;
    let export = stopped.setup.run(&["audit", "export"]).await.ok();
    let edited = export.replacen("\"account\":\"unknown\"", "\"account\":\"another\"", 1);
    let edited = stopped.file("edited.jsonl", &edited);
    let output = stopped.verify(&["--export", &edited]).await.failed();
    assert!(
        output.starts_with(&format!("chain {first}: record")) && output.contains("was altered"),
        "{output}"
    );
    if let Some(ran) = python(&[&edited]).await {
        assert!(ran.failed().contains("was altered"));
    }
    // A time with more digits than are hashed is refused, so that no other record can pass for this one.
    let (before, after) = export.split_once("\"get_token\"").unwrap();
    let (before, time) = before.rsplit_once("\"at\":\"").unwrap();
    let time = time.replacen('Z', "1Z", 1);
    let finer =
        stopped.file("finer.jsonl", &format!("{before}\"at\":\"{time}\"get_token\"{after}"));
    let output = stopped.verify(&["--export", &finer]).await.failed();
    assert!(output.contains("a time is not in whole microseconds"), "{output}");
    if let Some(ran) = python(&[&finer]).await {
        assert!(ran.failed().contains("was altered"));
    }
    let without = |chain: &str| {
        export.split_inclusive('\n').filter(|line| !line.contains(chain)).collect::<String>()
    };
    let [_, last] = stopped.chains().await;
    let (first_gone, last_gone) = (
        stopped.file("first.jsonl", &without(&first)),
        stopped.file("last.jsonl", &without(&last)),
    );
    for (file, heads) in [(&first_gone, None), (&last_gone, Some(stopped.heads()))] {
        let heads = heads.iter().flat_map(|heads| ["--heads", heads]);
        if let Some(ran) = python(&heads.chain([file.as_str()]).collect::<Vec<_>>()).await {
            ran.failed();
        }
    }
    let lines: Vec<_> = export.lines().collect();
    let cut = stopped.file("cut.jsonl", &lines[..lines.len() - 1].join("\n"));
    let output = stopped.verify(&["--export", &cut]).await.failed();
    assert!(output.contains("its last line is missing"), "{output}");
    if let Some(ran) = python(&[&cut]).await {
        let output = ran.failed();
        assert!(output.contains("the file is incomplete"), "{output}");
    }
    let shorter = [&lines[..lines.len() - 2], &lines[lines.len() - 1..]].concat().join("\n");
    let shorter = stopped.file("shorter.jsonl", &shorter);
    let output = stopped.verify(&["--export", &shorter]).await.failed();
    assert!(output.contains("it ends after"), "{output}");
    // A partial export in which nothing else shows that a record is gone.
    let partial = export.replacen("\"whole\":true", "\"whole\":false", 1);
    let lines_of_part: Vec<_> = partial.lines().collect();
    let end = lines_of_part.len() - 1;
    let shorter_part = [&lines_of_part[..end - 1], &lines_of_part[end..]].concat().join("\n");
    let shorter_part = stopped.file("shorter-part.jsonl", &shorter_part);
    if let Some(ran) = python(&[&shorter_part]).await {
        let output = ran.failed();
        assert!(output.contains("records, and it has"), "{output}");
    }
    let no_export = stopped.file("none.jsonl", "a line of something else\n");
    let output = stopped.verify(&["--export", &no_export]).await.failed();
    assert!(output.contains("none.jsonl, line 1: neither a record nor"), "{output}");

    // A partial export is reported as such.
    let part = stopped.setup.run(&["audit", "export", "--event", "get_token"]).await.ok();
    let part = stopped.file("part.jsonl", &part);
    let ran = stopped.verify(&["--export", &part]).await;
    assert!(ran.code == Some(0) && ran.stderr.contains("this is a part of the log"), "{ran:?}");
    let output = stopped.verify(&["--export", &part, "--whole"]).await.failed();
    assert!(output.contains("part.jsonl is a part of an audit log, not the whole"), "{output}");

    let segment =
        fs::read_dir(stopped.state().join("journal")).unwrap().map(|it| it.unwrap().path());
    let segment =
        segment.filter(|it| it.extension().is_some_and(|it| it == "jsonl")).min().unwrap();
    let text = fs::read_to_string(&segment).unwrap();
    fs::write(&segment, text.replacen("\"account\":\"unknown\"", "\"account\":\"another\"", 1))
        .unwrap();
    let output = stopped.verify(&["--journal", stopped.state().to_str().unwrap()]).await.failed();
    let name = segment.file_name().unwrap().to_str().unwrap();
    assert!(output.contains(&format!("{name}, line ")) && output.contains("hash"), "{output}");
}

/// The load makes the broker start segments and delete delivered ones all the time.
#[tokio::test]
async fn a_log_verifies_while_its_broker_writes_it_with_and_without_a_backlog() {
    let fixture = Fixture::new().await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let mut setup = BrokerSetup::new(proxy.url(), &fixture.upstream.base_url()).await;
    setup.set("TOKEN_BROKER_JOURNAL_MAX_BYTES", "1MiB");
    setup.set("TOKEN_BROKER_AUDIT_SYNC", "write");
    setup.set("TOKEN_BROKER_CALLER_RATE", "100000");
    let mut serve = setup.serve().await;
    setup.set("DATABASE_URL", fixture.database.url());
    let client = TestClient::connect(&setup.endpoint(), &bearer).await;
    eventually("a token", async || client.get("acme").await.ok()).await;
    let stop = CancellationToken::new();
    let calling = tokio::spawn({
        let (stop, client) = (stop.clone(), client.clone());
        async move {
            while !stop.is_cancelled() {
                let calls = (0..50).map(|_| client.get("acme"));
                futures_util::future::join_all(calls).await;
            }
        }
    });
    let state = setup.directory.path().join("state");
    let journal = ["audit", "verify", "--journal", state.to_str().unwrap()];
    let written = async || {
        let report = [&journal[..], &["--json"]].concat();
        let report: serde_json::Value =
            serde_json::from_str(&setup.run(&report).await.ok()).unwrap();
        report["chains"][0]["last_seq"].as_i64().unwrap()
    };
    // A mebibyte holds about two thousand records.
    let begun = written().await;
    eventually("deleted segments", async || {
        setup.run(&["audit", "verify"]).await.ok();
        (written().await > begun + 4_000).then_some(())
    })
    .await;

    proxy.disconnect();
    let delivered = async || {
        let there = "select max(delivered_seq) from audit_chains";
        sqlx::query_scalar::<_, i64>(there).fetch_one(fixture.database.pool()).await.unwrap()
    };
    eventually("a backlog", async || (written().await > delivered().await).then_some(())).await;
    setup.run(&["audit", "verify"]).await.ok();
    stop.cancel();
    calling.await.unwrap();
    proxy.forward();
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
    setup
        .run(&["audit", "verify", "--head", state.join("audit-heads.jsonl").to_str().unwrap()])
        .await
        .ok();
    setup.run(&journal).await.ok();
}

#[tokio::test]
async fn audit_who_lists_the_callers_that_were_given_a_token() {
    let stopped = StoppedBroker::new().await;
    let who = async |input: &str, more: &[&str]| {
        let command = stopped.setup.command(&[&["audit", "who"], more].concat());
        crate::harness::process::run(command, input).await
    };
    let table = who(&format!("{}\n", stopped.token), &[]).await.ok();
    let rows: Vec<_> = table.lines().skip(1).collect();
    assert!(rows.iter().any(|row| row.contains("acme") && row.contains("token_issued")), "{table}");
    let given = rows.iter().find(|row| row.contains("get_token")).unwrap();
    assert!(
        given.contains("demo") && given.contains("bearer") && given.contains("127.0.0.1"),
        "{table}"
    );
    assert!(given.contains(" 12 "), "six calls in each of two chains: {table}");
    let listed: serde_json::Value =
        serde_json::from_str(&who(&stopped.token, &["--json"]).await.ok()).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), rows.len());

    let unknown = who("eyJhbGciOiJIUzI1NiJ9.e30.c2ln", &[]).await;
    assert_eq!(unknown.code, Some(1), "{unknown:?}");
    assert!(unknown.stderr.contains("nobody was given it"), "{unknown:?}");
    assert!(!unknown.stderr.contains("keys that this keyring lacks"), "{unknown:?}");
    let nothing = who("\n", &[]).await;
    assert!(nothing.failed().contains("standard input holds no token"));

    // With another keyring it cannot be told.
    let other = stopped.file("other", "");
    fs::remove_file(&other).unwrap();
    stopped.setup.run(&["keys", "generate", "--out", &other]).await.ok();
    let untold = who(&stopped.token, &["--keyring-file", &other]).await;
    assert_eq!(untold.code, Some(1), "{untold:?}");
    assert!(untold.stderr.contains("keys that this keyring lacks"), "{untold:?}");
    assert!(!untold.stderr.contains("does not look like a token"), "{untold:?}");
}

/// Whoever reads only the summary, or `holds` in JSON, must not take a log for sound whose tables were changed behind
/// its back.
#[tokio::test]
async fn audit_verify_says_that_not_all_holds_if_a_table_is_not_as_it_was_recorded() {
    let stopped = StoppedBroker::new().await;
    let past_triggers = "update grants set pattern = 'other-*'";
    stopped.fixture.database.sql_past_triggers(past_triggers).await;
    let ran = stopped.verify(&[]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.contains("grant"), "{ran:?}");
    assert!(ran.stderr.contains("NOT as they were recorded"), "{ran:?}");
    let ran = stopped.verify(&["--json"]).await;
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["holds"], false, "{report}");
}

#[tokio::test]
async fn audit_who_finds_a_token_whose_records_have_the_time_of_a_wrong_clock() {
    let mut stopped = StoppedBroker::new().await;
    stopped.fixture.database.pool().close().await;
    let _copy = stopped
        .tampered(
            "select audit_ensure_partition((now() at time zone 'UTC')::date - days)
                 from generate_series(3, 4) days;
             update audit_events set at = at - interval '3 days'",
        )
        .await;
    let command = stopped.setup.command(&["audit", "who"]);
    let ran = crate::harness::process::run(command, &stopped.token).await;
    assert!(ran.stderr.contains("the whole log is searched"), "{ran:?}");
    let table = ran.ok();
    assert!(table.lines().any(|row| row.contains("get_token") && row.contains("demo")), "{table}");

    // Bounds that were given are not exceeded.
    let command = stopped.setup.command(&["audit", "who", "--since", "1h"]);
    let ran = crate::harness::process::run(command, &stopped.token).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(!ran.stderr.contains("the whole log is searched"), "{ran:?}");
}

#[tokio::test]
async fn audit_ship_delivers_the_journal_of_a_lost_replica_once_and_not_that_of_a_running_one() {
    let fixture = Fixture::new().await;
    let proxy = DatabaseProxy::start(fixture.database.url()).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let mut setup = BrokerSetup::new(proxy.url(), &fixture.upstream.base_url()).await;
    let serve = setup.serve().await;
    let client = TestClient::connect(&setup.endpoint(), &bearer).await;
    eventually("a token", async || client.get("acme").await.ok()).await;
    proxy.disconnect();
    let mut answered = 1;
    for _ in 0..50 {
        client.get("acme").await.unwrap();
        answered += 1;
    }
    let state = setup.directory.path().join("state");
    let ship = ["audit", "ship", state.to_str().unwrap()];
    setup.set("DATABASE_URL", fixture.database.url());
    let output = setup.run(&ship).await.failed();
    assert!(output.contains("in use by another process"), "{output}");
    serve.kill().await;

    let files = || -> Vec<_> {
        let journal = fs::read_dir(state.join("journal")).unwrap();
        let mut files: Vec<_> = journal
            .map(|it| it.unwrap().path())
            .map(|path| (fs::read(&path).unwrap(), path))
            .collect();
        files.sort();
        files
    };
    let before = files();
    let shipped = setup.run(&ship).await;
    assert!(!shipped.stderr.starts_with("0 records"), "{shipped:?}");
    shipped.ok();
    assert_eq!(files(), before, "the journal is not changed");
    let again = setup.run(&ship).await;
    assert!(again.stderr.contains("0 records were delivered"), "{again:?}");
    let recorded = fixture.audit_events("event = 'get_token' and outcome = 'ok'").await.len();
    assert_eq!(recorded, answered);
    setup.run(&["audit", "verify"]).await.ok();

    let elsewhere = setup.directory.path().to_str().unwrap().to_owned();
    let output = setup.run(&["audit", "ship", &elsewhere]).await.failed();
    assert!(output.contains("is no state directory"), "{output}");
    assert!(!Path::new(&elsewhere).join("lock").exists(), "no file is created there");
}

#[tokio::test]
async fn audit_retire_retires_a_replica_that_does_not_run_and_says_what_may_be_missing() {
    let fixture = Fixture::new().await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let output = setup.run(&["audit", "retire", "i-0000000000000000"]).await.failed();
    assert!(output.contains("no audit chain of instance i-0000000000000000"), "{output}");
    let serve = setup.serve().await;
    let instance = fs::read_to_string(setup.directory.path().join("state/instance")).unwrap();
    let instance = instance.trim();
    eventually("its start", async || {
        (!fixture.audit_events("event = 'started'").await.is_empty()).then_some(())
    })
    .await;
    let retire = ["audit", "retire", instance, "--reason", "TICKET-7"];
    let output = setup.run(&retire).await.failed();
    assert!(output.contains("runs: it sent a heartbeat within the last minute"), "{output}");
    serve.kill().await;
    // Its disk is lost with records that it had reported and not delivered.
    fixture
        .database
        .sql("update instances set heartbeat_at = now() - interval '2 minutes', journal_seq = 40")
        .await;
    let output = setup.run(&retire).await.ok();
    assert!(output.contains("records, up to 40, are certainly missing"), "{output}");
    let output = setup.run(&retire).await.failed();
    assert!(output.contains("is retired already") && output.contains("no chain left"), "{output}");

    let ran = setup.run(&["audit", "verify"]).await;
    assert!(ran.stderr.contains("was retired: records after"), "{ran:?}");
    ran.ok();
    // Another replica records the retirement in the log.
    let other = setup.replica();
    let _serving = other.serve().await;
    eventually("the event", async || {
        let recorded = fixture
            .audit_events(
                "event = 'chain_retired' and detail->>'reason' = 'TICKET-7' and detail ? 'retired'",
            )
            .await;
        (recorded.len() == 1).then_some(())
    })
    .await;
}
