//! The calls of `TokenService`: tokens, refusals with their reasons, streams, limits, and an audit record of
//! each call.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use token_broker::{
    api::proto::{
        GetTokenRequest, ListAccountsRequest, ReportRejectedTokenRequest, WatchTokensRequest,
        account_ended::Reason, report_rejected_token_response::Outcome,
        token_service_client::TokenServiceClient, watch_tokens_response::Event,
    },
    app::AppConfig,
    crypto::bearer::Bearer,
    dev::simulator::{Answer, Faults},
    domain::clock::{Clock, ManualClock},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Request};

use crate::harness::{
    broker::{Fixture, code_and_reason},
    eventually,
};

#[tokio::test]
async fn every_call_is_one_audit_event_whatever_its_outcome() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["acme*", "gone"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let unknown = broker.client(&Bearer::generate()).await;

    let token = client.get("acme").await.unwrap();
    let refused = [
        (client.get("").await, "InvalidArgument"),
        (client.get("Acme!\u{0}\n").await, "InvalidArgument"),
        (client.get(&"x".repeat(5_000)).await, "InvalidArgument"),
        (client.get("other").await, "PermissionDenied NOT_GRANTED"),
        (client.get("gone").await, "NotFound NO_SUCH_ACCOUNT"),
        (unknown.get("acme").await, "Unauthenticated CREDENTIAL_REFUSED"),
    ];
    for (answer, expected) in refused {
        assert_eq!(code_and_reason(&answer.unwrap_err()), expected);
    }
    let without_bearer = GetTokenRequest { account: "acme".into(), ..Default::default() };
    let missing = client.grpc.clone().get_token(without_bearer.clone()).await.unwrap_err();
    assert_eq!(code_and_reason(&missing), "Unauthenticated CREDENTIAL_MISSING");
    let mut malformed = Request::new(without_bearer);
    malformed.metadata_mut().insert("authorization", "Bearer nonsense".parse().unwrap());
    let malformed = client.grpc.clone().get_token(malformed).await.unwrap_err();
    assert_eq!(code_and_reason(&malformed), "Unauthenticated BEARER_MALFORMED");
    let negative = GetTokenRequest {
        account: "acme".into(),
        min_ttl: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
        ..Default::default()
    };
    assert_eq!(client.get_with(negative).await.unwrap_err().code(), Code::InvalidArgument);
    let huge = GetTokenRequest { account: "x".repeat(200_000), ..Default::default() };
    assert_eq!(client.get_with(huge).await.unwrap_err().code(), Code::OutOfRange);
    broker.stop().await;

    let events = fixture.audit_events("event = 'get_token'").await;
    let long = format!("{}…", "x".repeat(64));
    assert_eq!(
        events,
        [
            "get_token/demo/acme/ok/-".to_owned(),
            "get_token/demo//invalid_argument/-".to_owned(),
            "get_token/demo/Acme!\\u{0}\\u{a}/invalid_argument/-".to_owned(),
            format!("get_token/demo/{long}/invalid_argument/-"),
            "get_token/demo/other/permission_denied/NOT_GRANTED".to_owned(),
            "get_token/demo/gone/not_found/NO_SUCH_ACCOUNT".to_owned(),
            "get_token/-/-/unauthenticated/CREDENTIAL_REFUSED".to_owned(),
            "get_token/-/-/unauthenticated/CREDENTIAL_MISSING".to_owned(),
            "get_token/-/-/unauthenticated/BEARER_MALFORMED".to_owned(),
            "get_token/demo/acme/invalid_argument/-".to_owned(),
            "get_token/demo/-/out_of_range/MESSAGE_TOO_LARGE".to_owned(),
        ]
    );
    let served: (i64, String) = sqlx::query_as(
        "select generation, token_fingerprint from audit_events where event = 'get_token' and outcome = 'ok'",
    )
    .fetch_one(fixture.database.pool())
    .await
    .unwrap();
    assert_eq!(served.0.unsigned_abs(), token.generation);
    assert!(!served.1.is_empty() && !token.access_token.contains(&served.1));
}

