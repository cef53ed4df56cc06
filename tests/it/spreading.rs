//! What some accounts or one caller do does not spread to others.

use std::time::{Duration, Instant};

use token_broker::{
    api::proto::{
        ListAccountsRequest, WatchTokensRequest, WatchTokensResponse, account_ended::Reason,
        watch_tokens_response::Event,
    },
    dev::simulator::{Answer, Faults},
    domain::clock::Clock,
};
use tonic::Streaming;

use crate::harness::{
    broker::{Fixture, TestClient},
    eventually,
};

/// More answers than a test waits for.
const ALWAYS: usize = 1_000;

impl Fixture {
    /// Registers the accounts `{name}-1` to `{name}-{count}`, which the upstream knows.
    async fn add_accounts(&self, name: &str, count: usize) {
        for n in 1..=count {
            let (id, secret) = (format!("{name}-{n}"), format!("SK.{n}"));
            self.upstream.add_account(&id, &secret);
            self.add_account(&id, &id, &secret).await;
        }
    }

    async fn count_of(&self, from: &str) -> usize {
        let query = format!("select count(*) from {from}");
        let count: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(query))
            .fetch_one(self.database.pool())
            .await
            .unwrap();
        count.try_into().unwrap()
    }
}

impl TestClient {
    async fn watch(
        &self,
        patterns: &[&str],
    ) -> Result<Streaming<WatchTokensResponse>, tonic::Status> {
        let accounts = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        let request = self.request(WatchTokensRequest { accounts });
        Ok(self.grpc.clone().watch_tokens(request).await?.into_inner())
    }
}

/// Accounts that fail for ever, in whatever way, never delay a new account, a changed credential or the
/// refresh of an account that works.
#[tokio::test]
async fn accounts_that_fail_for_ever_delay_no_others() {
    const FAILING: usize = 40;
    let token_life = Duration::from_secs(8);
    let fixture = Fixture::with(Clock::System, Faults { token_life, ..Faults::default() }).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("good", "id-1", "SK.1").await;
    let mut config = fixture.config();
    config.settings.upstream_timeout = Duration::from_secs(2);
    config.settings.upstream_rate = 20.0;
    config.settings.min_issue_interval = Duration::from_millis(500);
    let broker = fixture.start_with(config).await;
    let client = broker.client(&bearer).await;
    let first = client.get("good").await.unwrap();

    let answers = [
        Answer::Hang,
        Answer::Reset,
        Answer::Html,
        Answer::Unavailable { status: 503 },
        Answer::Refuse { status: 403, code: "61090".into() },
        Answer::RateLimited { retry_after: None },
        Answer::Hang,
    ];
    for (n, answer) in (1..=FAILING).zip(answers.iter().cycle()) {
        fixture.upstream.script(&format!("bad-{n}"), vec![answer.clone(); ALWAYS]);
    }
    fixture.add_accounts("bad", FAILING).await;
    let failed = "account_status where name like 'bad-%' and consecutive_failures > 0";
    eventually("most of them to fail", async || {
        (fixture.count_of(failed).await > FAILING / 2).then_some(())
    })
    .await;

    fixture.add_account("new", "id-2", "SK.2").await;
    fixture.wait_for_state("new", "fresh").await;
    fixture.upstream.script("bad-1", vec![]);
    fixture.upstream.add_account("bad-1", "SK.changed");
    fixture
        .database
        .sql("update accounts set client_secret = 'SK.changed' where name = 'bad-1'")
        .await;
    fixture.wait_for_state("bad-1", "fresh").await;
    eventually("the good account's second refresh", async || {
        let token = client.get("good").await.unwrap();
        (token.generation > first.generation && fixture.upstream.issued("id-1") > 2).then_some(())
    })
    .await;
    let failing = "account_status where name like 'bad-%' and consecutive_failures > 0";
    assert!(fixture.count_of(failing).await > FAILING / 2, "they still fail");
    broker.stop().await;
}

