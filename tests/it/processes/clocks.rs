//! Leaps of clocks. Whatever the broker's clock or the database's says, before the start or while the broker runs: no
//! token is served after its end, tokens are issued all the time, and nothing that callers are told about a token's
//! end is later than the end.
//!
//! The truth is the clock of this test and of the simulated upstream in it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use chrono::{DateTime, Datelike};
use token_broker::{
    api::proto::{GetTokenRequest, GetTokenResponse, token_service_client::TokenServiceClient},
    crypto::bearer::Bearer,
    dev::simulator::{Answer, Faults, Simulator, SimulatorOptions},
    domain::clock::Timestamp,
};
use tonic::{Code, Status};

use crate::harness::{
    broker::TestClient,
    certificates::{BROKER_DNS_NAME, PemIdentity, TestCa, connect_tls, write_tls_files},
    database::TestDatabase,
    eventually,
    process::{BrokerProcess, BrokerSetup},
    shifted_clock::ShiftedClock,
};

/// The life of tokens, which is short so that the test sees them end.
const LIFE: Duration = Duration::from_secs(4);
/// How inexact a stated end may be: `Date` and the claims count whole seconds.
const INEXACT: Duration = Duration::from_secs(2);
/// Two hours and ten minutes, in seconds.
const LEAPS: [i64; 4] = [-7_200, -600, 600, 7_200];

fn faults() -> Faults {
    // Each token lives to its end, so that the end is what the test sees.
    Faults { token_life: LIFE, new_token_ends_older: false, ..Faults::default() }
}

/// What a caller was told about the end of a token.
struct Told {
    ends: Instant,
    ends_at: Timestamp,
    ended: bool,
}

/// A caller that compares each token with the upstream's truth.
struct Checker<'a> {
    upstream: &'a Simulator,
    client: TestClient,
    tokens: BTreeMap<String, Told>,
}

impl Checker<'_> {
    /// Asks for a token of the account.
    ///
    /// # Panics
    /// When the answer holds a token that had ended before the call, or one whose stated end is later than its end.
    async fn get(&mut self, account: &str) -> Result<GetTokenResponse, Status> {
        self.note_ends();
        let answer = self.client.get(account).await?;
        let left: Duration = answer.expires_in.unwrap().try_into().unwrap();
        let reuse: Duration = answer.reuse_for.unwrap().try_into().unwrap();
        assert!(left <= LIFE, "it lives {left:?}");
        assert!(!reuse.is_zero() && reuse <= left, "{reuse:?} of {left:?}");
        let (ends, stated) = (Instant::now() + left, answer.expires_at.unwrap());
        let ends_at =
            DateTime::from_timestamp(stated.seconds, stated.nanos.unsigned_abs()).unwrap();
        let told = self.tokens.entry(answer.access_token.clone());
        let told = told.or_insert(Told { ends, ends_at, ended: false });
        assert!(!told.ended, "a token was served after its end");
        (told.ends, told.ends_at) = (told.ends.max(ends), told.ends_at.max(ends_at));
        Ok(answer)
    }

    /// Notes which tokens have ended, and compares their ends with what was told about them.
    fn note_ends(&mut self) {
        for (token, told) in &mut self.tokens {
            if !told.ended && !self.upstream.is_live(token) {
                told.ended = true;
                assert!(told.ends <= Instant::now() + INEXACT, "expires_in was too long");
                assert!(told.ends_at <= self.upstream.now() + INEXACT, "expires_at was too late");
            }
        }
    }

    /// Waits for a token of the account with a later generation than `last`.
    async fn until_issued(&mut self, account: &str, last: u64) -> u64 {
        eventually("a new token", async || {
            let generation = self.get(account).await.ok()?.generation;
            (generation > last).then_some(generation)
        })
        .await
    }

    /// Waits until no token of the account is served any more.
    async fn until_refused(&mut self, account: &str) {
        eventually("the end of the last token", async || self.get(account).await.err()).await;
    }
}

/// A broker process with an upstream and a caller.
struct Deployment {
    upstream: Simulator,
    setup: BrokerSetup,
    bearer: Bearer,
    accounts: usize,
}