#[tokio::test]
async fn while_the_upstream_is_down_tokens_are_served_until_they_expire_and_never_after() {
    let manual = ManualClock::new(Clock::System.now());
    let fixture = Fixture::with(Clock::Manual(manual.clone()), Faults::default()).await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    // The minimum issue interval is measured by the database's clock, which does not move with the test's.
    let mut config = fixture.config();
    config.settings.min_issue_interval = Duration::ZERO;
    let broker = fixture.start_with(config).await;
    let client = broker.client(&bearer).await;
    let token = client.get("acme").await.unwrap();
    fixture.upstream.set_faults(Faults { error_rate: 1.0, ..Faults::default() });

    let end = token.expires_at.unwrap();
    for minutes in [30, 15, 10] {
        manual.advance(Duration::from_mins(minutes));
        assert_eq!(client.get("acme").await.unwrap().generation, token.generation);
    }
    let last = chrono::DateTime::from_timestamp(end.seconds, end.nanos.unsigned_abs()).unwrap();
    manual.set(last - chrono::TimeDelta::milliseconds(1));
    let served = client.get("acme").await.unwrap();
    assert_eq!(served.generation, token.generation);
    let reuse_for = served.reuse_for.unwrap();
    assert!(reuse_for.seconds == 0 && reuse_for.nanos > 0 && reuse_for.nanos <= 1_000_000);

    manual.set(last);
    let refused = eventually("the refusal", async || {
        let refused = client.get("acme").await.unwrap_err();
        (refused.code() == Code::Unavailable).then_some(refused)
    })
    .await;
    assert_eq!(code_and_reason(&refused), "Unavailable UPSTREAM_UNAVAILABLE");
    let pushback = refused.metadata().get("grpc-retry-pushback-ms").unwrap();
    assert!(pushback.to_str().unwrap().parse::<u64>().unwrap() > 0);
    broker.stop().await;
}

#[tokio::test]
async fn a_call_waits_for_a_token_that_is_being_issued_but_not_beyond_its_deadline() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.upstream.set_faults(Faults { answer: Answer::Hang, ..Faults::default() });
    // The client sends no deadline, since it would enforce it itself; the broker's default applies.
    let mut config = fixture.config();
    config.settings.deadline_default = Duration::from_millis(500);
    let broker = fixture.start_with(config).await;
    let client = broker.client(&bearer).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    eventually("the attempt", async || (fixture.upstream.attempts("id-1") == 1).then_some(()))
        .await;
    assert_eq!(code_and_reason(&client.get("acme").await.unwrap_err()), "DeadlineExceeded");
    let mut request =
        client.request(GetTokenRequest { account: "acme".into(), ..Default::default() });
    request.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
    let malformed = client.grpc.clone().get_token(request).await.unwrap_err();
    assert_eq!(malformed.code(), Code::InvalidArgument);

    // A call that its client cancels is recorded too, if it had arrived at the broker.
    let cancelled = "outcome = 'cancelled'";
    eventually("a cancelled call", async || {
        let request = GetTokenRequest { account: "acme".into(), ..Default::default() };
        let mut request = client.request(request);
        request.metadata_mut().insert("grpc-timeout", "50S".parse().unwrap());
        let mut grpc = client.grpc.clone();
        let call = grpc.get_token(request);
        tokio::time::timeout(Duration::from_millis(200), call).await.unwrap_err();
        (!fixture.audit_events(cancelled).await.is_empty()).then_some(())
    })
    .await;
    broker.stop().await;
    let events = fixture
        .audit_events("event = 'get_token' and detail->>'field' is distinct from 'account'")
        .await;
    let [late, malformed, cancelled, ..] = &events[..] else { panic!("{events:?}") };
    assert_eq!(late, "get_token/demo/acme/deadline_exceeded/-");
    assert_eq!(malformed, "get_token/demo/-/invalid_argument/-");
    assert_eq!(cancelled, "get_token/demo/acme/cancelled/-");
}

