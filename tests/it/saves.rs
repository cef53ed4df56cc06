//! What programs of admins write: the same values again, whole rows as they were read earlier, upserts, and dumps.

use std::{
    io,
    process::{Output, Stdio},
};

use sqlx::postgres::PgDatabaseError;
use token_broker::{app::AppConfig, domain::secret::ClientSecret};
use tokio::process::Command;

use crate::{
    harness::{
        broker::{Fixture, start_error},
        database::TestDatabase,
        eventually, note_skipped,
    },
    roles::{ACCESS, ACCOUNTS, RUNTIME, attempt, database_with_roles, sql_as},
};

async fn text(database: &TestDatabase, query: &str) -> String {
    sqlx::query_scalar(sqlx::AssertSqlSafe(query.to_owned()))
        .fetch_one(database.pool())
        .await
        .unwrap()
}

async fn until_sealed(fixture: &Fixture) {
    eventually("the sealing", async || {
        let waiting = "select count(*)::text from accounts where client_secret is not null";
        (text(&fixture.database, waiting).await == "0").then_some(())
    })
    .await;
}

/// What is known of the credential and the token of an account.
const EPOCH: &str =
    "select concat_ws(' ', a.credential_version, previous_version, generation, attempt_started_at,
    consecutive_failures, sealed_secret) from accounts a left join tokens t on t.account_id = a.id
    left join refreshes r on r.account_id = a.id where name = ";

