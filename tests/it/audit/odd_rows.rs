//! Whatever the tables of the audit log hold, the readers decode each row, or report it with its place, and
//! read on. The rows are inserted by the role of the broker itself, which is the least that may write them.

use std::{cell::RefCell, collections::BTreeSet, fs, process::Stdio};

use nix::sys::signal::Signal;
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgPool};
use token_broker::domain::printable::is_printable;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::Command,
    time::timeout,
};

use crate::harness::{
    TEST_TIMEOUT,
    broker::{Fixture, TestClient},
    eventually, note_skipped,
    process::{BrokerSetup, CommandOutput, run},
    rng::TestRng,
};

const ROLES: &str = include_str!("../../../deploy/roles.sql");
/// SQL expressions for each kind of column, the ones that a broker could have written first.
const DETAILS: &[&str] = &[
    "'{}'",
    r#"'{"a": "1"}'"#,
    r#"'{"a": 1}'"#,
    "'[]'",
    r#"'"x"'"#,
    "'null'",
    "'true'",
    "'1e400'",
    r#"'{"a": null}'"#,
    r#"'{"a": {"b": ["c"]}}'"#,
    "jsonb_build_object('a', repeat('x', 3000000))",
    "jsonb_build_object('a', array[repeat('x', 3000000)])",
    "(repeat('[', 5000) || repeat(']', 5000))::jsonb",
];
const READABLE_DETAILS: [usize; 3] = [0, 1, 10];
const HASHES: &[&str] =
    &["sha256('x')", "''", "'\\x00'", "substring(sha256('x') for 31)", "sha512('x')"];
const NUMBERS: &[i64] = &[1, 2, 7, 0, -1, i64::MAX, i64::MAX - 1, i64::MIN, i64::MIN + 1, 1 << 62];
const TEXTS: &[&str] =
    &["'c'", "''", r"E'\x1b[2J'", r"E'a\nb'", "'서울'", "repeat('y', 2000)", "'{\"'"];

/// Runs statements with the role of the broker.
async fn as_runtime(pool: &PgPool, statements: &str) {
    let mut transaction = pool.begin().await.unwrap();
    for statement in ["set local role token_broker_runtime", statements] {
        let run = sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut *transaction);
        run.await.unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
    transaction.commit().await.unwrap();
}

async fn try_as_runtime(pool: &PgPool, statements: &str) -> Result<(), sqlx::Error> {
    let mut transaction = pool.begin().await?;
    sqlx::raw_sql("set local role token_broker_runtime").execute(&mut *transaction).await?;
    sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(&mut *transaction).await?;
    transaction.commit().await
}

/// A log with one regular chain, written by a broker that has stopped.
struct Log {
    fixture: Fixture,
    setup: BrokerSetup,
    token: String,
}

impl Log {
    async fn new() -> Self {
        let fixture = Fixture::new().await;
        fixture.database.sql(ROLES).await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
        let mut serve = setup.serve().await;
        let client = TestClient::connect(&setup.endpoint(), &bearer).await;
        let token = eventually("a token", async || client.get("acme").await.ok()).await;
        serve.signal(Signal::SIGTERM);
        assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
        Self { fixture, setup, token: token.access_token }
    }

    fn pool(&self) -> &PgPool {
        self.fixture.database.pool()
    }

    async fn count(&self, table: &str) -> usize {
        let query = AssertSqlSafe(format!("select count(*) from {table}"));
        let count: i64 = sqlx::query_scalar(query).fetch_one(self.pool()).await.unwrap();
        count.try_into().unwrap()
    }

    /// The broker's own chain.
    async fn regular_chain(&self) -> String {
        sqlx::query_scalar("select chain from audit_chains where chain like 'c0%' order by chain")
            .fetch_one(self.pool())
            .await
            .unwrap()
    }

    async fn run(&self, arguments: &[&str]) -> CommandOutput {
        self.setup.run(arguments).await
    }

