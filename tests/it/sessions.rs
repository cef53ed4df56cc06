//! Sessions with the database: admins' settings do not change what statements do, sessions that can no longer
//! be used are replaced, and a connection pooler is used if it keeps sessions and refused if not.

use std::time::Duration;

use sqlx::{AssertSqlSafe, PgPool};
use tempfile::TempDir;
use token_broker::{
    config::DatabaseUrl,
    domain::account::AccountId,
    store::{
        Database, StoreError,
        leases::{self, Claim},
    },
};
use tokio_util::sync::CancellationToken;

use crate::{
    harness::{
        broker::{Fixture, TestBroker},
        database::TestDatabase,
        eventually,
        lease_holder::unlimited_holder,
        pgbouncer::PgBouncer,
        process::BrokerSetup,
    },
    outages::until_readiness_says,
};

/// Settings that an admin may give a database, and that would change what statements do. If all are given, the
/// last value of each counts.
const ODD_SETTINGS: &[(&str, &str)] = &[
    ("default_transaction_isolation", "repeatable read"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_deferrable", "on"),
    ("synchronous_commit", "off"),
    ("synchronous_commit", "local"),
    ("statement_timeout", "0"),
    ("statement_timeout", "20"),
    ("lock_timeout", "0"),
    ("lock_timeout", "1"),
    ("idle_in_transaction_session_timeout", "1"),
    ("idle_session_timeout", "2000"),
    ("exit_on_error", "on"),
    ("row_security", "on"),
    ("search_path", "nowhere"),
    ("search_path", "pg_catalog"),
    ("search_path", "information_schema, pg_temp, public"),
    ("search_path", "\"$user\", nowhere, pg_temp, public, pg_catalog"),
    ("search_path", ""),
    ("TimeZone", "Asia/Tokyo"),
    ("DateStyle", "German"),
    ("DateStyle", "SQL, DMY"),
    ("IntervalStyle", "iso_8601"),
    ("client_encoding", "LATIN1"),
    ("bytea_output", "escape"),
    ("extra_float_digits", "-15"),
    ("standard_conforming_strings", "off"),
    ("escape_string_warning", "off"),
    ("backslash_quote", "off"),
    ("array_nulls", "off"),
    ("transform_null_equals", "on"),
    ("check_function_bodies", "off"),
    ("quote_all_identifiers", "on"),
    ("plan_cache_mode", "force_generic_plan"),
    ("xmloption", "document"),
    ("client_min_messages", "debug5"),
    ("work_mem", "64"),
];

/// Gives the database a default for a setting, which new sessions take.
async fn set_default(database: &TestDatabase, name: &str, value: &str) {
    let list = if name == "search_path" && !value.is_empty() {
        value.to_owned()
    } else {
        format!("'{value}'")
    };
    // Without a prepared statement, so that it works whatever the settings are.
    let statement = format!(
        "set default_transaction_read_only = off;
         do $odd$ begin
             execute format($set$alter database %I set {name} = {list}$set$, current_database());
         end $odd$"
    );
    database.sql(&statement).await;
}

async fn reset_defaults(database: &TestDatabase) {
    let statement = "do $odd$ begin
        execute format('alter database %I reset all', current_database());
    end $odd$";
    database.sql(statement).await;
}

/// Waits until a token was issued for each account, and returns how many were issued in all.
async fn issues_of_all(fixture: &Fixture, accounts: usize) -> usize {
    let client_ids = (0..accounts).map(|n| format!("many-{n}")).collect::<Vec<_>>();
    eventually("a token of each account", async || {
        client_ids.iter().all(|id| fixture.upstream.issued(id) > 0).then_some(())
    })
    .await;
    let stored = "select count(*) from tokens";
    eventually("all tokens stored", async || {
        let count: i64 =
            sqlx::query_scalar(stored).fetch_one(fixture.database.pool()).await.unwrap();
        (usize::try_from(count).unwrap() == accounts).then_some(())
    })
    .await;
    client_ids.iter().map(|id| usize::try_from(fixture.upstream.issued(id)).unwrap()).sum()
}

async fn add_accounts(fixture: &Fixture, accounts: usize) {
    for n in 0..accounts {
        fixture.upstream.add_account(&format!("many-{n}"), "SK.many");
    }
    let insert = format!(
        "insert into accounts (name, client_id, client_secret)
         select 'many-' || n, 'many-' || n, 'SK.many' from generate_series(0, {}) n",
        accounts - 1
    );
    fixture.database.sql(&insert).await;
}

/// Starts two replicas that use the database at `url`. The directory is the second one's.
async fn start_two(fixture: &Fixture, url: &str) -> ([TestBroker; 2], TempDir) {
    let second = TempDir::new().unwrap();
    let config = |state: Option<&TempDir>| {
        let mut config = fixture.config();
        config.settings.database_url = DatabaseUrl::new(url).unwrap();
        if let Some(state) = state {
            config.settings.state_dir = state.path().to_owned();
        }
        config
    };
    let brokers =
        [fixture.start_with(config(None)).await, fixture.start_with(config(Some(&second))).await];
    (brokers, second)
}

/// Part of the promise that each account is issued once per window whatever admins set: the isolation level,
/// durability, time limits, schema path and text formats of a session are the broker's own.
#[tokio::test]
async fn a_hundred_accounts_are_issued_once_each_by_two_replicas_whatever_the_databases_settings() {
    let fixture = Fixture::new().await;
    for (name, value) in ODD_SETTINGS {
        set_default(&fixture.database, name, value).await;
    }
    let (brokers, _directory) = start_two(&fixture, fixture.database.url()).await;
    add_accounts(&fixture, 100).await;
    assert_eq!(issues_of_all(&fixture, 100).await, 100);
    for broker in brokers {
        until_readiness_says(&broker, "\"answers\"").await;
        broker.stop().await;
    }
    assert_eq!(fixture.audit_events("event = 'token_issued'").await.len(), 100);
}

/// A claim that waited for another one sees what that one committed, and is granted, whatever isolation the database
/// has by default. Under a stricter one it would fail, and the account would get its token later.
#[tokio::test]
async fn a_claim_that_waited_for_another_one_is_granted_whatever_the_databases_isolation() {
    let test_database = TestDatabase::new().await;
    let id: i64 = sqlx::query_scalar(
        "insert into accounts (name, client_id, client_secret) values ('acme', 'id-1', 'SK.1') returning id",
    )
    .fetch_one(test_database.pool())
    .await
    .unwrap();
    test_database
        .sql_past_triggers("update accounts set client_secret = null, sealed_secret = 'x'")
        .await;
    let holder = unlimited_holder("ours");
    let waits = "select exists (select from pg_stat_activity where datname = current_database()
        and wait_event_type = 'Lock')";
    for level in ["repeatable read", "serializable"] {
        set_default(&test_database, "default_transaction_isolation", level).await;
        let pool = Database::new(test_database.url(), "test").unwrap().pool(2);
        // A claim waits for half a second at most, which a slow machine may exceed.
        eventually("a claim that waited", async || {
            test_database
                .sql("update refreshes set lease_holder = null, lease_until = null, attempt_started_at = null")
                .await;
            let mut other = test_database.pool().begin().await.unwrap();
            sqlx::raw_sql("update upstream_pace set next_slot = now()")
                .execute(&mut *other)
                .await
                .unwrap();
            let (pool, holder) = (pool.clone(), holder.clone());
            let claim = tokio::spawn(async move {
                leases::claim(&pool, AccountId(id), None, None, None, &holder).await
            });
            let waited = eventually("the claim waits or has ended", async || {
                let query = sqlx::query_scalar::<_, bool>(waits);
                let waits = query.fetch_one(test_database.pool()).await.unwrap();
                (waits || claim.is_finished()).then_some(waits)
            })
            .await;
            other.commit().await.unwrap();
            match claim.await.unwrap() {
                Err(error) if error.is_delayed() => None,
                claim => {
                    assert!(matches!(claim, Ok(Claim::Granted(_))), "{level}: {claim:?}");
                    waited.then_some(())
                }
            }
        })
        .await;
    }
}

