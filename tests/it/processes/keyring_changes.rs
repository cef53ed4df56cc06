//! Keys are rotated while brokers run.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use nix::sys::signal::Signal;
use token_broker::{
    crypto::{KeyId, KeyKind, Keyring},
    domain::{
        account::{AccountId, CredentialVersion},
        clock::Clock,
        token::Generation,
    },
};
use tokio_util::sync::CancellationToken;

use crate::{
    harness::{
        broker::{Fixture, TestClient},
        eventually,
        http::http,
        process::{BrokerProcess, BrokerSetup, hangup_is_ignored, program, run, shared_directory},
        rng::TestRng,
    },
    roles::{ROLES, RUNTIME},
};

/// Returns the file of the setup's keyring.
fn keyring_file(setup: &BrokerSetup) -> PathBuf {
    let mut settings = setup.settings();
    settings.find(|(name, _)| *name == "TOKEN_BROKER_KEYRING_FILE").unwrap().1.into()
}

fn primary(file: &Path, kind: KeyKind) -> KeyId {
    Keyring::load(file).unwrap().primary(kind).clone()
}

/// Returns the ids of the keys that each live replica has loaded.
async fn loaded_keys(fixture: &Fixture) -> Vec<Vec<String>> {
    sqlx::query_scalar("select key_ids from instances where stopped_at is null order by id")
        .fetch_all(fixture.database.pool())
        .await
        .unwrap()
}

async fn until_loaded(fixture: &Fixture, id: &str) {
    eventually(&format!("{id} loaded"), async || {
        let all = loaded_keys(fixture).await;
        all.iter().all(|keys| keys.iter().any(|key| key == id)).then_some(())
    })
    .await;
}

/// Calls for `accounts` in turn until `stop`. Returns how many calls were answered, and what the others got.
async fn load(
    client: TestClient,
    accounts: u64,
    count: Arc<AtomicU64>,
    stop: CancellationToken,
) -> Vec<String> {
    let mut refused = Vec::new();
    while !stop.is_cancelled() {
        let next = count.fetch_add(1, Relaxed) % accounts;
        if let Err(status) = client.get(&format!("acme-{next}")).await {
            refused.push(format!("acme-{next}: {status:?}"));
        }
    }
    refused
}

/// Registers accounts `acme-0`, `acme-1`, … and waits until each has a token.
async fn register(fixture: &Fixture, accounts: u64) {
    for n in 0..accounts {
        fixture.upstream.add_account(&format!("c-{n}"), &format!("SK.{n}"));
    }
    fixture
        .database
        .sql(&format!(
            "insert into accounts (name, client_id, client_secret)
             select 'acme-' || n, 'c-' || n, 'SK.' || n from generate_series(0, {}) n",
            accounts - 1
        ))
        .await;
    until_count(fixture, "select count(*) from tokens", accounts).await;
}

async fn until_count(fixture: &Fixture, query: &'static str, count: u64) {
    eventually(query, async || {
        let found: i64 =
            sqlx::query_scalar(query).fetch_one(fixture.database.pool()).await.unwrap();
        (found == i64::try_from(count).unwrap()).then_some(())
    })
    .await;
}

/// Opens every sealed value with `keyring`, and returns how many there are by the keys that they name.
async fn open_all(fixture: &Fixture, keyring: &Keyring) -> BTreeMap<String, usize> {
    let mut named = BTreeMap::new();
    let mut name = |sealed: &[u8]| {
        *named.entry(Keyring::sealed_with(sealed).unwrap().to_string()).or_default() += 1;
    };
    let pool = fixture.database.pool();
    let secrets: Vec<(i64, i64, Vec<u8>)> = sqlx::query_as(
        "select id, credential_version, sealed_secret from accounts where sealed_secret is not null
         union all
         select id, previous_version, previous_secret from accounts where previous_secret is not null",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    for (id, version, sealed) in secrets {
        keyring.open_secret(AccountId(id), CredentialVersion(version), &sealed).unwrap();
        name(&sealed);
    }
    let tokens: Vec<(i64, i64, Vec<u8>)> =
        sqlx::query_as("select account_id, generation, sealed_token from tokens")
            .fetch_all(pool)
            .await
            .unwrap();
    for (id, generation, sealed) in tokens {
        keyring.open_token(AccountId(id), Generation(generation), &sealed).unwrap();
        name(&sealed);
    }
    named
}