impl Deployment {
    async fn new(database_url: &str) -> Self {
        let options = SimulatorOptions { faults: faults(), ..SimulatorOptions::default() };
        let upstream = Simulator::start_on_loopback(options).await.unwrap();
        let mut setup = BrokerSetup::new(database_url, &upstream.base_url()).await;
        setup.set("TOKEN_BROKER_MIN_ISSUE_INTERVAL", "1s");
        // A call that finds no token is answered soon.
        setup.set("TOKEN_BROKER_DEADLINE_DEFAULT", "500ms");
        setup.run(&["migrate"]).await.ok();
        let bearer = setup.run(&["caller", "add", "demo", "--bearer"]).await.ok();
        setup.run(&["caller", "grant", "demo", "*"]).await.ok();
        let bearer = Bearer::parse(&bearer).unwrap();
        Self { upstream, setup, bearer, accounts: 0 }
    }

    fn shift(&mut self, clock: &ShiftedClock) {
        for (name, value) in clock.variables() {
            self.setup.set(name, &value);
        }
    }

    async fn checker(&self) -> Checker<'_> {
        let client = TestClient::connect(&self.setup.endpoint(), &self.bearer).await;
        Checker { upstream: &self.upstream, client, tokens: BTreeMap::new() }
    }

    /// Registers a further account, and returns its name.
    async fn add_account(&mut self) -> String {
        self.accounts += 1;
        let n = self.accounts;
        let (name, id) = (format!("acme-{n}"), format!("id-{n}"));
        self.upstream.add_account(&id, "SK.1");
        let add = ["account", "add", &name, "--client-id", &id];
        self.setup.run_with_secret(&add, "SK.1").await.ok();
        name
    }

    async fn state_of(&self, account: &str) -> String {
        let shown = self.setup.run(&["account", "show", account, "--json"]).await.ok();
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        shown["state"].as_str().unwrap().to_owned()
    }

    /// Checks the service of `account`, which was registered before the leap, and of a new account: tokens are
    /// issued, the last one is served to its end while the upstream does not answer, and never longer.
    async fn check_service(&mut self, account: &str) {
        let new = self.add_account().await;
        let mut checker = self.checker().await;
        checker.until_issued(&new, 0).await;
        let generation = checker.until_issued(account, 0).await;
        checker.until_issued(account, generation).await;

        self.upstream
            .set_faults(Faults { answer: Answer::Unavailable { status: 503 }, ..faults() });
        checker.until_refused(account).await;
        checker.until_refused(&new).await;
        assert_ne!(self.state_of(account).await, "fresh");
        self.upstream.set_faults(faults());
        checker.until_issued(account, generation).await;
    }

    /// Kills the broker and starts it again: its tokens come from the database.
    async fn restart(&self, serve: BrokerProcess) -> BrokerProcess {
        serve.kill().await;
        self.setup.serve().await
    }
}

async fn check_leap_of_the_brokers_clock(ahead: i64, before_the_start: bool) {
    let Some(clock) = ShiftedClock::build() else { return };
    let database = TestDatabase::new().await;
    let mut deployment = Deployment::new(database.url()).await;
    deployment.shift(&clock);
    // The first token is issued by a broker whose clock is right.
    let mut serve = deployment.setup.serve().await;
    let account = deployment.add_account().await;
    deployment.checker().await.until_issued(&account, 0).await;
    if before_the_start {
        serve.kill().await;
        clock.set_ahead(ahead);
        serve = deployment.setup.serve().await;
    } else {
        clock.set_ahead(ahead);
    }
    deployment.check_service(&account).await;
    serve.kill().await;
}

#[tokio::test]
async fn a_leap_of_the_brokers_clock_while_it_runs_neither_prolongs_a_token_nor_stops_issuing() {
    let leaps = LEAPS.map(|leap| check_leap_of_the_brokers_clock(leap, false));
    futures_util::future::join_all(leaps).await;
}

#[tokio::test]
async fn a_clock_that_is_wrong_at_the_brokers_start_neither_prolongs_a_token_nor_stops_issuing() {
    let leaps = LEAPS.map(|leap| check_leap_of_the_brokers_clock(leap, true));
    futures_util::future::join_all(leaps).await;
}