/// Declarative tools and programs that save whole objects write a secret again that did not change. That is no new
/// credential: nothing is tried or issued, also when the upstream refuses the secret.
#[tokio::test]
async fn the_same_secret_written_again_changes_nothing() {
    let fixture = Fixture::new().await;
    let broker = fixture.start().await;
    fixture.upstream.add_account("id-2", "SK.other");
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.wait_for_state("acme", "fresh").await;
    fixture.add_account("typo", "id-2", "SK.wrong").await;
    fixture.wait_for_state("typo", "rejected").await;
    let sealed = |client_id: &str, secret: &str| {
        let secret = ClientSecret::new(secret).unwrap();
        fixture.keyring.intake_public().seal(&client_id.parse().unwrap(), &secret).unwrap()
    };
    for (name, client_id, secret) in [("acme", "id-1", "SK.1"), ("typo", "id-2", "SK.wrong")] {
        let epoch = async || text(&fixture.database, &format!("{EPOCH} '{name}'")).await;
        let before = epoch().await;
        let set = |secret: &str| {
            format!("update accounts set client_secret = '{secret}' where name = '{name}'")
        };
        let upsert = |secret: &str| {
            format!(
                "insert into accounts (name, client_id, client_secret) values ('{name}', '{client_id}', '{secret}')
                 on conflict (name) do update set client_id = excluded.client_id,
                     client_secret = excluded.client_secret, enabled = excluded.enabled"
            )
        };
        let (first_seal, second_seal) = (sealed(client_id, secret), sealed(client_id, secret));
        for statement in [
            set(secret),
            set(&format!("{secret}\n")),
            set(&first_seal),
            upsert(secret),
            upsert(&second_seal),
            format!("begin; {}; {}; commit", set(secret), upsert(&first_seal)),
            format!("begin; {}; {}; commit", set("SK.taken-back"), set(secret)),
            format!("update accounts set name = name, client_id = client_id, client_secret = '{secret}',
                     description = 'whole object', enabled = true where name = '{name}'"),
        ] {
            fixture.database.sql(&statement).await;
            until_sealed(&fixture).await;
        }
        // What comes after it was planned with the last of these changes.
        let later = format!("later-{name}");
        fixture.upstream.add_account(&later, "SK.later");
        fixture.add_account(&later, &later, "SK.later").await;
        fixture.wait_for_state(&later, "fresh").await;
        assert_eq!(epoch().await, before, "{name}");
        assert_eq!(fixture.upstream.attempts(client_id), 1, "{name}");
    }
    let unchanged = "event = 'account_changed' and detail->>'secret' = 'unchanged'";
    eventually("the records", async || {
        (fixture.audit_events(unchanged).await.len() == 16).then_some(())
    })
    .await;

    // Another secret is a new credential.
    fixture
        .database
        .sql("update accounts set client_secret = 'SK.other' where name = 'typo'")
        .await;
    fixture.wait_for_state("typo", "fresh").await;
    let version = "select credential_version::text from accounts where name = 'typo'";
    assert_eq!(text(&fixture.database, version).await, "2");
    broker.stop().await;
}

/// A program of the owner saves whole rows as it read them earlier. Sealed columns are written by the sealing alone, so
/// such a save neither puts an old secret back nor loses one that was just written.
#[tokio::test]
async fn a_stale_save_of_a_whole_row_is_refused_by_the_name_of_the_sealed_column() {
    let fixture = Fixture::new().await;
    let database = &fixture.database;
    let broker = fixture.start().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.wait_for_state("acme", "fresh").await;
    let sealed = "select '\\x' || encode(sealed_secret, 'hex') from accounts";
    let first = text(database, sealed).await;
    fixture.upstream.add_account("id-1", "SK.2");
    database.sql("update accounts set client_secret = 'SK.2'").await;
    let rotated = "select concat(credential_version, previous_version) from accounts";
    eventually("the rotation", async || (text(database, rotated).await == "2").then_some(())).await;
    eventually("the second token", async || (fixture.upstream.issued("id-1") == 2).then_some(()))
        .await;
    let second = text(database, sealed).await;
    broker.stop().await;

    let row = |secret: &str, sealed: &str, version: i64| {
        format!(
            "update accounts set name = 'acme', client_id = 'id-1', client_secret = {secret}, sealed_secret = {sealed},
                 previous_secret = null, previous_version = null, credential_version = {version},
                 description = 'saved', enabled = true"
        )
    };
    let (old, current) = (format!("'{first}'"), format!("'{second}'"));
    let stale = [
        (row("null", &old, 1), "accounts.sealed_secret "),
        (row("null", "null", 1), "accounts.sealed_secret "),
        (row("'SK.1'", "null", 1), "accounts.sealed_secret "),
        (row("'SK.1'", &old, 1), "accounts.sealed_secret "),
        (format!("update accounts set sealed_secret = {old}"), "accounts.sealed_secret "),
        ("update accounts set sealed_secret = null".into(), "accounts.sealed_secret "),
        (
            format!("update accounts set previous_secret = {old}, previous_version = 1"),
            "accounts.previous_secret ",
        ),
        ("update accounts set credential_version = 1".into(), "accounts.credential_version "),
        (
            format!(
                "insert into accounts (name, client_id, sealed_secret) values ('acme', 'id-1', {old})
                 on conflict (name) do update set sealed_secret = excluded.sealed_secret"
            ),
            "accounts.sealed_secret ",
        ),
        (
            format!("insert into accounts (name, client_id, sealed_secret) values ('new', 'new', {old})"),
            "accounts.sealed_secret ",
        ),
        (
            format!(
                "delete from accounts;
                 insert into accounts (name, client_id, sealed_secret) values ('acme', 'id-1', {old})"
            ),
            "accounts.sealed_secret ",
        ),
    ];
    let refused = async |statement: &str, says: &str| {
        let error = database.try_sql(statement).await.expect_err(statement);
        let error = error.into_database_error().unwrap();
        assert!(error.message().starts_with(says), "{statement}: {error}");
    };
    for (statement, says) in &stale {
        refused(statement, says).await;
    }
    // A save of the row as it is.
    database.sql(&row("null", &current, 2)).await;
    assert_eq!(text(database, sealed).await, second);

    // The same while a rotation waits to be sealed: it is not lost.
    for write in [
        "update accounts set client_secret = 'SK.3'",
        "begin; set local token_broker.purge_old = 'on'; update accounts set client_secret = 'SK.4'; commit",
    ] {
        database.sql(write).await;
        let empty =
            text(database, "select (sealed_secret is null)::text from accounts").await == "true";
        for (statement, _) in
            stale.iter().filter(|(it, _)| !empty || !it.ends_with("sealed_secret = null"))
        {
            refused(statement, "accounts.").await;
        }
        refused(&row("null", &current, 2), "accounts.").await;
        let as_it_is = "update accounts set client_secret = null, sealed_secret = sealed_secret";
        refused(as_it_is, "accounts.client_secret waits to be sealed").await;
    }
    fixture.upstream.add_account("id-1", "SK.4");
    let broker = fixture.start().await;
    eventually("the third token", async || (fixture.upstream.issued("id-1") == 3).then_some(()))
        .await;
    assert_eq!(fixture.account_status("acme", "last_error").await, "");
    broker.stop().await;
}

/// A program of the role that manages callers saves a row as it read it before somebody else revoked the bearer.
#[tokio::test]
async fn a_stale_save_of_a_credential_does_not_take_its_revocation_back() {
    let database = database_with_roles().await;
    let save = |revoked_at: &str| {
        format!(
            "update caller_credentials set description = 'x', ends_at = null, revoked_at = {revoked_at}"
        )
    };
    sql_as(&database, ACCESS, &save("null")).await;
    sql_as(&database, ACCESS, &save("now()")).await;
    for stale in ["null", "now() + interval '1 day'", "timestamptz '2026-01-01 00:00Z'"] {
        let error = attempt(&database, ACCESS, &save(stale)).await.unwrap_err();
        let error = error.as_database_error().unwrap();
        assert_eq!(error.code().unwrap(), "23514");
        assert!(error.message().contains("caller_credentials.revoked_at cannot be"), "{error}");
    }
    sql_as(&database, ACCESS, &save("revoked_at")).await;
    let revoked = "select count(*)::text from caller_credentials where revoked_at is not null";
    assert_eq!(text(&database, revoked).await, "1");
}

/// Declarative tools and programs that save whole objects write values again that did not change. That is no change: it is
/// neither recorded nor announced, nor does the row count as updated. A row that was written past the triggers is another
/// matter: to write it as it is accepts its state.
#[tokio::test]
async fn an_update_that_changes_no_value_records_nothing_and_announces_nothing() {
    const OWNER: &str = "current_user";
    let database = database_with_roles().await;
    database
        .sql(
            "insert into caller_credentials (caller_id, kind, identity)
                 select id, 'dns', 'shop.example.com' from callers;
             insert into intake_keys (key_id, public_key, is_primary) values ('i1', sha256('x'), true);
             update accounts set description = 'x'",
        )
        .await;
    let state = "select concat((select max(id) from changes), ' ',
        (select string_agg(updated_at::text, ' ') from (select updated_at from accounts
            union all select updated_at from callers) it))";
    let before = text(&database, state).await;
    let mut announced = sqlx::postgres::PgListener::connect_with(database.pool()).await.unwrap();
    announced.listen("token_broker_changes").await.unwrap();

    let mut statements = vec![
        (OWNER, "update accounts set name = name, client_secret = client_secret, updated_at = now()"),
        (OWNER, "update accounts set updated_at = '2026-01-01 00:00Z', sealed_secret = sealed_secret"),
        (OWNER, "update callers set updated_at = clock_timestamp(), created_at = created_at"),
        (OWNER, "update caller_credentials set kind = kind, bearer_sha256 = bearer_sha256, identity = identity"),
        (OWNER, "update grants set rights = rights, pattern = pattern, caller_id = caller_id"),
        (OWNER, "update grants set rights = array['get', 'report', 'list']"),
        (OWNER, "update intake_keys set is_primary = true, public_key = sha256('x')"),
        (OWNER, "update audit_retention set calls_days = calls_days"),
        (ACCOUNTS, "update accounts set enabled = true, client_id = 'acme-id', description = 'x'"),
        (
            ACCOUNTS,
            "insert into accounts (name, client_id, description) values ('acme', 'acme-id', 'x')
             on conflict (name) do update set description = excluded.description, client_id = excluded.client_id",
        ),
        (ACCESS, "update callers set enabled = true, rate_limit = null, description = ''"),
        (
            ACCESS,
            "insert into callers (name) values ('shop') on conflict (name) do update
             set rate_limit = excluded.rate_limit, enabled = excluded.enabled",
        ),
        (ACCESS, "update caller_credentials set bearer_sha256 = sha256('x'), revoked_at = null where id = 1"),
        (
            ACCESS,
            "insert into grants (caller_id, pattern) select id, 'acme' from callers
             on conflict (caller_id, pattern) do update set rights = excluded.rights, ends_at = excluded.ends_at",
        ),
        (RUNTIME, "update accounts set reissue_requested_at = reissue_requested_at"),
    ];
    let version = text(&database, "select current_setting('server_version_num')").await;
    if version.parse::<u32>().unwrap() >= 150_000 {
        statements.push((
            ACCESS,
            "merge into grants using callers on grants.caller_id = callers.id
             when matched then update set rights = '{get,report,list}'",
        ));
    }
    for (role, statement) in statements {
        let run = format!("begin; set local role {role}; {statement}; commit");
        database.sql(&run.replace("set local role current_user;", "")).await;
        assert_eq!(text(&database, state).await, before, "{statement}");
    }
    // Notifications come in the order of the commits.
    database.sql("notify token_broker_changes, 'last'").await;
    assert_eq!(announced.recv().await.unwrap().payload(), "last");

    database
        .sql_past_triggers(
            "update accounts set enabled = false; update callers set enabled = false;
             update caller_credentials set ends_at = now() where kind = 'dns'; update grants set rights = '{get}';
             update intake_keys set is_primary = false",
        )
        .await;
    let unrecorded = "select count(*)::text from unrecorded_changes";
    assert_eq!(text(&database, unrecorded).await, "5");
    for table in ["accounts", "callers", "caller_credentials", "grants", "intake_keys"] {
        let column = if table == "intake_keys" { "key_id" } else { "id" };
        let column = if table == "accounts" { "name" } else { column };
        let column = if column == "id" { "created_at" } else { column };
        database.sql(&format!("update {table} set {column} = {column}")).await;
    }
    assert_eq!(text(&database, unrecorded).await, "0");
}

