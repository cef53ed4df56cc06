//! The served token is the one that the upstream considers live, where each new token ends the one
//! before it: through stops, kills and time-outs between an issue and its commit.

use std::time::Duration;

use nix::sys::signal::Signal;
use token_broker::{
    crypto::bearer::Bearer,
    dev::simulator::{Answer, Faults},
    domain::clock::Clock,
};

use crate::harness::{
    broker::{Fixture, TestClient},
    eventually,
    process::{BrokerProcess, BrokerSetup},
};

/// An account with a token, served by a process.
struct Scene {
    fixture: Fixture,
    setup: BrokerSetup,
    bearer: Bearer,
    serve: BrokerProcess,
    client: TestClient,
}

impl Scene {
    async fn new(upstream_timeout: &str) -> Self {
        let fixture = Fixture::with(Clock::System, Faults::default()).await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let mut setup =
            BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
        setup.set("TOKEN_BROKER_UPSTREAM_TIMEOUT", upstream_timeout);
        let serve = setup.serve().await;
        let client = TestClient::connect(&setup.endpoint(), &bearer).await;
        let scene = Self { fixture, setup, bearer, serve, client };
        scene.serves_the_live_token(&scene.client).await;
        assert_eq!(scene.fixture.upstream.issued("id-1"), 1);
        scene
    }

    async fn ask_for_a_new_token(&self) {
        self.fixture.database.sql("update accounts set reissue_requested_at = now()").await;
    }

    /// Waits until `requests` have reached the upstream in all.
    async fn until_requested(&self, requests: u64) {
        eventually("a request", async || {
            (self.fixture.upstream.requests() >= requests).then_some(())
        })
        .await;
    }

    async fn until_issued(&self, issues: u64) {
        eventually("an issue", async || {
            (self.fixture.upstream.issued("id-1") >= issues).then_some(())
        })
        .await;
    }

    /// As if the time of the attempt's lease had passed.
    async fn let_the_lease_pass(&self) {
        self.fixture
            .database
            .sql("update refreshes set lease_until = now() - interval '1 second'")
            .await;
    }

    /// Waits until a broker serves the live token with nothing left to do about it.
    async fn serves_the_live_token(&self, client: &TestClient) {
        eventually("the live token", async || {
            let served = client.get("acme").await.ok()?.access_token;
            let settled = self.fixture.account_status("acme", "state").await == "fresh";
            (settled && self.fixture.upstream.live_token("id-1") == Some(served)).then_some(())
        })
        .await;
    }

    async fn kill(&mut self) {
        self.serve.signal(Signal::SIGKILL);
        self.serve.wait().await;
    }

    async fn restart(&mut self) {
        self.serve = self.setup.serve().await;
        self.client = TestClient::connect(&self.setup.endpoint(), &self.bearer).await;
    }

    async fn stop(mut self) {
        self.serve.signal(Signal::SIGTERM);
        assert_eq!(self.serve.wait().await.code(), Some(0), "{}", self.serve.stderr());
    }
}

fn slow() -> Faults {
    Faults { latency: Duration::from_millis(500), ..Faults::default() }
}

#[tokio::test]
async fn a_broker_that_stood_still_past_its_lease_serves_the_live_token() {
    // A lease lasts 20 s beyond an attempt: the shortest there is.
    let scene = Scene::new("1s").await;
    scene.fixture.upstream.set_faults(slow());
    scene.ask_for_a_new_token().await;
    scene.until_requested(2).await;

    // The upstream's answer finds nobody until the lease is over.
    scene.serve.signal(Signal::SIGSTOP);
    scene.until_issued(2).await;
    scene.fixture.upstream.set_faults(Faults::default());
    eventually("the end of the lease", async || {
        let over = "select coalesce(lease_until < clock_timestamp(), true) from refreshes";
        let over: bool =
            sqlx::query_scalar(over).fetch_one(scene.fixture.database.pool()).await.unwrap();
        over.then_some(())
    })
    .await;
    scene.serve.signal(Signal::SIGCONT);

    scene.serves_the_live_token(&scene.client).await;
    scene.stop().await;
}

