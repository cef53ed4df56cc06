//! `account import` and `account export`: files of accounts that are kept elsewhere and applied again.

use std::{fs, path::PathBuf};

use sqlx::AssertSqlSafe;
use tempfile::TempDir;
use url::Url;

use crate::{
    harness::{
        broker::Fixture,
        eventually,
        process::{BrokerProcess, CommandOutput, program, run},
    },
    roles::{ACCOUNTS, ROLES},
};

/// An admin whose login may do what `token_broker_accounts` may, and nothing else.
struct Shell<'a> {
    fixture: &'a Fixture,
    home: TempDir,
}

impl<'a> Shell<'a> {
    async fn new(fixture: &'a Fixture) -> Self {
        fixture.database.sql(ROLES).await;
        Self { fixture, home: TempDir::new().unwrap() }
    }

    fn command(&self, arguments: &[&str]) -> tokio::process::Command {
        let mut url = Url::parse(self.fixture.database.url()).unwrap();
        url.query_pairs_mut().append_pair("options", &format!("-c role={ACCOUNTS}"));
        let mut command = program(arguments);
        command.env("DATABASE_URL", url.as_str()).env("XDG_CONFIG_HOME", self.home.path());
        command
    }

    async fn run(&self, arguments: &[&str], input: &str) -> CommandOutput {
        run(self.command(arguments), input).await
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        fs::write(self.path(name), content).unwrap();
        self.path(name).to_str().unwrap().to_owned()
    }

    async fn import(&self, content: impl AsRef<[u8]>, flags: &[&str]) -> CommandOutput {
        let file = self.file("accounts.csv", content);
        self.run(&[&["account", "import", &file], flags].concat(), "").await
    }

    async fn export(&self) -> String {
        self.run(&["account", "export"], "").await.ok()
    }

    /// Returns the first column of the query's first row, as text.
    async fn text(&self, query: &str) -> String {
        sqlx::query_scalar(AssertSqlSafe(query.to_owned()))
            .fetch_one(self.fixture.database.pool())
            .await
            .unwrap()
    }

    async fn count(&self) -> String {
        self.text("select count(*)::text from accounts").await
    }
}

const TEXT: &str = "name,client_id,client_secret,enabled,description\na,id-1,SK.1,TRUE,\"가, 나\"\nb,id-2,SK.2,false,\n";
const EXPORT: &str = "name,client_id,enabled,description\na,id-1,true,\"가, 나\"\nb,id-2,false,";

fn lines(count: usize, line: impl Fn(usize) -> String) -> String {
    (0..count).map(|n| line(n) + "\n").collect()
}