#[tokio::test]
async fn each_session_has_the_brokers_settings_whatever_an_admin_set() {
    let fixture_database = TestDatabase::new().await;
    let database = Database::new(fixture_database.url(), "test").unwrap();
    let expected = "select array[current_setting('default_transaction_isolation'),
        current_setting('default_transaction_read_only'), current_setting('synchronous_commit'),
        current_setting('statement_timeout'), current_setting('lock_timeout'),
        current_setting('search_path'), current_setting('TimeZone'), current_setting('DateStyle')]";
    let read = async || {
        let mut connection = database.open().await.unwrap();
        let settings: Vec<String> =
            sqlx::query_scalar(expected).fetch_one(&mut connection).await.unwrap();
        sqlx::query("insert into callers (name) values ('a') on conflict do nothing")
            .execute(&mut connection)
            .await
            .unwrap();
        settings
    };
    let usual = read().await;
    assert_eq!(
        usual,
        ["read committed", "off", "on", "30s", "5s", "public, pg_temp", "UTC", "ISO, MDY"]
    );
    for (name, value) in ODD_SETTINGS {
        set_default(&fixture_database, name, value).await;
        assert_eq!(read().await, usual, "{name} = {value}");
        reset_defaults(&fixture_database).await;
    }
    set_default(&fixture_database, "synchronous_commit", "remote_apply").await;
    assert_eq!(read().await[2], "remote_apply", "a stricter setting stays");
}

