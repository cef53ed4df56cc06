//! `caller import` and `caller export`: files of callers and grants that are kept elsewhere and applied again.

use std::fs;

use sqlx::AssertSqlSafe;
use tempfile::TempDir;
use url::Url;

use crate::{
    harness::{
        database::TestDatabase,
        process::{CommandOutput, program, run},
    },
    roles::{ACCESS, ROLES},
};

struct Shell {
    database: TestDatabase,
    home: TempDir,
}

impl Shell {
    async fn new() -> Self {
        let database = TestDatabase::new().await;
        database.sql(ROLES).await;
        Self { database, home: TempDir::new().unwrap() }
    }

    async fn run(&self, arguments: &[&str]) -> CommandOutput {
        let mut url = Url::parse(self.database.url()).unwrap();
        url.query_pairs_mut().append_pair("options", &format!("-c role={ACCESS}"));
        let mut command = program(arguments);
        command.env("DATABASE_URL", url.as_str()).env("XDG_CONFIG_HOME", self.home.path());
        run(command, "").await
    }

    async fn import(&self, name: &str, content: &str, flags: &[&str]) -> CommandOutput {
        let file = self.home.path().join(name);
        fs::write(&file, content).unwrap();
        self.run(&[&["caller", "import", file.to_str().unwrap()], flags].concat()).await
    }

    async fn export(&self) -> String {
        self.run(&["caller", "export"]).await.ok()
    }

    async fn changes(&self) -> i64 {
        sqlx::query_scalar(AssertSqlSafe("select count(*) from changes"))
            .fetch_one(self.database.pool())
            .await
            .unwrap()
    }
}

const HEADER: &str = "name,enabled,rate_limit,description,spiffe_ids,dns_names,grants";

#[tokio::test]
async fn callers_with_grants_limits_and_certificate_names_are_exported_and_imported_again() {
    let shell = Shell::new().await;
    let text = format!(
        "{HEADER}\n\
        billing,true,,\"two\nlines\",spiffe://example.com/billing,,\"acme-*=get,list@2100-01-01T00:00:00Z demo\"\n\
        shop,FALSE,50,,,a.example.com b.example.com@2100-01-01T09:00:00+09:00,\n"
    );
    let ran = shell.import("callers.csv", &text, &[]).await;
    assert!(ran.stderr.ends_with("2 registered, 0 changed, 0 as they were\n"), "{ran:?}");
    ran.ok();
    let bearer = shell.run(&["caller", "bearer", "add", "shop"]).await.ok();
    let exported = shell.export().await;
    assert_eq!(
        exported,
        format!(
            "{HEADER}\n\
            billing,true,,\"two\nlines\",spiffe://example.com/billing,,\
            \"acme-*=get,list@2100-01-01T00:00:00Z demo=get,report,list\"\n\
            shop,false,50,,,a.example.com b.example.com@2100-01-01T00:00:00Z,"
        )
    );
    assert!(!exported.contains(&bearer));

    // The same again changes nothing, in either form.
    let before = shell.changes().await;
    let lines = shell.run(&["caller", "export", "--format", "jsonl"]).await.ok();
    for (name, content) in [("a.csv", text.as_str()), ("b.csv", &exported), ("c.jsonl", &lines)] {
        let ran = shell.import(name, content, &["--update", "--prune", "--yes"]).await;
        assert!(ran.stderr.ends_with("0 registered, 0 changed, 2 as they were\n"), "{ran:?}");
        assert_eq!(ran.ok(), "");
    }
    let refused = shell.import("callers.csv", &text, &[]).await.failed();
    assert!(refused.contains("line 4, column name: there is such a caller already"), "{refused}");
    assert_eq!(shell.changes().await, before);
    // Into an empty database, it is the same set-up.
    let other = Shell::new().await;
    other.import("callers.csv", &exported, &[]).await.ok();
    assert_eq!(other.export().await, exported);
}