fn utf16(text: &str) -> Vec<u8> {
    format!("\u{feff}{text}").encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// Files as spreadsheets and editors write them.
#[tokio::test]
async fn a_file_of_accounts_is_read_in_every_form_that_spreadsheets_write() {
    let fixture = Fixture::new().await;
    let shell = Shell::new(&fixture).await;
    let quoted = "\"가, 나\"";
    let with_separator =
        |separator: &str| TEXT.replace(quoted, "Q").replace(',', separator).replace('Q', quoted);
    let json = "{\"name\":\"a\",\"client_id\":\"id-1\",\"client_secret\":\"SK.1\",\"description\":\"가, 나\"}\n\
        {\"description\":\"\",\"enabled\":false,\"name\":\"b\",\"client_id\":\"id-2\",\"client_secret\":\"SK.2\"}\n";
    for (form, name, content) in [
        ("plain", "a.csv", TEXT.as_bytes().to_vec()),
        (
            "CRLF with a mark",
            "a.csv",
            format!("\u{feff}{}", TEXT.replace('\n', "\r\n")).into_bytes(),
        ),
        ("UTF-16 with tabs", "a.txt", utf16(&with_separator("\t").replace('\n', "\r\n"))),
        ("semicolons", "a.CSV", with_separator(";").into_bytes()),
        ("stated separator", "a.csv", format!("sep=;\n{}", with_separator(";")).into_bytes()),
        ("tabs", "a.tsv", with_separator("\t").into_bytes()),
        (
            "Korean names",
            "a.csv",
            TEXT.replace(
                "name,client_id,client_secret,enabled,description",
                "이름,클라이언트 ID,API KEY,사용,설명",
            )
            .into_bytes(),
        ),
        ("JSON lines", "a.jsonl", json.as_bytes().to_vec()),
        (
            "JSON lines with a mark and CRLF",
            "a.ndjson",
            format!("\u{feff}{}", json.replace('\n', "\r\n")).into_bytes(),
        ),
        ("JSON lines in UTF-16", "a.json", utf16(json)),
    ] {
        let file = shell.file(name, content);
        let ran = shell.run(&["account", "import", &file], "").await;
        assert!(
            ran.stderr.ends_with("2 registered, 0 changed, 0 as they were\n"),
            "{form}: {ran:?}"
        );
        ran.ok();
        assert_eq!(shell.export().await, EXPORT, "{form}");
        let sealed = "select count(*)::text from accounts where client_secret like 'sealed:v1:%'";
        assert_eq!(shell.text(sealed).await, "2", "{form}");
        fixture.database.sql("delete from accounts").await;
    }
    let dry_run = Shell::new(&fixture).await;
    let file = dry_run.file("a.csv", TEXT);
    dry_run.run(&["account", "import", &file, "--dry-run"], "").await.ok();
    assert_eq!(fs::read_dir(dry_run.home.path()).unwrap().count(), 1, "it remembers no key");
    assert_eq!(shell.count().await, "0");
    let piped = shell.run(&["account", "import", "-", "--format", "csv"], TEXT).await;
    piped.ok();
    assert_eq!(shell.export().await, EXPORT);
}

/// What is not read is refused by what it is, and by what to do; no value of it is printed (promises 27 and 38).
#[tokio::test]
async fn a_file_that_is_no_list_of_accounts_is_refused_by_name_and_not_quoted() {
    let fixture = Fixture::new().await;
    let shell = Shell::new(&fixture).await;
    let canary = TEXT.replace("SK.1", "SK.canary-7");
    let euc_kr =
        [&b"name,client_id,client_secret,description\na,id-1,SK.canary-7,"[..], b"\xb0\xa1\n"]
            .concat();
    for (name, content, says) in [
        ("a.csv", euc_kr, "in Excel, as `CSV UTF-8`"),
        (
            "a.csv",
            b"PK\x03\x04SK.canary-7".to_vec(),
            "it is a workbook: in Excel, save it as `CSV UTF-8`",
        ),
        ("a.csv", utf16(&canary)[2..].to_vec(), "UTF-16 without a byte order mark"),
        ("a.csv", vec![], "the first line must name the columns"),
        (
            "a.csv",
            canary.split_once('\n').unwrap().1.into(),
            "line 1: the name of column 1 is unknown",
        ),
        (
            "a.csv",
            canary.replacen("name", "SK.canary-7", 1).into(),
            "the name of column 1 is unknown",
        ),
        (
            "a.csv",
            canary.replace("가, 나\"", "가").into(),
            "line 2, column description: a quotation mark is opened",
        ),
        (
            "a.csv",
            canary.replace("false,", "false,\"x\ny\"canary-7").into(),
            "line 3, column description: there is text after a closing quotation mark",
        ),
        ("a.xlsx", canary.clone().into(), "say --format csv or --format jsonl"),
        ("a.jsonl", canary.clone().into(), "line 1: it is not one JSON object"),
    ] {
        let file = shell.file(name, content);
        let output = shell.run(&["account", "import", &file], "").await.failed();
        assert!(output.contains(says), "{says}: {output}");
        assert!(!output.contains("canary"), "{output}");
        assert_eq!(shell.count().await, "0");
    }
    for format in ["csv", "jsonl"] {
        let output =
            shell.run(&["account", "import", "-", "--format", format], &canary[40..]).await;
        assert!(!output.failed().contains("canary"));
    }
}

/// All faults of a file are named at once, each by its line and column.
#[tokio::test]
async fn every_bad_row_is_named_by_line_and_column_and_nothing_is_registered() {
    let fixture = Fixture::new().await;
    let shell = Shell::new(&fixture).await;
    fixture.add_account("known", "id-9", "SK.9").await;
    let rows = "name,client_id,client_secret,description\n\
        good,id-1,SK.1,\"two\nlines\"\n\
        Bad,id-2,SK.canary-7,\n\
        a,canary id,SK.canary-7,\n\
        b,id-3,SK.canary-7-is-too-long,\n\
        c,id-4,SK.\u{200b}canary,\n\
        d,id-5,,\n\
        good,id-6,SK.canary-7,\n\
        e,id-1,SK.canary-7,\n\
        f,id-9,SK.canary-7,\n\
        known,id-9,SK.canary-7,\n\
        g,id-7,SK.canary-7\n\
        h,id-8,SK.canary\"7,\n";
    let output = shell.import(rows, &[]).await.failed();
    for says in [
        "accounts.csv has 12 faults, so nothing was changed",
        "line 4, column name: account name must match",
        "line 5, column client_id: client id must have visible ASCII and Hangul only; character 7 is a space",
        "line 6, column client_secret: client secret is longer than 18 characters",
        "line 7, column client_secret: client secret must have visible ASCII and Hangul only; character 4 is a zero width",
        "line 8, column client_secret: a new account needs it",
        "line 9, column name: line 2 has the same",
        "line 10, column client_id: line 2 has the same",
        "line 11, column client_id: it belongs to account known already",
        "line 12, column name: there is such an account already: --update changes it",
        "line 13: it has 3 values, and the first line has 4",
        "line 14, column client_secret: there is a quotation mark inside",
    ] {
        assert!(output.contains(says), "{says}: {output}");
    }
    assert!(!output.contains("canary"), "{output}");
    assert_eq!(shell.count().await, "1");

    // Many faults are counted, and a report has them all.
    let many = lines(60, |n| format!("a{n},new-{n},SK canary"));
    let file =
        shell.file("many.csv", format!("name,client_id,client_secret\n{many}good,good-id,SK.1\n"));
    let report = shell.path("report.csv").to_str().unwrap().to_owned();
    let ran = shell.run(&["account", "import", &file, "--skip-bad", "--report", &report], "").await;
    assert!(ran.stderr.contains("and 40 more"), "{ran:?}");
    assert!(ran.stderr.ends_with("1 registered, 0 changed, 0 as they were\n"), "{ran:?}");
    assert!(!ran.failed().contains("canary"));
    assert_eq!(shell.count().await, "2");
    let lines = fs::read_to_string(&report).unwrap();
    assert_eq!(lines.lines().count(), 61);
    assert!(lines.starts_with("line,column,fault\n2,client_secret,"), "{lines}");
    assert!(!lines.contains("canary"));
    // A report overwrites nothing, and then nothing is changed either.
    let again =
        shell.run(&["account", "import", &file, "--skip-bad", "--report", &report], "").await;
    let again = again.failed();
    assert!(again.contains("cannot write the report, so nothing was changed"), "{again}");
    assert_eq!(fs::read_to_string(&report).unwrap(), lines);
}

/// A file without an end, or without a writer, is refused, and a path that is content is not shown.
#[tokio::test]
async fn a_file_that_cannot_be_read_to_its_end_is_refused() {
    let fixture = Fixture::new().await;
    let shell = Shell::new(&fixture).await;
    let large = shell.file("large.csv", "");
    fs::File::options().write(true).open(&large).unwrap().set_len(65 << 20).unwrap();
    for (file, says) in [
        (large.as_str(), "it is larger than 65536 KiB"),
        ("/dev/zero", "it is larger than 65536 KiB"),
        ("/", "s a directory"),
        ("SK.canary", "(path not shown: nothing is there)"),
    ] {
        let ran = shell.run(&["account", "import", file, "--format", "csv"], "").await.failed();
        assert!(ran.contains(says) && !ran.contains("canary"), "{file}: {ran}");
    }
}

/// An export overwrites nothing: a file of that name may be the only one with the API KEYs.
#[tokio::test]
async fn an_export_replaces_a_file_only_if_it_is_told_to() {
    let fixture = Fixture::new().await;
    let shell = Shell::new(&fixture).await;
    shell.import(TEXT, &[]).await.ok();
    let file = shell.path("accounts.csv").to_str().unwrap().to_owned();
    let refused = shell.run(&["account", "export", "--out", &file], "").await.failed();
    assert!(
        refused.contains("nothing was exported") && refused.contains("exists already"),
        "{refused}"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), TEXT);
    shell.run(&["account", "export", "--out", &file, "--replace"], "").await.ok();
    assert_eq!(fs::read_to_string(&file).unwrap(), format!("{EXPORT}\n"));
    let refused = shell.run(&["account", "export", "--out", "accounts.xlsx"], "").await.failed();
    assert!(refused.contains("say --format csv or --format jsonl"), "{refused}");
}