#[tokio::test]
async fn a_token_that_comes_after_another_replica_s_does_not_displace_it() {
    let scene = Scene::new("10s").await;
    let replica = scene.setup.replica();
    let mut second = replica.serve().await;
    let second_client = TestClient::connect(&replica.endpoint(), &scene.bearer).await;
    scene.serves_the_live_token(&second_client).await;
    assert_eq!(scene.fixture.upstream.issued("id-1"), 1);

    // The first has the attempt, and the second comes to it only once the first stands still.
    second.signal(Signal::SIGSTOP);
    scene.fixture.upstream.set_faults(slow());
    scene.ask_for_a_new_token().await;
    scene.until_requested(2).await;
    scene.serve.signal(Signal::SIGSTOP);
    scene.until_issued(2).await;
    scene.fixture.upstream.set_faults(Faults::default());
    scene.let_the_lease_pass().await;
    second.signal(Signal::SIGCONT);
    scene.until_issued(3).await;
    scene.serves_the_live_token(&second_client).await;

    // The first wakes up with a token that the second's has ended.
    scene.serve.signal(Signal::SIGCONT);

    for client in [&scene.client, &second_client, &scene.client] {
        scene.serves_the_live_token(client).await;
    }
    second.signal(Signal::SIGTERM);
    assert_eq!(second.wait().await.code(), Some(0), "{}", second.stderr());
    scene.stop().await;
}

#[tokio::test]
async fn a_broker_killed_while_the_answer_to_an_issue_is_on_its_way_serves_the_live_token() {
    let mut scene = Scene::new("10s").await;
    scene.fixture.upstream.script("id-1", [Answer::IssueThenHang]);
    scene.ask_for_a_new_token().await;
    scene.until_issued(2).await;

    scene.kill().await;
    scene.restart().await;
    scene.let_the_lease_pass().await;

    scene.serves_the_live_token(&scene.client).await;
    assert_eq!(scene.fixture.upstream.issued("id-1"), 3);
    scene.stop().await;
}

#[tokio::test]
async fn a_broker_killed_between_the_answer_and_the_commit_serves_the_live_token() {
    let mut scene = Scene::new("10s").await;
    scene.fixture.upstream.set_faults(slow());
    scene.ask_for_a_new_token().await;
    scene.until_requested(2).await;

    // The commit waits for this lock, and is never done.
    let mut lock = scene.fixture.database.pool().begin().await.unwrap();
    sqlx::query("select from refreshes for update").execute(&mut *lock).await.unwrap();
    scene.fixture.upstream.set_faults(Faults::default());
    eventually("the commit", async || {
        let waiting = "select count(*) from pg_stat_activity where datname = current_database()
            and wait_event_type = 'Lock' and query like '-- store::tokens::commit%'";
        let waiting: i64 =
            sqlx::query_scalar(waiting).fetch_one(scene.fixture.database.pool()).await.unwrap();
        (waiting == 1).then_some(())
    })
    .await;
    scene.kill().await;
    lock.rollback().await.unwrap();
    scene.restart().await;
    scene.let_the_lease_pass().await;

    scene.serves_the_live_token(&scene.client).await;
    scene.stop().await;
}

#[tokio::test]
async fn a_time_out_after_the_issue_leads_to_another_issue_that_is_served() {
    let scene = Scene::new("200ms").await;
    scene.fixture.upstream.script("id-1", [Answer::IssueThenHang]);
    scene.ask_for_a_new_token().await;
    scene.until_issued(2).await;

    scene.serves_the_live_token(&scene.client).await;
    assert_eq!(scene.fixture.upstream.issued("id-1"), 3);
    scene.stop().await;
}