#[tokio::test]
async fn what_the_file_lacks_is_removed_only_by_prune_with_yes() {
    let shell = Shell::new().await;
    let text =
        format!("{HEADER}\none,true,,,,one.example.com,a b\ntwo,true,,,,,c\nthree,true,,,,,\n");
    shell.import("callers.csv", &text, &[]).await.ok();
    let whole = shell.export().await;
    let fewer = format!("{HEADER}\none,true,7,,,,a\ntwo,true,,,,,c\n");

    let refused = shell.import("fewer.csv", &fewer, &["--update", "--prune"]).await.failed();
    let says = "--prune removes 1 callers, 1 grants and 1 certificate names";
    assert!(refused.contains(says) && refused.contains("say --yes"), "{refused}");
    assert_eq!(shell.export().await, whole);
    let dry = shell.import("fewer.csv", &fewer, &["--update", "--prune", "--dry-run"]).await;
    assert!(dry.stderr.contains(says), "{dry:?}");
    assert_eq!(dry.ok(), "one: rate_limit, dns_names, grants\nthree: removed");
    let refused = shell
        .import("none.csv", &format!("{HEADER}\n"), &["--update", "--prune", "--yes"])
        .await
        .failed();
    assert!(refused.contains("none.csv has no rows"), "{refused}");
    assert_eq!(shell.export().await, whole);

    let ran = shell.import("fewer.csv", &fewer, &["--update"]).await;
    assert!(ran.stderr.contains("left: 1 callers, 1 grants and 1 certificate names"), "{ran:?}");
    assert_eq!(ran.ok(), "one: rate_limit");
    assert_eq!(shell.export().await, whole.replace("one,true,,", "one,true,7,"));

    let ran = shell.import("fewer.csv", &fewer, &["--update", "--prune", "--yes"]).await;
    assert!(ran.stderr.contains(says), "{ran:?}");
    assert_eq!(ran.ok(), "one: dns_names, grants\nthree: removed");
    let exported = shell.export().await;
    assert_eq!(
        exported,
        format!(
            "{HEADER}\none,true,7,,,,\"a=get,report,list\"\ntwo,true,,,,,\"c=get,report,list\""
        )
    );
}

/// A name that was revoked does not come back with an older file, and a name can move to another caller.
#[tokio::test]
async fn names_in_certificates_move_between_callers_and_revoked_ones_stay_revoked() {
    let shell = Shell::new().await;
    let text = format!(
        "{HEADER}\none,true,,,,a.example.com b.example.com,\ntwo,true,,,,,\ngone,true,,,,c.example.com,\n"
    );
    shell.import("callers.csv", &text, &[]).await.ok();
    let moved =
        format!("{HEADER}\none,true,,,,b.example.com,\ntwo,true,,,,a.example.com c.example.com,\n");
    let refused = shell.import("moved.csv", &moved, &["--update"]).await.failed();
    assert!(
        refused.contains("line 3, column dns_names: a name belongs to caller one already"),
        "{refused}"
    );
    let ran = shell.import("moved.csv", &moved, &["--update", "--prune", "--yes"]).await;
    assert_eq!(ran.ok(), "one: dns_names\ntwo: dns_names\ngone: removed");
    let exported = shell.export().await;
    assert_eq!(exported, moved.trim_end());

    let shown = shell.run(&["caller", "show", "one", "--json"]).await.ok();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let id = shown["credentials"][0]["id"].to_string();
    shell.run(&["caller", "identity", "revoke", &id]).await.ok();
    let refused = shell.import("moved.csv", &moved, &["--update"]).await.failed();
    assert!(refused.contains("line 2, column dns_names: a name was revoked"), "{refused}");
}

#[tokio::test]
async fn every_bad_row_of_callers_is_named_by_line_and_column_and_nothing_is_registered() {
    let shell = Shell::new().await;
    shell.run(&["caller", "add", "known", "--dns", "known.example.com"]).await.ok();
    let before = shell.export().await;
    let rows = format!(
        "{HEADER}\n\
        good,true,,,,,a\n\
        Canary,true,,,,,a\n\
        a,canary,,,,,a\n\
        b,true,canary,,,,a\n\
        c,true,,,tbk_canary,,a\n\
        d,true,,,,known.example.com,a\n\
        e,true,,,,,a=canary\n\
        f,true,,,,,Canary*\n\
        g,true,,,,,a@canary\n\
        good,true,,,,,a\n"
    );
    let output = shell.import("callers.csv", &rows, &[]).await.failed();
    for says in [
        "line 3, column name: account name must match",
        "line 4, column enabled: it must be true or false",
        "line 5, column rate_limit: it must be 1 to 1000000",
        "line 6, column spiffe_ids: SPIFFE ID must match",
        "line 7, column dns_names: a name belongs to caller known already",
        "line 8, column grants: right must be get, report or list",
        "line 9, column grants: account pattern must match",
        "line 10, column grants: after @ there must be a time of RFC 3339",
        "line 11, column name: line 2 has the same",
    ] {
        assert!(output.contains(says), "{says}: {output}");
    }
    assert!(!output.to_lowercase().contains("canary"), "{output}");
    assert_eq!(shell.export().await, before);
}
