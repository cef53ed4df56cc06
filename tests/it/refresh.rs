//! Tokens are replaced before they end: by one replica only, and after restarts and lost answers too.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use token_broker::{
    app::AppConfig,
    crypto::Keyring,
    dev::simulator::{Answer, Faults},
    domain::clock::Clock,
};

use crate::harness::{
    broker::{Fixture, start_error},
    eventually,
    http::http,
};

fn short_lived(seconds: u64) -> Faults {
    Faults { token_life: Duration::from_secs(seconds), ..Faults::default() }
}

#[tokio::test]
async fn tokens_are_replaced_before_their_end_and_served_without_a_gap() {
    const LIFE: Duration = Duration::from_secs(10);
    let fixture = Fixture::with(Clock::System, short_lived(10)).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    client.get("acme").await.unwrap();

    let (began, mut calls, mut generations) = (Instant::now(), 0, BTreeSet::new());
    let mut shortest = LIFE;
    while began.elapsed() < 5 * LIFE {
        let token = client.get("acme").await.unwrap();
        let left: Duration = token.expires_in.unwrap().try_into().unwrap();
        shortest = shortest.min(left);
        generations.insert(token.generation);
        calls += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let issued = fixture.upstream.issued("id-1");
    broker.stop().await;
    tracing::info!(calls, issued, ?shortest, "served over five lives");
    // Each token is replaced at 70 to 80 % of its life, so there are 6 to 7 replacements in 5 lives,
    // beside the first token. On a slow machine there are fewer, never more.
    assert!(generations.len() >= 5, "{generations:?}");
    assert!(issued <= 9, "{issued} issues");
    assert_eq!(generations.len(), usize::try_from(issued).unwrap());
    assert!(shortest >= LIFE / 10, "a token with {shortest:?} left was served");
}

#[tokio::test]
async fn after_a_restart_live_tokens_are_served_without_calling_the_upstream() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let before = broker.client(&bearer).await.get("acme").await.unwrap();
    broker.stop().await;

    let broker = fixture.start().await;
    let after = broker.client(&bearer).await.get("acme").await.unwrap();
    broker.stop().await;
    assert_eq!(after.generation, before.generation);
    assert_eq!(after.access_token, before.access_token);
    assert_eq!(fixture.upstream.requests(), 1);
}

#[tokio::test]
async fn three_replicas_issue_once_for_each_account() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    for n in 1..=9 {
        fixture.add_account(&format!("acme-{n}"), &format!("id-{n}"), &format!("SK.{n}")).await;
    }
    let homes: Vec<_> = (0..3).map(|_| TempDir::new().unwrap()).collect();
    let mut brokers = vec![];
    for home in &homes {
        let mut config = fixture.config();
        config.settings.state_dir = home.path().to_owned();
        brokers.push(fixture.start_with(config).await);
    }
    let mut calls = tokio::task::JoinSet::new();
    for broker in &brokers {
        let client = broker.client(&bearer).await;
        for call in 0..90 {
            let client = client.clone();
            calls.spawn(async move { client.get(&format!("acme-{}", call % 9 + 1)).await });
        }
    }
    while let Some(answer) = calls.join_next().await {
        answer.unwrap().unwrap();
    }
    for n in 1..=9 {
        assert_eq!(fixture.upstream.issued(&format!("id-{n}")), 1, "id-{n}");
    }
    for broker in brokers {
        broker.stop().await;
    }
}

#[tokio::test]
async fn after_a_lost_answer_a_new_token_is_issued_since_the_lost_one_ended_the_stored_one() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let first = client.get("acme").await.unwrap();

    // The upstream issues a token, which ends the first one, and its answer is lost.
    fixture.upstream.script("id-1", [Answer::IssueThenReset]);
    fixture.database.sql("update accounts set reissue_requested_at = now()").await;
    let second = eventually("the live token", async || {
        let token = client.get("acme").await.unwrap();
        fixture
            .upstream
            .is_live(&token.access_token)
            .then_some(token)
            .filter(|token| token.generation > first.generation)
    })
    .await;
    assert_eq!(fixture.upstream.issued("id-1"), 3);
    assert_eq!(fixture.upstream.live_token("id-1"), Some(second.access_token));
    broker.stop().await;
}

#[tokio::test]
async fn an_attempt_without_a_recorded_end_is_repeated_after_its_lease() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let first = broker.client(&bearer).await.get("acme").await.unwrap();
    broker.stop().await;
    // This is the state after a replica was killed between the upstream's answer and the commit.
    fixture
        .database
        .sql(
            "update refreshes set attempt_ended_at = null, lease_holder = 'gone',
                 lease_id = lease_id + 1, lease_until = now() - interval '1 second'",
        )
        .await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let second = eventually("a new token", async || {
        client.get("acme").await.ok().filter(|token| token.generation > first.generation)
    })
    .await;
    assert!(fixture.upstream.is_live(&second.access_token));
    broker.stop().await;
}

