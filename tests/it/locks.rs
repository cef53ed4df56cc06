//! Admins who leave transactions open or lock tables: tokens are issued, stored and served all the same, and what
//! cannot be stored yet is stored later. One open transaction affects no other account, and no dead token is
//! served.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Postgres, Transaction};
use tempfile::TempDir;
use token_broker::{
    crypto::bearer::Bearer,
    dev::simulator::Faults,
    domain::clock::{Clock, ManualClock},
};

use crate::harness::{
    broker::{Fixture, TestBroker, TestClient},
    eventually,
};

/// How many accounts a test has; the transactions of admins concern the first half.
const ACCOUNTS: usize = 20;

fn names() -> impl Iterator<Item = String> {
    (1..=ACCOUNTS).map(|n| format!("many-{n}"))
}

/// A transaction that is open until this value is dropped or rolled back.
async fn open(fixture: &Fixture, statements: &str) -> Transaction<'static, Postgres> {
    let mut transaction = fixture.database.pool().begin().await.unwrap();
    let statements = AssertSqlSafe(statements.to_owned());
    sqlx::raw_sql(statements).execute(&mut *transaction).await.unwrap();
    transaction
}

impl Fixture {
    async fn number(&self, query: &str) -> i64 {
        let query = AssertSqlSafe(query.to_owned());
        sqlx::query_scalar(query).fetch_one(self.database.pool()).await.unwrap()
    }

    /// Waits until every account was issued `issues` tokens in all, and each of `clients` gets the live one.
    async fn until_served(
        &self,
        clients: &[TestClient],
        issues: u64,
        clock: &ManualClock,
        when: &str,
    ) {
        for name in names() {
            eventually(&format!("issue {issues} for {name} {when}"), async || {
                // A claim that is refused, for example because of the rate, is repeated after a pause.
                clock.advance(Duration::from_millis(20));
                (self.upstream.issued(&name) == issues).then_some(())
            })
            .await;
            for client in clients {
                eventually(&format!("the live token of {name} {when}"), async || {
                    let token = client.get(&name).await.ok()?;
                    self.upstream.is_live(&token.access_token).then_some(())
                })
                .await;
            }
        }
    }
}

/// Two replicas with the same accounts, and a client of each.
struct Replicas {
    brokers: Vec<TestBroker>,
    clients: Vec<TestClient>,
    _second_home: TempDir,
}

impl Replicas {
    async fn start(fixture: &Fixture, bearer: &Bearer) -> Self {
        let home = TempDir::new().unwrap();
        let mut second = fixture.config();
        second.settings.state_dir = home.path().to_owned();
        let brokers = vec![fixture.start().await, fixture.start_with(second).await];
        let mut clients = vec![];
        for broker in &brokers {
            clients.push(broker.client(bearer).await);
        }
        Self { brokers, clients, _second_home: home }
    }
}

#[tokio::test]
async fn an_admins_open_transaction_neither_delays_tokens_nor_lets_a_dead_one_be_served() {
    let manual = ManualClock::new(Clock::System.now());
    let fixture = Fixture::with(Clock::Manual(manual.clone()), Faults::default()).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let replicas = Replicas::start(&fixture, &bearer).await;
    for name in names() {
        fixture.upstream.add_account(&name, "SK.many");
        fixture.add_account(&name, &name, "SK.many").await;
    }
    fixture.until_served(&replicas.clients, 1, &manual, "at first").await;

    let half = ACCOUNTS / 2;
    let first_half = format!("id in (select id from accounts order by id limit {half})");
    let mut issues = 1;
    for statement in [
        format!("update accounts set description = 'changed' where {first_half}"),
        format!("update accounts set client_secret = 'SK.other' where {first_half}"),
        format!("update accounts set enabled = false where {first_half}"),
        format!("delete from accounts where {first_half}"),
        format!("select from accounts where {first_half} for update"),
        "lock table accounts in share row exclusive mode".into(),
    ] {
        let transaction = open(&fixture, &statement).await;
        manual.advance(Duration::from_mins(50));
        issues += 1;
        let when = format!("during {statement}");
        fixture.until_served(&replicas.clients, issues, &manual, &when).await;
        assert_eq!(fixture.number("select count(*) from upstream_calls").await, 0);
        transaction.rollback().await.unwrap();
    }
    for broker in replicas.brokers {
        broker.stop().await;
    }
    // No account was issued for twice in one window.
    let accounts = u64::try_from(ACCOUNTS).unwrap();
    assert_eq!(fixture.upstream.requests(), issues * accounts);
}