    /// The report of `audit verify`, which must end with a fault, and without one in the regular chain.
    async fn verify(&self, more: &[&str]) -> Value {
        let ran = self.run(&[&["audit", "verify", "--json"], more].concat()).await;
        assert_eq!(ran.code, Some(1), "{}", ran.stderr);
        let report: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(report["holds"], false);
        let regular = self.regular_chain().await;
        let chains = report["chains"].as_array().unwrap();
        let chain = chains.iter().find(|chain| chain["chain"] == *regular).unwrap();
        assert_eq!(chain["faults"], 0, "{report:#}");
        assert!(chain["records"].as_u64() > Some(2), "{report:#}");
        report
    }

    /// Runs `audit who` with the token of the regular chain, which must be found.
    async fn who(&self) {
        let ran = run(self.setup.command(&["audit", "who"]), &format!("{}\n", self.token)).await;
        assert!(ran.ok().contains("demo"));
    }
}

/// Returns the lines of JSON lines.
fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Chain and number of each row that is reported as unreadable.
fn unreadable(lines: &[Value]) -> BTreeSet<(String, i64)> {
    let rows = lines.iter().filter_map(|line| line.get("unreadable"));
    rows.map(|row| (row["chain"].as_str().unwrap().into(), row["seq"].as_i64().unwrap())).collect()
}

#[tokio::test]
async fn a_row_that_is_no_record_is_reported_with_its_place_and_reading_goes_on() {
    let log = Log::new().await;
    as_runtime(
        log.pool(),
        "select audit_ensure_partition('2026-01-01');
         insert into audit_events
             (instance, chain, seq, at, event, outcome, count, detail, prev_hash, hash)
         values ('i', 'odd', 3, '2026-01-01 12:00Z', 'started', 'ok', 1, '{\"a\": 1}', sha256('x'), sha256('y')),
             ('i', 'odd', 4, '2026-01-01 12:00Z', 'started', 'ok', 1, '{}', sha256('y'), 'short');
         insert into audit_heads (chain, seq, hash, at, key_id, signature)
         values ('odd', 5, 'short', now(), 'k', ''), ('odd', 6, sha256('x'), 'infinity', 'k', '');
         insert into audit_pruning_receipts
             (chain, first_seq, prev_hash, last_seq, hash, at, key_id, signature)
         values ('odd', 7, 'short', 8, sha256('x'), now(), 'k', ''),
             ('odd', 9, sha256('x'), 10, sha256('x'), '-infinity', 'k', '');
         insert into audit_chains (chain, instance, started_at, linked_hash, delivered_hash)
         values ('odd', 'i', now(), 'short', sha256('x')), ('odd-2', 'i', 'infinity', sha256('x'), sha256('x'));",
    )
    .await;

    let report = log.verify(&[]).await;
    let says: Vec<_> =
        report["findings"].as_array().unwrap().iter().map(|it| &it["says"]).collect();
    for place in [
        "record 3 cannot be read (audit_events): detail is not an object of strings",
        "record 4 cannot be read (audit_events): hash is not a SHA-256",
        "record 5 cannot be read (audit_heads): hash is not a SHA-256",
        "record 6 cannot be read (audit_heads): its time is not between",
        "record 7 cannot be read (audit_pruning_receipts): prev_hash is not a SHA-256",
        "record 9 cannot be read (audit_pruning_receipts): its time is not between",
        "its row in audit_chains cannot be read: linked_hash is not a SHA-256",
        "its row in audit_chains cannot be read: its time is not between",
    ] {
        assert!(says.iter().any(|it| it.as_str().unwrap().contains(place)), "{place}: {says:#?}");
    }

    let tail = log.run(&["audit", "tail", "-n", "1000"]).await;
    assert_eq!(tail.code, Some(1));
    assert!(tail.stdout.contains("chain \"odd\", record 3 cannot be read: detail"), "{tail:?}");
    assert_eq!(tail.stdout.lines().count(), log.count("audit_events").await);

    let export = log.run(&["audit", "export"]).await;
    assert_eq!(export.code, Some(1));
    assert!(export.stderr.contains("8 rows cannot be read"), "{}", export.stderr);
    assert_eq!(unreadable(&json_lines(&export.stdout)).len(), 8);
    log.who().await;
}

