//! Admins seal API KEYs to the broker's published intake key, which they recognise by something that is not in the
//! database.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use tempfile::TempDir;
use url::Url;

use crate::{
    harness::{
        broker::Fixture,
        process::{BrokerSetup, CommandOutput, program, run},
    },
    roles::{ACCOUNTS, ROLES, RUNTIME},
};

/// An admin with a database login, who has no keyring.
struct Shell<'a> {
    fixture: &'a Fixture,
    home: TempDir,
}

impl<'a> Shell<'a> {
    fn new(fixture: &'a Fixture) -> Self {
        Self { fixture, home: TempDir::new().unwrap() }
    }

    async fn run_as(&self, role: &str, arguments: &[&str]) -> CommandOutput {
        let mut url = Url::parse(self.fixture.database.url()).unwrap();
        url.query_pairs_mut().append_pair("options", &format!("-c role={role}"));
        let mut command = program(arguments);
        command.env("DATABASE_URL", url.as_str()).env("XDG_CONFIG_HOME", self.home.path());
        run(command, "SK.1\n").await
    }

    async fn run(&self, arguments: &[&str]) -> CommandOutput {
        self.run_as(ACCOUNTS, arguments).await
    }

    async fn add(&self, name: &str) -> CommandOutput {
        self.run(&["account", "add", name, "--client-id", &format!("{name}-id")]).await
    }

    fn known_keys(&self) -> String {
        fs::read_to_string(self.home.path().join("token-broker/known-keys")).unwrap()
    }
}

async fn accounts(fixture: &Fixture) -> i64 {
    sqlx::query_scalar("select count(*) from accounts")
        .fetch_one(fixture.database.pool())
        .await
        .unwrap()
}

/// Returns a new keyring's file and its public intake key.
async fn new_key(directory: &Path, name: &str) -> (String, String) {
    let file = directory.join(name).to_str().unwrap().to_owned();
    run(program(&["keys", "generate", "--out", &file]), "").await.ok();
    let public = run(program(&["keys", "public", "--keyring-file", &file]), "").await.ok();
    (file, public)
}

/// A trust anchor never comes from the store that it protects: whoever swaps the published key gets no API KEY,
/// because `account add`, `rotate` and `seal` compare it with the key that they remember.
#[tokio::test]
async fn a_swapped_intake_key_is_refused_by_every_command_that_seals() {
    let fixture = Fixture::new().await;
    fixture.database.sql(ROLES).await;
    let ours = fixture.keyring.intake_public().to_string();
    let shell = Shell::new(&fixture);

    let first = shell.add("one").await;
    assert!(first.stderr.contains(&format!("trusting the intake key {ours} of ")), "{first:?}");
    assert!(first.stderr.contains("keys public"), "{first:?}");
    first.ok();
    assert!(shell.known_keys().starts_with(&format!("{ours} ")));
    let file = shell.home.path().join("token-broker/known-keys");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let second = shell.add("two").await;
    assert!(!second.stderr.contains("trusting"), "{second:?}");
    second.ok();

    let keys = TempDir::new().unwrap();
    let (_, theirs) = new_key(keys.path(), "theirs").await;
    let (their_id, _) = theirs.split_once(':').unwrap();
    let their_bytes = "sha256('their key')";
    let (our_id, _) = ours.split_once(':').unwrap();
    for swap in [
        format!("update intake_keys set public_key = {their_bytes}"),
        format!("update intake_keys set key_id = '{their_id}'"),
        format!(
            "delete from intake_keys; insert into intake_keys (key_id, public_key, is_primary)
             values ('{their_id}', {their_bytes}, true)"
        ),
        format!(
            "update intake_keys set is_primary = false; \
             insert into intake_keys (key_id, public_key, is_primary, published_at)
             values ('{their_id}', {their_bytes}, true, now() + interval '1 year')"
        ),
        // The identity of the deployment comes from the database too.
        format!(
            "insert into deployment (upstream, id) values ('x', 'another');
             update intake_keys set public_key = {their_bytes} where key_id = '{our_id}'"
        ),
    ] {
        fixture.database.sql(&swap).await;
        for command in [
            &["account", "add", "three", "--client-id", "three-id"] as &[&str],
            &["account", "rotate", "one"],
            &["account", "seal", "three", "--client-id", "three-id"],
        ] {
            let refused = shell.run(command).await;
            assert_eq!(refused.stdout, "", "{refused:?}");
            let error = refused.failed();
            assert!(error.contains("has changed") && error.contains("keys public"), "{error}");
            assert!(error.contains(&ours), "it says what was remembered: {error}");
            // The other ways to know the key refuse it too.
            let pinned = [command, &["--intake-key", &ours]].concat();
            if command[1] != "seal" {
                let error = shell.run(&pinned).await.failed();
                assert!(error.contains("is not the one of TOKEN_BROKER_INTAKE_KEY"), "{error}");
            }
        }
        assert_eq!(accounts(&fixture).await, 2);
        assert!(shell.known_keys().starts_with(&format!("{ours} ")), "nothing else is remembered");
        fixture.database.publish(&fixture.keyring.intake_public()).await;
    }
    shell.add("three").await.ok();
}

