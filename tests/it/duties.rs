//! The duties of the change feed are independent: one malformed row, one lock or one flood of changes affects
//! only itself, and changes of access are followed whatever else fails.

use std::time::Duration;

use nix::sys::signal::Signal;
use sqlx::AssertSqlSafe;
use token_broker::{
    crypto::bearer::Bearer,
    domain::{account::AccountId, token::Generation},
    store::tokens::{self, TimeLeft},
};
use tonic::Code;

use crate::{
    harness::{
        broker::{Fixture, TestBroker, TestClient},
        database::TestDatabase,
        eventually,
        http::http,
        process::BrokerSetup,
    },
    outages::until_readiness_says,
};

/// Runs statements while the triggers are disabled, as a restore or a superuser might.
async fn past_the_triggers(database: &TestDatabase, statements: &str) {
    let statements =
        format!("begin; set local session_replication_role = replica; {statements}; commit");
    database.sql(&statements).await;
}

async fn readiness(broker: &TestBroker) -> String {
    http(broker.app.ops_address, "GET", "/readyz", "").await.1
}

/// Waits until a call for `account` is refused with one of `codes`.
async fn until_refused(what: &str, client: &TestClient, account: &str, codes: &[Code]) {
    eventually(&format!("a refusal: {what}"), async || {
        let refused = client.get(account).await.err()?;
        codes.contains(&refused.code()).then_some(())
    })
    .await;
}

async fn until_served(what: &str, client: &TestClient, account: &str) {
    eventually(&format!("a token: {what}"), async || client.get(account).await.ok()).await;
}

/// What the triggers would refuse, and one caller to whom it happens. `$caller` stands for its id.
const MALFORMED_ACCESS: &[(&str, &str)] = &[
    ("callers", "update callers set name = 'Shop 1' where id = $caller"),
    ("callers", "update callers set name = '' where id = $caller"),
    ("callers", "update callers set rate_limit = -5 where id = $caller"),
    ("callers", "update callers set rate_limit = 0 where id = $caller"),
    (
        "caller_credentials",
        "update caller_credentials set ends_at = 'infinity' where caller_id = $caller",
    ),
    (
        "caller_credentials",
        "update caller_credentials set ends_at = '294276-01-01Z' where caller_id = $caller",
    ),
    (
        "caller_credentials",
        "update caller_credentials set kind = 'password' where caller_id = $caller",
    ),
    (
        "caller_credentials",
        "update caller_credentials set identity = 'x' where caller_id = $caller",
    ),
    (
        "caller_credentials",
        "update caller_credentials set bearer_sha256 = substr(bearer_sha256, 2)
        where caller_id = $caller",
    ),
    (
        "caller_credentials",
        "update caller_credentials set bearer_sha256 = null where caller_id = $caller",
    ),
    ("grants", "update grants set pattern = 'ac*m*' where caller_id = $caller"),
    ("grants", "update grants set pattern = 'Acme' where caller_id = $caller"),
    ("grants", "update grants set pattern = '' where caller_id = $caller"),
    ("grants", "update grants set rights = '{get,admin}' where caller_id = $caller"),
    ("grants", "update grants set rights = array['get', null] where caller_id = $caller"),
    ("grants", "update grants set rights = '{{get},{list}}' where caller_id = $caller"),
    ("grants", "update grants set ends_at = 'infinity' where caller_id = $caller"),
    ("grants", "update grants set ends_at = '-infinity' where caller_id = $caller"),
];