/// `--prune` says how much it removes, and needs `--yes`. A file without rows removes nothing.
#[tokio::test]
async fn accounts_that_the_file_lacks_are_removed_only_by_prune_with_yes() {
    let fixture = Fixture::new().await;
    let shell = Shell::new(&fixture).await;
    shell.import(TEXT, &[]).await.ok();
    // A new name for a login is another account.
    let fewer = "name,client_id,client_secret\na,,\nnew,id-2,SK.2\n";
    let left = shell.import(fewer, &["--update"]).await.failed();
    assert!(left.contains("line 3, column client_id: it belongs to account b already"), "{left}");
    let refused = shell.import(fewer, &["--update", "--prune"]).await.failed();
    assert!(refused.contains("--prune removes 1 accounts\n"), "{refused}");
    assert!(refused.contains("nothing was changed: say --yes"), "{refused}");
    let header = "name,client_id,client_secret\n";
    let refused = shell.import(header, &["--update", "--prune", "--yes"]).await.failed();
    assert!(refused.contains("accounts.csv has no rows"), "{refused}");
    let dry = shell.import(fewer, &["--update", "--prune", "--dry-run"]).await;
    assert!(dry.stderr.contains("--prune removes 1 accounts\n"), "{dry:?}");
    assert_eq!(dry.ok(), "b: removed");
    assert_eq!(shell.export().await, EXPORT);
    let ran = shell.import(fewer, &["--update", "--prune", "--yes"]).await;
    assert!(
        ran.stderr.ends_with("1 registered, 0 changed, 1 removed, 1 as they were\n"),
        "{ran:?}"
    );
    assert_eq!(ran.ok(), "b: removed");
    assert_eq!(shell.export().await, EXPORT.replace("b,id-2,false", "new,id-2,true"));
}

