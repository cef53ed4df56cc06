//! The commands `account history` and `caller review`, which answer from the audit log.

use nix::sys::signal::Signal;
use serde_json::Value;
use url::Url;

use crate::{
    harness::{
        broker::{Fixture, TestClient},
        database::TestDatabase,
        eventually,
        process::{BrokerSetup, CommandOutput},
    },
    roles::{ACCESS, AUDITOR, database_with_roles},
};

/// The exit code of a review that found something.
const FOUND: Option<i32> = Some(3);

/// Runs the command under a login that has `roles` and no more.
async fn run_as(database: &TestDatabase, roles: &[&str], command: &[&str]) -> CommandOutput {
    let mut url = Url::parse(database.url()).unwrap();
    // The server's other databases have their own tests, and share its roles.
    let role = format!("reviewer_of_{}", url.path().trim_start_matches('/'));
    database.sql(&format!("create role {role}; grant {} to {role}", roles.join(", "))).await;
    url.query_pairs_mut().append_pair("options[role]", &role);
    let setup = BrokerSetup::new(url.as_str(), "http://127.0.0.1:9/api/1.1").await;
    let ran = setup.run(command).await;
    database.sql(&format!("drop role {role}")).await;
    ran
}

#[tokio::test]
async fn the_history_of_an_account_tells_its_issues_its_changes_and_who_was_served_how_often() {
    let fixture = Fixture::new().await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.add_account("other", "id-2", "SK.1").await;
    let billing = fixture.add_caller("billing", &["*"]).await;
    let stranger = fixture.add_caller("stranger", &["other"]).await;
    let mut serve = setup.serve().await;
    let (billing, stranger) = (
        TestClient::connect(&setup.endpoint(), &billing).await,
        TestClient::connect(&setup.endpoint(), &stranger).await,
    );
    let token = eventually("a token", async || billing.get("acme").await.ok()).await.access_token;
    for _ in 0..4 {
        billing.get("acme").await.unwrap();
    }
    stranger.get("acme").await.unwrap_err();
    stranger.get("other").await.ok();
    setup.run(&["account", "disable", "acme", "--reason", "TICKET 7"]).await.ok();
    setup.run(&["account", "enable", "acme"]).await.ok();
    eventually("the changes are recorded", async || {
        let recorded = fixture.audit_events("account = 'acme' and event = 'account_changed'").await;
        (recorded.len() >= 2).then_some(())
    })
    .await;
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());

    let table = setup.run(&["account", "history", "acme"]).await.ok();
    let line = |text: &str| {
        table.lines().find(|line| line.contains(text)).unwrap_or_else(|| panic!("{text}: {table}"))
    };
    assert!(line("account_registered").contains("client_id=id-1"), "{table}");
    assert!(line("reason=\"TICKET 7\"").contains("account_changed"), "{table}");
    assert!(line("token_issued").contains("generation="), "{table}");
    assert!(!table.contains("other") && !table.contains("id-2"), "{table}");
    assert!(!table.contains(&token) && !table.contains("SK."), "{table}");

    let json = setup.run(&["account", "history", "acme", "--json"]).await.ok();
    let history: Value = serde_json::from_str(&json).unwrap();
    let served = history["callers"].as_array().unwrap();
    let counts: Vec<_> = served
        .iter()
        .map(|it| (it["caller"].as_str(), it["served"].as_i64(), it["refused"].as_i64()))
        .collect();
    // Earlier attempts to get the first token may have failed.
    assert_eq!((counts[0].0, counts[0].1), (Some("billing"), Some(5)), "{json}");
    assert_eq!(counts[1], (Some("stranger"), Some(0), Some(1)), "{json}");

    // Nothing happened in that time, and of an unknown account nothing is known.
    for line in [
        &["account", "history", "acme", "--until", "2001-01-01T00:00:00Z"][..],
        &["account", "history", "nobody"],
    ] {
        let said = setup.run(line).await.failed();
        assert!(said.contains("the log has no record of account"), "{said}");
    }
}

