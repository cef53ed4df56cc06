//! The privileges of each role of `deploy/roles.sql`, and the broker's behaviour when its role lacks one.

use std::time::Duration;

use sqlx::AssertSqlSafe;
use token_broker::{
    api::proto::{
        GetTokenRequest, ReportRejectedTokenRequest, report_rejected_token_response::Outcome,
    },
    app::AppConfig,
    config::DatabaseUrl,
    crypto::bearer::Bearer,
    dev::simulator::Faults,
    domain::clock::{Clock, ManualClock},
};
use url::Url;

use crate::{
    harness::{
        broker::{Fixture, TestClient, code_and_reason},
        database::TestDatabase,
        eventually,
        http::http,
    },
    outages::until_readiness_says,
};

pub(crate) const ROLES: &str = include_str!("../../deploy/roles.sql");

pub(crate) const RUNTIME: &str = "token_broker_runtime";
pub(crate) const ACCOUNTS: &str = "token_broker_accounts";
pub(crate) const ACCESS: &str = "token_broker_access";
pub(crate) const AUDITOR: &str = "token_broker_auditor";

/// Inserts an account, a caller with a credential and a grant, and an audit record.
const ROWS: &str = "
    insert into accounts (name, client_id, client_secret) values ('acme', 'acme-id', 'hunter2');
    insert into callers (name) values ('shop');
    insert into caller_credentials (caller_id, kind, bearer_sha256)
        select id, 'bearer', sha256('x') from callers;
    insert into grants (caller_id, pattern) select id, 'acme' from callers;
    insert into deployment (upstream) values ('staging');
    insert into audit_chains (chain, instance, started_at, linked_hash, delivered_hash)
        values ('c', 'i', now(), '', '');
    select audit_ensure_partition('2026-01-01');
    insert into audit_events
        (instance, chain, seq, at, event, outcome, count, detail, prev_hash, hash)
        values ('i', 'c', 1, '2026-01-01 12:00Z', 'started', 'ok', 1, '{}', '', '');";

pub(crate) async fn database_with_roles() -> TestDatabase {
    let database = TestDatabase::new().await;
    database.sql(ROLES).await;
    database.sql(ROWS).await;
    database
}

/// Runs a statement as `role` in a transaction that is rolled back.
pub(crate) async fn attempt(
    database: &TestDatabase,
    role: &str,
    statement: &str,
) -> sqlx::Result<()> {
    let mut transaction = database.pool().begin().await?;
    for statement in [format!("set local role {role}"), statement.to_owned()] {
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut *transaction).await?;
    }
    transaction.rollback().await
}

/// How Postgres may plan the statements of a trigger. A session begins with plans for the values at hand, and may go
/// over to a plan for all values after five of them, which needs rights that the others did not need.
const PLAN_MODES: [&str; 2] = ["force_custom_plan", "force_generic_plan"];

/// Asserts that `role` may run each of `statements`, however Postgres plans the statements of the triggers.
async fn may(role: &str, statements: &[&str]) {
    let database = database_with_roles().await;
    for mode in PLAN_MODES {
        for statement in statements {
            let planned = format!("set local plan_cache_mode = {mode}; {statement}");
            let done = attempt(&database, role, &planned).await;
            assert!(done.is_ok(), "{role} may {statement} ({mode}): {}", done.unwrap_err());
        }
    }
}

/// Asserts that the server refuses each of `statements` for a missing privilege of `role`.
async fn may_not(role: &str, statements: &[&str]) {
    let database = database_with_roles().await;
    for statement in statements {
        let error = attempt(&database, role, statement).await.expect_err(statement);
        let error = error.into_database_error().expect("the server refused it");
        assert_eq!(error.code().unwrap(), "42501", "{role} may not {statement}: {error}");
    }
}

#[tokio::test]
async fn the_script_can_be_run_again() {
    let database = database_with_roles().await;
    database.sql(ROLES).await;
}