/// A caller, credential or grant that the triggers would refuse gives no access, is named in `/readyz`, and
/// affects no other one: they are served and revoked as ever, also after a restart.
#[tokio::test]
async fn a_malformed_row_of_access_gives_none_and_affects_no_other_caller() {
    let fixture = Fixture::new().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let good = fixture.add_caller("good", &["acme"]).await;
    let later = fixture.add_caller("later", &["acme"]).await;
    let mut bearers: Vec<Bearer> = vec![];
    for number in 0..MALFORMED_ACCESS.len() {
        bearers.push(fixture.add_caller(&format!("caller-{number}"), &["acme"]).await);
    }
    let broker = fixture.start().await;
    let (good_client, later_client) = (broker.client(&good).await, broker.client(&later).await);
    until_served("before", &later_client, "acme").await;
    let mut clients = vec![];
    for bearer in &bearers {
        let client = broker.client(bearer).await;
        client.get("acme").await.unwrap();
        clients.push(client);
    }

    let mut ids: Vec<i64> = vec![];
    for (number, (_, statement)) in MALFORMED_ACCESS.iter().enumerate() {
        let query = format!("select id from callers where name = 'caller-{number}'");
        let id = sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(fixture.database.pool());
        ids.push(id.await.unwrap());
        let statement = statement.replace("$caller", &ids[number].to_string());
        past_the_triggers(&fixture.database, &statement).await;
    }
    let refused = [Code::Unauthenticated, Code::PermissionDenied];
    for ((_, statement), client) in MALFORMED_ACCESS.iter().zip(&clients) {
        until_refused(statement, client, "acme", &refused).await;
        good_client.get("acme").await.unwrap();
    }
    let body = readiness(&broker).await;
    for text in ["18 cannot be used", "callers row ", "caller_credentials row ", "grants row "] {
        assert!(body.contains(text), "{text}: {body}");
    }
    fixture.database.sql("update callers set enabled = false where name = 'later'").await;
    until_refused("disabled", &later_client, "acme", &[Code::Unauthenticated]).await;
    broker.stop().await;

    let broker = fixture.start().await;
    broker.client(&good).await.get("acme").await.unwrap();
    for bearer in bearers.iter().chain([&later]) {
        let status = broker.client(bearer).await.get("acme").await.unwrap_err();
        assert!(refused.contains(&status.code()), "{status}");
    }
    // Once it is correct, the row counts again.
    let repair = format!("update callers set rate_limit = null where id = {}", ids[2]);
    fixture.database.sql(&repair).await;
    until_served("after the repair", &broker.client(&bearers[2]).await, "acme").await;
    until_readiness_says(&broker, "17 cannot be used").await;
    broker.stop().await;
}

/// What the triggers would refuse, and the column that `account_status` names. `$account` stands for an id.
const MALFORMED_ACCOUNTS: &[(&str, &str)] = &[
    ("accounts.name", "update accounts set name = 'Acme' where id = $account"),
    ("accounts.name", "update accounts set name = repeat('x', 64) where id = $account"),
    ("accounts.client_id", "update accounts set client_id = 'id 1' where id = $account"),
    ("accounts.client_id", "update accounts set client_id = repeat('y', 21) where id = $account"),
    (
        "accounts.reissue_requested_at",
        "update accounts set reissue_requested_at = 'infinity' where id = $account",
    ),
    (
        "refreshes.attempt_started_at",
        "update refreshes set attempt_started_at = '-infinity',
        changed = pg_current_xact_id() where account_id = $account",
    ),
    (
        "refreshes.lease_until",
        "update refreshes set lease_until = '294276-01-01Z',
        changed = pg_current_xact_id() where account_id = $account",
    ),
    (
        "refreshes.next_attempt_at",
        "update refreshes set next_attempt_at = 'infinity',
        changed = pg_current_xact_id() where account_id = $account",
    ),
    (
        "refreshes.new_secret_retry_at",
        "update refreshes set new_secret_retry_at = 'infinity',
        changed = pg_current_xact_id() where account_id = $account",
    ),
    (
        "refreshes.interval_exceptions_since",
        "update refreshes set interval_exceptions_since = 'infinity',
        changed = pg_current_xact_id() where account_id = $account",
    ),
    (
        "refreshes.lease_id",
        "update refreshes set lease_id = 9223372036854775807,
        changed = pg_current_xact_id() where account_id = $account",
    ),
    (
        "refreshes.lease_id",
        "update refreshes set lease_id = -9223372036854775808,
        changed = pg_current_xact_id() where account_id = $account",
    ),
    (
        "refreshes.consecutive_failures",
        "update refreshes set consecutive_failures = 2147483647,
        changed = pg_current_xact_id() where account_id = $account",
    ),
    (
        "refreshes.consecutive_failures",
        "update refreshes set consecutive_failures = -1,
        changed = pg_current_xact_id() where account_id = $account",
    ),
    (
        "tokens.generation",
        "update tokens set generation = 9223372036854775807 where account_id = $account",
    ),
    ("tokens.generation", "update tokens set generation = -1 where account_id = $account"),
    ("tokens.issued_at", "update tokens set issued_at = '-infinity' where account_id = $account"),
    ("tokens.expires_at", "update tokens set expires_at = 'infinity' where account_id = $account"),
    (
        "tokens.repeated_at",
        "update tokens set repeated_at = '-infinity' where account_id = $account",
    ),
];

