//! The login of the broker changes while it runs: the file that holds its URL is written again.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};

use sqlx::{AssertSqlSafe, PgPool};
use token_broker::{
    dev::{
        postgres::DATABASE,
        simulator::{Simulator, SimulatorOptions},
    },
    store::Database,
};
use tokio::time::Instant;
use url::Url;

use crate::harness::{
    database::start_embedded_postgres,
    eventually,
    http::http,
    process::{BrokerProcess, BrokerSetup},
};

/// The file from which the broker has its password.
#[derive(Clone, Copy, Debug)]
enum PasswordSource {
    /// `DATABASE_URL_FILE`.
    DatabaseUrl,
    /// `database_url` in the file of `TOKEN_BROKER_CONFIG`.
    Settings,
    /// `PGPASSFILE`, with a URL without a password.
    Pgpass,
}

/// The server, a broker, and the file with its password.
struct Rotation {
    admin: PgPool,
    url: Url,
    setup: BrokerSetup,
    source: PasswordSource,
    file: PathBuf,
    accounts: usize,
    upstream: Simulator,
    passwords: Vec<String>,
}

async fn sql(pool: &PgPool, statement: String) {
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(pool).await.unwrap();
}

impl Rotation {
    /// Writes the file with `password`, as a tool does that replaces it at once.
    fn write(&self, password: &str) {
        let mut url = self.url.clone();
        // `set_password` encodes all special characters but this one.
        url.set_password(Some(&password.replace('%', "%25"))).unwrap();
        let content = match self.source {
            PasswordSource::DatabaseUrl => format!("{url}\n"),
            PasswordSource::Settings => format!("database_url = \"{url}\"\n"),
            PasswordSource::Pgpass => {
                let escaped = password.replace('\\', "\\\\").replace(':', "\\:");
                format!("*:*:*:rotating:{escaped}\n")
            }
        };
        self.write_raw(&content);
    }

    fn write_raw(&self, content: &str) {
        let new = self.file.with_extension("new");
        fs::write(&new, content).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(&new, &self.file).unwrap();
    }

    async fn alter(&mut self, password: &str) {
        self.passwords.push(password.to_owned());
        let quoted = password.replace('\'', "''");
        sql(&self.admin, format!("alter role rotating login password '{quoted}'")).await;
    }

    async fn cut_sessions(&self) {
        let cut =
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'rotating'";
        sql(&self.admin, cut.into()).await;
    }

    /// Registers an account, and waits until the broker has a token for it, following the database again.
    async fn assert_recovers(&mut self) {
        self.accounts += 1;
        let name = format!("acme-{}", self.accounts);
        self.upstream.add_account(&name, "SK.1");
        let insert = "insert into accounts (name, client_id, client_secret) values";
        sql(&self.admin, format!("{insert} ('{name}', '{name}', 'SK.1')")).await;
        let what = format!("a token after rotation, {:?}", self.source);
        eventually(&what, async || (self.upstream.issued(&name) > 0).then_some(())).await;
        self.until_postgres(|detail| detail == "answers").await;
    }

    async fn postgres(&self) -> String {
        let (status, body) = http(self.setup.ops, "GET", "/readyz", "").await;
        assert_eq!(status, 200, "{body}");
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        let checks = body["checks"].as_array().unwrap();
        let check = checks.iter().find(|check| check["name"] == "postgres").unwrap();
        check["detail"].as_str().unwrap().to_owned()
    }

    async fn until_postgres(&self, accepts: impl Fn(&str) -> bool) {
        let mut last = String::new();
        let what = format!("readiness, {:?}", self.source);
        eventually(&what, async || {
            last = self.postgres().await;
            accepts(&last).then_some(())
        })
        .await;
    }