/// The owner of the tables need not be allowed to create roles once they exist.
#[tokio::test]
async fn the_script_can_be_run_again_by_an_owner_who_may_not_create_roles() {
    let database = database_with_roles().await;
    let mut transaction = database.pool().begin().await.unwrap();
    let script = ROLES.replace("\nbegin;\n", "\n").replace("\ncommit;\n", "\n");
    for statement in [
        "do $$
        declare
            it text;
        begin
            create role tables_owner nologin nocreaterole;
            grant create on schema public to tables_owner;
            for it in select oid::regclass::text from pg_class
                where relnamespace = 'public'::regnamespace and relkind in ('r', 'p', 'v')
            loop
                execute format('alter table %s owner to tables_owner', it);
            end loop;
            for it in select oid::regprocedure::text from pg_proc where pronamespace = 'public'::regnamespace loop
                execute format('alter routine %s owner to tables_owner', it);
            end loop;
        end
        $$",
        "alter schema public owner to tables_owner",
        "set local role tables_owner",
        &script,
        "savepoint before",
    ] {
        let statement = AssertSqlSafe(statement.to_owned());
        sqlx::raw_sql(statement).execute(&mut *transaction).await.unwrap();
    }
    // Without the roles, the error says who has to create them.
    let without = script.replacen("'token_broker_auditor']", "'token_broker_other']", 1);
    let error = sqlx::raw_sql(AssertSqlSafe(without)).execute(&mut *transaction).await.unwrap_err();
    let error = error.into_database_error().unwrap();
    assert!(error.message().contains("may not create role token_broker_other"), "{error}");
    transaction.rollback().await.unwrap();
}

#[tokio::test]
async fn the_script_revokes_what_it_does_not_grant() {
    let database = database_with_roles().await;
    database.sql("grant select, update (name) on accounts to token_broker_auditor").await;
    database.sql(ROLES).await;
    for statement in ["select 1 from accounts", "update accounts set name = 'other'"] {
        attempt(&database, AUDITOR, statement).await.expect_err(statement);
    }
}

#[tokio::test]
async fn the_runtime_role_may_do_what_the_broker_does() {
    may(
        RUNTIME,
        &[
            "select * from accounts",
            "select * from accounts for update skip locked",
            "select * from audit_retention",
            "select audit_lock_day('2026-01-01'); insert into audit_pruning_receipts (chain, first_seq, prev_hash, \
             last_seq, hash, at, key_id, signature) values ('c', 1, '', 1, '', now(), 'h', ''); \
             select audit_prune('2026-01-01', true)",
            "update accounts set client_secret = null, \
             sealed_secret = '\\x0109'::bytea || 's12345678'::bytea || repeat('x', 29)::bytea",
            "update accounts set previous_secret = null, previous_version = null",
            "update refreshes set error_class = 'intake', error_version = 1; \
             update accounts set client_secret = null",
            "update accounts a set reissue_requested_at = now() from account_status s \
             where s.name = a.name returning a.name",
            "select * from callers natural join grants",
            "select bearer_sha256 from caller_credentials",
            "update refreshes set lease_holder = 'me', changed = pg_current_xact_id()",
            "insert into tokens (account_id, credential_version, generation, sealed_token, issued_at, \
             expires_at, fingerprint) select id, 1, 1, 'x', now(), now(), 'f' from accounts \
             on conflict (account_id) do update set generation = excluded.generation",
            "update upstream_pace set next_slot = now()",
            "insert into deployment (upstream) values ('staging') \
             on conflict (single) do nothing",
            "update deployment set epoch = epoch + 1, system_identifier = c.system_identifier \
             from pg_control_system() c",
            "select credential_version from accounts where id = 1 for share",
            "insert into refreshes (account_id) values (1) on conflict do nothing",
            "delete from tokens; delete from upstream_calls",
            "update instances set heartbeat_at = now()",
            "select key_id, public_key, is_primary from intake_keys",
            "select * from unrecorded_changes",
            "select * from unaudited_changes",
            "insert into instances (id, replica, version, key_ids, started_at, heartbeat_at) \
             values ('i', 1, '0', '{}', now(), now())",
            "update changes set recorder = 'i'; update changes set audited_at = now()",
            "update audit_chains set delivered_seq = 2, delivered_hash = '', delivered_at = now()",
            "update audit_chains set retired = 'lost', retired_at = now()",
            "insert into audit_chains (chain, instance, started_at, linked_hash, delivered_hash) \
             values ('d', 'i', now(), '', '')",
            "select audit_ensure_partition('2026-01-02'); insert into audit_events \
             (instance, chain, seq, at, event, outcome, count, detail, prev_hash, hash) \
             values ('i', 'd', 1, '2026-01-02 12:00Z', 'started', 'ok', 1, '{}', '', '')",
            "insert into audit_heads values ('d', 1, '', now(), 'k', '')",
            "select * from audit_events",
            "select * from account_status",
            "select * from _sqlx_migrations natural join repeatable_migrations",
            "listen token_broker_changes; notify token_broker_changes",
        ],
    )
    .await;
}

