//! Tokens keep coming while a new secret does not work, and from an upstream that repeats its tokens.

use std::time::Duration;

use tempfile::TempDir;
use token_broker::{
    dev::simulator::{Answer, Faults},
    domain::clock::Clock,
};

use crate::harness::{
    broker::{Fixture, TestClient},
    eventually,
};

async fn previous_secrets(fixture: &Fixture) -> i64 {
    sqlx::query_scalar("select count(previous_secret) from accounts")
        .fetch_one(fixture.database.pool())
        .await
        .unwrap()
}

async fn wait_for_generation_after(client: &TestClient, account: &str, last: u64) -> u64 {
    eventually(&format!("a new token of {account}"), async || {
        client.get(account).await.ok().map(|token| token.generation).filter(|it| *it > last)
    })
    .await
}

/// Returns how the upstream may answer a wrong secret, with the state and the error that the account shows.
fn refusals() -> Vec<(Answer, &'static str, &'static str)> {
    let refusal = r#"{"error":{"code":"61006","message":"Invalid secret key"},"status":401}"#;
    let body = |status, body: String| Answer::Body { status, body };
    vec![
        (body(200, refusal.into()), "rejected", "61006 the upstream refuses the client secret"),
        (
            body(401, format!("\u{feff}{refusal}")),
            "rejected",
            "61006 the upstream refuses the client secret",
        ),
        (Answer::Refuse { status: 403, code: "61099".into() }, "egress_rejected", "61099 "),
        (Answer::Unavailable { status: 500 }, "unreachable", "the upstream cannot answer now"),
        (Answer::Html, "unreachable", "the upstream's answer is not whole JSON"),
        (Answer::Empty, "unreachable", "the upstream's answer is not whole JSON"),
        (Answer::Reset, "unreachable", "the upstream ended the connection"),
        (Answer::Hang, "unreachable", "the upstream did not answer within"),
        (
            Answer::RateLimited { retry_after: Some("3600".into()) },
            "unreachable",
            "61092 the upstream says that it is asked too often",
        ),
    ]
}

/// A new secret that has not issued never ends service by the old one, whatever its failure is.
#[tokio::test]
async fn the_previous_secret_goes_on_issuing_whatever_the_failure_of_the_new_one_is() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let mut config = fixture.config();
    config.settings.upstream_timeout = Duration::from_secs(2);
    let broker = fixture.start_with(config).await;
    let client = broker.client(&bearer).await;
    let accounts: Vec<_> = (1..).zip(refusals()).collect();
    let mut generations = vec![];
    for (n, _) in &accounts {
        fixture.add_account(&format!("acme-{n}"), &format!("id-{n}"), &format!("SK.{n}")).await;
        generations.push(wait_for_generation_after(&client, &format!("acme-{n}"), 0).await);
    }
    for (n, (answer, ..)) in &accounts {
        fixture.upstream.script(&format!("id-{n}"), [answer.clone()]);
    }
    fixture.database.sql("update accounts set client_secret = 'SK.wrong'").await;

    for (n, (answer, state, error)) in &accounts {
        let account = format!("acme-{n}");
        fixture.wait_for_state(&account, state).await;
        let shown = fixture.account_status(&account, "last_error").await;
        assert!(shown.starts_with(error), "{answer:?}: {shown}");
        let hint = fixture.account_status(&account, "hint").await;
        assert!(hint.contains("the one before goes on issuing"), "{answer:?}: {hint}");
    }
    // All tokens are to be replaced. After some of the answers, they were at once.
    fixture
        .database
        .sql(
            "update refreshes set possibly_revoked = true, changed = pg_current_xact_id(),
                 new_secret_retry_at = now() + interval '50 minutes'",
        )
        .await;
    for ((n, (answer, state, _)), first) in accounts.iter().zip(generations) {
        let account = format!("acme-{n}");
        wait_for_generation_after(&client, &account, first).await;
        let token = eventually("a live token", async || {
            let token = client.get(&account).await.ok()?;
            fixture.upstream.is_live(&token.access_token).then_some(token)
        })
        .await;
        assert!(token.generation > first, "{answer:?}");
        fixture.wait_for_state(&account, state).await;
        assert_eq!(fixture.account_status(&account, "consecutive_failures").await, "0");
        // The new secret was tried once.
        let login = format!("id-{n}");
        eventually("no attempt is under way", async || {
            let (attempts, issued) =
                (fixture.upstream.attempts(&login), fixture.upstream.issued(&login));
            (attempts == issued + 1).then_some(())
        })
        .await;
    }
    assert_eq!(previous_secrets(&fixture).await, 9, "all previous secrets are kept");

    // Once the upstream takes a new secret, the next attempt with it ends the rotation.
    fixture.upstream.add_account("id-3", "SK.wrong");
    fixture
        .database
        .sql(
            "update refreshes set new_secret_retry_at = now(), changed = pg_current_xact_id()
             where error_class = 'egress_rejected'",
        )
        .await;
    fixture.wait_for_state("acme-3", "fresh").await;
    eventually("the end of the rotation", async || {
        (previous_secrets(&fixture).await == 8).then_some(())
    })
    .await;
    broker.stop().await;
}