/// An account that the triggers would refuse is not served, is named in `/readyz` and `account_status`, and
/// affects no other one: they are issued for and served as ever, also after a restart.
#[tokio::test]
async fn a_malformed_account_is_not_served_and_affects_no_other_account() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    for number in 0..MALFORMED_ACCOUNTS.len() {
        let client_id = format!("m-{number}");
        fixture.upstream.add_account(&client_id, "SK.m");
        fixture.add_account(&format!("account-{number}"), &client_id, "SK.m").await;
    }
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let mut ids: Vec<i64> = vec![];
    for number in 0..MALFORMED_ACCOUNTS.len() {
        let name = format!("account-{number}");
        until_served("before", &client, &name).await;
        fixture.wait_for_state(&name, "fresh").await;
        let query = format!("select id from accounts where name = '{name}'");
        let id = sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(fixture.database.pool());
        ids.push(id.await.unwrap());
    }

    for ((_, statement), id) in MALFORMED_ACCOUNTS.iter().zip(&ids) {
        let statement = statement.replace("$account", &id.to_string());
        past_the_triggers(&fixture.database, &statement).await;
    }
    // A row that has never been good, and one whose secret cannot be sealed.
    past_the_triggers(
        &fixture.database,
        "insert into accounts (name, client_id, client_secret) values ('Bad', 'bad', 'SK.bad')",
    )
    .await;
    for (number, (_, statement)) in MALFORMED_ACCOUNTS.iter().enumerate() {
        let name = format!("account-{number}");
        until_refused(statement, &client, &name, &[Code::NotFound]).await;
        client.get("acme").await.unwrap();
    }
    until_readiness_says(&broker, "accounts.client_secret row ").await;
    let body = readiness(&broker).await;
    for text in ["accounts row ", "refreshes row ", "tokens row ", "\"answers\""] {
        assert!(body.contains(text), "{text}: {body}");
    }
    for ((column, _), id) in MALFORMED_ACCOUNTS.iter().zip(&ids) {
        let query = "select s.state, s.hint from account_status s join accounts a using (name)
            where a.id = $1";
        let (state, hint): (String, String) =
            sqlx::query_as(query).bind(id).fetch_one(fixture.database.pool()).await.unwrap();
        assert_eq!(state, "unusable", "{column}");
        assert!(hint.ends_with(&format!("correct {column}")), "{hint}");
    }
    fixture.add_account("new", "id-2", "SK.2").await;
    until_served("a new account", &client, "new").await;
    broker.stop().await;

    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    client.get("acme").await.unwrap();
    client.get("account-3").await.unwrap_err();
    fixture.add_account("newer", "id-3", "SK.3").await;
    until_served("a new account after the restart", &client, "newer").await;
    let repair = format!("update accounts set reissue_requested_at = null where id = {}", ids[4]);
    fixture.database.sql(&repair).await;
    until_served("a repaired account", &client, "account-4").await;
    broker.stop().await;
}

/// Locks that admins and migrations take. The rest of the broker may wait for them, but not a revocation.
const LOCKS: &[(&str, &str)] = &[
    ("accounts", "exclusive"),
    ("accounts", "access exclusive"),
    ("refreshes", "exclusive"),
    ("refreshes", "access exclusive"),
    ("tokens", "access exclusive"),
    ("changes", "exclusive"),
    ("changes", "access exclusive"),
    ("grants", "access exclusive"),
    ("caller_credentials", "access exclusive"),
    ("deployment", "access exclusive"),
    ("upstream_pace", "access exclusive"),
    ("instances", "access exclusive"),
    ("audit_chains", "access exclusive"),
];

