//! Clients that retry by themselves, with a retry policy of gRPC: they are told to retry only if the retry can still
//! be answered in their time, and so hear why their call is refused.

use std::{env, net::SocketAddr, time::Duration};

use token_broker::{
    app::AppConfig,
    crypto::bearer::Bearer,
    dev::simulator::{Answer, Faults},
};
use tokio::process::Command;
use tonic::Code;
use tonic_types::StatusExt;

use crate::harness::{
    broker::{Fixture, TestBroker},
    eventually, note_skipped_client_test,
    process::run,
    raw_grpc::RawCall,
    retrying_client::{Ended, RetryPolicy},
};

const POLICY: RetryPolicy = RetryPolicy {
    retryable: &[Code::Unavailable, Code::ResourceExhausted],
    initial_backoff: Duration::from_millis(100),
};
/// A deadline that no machine is too slow for.
const LONG: Duration = Duration::from_mins(1);

/// A broker whose callers get 5 s without a deadline. Its account `down` is next tried after two minutes.
struct Broken {
    fixture: Fixture,
    broker: TestBroker,
    bearer: Bearer,
}

impl Broken {
    async fn start() -> Self {
        let fixture = Fixture::new().await;
        let bearer = fixture.add_caller("demo", &["*"]).await;
        let pause = Answer::RateLimited { retry_after: Some("120".into()) };
        fixture.upstream.script("id-1", vec![pause; 9]);
        let mut config = fixture.config();
        config.settings.deadline_default = Duration::from_secs(5);
        let broker = fixture.start_with(config).await;
        fixture.add_account("down", "id-1", "SK.1").await;
        fixture.wait_for_state("down", "unreachable").await;
        Self { fixture, broker, bearer }
    }

    fn address(&self) -> SocketAddr {
        self.broker.app.grpc_address
    }

    /// Registers an account whose first attempt fails, and waits for that failure.
    async fn add_account_that_fails_once(&self, name: &str, n: usize) {
        let client_id = format!("id-{n}");
        self.fixture.upstream.script(&client_id, [Answer::Unavailable { status: 500 }]);
        self.fixture.add_account(name, &client_id, &format!("SK.{n}")).await;
        self.fixture.wait_for_state(name, "unreachable").await;
    }
}

#[tokio::test]
async fn a_client_with_a_retry_policy_hears_why_whatever_its_deadline() {
    let broken = Broken::start().await;
    let address = broken.address();
    let down = RawCall::get_token(&broken.bearer, "down");
    for limit in [None, Some(5), Some(20), Some(60)] {
        let ended = POLICY.call(&down, address, limit.map(Duration::from_secs)).await;
        let status = "Unavailable UPSTREAM_UNAVAILABLE".into();
        assert_eq!(ended, Ended { status, attempts: 1 }, "{limit:?}");
    }
    // Such a call can be answered after two minutes. The program asked for it.
    let patient = down.clone().header("grpc-timeout", "10M").send(address).await;
    assert!(patient.pushback().unwrap().unwrap() > 60_000, "{patient:?}");
    // The retry info says the true pause to programs that retry on their own.
    let refused = down.clone().header("grpc-timeout", "5S").send(address).await;
    assert_eq!(refused.header("grpc-retry-pushback-ms"), Some("-1"));
    let pause = refused.status().get_error_details().retry_info().unwrap().retry_delay.unwrap();
    assert!(pause > Duration::from_mins(1), "{pause:?}");

    // A pause that leaves time is told, and the retry gets the token.
    broken.add_account_that_fails_once("flaky", 2).await;
    let flaky = RawCall::get_token(&broken.bearer, "flaky");
    let ended = POLICY.call(&flaky, address, Some(LONG)).await;
    assert_eq!(ended.status, "Ok");

    // The same for the other statuses that a retry may help against.
    broken.fixture.database.sql("update callers set rate_limit = 1").await;
    let limited = eventually("a refusal", async || {
        let answer = flaky.clone().header("grpc-timeout", "400m").send(address).await;
        (!answer.is_ok()).then_some(answer)
    })
    .await;
    assert_eq!(limited.code_and_reason(), "ResourceExhausted CALLER_RATE");
    assert_eq!(limited.pushback(), Some(Ok(-1)));
    let ended = POLICY.call(&flaky, address, Some(LONG)).await;
    assert_eq!(ended.status, "Ok");
    broken.broker.stop().await;
}

