//! Migrations: numbered files are applied once, repeatable ones whenever they have changed, all in one
//! transaction.

use std::{collections::BTreeMap, fs, path::Path};

use sqlx::{
    AssertSqlSafe, Row, SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
};
use token_broker::store::{Database, StoreError, migrate::Schema};

use crate::harness::{database::TestDatabase, process::BrokerSetup};

const ROLES: &str = include_str!("../../deploy/roles.sql");

/// The migrations of a release, which a test can change before it applies them.
struct Release {
    numbered: Vec<Migration>,
    repeatable: Vec<Migration>,
}

impl Release {
    fn current() -> Self {
        Self {
            numbered: sqlx::migrate!("./migrations").iter().cloned().collect(),
            repeatable: sqlx::migrate!("./migrations/repeatable").iter().cloned().collect(),
        }
    }

    fn with_numbered(mut self, number: i64, sql: &str) -> Self {
        self.numbered.push(migration(number, "added", sql));
        self
    }

    fn with_repeatable(mut self, number: i64, name: &str, sql: &str) -> Self {
        self.repeatable.retain(|it| it.description != name);
        self.repeatable.push(migration(number, name, sql));
        self
    }

    /// Raises the version of every repeatable migration to a thousand.
    fn with_every_repeatable_changed(mut self) -> Self {
        for it in &mut self.repeatable {
            let (_, rest) = it.sql.as_str().split_once(" (raise it").unwrap();
            *it = migration(
                it.version,
                &it.description,
                &format!("-- version: 1000 (raise it{rest}"),
            );
        }
        self
    }

    async fn apply(self, database: &TestDatabase) -> Result<(), StoreError> {
        let numbered = Migrator::with_migrations(self.numbered);
        let repeatable = Migrator::with_migrations(self.repeatable);
        Schema::new(numbered, &repeatable)?.apply(&store(database)).await
    }
}

fn migration(number: i64, name: &str, sql: &str) -> Migration {
    let sql = AssertSqlSafe(sql.to_owned()).into_sql_str();
    Migration::new(number, name.to_owned().into(), MigrationType::Simple, sql, false)
}

fn store(database: &TestDatabase) -> Database {
    Database::new(database.url(), "test").unwrap()
}

async fn empty_database() -> TestDatabase {
    let database = TestDatabase::new().await;
    database.sql("drop schema public cascade; create schema public").await;
    database
}

/// Returns the first column of each row, as text.
async fn rows(database: &TestDatabase, query: &str) -> Vec<String> {
    sqlx::query(AssertSqlSafe(query.to_owned()))
        .fetch_all(database.pool())
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect()
}

/// Returns every function, trigger, view, table and recorded migration, with the transaction that last
/// wrote it.
async fn written(database: &TestDatabase) -> Vec<String> {
    rows(
        database,
        "select concat_ws(' ', 'function', oid::regprocedure, xmin) from pg_proc
            where pronamespace = 'public'::regnamespace
        union all select concat_ws(' ', 'trigger', tgrelid::regclass, tgname, xmin) from pg_trigger
        union all select concat_ws(' ', 'relation', oid::regclass, xmin) from pg_class
            where relnamespace = 'public'::regnamespace
        union all select concat_ws(' ', 'number', version, xmin) from _sqlx_migrations
        union all select concat_ws(' ', 'file', name, xmin) from repeatable_migrations
        order by 1",
    )
    .await
}

async fn exists(database: &TestDatabase, relation: &str) -> bool {
    rows(database, &format!("select (to_regclass('{relation}') is not null)::text")).await
        == ["true"]
}

async fn version_of(database: &TestDatabase, name: &str) -> Vec<String> {
    let query = format!("select version::text from repeatable_migrations where name = '{name}'");
    rows(database, &query).await
}

#[tokio::test]
async fn every_function_has_a_fixed_search_path() {
    let database = TestDatabase::new().await;
    let functions = "select proname::text from pg_proc where pronamespace = 'public'::regnamespace";
    let elsewhere =
        "and not coalesce(proconfig @> array['search_path=pg_catalog, pg_temp'], false)";

    assert!(rows(&database, functions).await.len() > 20);
    assert_eq!(rows(&database, &format!("{functions} {elsewhere}")).await, [""; 0]);
}