/// What a credential or a grant consists of is not changed in place: a program that saves a row as it read it earlier would
/// put back a bearer, a name in certificates or a pattern that was replaced meanwhile.
#[tokio::test]
async fn a_stale_save_puts_neither_an_old_bearer_nor_an_old_name_nor_an_old_pattern_back() {
    let database = database_with_roles().await;
    database
        .sql(
            "insert into callers (name) values ('other');
             insert into caller_credentials (caller_id, kind, identity)
                 select id, 'dns', 'shop.example.com' from callers where name = 'shop'",
        )
        .await;
    let of_other = "(select id from callers where name = 'other')";
    for (role, table, column, set) in [
        (
            ACCESS,
            "caller_credentials",
            "bearer_sha256",
            "bearer_sha256 = sha256('old') where id = 1",
        ),
        (ACCESS, "caller_credentials", "bearer_sha256", "bearer_sha256 = null where id = 1"),
        (ACCESS, "caller_credentials", "identity", "identity = 'old.example.com' where id = 2"),
        (
            "none",
            "caller_credentials",
            "kind",
            "kind = 'spiffe', identity = 'spiffe://a/b' where id = 2",
        ),
        (
            "none",
            "caller_credentials",
            "kind",
            "kind = 'dns', identity = 'b', bearer_sha256 = null where id = 1",
        ),
        ("none", "caller_credentials", "caller_id", &format!("caller_id = {of_other}")),
        ("none", "caller_credentials", "id", "id = default where id = 1"),
        (ACCESS, "grants", "pattern", "pattern = '*'"),
        ("none", "grants", "caller_id", &format!("caller_id = {of_other}")),
        ("none", "grants", "id", "id = default"),
    ] {
        let statement = format!("update {table} set description = description, {set}");
        let statement = if table == "grants" {
            statement.replace("description = description, ", "rights = rights, ")
        } else {
            statement
        };
        let error = attempt(&database, role, &statement).await.expect_err(&statement);
        let error = error.into_database_error().unwrap().downcast::<PgDatabaseError>();
        assert_eq!((error.code(), error.column()), ("23514", Some(column)), "{statement}: {error}");
        let named = format!("{table}.{column} cannot be changed");
        assert!(error.message().starts_with(&named), "{statement}: {error}");
    }
    // What replaces them.
    for statement in [
        "update caller_credentials set revoked_at = now() where id = 1;
         insert into caller_credentials (caller_id, kind, bearer_sha256)
             select caller_id, kind, sha256('new') from caller_credentials where id = 1",
        "delete from caller_credentials where id = 2;
         insert into caller_credentials (caller_id, kind, identity) select id, 'dns', 'shop.example.com' from callers
             where name = 'other'",
        "delete from grants; insert into grants (caller_id, pattern) select id, 'acme-*' from callers where name = 'shop'",
        "update caller_credentials set bearer_sha256 = sha256('x'), ends_at = now() where id = 1;
         update grants set pattern = 'acme', rights = '{get}'",
    ] {
        attempt(&database, ACCESS, statement).await.unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}

/// An upsert as the role of accounts' admins writes the value itself, since `excluded.client_secret` needs the right to
/// read that column. `docs/operations.md` has the forms.
#[tokio::test]
async fn an_upsert_as_the_least_role_works_in_the_documented_forms() {
    let database = database_with_roles().await;
    let merge =
        "merge into accounts using (values ('acme', 'acme-id', 'SK.2'), ('new', 'new-id', 'SK.3'))
             as given (name, client_id, client_secret) on accounts.name = given.name
         when matched then update set client_secret = given.client_secret
         when not matched then insert (name, client_id, client_secret)
             values (given.name, given.client_id, given.client_secret)";
    let mut forms = vec![
        "insert into accounts (name, client_id, client_secret) values ('acme', 'acme-id', 'SK.2')
             on conflict (name) do update set client_id = excluded.client_id, client_secret = 'SK.2'",
        "insert into accounts (name, client_id, description) values ('acme', 'acme-id', 'no secret')
             on conflict (name) do update set description = excluded.description",
    ];
    let version = text(&database, "select current_setting('server_version_num')").await;
    if version.parse::<u32>().unwrap() >= 150_000 {
        forms.push(merge);
    }
    for form in forms {
        for _ in 0..2 {
            sql_as(&database, ACCOUNTS, form).await;
        }
    }
    let excluded =
        "insert into accounts (name, client_id, client_secret) values ('acme', 'acme-id', 'SK.2')
        on conflict (name) do update set client_secret = excluded.client_secret";
    let error = attempt(&database, ACCOUNTS, excluded).await.unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().unwrap(), "42501");
    sql_as(
        &database,
        ACCESS,
        "insert into caller_credentials (caller_id, kind, bearer_sha256)
             select id, 'bearer', sha256('x') from callers on conflict do nothing",
    )
    .await;
    let comment = "select col_description('accounts'::regclass, attnum) from pg_attribute
        where attrelid = 'accounts'::regclass and attname = 'client_secret'";
    assert!(text(&database, comment).await.contains("set client_secret = $3"));
}