    /// Waits until the history guard says that the login is refused with `sqlstate`, and that it keeps saying so, and
    /// nothing else, for a second. Before that, a duty may say so while the guard has only seen its session break off.
    async fn assert_refused(&self, sqlstate: &str) {
        let words = format!("is not used: the database refuses the login (SQLSTATE {sqlstate})");
        self.until_postgres(|detail| detail.contains(&words)).await;
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            let detail = self.postgres().await;
            assert!(detail.contains(&words), "{detail}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn assert_log(&self, serve: &BrokerProcess) {
        let log = serve.stderr();
        assert!(!log.contains("does not answer"), "{log}");
        assert!(log.contains("SQLSTATE 28P01"), "{log}");
        for password in &self.passwords {
            assert!(!log.contains(password.as_str()), "{log}");
        }
    }
}

/// Adds a role that has to show a password on the server whose `pg_hba.conf` trusts everybody.
async fn add_role_with_password(admin: &PgPool) {
    sql(admin, "create role rotating superuser login password 'first-word'".into()).await;
    let file: String = sqlx::query_scalar("show hba_file").fetch_one(admin).await.unwrap();
    let trusting = fs::read_to_string(&file).unwrap();
    fs::write(&file, format!("local all rotating scram-sha-256\n{trusting}")).unwrap();
    sql(admin, "select pg_reload_conf()".into()).await;
}

async fn rotate(rotation: &mut Rotation) {
    // The file first, and the password once the broker has read the file.
    rotation.write("s/pe:c#i?a@l %41'\\");
    rotation.alter("s/pe:c#i?a@l %41'\\").await;
    rotation.cut_sessions().await;
    rotation.assert_recovers().await;
    // The password first. The sessions live, until they are cut.
    rotation.alter("third-word").await;
    let words =
        "answers, but takes no new connections: the database refuses the login (SQLSTATE 28P01)";
    rotation.until_postgres(|detail| detail.starts_with(words)).await;
    rotation.cut_sessions().await;
    let words = "is not used: the database refuses the login";
    let accepts = |detail: &str| {
        assert!(detail.contains("(SQLSTATE 28P01)"), "{detail}");
        detail.starts_with(words)
    };
    rotation.until_postgres(accepts).await;
    rotation.assert_refused("28P01").await;
    rotation.write("third-word");
    rotation.assert_recovers().await;
}

async fn lose_the_file(rotation: &mut Rotation, serve: &BrokerProcess) {
    let until_logged = async |text: &str| {
        eventually(text, async || serve.stderr().contains(text).then_some(())).await;
    };
    // While the file is missing or malformed, the last URL is used.
    fs::remove_file(&rotation.file).unwrap();
    until_logged("DATABASE_URL_FILE (environment): cannot read the file").await;
    rotation.cut_sessions().await;
    rotation.assert_recovers().await;
    rotation.write_raw("canary-not-a-url");
    until_logged("DATABASE_URL_FILE (environment): not a postgresql://").await;
    rotation.cut_sessions().await;
    rotation.assert_recovers().await;
    rotation.write("fourth-word");
    rotation.alter("fourth-word").await;
    rotation.cut_sessions().await;
    rotation.assert_recovers().await;
    // Other refusals of the login.
    sql(&rotation.admin, "alter role rotating nologin".into()).await;
    rotation.cut_sessions().await;
    rotation.assert_refused("28000").await;
    sql(&rotation.admin, "alter role rotating login".into()).await;
    rotation.assert_recovers().await;
}

/// Starts a broker that has its password from `source`, rotates it, and stops the broker.
async fn assert_rotates(source: PasswordSource) {
    let postgres = start_embedded_postgres().await;
    let admin = Database::new(&postgres.url(DATABASE), "admin").unwrap().pool(2);
    add_role_with_password(&admin).await;
    // The embedded server's own URL has its user in a parameter, beside which a password cannot be.
    let socket = Url::parse(&postgres.url(DATABASE)).unwrap();
    let host = socket.query_pairs().find(|(key, _)| key == "host").unwrap().1.into_owned();
    let mut url = Url::parse(&format!("postgresql://rotating@localhost:5432/{DATABASE}")).unwrap();
    url.query_pairs_mut().append_pair("host", &host);

    let upstream = Simulator::start_on_loopback(SimulatorOptions::default()).await.unwrap();
    let mut setup = BrokerSetup::new(url.as_str(), &upstream.base_url()).await;
    let file = setup.directory.path().join("password");
    let name = match source {
        PasswordSource::DatabaseUrl => "DATABASE_URL_FILE",
        PasswordSource::Settings => "TOKEN_BROKER_CONFIG",
        PasswordSource::Pgpass => "PGPASSFILE",
    };
    setup.set(name, file.to_str().unwrap());
    if !matches!(source, PasswordSource::Pgpass) {
        setup.unset("DATABASE_URL");
    }
    let passwords = vec!["first-word".into()];
    let mut rotation =
        Rotation { admin, url, setup, source, file, accounts: 0, upstream, passwords };
    rotation.write("first-word");
    rotation.setup.run(&["migrate"]).await.ok();
    let serve = rotation.setup.serve().await;
    rotation.assert_recovers().await;
    rotate(&mut rotation).await;
    if matches!(source, PasswordSource::DatabaseUrl) {
        lose_the_file(&mut rotation, &serve).await;
        assert!(!serve.stderr().contains("canary"), "{}", serve.stderr());
    }
    rotation.assert_log(&serve);
    serve.kill().await;
    rotation.admin.close().await;
    postgres.stop().await;
}

/// Part of the promise that the broker checks what it depends on: a rotated password costs no restart, in
/// whatever order the password and the file change, and a refused login is called that.
#[tokio::test]
async fn a_rotated_password_is_taken_from_the_file_of_the_url_and_a_refused_login_is_named() {
    assert_rotates(PasswordSource::DatabaseUrl).await;
}

#[tokio::test]
async fn a_rotated_password_is_taken_from_the_settings_file() {
    assert_rotates(PasswordSource::Settings).await;
}

#[tokio::test]
async fn a_rotated_password_is_taken_from_the_password_file() {
    assert_rotates(PasswordSource::Pgpass).await;
}