/// While any other table is locked, a caller that is disabled is refused, and served once it is enabled again, an
/// account that is disabled is not served, and other callers are served.
#[tokio::test]
async fn a_locked_table_does_not_delay_a_revocation() {
    let fixture = Fixture::new().await;
    let good = fixture.add_caller("good", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.add_account("bank", "id-2", "SK.2").await;
    let broker = fixture.start().await;
    let good = broker.client(&good).await;
    until_served("before", &good, "acme").await;
    until_served("before", &good, "bank").await;

    for (number, (table, mode)) in LOCKS.iter().enumerate() {
        let what = format!("{table} in {mode} mode");
        let name = format!("caller-{number}");
        let client = broker.client(&fixture.add_caller(&name, &["*"]).await).await;
        until_served(&what, &client, "acme").await;
        until_served(&what, &good, "bank").await;

        let mut locking = fixture.database.pool().begin().await.unwrap();
        let lock = format!("lock table {table} in {mode} mode");
        sqlx::raw_sql(AssertSqlSafe(lock)).execute(&mut *locking).await.unwrap();
        let disable = format!("update callers set enabled = false where name = '{name}'");
        if *table == "changes" {
            // The trigger would wait for the lock.
            past_the_triggers(&fixture.database, &disable).await;
        } else {
            fixture.database.sql(&disable).await;
        }
        until_refused(&what, &client, "acme", &[Code::Unauthenticated]).await;
        if *table != "changes" {
            // What gives access is read too, though not together with the locked table.
            let enable = format!("update callers set enabled = true where name = '{name}'");
            fixture.database.sql(&enable).await;
            until_served(&what, &client, "acme").await;
        }
        if !["changes", "accounts"].contains(table) {
            let disable = "update accounts set enabled = false where name = 'bank'";
            fixture.database.sql(disable).await;
            until_refused(&what, &good, "bank", &[Code::FailedPrecondition]).await;
        }
        good.get("acme").await.unwrap();
        let body = readiness(&broker).await;
        assert!(!body.contains("does not answer"), "{what}: {body}");
        locking.rollback().await.unwrap();
        fixture.database.sql("update accounts set enabled = true where name = 'bank'").await;
    }
    until_readiness_says(&broker, "\"answers\"").await;
    broker.stop().await;
}

/// Each table that gives access is read for itself if they cannot be read together: while that of the bearers is
/// locked, a new grant takes effect.
#[tokio::test]
async fn a_locked_table_of_bearers_does_not_delay_a_grant() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["acme"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.add_account("bank", "id-2", "SK.2").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    until_served("before", &client, "acme").await;
    client.get("bank").await.unwrap_err();
    let mut locking = fixture.database.pool().begin().await.unwrap();
    let lock = "lock table caller_credentials in access exclusive mode";
    sqlx::query(lock).execute(&mut *locking).await.unwrap();
    let grant =
        "insert into grants (caller_id, pattern, rights) select id, 'bank', '{get}' from callers";
    fixture.database.sql(grant).await;
    until_served("while the bearers are locked", &client, "bank").await;
    locking.rollback().await.unwrap();
    broker.stop().await;
}

/// What takes access away, the table that says so, and how `victim` is refused `acme`.
const WITHDRAWALS: &[(&str, &str, Code)] = &[
    ("callers", "update callers set enabled = false where name = 'victim'", Code::Unauthenticated),
    ("callers", "delete from callers where name = 'victim'", Code::Unauthenticated),
    (
        "caller_credentials",
        "update caller_credentials set revoked_at = now() where caller_id = $victim",
        Code::Unauthenticated,
    ),
    (
        "caller_credentials",
        "update caller_credentials set ends_at = now() where caller_id = $victim",
        Code::Unauthenticated,
    ),
    (
        "caller_credentials",
        "delete from caller_credentials where caller_id = $victim",
        Code::Unauthenticated,
    ),
    ("grants", "delete from grants where caller_id = $victim", Code::PermissionDenied),
    (
        "grants",
        "update grants set rights = '{list}' where caller_id = $victim",
        Code::PermissionDenied,
    ),
    (
        "accounts",
        "update accounts set enabled = false, description = 'gone' where name = 'acme'",
        Code::FailedPrecondition,
    ),
    ("accounts", "delete from accounts where name = 'acme'", Code::NotFound),
];

/// Part of the promise that a lock affects only what it locks: whoever locks a table right after access was taken
/// away, before the broker could read it, does not prolong that access. Others are served meanwhile.
#[tokio::test]
async fn what_was_taken_away_before_its_table_was_locked_is_taken_away() {
    let fixture = Fixture::new().await;
    let good = fixture.add_caller("good", &["*"]).await;
    fixture.add_account("bank", "id-2", "SK.2").await;
    let broker = fixture.start().await;
    let good = broker.client(&good).await;
    until_served("before", &good, "bank").await;
    for (table, statement, code) in WITHDRAWALS {
        fixture
            .database
            .sql("delete from callers where name = 'victim'; delete from accounts where name = 'acme'")
            .await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let client = broker.client(&fixture.add_caller("victim", &["acme"]).await).await;
        until_served(statement, &client, "acme").await;
        let id: i64 = sqlx::query_scalar("select id from callers where name = 'victim'")
            .fetch_one(fixture.database.pool())
            .await
            .unwrap();

        // The lock is granted with the commit, before anybody can read what was committed.
        let mut withdrawing = fixture.database.pool().begin().await.unwrap();
        let statement = statement.replace("$victim", &id.to_string());
        sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&mut *withdrawing).await.unwrap();
        let mut locking = fixture.database.pool().begin().await.unwrap();
        let lock = format!("lock table {table} in access exclusive mode");
        let locked = tokio::spawn(async move {
            sqlx::raw_sql(AssertSqlSafe(lock)).execute(&mut *locking).await.unwrap();
            locking
        });
        let waits = format!(
            "select count(*) from pg_locks where relation = '{table}'::regclass
                and mode = 'AccessExclusiveLock' and not granted"
        );
        eventually("the lock waits", async || {
            let query = sqlx::query_scalar::<_, i64>(AssertSqlSafe(waits.clone()));
            (query.fetch_one(fixture.database.pool()).await.unwrap() == 1).then_some(())
        })
        .await;
        withdrawing.commit().await.unwrap();
        let locking = locked.await.unwrap();

        until_refused(&statement, &client, "acme", &[*code]).await;
        good.get("bank").await.unwrap();
        until_readiness_says(&broker, "its changes cannot be followed").await;
        locking.rollback().await.unwrap();
        until_readiness_says(&broker, "\"answers\"").await;
        assert_eq!(client.get("acme").await.unwrap_err().code(), *code, "{statement}");
        good.get("bank").await.unwrap();
    }
    broker.stop().await;
}