/// Runs a program of Postgres, such as `psql`. Returns `None` if it is not installed.
pub(crate) async fn postgres_program(program: &str, arguments: &[&str]) -> Option<Output> {
    let run = Command::new(program).args(arguments).stdin(Stdio::null()).output().await;
    match run {
        Ok(output) => Some(output),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            note_skipped(&format!("{program} is not installed"));
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

/// A dump of schema and data is restored into an empty database, and callers are served from it. A dump of the data
/// alone is refused as a whole, however often it is tried.
#[tokio::test]
async fn a_dump_is_restored_with_its_schema_and_refused_without_it() {
    let mut fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let first = eventually("a token", async || client.get("acme").await.ok()).await;
    let unaudited = "select count(*)::text from changes where audited_at is null";
    eventually("the records", async || {
        (text(&fixture.database, unaudited).await == "0").then_some(())
    })
    .await;
    broker.stop().await;
    // A secret that no broker has sealed yet.
    fixture.add_account("new", "id-2", "SK.2").await;

    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (whole, data, inserts) = (file("whole.sql"), file("data.sql"), file("inserts.sql"));
    let url = fixture.database.url().to_owned();
    for arguments in [
        vec!["-f", &whole, &url],
        vec!["--data-only", "-f", &data, &url],
        vec!["--data-only", "--inserts", "-f", &inserts, &url],
    ] {
        let Some(dumped) = postgres_program("pg_dump", &arguments).await else { return };
        let says = String::from_utf8_lossy(&dumped.stderr);
        if says.contains("server version mismatch") {
            note_skipped("pg_dump is older than the server");
            return;
        }
        assert!(dumped.status.success(), "{says}");
    }

    let target = TestDatabase::new().await;
    let in_one = ["-X", "-1", "-v", "ON_ERROR_STOP=1", "-d", target.url(), "-f", &data];
    let Some(refused) = postgres_program("psql", &in_one).await else { return };
    assert!(!refused.status.success());
    let rows = "select ((select count(*) from accounts) + (select count(*) from callers)
            + (select count(*) from caller_credentials) + (select count(*) from grants)
            + (select count(*) from refreshes) + (select count(*) from tokens)
            + (select count(*) from deployment) + (select count(*) from audit_chains))::text";
    // One session can run several, and the first ones leave the sequences as the dump has them.
    for dumps in [[&data, &data], [&inserts, &inserts], [&data, &inserts], [&inserts, &data]] {
        let arguments = ["-X", "-d", target.url(), "-f", dumps[0], "-f", dumps[1]];
        let output = postgres_program("psql", &arguments).await.unwrap();
        let says = String::from_utf8_lossy(&output.stderr);
        assert!(says.contains("restore its schema and its data together"), "{says}");
        assert_eq!(text(&target, rows).await, "0", "{dumps:?}: {says}");
    }
    target.sql("insert into callers (name) values ('works'), ('as-before')").await;

    let restored = TestDatabase::without_schema().await;
    let in_one = ["-X", "-1", "-v", "ON_ERROR_STOP=1", "-d", restored.url(), "-f", &whole];
    let output = postgres_program("psql", &in_one).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text(&restored, "select count(*)::text from unrecorded_changes").await, "0");
    fixture.database = restored;
    assert!(start_error(fixture.config()).await.contains("start once with --accept-restored"));
    let broker = fixture.start_with(AppConfig { accept_restored: true, ..fixture.config() }).await;
    let client = broker.client(&bearer).await;
    eventually("a newer token", async || {
        client.get("acme").await.ok().filter(|token| token.generation > first.generation)
    })
    .await;
    fixture.upstream.add_account("id-2", "SK.2");
    fixture
        .database
        .sql("update accounts set reissue_requested_at = now() where name = 'new'")
        .await;
    eventually("the other token", async || client.get("new").await.ok()).await;
    broker.stop().await;
}