/// The checks of `/readyz` by name, each with whether it passes and its detail.
async fn readiness(setup: &BrokerSetup, name: &str) -> (u16, bool, String) {
    let (status, body) = http(setup.ops, "GET", "/readyz", "").await;
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    let checks = body["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == name).unwrap();
    (status, check["ok"].as_bool().unwrap(), check["detail"].as_str().unwrap().to_owned())
}

/// A changed keyring costs no restart, and no message about a refused one quotes it.
#[tokio::test]
async fn a_changed_keyring_is_used_within_moments_and_one_that_cannot_be_used_is_refused_loudly() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let serve = setup.serve().await;
    register(&fixture, 3).await;
    let client = TestClient::connect(&setup.endpoint(), &bearer).await;
    let stop = CancellationToken::new();
    let calls = tokio::spawn(load(client, 3, Arc::default(), stop.clone()));
    let file = keyring_file(&setup);
    let good = fs::read_to_string(&file).unwrap();
    let write = |text: &str, mode: u32| {
        let new = file.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(mode)).unwrap();
        fs::rename(&new, &file).unwrap();
    };
    let other = Keyring::generate(Clock::System.now()).to_string();
    let key_of = |text: &str, nth: usize| {
        text.lines().filter(|line| line.starts_with("key = ")).nth(nth).unwrap().to_owned()
    };
    let entry = |text: &str, nth: usize| {
        format!("[[key]]{}", text.split("[[key]]").nth(nth + 1).unwrap().trim_end())
    };
    let replaced = |nth| good.replace(&entry(&good, nth), &entry(&other, nth));
    let [sealing, intake] = [KeyKind::Sealing, KeyKind::Intake].map(|kind| primary(&file, kind));
    for (bad, mode, fault) in [
        ("not a keyring".to_owned(), 0o600, "line 1 is not what a keyring holds".to_owned()),
        (String::new(), 0o600, "line 1 is not what".to_owned()),
        (good[..good.len() - 10].to_owned(), 0o600, "is not what a keyring holds".to_owned()),
        (good.clone() + "\n", 0o644, "its mode 0644 gives others".to_owned()),
        (good.replace("kind = \"signing\"", "kind = \"sealing\""), 0o600, "one sealing".to_owned()),
        (
            good.replace(&key_of(&good, 0), &key_of(&other, 0)),
            0o600,
            format!("its key {sealing} is another key"),
        ),
        (replaced(0), 0o600, format!("it lacks the key {sealing}, which secrets")),
        (replaced(1), 0o600, format!("the published intake key {intake} is not in the keyring")),
    ] {
        write(&bad, mode);
        eventually(&fault, async || {
            let (status, ok, detail) = readiness(&setup, "keyring").await;
            assert_eq!(status, 200, "it serves with the previous keyring");
            (!ok && detail.contains(&fault)).then_some(())
        })
        .await;
        let (_, metrics) = http(setup.ops, "GET", "/metrics", "").await;
        assert!(metrics.contains("\ntoken_broker_keyring_refused 1\n"), "{metrics}");
    }
    fs::remove_file(&file).unwrap();
    eventually("a missing file", async || {
        readiness(&setup, "keyring").await.2.contains("it cannot be read").then_some(())
    })
    .await;
    assert_eq!(setup.run(&["check"]).await.code, Some(1), "`check` says so, too");
    write(&good, 0o600);
    eventually("the good one", async || readiness(&setup, "keyring").await.1.then_some(())).await;
    let (_, metrics) = http(setup.ops, "GET", "/metrics", "").await;
    assert!(metrics.contains("\ntoken_broker_keyring_refused 0\n"), "{metrics}");

    // A new key, by an atomic rename and over the file itself.
    let added = setup.run(&["keys", "add", "--kind", "signing"]).await.ok();
    until_loaded(&fixture, &added).await;
    let more = fs::read_to_string(&file).unwrap() + "# a comment\n";
    fs::write(&file, &more).unwrap();
    if !hangup_is_ignored() {
        serve.signal(Signal::SIGHUP);
        eventually("SIGHUP", async || serve.stderr().contains("SIGHUP: reading").then_some(()))
            .await;
    }
    let event = "event = 'keys_changed' and detail ->> 'keyring' = 'loaded'";
    eventually("a record", async || {
        (fixture.audit_events(&format!("{event} and detail ->> 'added' = '{added}'")).await.len()
            == 1)
            .then_some(())
    })
    .await;
    assert_eq!(fixture.audit_events(event).await.len(), 1, "nothing else has changed");
    stop.cancel();
    assert_eq!(calls.await.unwrap(), [""; 0]);
    let log = serve.stderr();
    assert!(log.contains("the keyring's file cannot be used; the previous keyring stays"), "{log}");
    for text in [&good, &other] {
        for nth in 0..4 {
            let key = key_of(text, nth);
            assert!(!log.contains(key.trim_start_matches("key = ").trim_matches('"')), "{log}");
        }
    }
}