#[tokio::test]
async fn the_schema_of_the_url_is_used_and_temporary_tables_do_not_hide_its_tables() {
    let database = TestDatabase::new().await;
    database.sql("create schema odd_one; create schema other").await;
    let mut url = url::Url::parse(database.url()).unwrap();
    url.query_pairs_mut().append_pair("options", "-c search_path=odd_one,other");
    let odd = Database::new(url.as_str(), "test").unwrap();
    odd.migrate().await.unwrap();
    odd.check_schema().await.unwrap();
    let mut connection = odd.open().await.unwrap();
    let schema: String =
        sqlx::query_scalar("select current_schema()").fetch_one(&mut connection).await.unwrap();
    assert_eq!(schema, "odd_one");
    sqlx::raw_sql("create temp table callers (name text)").execute(&mut connection).await.unwrap();
    let found: String = sqlx::query_scalar(
        "select relnamespace::regnamespace::text from pg_class where oid = 'callers'::regclass",
    )
    .fetch_one(&mut connection)
    .await
    .unwrap();
    assert_eq!(found, "odd_one");
}

#[tokio::test]
async fn a_login_for_which_triggers_do_not_fire_is_refused_by_name() {
    let test_database = TestDatabase::new().await;
    set_default(&test_database, "session_replication_role", "replica").await;
    let error = Database::new(test_database.url(), "test").unwrap().open().await.unwrap_err();
    assert!(error.to_string().contains("session_replication_role is replica"), "{error}");
    assert!(!error.may_be_outage());
}

/// Runs `statement` in a session of the pool. It must fail, and the session must be replaced.
async fn assert_replaces_sessions(pool: &PgPool, prepare: &str, statement: &'static str) {
    let process = "select pg_backend_pid()";
    let mut connection = pool.acquire().await.unwrap();
    let before: i32 = sqlx::query_scalar(process).fetch_one(&mut *connection).await.unwrap();
    if prepare.is_empty() {
        sqlx::query(statement).execute(&mut *connection).await.unwrap();
        sqlx::raw_sql("alter table changing add column c int")
            .execute(&mut *connection)
            .await
            .unwrap();
    } else {
        sqlx::raw_sql(AssertSqlSafe(prepare.to_owned())).execute(&mut *connection).await.unwrap();
    }
    let error = sqlx::query(statement).execute(&mut *connection).await.expect_err(statement);
    let error = StoreError::from(error);
    drop(connection);
    let after: i32 = sqlx::query_scalar(process).fetch_one(pool).await.unwrap();
    assert_ne!(before, after, "{error}");
}