#[tokio::test]
async fn generated_rows_stop_no_reader_of_the_log() {
    const ROWS: usize = 150;
    let log = Log::new().await;
    let rng = RefCell::new(TestRng::for_test("generated_rows_stop_no_reader"));
    let below = |bound: usize| usize::try_from(rng.borrow_mut().below(bound as u64)).unwrap();
    let mut inserts = vec!["select audit_ensure_partition('2026-01-01');".to_owned()];
    let mut odd = 0;
    for nth in 0..ROWS {
        let pick = |options: &[&str]| options[below(options.len())].to_owned();
        let number = || match NUMBERS[below(NUMBERS.len())] {
            // Its digits alone are no bigint.
            i64::MIN => "(-9223372036854775807 - 1)".to_owned(),
            number => number.to_string(),
        };
        // A third of the rows is odd only in what a record may hold.
        let detail = if nth % 3 == 0 { READABLE_DETAILS[below(3)] } else { below(DETAILS.len()) };
        let hash = if nth % 3 == 1 { below(HASHES.len()) } else { 0 };
        odd += usize::from(hash != 0 || !READABLE_DETAILS.contains(&detail));
        inserts.push(format!(
            "insert into audit_events
                 (instance, chain, seq, at, event, outcome, count, detail, prev_hash, hash, caller, peer,
                  reason, generation, latency_us)
             values ({}, 'odd' || {}, {}, timestamptz '2026-01-01 12:00Z' + {nth} * interval '1 ms',
                 {}, {}, {}, {}, sha256('x'), {}, {}, {}, {}, {}, {});",
            pick(TEXTS), pick(TEXTS), number(), pick(TEXTS), pick(TEXTS), number(), DETAILS[detail],
            HASHES[hash], pick(TEXTS), pick(TEXTS), pick(TEXTS), number(), number(),
        ));
    }
    for number in NUMBERS.iter().filter(|number| **number != i64::MIN) {
        inserts.push(format!(
            "insert into audit_heads (chain, seq, hash, at, key_id, signature)
                 values ('odd-head', {number}, sha256('x'), now(), 'k', '\\x00');
             insert into audit_pruning_receipts
                 (chain, first_seq, prev_hash, last_seq, hash, at, key_id, signature)
                 values ('odd-cut', {number}, sha256('x'), -({number}), sha256('x'), now(), 'k', '');
             insert into audit_chains
                 (chain, instance, started_at, linked_chain, linked_hash, delivered_seq, delivered_hash)
                 values ('odd-chain' || {number}, 'i', now(), 'odd-chain' || {number}, sha256('x'), {number}, sha256('x'));"
        ));
    }
    as_runtime(log.pool(), &inserts.concat()).await;

    log.verify(&[]).await;
    log.who().await;
    let all = log.count("audit_events").await;
    let tail = log.run(&["audit", "tail", "-n", "1000", "--json"]).await;
    assert_eq!(tail.code, Some(1));
    let lines = json_lines(&tail.stdout);
    assert_eq!(lines.len(), all);
    assert_eq!(lines.iter().filter(|line| line.get("unreadable").is_some()).count(), odd);
    let text = log.run(&["audit", "tail", "-n", "1000"]).await;
    assert_eq!(text.stdout.lines().count(), all);
    assert!(!text.stdout.contains('\x1b'));

    let export = log.run(&["audit", "export"]).await;
    assert_eq!(export.code, Some(1));
    let lines = json_lines(&export.stdout);
    let records = lines.iter().filter(|line| line.get("event").is_some()).count();
    assert_eq!((records, records + odd), (all - odd, all));
    let file = log.setup.directory.path().join("export.jsonl");
    fs::write(&file, &export.stdout).unwrap();
    log.verify(&["--export", file.to_str().unwrap()]).await;

    // A broker that starts delivers and serves, whatever is in the tables.
    let mut serve = log.setup.serve().await;
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
    assert!(log.count("audit_events").await > all);
    log.run(&["audit", "retire", "i"]).await.ok();
}