/// Ends the session over which the broker verifies the database.
const END_GUARD: &str = "select pg_terminate_backend(pid) from pg_locks
    where locktype = 'advisory' and mode = 'ExclusiveLock' and granted
        and database = (select oid from pg_database where datname = current_database())";

/// Part of the promise that a lock affects only what it locks: a table that tells the database's history may be
/// locked while the broker's sessions are lost. Access is followed all the same, since the server has been running.
#[tokio::test]
async fn a_lost_session_while_a_table_is_locked_delays_no_revocation() {
    let fixture = Fixture::new().await;
    let good = fixture.add_caller("good", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let good = broker.client(&good).await;
    until_served("before", &good, "acme").await;
    for table in ["changes", "audit_chains", "deployment", "tokens"] {
        let client = broker.client(&fixture.add_caller(table, &["*"]).await).await;
        until_served(table, &client, "acme").await;
        let mut locking = fixture.database.pool().begin().await.unwrap();
        let lock = format!("lock table {table} in access exclusive mode");
        sqlx::raw_sql(AssertSqlSafe(lock)).execute(&mut *locking).await.unwrap();
        fixture.database.sql(END_GUARD).await;
        let disable = format!("update callers set enabled = false where name = '{table}'");
        if table == "changes" {
            past_the_triggers(&fixture.database, &disable).await;
        } else {
            fixture.database.sql(&disable).await;
        }
        until_refused(table, &client, "acme", &[Code::Unauthenticated]).await;
        good.get("acme").await.unwrap();
        locking.rollback().await.unwrap();
        until_readiness_says(&broker, "\"answers\"").await;
    }
    broker.stop().await;
}

/// Without its identity, the database is recognised by where it is and by the rows that were seen in it.
#[tokio::test]
async fn an_identity_that_was_deleted_is_restored_although_every_session_is_lost() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    until_served("before", &client, "acme").await;
    let identity = "select id || ' ' || epoch from deployment";
    let before: String =
        sqlx::query_scalar(identity).fetch_one(fixture.database.pool()).await.unwrap();
    let lose = "delete from deployment; select pg_terminate_backend(pid) from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid() and application_name <> 'test'";
    let identity_of = async || {
        let row = sqlx::query_scalar::<_, String>(identity);
        row.fetch_optional(fixture.database.pool()).await.unwrap()
    };
    fixture.database.sql(lose).await;
    let restored = eventually("the identity again", identity_of).await;
    assert_eq!(restored, before);
    fixture.database.sql("update callers set enabled = false").await;
    until_refused("disabled", &client, "acme", &[Code::Unauthenticated]).await;
    until_readiness_says(&broker, "\"answers\"").await;
    broker.stop().await;
    fixture.database.sql("delete from deployment").await;
    fixture.start().await.stop().await;
    assert_eq!(identity_of().await, Some(before));
}

/// A broker starts, and says what it waits for, while a table is locked.
#[tokio::test]
async fn a_lock_delays_a_start_and_does_not_fail_it() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    until_served("before", &broker.client(&bearer).await, "acme").await;
    broker.stop().await;

    let mut locking = fixture.database.pool().begin().await.unwrap();
    let lock = "lock table accounts in exclusive mode";
    sqlx::raw_sql(lock).execute(&mut *locking).await.unwrap();
    let broker = fixture.start().await;
    broker.client(&bearer).await.get("acme").await.unwrap();
    until_readiness_says(&broker, "(intake)").await;
    broker.stop().await;

    let lock = "lock table grants in access exclusive mode";
    sqlx::raw_sql(lock).execute(&mut *locking).await.unwrap();
    let start = fixture.start();
    tokio::pin!(start);
    // The start tries again until the lock is released.
    assert!(tokio::time::timeout(Duration::from_secs(2), &mut start).await.is_err());
    locking.rollback().await.unwrap();
    let broker = start.await;
    broker.client(&bearer).await.get("acme").await.unwrap();
    broker.stop().await;
}

