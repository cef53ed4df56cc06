//! A separate database for each test, copied from a template to which the migrations were applied.
//!
//! The databases are on the server that `DATABASE_URL` names, or else on an embedded one that all
//! tests of this process share.
//!
//! Each run (a process) has a name, with which the names of its databases begin. It keeps a
//! connection open whose `application_name` is the run's name. A later run drops the databases for
//! whose run there is no such connection: they were left by a process that was killed.

use std::{
    env,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    thread,
};

use sqlx::{
    AssertSqlSafe, Connection, PgConnection, PgPool, Postgres, Row, postgres::PgQueryResult,
};
use token_broker::{
    crypto::IntakePublicKey,
    store::{Database, intake_keys, mass_changes::MAX_CHANGED_ROWS},
};
use tokio::{runtime, sync::OnceCell};
use url::Url;

/// Prefix of the names of runs and test databases.
const PREFIX: &str = "tb_test_";

static SERVER: OnceCell<TestServer> = OnceCell::const_new();
/// How many databases this run has created.
static DATABASE_COUNT: AtomicU32 = AtomicU32::new(0);

/// A database with the current schema and no rows. Dropping this value drops the database.
pub(crate) struct TestDatabase {
    server: &'static TestServer,
    name: String,
    url: String,
    pool: PgPool,
}

/// Returns a pool whose sessions may change any number of rows: tests may change all of them. Brokers and
/// commands get the URL itself.
pub(crate) fn pool_for_mass_changes(url: &str, application: &str) -> PgPool {
    let mut url = Url::parse(url).unwrap();
    let allowed = format!("-c {MAX_CHANGED_ROWS}=1000000");
    url.query_pairs_mut().append_pair("options", &allowed);
    Database::new(url.as_str(), application).unwrap().pool(4)
}

impl TestDatabase {
    pub(crate) async fn new() -> Self {
        let server = SERVER.get_or_init(TestServer::start).await;
        Self::from_template(server, &server.template()).await
    }

    /// Creates a database without tables, into which a dump can be restored.
    pub(crate) async fn without_schema() -> Self {
        Self::from_template(SERVER.get_or_init(TestServer::start).await, "template0").await
    }

    /// Creates a database of another encoding, without tables.
    pub(crate) async fn with_encoding(encoding: &str) -> Self {
        let template = format!("template0 encoding '{encoding}' lc_collate 'C' lc_ctype 'C'");
        Self::from_template(SERVER.get_or_init(TestServer::start).await, &template).await
    }

    /// Creates a copy of this database, as a restored dump would be. Closes the connections to this
    /// one, because a template must have none.
    pub(crate) async fn copy(&self) -> Self {
        let close_connections = format!(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{}'",
            self.name
        );
        run(&mut self.server.connect().await, &close_connections).await;
        Self::from_template(self.server, &self.name).await
    }

    async fn from_template(server: &'static TestServer, template: &str) -> Self {
        let name = format!("{}_{}", server.run, DATABASE_COUNT.fetch_add(1, Relaxed));
        let mut admin = server.connect().await;
        run(&mut admin, &format!("create database {name} template {template}")).await;
        admin.close().await.unwrap();

        let url = server.url(&name);
        let pool = pool_for_mass_changes(&url, "test");
        Self { server, name, url, pool }
    }

    /// Returns its URL, as `DATABASE_URL` takes it.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Returns a pool of connections to it, with the server's administrator as their user.
    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Publishes the intake key, as `keys publish` does.
    pub(crate) async fn publish(&self, key: &IntakePublicKey) {
        let mut transaction = self.pool.begin().await.unwrap();
        intake_keys::publish(&mut transaction, key).await.unwrap();
        transaction.commit().await.unwrap();
    }

    /// Runs statements as an admin would in `psql`, and returns the result of the last one.
    ///
    /// # Panics
    /// When a statement fails.
    pub(crate) async fn sql(&self, statements: &str) -> PgQueryResult {
        self.try_sql(statements).await.unwrap()
    }