/// Rows that cannot be read hide no later event, however many of them are at one time.
#[tokio::test]
async fn a_follower_of_the_log_passes_any_number_of_rows_that_cannot_be_read() {
    let log = Log::new().await;
    let mut command = log.setup.command(&["audit", "tail", "-n", "1", "--follow"]);
    let command = command.stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut tail = command.spawn().unwrap();
    let mut lines = BufReader::new(tail.stdout.take().unwrap()).lines();
    let mut line_with = async |text: &str| {
        let read = async {
            loop {
                let line = lines.next_line().await.unwrap().expect("tail goes on");
                if line.contains(text) {
                    return line;
                }
            }
        };
        timeout(TEST_TIMEOUT, read).await.unwrap_or_else(|_| panic!("no line with {text}"))
    };
    line_with(" at i-").await;
    let insert = |rows: &str| {
        format!(
            "insert into audit_events
                 (instance, chain, seq, at, event, outcome, count, caller, detail, prev_hash, hash)
             select 'i', chain, n, now(), 'started', 'ok', 1, chain, detail::jsonb, sha256('x'), sha256('x')
             from {rows}"
        )
    };
    let flood =
        "(select 'flood' as chain, n, '{\"a\": 1}' as detail from generate_series(1, 2500) n) r";
    for after in ["after", "again"] {
        // The second time, the rows have the same chain and numbers, at another time.
        as_runtime(log.pool(), &insert(flood)).await;
        line_with("chain \"flood\", record 2500 cannot be read").await;
        let event = format!("(values ('{after}', 1, '{{}}')) r (chain, n, detail)");
        as_runtime(log.pool(), &insert(&event)).await;
        line_with(&format!("caller={after}")).await;
    }
    tail.kill().await.unwrap();
}

/// A text that clears the screen and writes a line of its own, in each way that a terminal or a reader of lines knows.
const POISON: &str =
    "E'x\\x1b[2J\\x1b[H\\u009b1A\\u202e\\u2066\\u200b\\u2028\\x7f\\b\\r\\nok    all of it holds'";