/// Accounts that fail for causes of their own keep their pauses, and come after accounts that were never tried, although
/// each token that another account gets shows that the upstream answers.
#[tokio::test]
async fn accounts_that_fail_beside_others_that_get_tokens_leave_the_rate_to_these() {
    const GOOD: usize = 40;
    const FAILING: usize = 20;
    let fixture = Fixture::new().await;
    for n in 1..=FAILING / 2 {
        for name in ["older", "newer"] {
            fixture.upstream.script(&format!("{name}-{n}"), vec![Answer::Html; ALWAYS]);
        }
    }
    fixture.add_accounts("older", FAILING / 2).await;
    fixture.add_accounts("good", GOOD).await;
    fixture.add_accounts("newer", FAILING / 2).await;
    let mut config = fixture.config();
    config.settings.upstream_rate = 20.0;
    config.settings.min_issue_interval = Duration::from_secs(1);
    let broker = fixture.start_with(config).await;
    eventually("a token for each account that can have one", async || {
        let with_token = "account_status where name like 'good-%' and state = 'fresh'";
        (fixture.count_of(with_token).await == GOOD).then_some(())
    })
    .await;
    let wasted = eventually("the records", async || {
        let issued = "audit_events where event = 'token_issued'";
        if fixture.count_of(issued).await < GOOD {
            return None;
        }
        let last = "(select max(seq) from audit_events where event = 'token_issued')";
        let before = format!("audit_events where event = 'issue_failed' and seq < {last}");
        Some(fixture.count_of(&before).await)
    })
    .await;
    // Each is tried once as a new account, and later ones get at most one of four attempts.
    assert!(
        wasted <= FAILING + (GOOD + FAILING) / 3 + 3,
        "{wasted} attempts before the last token"
    );

    for further in 1..=10 {
        // Meanwhile those that fail are tried, as far as their pauses permit it.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let name = format!("further-{further}");
        fixture.upstream.add_account(&name, "SK.1");
        fixture.add_account(&name, &name, "SK.1").await;
        fixture.wait_for_state(&name, "fresh").await;
    }
    // The pauses double, and the first is half a second at least. Once, the end of an outage shortens one.
    let rushed = "(select count(*) as attempts, max(at) - min(at) as time
        from audit_events where event = 'issue_failed' group by account) of_account
        where attempts > 2 + log(2, 1 + 2 * extract(epoch from time))";
    assert_eq!(fixture.count_of(rushed).await, 0, "accounts that were tried too often");
    broker.stop().await;
}

/// One refusal of all accounts when they are to be refreshed is one state of the upstream. Once it is over, each
/// token is replaced before it ends.
#[tokio::test]
async fn a_refusal_of_all_accounts_ends_no_token_if_the_upstream_recovers() {
    for answer in [
        Answer::Refuse { status: 403, code: "61090".into() },
        Answer::RateLimited { retry_after: Some("3600".into()) },
    ] {
        let token_life = Duration::from_secs(12);
        let healthy = Faults { token_life, ..Faults::default() };
        let fixture = Fixture::with(Clock::System, healthy.clone()).await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        fixture.add_accounts("acme", 6).await;
        let broker = fixture.start().await;
        let client = broker.client(&bearer).await;
        let names: Vec<_> = (1..=6).map(|n| format!("acme-{n}")).collect();
        let mut generations = vec![];
        for name in &names {
            generations.push(client.get(name).await.unwrap().generation);
        }

        fixture.upstream.set_faults(Faults { answer, ..healthy.clone() });
        fixture.database.sql("update accounts set reissue_requested_at = now()").await;
        eventually("all to fail", async || {
            let failing = "account_status where consecutive_failures > 0";
            (fixture.count_of(failing).await == 6).then_some(())
        })
        .await;
        let late = "account_status where next_attempt_at >= expires_at";
        assert_eq!(fixture.count_of(late).await, 0, "pauses that outlast the token");
        fixture.upstream.set_faults(healthy);

        eventually("new tokens", async || {
            let mut replaced = 0;
            for (name, generation) in names.iter().zip(&generations) {
                let token = client.get(name).await.expect("a live token at any time");
                replaced += usize::from(token.generation > *generation);
            }
            (replaced == names.len()).then_some(())
        })
        .await;
        broker.stop().await;
    }
}

