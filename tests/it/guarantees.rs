//! Guarantees that concern the interaction of admins, callers, replicas and the upstream.

use std::time::{Duration, Instant};

use tempfile::TempDir;
use token_broker::{
    api::proto::{GetTokenRequest, ReportRejectedTokenRequest, WatchTokensRequest},
    dev::simulator::{Answer, Faults},
    domain::{account::AccountId, clock::Clock},
    store::{
        Database,
        leases::{self, Claim},
    },
};
use tonic::Code;

use crate::harness::{
    broker::{Fixture, code_and_reason},
    database::TestDatabase,
    eventually,
    lease_holder::unlimited_holder,
};

impl Fixture {
    /// Registers `count` accounts in one statement, each with a client id of the same name at the upstream.
    async fn register_many(&self, count: usize) {
        for n in 1..=count {
            self.upstream.add_account(&format!("many-{n}"), "SK.many");
        }
        self.database
            .sql(&format!(
                "insert into accounts (name, client_id, client_secret)
                 select 'many-' || n, 'many-' || n, 'SK.many' from generate_series(1, {count}) n"
            ))
            .await;
    }

    /// Waits until `count` accounts have a token, for as long as more of them get one.
    async fn until_tokens(&self, count: usize) {
        let mut tokens = 0;
        while tokens < count {
            tokens = eventually(&format!("more than {tokens} tokens of {count}"), async || {
                Some(self.count("tokens").await).filter(|now| *now > tokens)
            })
            .await;
        }
    }

    /// Counts the rows of a FROM clause.
    async fn count(&self, from: &str) -> usize {
        let count: i64 =
            sqlx::query_scalar(sqlx::AssertSqlSafe(format!("select count(*) from {from}")))
                .fetch_one(self.database.pool())
                .await
                .unwrap();
        usize::try_from(count).unwrap()
    }