/// Kubernetes mounts a secret as a link to a link to a directory, and replaces the latter link. systemd gives a service
/// a copy that root owns, which the service's group may read.
#[tokio::test]
async fn a_keyring_behind_links_that_are_swapped_is_read_anew() {
    let fixture = Fixture::new().await;
    let mut setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let original = keyring_file(&setup);
    let mount = shared_directory();
    let at = |name: &str| mount.path().join(name);
    let put = |version: &str| {
        fs::create_dir(at(version)).unwrap();
        fs::copy(&original, at(version).join("keyring")).unwrap();
        let is_root = fs::metadata(at(version).join("keyring")).unwrap();
        let mode = if std::os::unix::fs::MetadataExt::uid(&is_root) == 0 { 0o440 } else { 0o400 };
        fs::set_permissions(at(version).join("keyring"), fs::Permissions::from_mode(mode)).unwrap();
        symlink(version, at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
    };
    put("..v1");
    symlink("..data/keyring", at("keyring")).unwrap();
    setup.set("TOKEN_BROKER_KEYRING_FILE", at("keyring").to_str().unwrap());
    let _serve = setup.serve().await;
    let original = original.to_str().unwrap().to_owned();
    for version in ["..v2", "..v3"] {
        let kind = if version == "..v2" { "sealing" } else { "intake" };
        let add = ["keys", "add", "--kind", kind, "--keyring-file", &original];
        let added = setup.run(&add).await.ok();
        put(version);
        fs::remove_dir_all(at(if version == "..v2" { "..v1" } else { "..v2" })).unwrap();
        until_loaded(&fixture, &added).await;
    }
    assert!(readiness(&setup, "keyring").await.1);
}

/// A broker that runs beside another one, and is killed from time to time.
struct Victim {
    setup: BrokerSetup,
    process: Option<BrokerProcess>,
    rng: TestRng,
}

impl Victim {
    /// Kills the broker after a while, and starts it again.
    async fn restart(&mut self) {
        tokio::time::sleep(self.rng.millis(300)).await;
        if let Some(process) = self.process.take() {
            process.kill().await;
        }
        self.process = Some(self.setup.serve().await);
    }
}

/// Runs a command of the program, and kills it after a while, several times. Then runs it to its end, until it
/// succeeds, and returns its standard output.
async fn run_with_kills(setup: &BrokerSetup, rng: &mut TestRng, arguments: &[&str]) -> String {
    for _ in 0..4 {
        let process = BrokerProcess::start(setup.command(arguments));
        tokio::time::sleep(rng.millis(120)).await;
        process.kill().await;
    }
    let mut last = None;
    eventually(&format!("{arguments:?}"), async || {
        let output = setup.run(arguments).await;
        let done = (output.code == Some(0)).then(|| output.stdout.trim_end().to_owned());
        last = Some(output);
        done
    })
    .await
}

/// Asserts that the secrets and tokens that changed while `keys reseal` ran are stored, and open with `after`.
async fn assert_changes_have_won(fixture: &Fixture, after: &Keyring, accounts: u64) {
    for n in 100..130 {
        let (id, version, sealed): (i64, i64, Vec<u8>) = sqlx::query_as(
            "select id, credential_version, sealed_secret from accounts where name = $1",
        )
        .bind(format!("acme-{n}"))
        .fetch_one(fixture.database.pool())
        .await
        .unwrap();
        let secret = after.open_secret(AccountId(id), CredentialVersion(version), &sealed).unwrap();
        assert_eq!(secret.expose(), format!("new.{n}"));
    }
    for n in 0..accounts {
        let client_id = format!("c-{n}");
        eventually("the live token is stored", async || {
            let (id, generation, sealed): (i64, i64, Vec<u8>) = sqlx::query_as(
                "select t.account_id, t.generation, t.sealed_token
                 from tokens t join accounts a on a.id = t.account_id where a.client_id = $1",
            )
            .bind(&client_id)
            .fetch_one(fixture.database.pool())
            .await
            .unwrap();
            let token = after.open_token(AccountId(id), Generation(generation), &sealed).unwrap();
            (fixture.upstream.live_token(&client_id)? == token.expose()).then_some(())
        })
        .await;
    }
}

/// Asserts that `token`, which was issued before the rotation, is found in the log, that the log verifies, and that it tells
/// of the rotation.
async fn assert_old_records_are_answered(fixture: &Fixture, setup: &BrokerSetup, token: &str) {
    let who = setup.command(&["audit", "who"]);
    let who = run(who, token).await.ok();
    assert!(who.contains("demo"), "{who}");
    let verified = setup.run(&["audit", "verify"]).await;
    assert_eq!(verified.code, Some(0), "{verified:?}");
    for what in ["added", "promoted", "retired"] {
        let events = format!("event = 'keys_changed' and detail ? '{what}'");
        eventually(what, async || (fixture.audit_events(&events).await.len() >= 4).then_some(()))
            .await;
    }
    for step in ["begun", "done"] {
        let events = format!("event = 'keys_changed' and detail ->> 'step' = '{step}'");
        eventually(step, async || (!fixture.audit_events(&events).await.is_empty()).then_some(()))
            .await;
    }
}

/// Promise 25.
#[tokio::test]
async fn every_kind_of_key_is_rotated_under_load_whatever_is_killed_in_the_middle_of_a_step() {
    const ACCOUNTS: u64 = 250;
    let mut rng = TestRng::for_test("every_kind_of_key_is_rotated");
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let serve = setup.serve().await;
    let mut victim = Victim { setup: setup.replica(), process: None, rng: rng.fork() };
    victim.restart().await;
    register(&fixture, ACCOUNTS).await;
    let file = keyring_file(&setup);
    let before = Keyring::load(&file).unwrap();
    let sealing_before = before.primary(KeyKind::Sealing).to_string();
    // Some new secrets are refused, so that the previous ones stay.
    fixture
        .database
        .sql("update accounts set client_secret = 'SK.wrong' where name ~ '^acme-[0-9]$'")
        .await;
    until_count(&fixture, "select count(*) from accounts where previous_secret is not null", 10)
        .await;
    let all = usize::try_from(2 * ACCOUNTS + 10).unwrap();
    assert_eq!(open_all(&fixture, &before).await, BTreeMap::from([(sealing_before.clone(), all)]));

    let client = TestClient::connect(&setup.endpoint(), &bearer).await;
    let first = client.get("acme-77").await.unwrap();
    let (count, stop) = (Arc::new(AtomicU64::new(0)), CancellationToken::new());
    let calls: Vec<_> = (0..3)
        .map(|_| tokio::spawn(load(client.clone(), ACCOUNTS, count.clone(), stop.clone())))
        .collect();
    for kind in [KeyKind::Signing, KeyKind::Fingerprint, KeyKind::Intake, KeyKind::Sealing] {
        let old = primary(&file, kind);
        let add = ["keys", "add", "--kind", kind.as_str()];
        let (new, ()) = tokio::join!(run_with_kills(&setup, &mut rng, &add), victim.restart());
        let keyring = Keyring::load(&file).unwrap();
        let of_kind = keyring.status().iter().filter(|key| key.kind == kind);
        assert_eq!(of_kind.count(), 2, "however often it was killed");
        let promote = ["keys", "promote", &new];
        tokio::join!(run_with_kills(&setup, &mut rng, &promote), victim.restart());
        assert_eq!(primary(&file, kind).as_str(), new);
        if kind == KeyKind::Sealing {
            let refused = setup.run(&["keys", "retire", old.as_str()]).await.failed();
            assert!(refused.contains("values need") || refused.contains("still use"), "{refused}");
            // Secrets are rotated and accounts are registered meanwhile; what they store wins.
            for n in 100..130 {
                fixture.upstream.add_account(&format!("c-{n}"), &format!("new.{n}"));
            }
            let changing = async {
                for n in 100..130 {
                    let statements = format!(
                        "update accounts set client_secret = 'new.{n}' where name = 'acme-{n}';
                         update accounts set reissue_requested_at = now() where name = 'acme-{}'",
                        n + 30
                    );
                    fixture.database.sql(&statements).await;
                }
            };
            // Two at once, of which one is killed again and again.
            let arguments = ["keys", "reseal"];
            let mut other = BrokerProcess::start(setup.command(&arguments));
            tokio::join!(run_with_kills(&setup, &mut rng, &arguments), victim.restart(), changing);
            other.wait().await;
        }
        let retire = ["keys", "retire", old.as_str()];
        tokio::join!(run_with_kills(&setup, &mut rng, &retire), victim.restart());
        assert!(!Keyring::load(&file).unwrap().key_ids().contains(&old));
    }
    stop.cancel();
    for calls in calls {
        assert_eq!(calls.await.unwrap(), [""; 0], "no call was refused");
    }
    assert!(count.load(Relaxed) > ACCOUNTS);

    // Every row opens without the old keys, also for replicas that start now. What was changed meanwhile has won.
    let kept = "select count(*) from accounts where previous_secret is not null";
    until_count(&fixture, kept, 10).await;
    let after = Keyring::load(&file).unwrap();
    assert_changes_have_won(&fixture, &after, ACCOUNTS).await;
    let named = open_all(&fixture, &after).await;
    assert_eq!(named, BTreeMap::from([(primary(&file, KeyKind::Sealing).to_string(), all)]));
    assert!(!after.has_sealing_key(&sealing_before.parse().unwrap()));
    victim.restart().await;
    let restarted = TestClient::connect(&victim.setup.endpoint(), &bearer).await;
    for n in 0..ACCOUNTS {
        restarted.get(&format!("acme-{n}")).await.unwrap();
    }
    fixture.upstream.add_account("c-last", "SK.last");
    fixture.add_account("last", "c-last", "SK.last").await;
    eventually("a new account", async || restarted.get("last").await.ok()).await;

    assert_old_records_are_answered(&fixture, &setup, &first.access_token).await;
    let log = serve.stderr();
    assert!(!log.contains("does not open"), "{log}");
}

/// Each command names what still needs a key, and goes on once that is done.
#[tokio::test]
async fn a_key_is_neither_promoted_nor_retired_before_every_broker_is_ready_for_it() {
    let fixture = Fixture::new().await;
    fixture.database.sql(ROLES).await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let file = keyring_file(&setup);
    // The other replica has a file of its own.
    let mut other = setup.replica();
    let copy = other.directory.path().join("keyring");
    let give = || {
        let new = copy.with_extension("new");
        fs::copy(&file, &new).unwrap();
        fs::rename(&new, &copy).unwrap();
    };
    give();
    other.set("TOKEN_BROKER_KEYRING_FILE", copy.to_str().unwrap());
    let _serve = setup.serve().await;
    let _other = other.until_ready(BrokerProcess::start(other.command(&["serve"]))).await;
    register(&fixture, 5).await;
    let other_state = other.directory.path().join("state");
    let instance = fs::read_to_string(other_state.join("instance")).unwrap();
    let instance = instance.trim();
    let old = primary(&file, KeyKind::Sealing);

    let new = setup.run(&["keys", "add", "--kind", "sealing"]).await.ok();
    assert_eq!(setup.run(&["keys", "add", "--kind", "sealing"]).await.ok(), new);
    let refused = setup.run(&["keys", "promote", &new]).await.failed();
    assert!(refused.contains("1 of 2 running brokers have not loaded"), "{refused}");
    assert!(refused.contains(instance), "{refused}");
    assert_eq!(primary(&file, KeyKind::Sealing), old);
    give();
    setup.run(&["keys", "promote", &new]).await.ok();
    let refused = setup.run(&["keys", "retire", &new]).await.failed();
    assert!(refused.contains("is the primary sealing key"), "{refused}");

    // The other one goes on with the old key until it has the file.
    let warned = setup.run(&["keys", "reseal"]).await;
    assert!(warned.stderr.contains("still seal with another key"), "{warned:?}");
    assert!(warned.stderr.contains(instance), "{warned:?}");
    let refused = setup.run(&["keys", "retire", old.as_str()]).await.failed();
    assert!(
        refused.contains("running brokers still use") && refused.contains(instance),
        "{refused}"
    );
    give();
    eventually("the other one has the file", async || {
        let used: Vec<Vec<String>> = sqlx::query_scalar("select used_key_ids from instances")
            .fetch_all(fixture.database.pool())
            .await
            .unwrap();
        used.iter().all(|used| used.contains(&new)).then_some(())
    })
    .await;
    setup.run(&["keys", "reseal"]).await.ok();
    let retire = ["keys", "retire", old.as_str()];
    eventually("retired", async || (setup.run(&retire).await.code == Some(0)).then_some(())).await;
    assert!(setup.run(&retire).await.stderr.contains("is retired already"));
    let refused = setup.run(&["keys", "promote", old.as_str()]).await.failed();
    assert!(refused.contains("is retired"), "{refused}");
    for missing in [["keys", "retire", "s0"], ["keys", "promote", "s0"]] {
        setup.run(&missing).await.failed();
    }
    let status = setup.run(&["keys", "status"]).await.ok();
    let line = |id: &str| status.lines().find(|line| line.starts_with(id)).unwrap().to_owned();
    assert!(line(old.as_str()).contains("retired"), "{status}");
    assert!(line(&new).contains("yes") && line(&new).contains("2 of 2"), "{status}");
    let cells: Vec<_> = line(&new).split_whitespace().rev().take(2).map(str::to_owned).collect();
    assert_eq!(cells, ["-", "10"], "{status}");

    // The broker's own login seals nothing again: it gets no power that it did not have.
    let mut url = url::Url::parse(fixture.database.url()).unwrap();
    url.query_pairs_mut().append_pair("options", &format!("-c role={RUNTIME}"));
    let third = setup.run(&["keys", "add", "--kind", "sealing"]).await.ok();
    give();
    setup.run(&["keys", "promote", &third]).await.ok();
    give();
    let mut reseal = setup.command(&["keys", "reseal"]);
    reseal.env("DATABASE_URL", url.as_str());
    let refused = run(reseal, "").await.failed();
    assert!(refused.contains("needs the login that owns the tables"), "{refused}");
}

/// The command line follows the succession of intake keys where the keyring vouches for it, and nowhere else.
#[tokio::test]
async fn a_promoted_intake_key_is_published_and_remembered_where_the_keyring_is() {
    let fixture = Fixture::new().await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let _serve = setup.serve().await;
    let homes = [shared_directory(), shared_directory()];
    let add = async |home: &Path, name: &str| {
        let mut command = program(&["account", "add", name, "--client-id", name]);
        command.env("DATABASE_URL", fixture.database.url()).env("XDG_CONFIG_HOME", home);
        run(command, "SK.1\n").await
    };
    for (home, name) in homes.iter().zip(["one", "two"]) {
        add(home.path(), name).await.ok();
    }
    let old = primary(&keyring_file(&setup), KeyKind::Intake);
    let new = setup.run(&["keys", "add", "--kind", "intake"]).await.ok();
    let mut promote = setup.command(&["keys", "promote", &new]);
    promote.env("XDG_CONFIG_HOME", homes[0].path());
    let promoted = run(promote, "").await;
    assert!(promoted.stderr.contains(&format!("published the intake key {new}:")), "{promoted:?}");
    assert!(promoted.stderr.contains("remembers it"), "{promoted:?}");
    add(homes[0].path(), "three").await.ok();
    let refused = add(homes[1].path(), "four").await.failed();
    assert!(refused.contains("has changed") && refused.contains(old.as_str()), "{refused}");
    eventually("retired", async || {
        (setup.run(&["keys", "retire", old.as_str()]).await.code == Some(0)).then_some(())
    })
    .await;
    assert!(readiness(&setup, "trust").await.1);
}

/// The runbook of `docs/keys.md` for a keyring that is lost.
#[tokio::test]
async fn after_the_loss_of_the_keyring_the_secrets_are_entered_again_and_nothing_else_is_needed() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let mut serve = setup.serve().await;
    register(&fixture, 2).await;
    serve.signal(Signal::SIGTERM);
    serve.wait().await;
    let file = keyring_file(&setup);
    fs::remove_file(&file).unwrap();
    setup.run(&["keys", "generate", "--out", file.to_str().unwrap()]).await.ok();
    setup.run(&["keys", "publish"]).await.ok();
    let refused = setup.run(&["serve"]).await.failed();
    assert!(refused.contains("does not open the secret of account"), "{refused}");
    let public = setup.run(&["keys", "public"]).await.ok();
    for n in 0..2 {
        let name = format!("acme-{n}");
        let rotate = ["account", "rotate", &name, "--purge-old", "--intake-key", &public];
        setup.run_with_secret(&rotate, &format!("SK.{n}")).await.ok();
    }
    let _serve = setup.serve().await;
    let client = TestClient::connect(&setup.endpoint(), &bearer).await;
    for n in 0..2 {
        client.get(&format!("acme-{n}")).await.unwrap();
    }
}

