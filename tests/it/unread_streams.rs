//! Streams whose clients do not read them.

use prost::Message;
use token_broker::api::proto::{
    WatchTokensRequest, WatchTokensResponse, watch_tokens_response::Event,
};
use tonic::Code;

use crate::harness::{
    broker::{Fixture, code_and_reason},
    eventually,
    raw_http2::{
        DATA, END_HEADERS, END_STREAM, Frame, HEADERS, RawHttp2Client, WINDOW_UPDATE, call, frame,
        message,
    },
};

/// The stream of the client's only call.
const STREAM: u32 = 1;
/// The setting `SETTINGS_INITIAL_WINDOW_SIZE` with the value 0: the server may send no data at all.
const NO_WINDOW: [u8; 6] = [0, 4, 0, 0, 0, 0];

/// Returns how many tokens are in the received messages of the stream.
fn tokens(frames: &[Frame]) -> usize {
    let mut bytes: Vec<u8> = frames
        .iter()
        .filter(|(kind, _, stream, _)| (*kind, *stream) == (DATA, STREAM))
        .flat_map(|(.., payload)| payload.clone())
        .collect();
    let mut tokens = 0;
    while bytes.len() >= 5 {
        let length = u32::from_be_bytes(bytes[1..5].try_into().unwrap());
        let rest = bytes.split_off(5 + usize::try_from(length).unwrap());
        let event = WatchTokensResponse::decode(&bytes[5..]).unwrap().event;
        tokens += usize::from(matches!(event, Some(Event::Token(_))));
        bytes = rest;
    }
    tokens
}

/// Promises that a revocation is followed within seconds also by what is on its way: a client that reads nothing
/// finds no more than the one token that was buffered for it before, and the end of its stream.
#[tokio::test]
async fn a_revoked_client_that_did_not_read_finds_at_most_one_token_and_the_end() {
    const ACCOUNTS: usize = 5;
    for revocation in [
        "update caller_credentials set revoked_at = now()",
        "update callers set enabled = false",
        "delete from caller_credentials",
    ] {
        let fixture = Fixture::new().await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        let broker = fixture.start().await;
        let client = broker.client(&bearer).await;
        for n in 1..=ACCOUNTS {
            let name = format!("acme-{n}");
            fixture.add_account(&name, &format!("id-{n}"), &format!("SK.{n}")).await;
            fixture.wait_for_state(&name, "fresh").await;
            eventually("a token", async || client.get(&name).await.ok()).await;
        }
        let mut raw = RawHttp2Client::with_settings(broker.app.grpc_address, &NO_WINDOW).await;
        let authorization = format!("Bearer {}", bearer.expose());
        let headers = call("/token_broker.v1.TokenService/WatchTokens", Some(&authorization));
        let watch = WatchTokensRequest { accounts: vec!["*".into()] };
        let watch = message(&watch.encode_to_vec());
        let request = [
            frame(HEADERS, END_HEADERS, STREAM, &headers),
            frame(DATA, END_STREAM, STREAM, &watch),
        ];
        assert!(raw.send(&request.concat()).await);
        // One token is buffered, and the next one waits for its place.
        eventually("two pushed tokens", async || {
            let pushed = fixture.audit_events("event = 'token_pushed'").await;
            (pushed.len() >= 2).then_some(())
        })
        .await;
        fixture.database.sql(revocation).await;
        eventually("the revocation", async || {
            let refused = client.get("acme-1").await.err()?;
            let refused = code_and_reason(&refused);
            assert_eq!(refused, format!("{:?} CREDENTIAL_REFUSED", Code::Unauthenticated));
            Some(())
        })
        .await;
        // Now the client reads everything.
        let window = frame(WINDOW_UPDATE, 0, STREAM, &(1_u32 << 20).to_be_bytes());
        assert!(raw.send(&window).await);
        raw.wait_for("the end of the stream", |frames| {
            frames.iter().any(|(_, flags, stream, _)| *stream == STREAM && flags & END_STREAM != 0)
        })
        .await;
        let frames = raw.frames();
        let tokens = tokens(&frames);
        assert!(tokens <= 1, "{tokens} tokens after the revocation: {revocation}");
        let trailers = frames.iter().any(|(kind, flags, stream, _)| {
            (*kind, *stream) == (HEADERS, STREAM) && flags & END_STREAM != 0
        });
        assert!(trailers, "the stream ends with a status");
        broker.stop().await;
    }
}