#[tokio::test]
async fn a_reported_token_is_reissued_once_and_served_until_the_new_one_is_there() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let first = client.get("acme").await.unwrap();
    let report = async |generation, code: &str| {
        let request = client.request(ReportRejectedTokenRequest {
            account: "acme".into(),
            generation,
            upstream_code: code.into(),
        });
        client.grpc.clone().report_rejected_token(request).await.unwrap().into_inner().outcome()
    };
    assert_eq!(report(first.generation, "63001").await, Outcome::NotATokenFault);
    eventually("the minimum issue interval to pass", async || {
        (report(first.generation, "61003").await != Outcome::TooSoon).then_some(())
    })
    .await;
    let newer = GetTokenRequest {
        account: "acme".into(),
        newer_than_generation: first.generation,
        ..Default::default()
    };
    let second = client.get_with(newer).await.unwrap();
    assert!(second.generation > first.generation);
    assert_ne!(second.access_token, first.access_token);
    assert_eq!(report(first.generation, "61003").await, Outcome::AlreadyReplaced);
    assert_eq!(fixture.upstream.issued("id-1"), 2);
    broker.stop().await;
}

#[tokio::test]
async fn a_stream_carries_each_token_each_replacement_and_each_end_of_an_account() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["acme*", "b"]).await;
    fixture.add_account("acme-1", "id-1", "SK.1").await;
    fixture.add_account("b", "id-2", "SK.2").await;
    fixture.add_account("c", "id-3", "SK.3").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let watch = |accounts: &[&str]| {
        let accounts = accounts.iter().map(|name| (*name).to_owned()).collect();
        client.request(WatchTokensRequest { accounts })
    };
    let refused = client.grpc.clone().watch_tokens(watch(&["c"])).await.unwrap_err();
    assert_eq!(code_and_reason(&refused), "PermissionDenied NOT_GRANTED");

    let mut stream = client.grpc.clone().watch_tokens(watch(&["*"])).await.unwrap().into_inner();
    let mut next = async || {
        let event = stream.message().await.unwrap().expect("the stream goes on");
        (event.account, event.event.unwrap())
    };
    let mut first = [next().await, next().await];
    first.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!([first[0].0.as_str(), first[1].0.as_str()], ["acme-1", "b"]);

    fixture
        .database
        .sql("update accounts set reissue_requested_at = now() where name = 'acme-1'")
        .await;
    let (name, Event::Token(replacement)) = next().await else { panic!("a token") };
    assert_eq!(name, "acme-1");
    let Event::Token(before) = &first[0].1 else { panic!("a token") };
    assert!(replacement.generation > before.generation);

    let ended = |event| match event {
        (name, Event::Ended(ended)) => (name, ended.reason()),
        (name, Event::Token(_)) => panic!("a token of {name} where an end was due"),
    };
    fixture.database.sql("delete from grants where pattern = 'b'").await;
    assert_eq!(ended(next().await), ("b".to_owned(), Reason::NotGranted));
    fixture.database.sql("update accounts set enabled = false where name = 'acme-1'").await;
    assert_eq!(ended(next().await), ("acme-1".to_owned(), Reason::Disabled));
    fixture.add_account("acme-2", "id-4", "SK.4").await;
    let (name, Event::Token(_)) = next().await else { panic!("a token") };
    assert_eq!(name, "acme-2");
    fixture.database.sql("delete from accounts where name = 'acme-2'").await;
    assert_eq!(ended(next().await), ("acme-2".to_owned(), Reason::Removed));

    broker.stop().await;
    assert!(stream.message().await.unwrap().is_none(), "a clean end");
    let pushed = fixture.audit_events("event = 'token_pushed'").await;
    assert_eq!(pushed.len(), 4, "{pushed:?}");
}

