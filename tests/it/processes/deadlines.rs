//! Deadlines while many calls wait for each other.

use std::collections::BTreeMap;

use bytes::Bytes;
use nix::sys::signal::Signal;
use prost::Message;
use token_broker::{api::proto::GetTokenRequest, crypto::bearer::Bearer, dev::simulator::Answer};
use tonic::Code;

use crate::harness::{broker::Fixture, eventually, process::BrokerSetup, raw_http2};

/// Makes one call as a client that sends a deadline but does not enforce it. Returns the number of the gRPC
/// status.
async fn status_of(
    mut send: h2::client::SendRequest<Bytes>,
    bearer: &Bearer,
    account: &str,
    timeout: &str,
) -> u32 {
    let request = http::Request::post("http://broker/token_broker.v1.TokenService/GetToken")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {}", bearer.expose()))
        .header("grpc-timeout", timeout)
        .body(())
        .unwrap();
    let message = GetTokenRequest { account: account.into(), ..Default::default() };
    let message = raw_http2::message(&message.encode_to_vec());
    std::future::poll_fn(|context| send.poll_ready(context)).await.unwrap();
    let (answer, mut stream) = send.send_request(request, false).unwrap();
    stream.send_data(message.into(), true).unwrap();
    let answer = answer.await.unwrap();
    let status = |headers: &http::HeaderMap| {
        headers.get("grpc-status").map(|status| status.to_str().unwrap().parse().unwrap())
    };
    if let Some(status) = status(answer.headers()) {
        return status;
    }
    let mut body = answer.into_body();
    while let Some(data) = body.data().await {
        body.flow_control().release_capacity(data.unwrap().len()).unwrap();
    }
    status(&body.trailers().await.unwrap().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_hold_in_every_queue_and_each_call_is_recorded_with_its_status() {
    const CALLS: usize = 500;
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let mut serve = setup.serve().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.wait_for_state("acme", "fresh").await;
    fixture.upstream.script("id-2", [Answer::Hang]);
    fixture.add_account("slow", "id-2", "SK.2").await;
    eventually("an attempt", async || (fixture.upstream.attempts("id-2") > 0).then_some(())).await;

    let mut connections = vec![];
    for _ in 0..4 {
        let stream = tokio::net::TcpStream::connect(setup.grpc).await.unwrap();
        let (send, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        connections.push(send);
    }
    // All calls are sent at once, so that they also wait for each other.
    let kinds = [("acme", "30m"), ("slow", "30m"), ("acme", "1n"), ("acme", "50S")];
    let calls = (0..CALLS).flat_map(|nth| {
        let send = connections[nth % connections.len()].clone();
        kinds.map(|(account, timeout)| {
            let (send, bearer) = (send.clone(), bearer.clone());
            tokio::spawn(async move { status_of(send, &bearer, account, timeout).await })
        })
    });
    let mut statuses = [(); 4].map(|()| BTreeMap::<u32, usize>::new());
    for (nth, call) in calls.collect::<Vec<_>>().into_iter().enumerate() {
        *statuses[nth % kinds.len()].entry(call.await.unwrap()).or_default() += 1;
    }
    let [short, waiting, expired, long] = statuses;
    let (ok, exceeded) = (u32::from(Code::Ok as u8), u32::from(Code::DeadlineExceeded as u8));
    assert!(short.keys().all(|code| [ok, exceeded].contains(code)), "{short:?}");
    assert_eq!(waiting, BTreeMap::from([(exceeded, CALLS)]));
    assert_eq!(
        expired,
        BTreeMap::from([(exceeded, CALLS)]),
        "the deadline passed before the call was begun"
    );
    assert_eq!(long, BTreeMap::from([(ok, CALLS)]));
    drop(connections);
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());

    let recorded: Vec<(String, i64)> = sqlx::query_as(
        "select outcome, sum(count)::bigint from audit_events where event = 'get_token'
         group by 1 order by 1",
    )
    .fetch_all(fixture.database.pool())
    .await
    .unwrap();
    let [(late, exceeded), (served, answered)] = &recorded[..] else { panic!("{recorded:?}") };
    assert_eq!([&**late, &**served], ["deadline_exceeded", "ok"]);
    assert_eq!(exceeded + answered, i64::try_from(4 * CALLS).unwrap(), "each is recorded once");
    // A call may be recorded as answered and yet get no token, if the record took too long.
    let tokens = CALLS + short.get(&ok).copied().unwrap_or_default();
    assert!(*answered >= i64::try_from(tokens).unwrap(), "{tokens} tokens, {answered} recorded");
}