#[tokio::test]
async fn the_runtime_role_changes_neither_audit_records_nor_accounts_nor_access() {
    may_not(
        RUNTIME,
        &[
            "update audit_events set outcome = 'x'",
            "delete from audit_events",
            "delete from audit_events_20260101",
            "truncate audit_events",
            "drop table audit_events_20260101",
            "update audit_heads set seq = 2",
            "delete from audit_heads",
            "delete from audit_chains",
            "update audit_retention set calls_days = 1",
            "select audit_prune(current_date, true)",
            "select audit_prune(current_date - 30, true)",
            "select audit_prune('2026-01-01 BC', true)",
            "select audit_lock_day('2026-01-01 BC')",
            "delete from changes",
            "insert into accounts (name, client_id, client_secret) values ('b', 'b', 'b')",
            "update accounts set enabled = false",
            "update accounts set client_id = 'other'",
            "update accounts set login_version = 2",
            "delete from accounts",
            "insert into callers (name) values ('b')",
            "update grants set pattern = '*'",
            "update caller_credentials set revoked_at = null",
            "insert into changes (table_name, operation, row_id, subject) values ('a', 'b', 1, 'c')",
            "update changes set what = '{}'",
            "create table mine (it text)",
            "insert into intake_keys (key_id, public_key, is_primary) values ('k', 'x', true)",
            "update intake_keys set is_primary = true",
            "delete from intake_keys",
            "truncate intake_keys",
            "update audit_chains set instance = 'other'",
            "update audit_chains set linked_hash = ''",
            "delete from instances",
            "update deployment set id = 'other'",
            "update deployment set epoch = 0",
            // API KEYs are neither replaced nor lost.
            "update accounts set client_secret = 'other'",
            "update accounts set client_secret = null",
            "update accounts set client_secret = null, sealed_secret = 'x'",
            "update accounts set sealed_secret = 'x'",
            "update accounts set previous_secret = 'x', previous_version = 1",
        ],
    )
    .await;
}

#[tokio::test]
async fn the_accounts_role_manages_accounts() {
    may(
        ACCOUNTS,
        &[
            "insert into accounts (name, client_id, client_secret, description) \
             values ('b', 'b', 'b', 'new') returning id",
            "insert into accounts (name, client_id, client_secret) values ('acme', 'acme-id', 'b') \
             on conflict (name) do update set client_id = excluded.client_id, client_secret = 'b'",
            "insert into accounts (name, client_id, description) values ('acme', 'acme-id', 'x') \
             on conflict (name) do update set description = excluded.description",
            "update accounts set client_secret = null",
            "update accounts set client_secret = null; update accounts set client_secret = 'again'",
            "update accounts set client_secret = 'rotated' where name = 'acme'",
            "set local token_broker.purge_old = 'on'; \
             update accounts set client_secret = 'purged' where name = 'acme'",
            "update accounts set client_id = 'other', client_secret = 'other'",
            "update accounts set enabled = false, description = 'off' where name = 'acme'",
            "update accounts set reissue_requested_at = now() where name like 'ac%'",
            "delete from accounts where name = 'acme'",
            "select name, client_id, enabled, credential_version from accounts",
            "select * from account_status",
            "select key_id, public_key from intake_keys where is_primary",
        ],
    )
    .await;
}

