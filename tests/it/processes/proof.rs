//! `audit verify`, `export`, `who`, `ship` and `retire`, as a person runs them on what a broker wrote.

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

/// What a broker left that was started twice and stopped in order: two chains, and a token.
struct Left {
    fixture: Fixture,
    setup: BrokerSetup,
    token: String,
    /// What both starts logged.
    log: String,
}

impl Left {
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

    /// The heads that were signed, as a copy kept elsewhere has them.
    fn heads(&self) -> String {
        self.state().join("audit-heads.jsonl").to_str().unwrap().to_owned()
    }

    /// The chains, in their order.
    async fn chains(&self) -> [String; 2] {
        let chains: Vec<String> =
            sqlx::query_scalar("select chain from audit_chains order by chain")
                .fetch_all(self.fixture.database.pool())
                .await
                .unwrap();
        chains.try_into().unwrap()
    }

    /// A copy of the database to which somebody did something who may do all.
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

/// What a verifier that shares no code with ours says.
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
            // Whoever lands a change has it.
            assert!(std::env::var_os("CI").is_none(), "python3: {error}");
            None
        }
    }
}

#[tokio::test]
async fn a_log_holds_in_the_database_in_the_journal_and_in_an_export_by_two_verifiers() {
    let left = Left::new().await;
    let heads = left.heads();
    let ran = left.verify(&["--head", &heads]).await;
    assert!(ran.stderr.contains("2 chains: all of it holds"), "{ran:?}");
    assert!(!ran.stderr.contains("note:"), "{ran:?}");
    let table = ran.ok();
    assert_eq!(table.lines().count(), 3, "{table}");

    let journal = left.state();
    left.verify(&["--journal", journal.to_str().unwrap(), "--head", &heads]).await.ok();

    let export = left.setup.run(&["audit", "export"]).await.ok();
    let export = left.file("export.jsonl", &export);
    let keys = left.setup.run(&["keys", "public", "--signing"]).await.ok();
    let keys = left.file("keys.pem", &keys);
    let verified = ["--export", &export, "--whole", "--keys", &keys, "--head", &heads, "--json"];
    let ran = left.verify(&verified).await.ok();
    let verdict: serde_json::Value = serde_json::from_str(&ran).unwrap();
    assert_eq!((&verdict["holds"], &verdict["notices"]), (&true.into(), &serde_json::json!([])));
    // The log tells the same heads.
    let log = left.file("broker.log", &left.log);
    let by_log = ["--export", &export, "--keys", &keys, "--head", &log, "--json"];
    assert_eq!(left.verify(&by_log).await.ok(), ran);
    let events = sqlx::query_scalar::<_, i64>("select count(*) from audit_events");
    let events = events.fetch_one(left.fixture.database.pool()).await.unwrap();
    assert_eq!(verdict["records"], events);
    for chain in verdict["chains"].as_array().unwrap() {
        assert_eq!(chain["signed_seq"], chain["last_seq"], "the last head is of the end: {chain}");
    }

    if let Some(ran) = python(&["--keys", &keys, "--heads", &heads, &export]).await {
        let said = ran.ok();
        for chain in verdict["chains"].as_array().unwrap() {
            let (chain, seq, hash) = (&chain["chain"], &chain["last_seq"], &chain["last_hash"]);
            let line = format!("{} {seq} {}", chain.as_str().unwrap(), hash.as_str().unwrap());
            assert!(said.contains(&line), "{said}");
        }
    }
}