/// Many new accounts do not delay a revocation behind them.
#[tokio::test]
async fn a_revocation_behind_ten_thousand_new_accounts_is_followed() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let good = fixture.add_caller("good", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.add_account("bank", "id-2", "SK.2").await;
    let broker = fixture.start().await;
    let (client, good) = (broker.client(&bearer).await, broker.client(&good).await);
    until_served("before", &client, "acme").await;
    until_served("before", &good, "bank").await;

    fixture.database.add_disabled_accounts("new", 10_000).await;
    fixture
        .database
        .sql(
            "update callers set enabled = false where name = 'demo';
             update accounts set enabled = false where name = 'bank'",
        )
        .await;
    until_refused("the caller", &client, "acme", &[Code::Unauthenticated]).await;
    until_refused("the account", &good, "bank", &[Code::FailedPrecondition]).await;
    good.get("acme").await.unwrap();
    broker.stop().await;
}

/// The broker inserts the rows that it needs, if they are missing.
#[tokio::test]
async fn missing_rows_that_the_broker_needs_are_inserted() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    until_served("before", &client, "acme").await;

    // Without triggers, nothing announces the account, and it has no row in `refreshes`.
    past_the_triggers(
        &fixture.database,
        "insert into accounts (name, client_id, client_secret) values ('bank', 'id-2', 'SK.2')",
    )
    .await;
    until_served("an account that was not announced", &client, "bank").await;
    fixture.database.sql("delete from upstream_pace").await;
    fixture.add_account("shop", "id-3", "SK.3").await;
    until_served("without a pace", &client, "shop").await;
    fixture.database.sql("delete from deployment").await;
    eventually("the deployment", async || {
        let rows: i64 = sqlx::query_scalar("select count(*) from deployment")
            .fetch_one(fixture.database.pool())
            .await
            .unwrap();
        (rows == 1).then_some(())
    })
    .await;
    client.get("acme").await.unwrap();
    broker.stop().await;
    fixture.start().await.stop().await;
}

/// What is written past the triggers is not announced, and is followed all the same.
#[tokio::test]
async fn changes_that_are_not_announced_are_found() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let good = fixture.add_caller("good", &["*"]).await;
    for (name, number) in [("acme", 1), ("bank", 2), ("gone", 3)] {
        fixture.add_account(name, &format!("id-{number}"), &format!("SK.{number}")).await;
    }
    let broker = fixture.start().await;
    let (client, good) = (broker.client(&bearer).await, broker.client(&good).await);
    for name in ["acme", "bank", "gone"] {
        until_served("before", &client, name).await;
    }
    past_the_triggers(
        &fixture.database,
        "update callers set enabled = false where name = 'demo';
         update accounts set enabled = false where name = 'bank';
         delete from tokens where account_id = (select id from accounts where name = 'gone');
         delete from accounts where name = 'gone'",
    )
    .await;
    until_refused("the caller", &client, "acme", &[Code::Unauthenticated]).await;
    until_refused("the disabled account", &good, "bank", &[Code::FailedPrecondition]).await;
    until_refused("the deleted account", &good, "gone", &[Code::NotFound]).await;
    good.get("acme").await.unwrap();
    broker.stop().await;
}

/// Changes that cannot be recorded as they are do not hinder the others.
#[tokio::test]
async fn a_malformed_change_is_recorded_and_hinders_no_other() {
    let fixture = Fixture::new().await;
    let broker = fixture.start().await;
    fixture
        .database
        .sql(
            "insert into changes (table_name, operation, row_id, subject, what)
                values ('callers', 'update', 1, 'nested', '{\"a\": {\"b\": 1}}');
             insert into changes (table_name, operation, row_id, subject, what, at)
                values ('callers', 'update', 1, 'timeless', '{}', 'infinity')",
        )
        .await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    eventually("the records", async || {
        let recorded = fixture
            .audit_events(
                "detail->>'caller' in ('nested', 'timeless') or event = 'account_registered'",
            )
            .await;
        (recorded.len() == 3).then_some(())
    })
    .await;
    broker.stop().await;
}

