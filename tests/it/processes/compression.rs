//! Compressed requests: gzip is read within the limit of a message, everything else is refused with a reason and
//! recorded, and no answer is compressed.

use std::io::Write;

use flate2::{Compression, write::GzEncoder};
use futures_util::future::join_all;
use nix::sys::signal::Signal;
use prost::Message;
use token_broker::{
    api::proto::{
        GetTokenRequest, GetTokenResponse, ListAccountsRequest, ReportRejectedTokenRequest,
    },
    crypto::bearer::Bearer,
};
use tonic_health::pb::HealthCheckRequest;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_request::MessageRequest,
};

use crate::harness::{
    broker::Fixture,
    process::BrokerSetup,
    raw_grpc::{GET_TOKEN, RawAnswer, RawCall},
    raw_http2,
};

const HEALTH: &str = "/grpc.health.v1.Health/Check";
/// Both versions of reflection, whose messages are the same.
const REFLECTION: [&str; 2] = [
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];
/// Methods to which the messages that cannot be read are sent.
const METHODS: [&str; 3] = ["GetToken", "WatchTokens", "ListAccounts"];
/// The largest message, in bytes.
const LIMIT: usize = 64 * 1024;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(vec![], Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Returns a frame with this flag, which says whether the message is compressed.
fn frame(flag: u8, message: &[u8]) -> Vec<u8> {
    let mut frame = raw_http2::message(message);
    frame[0] = flag;
    frame
}

/// Returns the frame of a compressed message.
fn compressed(message: &impl Message) -> Vec<u8> {
    frame(1, &gzip(&message.encode_to_vec()))
}

fn acme() -> GetTokenRequest {
    GetTokenRequest { account: "acme".into(), ..Default::default() }
}

/// Returns a valid `GetToken` message of `size` bytes, most of which are an unknown field of zeros.
fn message_of(size: usize) -> Vec<u8> {
    let mut message = acme().encode_to_vec();
    // The key of field 15 with the wire type of bytes, and a length of three bytes.
    let zeros = size - message.len() - 4;
    let length = [zeros & 0x7f | 0x80, zeros >> 7 & 0x7f | 0x80, zeros >> 14];
    message.push(0x7a);
    message.extend(length.map(|byte| u8::try_from(byte).unwrap()));
    message.resize(size, 0);
    message
}

/// The bytes of a message in the answer, which must not be compressed.
fn answered(answer: &RawAnswer) -> &[u8] {
    assert!(answer.is_ok(), "{answer:?}");
    assert!([None, Some("identity")].contains(&answer.header("grpc-encoding")), "{answer:?}");
    assert_eq!(answer.data.first(), Some(&0), "the flag of the first message: {answer:?}");
    &answer.data[5..]
}

/// A way to send a message that is refused.
struct Row {
    what: &'static str,
    encoding: Option<&'static str>,
    body: Vec<u8>,
    /// The code and the reason.
    refused: &'static str,
}

const UNSUPPORTED: &str = "Unimplemented ENCODING_NOT_SUPPORTED";
const MALFORMED: &str = "Internal MESSAGE_MALFORMED";
const TOO_LARGE: &str = "OutOfRange MESSAGE_TOO_LARGE";
const BOMB: &str = "ResourceExhausted DECOMPRESSED_TOO_LARGE";

fn rows() -> Vec<Row> {
    let good = acme().encode_to_vec();
    let mut damaged = gzip(&good);
    let checksum = damaged.len() - 8;
    damaged[checksum] ^= 1;
    let truncated = gzip(&good)[..12].to_vec();
    let mut partial = frame(0, &good);
    partial.pop();
    let rows = [
        ("deflate", Some("deflate"), frame(1, &gzip(&good)), UNSUPPORTED),
        ("zstd", Some("zstd"), frame(1, &gzip(&good)), UNSUPPORTED),
        ("unknown", Some("lzma"), frame(0, &good), UNSUPPORTED),
        ("upper case", Some("GZIP"), frame(1, &gzip(&good)), UNSUPPORTED),
        ("two", Some("gzip, gzip"), frame(1, &gzip(&good)), UNSUPPORTED),
        ("empty", Some(""), frame(0, &good), UNSUPPORTED),
        ("compressed without a header", None, frame(1, &gzip(&good)), MALFORMED),
        ("compressed identity", Some("identity"), frame(1, &gzip(&good)), MALFORMED),
        ("another flag", Some("gzip"), frame(2, &gzip(&good)), MALFORMED),
        ("no gzip", Some("gzip"), frame(1, &good), MALFORMED),
        ("nothing", Some("gzip"), frame(1, &[]), MALFORMED),
        ("truncated gzip", Some("gzip"), frame(1, &truncated), MALFORMED),
        ("wrong checksum", Some("gzip"), frame(1, &damaged), MALFORMED),
        ("no protobuf in gzip", Some("gzip"), frame(1, &gzip(b"\xff\xff")), MALFORMED),
        ("no protobuf", None, frame(0, b"\xff\xff"), MALFORMED),
        ("part of a message", None, partial, MALFORMED),
        ("no message", None, vec![], MALFORMED),
        ("two messages", None, [frame(0, &good), frame(0, &good)].concat(), MALFORMED),
        ("a byte after the message", None, [frame(0, &good), vec![0]].concat(), MALFORMED),
        (
            "bytes after gzip",
            Some("gzip"),
            frame(1, &[gzip(&good), b"xx".to_vec()].concat()),
            MALFORMED,
        ),
        ("gzip twice", Some("gzip"), frame(1, &[gzip(&good), gzip(&good)].concat()), MALFORMED),
        ("too large", None, frame(0, &message_of(LIMIT + 1)), TOO_LARGE),
        ("too large, compressed", Some("gzip"), frame(1, &vec![0; LIMIT + 1]), TOO_LARGE),
        ("a byte too large", Some("gzip"), frame(1, &gzip(&message_of(LIMIT + 1))), BOMB),
        ("bomb", Some("gzip"), frame(1, &gzip(&vec![0; 2 << 20])), BOMB),
    ];
    let row = |(what, encoding, body, refused)| Row { what, encoding, body, refused };
    rows.map(row).into()
}

impl Row {
    fn call(&self, path: &str) -> RawCall {
        let call = RawCall::new(path, self.body.clone());
        match self.encoding {
            Some(encoding) => call.header("grpc-encoding", encoding),
            None => call,
        }
    }
}

fn path_of(method: &str) -> String {
    format!("/token_broker.v1.TokenService/{method}")
}

/// Checks that every method reads gzip. Clients say that they would read it too, but get plain answers.
async fn assert_gzip_is_read(setup: &BrokerSetup, bearer: &Bearer) {
    let report =
        ReportRejectedTokenRequest { account: "acme".into(), generation: 1, ..Default::default() };
    let list_services = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    for (path, body) in [
        (GET_TOKEN, compressed(&acme())),
        // The flag may say that this message is not compressed, whatever the header says.
        (GET_TOKEN, frame(0, &acme().encode_to_vec())),
        (GET_TOKEN, frame(1, &gzip(&message_of(LIMIT)))),
        (&path_of("ListAccounts"), compressed(&ListAccountsRequest::default())),
        (&path_of("ReportRejectedToken"), compressed(&report)),
        (HEALTH, compressed(&HealthCheckRequest::default())),
        (REFLECTION[0], compressed(&list_services)),
        (REFLECTION[1], compressed(&list_services)),
    ] {
        let call = RawCall::new(path, body)
            .bearer(bearer)
            .header("grpc-encoding", "gzip")
            .header("grpc-accept-encoding", "gzip,deflate,identity");
        let answer = call.send(setup.grpc).await;
        let message = answered(&answer);
        if path == GET_TOKEN {
            assert!(!GetTokenResponse::decode(message).unwrap().access_token.is_empty());
        }
    }
}

/// Checks the answers to messages that cannot be read.
async fn assert_others_are_refused(setup: &BrokerSetup, bearer: &Bearer) {
    for path in METHODS.map(path_of) {
        for row in rows() {
            let (what, refused) = (row.what, row.refused);
            let answer = row.call(&path).bearer(bearer).send(setup.grpc).await;
            assert_eq!(answer.code_and_reason(), refused, "{path}: {what}: {answer:?}");
            let accepted = answer.header("grpc-accept-encoding");
            assert_eq!(accepted, (refused == UNSUPPORTED).then_some("gzip,identity"), "{what}");
            assert_eq!(answer.pushback(), (refused == BOMB).then_some(Ok(-1)), "{what}");
        }
    }
    for row in rows() {
        let (what, refused) = (row.what, row.refused);
        let answer = row.call(HEALTH).send(setup.grpc).await;
        assert_eq!(answer.code_and_reason(), refused, "health: {what}: {answer:?}");
        // A stream of requests may have more messages and end at any time, and reflection does not say which rule a message violates.
        let permits = [
            "part of a message",
            "no message",
            "two messages",
            "a byte after the message",
            "bytes after gzip",
            "gzip twice",
        ];
        if !permits.contains(&what) {
            let refused = if refused == UNSUPPORTED { refused } else { MALFORMED };
            for path in REFLECTION {
                let answer = row.call(path).send(setup.grpc).await;
                assert_eq!(answer.code_and_reason(), refused, "{path}: {what}: {answer:?}");
            }
        }
    }
    let unknown = RawCall::new(&path_of("Other"), vec![]).bearer(bearer).send(setup.grpc).await;
    assert_eq!(unknown.code_and_reason(), "Unimplemented UNKNOWN_METHOD");
    for path in
        ["/x.Y/Z", "/token_broker.v1.tokenservice/GetToken", "/", "/token_broker.v1.TokenService"]
    {
        let unknown = RawCall::new(path, vec![]).send(setup.grpc).await;
        assert_eq!(unknown.code_and_reason(), "Unimplemented UNKNOWN_METHOD", "{path}");
        assert_eq!(unknown.http_status, 200, "{path}");
    }
    // A stranger hears only that it is one.
    let stranger = rows()[0].call(GET_TOKEN).send(setup.grpc).await;
    assert_eq!(stranger.code_and_reason(), "Unauthenticated CREDENTIAL_MISSING");
}

#[tokio::test(flavor = "multi_thread")]
async fn gzip_is_read_and_any_other_encoding_is_refused_with_a_reason_and_recorded() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["acme"]).await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let mut serve = setup.serve().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.wait_for_state("acme", "fresh").await;
    assert_gzip_is_read(&setup, &bearer).await;
    assert_others_are_refused(&setup, &bearer).await;
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());

    let mut recorded: Vec<String> = sqlx::query_scalar(
        "select concat_ws(' ', event, outcome, reason, sum(count)) from audit_events
         where caller = 'demo' and outcome <> 'ok' group by event, outcome, reason",
    )
    .fetch_all(fixture.database.pool())
    .await
    .unwrap();
    let mut expected = vec!["unknown_method unimplemented UNKNOWN_METHOD 1".to_owned()];
    for event in ["get_token", "list_accounts", "watch_tokens"] {
        for refused in [
            "internal MESSAGE_MALFORMED 15",
            "out_of_range MESSAGE_TOO_LARGE 2",
            "resource_exhausted DECOMPRESSED_TOO_LARGE 2",
            "unimplemented ENCODING_NOT_SUPPORTED 6",
        ] {
            expected.push(format!("{event} {refused}"));
        }
    }
    expected.sort();
    recorded.sort();
    assert_eq!(recorded, expected);
}