/// The first attempt of a new account: there is nothing to fall back on.
#[tokio::test]
async fn a_refusal_suspends_a_new_account_in_whatever_form_it_comes() {
    let fixture = Fixture::new().await;
    let broker = fixture.start().await;
    let refused: Vec<_> = (1..).zip(refusals()).filter(|(_, it)| it.1 == "rejected").collect();
    for (n, (answer, ..)) in &refused {
        fixture.upstream.script(&format!("id-{n}"), [answer.clone()]);
        fixture.add_account(&format!("acme-{n}"), &format!("id-{n}"), "SK.wrong").await;
    }
    for (n, (answer, state, error)) in &refused {
        let account = format!("acme-{n}");
        fixture.wait_for_state(&account, state).await;
        assert_eq!(fixture.account_status(&account, "last_error").await, *error, "{answer:?}");
        assert_eq!(fixture.account_status(&account, "next_attempt_at").await, "", "{answer:?}");
        let hint = fixture.account_status(&account, "hint").await;
        assert!(hint.contains("set the API KEY shown in the console"), "{answer:?}: {hint}");
        assert_eq!(fixture.upstream.attempts(&format!("id-{n}")), 1, "{answer:?}");
    }
    broker.stop().await;
}

/// Some upstreams give the same token to everybody who asks until it ends. It stays the same generation, and the
/// next one is requested when it ends, although the minimum issue interval is longer than its life.
#[tokio::test]
async fn a_token_that_the_upstream_repeats_keeps_its_generation_and_is_replaced_when_it_ends() {
    let faults = Faults {
        repeats_tokens: true,
        token_life: Duration::from_secs(12),
        new_token_ends_older: false,
        ..Faults::default()
    };
    let fixture = Fixture::with(Clock::System, faults).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let state = TempDir::new().unwrap();
    let config = |directory: &TempDir| {
        let mut config = fixture.config();
        config.settings.min_issue_interval = Duration::from_hours(1);
        config.settings.state_dir = directory.path().to_owned();
        config
    };
    let brokers = [
        fixture.start_with(config(&fixture.state)).await,
        fixture.start_with(config(&state)).await,
    ];
    let clients = [brokers[0].client(&bearer).await, brokers[1].client(&bearer).await];
    fixture.add_account("acme", "id-1", "SK.1").await;
    let first = eventually("a token", async || clients[0].get("acme").await.ok()).await;

    // A changed secret is tried at once, and gets the same token. That ends the rotation all the same.
    fixture.upstream.add_account("id-1", "SK.2");
    fixture.database.sql("update accounts set client_secret = 'SK.2'").await;
    eventually("the hint", async || {
        let hint = fixture.account_status("acme", "hint").await;
        hint.starts_with("the upstream repeats its token").then_some(())
    })
    .await;
    assert_eq!(fixture.account_status("acme", "state").await, "fresh");
    for client in &clients {
        let token = client.get("acme").await.unwrap();
        assert_eq!(
            (token.generation, &token.access_token),
            (first.generation, &first.access_token)
        );
    }
    eventually("the end of the rotation", async || {
        (previous_secrets(&fixture).await == 0).then_some(())
    })
    .await;
    assert_eq!((fixture.upstream.attempts("id-1"), fixture.upstream.issued("id-1")), (2, 1));

    for client in &clients {
        wait_for_generation_after(client, "acme", first.generation).await;
    }
    assert_eq!((fixture.upstream.attempts("id-1"), fixture.upstream.issued("id-1")), (3, 2));
    for broker in brokers {
        broker.stop().await;
    }
    assert_eq!(
        fixture.audit_events("event in ('token_issued', 'token_repeated', 'issue_failed')").await,
        ["token_issued/-/acme/ok/-", "token_repeated/-/acme/ok/-", "token_issued/-/acme/ok/-"]
    );
}