#[tokio::test]
async fn functions_name_the_schema_that_was_migrated_and_no_other() {
    let database = empty_database().await;
    let name = rows(&database, "select current_database()::text").await.remove(0);
    database
        .sql(&format!("create schema broker; alter database {name} set search_path = broker"))
        .await;

    store(&database).migrate().await.unwrap();

    let paths = "select distinct unnest(proconfig) from pg_proc
        where pronamespace = 'broker'::regnamespace";
    assert_eq!(rows(&database, paths).await, ["search_path=pg_catalog, pg_temp"]);
    let elsewhere = "select proname::text from pg_proc
        where pronamespace = 'broker'::regnamespace and prosrc ~ 'public[.]|@schema@'";
    assert_eq!(rows(&database, elsewhere).await, [""; 0]);
    database
        .sql(
            "set search_path = broker;
             insert into accounts (name, client_id, client_secret) values ('acme', 'id-1', 'SK.1');
             insert into callers (name) values ('shop');
             insert into grants (caller_id, pattern) select id, 'acme' from callers;
             select audit_ensure_partition('2026-01-01');
             reset search_path",
        )
        .await;
    let changed = "select table_name || ' ' || subject from broker.changes order by id";
    assert_eq!(rows(&database, changed).await, ["accounts acme", "callers shop", "grants shop"]);
    assert_eq!(rows(&database, "select subject from broker.unrecorded_changes").await, [""; 0]);
}

/// In another encoding, a value of an admin can stop everything, for example a reason of 400 Korean letters.
#[tokio::test]
async fn a_database_of_another_encoding_than_utf8_is_refused_by_name() {
    for encoding in ["SQL_ASCII", "WIN1252", "EUC_KR"] {
        let database = TestDatabase::with_encoding(encoding).await;
        let setup = BrokerSetup::new(database.url(), "http://127.0.0.1:9/api/1.1").await;
        for command in [&["migrate"][..], &["serve"], &["serve", "--migrate"], &["check"]] {
            let refused = setup.run(command).await.failed();
            let says = format!("the encoding of the database is {encoding}, and only UTF8");
            assert!(refused.contains(&says), "{command:?}: {refused}");
            assert!(refused.contains("encoding 'UTF8' locale 'C' template template0"), "{refused}");
        }
        assert!(!exists(&database, "accounts").await);
    }
    store(&TestDatabase::with_encoding("UTF8").await).migrate().await.unwrap();
}

#[tokio::test]
async fn migrating_twice_changes_nothing() {
    let database = TestDatabase::new().await;
    let before = written(&database).await;

    store(&database).migrate().await.unwrap();

    assert_eq!(written(&database).await, before);
}

#[tokio::test]
async fn two_migrations_at_once_both_succeed() {
    let database = empty_database().await;
    let (one, other) = (store(&database), store(&database));

    let (one, other) = tokio::join!(one.migrate(), other.migrate());

    one.unwrap();
    other.unwrap();
    store(&database).check_schema().await.unwrap();
}

#[tokio::test]
async fn only_the_repeatable_migration_that_changed_is_applied() {
    let database = TestDatabase::new().await;
    let before = written(&database).await;

    let changed =
        "-- version: 1000\ncreate or replace function token_broker_is_time(at timestamptz)
        returns boolean language sql set search_path = public, pg_temp as 'select true'";
    Release::current().with_repeatable(1, "common", changed).apply(&database).await.unwrap();

    let after = written(&database).await;
    let changed: Vec<_> = after.iter().filter(|it| !before.contains(it)).collect();
    assert_eq!(changed.len(), 2, "{changed:?}");
    assert!(changed[0].starts_with("file common "), "{changed:?}");
    assert!(changed[1].starts_with("function token_broker_is_time("), "{changed:?}");
    assert_eq!(version_of(&database, "common").await, ["1000"]);
}

#[tokio::test]
async fn a_repeatable_migration_that_fails_rolls_back_the_numbered_ones() {
    let database = TestDatabase::new().await;
    let before = written(&database).await;
    let release = |sql| {
        Release::current()
            .with_every_repeatable_changed()
            .with_numbered(1000, "create table added (it text)")
            .with_repeatable(1000, "last", sql)
    };

    let failing = "-- version: 1\ncreate view added_view as select missing from added";
    let error = release(failing).apply(&database).await.unwrap_err().to_string();
    assert!(error.contains("repeatable migration last failed"), "{error}");
    assert_eq!(written(&database).await, before);

    let working = "-- version: 1\ncreate view added_view as select it from added";
    release(working).apply(&database).await.unwrap();
    assert!(exists(&database, "added_view").await);
}