#[tokio::test]
async fn a_session_is_replaced_after_an_error_that_shows_it_unusable() {
    let test_database = TestDatabase::new().await;
    test_database.sql("create table changing (a int)").await;
    let pool = Database::new(test_database.url(), "test").unwrap().pool(1);
    let read = "select * from changing";
    let insert = "insert into changing (a) values (1)";
    assert_replaces_sessions(&pool, "", read).await;
    assert_replaces_sessions(&pool, "set default_transaction_read_only = on", insert).await;
    assert_replaces_sessions(&pool, "begin; savepoint s; do $$ begin raise 'x'; exception when others then null; end $$; set transaction_read_only = on", insert).await;
    let terminate = "select pg_terminate_backend(pg_backend_pid())";
    assert_replaces_sessions(&pool, "select 1", terminate).await;
    assert_replaces_sessions(
        &pool,
        "select 1",
        "do $$ begin raise exception using errcode = '26000'; end $$",
    )
    .await;
    assert_replaces_sessions(
        &pool,
        "select 1",
        "do $$ begin raise exception using errcode = '57P03'; end $$",
    )
    .await;
}

/// Part of the promise that what the broker depends on is checked: through a pooler that keeps sessions
/// everything works, with the broker's settings, although the pooler drops startup options.
#[tokio::test]
async fn a_pooler_in_session_mode_serves_two_replicas_without_special_settings() {
    let fixture = Fixture::new().await;
    set_default(&fixture.database, "default_transaction_isolation", "serializable").await;
    set_default(&fixture.database, "search_path", "nowhere").await;
    let settings = "pool_mode = session\nserver_reset_query = DISCARD ALL\ndefault_pool_size = 60";
    let Some(bouncer) = PgBouncer::start(fixture.database.url(), settings).await else { return };
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let (brokers, _directory) = start_two(&fixture, &bouncer.url()).await;
    add_accounts(&fixture, 50).await;
    assert_eq!(issues_of_all(&fixture, 50).await, 50);
    let client = brokers[1].client(&bearer).await;
    eventually("a token", async || client.get("many-7").await.ok()).await;
    fixture.database.sql("update callers set enabled = false").await;
    eventually("a refusal", async || client.get("many-7").await.err()).await;
    for broker in brokers {
        broker.stop().await;
    }
    assert_eq!(fixture.audit_events("event = 'token_issued'").await.len(), 50);
}

/// Keeps `clients` clients of a pooler busy until `stop` is cancelled.
fn keep_busy(url: &str, clients: usize, stop: &CancellationToken) {
    for _ in 0..clients {
        let (url, stop) = (url.to_owned(), stop.clone());
        tokio::spawn(async move {
            use sqlx::Connection;
            let options = url.parse::<sqlx::postgres::PgConnectOptions>().unwrap();
            let options = options.extra_float_digits(None);
            let Ok(mut client) = sqlx::PgConnection::connect_with(&options).await else { return };
            while !stop.is_cancelled() {
                let _ = sqlx::raw_sql("select pg_sleep(0.001)").execute(&mut client).await;
            }
        });
    }
}

/// Part of the promise that what the broker depends on is checked: a pooler that does not keep sessions is
/// refused with words that say what to set.
#[tokio::test]
async fn a_pooler_that_does_not_keep_sessions_is_refused_with_words_that_name_the_mode() {
    let fixture = Fixture::new().await;
    for (mode, settings, clients) in [
        ("transaction", "default_pool_size = 20", 0),
        ("transaction", "default_pool_size = 1", 0),
        ("transaction", "default_pool_size = 20\nserver_round_robin = 1", 0),
        ("transaction", "default_pool_size = 3\nserver_round_robin = 1", 5),
        ("transaction", "default_pool_size = 20\nmin_pool_size = 8\nserver_round_robin = 1", 0),
        ("transaction", "default_pool_size = 8", 6),
        ("statement", "default_pool_size = 20", 0),
        ("statement", "default_pool_size = 20\nserver_round_robin = 1", 4),
    ] {
        let settings = format!("pool_mode = {mode}\n{settings}");
        let Some(bouncer) = PgBouncer::start(fixture.database.url(), &settings).await else {
            return;
        };
        let stop = CancellationToken::new();
        keep_busy(&bouncer.url(), clients, &stop);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let database = Database::new(&bouncer.url(), "test").unwrap();
        for attempt in 0..5 {
            let error = database.check_connection().await.expect_err(&settings);
            let text = error.to_string();
            assert!(text.contains("pool_mode = session"), "{settings} {attempt}: {text}");
            assert!(!error.is_unavailable(), "a start must not wait: {text}");
        }
        stop.cancel();
    }
    let Some(bouncer) = PgBouncer::start(fixture.database.url(), "pool_mode = transaction").await
    else {
        return;
    };
    let setup = BrokerSetup::new(&bouncer.url(), &fixture.upstream.base_url()).await;
    for command in [&["serve"][..], &["migrate"], &["account", "list"], &["check"]] {
        let refused = setup.run(command).await.failed();
        assert!(refused.contains("pool_mode = session"), "{command:?}: {refused}");
    }
}