#[tokio::test]
async fn accounts_are_listed_by_page_and_only_those_that_grants_cover() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["a*"]).await;
    for n in 1..=5 {
        fixture.add_account(&format!("a{n}"), &format!("id-{n}"), &format!("SK.{n}")).await;
    }
    fixture.add_account("b", "id-6", "SK.6").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    let (mut names, mut page_token) = (vec![], String::new());
    loop {
        let request = ListAccountsRequest { page_size: 2, page_token };
        let page =
            client.grpc.clone().list_accounts(client.request(request)).await.unwrap().into_inner();
        assert!(page.accounts.len() <= 2);
        names.extend(page.accounts.into_iter().map(|account| account.name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(names, ["a1", "a2", "a3", "a4", "a5"]);
    let bad = ListAccountsRequest { page_size: -1, page_token: String::new() };
    let refused = client.grpc.clone().list_accounts(client.request(bad)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    broker.stop().await;
}

#[tokio::test]
async fn a_caller_that_exceeds_its_rate_is_refused_with_a_retry_delay() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.database.sql("update callers set rate_limit = 1").await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    client.get("acme").await.unwrap();
    let refused = eventually("a refusal", async || client.get("acme").await.err()).await;
    assert_eq!(code_and_reason(&refused), "ResourceExhausted CALLER_RATE");
    assert!(refused.metadata().contains_key("grpc-retry-pushback-ms"));
    broker.stop().await;
}

#[tokio::test]
async fn grants_and_bearers_change_without_a_restart() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["acme"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    client.get("acme").await.unwrap();
    for (statement, expected) in [
        ("delete from grants", "PermissionDenied NOT_GRANTED"),
        ("update callers set enabled = false", "Unauthenticated CREDENTIAL_REFUSED"),
    ] {
        fixture.database.sql(statement).await;
        eventually(expected, async || {
            (code_and_reason(&client.get("acme").await.err()?) == expected).then_some(())
        })
        .await;
    }
    fixture.database.sql("update callers set enabled = true").await;
    fixture
        .database
        .sql("insert into grants (caller_id, pattern) select id, '*' from callers")
        .await;
    eventually("a token", async || client.get("acme").await.ok()).await;
    fixture.database.sql("update caller_credentials set revoked_at = now()").await;
    eventually("the revocation", async || client.get("acme").await.err()).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_flood_of_refusals_is_counted_in_few_records_while_others_are_served() {
    // As many calls as a connection may have streams.
    const FLOOD: i64 = 1_000;
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["acme"]).await;
    let broker = fixture.start().await;
    let client = broker.client(&bearer).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    eventually("a token", async || client.get("acme").await.ok()).await;

    let began = Instant::now();
    let unknown = broker.client(&Bearer::generate()).await;
    let flood = join_all((0..FLOOD).map(|_| unknown.get("acme")));
    let served = async {
        for _ in 0..20 {
            client.get("acme").await.unwrap();
        }
    };
    let (refused, ()) = tokio::join!(flood, served);
    for answer in refused {
        assert_eq!(code_and_reason(&answer.unwrap_err()), "Unauthenticated CREDENTIAL_REFUSED");
    }
    broker.stop().await;

    let counted: (i64, i64) = sqlx::query_as(
        "select sum(count)::bigint, count(*) from audit_events where outcome = 'unauthenticated'",
    )
    .fetch_one(fixture.database.pool())
    .await
    .unwrap();
    assert_eq!(counted.0, FLOOD);
    // The aggregator writes 20 records at once, then one a second, and an aggregated one each 250 ms.
    let max_records = 20 + 5 * (began.elapsed().as_secs() + 1);
    assert!(counted.1.unsigned_abs() <= max_records, "{counted:?}");
}

#[tokio::test]
async fn calls_beyond_the_limit_of_waiting_calls_are_shed_while_live_tokens_are_served() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let broker = fixture.start_with(AppConfig { max_waiting_calls: 2, ..fixture.config() }).await;
    let client = broker.client(&bearer).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    eventually("a token", async || client.get("acme").await.ok()).await;
    fixture.upstream.script("id-2", [Answer::Hang]);
    fixture.add_account("slow", "id-2", "SK.2").await;
    eventually("an attempt", async || (fixture.upstream.attempts("id-2") > 0).then_some(())).await;

    let waiting: Vec<tokio::task::JoinHandle<()>> = (0..2)
        .map(|_| {
            let client = client.clone();
            // A call that is shed is repeated: another call may hold the permit at the moment.
            tokio::spawn(async move {
                loop {
                    let _ = client.get("slow").await;
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            })
        })
        .collect();
    let shed = eventually("a call that is shed", async || {
        let request = GetTokenRequest { account: "slow".into(), ..Default::default() };
        let mut request = client.request(request);
        request.set_timeout(Duration::from_millis(200));
        let refused = client.grpc.clone().get_token(request).await.unwrap_err();
        (refused.code() == Code::ResourceExhausted).then_some(refused)
    })
    .await;
    assert_eq!(code_and_reason(&shed), "ResourceExhausted OVERLOADED");
    assert!(shed.metadata().contains_key("grpc-retry-pushback-ms"));
    client.get("acme").await.unwrap();
    for call in waiting {
        call.abort();
    }
    broker.stop().await;
}

#[tokio::test]
async fn one_address_may_have_a_quarter_of_the_connections() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["acme"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture.start_with(AppConfig { max_connections: 8, ..fixture.config() }).await;
    fixture.wait_for_state("acme", "fresh").await;
    let (first, second) = (broker.client(&bearer).await, broker.client(&bearer).await);
    first.get("acme").await.unwrap();
    second.get("acme").await.unwrap();
    // A connection that is served receives the server's settings first. The third must receive nothing.
    let mut third = tokio::net::TcpStream::connect(broker.app.grpc_address).await.unwrap();
    let _ = third.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    let mut received = vec![];
    let closed = third.read_to_end(&mut received);
    let _ = tokio::time::timeout(crate::harness::TEST_TIMEOUT, closed).await.expect("it is closed");
    assert!(received.is_empty(), "{received:?}");
    first.get("acme").await.unwrap();
    drop(first);
    // There is room again once the broker has noticed that the first connection is closed.
    let another = eventually("another connection", async || {
        let endpoint = format!("http://{}", broker.app.grpc_address);
        let endpoint = tonic::transport::Endpoint::from_shared(endpoint).unwrap();
        let channel = endpoint.connect().await.ok()?;
        let request = request_with(&bearer);
        TokenServiceClient::new(channel).get_token(request).await.ok()
    });
    another.await;
    broker.stop().await;
}

/// Returns a `GetToken` request for `acme` with `bearer`.
fn request_with(bearer: &Bearer) -> Request<GetTokenRequest> {
    let mut request =
        Request::new(GetTokenRequest { account: "acme".into(), ..Default::default() });
    let value = format!("Bearer {}", bearer.expose()).parse().unwrap();
    request.metadata_mut().insert("authorization", value);
    request
}

#[tokio::test]
async fn a_stopping_broker_reports_not_serving_and_answers_until_its_callers_have_disconnected() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let broker = fixture
        .start_with(AppConfig { shutdown_notice: crate::harness::TEST_TIMEOUT, ..fixture.config() })
        .await;
    let (client, grpc) = (broker.client(&bearer).await, broker.app.grpc_address);
    eventually("a token", async || client.get("acme").await.ok()).await;
    let stopping = tokio::spawn(broker.stop());
    eventually("health that reports not serving", async || {
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{grpc}")).unwrap();
        let mut health = tonic_health::pb::health_client::HealthClient::new(channel.connect_lazy());
        let answer = health.check(tonic_health::pb::HealthCheckRequest::default()).await.ok()?;
        (answer.into_inner().status() == tonic_health::ServingStatus::NotServing.into())
            .then_some(())
    })
    .await;
    for _ in 0..10 {
        client.get("acme").await.unwrap();
    }
    assert!(!stopping.is_finished());
    drop(client);
    stopping.await.unwrap();
    let records = fixture.audit_events("event in ('get_token', 'stopped')").await;
    assert_eq!(records.last().unwrap(), "stopped/-/-/ok/-");
    assert!(records.len() > 10, "{records:?}");
}