    /// Waits until the upstream was called `attempts` times for a token of `client_id`.
    async fn until_attempts(&self, client_id: &str, attempts: u64) {
        eventually(&format!("{attempts} attempts of {client_id}"), async || {
            (self.upstream.attempts(client_id) >= attempts).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_token_for_a_deleted_account_is_not_stored_for_the_new_account_of_its_name() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    // The upstream answers only after the other account was inserted.
    let latency = Duration::from_secs(1);
    fixture.upstream.set_faults(Faults { latency, ..Faults::default() });
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture.add_account("acme", "id-1", "SK.1").await;

    // No replica can record the end of the attempt while this transaction locks the table.
    let mut transaction = eventually("an attempt under way", async || {
        let mut transaction = fixture.database.pool().begin().await.unwrap();
        sqlx::raw_sql("lock table refreshes in exclusive mode")
            .execute(&mut *transaction)
            .await
            .unwrap();
        let open: bool = sqlx::query_scalar(
            "select attempt_started_at is not null and attempt_ended_at is null from refreshes",
        )
        .fetch_one(&mut *transaction)
        .await
        .unwrap();
        open.then_some(transaction)
    })
    .await;
    sqlx::raw_sql(
        "delete from accounts;
         insert into accounts (name, client_id, client_secret) values ('acme', 'id-2', 'SK.2')",
    )
    .execute(&mut *transaction)
    .await
    .unwrap();
    eventually("the upstream's answer", async || {
        (fixture.upstream.issued("id-1") == 1).then_some(())
    })
    .await;
    transaction.commit().await.unwrap();

    let token = eventually("the new account's token", async || client.get("acme").await.ok()).await;
    assert_eq!(fixture.upstream.live_token("id-2"), Some(token.access_token));
    broker.stop().await;
    assert_eq!(fixture.count("tokens").await, 1);
    assert_eq!(
        fixture.count("tokens natural join (select id as account_id from accounts) it").await,
        1
    );
    // Both tokens were issued, and both issues were recorded.
    assert_eq!(fixture.audit_events("event = 'token_issued'").await.len(), 2);
}

#[tokio::test]
async fn a_sealed_token_copied_from_another_generation_does_not_open() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let first = client.get("acme").await.unwrap();
    fixture.database.sql("create table kept as select sealed_token from tokens").await;
    fixture.database.sql("update accounts set reissue_requested_at = now()").await;
    let second = client
        .get_with(GetTokenRequest {
            account: "acme".into(),
            newer_than_generation: first.generation,
            ..Default::default()
        })
        .await
        .unwrap();
    broker.stop().await;

    fixture.database.sql("update tokens set sealed_token = (select sealed_token from kept)").await;
    let broker = fixture.start().await;
    let third = broker.client(&bearer).await.get("acme").await.unwrap();
    assert!(third.generation > second.generation);
    assert_eq!(fixture.upstream.live_token("id-1"), Some(third.access_token));
    broker.stop().await;
}

#[tokio::test]
async fn replicas_that_seal_at_the_same_time_seal_and_issue_for_each_account_once() {
    const MANY: usize = 60;
    let fixture = Fixture::new().await;
    let homes: Vec<_> = (0..3).map(|_| TempDir::new().unwrap()).collect();
    let mut brokers = vec![];
    for home in &homes {
        let mut config = fixture.config();
        config.settings.state_dir = home.path().to_owned();
        brokers.push(fixture.start_with(config).await);
    }
    fixture.register_many(MANY).await;
    fixture.until_tokens(MANY).await;
    let registered = "event = 'account_registered'";
    eventually("the records", async || {
        (fixture.audit_events(registered).await.len() >= MANY).then_some(())
    })
    .await;
    for broker in brokers {
        broker.stop().await;
    }

    assert_eq!(fixture.count("accounts where client_secret is not null").await, 0);
    assert_eq!(fixture.count("accounts where sealed_secret is not null").await, MANY);
    for n in 1..=MANY {
        assert_eq!(fixture.upstream.issued(&format!("many-{n}")), 1, "many-{n}");
    }
    assert_eq!(fixture.audit_events(registered).await.len(), MANY);
    assert_eq!(
        fixture
            .count(&format!("(select distinct account from audit_events where {registered}) it"))
            .await,
        MANY
    );
    let sealed = "event = 'account_changed' and detail->>'secret' = 'sealed'";
    assert_eq!(
        fixture.audit_events(sealed).await.len(),
        MANY,
        "each secret was sealed by one replica"
    );
}

#[tokio::test]
async fn a_claim_does_not_wait_for_another_transaction_and_sees_what_it_committed() {
    let database = TestDatabase::new().await;
    database
        .sql(
            "insert into accounts (name, client_id, client_secret)
                 values ('acme', 'id-1', 'SK.1'), ('free', 'id-2', 'SK.2')",
        )
        .await;
    database
        .sql_past_triggers("update accounts set sealed_secret = 'x', client_secret = null")
        .await;
    let ids: Vec<i64> = sqlx::query_scalar("select id from accounts order by name")
        .fetch_all(database.pool())
        .await
        .unwrap();
    let [acme, free] = ids[..] else { panic!("{ids:?}") };
    let holder = unlimited_holder("ours");
    let pool = Database::new(database.url(), "claims").unwrap().pool(1);
    let claim =
        async |id| leases::claim(&pool, AccountId(id), None, None, None, &holder).await.unwrap();

    // This transaction stands for another replica that commits its token, or for an admin who leaves a
    // transaction open.
    let mut open = database.pool().begin().await.unwrap();
    sqlx::raw_sql(
        "update refreshes set attempt_ended_at = now()
             where account_id = (select id from accounts where name = 'acme');
         insert into tokens (account_id, credential_version, generation, sealed_token, issued_at,
             expires_at, fingerprint)
             select id, 1, 1, 'x', now(), now() + interval '1 hour', '' from accounts
             where name = 'acme'",
    )
    .execute(&mut *open)
    .await
    .unwrap();
    assert!(matches!(claim(acme).await, Claim::Wait(_)));
    assert!(
        matches!(claim(free).await, Claim::Granted(_)),
        "a locked account must not delay another one"
    );
    open.commit().await.unwrap();
    let seen = claim(acme).await;
    assert!(matches!(seen, Claim::NotNeeded), "{seen:?}");
    pool.close().await;
}

#[tokio::test]
async fn a_cold_start_keeps_to_the_upstreams_rate_and_concurrency() {
    const MANY: usize = 300;
    const RATE: u32 = 200;
    const CONCURRENCY: usize = 8;
    let fixture = Fixture::new().await;
    fixture.register_many(MANY).await;
    let mut config = fixture.config();
    config.settings.upstream_rate = f64::from(RATE);
    config.settings.upstream_concurrency = CONCURRENCY;
    let broker = fixture.start_with(config).await;
    fixture.until_tokens(MANY).await;
    broker.stop().await;

    let peak = usize::try_from(fixture.upstream.peak_in_flight()).unwrap();
    assert!(peak <= CONCURRENCY, "{peak} at once");
    for n in 1..=MANY {
        assert_eq!(fixture.upstream.attempts(&format!("many-{n}")), 1, "many-{n}");
    }
    // In one second, the upstream answers calls that began in it, and calls that were under way before.
    let most = u64::from(RATE) + u64::try_from(CONCURRENCY).unwrap() + 1;
    for (second, issues) in fixture.upstream.issues_per_second() {
        assert!(issues <= most, "{issues} in second {second}");
    }
}

#[tokio::test]
async fn two_hundred_calls_for_a_rejected_account_cause_one_attempt() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let latency = Duration::from_millis(500);
    fixture.upstream.set_faults(Faults { latency, ..Faults::default() });
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture.add_account("acme", "id-1", "SK.wrong").await;
    eventually("the attempt", async || (fixture.upstream.requests() == 1).then_some(())).await;

    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let client = client.clone();
        calls.spawn(async move { client.get("acme").await });
    }
    while let Some(answer) = calls.join_next().await {
        let refused = answer.unwrap().unwrap_err();
        assert_eq!(code_and_reason(&refused), "FailedPrecondition CREDENTIAL_REJECTED");
    }
    assert_eq!(fixture.upstream.requests(), 1);