/// A key that was rotated is accepted once the admin has compared it, and is remembered then.
#[tokio::test]
async fn a_rotated_intake_key_is_published_by_the_owner_and_accepted_after_a_comparison() {
    let fixture = Fixture::new().await;
    fixture.database.sql(ROLES).await;
    let shell = Shell::new(&fixture);
    shell.add("one").await.ok();
    let keys = TempDir::new().unwrap();
    let (file, next) = new_key(keys.path(), "next").await;

    for role in [RUNTIME, ACCOUNTS] {
        let publish = ["keys", "publish", "--keyring-file", &file];
        let error = shell.run_as(role, &publish).await.failed();
        assert!(error.contains("permission denied"), "{role}: {error}");
    }
    // A broker runs that has not loaded the key.
    fixture
        .database
        .sql(
            "insert into instances (id, replica, version, key_ids, started_at, heartbeat_at)
             values ('i-1', 1, '0', '{i1}', now(), now())",
        )
        .await;
    let owner = async |arguments: &[&str]| {
        let mut command = program(arguments);
        // `migrate` has a login of its own, and so has this.
        command
            .env("DATABASE_URL", "postgresql://127.0.0.1:9/nobody?sslmode=disable")
            .env("TOKEN_BROKER_MIGRATE_DATABASE_URL", fixture.database.url());
        run(command, "").await
    };
    let error = owner(&["keys", "publish", "--keyring-file", &file]).await.failed();
    assert!(error.contains("1 of 1 running brokers have not loaded"), "{error}");
    let forced = owner(&["keys", "publish", "--keyring-file", &file, "--force"]).await;
    assert!(forced.stderr.contains(&format!("published the intake key {next}")), "{forced:?}");
    forced.ok();
    // The key's text is enough: the owner's shell need not have the keyring.
    let again = owner(&["keys", "publish", "--intake-key", &next, "--force"]).await;
    assert!(again.stderr.contains("is published already"), "{again:?}");
    again.ok();

    let error = shell.add("two").await.failed();
    assert!(error.contains(&format!("--intake-key {next}")), "it says how to accept it: {error}");
    let add = ["account", "add", "two", "--client-id", "two-id", "--intake-key", &next];
    shell.run(&add).await.ok();
    shell.add("three").await.ok();
    assert_eq!(shell.known_keys().lines().count(), 1);
}

/// On the broker's host the keyring itself says which key is right, and a key that cannot be remembered is not
/// trusted.
#[tokio::test]
async fn without_a_home_directory_the_key_must_be_given_or_come_from_the_keyring() {
    let fixture = Fixture::new().await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    setup.publish_key().await;
    let without_home = |mut command: tokio::process::Command| {
        command.env_remove("HOME").env("XDG_CONFIG_HOME", "/proc/nowhere");
        command
    };
    let add = ["account", "add", "one", "--client-id", "one-id"];
    run(without_home(setup.command(&add)), "SK.1\n").await.ok();

    let mut command = without_home(program(&["account", "rotate", "one"]));
    command.env("DATABASE_URL", fixture.database.url());
    let error = run(command, "SK.1\n").await.failed();
    assert!(error.contains("cannot be remembered in /proc/nowhere"), "{error}");
    assert!(error.contains("TOKEN_BROKER_INTAKE_KEY"), "{error}");
    let ours = setup.run(&["keys", "public"]).await.ok();
    let mut command = without_home(program(&["account", "rotate", "one"]));
    command.env("DATABASE_URL", fixture.database.url()).env("TOKEN_BROKER_INTAKE_KEY", ours);
    run(command, "SK.1\n").await.ok();

    fixture.database.sql("update intake_keys set public_key = sha256('their key')").await;
    let add = ["account", "add", "two", "--client-id", "two-id"];
    let error = run(without_home(setup.command(&add)), "SK.1\n").await.failed();
    assert!(error.contains("is not one of the keyring on this machine"), "{error}");
    assert_eq!(accounts(&fixture).await, 1);
}

/// Deployments in schemas of one database have keys of their own, and each is remembered for itself.
#[tokio::test]
async fn deployments_in_schemas_of_one_database_do_not_share_a_known_key() {
    let fixture = Fixture::new().await;
    let shell = Shell::new(&fixture);
    let keys = TempDir::new().unwrap();
    let schema_url = |schema: &str| {
        let mut url = Url::parse(fixture.database.url()).unwrap();
        url.query_pairs_mut().append_pair("options", &format!("-c search_path={schema}"));
        url.to_string()
    };
    for schema in ["one", "two"] {
        fixture.database.sql(&format!("create schema {schema}")).await;
        let (file, _) = new_key(keys.path(), schema).await;
        let mut migrate = program(&["migrate"]);
        migrate.env("DATABASE_URL", schema_url(schema)).env("TOKEN_BROKER_KEYRING_FILE", file);
        run(migrate, "").await.ok();
    }
    for (nth, trusting) in [true, false, false].into_iter().enumerate() {
        for schema in ["one", "two"] {
            let name = format!("a{nth}");
            let mut add = program(&["account", "add", &name, "--client-id", &name]);
            add.env("DATABASE_URL", schema_url(schema)).env("XDG_CONFIG_HOME", shell.home.path());
            let added = run(add, "SK.1\n").await;
            assert_eq!(added.stderr.contains("trusting"), trusting, "{schema}: {added:?}");
            added.ok();
        }
    }
    assert_eq!(shell.known_keys().lines().count(), 2);
}