/// No text from the database moves a terminal's cursor, changes the direction of writing, or begins a line.
#[tokio::test]
async fn no_command_prints_a_text_of_the_database_as_it_is() {
    let log = Log::new().await;
    for column in ["chain", "instance", "linked_chain"] {
        let values = ["chain", "instance", "linked_chain"]
            .map(|other| if other == column { POISON } else { "'plain'" })
            .join(", ");
        let insert = format!(
            "insert into audit_chains
                 (chain, instance, linked_chain, started_at, linked_hash, delivered_hash)
             values ({values}, now(), '', '')"
        );
        let refused = try_as_runtime(log.pool(), &insert).await.unwrap_err().to_string();
        assert!(refused.contains("visible ASCII characters"), "{column}: {refused}");
    }
    // These columns the role of the broker may write.
    as_runtime(
        log.pool(),
        &format!(
            "insert into audit_chains (chain, instance, started_at, linked_hash, delivered_hash, retired)
                 values ('plain', 'i', now(), sha256('x'), sha256('x'), {POISON});
             update audit_chains set retired = {POISON} || '2' where chain = 'plain';
             insert into audit_events (instance, chain, seq, at, event, caller, caller_kind, peer, account, outcome,
                 reason, token_fingerprint, trace_id, count, detail, prev_hash, hash)
             values ({POISON}, {POISON}, 1, now(), {POISON}, {POISON}, {POISON}, {POISON}, {POISON}, {POISON},
                 {POISON}, {POISON}, {POISON}, 1, jsonb_build_object({POISON}, {POISON}), sha256('x'), sha256('x'));
             insert into audit_events (instance, chain, seq, at, event, outcome, count, detail, prev_hash, hash)
             values ('i', {POISON}, 2, now(), 'e', 'ok', 1, '[]', sha256('x'), sha256('x'));
             insert into audit_heads (chain, seq, hash, at, key_id, signature)
                 values ({POISON}, 3, sha256('x'), now(), {POISON}, '');
             insert into audit_pruning_receipts
                 (chain, first_seq, prev_hash, last_seq, hash, at, key_id, signature)
                 values ({POISON}, 4, sha256('x'), 5, sha256('x'), now(), {POISON}, '');
             insert into instances (id, replica, version, key_ids, started_at, heartbeat_at)
                 values ({POISON}, 9, {POISON}, array[{POISON}], now(), now());
             update refreshes set error_class = 'unreachable', error_code = {POISON}, error_message = {POISON},
                 error_version = 1, changed = pg_current_xact_id();
             update tokens set allowed_ip = {POISON};
             update deployment set upstream = {POISON}, epoch = epoch + 1;"
        ),
    )
    .await;
    // And these somebody who has switched the triggers off.
    let hidden = format!(
        "begin; set local session_replication_role = replica;
         update accounts set description = {POISON};
         update callers set description = {POISON};
         update caller_credentials set description = {POISON};
         insert into audit_chains (chain, instance, started_at, linked_hash, delivered_hash)
             values ({POISON}, {POISON}, now(), sha256('x'), sha256('x'));
         insert into changes (table_name, operation, row_id, subject, at, recorder)
             values ({POISON}, {POISON}, 7, {POISON}, now() - interval '1 hour', 'nobody');
         insert into grants (caller_id, pattern) select id, {POISON} from callers;
         insert into callers (name) values ({POISON});
         commit"
    );
    log.fixture.database.sql(&hidden).await;
    let export = log.setup.directory.path().join("poisoned.jsonl");
    for arguments in [
        &["account", "list"][..],
        &["account", "list", "--json"],
        &["account", "show", "acme"],
        &["account", "show", "acme", "--json"],
        &["caller", "list"],
        &["caller", "list", "--json"],
        &["caller", "show", "demo"],
        &["caller", "bearer", "list", "demo"],
        &["caller", "bearer", "list", "demo", "--json"],
        &["audit", "tail", "-n", "1000"],
        &["audit", "tail", "-n", "1000", "--json"],
        &["audit", "verify"],
        &["audit", "verify", "--json"],
        &["audit", "export"],
        &["audit", "verify", "--export", export.to_str().unwrap()],
        &["audit", "retire", "i"],
        &["keys", "status"],
        &["check"],
        &["check", "--json"],
    ] {
        let ran = log.run(arguments).await;
        let printed = format!("{}\n{}", ran.stdout, ran.stderr);
        assert!(!printed.contains("panicked"), "{arguments:?}: {printed}");
        for line in printed.lines() {
            assert!(line.chars().all(is_printable), "{arguments:?}: {line:?}");
            assert!(!line.starts_with("ok    all of it holds"), "{arguments:?}: {printed}");
        }
        if arguments == ["audit", "export"] {
            fs::write(&export, &ran.stdout).unwrap();
            let poisoned = json_lines(&ran.stdout);
            let text = "x\u{1b}[2J\u{1b}[H\u{9b}1A\u{202e}\u{2066}\u{200b}\u{2028}\u{7f}\u{8}\r\nok    all of it holds";
            assert!(poisoned.iter().any(|line| line["caller"] == text), "the value stays the same");
        }
    }
}