/// A caller's rate bounds the records that it causes: calls and pushed tokens together.
#[tokio::test]
async fn a_subscription_reopened_in_a_loop_causes_no_more_records_than_the_rate_permits() {
    const ACCOUNTS: usize = 60;
    const RATE: usize = 20;
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["acme-*"]).await;
    fixture.database.sql(&format!("update callers set rate_limit = {RATE}")).await;
    fixture.add_accounts("acme", ACCOUNTS).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let fresh = "account_status where state = 'fresh'";
    eventually("tokens", async || (fixture.count_of(fresh).await == ACCOUNTS).then_some(())).await;

    // A patient client gets everything: nothing is lost.
    let mut stream = client.watch(&["acme-*"]).await.unwrap();
    for n in 0..ACCOUNTS {
        let event = stream.message().await.unwrap().unwrap().event;
        assert!(matches!(event, Some(Event::Token(_))), "event {n}");
    }
    drop(stream);

    let pushed = "audit_events where event = 'token_pushed'";
    eventually("the records", async || (fixture.count_of(pushed).await >= ACCOUNTS).then_some(()))
        .await;
    let (before, began) = (fixture.count_of(pushed).await, Instant::now());
    let mut opened = vec![];
    while began.elapsed() < Duration::from_secs(3) {
        match client.watch(&["*"]).await {
            Ok(stream) => opened.push(stream),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    drop(opened);
    broker.stop().await;
    let elapsed = usize::try_from(began.elapsed().as_secs()).unwrap() + 1;
    let records = fixture.count_of(pushed).await - before;
    assert!(records <= RATE * (elapsed + 1), "{records} records in {elapsed} seconds");
}

/// What a caller may not use costs nothing, and a large list stays possible.
#[tokio::test]
async fn a_caller_without_grants_may_ask_for_much_and_sees_nothing() {
    let fixture = Fixture::new().await;
    let nobody = fixture.add_caller("nobody", &[]).await;
    let bearer = fixture.add_caller("demo", &["acme-*"]).await;
    fixture.add_accounts("acme", 9).await;
    let broker = fixture.start().await;
    let (nobody, client) = (broker.client(&nobody).await, broker.client(&bearer).await);
    let patterns: Vec<_> = (0..1_000).map(|n| format!("*{n}")).collect();
    let patterns: Vec<_> = patterns.iter().map(String::as_str).collect();
    let mut silent = nobody.watch(&patterns).await.unwrap();

    let mut stream = client.watch(&patterns).await.unwrap();
    let mut names = vec![];
    while names.len() < 9 {
        names.push(stream.message().await.unwrap().unwrap().account);
    }
    names.sort();
    assert_eq!(names, (1..=9).map(|n| format!("acme-{n}")).collect::<Vec<_>>());
    let listed = client.request(ListAccountsRequest { page_size: 5, ..Default::default() });
    let listed = client.grpc.clone().list_accounts(listed).await.unwrap().into_inner();
    assert_eq!((listed.accounts.len(), listed.next_page_token.is_empty()), (5, false));

    // A later grant reaches the stream that is open already.
    let grant = "insert into grants (caller_id, pattern) select id, 'acme-7' from callers where name = 'nobody'";
    fixture.database.sql(grant).await;
    assert_eq!(silent.message().await.unwrap().unwrap().account, "acme-7");
    broker.stop().await;
}

/// A stream that fell behind reports an account that was removed meanwhile.
#[tokio::test]
async fn a_stream_that_fell_behind_reports_what_was_removed_meanwhile() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["acme-*"]).await;
    fixture.database.sql("update callers set rate_limit = 1").await;
    fixture.add_accounts("acme", 9).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let fresh = "account_status where state = 'fresh'";
    eventually("tokens", async || (fixture.count_of(fresh).await == 9).then_some(())).await;

    // By its rate, the stream needs some seconds for the first tokens. Meanwhile there are more changes than
    // are kept for it.
    let mut stream = client.watch(&["acme-*"]).await.unwrap();
    assert_eq!(stream.message().await.unwrap().unwrap().account, "acme-1");
    fixture.database.sql("delete from accounts where name = 'acme-1'").await;
    fixture.database.add_disabled_accounts("other", 5_000).await;
    let ended = loop {
        let response = stream.message().await.unwrap().unwrap();
        if let Some(Event::Ended(ended)) = response.event {
            break (response.account, ended.reason());
        }
    };
    assert_eq!(ended, ("acme-1".to_owned(), Reason::Removed));
    broker.stop().await;
}