    /// Runs statements past the triggers, as a superuser can, in one transaction.
    ///
    /// # Panics
    /// When a statement fails.
    pub(crate) async fn sql_past_triggers(&self, statements: &str) {
        self.sql(&format!(
            "begin; set local session_replication_role = replica; {statements}; commit"
        ))
        .await;
    }

    /// Adds the disabled accounts `<prefix>-1` to `<prefix>-<count>` in one transaction. Triggers run for each of them, so
    /// that one statement for thousands could exceed the time that a session allows for a statement.
    ///
    /// # Panics
    /// When a statement fails.
    pub(crate) async fn add_disabled_accounts(&self, prefix: &str, count: usize) {
        const BATCH: usize = 500;
        let batches = (1..=count).step_by(BATCH).map(|first| {
            let last = count.min(first + BATCH - 1);
            format!(
                "insert into accounts (name, client_id, client_secret, enabled)
                 select '{prefix}-' || n, '{prefix}-' || n, 'SK.1', false
                 from generate_series({first}, {last}) n;"
            )
        });
        self.sql(&format!("begin; {} commit", batches.collect::<String>())).await;
    }

    /// Like [`sql`](Self::sql), but returns the error when a statement fails.
    pub(crate) async fn try_sql(&self, statements: &str) -> sqlx::Result<PgQueryResult> {
        sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(&self.pool).await
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let (server, name) = (self.server, self.name.clone());
        // `drop` cannot wait for a future, and the test's runtime may be shutting down. So another
        // thread does it, with a runtime of its own.
        let result = thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut admin = server.connect().await;
                run(&mut admin, &format!("drop database {name} with (force)")).await;
            });
        });
        // A second panic while the thread is panicking would abort the process.
        assert!(result.join().is_ok() || thread::panicking(), "{} could not be dropped", self.name);
    }
}

/// The database server that all tests of this process share.
struct TestServer {
    /// The URL with which databases are created and dropped.
    admin_url: Url,
    /// The name of this run.
    run: String,
    /// The connection that shows later runs that this one is in progress.
    _run_marker: PgConnection,
    #[cfg(feature = "embedded-postgres")]
    embedded: Option<token_broker::dev::postgres::EmbeddedPostgres>,
}

impl TestServer {
    async fn start() -> Self {
        let given_url = env::var("DATABASE_URL").ok().filter(|url| !url.is_empty());
        #[cfg(feature = "embedded-postgres")]
        let embedded = match given_url {
            Some(_) => None,
            None => Some(start_embedded_postgres().await),
        };
        #[cfg(feature = "embedded-postgres")]
        let given_url = given_url.or_else(|| Some(embedded.as_ref()?.url("postgres")));
        let given_url = given_url.expect(
            "without the feature embedded-postgres, the tests need a server: set DATABASE_URL",
        );
        let admin_url = Url::parse(&given_url).expect("DATABASE_URL is a URL");

        let (run, run_marker) = register_run(&admin_url).await;
        let server = Self {
            admin_url,
            run,
            _run_marker: run_marker,
            #[cfg(feature = "embedded-postgres")]
            embedded,
        };
        server.drop_abandoned_databases().await;
        server.create_template().await;
        server
    }

    async fn connect(&self) -> PgConnection {
        PgConnection::connect(self.admin_url.as_str()).await.unwrap()
    }

    fn url(&self, database: &str) -> String {
        let mut url = self.admin_url.clone();
        url.set_path(database);
        url.into()
    }

    /// Returns the name of the template.
    fn template(&self) -> String {
        format!("{}_template", self.run)
    }

    async fn has(&self, database: &str) -> bool {
        sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
            .bind(database)
            .fetch_one(&mut self.connect().await)
            .await
            .unwrap()
    }