#[tokio::test]
async fn lines_of_an_export_that_are_no_lines_are_reported_with_their_numbers() {
    let log = Log::new().await;
    let export = log.run(&["audit", "export"]).await.ok();
    let file = log.setup.directory.path().join("mixed.jsonl");
    let name = file.to_str().unwrap();
    let odd: [&[u8]; 7] = [
        b"",
        b"nonsense",
        b"\xff\xfe\x00",
        b"[[[[",
        b"{\"event\":1}",
        b"{\"head\":{\"seq\":-1}}",
        b"null",
    ];
    let mut bytes = Vec::new();
    let mut places = Vec::new();
    for (nth, line) in export.lines().enumerate() {
        if let Some(odd) = odd.get(nth) {
            bytes.extend_from_slice(odd);
            bytes.push(b'\n');
            places.push(format!("line {}", 2 * nth + 1));
        }
        bytes.extend_from_slice(line.as_bytes());
        bytes.push(b'\n');
    }
    assert_eq!(places.len(), odd.len());
    // The first line stays first, so that the file is read as a whole log.
    let first_two = bytes.iter().position(|b| *b == b'\n').unwrap() + 1;
    bytes.drain(..first_two);
    fs::write(&file, &bytes).unwrap();
    let report = log.verify(&["--export", name]).await;
    let findings = report["findings"].as_array().unwrap();
    assert_eq!(findings.len(), odd.len() - 1, "{report:#}");
    for finding in findings {
        assert_eq!(finding["fault"], "unreadable");
        assert!(finding["says"].as_str().unwrap().contains(", line "), "{finding}");
    }

    let mut python = Command::new("python3");
    let verifier = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/verify.py");
    python.args([verifier, name]).stdin(Stdio::null());
    match python.output().await {
        Ok(output) => {
            assert_eq!(output.status.code(), Some(1));
            let text = String::from_utf8(output.stdout).unwrap();
            assert_eq!(text.matches("cannot be read").count(), odd.len() - 1, "{text}");
        }
        Err(error) => note_skipped(&format!("python3: {error}")),
    }

    // A line that is longer than memory should hold.
    let mut command = log.setup.command(&["audit", "verify", "--json", "--export", "-"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let (head, rest) = export.split_once('\n').unwrap();
    stdin.write_all(format!("{head}\n").as_bytes()).await.unwrap();
    for _ in 0..100 {
        stdin.write_all(&vec![b'x'; 1 << 20]).await.unwrap();
    }
    stdin.write_all(format!("\n{rest}\n").as_bytes()).await.unwrap();
    drop(stdin);
    let output = child.wait_with_output().await.unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let [finding] = report["findings"].as_array().unwrap().as_slice() else { panic!("{report:#}") };
    assert!(finding["says"].as_str().unwrap().contains("line 2: 104857601 bytes"), "{finding}");
}

/// Files that are no segments, and segments without their header, are reported; the others are read.
#[tokio::test]
async fn segments_of_a_journal_that_cannot_be_read_are_reported_and_the_others_are_verified() {
    let log = Log::new().await;
    let journal = log.setup.directory.path().join("state/journal");
    let regular: Vec<_> = fs::read_dir(&journal).unwrap().map(|it| it.unwrap().path()).collect();
    let segment = regular.iter().find(|it| it.extension().is_some_and(|it| it == "jsonl")).unwrap();
    // A name that sorts before the regular segment, in the same form.
    let first =
        segment.file_name().unwrap().to_str().unwrap().replacen("c00000001", "c00000000", 1);
    assert!(first.starts_with("c00000000-"), "{first}");
    for content in [&b"\xff\xfe\n"[..], b"", b"{}\n", &vec![b'x'; 100_000]] {
        fs::write(journal.join(&first), content).unwrap();
        let state = log.setup.directory.path().join("state");
        let report = log.verify(&["--journal", state.to_str().unwrap()]).await;
        let says = report["findings"][0]["says"].as_str().unwrap().to_owned();
        assert!(says.contains(&first), "{report:#}");
    }
}

/// The row of a chain that is to be delivered is altered: that chain is reported, the others are delivered.
#[tokio::test]
async fn a_chain_whose_row_is_malformed_does_not_keep_others_from_being_delivered() {
    let log = Log::new().await;
    let chain = log.regular_chain().await;
    as_runtime(
        log.pool(),
        &format!(
            "update audit_chains set delivered_seq = -9223372036854775807 where chain = '{chain}'"
        ),
    )
    .await;
    let state = log.setup.directory.path().join("state");
    let ran = log.run(&["audit", "ship", state.to_str().unwrap()]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains(&format!("chain {chain} cannot be delivered any further")),
        "{ran:?}"
    );
}