#[tokio::test]
async fn a_restarted_replica_does_not_wait_for_the_leases_of_its_previous_process() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.add_account("bmce", "id-2", "SK.2").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let (acme, bmce) = (client.get("acme").await.unwrap(), client.get("bmce").await.unwrap());
    broker.stop().await;
    // This is the state after this replica was killed during one call, and another one during the other
    // call.
    let instance = std::fs::read_to_string(fixture.state.path().join("instance")).unwrap();
    fixture
        .database
        .sql(&format!(
            "update refreshes set attempt_ended_at = null, lease_id = lease_id + 1,
                 lease_until = now() + interval '1 hour',
                 lease_holder = case when account_id = (select id from accounts where name = 'acme')
                     then '{}' else 'another' end",
            instance.trim()
        ))
        .await;

    // The other replica's lease counts towards the concurrency of two; that of the ended process
    // does not.
    let mut config = fixture.config();
    config.settings.upstream_concurrency = 2;
    let broker = fixture.start_with(config).await;
    let client = broker.client(&bearer).await;
    eventually("a new token", async || {
        client.get("acme").await.ok().filter(|token| token.generation > acme.generation)
    })
    .await;
    assert_eq!(client.get("bmce").await.unwrap().generation, bmce.generation);
    broker.stop().await;
}

#[tokio::test]
async fn malformed_answers_never_replace_a_token() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    // Where new tokens do not end older ones, the stored one is never possibly revoked.
    let mut config = fixture.config();
    config.settings.new_token_ends_older = false;
    let broker = fixture.start_with(config).await;
    let client = broker.client(&bearer).await;
    let first = client.get("acme").await.unwrap();
    for (n, answer) in
        [Answer::Html, Answer::PastExpiry, Answer::FarFutureExpiry, Answer::TruncatedJson]
            .into_iter()
            .enumerate()
    {
        fixture.upstream.script("id-1", [answer]);
        fixture.database.sql("update accounts set reissue_requested_at = now()").await;
        let attempts = 2 + u64::try_from(n).unwrap();
        eventually("the attempt", async || {
            (fixture.upstream.attempts("id-1") >= attempts).then_some(())
        })
        .await;
        fixture.wait_for_state("acme", "unreachable").await;
        assert_eq!(client.get("acme").await.unwrap().generation, first.generation);
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_start_with_a_wrong_keyring_another_upstream_or_an_old_schema_fails_with_a_clear_error() {
    let fixture = Fixture::new().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    fixture.wait_for_state("acme", "fresh").await;
    broker.stop().await;

    let other = Keyring::parse(&Keyring::generate(fixture.clock.now())).unwrap();
    let error = start_error(AppConfig { keyring: other.into(), ..fixture.config() }).await;
    assert!(error.starts_with("the keyring does not open the secret of account acme"), "{error}");

    let mut config = fixture.config();
    config.settings.upstream = "http://127.0.0.1:9/api/1.1".parse().unwrap();
    let error = start_error(config).await;
    assert!(error.contains("belongs to the upstream"), "{error}");

    fixture.database.sql("delete from _sqlx_migrations where version = 5").await;
    let error = start_error(fixture.config()).await;
    assert!(error.contains("too old") && error.contains("token-broker migrate"), "{error}");
}

#[tokio::test]
async fn in_an_outage_one_account_at_a_time_is_tried_and_after_it_all_accounts_are() {
    let away = Faults { answer: Answer::Reset, ..Faults::default() };
    let fixture = Fixture::with(Clock::System, away).await;
    let ids = 1..=5;
    for n in ids.clone() {
        fixture.add_account(&format!("acme-{n}"), &format!("id-{n}"), &format!("SK.{n}")).await;
    }
    let broker = fixture.start().await;
    for n in ids.clone() {
        fixture.wait_for_state(&format!("acme-{n}"), "unreachable").await;
    }
    let readiness = http(broker.app.ops_address, "GET", "/readyz", "").await.1;
    assert!(readiness.contains("is away: one account at a time is tried"), "{readiness}");

    // All accounts except one get a pause of an hour, as in a long outage.
    let set_next_attempt = async |at: &str, condition: &str| {
        let update = format!(
            "update refreshes set next_attempt_at = {at}, changed = pg_current_xact_id() where {condition}"
        );
        fixture.database.sql(&update).await;
    };
    set_next_attempt("now() + interval '1 hour'", "true").await;
    fixture.upstream.set_faults(Faults::default());
    set_next_attempt("now()", "account_id = (select id from accounts where name = 'acme-4')").await;
    for n in ids {
        fixture.wait_for_state(&format!("acme-{n}"), "fresh").await;
    }
    let readiness = http(broker.app.ops_address, "GET", "/readyz", "").await.1;
    assert!(
        readiness.contains("\"0 of 5 accounts cannot reach it; 5 have a live token\""),
        "{readiness}"
    );
    broker.stop().await;
}