/// `keys reseal` is the only statement that replaces sealed values, and it replaces nothing else.
#[tokio::test]
async fn only_the_owner_seals_again_and_changes_nothing_beside() {
    let fixture = Fixture::new().await;
    fixture.database.sql(ROLES).await;
    let broker = fixture.start().await;
    register(&fixture, 1).await;
    broker.stop().await;
    let as_role = |role: &str, set: &str| {
        format!(
            "begin; {role}; select set_config('token_broker.resealing', 'on', true);
             update accounts set {set}; rollback"
        )
    };
    let sealed =
        "sealed_secret = overlay(sealed_secret placing '\\x00' from octet_length(sealed_secret))";
    let try_as = async |role: &str, set: &str| {
        let mut connection = fixture.database.pool().acquire().await.unwrap().detach();
        let result =
            sqlx::raw_sql(sqlx::AssertSqlSafe(as_role(role, set))).execute(&mut connection).await;
        result.err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert_eq!(try_as("select 1", sealed).await, "");
    let only = "can only be set by sealing";
    let runtime = format!("set local role {RUNTIME}");
    assert!(try_as(&runtime, sealed).await.contains(only));
    for set in [
        "sealed_secret = null".to_owned(),
        "sealed_secret = '\\x00'".to_owned(),
        "previous_secret = sealed_secret".to_owned(),
        format!("{sealed}, description = 'x'"),
        format!("{sealed}, enabled = false"),
        format!("{sealed}, client_secret = 'SK.2'"),
    ] {
        assert_ne!(try_as("select 1", &set).await, "", "{set}");
    }
    // It is no change of the account.
    let changes = "select count(*) from changes";
    let count = async || -> i64 {
        sqlx::query_scalar(changes).fetch_one(fixture.database.pool()).await.unwrap()
    };
    let (before, updated) = (count().await, fixture.account_status("acme-0", "hint").await);
    fixture.database.sql(&as_role("select 1", sealed).replace("rollback", "commit")).await;
    assert_eq!((count().await, fixture.account_status("acme-0", "hint").await), (before, updated));
    // With the setting alone, other changes are recorded as always.
    fixture
        .database
        .sql(&as_role("select 1", "enabled = false").replace("rollback", "commit"))
        .await;
    assert_eq!(count().await, before + 1);
}