/// Promise 37: the same file again changes nothing. Another secret is rotated.
#[tokio::test]
async fn the_same_file_again_issues_nothing_and_another_secret_is_rotated() {
    let fixture = Fixture::new().await;
    let shell = Shell::new(&fixture).await;
    let broker = fixture.start().await;
    let text = "name,client_id,client_secret,description\na,id-1,SK.1,x\nb,id-2,SK.2,\n";
    shell.import(text, &["--wait"]).await.ok();
    for account in ["a", "b"] {
        fixture.wait_for_state(account, "fresh").await;
    }
    // Without the flag, it is refused.
    let refused = shell.import(text, &[]).await.failed();
    assert!(refused.contains("line 3, column name: there is such an account already"), "{refused}");
    for _ in 0..2 {
        let ran = shell.import(text, &["--update", "--wait"]).await;
        assert!(
            ran.stderr
                .contains("0 registered, 0 changed, 2 as they were; brokers compare 2 API KEYs"),
            "{ran:?}"
        );
        assert!(ran.stderr.contains("0 known accounts have another API KEY now"), "{ran:?}");
        assert_eq!(ran.ok(), "");
    }
    let versions = "select string_agg(credential_version::text, ',' order by name) from accounts";
    assert_eq!(shell.text(versions).await, "1,1");

    // An export holds no secret, and leaves each account as it is.
    let changes = "select count(*)::text from changes";
    let before = shell.text(changes).await;
    for name in ["out.csv", "out.jsonl"] {
        let file = shell.path(name).to_str().unwrap().to_owned();
        shell.run(&["account", "export", "--out", &file], "").await.ok();
        let exported = fs::read_to_string(&file).unwrap();
        assert!(!exported.contains("SK.") && exported.contains("id-2"), "{exported}");
        let ran = shell.run(&["account", "import", &file, "--update"], "").await;
        assert!(ran.stderr.ends_with("0 registered, 0 changed, 2 as they were\n"), "{ran:?}");
        assert_eq!(ran.ok(), "");
    }
    assert_eq!(shell.text(changes).await, before);

    // What would change is said first.
    fixture.upstream.add_account("id-2", "SK.new");
    fixture.upstream.add_account("id-3", "SK.3");
    let rows = "name,client_id,client_secret,description,enabled\n\
        a,id-1,,y,false\nb,id-2,SK.new,,true\nc,id-3,SK.3,,true\n";
    let dry = shell.import(rows, &["--update", "--dry-run"]).await;
    let says = "nothing was changed; without --dry-run: 1 registered, 1 changed, 1 as they were; brokers compare 1 API KEYs";
    assert!(dry.stderr.contains(says), "{dry:?}");
    assert_eq!(dry.ok(), "a: enabled, description");
    assert_eq!(shell.text(changes).await, before);
    let ran = shell.import(rows, &["--update", "--wait"]).await;
    assert_eq!(ran.ok(), "a: enabled, description\nb: client_secret");
    eventually("the new tokens", async || {
        (fixture.upstream.issued("id-2") == 2 && fixture.upstream.issued("id-3") == 1).then_some(())
    })
    .await;
    assert_eq!(fixture.upstream.attempts("id-1"), 1);
    assert_eq!(shell.text(versions).await, "1,2,1");
    broker.stop().await;
}