#[tokio::test]
async fn the_accounts_role_reads_no_secret_and_grants_no_access() {
    may_not(
        ACCOUNTS,
        &[
            "select client_secret from accounts",
            "select sealed_secret from accounts",
            "select previous_secret from accounts",
            "update accounts set client_secret = 'b' returning client_secret",
            "update accounts set sealed_secret = 'x'",
            "update accounts set credential_version = 1",
            "select * from tokens",
            "select * from refreshes",
            "select * from callers",
            "insert into grants (caller_id, pattern) values (1, '*')",
            "select * from caller_credentials",
            "select * from audit_events",
            "select * from changes",
            "delete from changes",
            "truncate accounts",
            "update intake_keys set is_primary = false",
            "insert into intake_keys (key_id, public_key, is_primary) values ('k', 'x', true)",
            "select * from unrecorded_changes",
        ],
    )
    .await;
}

#[tokio::test]
async fn the_access_role_manages_callers() {
    may(
        ACCESS,
        &[
            "insert into callers (name, rate_limit) values ('b', 10) returning id",
            "update callers set enabled = false where name = 'shop'",
            "delete from callers where name = 'shop'",
            "insert into caller_credentials (caller_id, kind, bearer_sha256, ends_at) \
             select id, 'bearer', sha256('y'), now() from callers returning id",
            "insert into caller_credentials (caller_id, kind, identity) \
             select id, 'spiffe', 'spiffe://example.org/shop' from callers",
            "update caller_credentials set revoked_at = now() where id = 1",
            "delete from caller_credentials",
            "insert into caller_credentials (caller_id, kind, bearer_sha256) \
             select id, 'bearer', sha256('x') from callers on conflict do nothing",
            "insert into callers (name, rate_limit) values ('shop', 5) \
             on conflict (name) do update set rate_limit = excluded.rate_limit",
            "update callers set description = 'x', rate_limit = 5",
            "update caller_credentials set ends_at = now(), description = 'x', bearer_sha256 = sha256('x')",
            "update grants set pattern = 'acme', rights = '{get}', ends_at = now()",
            "insert into grants (caller_id, pattern) select id, 'acme' from callers \
             on conflict (caller_id, pattern) do update set rights = excluded.rights",
            "delete from grants where pattern = 'acme'",
            "select c.name, g.pattern from callers c join grants g on g.caller_id = c.id",
        ],
    )
    .await;
}

#[tokio::test]
async fn the_access_role_reads_neither_accounts_nor_hashes_nor_audit_records() {
    may_not(
        ACCESS,
        &[
            "select bearer_sha256 from caller_credentials",
            "select name from accounts",
            "select * from account_status",
            "update accounts set enabled = false",
            "select * from tokens",
            "select * from audit_events",
            "select * from changes",
            "truncate grants",
        ],
    )
    .await;
}

#[tokio::test]
async fn the_auditor_role_reads_audit_records_and_changes() {
    may(
        AUDITOR,
        &[
            "select * from audit_events where account = 'acme'",
            "select * from audit_chains natural left join audit_heads",
            "lock table audit_events in access share mode; select * from audit_pruning_receipts",
            "select subject, what, session_user_name from changes",
            "select * from unrecorded_changes",
            "select * from unaudited_changes",
            "select id, journal_chain, journal_seq from instances",
        ],
    )
    .await;
}

#[tokio::test]
async fn the_auditor_role_writes_nothing_and_reads_neither_accounts_nor_access() {
    may_not(
        AUDITOR,
        &[
            "insert into audit_heads values ('d', 1, '', now(), 'k', '')",
            "update audit_events set outcome = 'x'",
            "delete from audit_events",
            "delete from changes",
            "select audit_prune('2026-01-01', true)",
            "insert into audit_pruning_receipts (chain, first_seq, prev_hash, last_seq, hash, at, key_id, signature) \
             values ('c', 1, '', 1, '', now(), 'h', '')",
            "update changes set audited_at = now()",
            "select name from accounts",
            "select * from account_status",
            "select * from callers",
            "select * from tokens",
        ],
    )
    .await;
}