    fixture.database.sql("update accounts set client_secret = 'SK.1'").await;
    eventually("a token", async || client.get("acme").await.ok()).await;
    assert_eq!(fixture.upstream.requests(), 2);
    broker.stop().await;
}

#[tokio::test]
async fn the_end_of_an_outage_is_noticed_with_at_most_one_attempt_per_minimum_interval() {
    let fixture =
        Fixture::with(Clock::System, Faults { error_rate: 1.0, ..Faults::default() }).await;
    let min_issue_interval = Duration::from_millis(1_200);
    let mut config = fixture.config();
    config.settings.min_issue_interval = min_issue_interval;
    let broker = fixture.start_with(config).await;
    let began = Instant::now();
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.until_attempts("id-1", 2).await;
    fixture.wait_for_state("acme", "unreachable").await;
    fixture.upstream.set_faults(Faults::default());
    fixture.wait_for_state("acme", "fresh").await;
    let attempts = u32::try_from(fixture.upstream.attempts("id-1")).unwrap();
    assert!(
        began.elapsed() >= min_issue_interval * (attempts - 1),
        "{attempts} in {:?}",
        began.elapsed()
    );
    assert_eq!(fixture.account_status("acme", "consecutive_failures").await, "0");
    assert_eq!(fixture.account_status("acme", "last_error").await, "");
    broker.stop().await;
}

#[tokio::test]
async fn no_attempt_is_made_during_a_pause_that_the_upstream_asks_for() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.upstream.script("id-1", [Answer::RateLimited { retry_after: Some("120".into()) }]);
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.wait_for_state("acme", "unreachable").await;
    let pause = "refreshes where error_class = 'rate_limited'
        and next_attempt_at >= attempt_started_at + interval '120 seconds'";
    assert_eq!(fixture.count(pause).await, 1);

    let refused = client.get("acme").await.unwrap_err();
    assert_eq!(code_and_reason(&refused), "Unavailable UPSTREAM_UNAVAILABLE");
    // Rescheduling the account does not cause a second attempt.
    fixture.database.sql("update accounts set description = 'changed'").await;
    fixture.add_account("other", "id-2", "SK.2").await;
    fixture.wait_for_state("other", "fresh").await;
    assert_eq!(fixture.upstream.attempts("id-1"), 1);
    broker.stop().await;
}