/// A command that is killed, or that the database refuses in the middle, has registered nothing.
#[tokio::test]
async fn an_import_that_is_killed_in_the_middle_leaves_nothing_behind() {
    let fixture = Fixture::new().await;
    let shell = Shell::new(&fixture).await;
    fixture.add_account("known", "id-9", "SK.9").await;
    let rows = lines(1_200, |n| format!("a{n},login-{n},SK.{n},"));
    let file = shell.file(
        "accounts.csv",
        format!("name,client_id,client_secret,description\n{rows}known,id-9,,changed\n"),
    );
    // The new accounts are inserted, and then the command waits for this lock.
    let mut lock = fixture.database.pool().begin().await.unwrap();
    sqlx::query("select from accounts where name = 'known' for update")
        .execute(&mut *lock)
        .await
        .unwrap();
    let process = BrokerProcess::start(shell.command(&["account", "import", &file, "--update"]));
    eventually("the wait for the lock", async || {
        let waits = "select count(*)::text from pg_stat_activity
            where datname = current_database() and wait_event_type = 'Lock' and query like '%try_import%'";
        (shell.text(waits).await == "1").then_some(())
    })
    .await;
    process.kill().await;
    lock.rollback().await.unwrap();
    eventually("the end of its session", async || {
        let sessions = "select count(*)::text from pg_stat_activity
            where datname = current_database() and application_name = 'token-broker admin'";
        (shell.text(sessions).await == "0").then_some(())
    })
    .await;
    assert_eq!(shell.count().await, "1");
    assert_eq!(shell.text("select description from accounts").await, "");

    // The database refuses a row after the others were written: a login that was taken meanwhile.
    let process = {
        let mut lock = fixture.database.pool().begin().await.unwrap();
        sqlx::query("insert into accounts (name, client_id, client_secret) values ('taken', 'login-1199', 'SK')")
            .execute(&mut *lock)
            .await
            .unwrap();
        let process =
            BrokerProcess::start(shell.command(&["account", "import", &file, "--update"]));
        eventually("the wait for the other login", async || {
            let waits = "select count(*)::text from pg_stat_activity
                where datname = current_database() and wait_event_type = 'Lock' and query like '%try_import%'";
            (shell.text(waits).await == "1").then_some(())
        })
        .await;
        lock.commit().await.unwrap();
        process
    };
    let mut process = process;
    assert_eq!(process.wait().await.code(), Some(1));
    assert!(
        process.stderr().contains("was taken meanwhile, so nothing was changed"),
        "{}",
        process.stderr()
    );
    assert_eq!(shell.count().await, "2");
}

#[tokio::test]
async fn ten_thousand_accounts_are_imported_exported_and_imported_again() {
    let fixture = Fixture::new().await;
    let shell = Shell::new(&fixture).await;
    let rows = lines(10_000, |n| format!("account-{n},login-{n},SK.{n},true,\"가, {n}\""));
    let text = format!("name,client_id,client_secret,enabled,description\n{rows}");
    let changes = "select count(*)::text from changes where table_name = 'accounts'";
    let ran = shell.import(&text, &[]).await;
    assert!(ran.stderr.contains("\n1000 of 10000 accounts are written\n"), "{ran:?}");
    assert!(ran.stderr.ends_with("10000 registered, 0 changed, 0 as they were\n"), "{ran:?}");
    ran.ok();
    let exported = shell.export().await;
    assert_eq!(exported.lines().count(), 10_001);
    assert_eq!(shell.text(changes).await, "10000");
    let ran = shell.import(&exported, &["--update"]).await;
    assert!(ran.stderr.ends_with("0 registered, 0 changed, 10000 as they were\n"), "{ran:?}");
    assert_eq!(shell.text(changes).await, "10000");
    let ran = shell.import(&text, &["--update"]).await;
    assert!(
        ran.stderr.contains("0 registered, 0 changed, 10000 as they were; brokers compare 10000"),
        "{ran:?}"
    );
    ran.ok();
    assert_eq!(shell.text("select max(credential_version)::text from accounts").await, "1");
    assert_eq!(shell.export().await, exported);
}