#[tokio::test]
async fn a_change_under_a_role_is_recorded_with_the_login_that_assumed_it() {
    let database = database_with_roles().await;
    database
        .sql(
            "set role token_broker_accounts; \
             update accounts set enabled = false where name = 'acme'; reset role",
        )
        .await;
    let recorded: bool = sqlx::query_scalar(
        "select session_user_name = session_user from changes order by id desc limit 1",
    )
    .fetch_one(database.pool())
    .await
    .unwrap();
    assert!(recorded);
}

/// Runs statements as `role` in a transaction that is committed.
pub(crate) async fn sql_as(database: &TestDatabase, role: &str, statements: &str) {
    let mut transaction = database.pool().begin().await.unwrap();
    for statements in [format!("set local role {role}"), statements.to_owned()] {
        sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut *transaction).await.unwrap();
    }
    transaction.commit().await.unwrap();
}

/// Returns the configuration of a broker that uses its database with the runtime role.
pub(crate) fn config_as_runtime(fixture: &Fixture) -> AppConfig {
    let mut url = Url::parse(fixture.database.url()).unwrap();
    url.query_pairs_mut().append_pair("options", &format!("-c role={RUNTIME}"));
    let mut config = fixture.config();
    config.settings.database_url = DatabaseUrl::new(url.as_str()).unwrap();
    config
}

/// Waits until a request for the token of `acme` fails with `expected`, a status code and a reason.
async fn until_refused(client: &TestClient, expected: &str) {
    eventually(expected, async || {
        (code_and_reason(&client.get("acme").await.err()?) == expected).then_some(())
    })
    .await;
}