#[tokio::test]
async fn a_token_of_an_account_that_is_deleted_in_an_open_transaction_goes_with_the_account() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.wait_for_state("acme", "fresh").await;
    fixture.database.sql("update accounts set reissue_requested_at = now()").await;
    let transaction = open(&fixture, "delete from accounts").await;
    eventually("the second token", async || (fixture.upstream.issued("id-1") == 2).then_some(()))
        .await;
    eventually("the live token", async || {
        let token = client.get("acme").await.unwrap();
        fixture.upstream.is_live(&token.access_token).then_some(())
    })
    .await;
    transaction.commit().await.unwrap();
    eventually("the refusal", async || client.get("acme").await.err()).await;
    for table in ["accounts", "refreshes", "tokens"] {
        assert_eq!(fixture.number(&format!("select count(*) from {table}")).await, 0, "{table}");
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_token_that_cannot_be_stored_is_served_at_once_and_takes_no_place_of_other_accounts() {
    for lock in [
        "select from refreshes where attempt_ended_at is null for update",
        "update refreshes set last_requested_at = now() where attempt_ended_at is null",
        "select from tokens for update",
        "lock table tokens in exclusive mode",
        "lock table accounts in access exclusive mode",
    ] {
        let fixture = Fixture::new().await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        let mut config = fixture.config();
        config.settings.upstream_concurrency = 2;
        // A lease lasts longer than the test waits.
        config.settings.upstream_timeout = Duration::from_mins(2);
        let broker = fixture.start_with(config).await;
        let client = broker.client(&bearer).await;
        for n in 1..=2 {
            fixture.add_account(&format!("acme-{n}"), &format!("id-{n}"), &format!("SK.{n}")).await;
            fixture.wait_for_state(&format!("acme-{n}"), "fresh").await;
        }
        let latency = Duration::from_millis(1_500);
        fixture.upstream.set_faults(Faults { latency, ..Faults::default() });
        fixture.database.sql("update accounts set reissue_requested_at = now()").await;
        eventually("two calls", async || (fixture.upstream.requests() == 4).then_some(())).await;

        let transaction = open(&fixture, lock).await;
        for n in 1..=2 {
            eventually(&format!("the live token of acme-{n} during {lock}"), async || {
                let token = client.get(&format!("acme-{n}")).await.unwrap();
                let live = fixture.upstream.is_live(&token.access_token);
                (fixture.upstream.issued(&format!("id-{n}")) == 2 && live).then_some(())
            })
            .await;
        }
        // Only the lock of all accounts, or of all tokens, concerns others too.
        if !lock.starts_with("lock table") {
            fixture.upstream.set_faults(Faults::default());
            fixture.add_account("other", "id-3", "SK.3").await;
            eventually(&format!("another token during {lock}"), async || {
                client.get("other").await.ok()
            })
            .await;
        }
        transaction.rollback().await.unwrap();

        eventually(&format!("the stored tokens after {lock}"), async || {
            let pending = "select count(*) from refreshes where attempt_ended_at is null";
            (fixture.number(pending).await == 0).then_some(())
        })
        .await;
        for n in 1..=2 {
            let served = client.get(&format!("acme-{n}")).await.unwrap();
            let stored = format!(
                "select generation from tokens t join accounts a on a.id = t.account_id
                 where a.name = 'acme-{n}'"
            );
            assert_eq!(fixture.number(&stored).await.unsigned_abs(), served.generation);
            assert_eq!(fixture.upstream.issued(&format!("id-{n}")), 2, "{lock}");
        }
        broker.stop().await;
    }
}

#[tokio::test]
async fn a_previous_secret_is_dropped_once_its_row_can_be_locked() {
    let fixture = Fixture::new().await;
    let broker = fixture.start().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.wait_for_state("acme", "fresh").await;
    fixture.upstream.add_account("id-1", "SK.new");
    let latency = Duration::from_millis(1_500);
    fixture.upstream.set_faults(Faults { latency, ..Faults::default() });
    fixture.database.sql("update accounts set client_secret = 'SK.new'").await;
    eventually("the call", async || (fixture.upstream.requests() == 2).then_some(())).await;
    let transaction = open(&fixture, "select from accounts for update").await;
    let with_previous = "select count(*) from accounts where previous_secret is not null";
    eventually("the token of the new secret", async || {
        let stored = "select count(*) from tokens where credential_version = 2";
        (fixture.number(stored).await == 1).then_some(())
    })
    .await;
    assert_eq!(fixture.number(with_previous).await, 1);
    transaction.rollback().await.unwrap();
    eventually("the end of the previous secret", async || {
        (fixture.number(with_previous).await == 0).then_some(())
    })
    .await;
    assert_eq!(fixture.upstream.requests(), 2);
    broker.stop().await;
}

#[tokio::test]
async fn a_previous_secret_that_the_upstream_refuses_is_not_used_again_while_its_row_is_locked() {
    let fixture = Fixture::new().await;
    let broker = fixture.start().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.wait_for_state("acme", "fresh").await;
    // The upstream knows neither the new secret nor, from now on, the previous one.
    fixture.upstream.add_account("id-1", "SK.neither");
    let latency = Duration::from_millis(1_500);
    fixture.upstream.set_faults(Faults { latency, ..Faults::default() });
    fixture.database.sql("update accounts set client_secret = 'SK.wrong'").await;
    eventually("the new secret's call", async || (fixture.upstream.requests() == 2).then_some(()))
        .await;
    let transaction = open(&fixture, "update accounts set description = 'open'").await;
    fixture
        .database
        .sql("update tokens set expires_at = now(), changed = pg_current_xact_id()")
        .await;
    eventually("the previous secret's refusal", async || {
        let refused = "select count(*) from refreshes where refused_version = 1";
        (fixture.number(refused).await == 1).then_some(())
    })
    .await;
    let other = "select count(*) from accounts where previous_secret is not null";
    assert_eq!(fixture.number(other).await, 1);
    transaction.rollback().await.unwrap();
    eventually("the end of the previous secret", async || {
        (fixture.number(other).await == 0).then_some(())
    })
    .await;
    assert_eq!(fixture.upstream.requests(), 3, "each secret was tried once");
    broker.stop().await;
}