/// Commands show a time that cannot be read as unknown, or name its row; the other rows are shown.
#[tokio::test]
async fn commands_survive_times_that_cannot_be_read() {
    let fixture = Fixture::new().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.add_caller("demo", &["acme"]).await;
    fixture.add_caller("good", &["acme"]).await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let mut serve = setup.serve().await;
    fixture.wait_for_state("acme", "fresh").await;
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());

    for time in ["'infinity'", "'-infinity'", "'294276-01-01Z'"] {
        let statements = format!(
            "update accounts set reissue_requested_at = {time};
             update refreshes set attempt_started_at = {time}, next_attempt_at = {time},
                 new_secret_retry_at = {time}, last_requested_at = {time}, changed = pg_current_xact_id();
             update tokens set issued_at = {time}, expires_at = {time}, repeated_at = {time};
             insert into changes (table_name, operation, row_id, subject, what, at)
                 values ('callers', 'update', 1, 'timeless', '{{}}', {time});
             update instances set heartbeat_at = {time}, stopped_at = null, key_ids = '{{NULL}}'"
        );
        past_the_triggers(&fixture.database, &statements).await;
        let checked = setup.run(&["check"]).await;
        assert_eq!(checked.code, Some(1), "{checked:?}");
        for arguments in [&["account", "list"][..], &["account", "show", "acme"]] {
            for json in [None, Some("--json")] {
                let arguments: Vec<_> = arguments.iter().copied().chain(json).collect();
                let output = setup.run(&arguments).await.ok();
                assert!(output.contains("unusable"), "{output}");
            }
        }
        for arguments in [&["caller", "list"][..], &["caller", "show", "demo"]] {
            assert!(setup.run(arguments).await.ok().contains("demo"));
        }
        let instance: String = sqlx::query_scalar("select id from instances")
            .fetch_one(fixture.database.pool())
            .await
            .unwrap();
        let retired = setup.run(&["audit", "retire", &instance]).await;
        assert!(matches!(retired.code, Some(0 | 1)), "{retired:?}");
        assert!(!retired.stderr.contains("panicked"), "{retired:?}");

        let of_demo = "where caller_id = (select id from callers where name = 'demo')";
        for (table, column, condition) in [
            ("grants", "created_at", of_demo),
            ("grants", "ends_at", of_demo),
            ("caller_credentials", "created_at", of_demo),
            ("caller_credentials", "ends_at", of_demo),
            ("caller_credentials", "revoked_at", of_demo),
            ("callers", "created_at", "where name = 'demo'"),
            ("accounts", "created_at", ""),
            ("accounts", "updated_at", ""),
        ] {
            let update = |value: &str| format!("update {table} set {column} = {value} {condition}");
            past_the_triggers(&fixture.database, &update(time)).await;
            let show = if table == "accounts" {
                ["account", "show", "acme"]
            } else {
                ["caller", "show", "demo"]
            };
            let output = setup.run(&show).await.failed();
            let named = output.contains(&format!("{table} row "))
                && output.contains(&format!("malformed {column}"));
            assert!(named, "{output}");
            setup.run(&["caller", "show", "good"]).await.ok();
            setup.run(&["account", "list"]).await.ok();
            let list: Option<&[_]> = match table {
                "callers" => Some(&["caller", "list", "--json"]),
                "caller_credentials" => Some(&["caller", "bearer", "list", "--json"]),
                _ => None,
            };
            if let Some(list) = list {
                // It shows the other rows, and names this one.
                let listed = setup.run(list).await;
                assert_eq!(listed.code, Some(1), "{listed:?}");
                assert!(listed.stdout.contains("\"good\""), "{listed:?}");
                assert!(!listed.stdout.contains("\"demo\""), "{listed:?}");
                assert!(listed.stderr.contains(&format!("malformed {column}")), "{listed:?}");
            }
            let optional = ["ends_at", "revoked_at"].contains(&column);
            let good = if optional { "null" } else { "now()" };
            past_the_triggers(&fixture.database, &update(good)).await;
        }
    }
    // Both times are finite, and their difference is none that Postgres can represent.
    let longest = "update tokens set issued_at = '4713-01-01Z BC', expires_at = '294276-12-31Z'";
    past_the_triggers(&fixture.database, longest).await;
    let checked = setup.run(&["check"]).await;
    assert!(!checked.stdout.contains("out of range"), "{checked:?}");
}

/// No time in the row of the upstream's pace, which every replica may write, stops issuing.
#[tokio::test]
async fn a_time_of_the_pace_that_cannot_be_read_stops_no_issue() {
    let fixture = Fixture::new().await;
    let broker = fixture.start().await;
    for (n, time) in [
        "infinity",
        "-infinity",
        "294276-12-31Z",
        // The first year that `chrono` does not have.
        "262143-01-01Z",
        "10000-01-01Z",
        "9999-12-31Z",
        "1969-12-31Z",
        "4713-01-01Z BC",
    ]
    .iter()
    .enumerate()
    {
        fixture.database.sql(&format!("update upstream_pace set next_slot = '{time}'")).await;
        let client_id = format!("odd-{n}");
        fixture.upstream.add_account(&client_id, "SK.1");
        fixture.add_account(&format!("a{n}"), &client_id, "SK.1").await;
        fixture.wait_for_state(&format!("a{n}"), "fresh").await;
    }
    broker.stop().await;
}

