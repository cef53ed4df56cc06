//! Statements of admins that change many rows at once: refused unless they are meant, and harmless for the upstream.

use sqlx::{
    AssertSqlSafe, Connection, PgConnection,
    postgres::{PgDatabaseError, PgQueryResult},
};
use token_broker::store::mass_changes::MAX_CHANGED_ROWS;
use url::Url;

use crate::{
    harness::{
        broker::Fixture,
        database::TestDatabase,
        eventually,
        process::{program, run},
    },
    roles::{ACCESS, ACCOUNTS, ROLES, RUNTIME, config_as_runtime},
    saves::postgres_program,
};

/// Returns a database with `count` accounts, and as many callers with a bearer and ten grants each.
async fn database_with_rows(count: usize) -> TestDatabase {
    let database = TestDatabase::new().await;
    database.sql(ROLES).await;
    database
        .sql(&format!(
            "insert into accounts (name, client_id, client_secret)
                 select 'acme-' || n, 'id-' || n, 'SK.' || n from generate_series(1, {count}) n;
             insert into callers (name) select 'shop-' || n from generate_series(1, {count}) n;
             insert into caller_credentials (caller_id, kind, bearer_sha256)
                 select id, 'bearer', sha256(name::bytea) from callers;
             insert into grants (caller_id, pattern) select id, 'acme-' || n from callers, generate_series(1, 10) n"
        ))
        .await;
    database
}

/// Runs statements as `role` in a session of a client that says nothing, and takes them back.
async fn try_as(
    database: &TestDatabase,
    role: &str,
    statements: &str,
) -> sqlx::Result<PgQueryResult> {
    let mut session = PgConnection::connect(database.url()).await?;
    let mut transaction = session.begin().await?;
    let statements = format!("set local role {role}; {statements}");
    sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut *transaction).await
}