#[tokio::test]
async fn whatever_is_done_to_the_log_is_found_and_named() {
    let mut left = Left::new().await;
    let (heads, [first, last]) = (left.heads(), left.chains().await);
    left.fixture.database.pool().close().await;
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
        (format!("update audit_heads set seq = seq - 1 where chain = '{last}'"), &last, "proves nothing"),
        (
            format!("insert into audit_cuts (chain, first_seq, prev_hash, last_seq, hash, at, key_id, signature)
                select chain, seq, prev_hash, seq, hash, at, 'h', '' from audit_events where {of_first} and seq = 4;
                delete from audit_events where {of_first} and seq = 4"),
            &first,
            "that retention removed records 4 to 4 is not proven",
        ),
    ];
    for (tampering, chain, words) in cases {
        let _copy = left.tampered(&tampering).await;
        let said = left.verify(&[]).await.failed();
        let line = said.lines().next().unwrap();
        assert!(
            line.starts_with(&format!("chain {chain}: ")) && line.contains(words),
            "{tampering}: {said}"
        );
    }

    // What is consistent in itself is found by what was kept elsewhere.
    for (tampering, words) in [
        (
            format!("delete from audit_events where chain = '{last}' and seq > 5;
                delete from audit_heads where chain = '{last}';
                update audit_chains set delivered_seq = 5, delivered_hash = (select hash from audit_events
                    where chain = '{last}' and seq = 5) where chain = '{last}'"),
            "it ends with record 5, and a signed head is of record",
        ),
        (
            format!("delete from audit_events where chain = '{last}';
                delete from audit_heads where chain = '{last}'; delete from audit_chains where chain = '{last}'"),
            "a head of it was signed, and nothing of it is here",
        ),
    ] {
        let _copy = left.tampered(&tampering).await;
        left.verify(&[]).await.ok();
        let said = left.verify(&["--head", &heads]).await.failed();
        assert!(said.contains(&format!("chain {last}: {words}")), "{said}");
    }
}

#[tokio::test]
async fn an_export_or_a_journal_that_was_changed_or_cut_is_refused() {
    let left = Left::new().await;
    let [first, _] = left.chains().await;
    let export = left.setup.run(&["audit", "export"]).await.ok();
    let edited = export.replacen("\"account\":\"unknown\"", "\"account\":\"another\"", 1);
    let edited = left.file("edited.jsonl", &edited);
    let said = left.verify(&["--export", &edited]).await.failed();
    assert!(
        said.starts_with(&format!("chain {first}: record")) && said.contains("was altered"),
        "{said}"
    );
    if let Some(ran) = python(&[&edited]).await {
        assert!(ran.failed().contains("was altered"));
    }
    // Finer than what is hashed: no other record may pass for this one.
    let (before, after) = export.split_once("\"get_token\"").unwrap();
    let (before, time) = before.rsplit_once("\"at\":\"").unwrap();
    let time = time.replacen('Z', "1Z", 1);
    let finer = left.file("finer.jsonl", &format!("{before}\"at\":\"{time}\"get_token\"{after}"));
    let said = left.verify(&["--export", &finer]).await.failed();
    assert!(said.contains("a time is not in whole microseconds"), "{said}");
    if let Some(ran) = python(&[&finer]).await {
        assert!(ran.failed().contains("was altered"));
    }
    let without = |chain: &str| {
        export.split_inclusive('\n').filter(|line| !line.contains(chain)).collect::<String>()
    };
    let [_, last] = left.chains().await;
    let (first_gone, last_gone) =
        (left.file("first.jsonl", &without(&first)), left.file("last.jsonl", &without(&last)));
    for (file, heads) in [(&first_gone, None), (&last_gone, Some(left.heads()))] {
        let heads = heads.iter().flat_map(|heads| ["--heads", heads]);
        if let Some(ran) = python(&heads.chain([file.as_str()]).collect::<Vec<_>>()).await {
            ran.failed();
        }
    }
    let lines: Vec<_> = export.lines().collect();
    let cut = left.file("cut.jsonl", &lines[..lines.len() - 1].join("\n"));
    let said = left.verify(&["--export", &cut]).await.failed();
    assert!(said.contains("its last line is missing"), "{said}");
    let shorter = [&lines[..lines.len() - 2], &lines[lines.len() - 1..]].concat().join("\n");
    let shorter = left.file("shorter.jsonl", &shorter);
    let said = left.verify(&["--export", &shorter]).await.failed();
    assert!(said.contains("it ends after"), "{said}");
    let no_export = left.file("none.jsonl", "a line of something else\n");
    let said = left.verify(&["--export", &no_export]).await.failed();
    assert!(said.contains("none.jsonl, line 1: neither a record nor"), "{said}");

    // A part is no whole, and says so.
    let part = left.setup.run(&["audit", "export", "--event", "get_token"]).await.ok();
    let part = left.file("part.jsonl", &part);
    let ran = left.verify(&["--export", &part]).await;
    assert!(ran.code == Some(0) && ran.stderr.contains("this is a part of the log"), "{ran:?}");
    let said = left.verify(&["--export", &part, "--whole"]).await.failed();
    assert!(said.contains("part.jsonl is a part of an audit log, not the whole"), "{said}");

    let segment = fs::read_dir(left.state().join("journal")).unwrap().map(|it| it.unwrap().path());
    let segment =
        segment.filter(|it| it.extension().is_some_and(|it| it == "jsonl")).min().unwrap();
    let text = fs::read_to_string(&segment).unwrap();
    fs::write(&segment, text.replacen("\"account\":\"unknown\"", "\"account\":\"another\"", 1))
        .unwrap();
    let said = left.verify(&["--journal", left.state().to_str().unwrap()]).await.failed();
    let name = segment.file_name().unwrap().to_str().unwrap();
    assert!(said.contains(&format!("{name}, line ")) && said.contains("hash"), "{said}");
}

/// The callers make the broker end segments and remove delivered ones all the while.
#[tokio::test]
async fn a_log_holds_while_its_broker_writes_it_with_and_without_a_backlog() {
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
        let verdict = [&journal[..], &["--json"]].concat();
        let verdict: serde_json::Value =
            serde_json::from_str(&setup.run(&verdict).await.ok()).unwrap();
        verdict["chains"][0]["last_seq"].as_i64().unwrap()
    };
    // A mebibyte is some two thousand records.
    let begun = written().await;
    eventually("segments that go", async || {
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
async fn a_leaked_token_leads_to_those_who_were_given_it() {
    let left = Left::new().await;
    let who = async |input: &str, more: &[&str]| {
        let command = left.setup.command(&[&["audit", "who"], more].concat());
        crate::harness::process::run(command, input).await
    };
    let table = who(&format!("{}\n", left.token), &[]).await.ok();
    let rows: Vec<_> = table.lines().skip(1).collect();
    assert!(rows.iter().any(|row| row.contains("acme") && row.contains("token_issued")), "{table}");
    let given = rows.iter().find(|row| row.contains("get_token")).unwrap();
    assert!(
        given.contains("demo") && given.contains("bearer") && given.contains("127.0.0.1"),
        "{table}"
    );
    assert!(given.contains(" 12 "), "six calls in each of two chains: {table}");
    let listed: serde_json::Value =
        serde_json::from_str(&who(&left.token, &["--json"]).await.ok()).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), rows.len());

    let unknown = who("eyJhbGciOiJIUzI1NiJ9.e30.c2ln", &[]).await;
    assert_eq!(unknown.code, Some(1), "{unknown:?}");
    assert!(unknown.stderr.contains("nobody was given it"), "{unknown:?}");
    let nothing = who("\n", &[]).await;
    assert!(nothing.failed().contains("standard input holds no token"));
}

#[tokio::test]
async fn the_journal_of_a_replica_that_is_gone_is_shipped_once_and_only_when_nobody_uses_it() {
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
    let said = setup.run(&ship).await.failed();
    assert!(said.contains("in use by another process"), "{said}");
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
    assert_eq!(files(), before, "nothing of it is changed");
    let again = setup.run(&ship).await;
    assert!(again.stderr.contains("0 records were delivered"), "{again:?}");
    let told = fixture.audit_events("event = 'get_token' and outcome = 'ok'").await.len();
    assert_eq!(told, answered);
    setup.run(&["audit", "verify"]).await.ok();

    let elsewhere = setup.directory.path().to_str().unwrap().to_owned();
    let said = setup.run(&["audit", "ship", &elsewhere]).await.failed();
    assert!(said.contains("is no state directory"), "{said}");
    assert!(!Path::new(&elsewhere).join("lock").exists(), "nothing is made there");
}

#[tokio::test]
async fn a_lost_replica_is_retired_once_it_is_gone_and_the_log_says_what_may_be_missing() {
    let fixture = Fixture::new().await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let said = setup.run(&["audit", "retire", "i-0000000000000000"]).await.failed();
    assert!(said.contains("no audit chain of instance i-0000000000000000"), "{said}");
    let serve = setup.serve().await;
    let instance = fs::read_to_string(setup.directory.path().join("state/instance")).unwrap();
    let instance = instance.trim();
    eventually("its start", async || {
        (!fixture.audit_events("event = 'started'").await.is_empty()).then_some(())
    })
    .await;
    let retire = ["audit", "retire", instance, "--reason", "TICKET-7"];
    let said = setup.run(&retire).await.failed();
    assert!(said.contains("runs: it told so within the last minute"), "{said}");
    serve.kill().await;
    // Its disk is lost, and so is what it had told of and not delivered.
    fixture
        .database
        .sql("update instances set heartbeat_at = now() - interval '2 minutes', journal_seq = 40")
        .await;
    let said = setup.run(&retire).await.ok();
    assert!(said.contains("records, up to 40, are missing for sure"), "{said}");
    let said = setup.run(&retire).await.failed();
    assert!(said.contains("is retired already") && said.contains("no chain left"), "{said}");

    let ran = setup.run(&["audit", "verify"]).await;
    assert!(ran.stderr.contains("was retired: records after"), "{ran:?}");
    ran.ok();
    // Another replica writes it into the log.
    let other = setup.replica();
    let _serving = other.serve().await;
    eventually("the event", async || {
        let told = fixture
            .audit_events(
                "event = 'chain_retired' and detail->>'reason' = 'TICKET-7' and detail ? 'retired'",
            )
            .await;
        (told.len() == 1).then_some(())
    })
    .await;
}
