//! The server behind the database's address crashes, is replaced by its standby, or goes back in time.
//!
//! A crash and a failover without loss cost a reload. What was lost is refused, while the broker runs and after
//! a restart. In every case a revocation is followed within seconds of contact with the primary.

use std::{fs, path::Path, process::Command};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sqlx::Connection;
use tempfile::TempDir;
use token_broker::{
    crypto::bearer::Bearer,
    dev::{
        postgres::DATABASE,
        simulator::{Simulator, SimulatorOptions},
    },
};

use crate::harness::{
    broker::{TestClient, code_and_reason},
    database_proxy::DatabaseProxy,
    eventually,
    http::try_http,
    own_server::OwnServer,
    process::{BrokerProcess, BrokerSetup, shared_directory},
};

const DISABLE: &str = "update callers set enabled = false where name = 'demo'";
const ENABLE: &str = "update callers set enabled = true where name = 'demo'";

/// A broker process whose database is behind a proxy, with the account `acme` and the caller `demo`.
struct Scene {
    directory: TempDir,
    _upstream: Simulator,
    proxy: DatabaseProxy,
    setup: BrokerSetup,
    serve: BrokerProcess,
    client: TestClient,
    bearer: Bearer,
}

impl Scene {
    async fn start() -> (Self, OwnServer) {
        let directory = shared_directory();
        let server = OwnServer::start(directory.path().join("a")).await;
        let upstream = Simulator::start_on_loopback(SimulatorOptions::default()).await.unwrap();
        upstream.add_account("id-1", "SK.1");
        let proxy = DatabaseProxy::start(&server.url()).await;
        let setup = BrokerSetup::new(proxy.url(), &upstream.base_url()).await;
        setup.run(&["migrate"]).await.ok();
        let bearer = setup.run(&["caller", "add", "demo", "--bearer"]).await.ok();
        setup.run(&["caller", "grant", "demo", "*"]).await.ok();
        let serve = setup.serve().await;
        let added = ["account", "add", "acme", "--client-id", "id-1", "--wait"];
        setup.run_with_secret(&added, "SK.1").await.ok();
        let bearer = Bearer::parse(&bearer).unwrap();
        let client = TestClient::connect(&setup.endpoint(), &bearer).await;
        let scene = Self { directory, _upstream: upstream, proxy, setup, serve, client, bearer };
        scene.until_served().await;
        (scene, server)
    }

    async fn until_served(&self) {
        eventually("a token", async || self.client.get("acme").await.ok()).await;
    }

    /// Waits until the caller is refused, whose state in the database is disabled.
    async fn until_refused(&self) {
        eventually("the refusal of a disabled caller", async || {
            let refused = self.client.get("acme").await.err()?;
            assert_eq!(code_and_reason(&refused), "Unauthenticated CREDENTIAL_REFUSED");
            Some(())
        })
        .await;
    }

    /// Waits until `/readyz` contains `text`.
    async fn until_readiness_says(&self, text: &str) {
        eventually(text, async || {
            let (_, body) = try_http(self.setup.ops, "GET", "/readyz", "").await?;
            body.contains(text).then_some(())
        })
        .await;
    }

    /// Returns how often the broker has verified a database since its start.
    fn verifications(&self) -> usize {
        self.serve.stderr().matches("the database was verified").count()
    }

    /// Waits until the state directory remembers the last change of the caller.
    async fn until_remembered(&self) {
        let file = self.setup.directory.path().join("state/database");
        eventually("the change is remembered", async || {
            let remembered = fs::read_to_string(&file).ok()?;
            remembered.contains("callers update demo").then_some(())
        })
        .await;
    }

    /// Waits until everything that the broker recorded is in the database.
    async fn until_delivered(&self, server: &OwnServer) {
        self.until_readiness_says("\"0 audit records wait for delivery\"").await;
        eventually("the records of changes", async || {
            let unaudited = "select count(*)::text from changes where audited_at is null";
            (server.text(unaudited).await == "0").then_some(())
        })
        .await;
    }

    /// Waits until the broker has ended because of its database, and returns its log.
    async fn until_it_refuses(&mut self) -> String {
        assert_eq!(self.serve.wait().await.code(), Some(1), "{}", self.serve.stderr());
        self.serve.stderr()
    }
}