#[tokio::test]
async fn no_request_for_a_longer_or_newer_token_forces_an_issue() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    // The deadline is the broker's default. If the client sent one, the client might end the call first.
    let mut config = fixture.config();
    config.settings.deadline_default = Duration::from_millis(500);
    let broker = fixture.start_with(config).await;
    let client = broker.client(&bearer).await;
    fixture.wait_for_state("acme", "fresh").await;
    let token = client.get("acme").await.unwrap();

    let longest = GetTokenRequest {
        account: "acme".into(),
        min_ttl: Some(prost_types::Duration { seconds: 315_576_000_000, nanos: 0 }),
        ..Default::default()
    };
    assert_eq!(client.get_with(longest).await.unwrap().generation, token.generation);
    for newer_than_generation in [token.generation, token.generation + 1, u64::MAX] {
        let future =
            GetTokenRequest { account: "acme".into(), newer_than_generation, ..Default::default() };
        let refused = client.get_with(future).await.unwrap_err();
        assert_eq!(code_and_reason(&refused), "DeadlineExceeded");
    }
    assert_eq!(fixture.upstream.attempts("id-1"), 1);
    broker.stop().await;
}

#[tokio::test]
async fn a_watch_with_no_pattern_a_malformed_one_or_too_many_is_refused() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let watch = async |accounts: Vec<String>| {
        let request = client.request(WatchTokensRequest { accounts });
        client.grpc.clone().watch_tokens(request).await.map(drop)
    };
    for (accounts, what) in [
        (vec![], "none"),
        (vec!["a**".to_owned()], "two stars"),
        (vec!["fine".to_owned(), "Not Fine".to_owned()], "no name"),
        (vec![String::new()], "an empty name"),
        (vec!["a*".to_owned(); 1_001], "1001 patterns"),
    ] {
        assert_eq!(watch(accounts).await.unwrap_err().code(), Code::InvalidArgument, "{what}");
    }
    watch(vec!["a*".to_owned(); 1_000]).await.unwrap();
    broker.stop().await;
    let refused = "event = 'watch_tokens' and outcome = 'invalid_argument'";
    assert_eq!(fixture.audit_events(refused).await.len(), 5);
}

#[tokio::test]
async fn a_report_requires_the_report_right() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.database.sql("update grants set rights = '{get,list}'").await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let token = client.get("acme").await.unwrap();
    for account in ["acme", "missing"] {
        let report = ReportRejectedTokenRequest {
            account: account.into(),
            generation: token.generation,
            upstream_code: "61003".into(),
        };
        let refused =
            client.grpc.clone().report_rejected_token(client.request(report)).await.unwrap_err();
        assert_eq!(code_and_reason(&refused), "PermissionDenied NOT_GRANTED");
    }
    assert_eq!(fixture.count("refreshes where possibly_revoked").await, 0);
    broker.stop().await;
}

#[tokio::test]
async fn a_token_for_an_unexpected_address_is_served_and_marked_in_the_audit_log() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let mut config = fixture.config();
    config.settings.expected_egress = vec!["203.0.113.0/24".parse().unwrap()];
    let broker = fixture.start_with(config).await;
    let client = broker.client(&bearer).await;
    for (account, client_id, secret, address) in [
        ("expected", "id-1", "SK.1", "203.0.113.9"),
        ("unexpected", "id-2", "SK.2", "198.51.100.9"),
    ] {
        let allow_ip = Some(address.parse().unwrap());
        fixture.upstream.set_faults(Faults { allow_ip, ..Faults::default() });
        fixture.add_account(account, client_id, secret).await;
        let token = eventually("a token", async || client.get(account).await.ok()).await;
        assert_eq!(token.allowed_ip, address);
    }
    broker.stop().await;
    assert_eq!(
        fixture.audit_events("event = 'token_issued' and detail->>'egress' = 'unexpected'").await,
        ["token_issued/-/unexpected/ok/-"]
    );
    assert_eq!(fixture.audit_events("event = 'token_issued'").await.len(), 2);
}