/// Whether the broker accepts a caller with this certificate. There is no account, so an accepted call finds none.
async fn accepts(setup: &BrokerSetup, ca: &TestCa, identity: &PemIdentity) -> bool {
    let port = setup.endpoint().rsplit(':').next().unwrap().parse().unwrap();
    let Ok(channel) = connect_tls(port, ca, Some(identity)).await else { return false };
    let request = GetTokenRequest { account: "acme".into(), ..GetTokenRequest::default() };
    let answer = TokenServiceClient::new(channel).get_token(request).await;
    answer.is_err_and(|status| status.code() == Code::NotFound)
}

/// A host that boots before its clock is set. The broker starts with a clock that is wrong by `years`.
async fn check_certificates_after_a_wrong_start(years: i32) {
    const CALLER: &str = "spiffe://example.com/demo";
    let Some(clock) = ShiftedClock::build() else { return };
    let database = TestDatabase::new().await;
    let mut deployment = Deployment::new(database.url()).await;
    let insert = format!(
        "insert into caller_credentials (caller_id, kind, identity) select id, 'spiffe', '{CALLER}' from callers"
    );
    database.sql(&insert).await;
    let (ca, this_year) = (TestCa::new("ca"), deployment.upstream.now().year());
    let ended = ca.issue_numbered(&[CALLER], this_year, None);
    let valid = ca.issue_numbered(&[CALLER], this_year + 2, None);
    let broker = ca.issue(&[BROKER_DNS_NAME]);
    deployment.setup.set_tls(&write_tls_files(deployment.setup.directory.path(), &broker, &[&ca]));
    deployment.setup.set("TOKEN_BROKER_TRUST_DOMAIN", "example.com");
    deployment.shift(&clock);
    clock.set_ahead(i64::from(years) * 365 * 86_400);
    let serve = deployment.setup.serve().await;
    let wrong = if years < 0 { &ended } else { &valid };
    assert_eq!(accepts(&deployment.setup, &ca, wrong).await, years < 0, "the clock is wrong");

    clock.set_ahead(0);
    eventually("the correction", async || {
        let (ended, valid) = (
            accepts(&deployment.setup, &ca, &ended).await,
            accepts(&deployment.setup, &ca, &valid).await,
        );
        (!ended && valid).then_some(())
    })
    .await;
    assert!(serve.stderr().contains("the wall clock was wrong when this process started"));
    serve.kill().await;
}

#[tokio::test]
async fn certificates_are_judged_by_the_right_time_once_a_clock_is_set_that_was_wrong_at_the_start()
{
    check_certificates_after_a_wrong_start(-5).await;
    check_certificates_after_a_wrong_start(10).await;
}

async fn check_leap_of_the_databases_clock(ahead: i64) {
    use crate::harness::shifted_clock::ShiftedPostgres;

    let Some(clock) = ShiftedClock::build() else { return };
    let postgres = ShiftedPostgres::start(&clock).await;
    let mut deployment = Deployment::new(postgres.url()).await;
    let serve = deployment.setup.serve().await;
    let account = deployment.add_account().await;
    deployment.checker().await.until_issued(&account, 0).await;
    clock.set_ahead(ahead);
    deployment.check_service(&account).await;

    // The clock is set right while no broker runs, and the next start loads what it has stamped.
    clock.set_ahead(0);
    let serve = deployment.restart(serve).await;
    deployment.check_service(&account).await;

    // It leaps while no broker runs, and the tokens end before the next start.
    let generation = deployment.checker().await.until_issued(&account, 0).await;
    serve.kill().await;
    clock.set_ahead(ahead);
    tokio::time::sleep(LIFE).await;
    assert_ne!(deployment.state_of(&account).await, "fresh");
    let serve = deployment.setup.serve().await;
    let mut checker = deployment.checker().await;
    checker.until_issued(&account, generation).await;
    serve.kill().await;
}

#[tokio::test]
async fn after_the_databases_clock_was_set_back_tokens_are_issued_and_none_is_served_after_its_end()
{
    check_leap_of_the_databases_clock(-600).await;
}

#[tokio::test]
async fn after_the_databases_clock_was_set_ahead_tokens_are_issued_and_none_is_served_after_its_end()
 {
    check_leap_of_the_databases_clock(600).await;
}