/// A crash without loss of committed data costs a reload, never an exit: neither that of the server, nor that of
/// one of its processes, which ends all sessions while the server goes on.
#[tokio::test]
async fn a_crash_without_loss_costs_a_reload_and_no_exit() {
    let (mut scene, mut server) = Scene::start().await;
    let crash_of_a_session = async |server: &OwnServer| {
        let mut session = server.connect(DATABASE).await;
        let pid: i32 =
            sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut session).await.unwrap();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        eventually("the end of all sessions", async || session.ping().await.err()).await;
    };
    for whole_server in [false, true, true] {
        if whole_server {
            server.crash().await;
            server.start_again().await;
        } else {
            crash_of_a_session(&server).await;
        }
        eventually("the server again", async || server.try_sql(DISABLE).await.ok()).await;
        scene.until_refused().await;
        server.sql(ENABLE).await;
        scene.until_served().await;
    }
    scene.serve.assert_running();
    server.stop().await;
}

/// A standby and an old primary are not used, and a broker that reached one is back within seconds of contact
/// with the primary. A failover without loss costs a reload, also while the old primary still answers.
#[tokio::test]
async fn a_failover_without_loss_is_followed_and_neither_a_standby_nor_an_old_primary_is_used() {
    let (mut scene, mut primary) = Scene::start().await;
    let standby = primary.standby(scene.directory.path().join("b")).await;

    // The address leads to the standby for a while.
    scene.proxy.lead_to(&standby.url());
    scene.proxy.cut();
    scene.until_readiness_says("its address leads to a standby").await;
    scene.client.get("acme").await.unwrap();
    let refused = scene.setup.run(&["account", "list"]).await.failed();
    assert!(refused.contains("its address leads to a standby, not to the primary"), "{refused}");
    scene.setup.run(&["audit", "tail", "-n", "1"]).await.ok();
    primary.sql(DISABLE).await;
    primary.until_followed_by(&standby).await;
    scene.proxy.lead_to(&primary.url());
    scene.until_refused().await;
    primary.sql(ENABLE).await;
    scene.until_served().await;

    // The standby takes over while the sessions to the old primary live on.
    scene.until_delivered(&primary).await;
    primary.until_followed_by(&standby).await;
    standby.promote().await;
    // No call is made until the broker has left the old primary: its record would be lost there.
    let verified = scene.verifications();
    scene.proxy.lead_to(&standby.url());
    eventually("the new primary is verified", async || {
        (scene.verifications() > verified).then_some(())
    })
    .await;
    standby.sql(DISABLE).await;
    scene.until_refused().await;
    scene.until_readiness_says("\"answers\"").await;
    // Nor is the old primary used by any connection of a pool that lives on.
    let heartbeat = "select max(heartbeat_at)::text from instances";
    let mut last = standby.text(heartbeat).await;
    let mut on_the_old_primary = None;
    for _ in 0..3 {
        last = eventually("a heartbeat", async || {
            Some(standby.text(heartbeat).await).filter(|next| *next != last)
        })
        .await;
        let found = primary.text(heartbeat).await;
        assert_eq!(*on_the_old_primary.get_or_insert_with(|| found.clone()), found);
    }

    // The address leads to the old primary for a while.
    primary.sql(ENABLE).await;
    scene.proxy.lead_to(&primary.url());
    scene.proxy.cut();
    scene.until_readiness_says("its server is not the primary that took over").await;
    assert!(scene.client.get("acme").await.is_err());
    scene.proxy.lead_to(&standby.url());
    standby.sql(ENABLE).await;
    scene.until_served().await;
    scene.serve.assert_running();
    primary.stop().await;
}

/// A name or a proxy may lead to the old primary and to the new one by turns, so that no three probes in a row lead
/// elsewhere. One connection to a server that was promoted proves that the other one is an old primary.
#[tokio::test]
async fn an_address_that_leads_to_the_old_and_the_new_primary_by_turns_is_noticed_and_not_used() {
    let (mut scene, mut primary) = Scene::start().await;
    let standby = primary.standby(scene.directory.path().join("b")).await;
    scene.until_delivered(&primary).await;
    primary.until_followed_by(&standby).await;
    standby.promote().await;
    scene.proxy.lead_by_turns_to(&[&primary.url(), &standby.url()]);
    scene.until_readiness_says("its connections lead to two writable servers").await;
    let log = scene.serve.stderr();
    assert!(log.contains("on timeline 1, and to one that took over, on timeline 2"), "{log}");

    standby.sql(DISABLE).await;
    scene.proxy.lead_to(&standby.url());
    scene.until_refused().await;
    scene.until_readiness_says("\"answers\"").await;
    standby.sql(ENABLE).await;
    scene.until_served().await;
    scene.serve.assert_running();
    primary.stop().await;
}