/// A dump of data that was tried on a database in use has set its sequences back. Rows get numbers that no other row has
/// or had all the same, also those of changes, without which no admin could change anything.
#[tokio::test]
async fn sequences_that_were_set_back_give_no_row_the_number_of_another() {
    let database = database_with_roles().await;
    database
        .sql(
            "insert into callers (name) values ('gone'); delete from callers where name = 'gone';
             select setval(format('%s_id_seq', name)::regclass, 1)
                 from unnest(array['accounts', 'callers', 'caller_credentials', 'grants', 'changes']) name",
        )
        .await;
    let gone = "select max(row_id)::text from changes where table_name = 'callers'";
    let gone: i64 = text(&database, gone).await.parse().unwrap();
    // Two sessions at once, of which one commits later.
    let mut open = database.pool().begin().await.unwrap();
    for statement in
        ["set local role token_broker_access", "insert into callers (name) values ('a'), ('b')"]
    {
        sqlx::raw_sql(statement).execute(&mut *open).await.unwrap();
    }
    let pool = database.pool().clone();
    let other = tokio::spawn(async move {
        let insert = "insert into callers (name) values ('c')";
        sqlx::raw_sql(insert).execute(&pool).await.map(drop)
    });
    eventually("the other one to wait or to be done", async || {
        let waits = "select exists (select from pg_locks where not granted)::text";
        (other.is_finished() || text(&database, waits).await == "true").then_some(())
    })
    .await;
    open.commit().await.unwrap();
    other.await.unwrap().unwrap();
    sql_as(
        &database,
        ACCOUNTS,
        "insert into accounts (name, client_id, client_secret) values ('new', 'new', 'SK.2'), ('new-2', 'new-2', 'SK.3');
         update accounts set description = 'x'",
    )
    .await;
    sql_as(
        &database,
        ACCESS,
        "insert into grants (caller_id, pattern) select id, 'new' from callers;
         insert into caller_credentials (caller_id, kind, bearer_sha256)
             select id, 'bearer', sha256(name::bytea) from callers;
         update callers set description = 'x'",
    )
    .await;
    let reused =
        format!("select count(*)::text from callers where name in ('a', 'b', 'c') and id > {gone}");
    assert_eq!(text(&database, &reused).await, "3");
    assert_eq!(text(&database, "select count(*)::text from unrecorded_changes").await, "0");
}