/// `PgBouncer` has one SQLSTATE for refused logins and for a server that it does not reach. A refusal is no
/// outage.
#[tokio::test]
async fn a_login_that_a_pooler_refuses_is_not_an_outage() {
    let test_database = TestDatabase::new().await;
    let Some(bouncer) = PgBouncer::start(test_database.url(), "pool_mode = session").await else {
        return;
    };
    // The URL's own startup options are sent as they are.
    let options = format!("{}&options=-c%20role%3Dpostgres", bouncer.url());
    let no_database = bouncer.url().replace("/pooled", "/none");
    for (url, reason) in [(options, "options"), (no_database, "config error")] {
        let database = Database::new(&url, "test").unwrap();
        for error in [database.open().await.unwrap_err(), database.probe().await.unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains("refuses the login") && text.contains(reason), "{text}");
            assert!(!error.is_unavailable(), "{text}");
        }
    }
}

/// A pooler without a free connection is no answer of the database. So it counts as unreachable for a new session,
/// and proves nothing about the sessions that are open.
#[tokio::test]
async fn a_pooler_without_a_free_connection_is_told_from_one_that_refuses_or_does_not_reach_the_server()
 {
    let test_database = TestDatabase::new().await;
    let settings = "pool_mode = session\nmax_client_conn = 2";
    let Some(bouncer) = PgBouncer::start(test_database.url(), settings).await else { return };
    let database = Database::new(&bouncer.url(), "test").unwrap();
    let open = [database.open().await.unwrap(), database.open().await.unwrap()];
    let saturated = database.open().await.unwrap_err();
    assert!(saturated.may_be_outage() && !saturated.is_silence(), "{saturated}");
    drop(open);
    let no_database = bouncer.url().replace("/pooled", "/none");
    let refused = Database::new(&no_database, "test").unwrap();
    eventually("a refusal", async || {
        let error = refused.open().await.unwrap_err();
        (!error.may_be_outage()).then_some(())
    })
    .await;
    // Nobody listens there any more.
    let url = bouncer.url();
    drop(bouncer);
    let gone = Database::new(&url, "test").unwrap();
    eventually("silence", async || gone.open().await.unwrap_err().is_silence().then_some(())).await;
}

/// A pooler without a free connection hinders no session that is open: what is revoked takes effect, and operators see
/// why no more connections can be opened.
#[tokio::test]
async fn sessions_go_on_while_a_pooler_has_no_free_connection_and_readiness_says_so() {
    let fixture = Fixture::new().await;
    let settings = "pool_mode = session\ndefault_pool_size = 40\nmax_client_conn = 40";
    let Some(bouncer) = PgBouncer::start(fixture.database.url(), settings).await else { return };
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let mut config = fixture.config();
    config.settings.database_url = DatabaseUrl::new(&bouncer.url()).unwrap();
    let broker = fixture.start_with(config).await;
    add_accounts(&fixture, 1).await;
    let client = broker.client(&bearer).await;
    eventually("a token", async || client.get("many-0").await.ok()).await;
    // The broker's pools open and close connections, so all others are taken again and again.
    let (database, stop) =
        (Database::new(&bouncer.url(), "test").unwrap(), CancellationToken::new());
    let others = tokio::spawn({
        let stop = stop.clone();
        async move {
            let mut open = Vec::new();
            while !stop.is_cancelled() {
                match database.open().await {
                    Ok(connection) => open.push(connection),
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        }
    });
    let words = "answers, but takes no new connections: no more connections allowed";
    until_readiness_says(&broker, words).await;
    fixture.database.sql("update callers set enabled = false").await;
    eventually("a refusal", async || client.get("many-0").await.err()).await;
    until_readiness_says(&broker, words).await;
    stop.cancel();
    others.await.unwrap();
    until_readiness_says(&broker, "\"answers\"").await;
    broker.stop().await;
}
