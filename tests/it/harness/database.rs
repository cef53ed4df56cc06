//! A database of its own for each test, copied from a template with the migrations applied.
//!
//! It lives on the server that `DATABASE_URL` names, or else on an embedded one that all tests of
//! this process share. Databases are named after their run, and a connection with the run's name
//! stays open as long as the process lives: so a later run can tell what was left behind from what
//! is in use, and removes the former.

use std::{
    env,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    thread,
};

use sqlx::{
    AssertSqlSafe, Connection, PgConnection, PgPool, Postgres, Row, postgres::PgQueryResult,
};
use token_broker::store::Database;
use tokio::{runtime, sync::OnceCell};
use url::Url;

/// What the names of all test databases begin with.
const PREFIX: &str = "tb_test_";

static SERVER: OnceCell<Server> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// A database with the current schema and no rows, dropped with this value.
pub(crate) struct TestDatabase {
    server: &'static Server,
    name: String,
    url: String,
    pool: PgPool,
}

impl TestDatabase {
    /// Makes one.
    pub(crate) async fn new() -> Self {
        let server = SERVER.get_or_init(Server::start).await;
        Self::like(server, &server.template()).await
    }

    /// Makes another one that has what this one has: a dump, restored. Ends the connections to this one.
    pub(crate) async fn copy(&self) -> Self {
        let end = format!(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{}'",
            self.name
        );
        run(&mut self.server.connect().await, &end).await;
        Self::like(self.server, &self.name).await
    }

    async fn like(server: &'static Server, template: &str) -> Self {
        let name = format!("{}_{}", server.run, DATABASES.fetch_add(1, Relaxed));
        let mut admin = server.connect().await;
        run(&mut admin, &format!("create database {name} template {template}")).await;
        admin.close().await.unwrap();

        let url = server.url(&name);
        let pool = Database::new(&url, "test").unwrap().pool(4);
        Self { server, name, url, pool }
    }

    /// Where it is, as `DATABASE_URL` takes it.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// A pool of connections to it, as the server's admin.
    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Runs statements as an admin would in `psql`, and says what the last one did.
    pub(crate) async fn sql(&self, statements: &str) -> PgQueryResult {
        self.try_sql(statements).await.unwrap()
    }

    /// Runs statements that may be refused.
    pub(crate) async fn try_sql(&self, statements: &str) -> sqlx::Result<PgQueryResult> {
        sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(&self.pool).await
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let (server, name) = (self.server, self.name.clone());
        // The test's own runtime may be unwinding: this needs one of its own.
        let dropped = thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut admin = server.connect().await;
                run(&mut admin, &format!("drop database {name} with (force)")).await;
            });
        });
        // A panic during another's would end the process.
        assert!(
            dropped.join().is_ok() || thread::panicking(),
            "{} could not be dropped",
            self.name
        );
    }
}

/// The server that this process' tests share.
struct Server {
    admin: Url,
    /// What this run's databases and its one lasting connection are called.
    run: String,
    /// Open as long as the process: nobody uses it, its name is the message.
    _presence: PgConnection,
    #[cfg(feature = "embedded-postgres")]
    _embedded: Option<token_broker::dev::postgres::EmbeddedPostgres>,
}

impl Server {
    async fn start() -> Self {
        let told = env::var("DATABASE_URL").ok().filter(|url| !url.is_empty());
        #[cfg(feature = "embedded-postgres")]
        let embedded = match told {
            Some(_) => None,
            None => Some(start_own().await),
        };
        #[cfg(feature = "embedded-postgres")]
        let told = told.or_else(|| Some(embedded.as_ref()?.url("postgres")));
        let admin = Url::parse(&told.expect("set DATABASE_URL: this build has no Postgres"))
            .expect("DATABASE_URL is a URL");

        let (run, presence) = register(&admin).await;
        let server = Self {
            admin,
            run,
            _presence: presence,
            #[cfg(feature = "embedded-postgres")]
            _embedded: embedded,
        };
        server.remove_leftovers().await;
        server.make_template().await;
        server
    }

    async fn connect(&self) -> PgConnection {
        PgConnection::connect(self.admin.as_str()).await.unwrap()
    }

    fn url(&self, database: &str) -> String {
        let mut url = self.admin.clone();
        url.set_path(database);
        url.into()
    }

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

    async fn make_template(&self) {
        let mut admin = self.connect().await;
        run(&mut admin, &format!("create database {} template template0", self.template())).await;
        admin.close().await.unwrap();
        Database::new(&self.url(&self.template()), "test").unwrap().migrate().await.unwrap();
    }

    /// Drops the databases of runs that nobody is present for any more.
    async fn remove_leftovers(&self) {
        let mut admin = self.connect().await;
        let left: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!(
            "select d.datname::text from pg_database d \
             where d.datname ~ '^{PREFIX}[0-9]+_' and not exists ( \
                 select from pg_stat_activity \
                 where application_name = substring(d.datname from '^{PREFIX}[0-9]+'))"
        )))
        .fetch_all(&mut admin)
        .await
        .unwrap();
        for name in left {
            // Two runs may find the same one.
            let drop = format!("drop database if exists {name} with (force)");
            let _ = sqlx::raw_sql(AssertSqlSafe(drop)).execute(&mut admin).await;
        }
    }
}

/// A connection that says that this run is there, and the run's name, which is no other's on that
/// server.
async fn register(admin: &Url) -> (String, PgConnection) {
    let mut connection = PgConnection::connect(admin.as_str()).await.unwrap();
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

/// A server of the test's own, to be stopped or killed.
#[cfg(feature = "embedded-postgres")]
pub(crate) async fn start_own() -> token_broker::dev::postgres::EmbeddedPostgres {
    use std::path::Path;
    use token_broker::dev::postgres::{EmbeddedPostgres, Place};

    let program = Path::new(env!("CARGO_BIN_EXE_token-broker"));
    EmbeddedPostgres::start(Place::Temporary, program).await.unwrap()
}

#[tokio::test]
async fn a_test_database_has_the_schema_and_its_own_rows_and_goes_with_its_test() {
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
async fn a_run_s_databases_are_kept_while_it_is_present() {
    let database = TestDatabase::new().await;
    database.server.remove_leftovers().await;
    assert!(database.server.has(&database.name).await);
}

#[tokio::test]
async fn databases_that_nobody_is_present_for_are_removed() {
    let database = TestDatabase::new().await;
    // Transaction 3 is older than any database: no run has that name.
    let left = format!("{PREFIX}3_{}", database.name);
    database.sql(&format!("create database {left} template template0")).await;

    database.server.remove_leftovers().await;

    assert!(!database.server.has(&left).await);
}