    async fn create_template(&self) {
        let mut admin = self.connect().await;
        run(&mut admin, &format!("create database {} template template0", self.template())).await;
        admin.close().await.unwrap();
        Database::new(&self.url(&self.template()), "test").unwrap().migrate().await.unwrap();
    }

    /// Drops the databases of runs that have ended.
    async fn drop_abandoned_databases(&self) {
        let mut admin = self.connect().await;
        let abandoned: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!(
            "select d.datname::text from pg_database d \
             where d.datname ~ '^{PREFIX}[0-9]+_' and not exists ( \
                 select from pg_stat_activity \
                 where application_name = substring(d.datname from '^{PREFIX}[0-9]+'))"
        )))
        .fetch_all(&mut admin)
        .await
        .unwrap();
        for name in abandoned {
            // Another run may drop the same database at the same time.
            let drop = format!("drop database if exists {name} with (force)");
            let _ = sqlx::raw_sql(AssertSqlSafe(drop)).execute(&mut admin).await;
        }
    }
}

/// Chooses the name of this run, which no other run on this server has, and opens the connection that
/// shows other runs that this one is in progress.
async fn register_run(admin_url: &Url) -> (String, PgConnection) {
    let mut connection = PgConnection::connect(admin_url.as_str()).await.unwrap();
    let run = sqlx::query::<Postgres>("select pg_current_xact_id()::text")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    let run = format!("{PREFIX}{}", run.get::<String, _>(0));
    sqlx::query("select set_config('application_name', $1, false)")
        .bind(&run)
        .execute(&mut connection)
        .await
        .unwrap();
    (run, connection)
}

async fn run(admin: &mut PgConnection, statement: &str) {
    sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(admin).await.unwrap();
}

/// Returns the process id of the embedded server that the test databases are on; `None` if they are on
/// the server of `DATABASE_URL`, or if there is no test database yet.
#[cfg(feature = "embedded-postgres")]
pub(crate) fn embedded_server_pid() -> Option<u32> {
    Some(SERVER.get()?.embedded.as_ref()?.pid())
}

/// Starts an embedded server for one test alone, which may stop or kill it.
#[cfg(feature = "embedded-postgres")]
pub(crate) async fn start_embedded_postgres() -> token_broker::dev::postgres::EmbeddedPostgres {
    use std::path::Path;
    use token_broker::dev::postgres::{DataLocation, EmbeddedPostgres};

    let program = Path::new(env!("CARGO_BIN_EXE_token-broker"));
    EmbeddedPostgres::start(DataLocation::Temporary, program).await.unwrap()
}

#[tokio::test]
async fn a_test_database_has_the_schema_and_its_own_rows_and_is_dropped_after_its_test() {
    let (one, other) = tokio::join!(TestDatabase::new(), TestDatabase::new());
    Database::new(one.url(), "test").unwrap().check_schema().await.unwrap();

    one.sql("insert into callers (name) values ('shop')").await;
    let callers: i64 =
        sqlx::query_scalar("select count(*) from callers").fetch_one(other.pool()).await.unwrap();
    assert_eq!(callers, 0);

    let name = one.name.clone();
    drop(one);
    assert!(!other.server.has(&name).await);
    assert!(other.server.has(&other.name).await);
}

#[tokio::test]
async fn the_databases_of_a_run_in_progress_are_kept() {
    let database = TestDatabase::new().await;
    database.server.drop_abandoned_databases().await;
    assert!(database.server.has(&database.name).await);
}

#[tokio::test]
async fn the_databases_of_a_run_that_has_ended_are_dropped() {
    let database = TestDatabase::new().await;
    // A run is named after a transaction, and no transaction has the number 3 any more.
    let abandoned = format!("{PREFIX}3_{}", database.name);
    database.sql(&format!("create database {abandoned} template template0")).await;

    database.server.drop_abandoned_databases().await;

    assert!(!database.server.has(&abandoned).await);
}