/// A standby that took over without a revocation that the broker knows is refused, while the broker runs and
/// after a restart, until it is accepted. Nothing that proves the loss is erased before.
#[tokio::test]
async fn a_failover_that_lost_a_revocation_is_refused_until_it_is_accepted() {
    let (mut scene, mut primary) = Scene::start().await;
    let mut standby = primary.standby(scene.directory.path().join("b")).await;
    scene.until_delivered(&primary).await;
    primary.until_followed_by(&standby).await;
    standby.stop().await;
    primary.sql(DISABLE).await;
    scene.until_refused().await;
    scene.until_remembered().await;
    primary.crash().await;

    // The standby, which stopped following before, takes over, and other applications use it.
    standby.start_again().await;
    standby.promote().await;
    let mut other = standby.connect("postgres").await;
    for _ in 0..3_000 {
        sqlx::raw_sql("select pg_current_xact_id()").execute(&mut other).await.unwrap();
    }
    other.close().await.unwrap();
    let before = standby.text("select count(*)::text from audit_events").await;
    scene.proxy.lead_to(&standby.url());
    let log = scene.until_it_refuses().await;
    for text in ["the database is not as it was left", "callers update demo", "--accept-restored"] {
        assert!(log.contains(text), "{text}: {log}");
    }

    for _ in 0..2 {
        let refused = scene.setup.run(&["serve"]).await.failed();
        assert!(refused.contains("callers update demo"), "{refused}");
    }
    assert_eq!(standby.text("select count(*)::text from audit_events").await, before);

    scene.serve = BrokerProcess::start(scene.setup.command(&["serve", "--accept-restored"]));
    eventually("the broker again", async || {
        let (status, _) = try_http(scene.setup.ops, "GET", "/readyz", "").await?;
        (status == 200).then_some(())
    })
    .await;
    scene.client = TestClient::connect(&scene.setup.endpoint(), &scene.bearer).await;
    scene.until_served().await;
    scene.until_delivered(&standby).await;
    let accepted = "select count(*)::text from audit_events where event = 'database_accepted'";
    assert_eq!(standby.text(accepted).await, "1");
    assert_eq!(standby.text("select epoch::text from deployment").await, "2");
    standby.stop().await;
}

/// A revocation that took effect here is missed in a database without it, even if the session that verifies the
/// database was lost before that session could read it.
#[tokio::test]
async fn a_revocation_that_was_lost_in_the_moment_in_which_it_took_effect_is_missed() {
    let (mut scene, mut primary) = Scene::start().await;
    let mut standby = primary.standby(scene.directory.path().join("b")).await;
    scene.until_delivered(&primary).await;
    primary.until_followed_by(&standby).await;
    standby.stop().await;
    let guard =
        "select pid::text from pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock'";
    let guard = Pid::from_raw(primary.text(guard).await.parse().unwrap());
    kill(guard, Signal::SIGSTOP).unwrap();
    primary.sql(DISABLE).await;
    scene.until_refused().await;
    primary.crash().await;

    standby.start_again().await;
    standby.promote().await;
    scene.proxy.lead_to(&standby.url());
    let log = scene.until_it_refuses().await;
    assert!(log.contains("callers update demo"), "{log}");
    standby.stop().await;
}

/// A disk that was set back to an earlier state, as by a snapshot of a virtual machine, is refused. Neither
/// identity, timeline nor address tell it.
#[tokio::test]
async fn a_server_whose_disk_was_set_back_is_refused() {
    let (mut scene, mut server) = Scene::start().await;
    scene.until_delivered(&server).await;
    server.stop().await;
    let (data, snapshot) = (server.data(), scene.directory.path().join("snapshot"));
    let copy = |from: &Path, to: &Path| {
        let copied = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
        assert!(copied.success());
    };
    copy(&data, &snapshot);
    server.start_again().await;
    server.sql(DISABLE).await;
    scene.until_refused().await;
    scene.until_remembered().await;

    server.crash().await;
    fs::remove_dir_all(&data).unwrap();
    copy(&snapshot, &data);
    server.start_again().await;
    let log = scene.until_it_refuses().await;
    assert!(log.contains("callers update demo"), "{log}");
    server.stop().await;
}