/// Waits until the statement `count` returns 0.
async fn until_none(database: &TestDatabase, count: &'static str) {
    eventually(count, async || {
        let left: i64 = sqlx::query_scalar(count).fetch_one(database.pool()).await.unwrap();
        (left == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_broker_and_its_admins_need_no_more_than_their_roles() {
    for mode in PLAN_MODES {
        work_with_the_roles(mode).await;
    }
}

/// Has a broker and its admins work with their roles, whose statements Postgres plans by `mode`.
async fn work_with_the_roles(mode: &str) {
    let fixture = Fixture::new().await;
    let database = &fixture.database;
    database.sql(ROLES).await;
    database
        .sql(&format!(
            "do $$ begin execute format('alter database %I set plan_cache_mode = {mode}', \
                 current_database()); end $$"
        ))
        .await;
    let bearer = Bearer::generate();
    let hash = hex::encode(bearer.sha256());
    sql_as(
        database,
        ACCESS,
        &format!(
            "insert into callers (name) values ('shop');
             insert into caller_credentials (caller_id, kind, bearer_sha256)
                 select id, 'bearer', '\\x{hash}' from callers;
             insert into grants (caller_id, pattern) select id, 'acme' from callers"
        ),
    )
    .await;
    let register =
        "insert into accounts (name, client_id, client_secret) values ('acme', 'id-1', 'SK.1')";
    sql_as(database, ACCOUNTS, register).await;

    // The secret is sealed at the start. A token is issued, served, reported and replaced.
    let broker = fixture.start_with(config_as_runtime(&fixture)).await;
    let client = broker.client(&bearer).await;
    let first = client.get("acme").await.unwrap();
    let reported = eventually("the minimum issue interval to pass", async || {
        let report = client.request(ReportRejectedTokenRequest {
            account: "acme".into(),
            generation: first.generation,
            upstream_code: "61003".into(),
        });
        let outcome = client.grpc.clone().report_rejected_token(report).await.unwrap();
        Some(outcome.into_inner().outcome()).filter(|outcome| *outcome != Outcome::TooSoon)
    })
    .await;
    assert_eq!(reported, Outcome::Reissuing);
    let newer_than = async |generation| {
        let newer = GetTokenRequest {
            account: "acme".into(),
            newer_than_generation: generation,
            ..Default::default()
        };
        client.get_with(newer).await.unwrap()
    };
    let second = newer_than(first.generation).await;

    // The secret is rotated, and sealed while the broker runs. The account is disabled and enabled.
    fixture.upstream.add_account("id-1", "SK.new");
    sql_as(database, ACCOUNTS, "update accounts set client_secret = 'SK.new'").await;
    let third = newer_than(second.generation).await;
    sql_as(database, ACCOUNTS, "update accounts set enabled = false").await;
    until_refused(&client, "FailedPrecondition ACCOUNT_DISABLED").await;
    sql_as(database, ACCOUNTS, "update accounts set enabled = true").await;
    eventually("a token", async || client.get("acme").await.ok()).await;
    broker.stop().await;

    let requests = fixture.upstream.requests();
    let broker = fixture.start_with(config_as_runtime(&fixture)).await;
    let client = broker.client(&bearer).await;
    assert_eq!(client.get("acme").await.unwrap().generation, third.generation);
    assert_eq!(fixture.upstream.requests(), requests, "the token survived the restart");
    // The broker drops the previous secret soon after the new one has issued a token.
    until_none(database, "select count(*) from accounts where previous_secret is not null").await;
    sql_as(database, ACCOUNTS, "delete from accounts").await;
    until_refused(&client, "NotFound NO_SUCH_ACCOUNT").await;
    sql_as(database, ACCESS, "delete from grants").await;
    until_refused(&client, "PermissionDenied NOT_GRANTED").await;
    until_none(database, "select count(*) from changes where audited_at is null").await;
    broker.stop().await;

    let grouped: Vec<String> = sqlx::query_scalar(
        "select event || ' ' || count(*) from audit_events
         where event not in ('get_token', 'report_rejected_token') group by event order by event",
    )
    .fetch_all(database.pool())
    .await
    .unwrap();
    assert_eq!(
        grouped,
        [
            // The secret was sealed twice, rotated once, and the previous one dropped; the account was
            // disabled and enabled.
            "account_changed 6",
            "account_registered 1",
            "account_removed 1",
            "caller_changed 2",
            "grant_changed 2",
            "keys_changed 1",
            "started 2",
            "stopped 2",
            "token_issued 3",
        ]
    );
    let stopped: bool = sqlx::query_scalar(
        "select stopped_at is not null and heartbeat_at is not null from instances",
    )
    .fetch_one(database.pool())
    .await
    .unwrap();
    assert!(stopped, "the instance has reported itself");
}

#[tokio::test]
async fn a_missing_privilege_is_reported_and_no_token_is_issued_without_a_lease() {
    let manual = ManualClock::new(Clock::System.now());
    let fixture = Fixture::with(Clock::Manual(manual.clone()), Faults::default()).await;
    fixture.database.sql(ROLES).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start_with(config_as_runtime(&fixture)).await;
    let client = broker.client(&bearer).await;
    let token = client.get("acme").await.unwrap();

    // The change feed needs this privilege, and so does a claim of a lease.
    fixture.database.sql("revoke select on refreshes from token_broker_runtime").await;
    until_readiness_says(&broker, "permission denied for table refreshes (SQLSTATE 42501)").await;
    // There is no other replica, and the token is about to end. If the database counted as lost, the
    // replica would issue now.
    manual.advance(Duration::from_secs(59 * 60 + 30));
    for _ in 0..20 {
        assert_eq!(client.get("acme").await.unwrap().generation, token.generation);
        let (status, body) = http(broker.app.ops_address, "GET", "/readyz", "").await;
        assert_eq!(status, 200);
        assert!(!body.contains("does not answer"), "{body}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(fixture.upstream.requests(), 1);

    fixture.database.sql("grant select on refreshes to token_broker_runtime").await;
    until_readiness_says(&broker, "\"answers\"").await;
    eventually("a newer token", async || {
        manual.advance(Duration::from_millis(100));
        let next = client.get("acme").await.ok()?;
        (next.generation > token.generation).then_some(())
    })
    .await;
    assert_eq!(fixture.upstream.requests(), 2);
    broker.stop().await;
    let without_lease =
        fixture.audit_events("event = 'token_issued' and detail ? 'database'").await;
    assert!(without_lease.is_empty(), "{without_lease:?}");
}