/// A token whose stored times cannot be read keeps those of no other token from being corrected.
#[tokio::test]
async fn ends_are_corrected_beside_rows_whose_times_cannot_be_read() {
    let fixture = Fixture::new().await;
    let broker = fixture.start().await;
    for (name, id) in [("good", "id-1"), ("odd", "odd-1")] {
        fixture.upstream.add_account(id, "SK.1");
        fixture.add_account(name, id, "SK.1").await;
        fixture.wait_for_state(name, "fresh").await;
    }
    broker.stop().await;
    let known: Vec<_> = sqlx::query_as("select account_id, generation from tokens")
        .fetch_all(fixture.database.pool())
        .await
        .unwrap()
        .into_iter()
        .map(|(account, generation)| TimeLeft {
            account: AccountId(account),
            generation: Generation(generation),
            time_left: Duration::from_mins(1),
        })
        .collect();
    for (issued, expires) in [
        ("now()", "infinity"),
        ("now()", "294276-12-31Z"),
        ("-infinity", "294276-12-31Z"),
        ("4713-01-01Z BC", "294276-12-31Z"),
    ] {
        fixture
            .database
            .sql(&format!(
                "update tokens set issued_at = now(), expires_at = now() + interval '2 hours';
                 update tokens set issued_at = '{issued}', expires_at = '{expires}'
                 where account_id = (select id from accounts where name = 'odd')"
            ))
            .await;
        let corrected = tokens::correct_ends(fixture.database.pool(), &known).await.unwrap();
        assert_eq!(corrected, 1, "{issued} {expires}");
    }
}

/// A change that an earlier process of this replica has claimed, and never recorded since it was killed, is recorded.
#[tokio::test]
async fn a_change_that_was_claimed_before_a_restart_is_recorded_after_it() {
    let fixture = Fixture::new().await;
    fixture.start().await.stop().await;
    let instance = std::fs::read_to_string(fixture.state.path().join("instance")).unwrap();
    fixture.add_caller("demo", &["acme"]).await;
    let claim = format!("update changes set recorder = '{}'", instance.trim());
    fixture.database.sql(&claim).await;
    let broker = fixture.start().await;
    eventually("the record of the grant", async || {
        (fixture.audit_events("event = 'grant_changed'").await.len() == 1).then_some(())
    })
    .await;
    broker.stop().await;
}

/// Whatever keeps the comparison from inserting rows, an account that was disabled past the triggers is found.
#[tokio::test]
async fn a_comparison_that_cannot_insert_rows_still_finds_what_was_changed() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("bare", "id-1", "SK.1").await;
    fixture.add_account("acme", "id-2", "SK.2").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let delete =
        "delete from refreshes using accounts a where a.id = account_id and a.name = 'bare'";
    for (deleted, locked) in [
        ("", "lock table upstream_pace in access exclusive mode"),
        (delete, "lock table refreshes in share row exclusive mode"),
    ] {
        until_served(locked, &client, "acme").await;
        past_the_triggers(&fixture.database, deleted).await;
        let mut lock = fixture.database.pool().begin().await.unwrap();
        sqlx::query(locked).execute(&mut *lock).await.unwrap();
        let disable = "update accounts set enabled = false where name = 'acme'";
        past_the_triggers(&fixture.database, disable).await;
        until_refused(locked, &client, "acme", &[Code::FailedPrecondition]).await;
        lock.rollback().await.unwrap();
        fixture.database.sql("update accounts set enabled = true").await;
    }
    until_served("the row is inserted", &client, "bare").await;
    broker.stop().await;
}

/// One account's row would be refused by the triggers, so it cannot be written. The previous secrets of the others are
/// dropped all the same.
#[tokio::test]
async fn an_account_whose_row_cannot_be_written_keeps_no_other_previous_secret() {
    let fixture = Fixture::new().await;
    for n in 1..=3 {
        fixture.add_account(&format!("acme-{n}"), &format!("id-{n}"), &format!("SK.{n}")).await;
    }
    let broker = fixture.start().await;
    for n in 1..=3 {
        fixture.wait_for_state(&format!("acme-{n}"), "fresh").await;
    }
    past_the_triggers(
        &fixture.database,
        "update accounts set previous_secret = sealed_secret, previous_version = 0;
         update accounts set created_at = 'infinity' where name = 'acme-1'",
    )
    .await;
    eventually("the previous secrets", async || {
        let kept: Vec<String> = sqlx::query_scalar(
            "select name from accounts where previous_secret is not null order by name",
        )
        .fetch_all(fixture.database.pool())
        .await
        .unwrap();
        (kept == ["acme-1"]).then_some(())
    })
    .await;
    past_the_triggers(&fixture.database, "update accounts set created_at = now()").await;
    eventually("the last previous secret", async || {
        let kept: i64 =
            sqlx::query_scalar("select count(*) from accounts where previous_secret is not null")
                .fetch_one(fixture.database.pool())
                .await
                .unwrap();
        (kept == 0).then_some(())
    })
    .await;
    broker.stop().await;
}
