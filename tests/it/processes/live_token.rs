//! The broker serves the token that the upstream considers live, although each new token ends the previous
//! one. This also holds after stops, kills and timeouts between an issue and its commit.

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

/// A broker process that serves one account, `acme`, which has a token.
struct ServedAccount {
    fixture: Fixture,
    setup: BrokerSetup,
    bearer: Bearer,
    serve: BrokerProcess,
    client: TestClient,
}

impl ServedAccount {
    async fn new(upstream_timeout: &str) -> Self {
        let fixture = Fixture::with(Clock::System, Faults::default()).await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        fixture.add_account("acme", "id-1", "SK.1").await;
        let mut setup =
            BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
        setup.set("TOKEN_BROKER_UPSTREAM_TIMEOUT", upstream_timeout);
        let serve = setup.serve().await;
        let client = TestClient::connect(&setup.endpoint(), &bearer).await;
        let served = Self { fixture, setup, bearer, serve, client };
        served.until_the_live_token_is_served(&served.client).await;
        assert_eq!(served.fixture.upstream.issued("id-1"), 1);
        served
    }

    async fn request_reissue(&self) {
        self.fixture.database.sql("update accounts set reissue_requested_at = now()").await;
    }

    /// Waits until the upstream has received `requests` requests in all.
    async fn until_requested(&self, requests: u64) {
        eventually("a request", async || {
            (self.fixture.upstream.requests() >= requests).then_some(())
        })
        .await;
    }

    /// Waits until the upstream has issued `issues` tokens in all.
    async fn until_issued(&self, issues: u64) {
        eventually("an issue", async || {
            (self.fixture.upstream.issued("id-1") >= issues).then_some(())
        })
        .await;
    }

    /// Moves the end of the attempt's lease into the past.
    async fn expire_the_lease(&self) {
        self.fixture
            .database
            .sql("update refreshes set lease_until = now() - interval '1 second'")
            .await;
    }

    /// Waits until the live token is served to `client` and the account's state is `fresh`.
    async fn until_the_live_token_is_served(&self, client: &TestClient) {
        eventually("the live token", async || {
            let token = client.get("acme").await.ok()?.access_token;
            let fresh = self.fixture.account_status("acme", "state").await == "fresh";
            (fresh && self.fixture.upstream.live_token("id-1") == Some(token)).then_some(())
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

/// An upstream that answers slowly enough to be interrupted.
fn slow() -> Faults {
    Faults { latency: Duration::from_millis(500), ..Faults::default() }
}

#[tokio::test]
async fn a_broker_that_was_stopped_beyond_the_end_of_its_lease_serves_the_live_token() {
    // A lease lasts 20 s longer than an attempt may take: 21 s here.
    let served = ServedAccount::new("1s").await;
    served.fixture.upstream.set_faults(slow());
    served.request_reissue().await;
    served.until_requested(2).await;

    // The broker does not read the upstream's answer before the lease has ended.
    served.serve.signal(Signal::SIGSTOP);
    served.until_issued(2).await;
    served.fixture.upstream.set_faults(Faults::default());
    eventually("the end of the lease", async || {
        let over = "select coalesce(lease_until < clock_timestamp(), true) from refreshes";
        let over: bool =
            sqlx::query_scalar(over).fetch_one(served.fixture.database.pool()).await.unwrap();
        over.then_some(())
    })
    .await;
    served.serve.signal(Signal::SIGCONT);

    served.until_the_live_token_is_served(&served.client).await;
    served.stop().await;
}

#[tokio::test]
async fn a_token_that_arrives_after_that_of_another_replica_does_not_replace_it() {
    let served = ServedAccount::new("10s").await;
    let replica = served.setup.replica();
    let mut second = replica.serve().await;
    let second_client = TestClient::connect(&replica.endpoint(), &served.bearer).await;
    served.until_the_live_token_is_served(&second_client).await;
    assert_eq!(served.fixture.upstream.issued("id-1"), 1);

    // The first replica makes the attempt. The second one runs again only when the first is stopped.
    second.signal(Signal::SIGSTOP);
    served.fixture.upstream.set_faults(slow());
    served.request_reissue().await;
    served.until_requested(2).await;
    served.serve.signal(Signal::SIGSTOP);
    served.until_issued(2).await;
    served.fixture.upstream.set_faults(Faults::default());
    served.expire_the_lease().await;
    second.signal(Signal::SIGCONT);
    served.until_issued(3).await;
    served.until_the_live_token_is_served(&second_client).await;

    // The first replica goes on with a token that the second's token has ended.
    served.serve.signal(Signal::SIGCONT);

    for client in [&served.client, &second_client, &served.client] {
        served.until_the_live_token_is_served(client).await;
    }
    second.signal(Signal::SIGTERM);
    assert_eq!(second.wait().await.code(), Some(0), "{}", second.stderr());
    served.stop().await;
}

#[tokio::test]
async fn a_broker_that_is_killed_before_the_answer_to_an_issue_serves_the_live_token_after_a_restart()
 {
    let mut served = ServedAccount::new("10s").await;
    served.fixture.upstream.script("id-1", [Answer::IssueThenHang]);
    served.request_reissue().await;
    served.until_issued(2).await;

    served.kill().await;
    served.restart().await;
    served.expire_the_lease().await;

    served.until_the_live_token_is_served(&served.client).await;
    assert_eq!(served.fixture.upstream.issued("id-1"), 3);
    served.stop().await;
}

#[tokio::test]
async fn a_broker_that_is_killed_between_the_answer_and_the_commit_serves_the_live_token_after_a_restart()
 {
    let mut served = ServedAccount::new("10s").await;
    served.fixture.upstream.set_faults(slow());
    served.request_reissue().await;
    served.until_requested(2).await;

    // The commit waits for this lock. The broker is killed meanwhile, so it never happens.
    let mut lock = served.fixture.database.pool().begin().await.unwrap();
    sqlx::query("select from refreshes for update").execute(&mut *lock).await.unwrap();
    served.fixture.upstream.set_faults(Faults::default());
    eventually("the commit", async || {
        let waiting = "select count(*) from pg_stat_activity where datname = current_database()
            and wait_event_type = 'Lock' and query like '-- store::tokens::commit%'";
        let waiting: i64 =
            sqlx::query_scalar(waiting).fetch_one(served.fixture.database.pool()).await.unwrap();
        (waiting == 1).then_some(())
    })
    .await;
    served.kill().await;
    lock.rollback().await.unwrap();
    served.restart().await;
    served.expire_the_lease().await;

    served.until_the_live_token_is_served(&served.client).await;
    served.stop().await;
}

#[tokio::test]
async fn after_a_timeout_another_token_is_issued_and_served() {
    let served = ServedAccount::new("200ms").await;
    served.fixture.upstream.script("id-1", [Answer::IssueThenHang]);
    served.request_reissue().await;
    served.until_issued(2).await;

    served.until_the_live_token_is_served(&served.client).await;
    assert_eq!(served.fixture.upstream.issued("id-1"), 3);
    served.stop().await;
}