#[tokio::test]
async fn a_call_that_is_shed_is_retried_only_if_its_deadline_permits_it() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    fixture.upstream.set_faults(Faults { answer: Answer::Hang, ..Faults::default() });
    let mut config = AppConfig { max_waiting_calls: 0, ..fixture.config() };
    config.settings.deadline_default = Duration::from_secs(5);
    let broker = fixture.start_with(config).await;
    fixture.add_account("slow", "id-1", "SK.1").await;
    eventually("an attempt", async || (fixture.upstream.attempts("id-1") > 0).then_some(())).await;
    for (timeout, pushback) in
        [(None, 1_000), (Some("30S"), 1_000), (Some("1S"), -1), (Some("1200m"), -1)]
    {
        let mut call = RawCall::get_token(&bearer, "slow");
        if let Some(timeout) = timeout {
            call = call.header("grpc-timeout", timeout);
        }
        let shed = call.send(broker.app.grpc_address).await;
        assert_eq!(shed.code_and_reason(), "ResourceExhausted OVERLOADED");
        assert_eq!(shed.pushback(), Some(Ok(pushback)), "{timeout:?}");
    }
    broker.stop().await;
}

/// The retry may come while the next attempt to issue is under way, and the upstream may not answer that in time
/// either.
#[tokio::test]
async fn a_call_that_waits_in_vain_after_a_failure_hears_why_the_last_attempt_failed() {
    let fixture = Fixture::new().await;
    let bearer = fixture.add_caller("demo", &["*"]).await;
    let first = Answer::Unavailable { status: 500 };
    fixture.upstream.script("id-1", [first, Answer::Hang, Answer::Hang]);
    let broker = fixture.start().await;
    fixture.add_account("slow", "id-1", "SK.1").await;
    eventually("the next attempt", async || (fixture.upstream.attempts("id-1") > 1).then_some(()))
        .await;
    let call = RawCall::get_token(&bearer, "slow").header("grpc-timeout", "2S");
    let answer = call.send(broker.app.grpc_address).await;
    assert_eq!(answer.code_and_reason(), "Unavailable UPSTREAM_UNAVAILABLE");
    assert_eq!(answer.pushback(), Some(Ok(-1)));
    broker.stop().await;
}

/// Prints how calls end for a program that uses grpcio, each as `deadline account status reason`.
const PYTHON_CLIENT: &str = r#"
import json, sys, grpc
address, bearer = sys.argv[1:3]
policy = {"maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2,
          "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]}
config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
def call(account, deadline, compression):
    options = [("grpc.service_config", config), ("grpc.enable_retries", 1)]
    with grpc.insecure_channel(address, options=options, compression=compression) as channel:
        get = channel.unary_unary("/token_broker.v1.TokenService/GetToken")
        name = account.encode()
        message = b"\x0a" + bytes([len(name)]) + name
        try:
            get(message, timeout=deadline, metadata=[("authorization", "Bearer " + bearer)])
            return "OK -"
        except grpc.RpcError as error:
            details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
            reasons = [it for it in ("UPSTREAM_UNAVAILABLE", "ENCODING_NOT_SUPPORTED") if it.encode() in details]
            return error.code().name + " " + (reasons or ["-"])[0]
for account, deadline, compression in [
    ("down", 5, None), ("down", 20, None), ("down", None, None), ("flaky", 60, None),
    ("flaky", 60, grpc.Compression.Gzip), ("flaky", 60, grpc.Compression.Deflate),
]:
    print(account, deadline, compression and compression.name, call(account, deadline, compression))
"#;

/// The same with a client that others wrote. `TOKEN_BROKER_TEST_PYTHON` names a Python that has grpcio.
#[tokio::test]
async fn grpcio_hears_why_and_may_compress() {
    let python = env::var("TOKEN_BROKER_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let has_grpcio = Command::new(&python).args(["-c", "import grpc"]).output().await;
    if !has_grpcio.is_ok_and(|output| output.status.success()) {
        note_skipped_client_test(
            "retries and compression of grpcio: no Python with grpcio is installed",
        );
        return;
    }
    let broken = Broken::start().await;
    broken.add_account_that_fails_once("flaky", 2).await;
    let mut command = Command::new(python);
    let address = broken.address().to_string();
    command.args(["-c", PYTHON_CLIENT, &address, broken.bearer.expose()]);
    let printed = run(command, "").await.ok();
    assert_eq!(
        printed.lines().collect::<Vec<_>>(),
        [
            "down 5 None UNAVAILABLE UPSTREAM_UNAVAILABLE",
            "down 20 None UNAVAILABLE UPSTREAM_UNAVAILABLE",
            "down None None UNAVAILABLE UPSTREAM_UNAVAILABLE",
            "flaky 60 None OK -",
            "flaky 60 Gzip OK -",
            "flaky 60 Deflate UNIMPLEMENTED ENCODING_NOT_SUPPORTED",
        ]
    );
    broken.broker.stop().await;
}