/// As other servers do, so that another client of HTTP/2 does not take the answer for a success.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_not_grpc_get_no_token_and_an_http_status() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["acme"]).await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let mut serve = setup.serve().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    fixture.wait_for_state("acme", "fresh").await;
    let health = || RawCall::new(HEALTH, frame(0, &HealthCheckRequest::default().encode_to_vec()));
    let token = || RawCall::get_token(&bearer, "acme");
    let unknown = || RawCall::new("/x.Y/Z", vec![]);
    let content_type =
        |call: RawCall, value: &str| call.without("content-type").header("content-type", value);
    for call in [&health as &dyn Fn() -> RawCall, &token] {
        for grpc in ["application/grpc+proto", "application/grpc;charset=utf-8", "Application/GRPC"]
        {
            let answer = content_type(call(), grpc).send(setup.grpc).await;
            assert!(answer.is_ok() && answer.http_status == 200, "{grpc}: {answer:?}");
        }
        // Proxies remove it.
        let answer = call().without("te").send(setup.grpc).await;
        assert!(answer.is_ok() && answer.http_status == 200, "{answer:?}");
    }
    for call in [&health as &dyn Fn() -> RawCall, &token, &unknown] {
        let others = ["text/plain", "application/json", "application/grpc-web+proto", ""];
        let mut refused: Vec<_> =
            others.iter().map(|other| (content_type(call(), other), 415)).collect();
        refused.push((call().without("content-type"), 415));
        refused.extend(["GET", "OPTIONS", "PUT"].map(|method| (call().method(method), 405)));
        for (call, http_status) in refused {
            let answer = call.send(setup.grpc).await;
            assert_eq!(answer.code_and_reason(), "Internal NOT_GRPC", "{call:?}");
            assert_eq!(answer.http_status, http_status, "{call:?}");
            assert!(answer.data.is_empty(), "{call:?}");
        }
    }
    let stranger = content_type(RawCall::new(GET_TOKEN, vec![]), "text/plain");
    let stranger = stranger.send(setup.grpc).await;
    assert_eq!(stranger.code_and_reason(), "Unauthenticated CREDENTIAL_MISSING");
    assert_eq!(stranger.http_status, 415);
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
    let recorded: i64 = sqlx::query_scalar(
        "select coalesce(sum(count), 0)::bigint from audit_events
         where event = 'get_token' and caller = 'demo' and outcome = 'internal' and reason = 'NOT_GRPC'",
    )
    .fetch_one(fixture.database.pool())
    .await
    .unwrap();
    assert_eq!(recorded, 8);
}

/// A message is decompressed no further than to the limit. Without it, each of these would take 64 MiB.
#[tokio::test(flavor = "multi_thread")]
async fn bombs_take_no_memory() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["acme"]).await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let serve = setup.serve().await;
    // 1,000 : 1, and as large as a message may be.
    let zeros = gzip(&vec![0; 64 << 20]);
    assert!((60_000..LIMIT).contains(&zeros.len()), "{}", zeros.len());
    let bomb =
        RawCall::new(GET_TOKEN, frame(1, &zeros)).bearer(&bearer).header("grpc-encoding", "gzip");
    let plain = RawCall::get_token(&bearer, "other");
    // What connections and calls need anyway.
    join_all((0..50).map(|_| plain.send(setup.grpc))).await;
    let before = serve.peak_memory();
    for _ in 0..4 {
        for answer in join_all((0..50).map(|_| bomb.send(setup.grpc))).await {
            let refused = "ResourceExhausted DECOMPRESSED_TOO_LARGE";
            assert_eq!(answer.code_and_reason(), refused);
        }
    }
    let growth = serve.peak_memory() - before;
    assert!(growth < 40 * 1024, "{growth} KiB");
    serve.kill().await;
}