#[tokio::test]
async fn a_numbered_migration_that_fails_rolls_back_the_earlier_ones() {
    let database = empty_database().await;

    let broken = Release::current().with_numbered(1000, "create table").apply(&database).await;

    assert!(broken.unwrap_err().to_string().contains("1000"));
    assert!(!exists(&database, "accounts").await);
    assert!(!exists(&database, "_sqlx_migrations").await);
}

#[tokio::test]
async fn an_older_release_runs_on_a_newer_schema_and_leaves_it_as_it_is() {
    let database = TestDatabase::new().await;
    Release::current()
        .with_every_repeatable_changed()
        .with_numbered(1000, "create table added ()")
        .with_repeatable(1000, "later", "-- version: 7\ncreate view later as select 1 as one")
        .apply(&database)
        .await
        .unwrap();
    let newer = written(&database).await;

    store(&database).check_schema().await.unwrap();
    store(&database).migrate().await.unwrap();

    assert_eq!(written(&database).await, newer);
    assert_eq!(version_of(&database, "account status").await, ["1000"]);
    assert_eq!(version_of(&database, "later").await, ["7"]);
}

#[tokio::test]
async fn a_schema_with_an_older_or_missing_repeatable_migration_is_too_old() {
    let database = TestDatabase::new().await;
    for older in [
        "delete from repeatable_migrations where name = 'audit'",
        "update repeatable_migrations set version = 0, checksum = 'x' where name = 'audit'",
    ] {
        database.sql(older).await;
        let error = store(&database).check_schema().await.unwrap_err().to_string();
        assert!(error.contains("too old: it lacks migration \"audit\" version"), "{error}");
        assert!(error.contains("run `token-broker migrate`"), "{error}");

        store(&database).migrate().await.unwrap();
        store(&database).check_schema().await.unwrap();
    }
}

#[tokio::test]
async fn a_repeatable_migration_that_changed_without_a_new_version_is_refused() {
    let database = TestDatabase::new().await;
    database.sql("update repeatable_migrations set checksum = 'x' where name = 'audit'").await;

    for refused in [store(&database).migrate().await, store(&database).check_schema().await] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("audit differs") && error.contains("new version"), "{error}");
    }
}

#[tokio::test]
async fn privileges_are_kept_when_the_repeatable_migrations_change() {
    let database = TestDatabase::new().await;
    database.sql(ROLES).await;
    let privileges = "select concat_ws(' ', oid::regprocedure, proacl) from pg_proc
            where pronamespace = 'public'::regnamespace
        union all select concat_ws(' ', oid::regclass, relacl) from pg_class
            where relnamespace = 'public'::regnamespace
        order by 1";
    let before = rows(&database, privileges).await;

    Release::current().with_every_repeatable_changed().apply(&database).await.unwrap();

    assert_eq!(rows(&database, privileges).await, before);
}

#[test]
fn everything_is_defined_in_one_file_only() {
    let migrations = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let mut definitions = BTreeMap::<String, Vec<String>>::new();
    let mut kinds = BTreeMap::<String, usize>::new();
    for directory in [migrations.clone(), migrations.join("repeatable")] {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                continue;
            }
            for line in fs::read_to_string(&path).unwrap().lines() {
                let Some(rest) = line.strip_prefix("create ") else { continue };
                let rest = rest.strip_prefix("or replace ").unwrap_or(rest);
                let rest = rest.strip_prefix("unique ").unwrap_or(rest);
                let rest = rest.strip_prefix("constraint ").unwrap_or(rest);
                let words: Vec<_> = rest.splitn(2, ' ').collect();
                let name = words[1].split([' ', '(']).next().unwrap();
                *kinds.entry(words[0].to_owned()).or_default() += 1;
                let key = format!("{} {name}", words[0]);
                definitions.entry(key).or_default().push(path.display().to_string());
            }
        }
    }

    let kinds: Vec<_> = kinds.into_keys().collect();
    assert_eq!(kinds, ["function", "index", "table", "trigger", "view"]);
    let repeated: Vec<_> = definitions.iter().filter(|(_, files)| files.len() > 1).collect();
    assert!(repeated.is_empty(), "{repeated:?}");
}