/// A database with callers of long ago, and with calls some days ago, which are inserted as a broker delivers them.
async fn database_with_calls(calls: &[(&str, &str, Option<&str>, &str, i64)]) -> TestDatabase {
    let database = database_with_roles().await;
    database
        .sql(
            "delete from callers;
             insert into callers (name) values ('billing'), ('idle'), ('off');
             insert into caller_credentials (caller_id, kind, bearer_sha256, ends_at)
                 select id, 'bearer', sha256(name::bytea), now() + interval '3 days' from callers
                     where name = 'billing';
             insert into caller_credentials (caller_id, kind, bearer_sha256)
                 select id, 'bearer', sha256(name::bytea) from callers where name <> 'billing';
             insert into grants (caller_id, pattern)
                 select id, pattern from callers, unnest('{acme,shop-*,old-*}'::text[]) pattern
                     where name = 'billing';
             insert into grants (caller_id, pattern) select id, 'acme' from callers where name <> 'billing';
             update callers set enabled = false where name = 'off';",
        )
        .await;
    database
        .sql_past_triggers(
            "update callers set created_at = now() - interval '1 year';
             update grants set created_at = now() - interval '1 year';",
        )
        .await;
    for (seq, (caller, event, account, outcome, days_ago)) in calls.iter().enumerate() {
        let account = account.map_or("null".into(), |account| format!("'{account}'"));
        database
            .sql(&format!(
                "select audit_ensure_partition(((now() at time zone 'UTC') - interval '{days_ago} days')::date);
                 insert into audit_events (instance, chain, seq, at, event, caller, account, outcome, count, detail,
                     prev_hash, hash)
                 values ('i', 'c', {seq}, now() - interval '{days_ago} days', '{event}', '{caller}', {account},
                     '{outcome}', 1, '{{}}', sha256(''), sha256(''))"
            ))
            .await;
    }
    database
}

/// The findings of the review, as `kind caller subject`.
fn findings(ran: &CommandOutput) -> Vec<String> {
    let report: Value = serde_json::from_str(&ran.stdout).unwrap_or_else(|_| panic!("{ran:?}"));
    let word = |finding: &Value, name: &str| finding[name].as_str().unwrap_or("-").to_owned();
    let findings = report["findings"].as_array().unwrap().iter();
    findings
        .map(|it| [word(it, "finding"), word(it, "caller"), word(it, "pattern")].join(" "))
        .collect()
}

#[tokio::test]
async fn a_review_reports_what_was_not_used_what_ends_soon_and_what_never_ends() {
    let database = database_with_calls(&[
        ("billing", "get_token", Some("acme"), "ok", 1),
        ("billing", "get_token", Some("shop-1"), "unavailable", 80),
        ("billing", "get_token", Some("old-1"), "ok", 100),
        ("billing", "get_token", Some("old-2"), "permission_denied", 2),
        ("idle", "get_token", Some("acme"), "ok", 95),
    ])
    .await;
    let both = [ACCESS, AUDITOR];
    let review = run_as(&database, &both, &["caller", "review", "--json"]).await;
    assert_eq!(review.code, FOUND, "{review:?}");
    assert_eq!(
        findings(&review),
        [
            "unused_grant billing old-*",
            "ending_bearer billing -",
            "idle_caller idle -",
            "endless_bearer idle -",
        ],
        "{review:?}"
    );
    // A longer time reaches the calls that make them used.
    let longer = ["caller", "review", "--unused", "200d", "--ending", "1d", "--json"];
    let review = run_as(&database, &both, &longer).await;
    assert_eq!(findings(&review), ["endless_bearer idle -"], "{review:?}");

    let table = run_as(&database, &both, &["caller", "review"]).await;
    assert!(table.stdout.contains("unused grant    billing  old-*"), "{table:?}");

    database.sql("update caller_credentials set revoked_at = now() where ends_at is null").await;
    let nothing = run_as(&database, &both, &longer).await;
    assert_eq!((nothing.code, findings(&nothing)), (Some(0), vec![]), "{nothing:?}");

    // Each of the roles alone is not enough, and the other one is named.
    for (role, lacking) in [(ACCESS, AUDITOR), (AUDITOR, ACCESS)] {
        let refused = run_as(&database, &[role], &["caller", "review"]).await.failed();
        assert!(refused.contains(&format!("lacks the role {lacking}")), "{refused}");
    }
}

#[tokio::test]
async fn a_review_does_not_report_as_unused_what_may_have_been_used_in_removed_records() {
    let database = database_with_calls(&[("billing", "get_token", Some("acme"), "ok", 1)]).await;
    database
        .sql(
            "select token_broker_change('audit_events', 'prune', 0,
                 ((now() at time zone 'UTC') - interval '60 days')::date::text, '{}')",
        )
        .await;
    let both = [ACCESS, AUDITOR];
    let review = run_as(&database, &both, &["caller", "review", "--json"]).await;
    assert_eq!(findings(&review), ["ending_bearer billing -", "endless_bearer idle -"]);
    assert!(review.stderr.contains("3 grants or callers were not used since"), "{review:?}");
    // As the note says, a shorter time can be judged.
    let days = review.stderr.split("--unused ").nth(1).unwrap().split(" reports").next().unwrap();
    let review = run_as(&database, &both, &["caller", "review", "--unused", days, "--json"]).await;
    assert_eq!(
        findings(&review),
        [
            "unused_grant billing old-*",
            "unused_grant billing shop-*",
            "ending_bearer billing -",
            "idle_caller idle -",
            "endless_bearer idle -",
        ],
        "{review:?}"
    );
    assert!(!review.stderr.contains("not known"), "{review:?}");
}