async fn assert_refused(database: &TestDatabase, role: &str, statements: &str, says: &str) {
    let error = try_as(database, role, statements).await.expect_err(statements);
    let error = error.into_database_error().unwrap().downcast::<PgDatabaseError>();
    assert_eq!(error.code(), "21000", "{statements}: {error}");
    assert!(error.message().contains(says), "{statements}: {error}");
    assert!(error.message().contains(MAX_CHANGED_ROWS), "{statements}: {error}");
    assert!(
        error.hint().unwrap().contains("set local token_broker.max_changed_rows = "),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_statement_that_changes_more_than_a_few_rows_is_refused_unless_its_session_means_it() {
    let database = database_with_rows(12).await;
    let (many, all) = ("12 rows of accounts, more than 5", "12 rows of callers, more than 5");
    let as_is = "insert into accounts (name, client_id, description) select name, client_id, $ from accounts
        on conflict (name) do update set description = excluded.description";
    for (role, statements, says) in [
        (ACCOUNTS, "update accounts set enabled = false", many),
        (ACCOUNTS, "delete from accounts", many),
        (ACCOUNTS, "update accounts set client_secret = 'SK.x' where name like 'acme-%'", many),
        (ACCOUNTS, "update accounts set reissue_requested_at = now()", many),
        (RUNTIME, "update accounts set reissue_requested_at = now()", many),
        (ACCOUNTS, &as_is.replace('$', "'x'"), many),
        (ACCOUNTS, "delete from accounts where id <= 6", "delete 6 rows of accounts, more than 5"),
        ("none", "update accounts set description = 'x'", many),
        (ACCESS, "update callers set enabled = false", all),
        (ACCESS, "delete from callers", all),
        (ACCESS, "update caller_credentials set revoked_at = now()", "of caller_credentials"),
        (ACCESS, "delete from caller_credentials", "of caller_credentials"),
        (ACCESS, "update grants set rights = '{list}'", "change 120 rows of grants"),
        (ACCESS, "delete from grants", "delete 120 rows of grants"),
        (ACCESS, "delete from grants where caller_id = 1", "delete 10 rows of grants"),
        // Both parts of one statement count together.
        (
            ACCOUNTS,
            "with a as (update accounts set enabled = false where id <= 3 returning 1),
                 b as (update accounts set enabled = false where id between 4 and 6 returning 1)
             select from a, b",
            "change 6 rows of accounts",
        ),
        (
            ACCOUNTS,
            "set local token_broker.max_changed_rows = 11; delete from accounts",
            "more than the 11 of token_broker.max_changed_rows",
        ),
        (
            ACCOUNTS,
            "set local token_broker.max_changed_rows = 0; delete from accounts where id < 3",
            "2 rows",
        ),
        (
            ACCOUNTS,
            "set local token_broker.max_changed_rows = 'all'; delete from accounts",
            "not a number",
        ),
        (
            ACCOUNTS,
            "set local token_broker.max_changed_rows = '-1'; delete from accounts",
            "not a number",
        ),
        (ACCOUNTS, "set local token_broker.max_changed_rows = ''; delete from accounts", many),
    ] {
        assert_refused(&database, role, statements, says).await;
    }
    for (role, statements) in [
        (ACCOUNTS, "set local token_broker.max_changed_rows = 12; delete from accounts"),
        (ACCOUNTS, "set local token_broker.max_changed_rows = 999999999999999999; update accounts set enabled = false"),
        (ACCESS, "set local token_broker.max_changed_rows = 120; update grants set rights = '{list}'"),
        (ACCOUNTS, "update accounts set enabled = false where id <= 5"),
        (ACCOUNTS, "delete from accounts where id <= 5"),
        // Nothing changes, or little of it.
        (ACCOUNTS, "update accounts set enabled = enabled, client_id = client_id"),
        ("none", "update accounts set updated_at = now()"),
        (ACCESS, "update grants set rights = '{get,report,list}', ends_at = null"),
        (ACCOUNTS, &as_is.replace('$', "''")),
        (ACCOUNTS, "update accounts set enabled = id > 4 where id < 12"),
        // A loop of single statements, new rows, and what goes with a caller.
        (
            ACCOUNTS,
            "do $$ declare it bigint; begin
                 for it in select id from accounts loop update accounts set enabled = false where id = it; end loop;
             end $$",
        ),
        (
            ACCOUNTS,
            "insert into accounts (name, client_id, client_secret)
                 select 'new-' || n, 'new-' || n, 'SK.1' from generate_series(1, 20) n",
        ),
        (ACCESS, "delete from callers where name in ('shop-1', 'shop-2')"),
    ] {
        let done = try_as(&database, role, statements).await;
        assert!(done.is_ok(), "{role} may {statements}: {}", done.unwrap_err());
    }
}

/// With few rows, a statement without a condition changes few of them, but all there are.
#[tokio::test]
async fn a_statement_that_changes_all_rows_is_refused_also_if_they_are_few() {
    let database = database_with_rows(3).await;
    let says = "and finds all there are, as without a WHERE";
    database.sql("update accounts set enabled = false where name = 'acme-1'").await;
    for (role, statements) in [
        (ACCOUNTS, "delete from accounts"),
        (ACCOUNTS, "update accounts set description = 'x'"),
        // One of them was disabled before.
        (ACCOUNTS, "update accounts set enabled = false"),
        (ACCESS, "update callers set enabled = false"),
        (ACCESS, "delete from caller_credentials"),
        (ACCESS, "delete from callers"),
    ] {
        assert_refused(&database, role, statements, says).await;
    }
    for (role, statements) in [
        (ACCOUNTS, "delete from accounts where name <> 'acme-1'"),
        (ACCOUNTS, "update accounts set description = 'x' where name <> 'acme-1'"),
        (
            ACCOUNTS,
            "update accounts set enabled = false where name <> 'acme-3'; delete from accounts where name = 'acme-3'",
        ),
        (ACCOUNTS, "set local token_broker.max_changed_rows = 3; delete from accounts"),
        // The only row there is.
        (
            ACCOUNTS,
            "delete from accounts where id > 1; update accounts set enabled = true; delete from accounts",
        ),
    ] {
        let done = try_as(&database, role, statements).await;
        assert!(done.is_ok(), "{role} may {statements}: {}", done.unwrap_err());
    }
}

/// The error says to a user of `psql` what to write, and that does it.
#[tokio::test]
async fn a_user_of_psql_reads_in_the_error_how_to_mean_it() {
    let database = database_with_rows(7).await;
    let psql = async |statement: &str| {
        let arguments = ["-X", "-v", "ON_ERROR_STOP=1", "-d", database.url(), "-c", statement];
        postgres_program("psql", &arguments).await
    };
    let delete = "delete from accounts where name like 'acme-%'";
    let Some(refused) = psql(delete).await else { return };
    let says = String::from_utf8(refused.stderr).unwrap();
    assert!(
        !refused.status.success() && says.contains("would delete 7 rows of accounts"),
        "{says}"
    );
    let hint = says.lines().find_map(|line| line.strip_prefix("HINT:")).unwrap();
    let meant = psql(&hint.replace('…', delete)).await.unwrap();
    assert!(meant.status.success(), "{meant:?}");
    let left: i64 = sqlx::query_scalar("select count(*) from accounts")
        .fetch_one(database.pool())
        .await
        .unwrap();
    assert_eq!(left, 0);
}

/// The commands say for themselves that they mean what their user asks for.
#[tokio::test]
async fn a_command_for_many_accounts_is_not_refused() {
    let database = database_with_rows(8).await;
    let mut url = Url::parse(database.url()).unwrap();
    url.query_pairs_mut().append_pair("options", &format!("-c role={ACCOUNTS}"));
    let mut command = program(&["account", "reissue", "acme-*"]);
    command.env("DATABASE_URL", url.as_str());
    assert_eq!(run(command, "").await.ok().lines().count(), 8);
}

/// The broker's login seals all secrets that were written, at the upstream's pace tries them, and drops the ones before.
/// Meanwhile each account has a token.
#[tokio::test]
async fn a_rotation_of_all_accounts_keeps_the_upstreams_limits_and_serves_the_tokens_meanwhile() {
    const ACCOUNTS_IN_ALL: u32 = 12;
    const RATE: f64 = 10.0;
    let fixture = Fixture::new().await;
    fixture.database.sql(ROLES).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let names: Vec<_> = (1..=ACCOUNTS_IN_ALL).map(|n| format!("acme-{n}")).collect();
    for name in &names {
        fixture.upstream.add_account(name, "SK.1");
        fixture.add_account(name, name, "SK.1").await;
    }
    let mut config = config_as_runtime(&fixture);
    config.settings.upstream_rate = RATE;
    config.settings.upstream_concurrency = 2;
    let broker = fixture.start_with(config).await;
    let client = broker.client(&bearer).await;
    let mut old = Vec::new();
    for name in &names {
        old.push(eventually("a token", async || client.get(name).await.ok()).await.access_token);
    }

    // The pace is locked, so that no attempt begins before all tokens were asked for once.
    let mut pace = fixture.database.pool().begin().await.unwrap();
    sqlx::query("select from upstream_pace for update").execute(&mut *pace).await.unwrap();
    for name in &names {
        fixture.upstream.add_account(name, "SK.2");
    }
    let mut admin = PgConnection::connect(fixture.database.url()).await.unwrap();
    let rotate = format!(
        "begin; set local role {ACCOUNTS}; set local token_broker.max_changed_rows = {ACCOUNTS_IN_ALL};
         update accounts set client_secret = 'SK.2'; commit"
    );
    sqlx::raw_sql(AssertSqlSafe(rotate)).execute(&mut admin).await.unwrap();
    let count = async |condition: &str| -> i64 {
        let query = format!(
            "select count(*) from accounts a join tokens t on t.account_id = a.id where {condition}"
        );
        sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(fixture.database.pool()).await.unwrap()
    };
    let all = i64::from(ACCOUNTS_IN_ALL);
    eventually("the sealing", async || {
        (count("a.client_secret is null and a.credential_version = 2").await == all).then_some(())
    })
    .await;
    for (name, old) in names.iter().zip(&old) {
        assert_eq!(&client.get(name).await.unwrap().access_token, old, "{name}");
    }
    pace.rollback().await.unwrap();
    eventually("the rotation", async || {
        for name in &names {
            client.get(name).await.unwrap();
        }
        let done = "t.credential_version = 2 and a.previous_secret is null";
        (count(done).await == all).then_some(())
    })
    .await;
    for name in &names {
        let token = client.get(name).await.unwrap().access_token;
        assert!(fixture.upstream.is_live(&token), "{name}");
        assert_eq!(fixture.upstream.attempts(name), 2, "{name}");
    }
    assert!(fixture.upstream.peak_in_flight() <= 2);
    // The first attempt after a pause takes a slot of its own, and so does the next one.
    let took: f64 = sqlx::query_scalar(
        "select extract(epoch from max(attempt_started_at) - min(attempt_started_at))::float8 from refreshes",
    )
    .fetch_one(fixture.database.pool())
    .await
    .unwrap();
    let pauses = f64::from(ACCOUNTS_IN_ALL - 2);
    assert!(took * RATE >= pauses, "{ACCOUNTS_IN_ALL} attempts within {took} s");
    broker.stop().await;
}
