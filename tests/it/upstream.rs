//! The client of the upstream against a simulated upstream or a raw socket: it connects to the fixed
//! host only, and an invalid response never yields a token. The end tests the simulator itself. No test
//! needs a database.

use std::{
    env,
    io::{self, Write as _},
    net::{IpAddr, SocketAddr, TcpListener as StdListener},
    process::Command,
    time::Duration,
};

use chrono::{DateTime, TimeDelta};
use token_broker::{
    dev::simulator::{Answer, Faults, SimulatedAccount, Simulator, SimulatorOptions},
    domain::{
        clock::{Clock, ManualClock},
        refresh_state::FailureClass,
        secret::ClientSecret,
        token::IssuedToken,
    },
    upstream::{IssueError, MAX_BODY, Target, UpstreamClient, UpstreamSettings},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
};

const ID: &str = "myMemberId";
const SECRET: &str = "SK.canary-secret";
/// A timeout that even a slow machine does not reach when there is a response.
const LONG_TIMEOUT: Duration = Duration::from_secs(20);
/// A timeout for responses that never arrive.
const SHORT_TIMEOUT: Duration = Duration::from_millis(300);
/// The environment variable from which the test in a child process takes the upstream's URL.
const CHILD_UPSTREAM: &str = "TEST_UPSTREAM_OF_CHILD";

fn client_with(base_url: &str, timeout: Duration, clock: Clock) -> UpstreamClient {
    let target = base_url.parse().unwrap();
    UpstreamClient::new(
        UpstreamSettings { target, bind_address: None, proxy: None, timeout },
        clock,
    )
    .unwrap()
}

fn client(base_url: &str) -> UpstreamClient {
    client_with(base_url, LONG_TIMEOUT, Clock::System)
}

async fn issue(client: &UpstreamClient) -> Result<IssuedToken, IssueError> {
    client.issue(&ID.parse().unwrap(), &ClientSecret::new(SECRET).unwrap()).await
}

fn options() -> SimulatorOptions {
    let account = SimulatedAccount {
        client_id: ID.to_owned(),
        client_secret: SECRET.to_owned(),
        locked: false,
    };
    SimulatorOptions { accounts: vec![account], ..SimulatorOptions::default() }
}

async fn simulator() -> Simulator {
    Simulator::start_on_loopback(options()).await.unwrap()
}

/// A listener to which no connection must be made.
struct UnusedListener(StdListener);

impl UnusedListener {
    fn bind() -> Self {
        let listener = StdListener::bind(("127.0.0.1", 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    fn url(&self) -> String {
        format!("http://{}", self.0.local_addr().unwrap())
    }

    /// Whether nobody has connected. A connection would be in the listener's queue before the
    /// client's call has returned.
    fn is_unused(&self) -> bool {
        self.0.accept().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }
}

/// Starts an upstream that answers one request with the given bytes and then closes the connection.
/// Returns its URL.
async fn serve_once(response: Vec<u8>) -> String {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_request(&mut stream).await;
        // This fails if the client has closed the connection before the end of the response.
        let _ = stream.write_all(&response).await;
    });
    format!("http://{address}")
}

/// Reads a request to the end of its body. With unread bytes, closing the connection would reset it.
async fn read_request(stream: &mut TcpStream) -> Vec<u8> {
    let mut request = Vec::new();
    loop {
        let mut part = [0; 1024];
        let n = stream.read(&mut part).await.unwrap();
        request.extend_from_slice(&part[..n]);
        if n == 0 || request.ends_with(b"}") {
            return request;
        }
    }
}

/// Returns the bytes of an HTTP response.
fn http(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

// Requests that succeed.

#[tokio::test]
async fn an_issued_token_has_its_expiry_and_its_allowed_address() {
    let simulator = simulator().await;
    let before = simulator.now();
    let issued = issue(&client(&simulator.base_url())).await.unwrap();
    assert_eq!(simulator.live_token(ID).as_deref(), Some(issued.access_token.expose()));
    assert_eq!(issued.allowed_ip.as_deref(), Some("127.0.0.1"));
    // The claims have no milliseconds, and `Date` has whole seconds.
    let hour = TimeDelta::hours(1);
    assert!(issued.expires_at > before + hour - TimeDelta::seconds(2));
    assert!(issued.expires_at <= simulator.now() + hour);
    assert!(issued.skew_ms.unwrap() <= 0);
}

#[tokio::test]
async fn tokens_issued_in_the_same_second_differ_and_the_newer_revokes_the_older() {
    let clock = ManualClock::new(DateTime::from_timestamp_millis(1_717_135_001_944).unwrap());
    let clock = Clock::Manual(clock);
    let options = SimulatorOptions { clock: clock.clone(), ..options() };
    let simulator = Simulator::start_on_loopback(options).await.unwrap();
    let client = client_with(&simulator.base_url(), LONG_TIMEOUT, clock);
    let first = issue(&client).await.unwrap();
    let second = issue(&client).await.unwrap();
    assert!(!simulator.is_live(first.access_token.expose()));
    assert!(simulator.is_live(second.access_token.expose()));

    simulator.set_faults(Faults { new_token_ends_older: false, ..simulator.faults() });
    let third = issue(&client).await.unwrap();
    assert!(simulator.is_live(second.access_token.expose()));
    assert!(simulator.is_live(third.access_token.expose()));
    assert_eq!((simulator.issued(ID), simulator.requests()), (3, 3));
}

#[tokio::test]
async fn the_request_has_the_required_headers_and_fields_and_no_others() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("http://{}/api/1.1/", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        String::from_utf8(read_request(&mut stream).await).unwrap()
    });
    issue(&client(&url)).await.unwrap_err();
    let request = server.await.unwrap();
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("POST /api/1.1/token HTTP/1.1\r\n"), "{head}");
    assert_eq!(body, format!(r#"{{"clientId":"{ID}","clientSecret":"{SECRET}"}}"#));
    let mut names: Vec<_> =
        head.lines().skip(1).map(|line| line.split_once(':').unwrap().0.to_lowercase()).collect();
    names.sort();
    let expected = "accept accept-encoding connection content-length content-type host user-agent";
    assert_eq!(names.join(" "), expected);
}

#[tokio::test]
async fn an_expiry_may_be_a_json_number() {
    let expiry = 4_000_000_000_000_i64;
    let body = format!(r#"{{"expiresIn":{expiry},"accessToken":"opaque"}}"#);
    let clock = ManualClock::new(DateTime::from_timestamp_millis(expiry - 60_000).unwrap());
    let url = serve_once(http("200 OK", "", body.as_bytes())).await;
    let issued = issue(&client_with(&url, LONG_TIMEOUT, Clock::Manual(clock))).await.unwrap();
    assert_eq!(issued.expires_at.timestamp_millis(), expiry);
    assert_eq!((issued.allowed_ip, issued.skew_ms), (None, None));
}

#[tokio::test]
async fn a_clock_skew_of_the_upstream_does_not_change_the_life_that_its_answer_states() {
    let clock = ManualClock::new(DateTime::from_timestamp(1_717_135_001, 0).unwrap());
    let clock = Clock::Manual(clock);
    let simulator =
        Simulator::start_on_loopback(SimulatorOptions { clock: clock.clone(), ..options() })
            .await
            .unwrap();
    let client = client_with(&simulator.base_url(), LONG_TIMEOUT, clock.clone());
    // `Date` counts whole seconds, so a lead or a lag may be a second more than it shows.
    for (skew, life) in [(600, 3_599), (-600, 3_599), (0, 3_600)] {
        simulator.set_faults(Faults { clock_skew_seconds: skew, ..Faults::default() });
        let issued = issue(&client).await.unwrap();
        assert_eq!(issued.skew_ms, Some(skew * 1_000));
        assert_eq!(issued.expires_at, clock.now() + TimeDelta::seconds(life), "skew {skew}");
    }
}

#[tokio::test]
async fn localhost_is_accepted_as_an_upstream() {
    let simulator = simulator().await;
    let url = format!("http://localhost:{}/api/1.1", simulator.address().port());
    assert!(issue(&client(&url)).await.is_ok());
}

#[tokio::test]
async fn the_request_comes_from_the_configured_bind_address() {
    let simulator = simulator().await;
    let bind_address: IpAddr = "127.0.0.2".parse().unwrap();
    let settings = UpstreamSettings {
        target: simulator.base_url().parse().unwrap(),
        bind_address: Some(bind_address),
        proxy: None,
        timeout: LONG_TIMEOUT,
    };
    let issued = issue(&UpstreamClient::new(settings, Clock::System).unwrap()).await.unwrap();
    assert_eq!(issued.allowed_ip.as_deref(), Some("127.0.0.2"));
    assert_eq!(simulator.last_peer(), Some(bind_address));
}

// The broker connects to no host but the configured upstream, which must be a known one or loopback.

#[test]
fn an_unknown_host_is_rejected() {
    for host in ["http://192.0.2.1/api/1.1", "https://api.rcsbizcenter.com", "http://example.com"] {
        assert!(host.parse::<Target>().is_err(), "{host}");
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let redirect_target = UnusedListener::bind();
    for status in ["301", "302", "303", "307", "308"] {
        let location = format!("location: {}/token\r\n", redirect_target.url());
        let url = serve_once(http(&format!("{status} Elsewhere"), &location, b"")).await;
        let error = issue(&client(&url)).await.unwrap_err();
        assert_eq!(error.class, FailureClass::Malformed, "{status}");
        assert!(redirect_target.is_unused(), "{status}");
    }
}

#[test]
fn proxy_variables_in_the_environment_are_ignored() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let simulator = runtime.block_on(simulator());
    let proxy = UnusedListener::bind();
    // Environment variables can only be set safely for a new process. So this test runs its own
    // executable again, with a single test.
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", "upstream::a_token_is_issued_in_an_environment_with_proxy_variables"]);
    child.env(CHILD_UPSTREAM, simulator.base_url());
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        child.env(name, proxy.url()).env(name.to_lowercase(), proxy.url());
    }
    // Some clients ignore HTTP_PROXY if REQUEST_METHOD is set, and all do if NO_PROXY is set.
    for name in ["NO_PROXY", "no_proxy", "REQUEST_METHOD"] {
        child.env_remove(name);
    }
    let output = child.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(simulator.issued(ID), 1);
    assert!(proxy.is_unused());
}

/// The test above runs this one in a child process and passes the URL of its upstream. Run on its own,
/// it uses an upstream of its own.
#[tokio::test]
async fn a_token_is_issued_in_an_environment_with_proxy_variables() {
    let simulator = simulator().await;
    let upstream = env::var(CHILD_UPSTREAM).unwrap_or_else(|_| simulator.base_url());
    issue(&client(&upstream)).await.unwrap();
}

#[tokio::test]
async fn a_configured_proxy_is_used() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let proxy = format!("http://{}", listener.local_addr().unwrap());
    let upstream = UnusedListener::bind();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        String::from_utf8(read_request(&mut stream).await).unwrap()
    });
    let settings = UpstreamSettings {
        target: upstream.url().parse().unwrap(),
        bind_address: None,
        proxy: Some(proxy.parse().unwrap()),
        timeout: LONG_TIMEOUT,
    };
    issue(&UpstreamClient::new(settings, Clock::System).unwrap()).await.unwrap_err();
    let expected = format!("POST {}/token HTTP/1.1\r\n", upstream.url());
    assert!(server.await.unwrap().starts_with(&expected));
    assert!(upstream.is_unused());
}

// No invalid response yields a token, and each failure is classified.

#[tokio::test]
async fn each_fault_of_the_upstream_has_its_failure_class() {
    use FailureClass::{EgressRejected, Malformed, RateLimited, Rejected, Unreachable};
    let simulator = simulator().await;
    let (long_timeout, short_timeout) = (
        client_with(&simulator.base_url(), LONG_TIMEOUT, Clock::System),
        client_with(&simulator.base_url(), SHORT_TIMEOUT, Clock::System),
    );
    let refuse = |status, code: &str| Answer::Refuse { status, code: code.to_owned() };
    // The answer, its failure class, whether the client reports that a token may have been issued, and
    // whether one was issued.
    for (answer, class, may_have_issued, issued) in [
        (Answer::Html, Malformed, true, false),
        (Answer::Empty, Malformed, true, false),
        (Answer::TruncatedJson, Malformed, true, true),
        (Answer::BrokenOff, Malformed, true, true),
        (Answer::PastExpiry, Malformed, true, true),
        (Answer::FarFutureExpiry, Malformed, true, true),
        (Answer::ExpiresInDuration, Malformed, true, true),
        (Answer::HugeBody, Malformed, true, true),
        (Answer::Redirect { to: "http://127.0.0.1:9/".into() }, Malformed, true, false),
        (Answer::SlowDrip, Unreachable, true, true),
        (Answer::Hang, Unreachable, true, false),
        (Answer::IssueThenHang, Unreachable, true, true),
        (Answer::Reset, Unreachable, true, false),
        (Answer::IssueThenReset, Unreachable, true, true),
        (Answer::Unavailable { status: 503 }, Unreachable, true, false),
        (Answer::Unavailable { status: 403 }, EgressRejected, true, false),
        (Answer::RateLimited { retry_after: None }, RateLimited, false, false),
        (refuse(401, "61005"), Rejected, false, false),
        (refuse(401, "61006"), Rejected, false, false),
        (refuse(400, "64304"), Rejected, false, false),
        (refuse(401, "61099"), EgressRejected, false, false),
    ] {
        let times_out = matches!(answer, Answer::SlowDrip | Answer::Hang | Answer::IssueThenHang);
        let client = if times_out { &short_timeout } else { &long_timeout };
        simulator.script(ID, [answer.clone()]);
        let before = simulator.issued(ID);
        let error = issue(client).await.unwrap_err();
        assert_eq!((error.class, error.may_have_issued), (class, may_have_issued), "{answer:?}");
        assert_eq!(simulator.issued(ID) - before, u64::from(issued), "{answer:?}");
        assert!(!format!("{error} {error:?}").contains("canary"), "{answer:?}");
    }
    assert!(issue(&long_timeout).await.is_ok());
}

#[tokio::test]
async fn invalid_raw_responses_yield_no_token() {
    use FailureClass::{Malformed, RateLimited, Unreachable};
    let good = br#"{"expiresIn":"4000000000000","accessToken":"canary"}"#;
    let oversize = [&good[..good.len() - 1], &b" ".repeat(MAX_BODY)[..], b"}"].concat();
    let chunked = |body: &str| {
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        format!("{head}{body}").into_bytes()
    };
    let clock = ManualClock::new(DateTime::from_timestamp(3_999_996_400, 0).unwrap());
    for (case, response, class) in [
        ("nothing", vec![], Unreachable),
        ("not HTTP", b"canary\r\n\r\n".to_vec(), Malformed),
        ("half of the response head", b"HTTP/1.1 200 OK\r\ncontent-le".to_vec(), Unreachable),
        ("a token with a redirect", http("302 Found", "", good), Malformed),
        ("a token with 500", http("500 Oops", "", good), Unreachable),
        ("a body that is too long", http("200 OK", "", &oversize), Malformed),
        (
            "a body shorter than its content-length",
            b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{".into(),
            Malformed,
        ),
        ("chunks without a last chunk", chunked("5\r\n{\"exp\r\n"), Malformed),
        ("an invalid chunk size", chunked("zz\r\n"), Malformed),
        (
            "a 429 with an incomplete body",
            b"HTTP/1.1 429 No\r\ncontent-length: 99\r\n\r\n{".into(),
            RateLimited,
        ),
    ] {
        let url = serve_once(response).await;
        let client = client_with(&url, LONG_TIMEOUT, Clock::Manual(clock.clone()));
        let error = issue(&client).await.unwrap_err();
        assert_eq!(error.class, class, "{case}");
        assert!(!format!("{error} {error:?}").contains("canary"), "{case}");
    }
    // The same token in a valid response is accepted.
    let url = serve_once(http("200 OK", "", good)).await;
    assert!(issue(&client_with(&url, LONG_TIMEOUT, Clock::Manual(clock))).await.is_ok());
}

/// Heads that are not valid HTTP. What they answer is not known, but they are answers: nobody has to search for a
/// connection that was lost.
#[tokio::test]
async fn an_answer_whose_head_is_not_valid_http_is_told_from_a_lost_connection() {
    let (unreadable, lost) = (
        "the head of the upstream's answer is not valid HTTP",
        "the upstream ended the connection without an answer",
    );
    let long = format!("HTTP/1.1 401 No\r\nx: {}\r\n", "canary".repeat(100_000));
    for (case, head, says) in [
        ("in chunks of HTTP/1.0", "HTTP/1.0 401 No\r\ntransfer-encoding: chunked\r\n", unreadable),
        ("two spaces", "HTTP/1.1  401  No\r\n", unreadable),
        ("a tab", "HTTP/1.1\t401\tNo\r\n", unreadable),
        ("an unknown version", "HTTP/1.2 401 No\r\n", unreadable),
        ("another protocol", "ICY 401 No\r\n", unreadable),
        ("HTTP/0.9", "{\"error\":{\"code\":\"canary\"}}", unreadable),
        ("a control character in the reason", "HTTP/1.1 401 canary\u{1}\r\n", unreadable),
        ("a length with a sign", "HTTP/1.1 401 No\r\ncontent-length: +2\r\n", unreadable),
        ("a length in letters", "HTTP/1.1 401 No\r\ncontent-length: canary\r\n", unreadable),
        ("a negative length", "HTTP/1.1 401 No\r\ncontent-length: -1\r\n", unreadable),
        (
            "two lengths",
            "HTTP/1.1 401 No\r\ncontent-length: 2\r\ncontent-length: 3\r\n",
            unreadable,
        ),
        ("a mark before it", "\u{feff}HTTP/1.1 401 No\r\n", unreadable),
        ("a status of two digits", "HTTP/1.1 40 No\r\n", unreadable),
        ("a status of four digits", "HTTP/1.1 1000 No\r\n", unreadable),
        ("a head that is too long", &long, unreadable),
        ("half of a head", "HTTP/1.1 401 No", lost),
        ("an interim answer only", "HTTP/1.1 100 Continue\r\n", lost),
        ("nothing", "", lost),
    ] {
        let rest = if says == unreadable {
            "\r\n{}"
        } else if head.ends_with('\n') {
            "\r\n"
        } else {
            ""
        };
        let url = serve_once(format!("{head}{rest}").into_bytes()).await;
        let error = issue(&client(&url)).await.unwrap_err();
        assert_eq!(error.message, says, "{case}");
        let class =
            if says == unreadable { FailureClass::Malformed } else { FailureClass::Unreachable };
        assert_eq!((error.class, error.may_have_issued), (class, true), "{case}");
        assert!(!format!("{error:?}").contains("canary"), "{case}");
    }
}

/// The responses in which `body`, a whole JSON object, can arrive with `status`.
fn framings(status: &str, body: &str) -> Vec<(&'static str, Vec<u8>)> {
    let head = |headers: &str| format!("HTTP/1.1 {status}\r\n{headers}\r\n");
    let raw = |head: String, body: &[u8]| [head.as_bytes(), body].concat();
    let (length, bytes) = (body.len(), body.as_bytes());
    let sized = format!("content-length: {length}\r\n");
    let (half, rest) = bytes.split_at(length / 2);
    let chunk = |part: &[u8]| [format!("{:x}\r\n", part.len()).as_bytes(), part, b"\r\n"].concat();
    let chunks = [&chunk(half)[..], &chunk(rest), b"0\r\n"].concat();
    let chunked = head("transfer-encoding: chunked\r\n");
    let marked = [b"\xef\xbb\xbf", bytes].concat();
    let utf16: Vec<u8> =
        format!("\u{feff}{body}").encode_utf16().flat_map(u16::to_le_bytes).collect();
    let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::default());
    gzip.write_all(bytes).unwrap();
    let gzip = gzip.finish().unwrap();
    let interim = |status: &str| format!("HTTP/1.1 {status}\r\n\r\n{}", head(&sized));
    vec![
        ("with its length", raw(head(&sized), bytes)),
        ("to the end of the connection", raw(head(""), bytes)),
        ("of HTTP/1.0", raw(format!("HTTP/1.0 {status}\r\n\r\n"), bytes)),
        ("in chunks", raw(chunked.clone(), &[&chunks[..], b"\r\n"].concat())),
        (
            "in chunks with a trailer",
            raw(chunked.clone(), &[&chunks[..], b"x-sum: 1\r\n\r\n"].concat()),
        ),
        ("in chunks without the last one", raw(chunked, &[chunk(half), chunk(rest)].concat())),
        ("shorter than its length", raw(head("content-length: 9999\r\n"), bytes)),
        ("after 100 Continue", raw(interim("100 Continue"), bytes)),
        ("after 103 Early Hints", raw(interim("103 Early Hints"), bytes)),
        ("with a folded header", raw(head(&format!("x-a: 1,\r\n  2\r\n{sized}")), bytes)),
        ("with a space after a name", raw(head(&format!("x-a : 1\r\n{sized}")), bytes)),
        ("with an invalid header", raw(head(&format!("x a: 1\r\n{sized}")), bytes)),
        (
            "with hundreds of headers",
            raw(head(&format!("{}{sized}", "set-cookie: a=b\r\n".repeat(900))), bytes),
        ),
        ("called HTML", raw(head(&format!("content-type: text/html\r\n{sized}")), bytes)),
        ("with a mark", raw(head("content-type: application/json\r\n"), &marked)),
        ("in UTF-16", raw(head("content-type: text/plain; charset=utf-16\r\n"), &utf16)),
        ("in gzip", raw(head("content-encoding: gzip\r\n"), &gzip)),
        ("in gzip that no header names", raw(head(""), &gzip)),
    ]
}

/// A refusal means what its code says, and a token is a token, in whatever form the answer comes.
#[tokio::test]
async fn a_token_and_a_refusal_are_understood_in_every_framing() {
    use FailureClass::{Malformed, Rejected};
    let token = r#"{"expiresIn":"4000000000000","accessToken":"t.o.k"}"#;
    let refusal = r#"{"error":{"code":"61006","message":"canary 잘못된 비밀 키"},"status":401}"#;
    let clock = ManualClock::new(DateTime::from_timestamp(3_999_996_400, 0).unwrap());
    let mut cases = vec![];
    for status in ["200 OK", "200", "201 Created", "202 Accepted", "203 Transformed"] {
        cases.extend(framings(status, token).into_iter().map(|case| (status, case, None)));
    }
    for status in ["200 OK", "302 Found", "400 Bad Request", "401 Unauthorized", "500 Oops"] {
        let refused = Some((Rejected, Some("61006"), false));
        cases.extend(framings(status, refusal).into_iter().map(|case| (status, case, refused)));
    }
    // Half of a token is none.
    let half = http("200 OK", "", &token.as_bytes()[..token.len() - 1]);
    cases.push(("200 OK", ("cut", half), Some((Malformed, None, true))));
    for (status, (form, response), refused) in cases {
        let url = serve_once(response).await;
        let answer = issue(&client_with(&url, LONG_TIMEOUT, Clock::Manual(clock.clone()))).await;
        let case = format!("{status}, {form}: {answer:?}");
        assert!(!case.contains("canary"), "{case}");
        match (answer, refused) {
            (Ok(issued), None) => {
                assert_eq!(issued.access_token.expose(), "t.o.k", "{case}");
                assert_eq!(issued.expires_at.timestamp_millis(), 4_000_000_000_000, "{case}");
            }
            (Err(error), Some((class, code, may_have_issued))) => {
                assert_eq!((error.class, error.code.as_deref()), (class, code), "{case}");
                assert_eq!(error.may_have_issued, may_have_issued, "{case}");
            }
            _ => panic!("{case}"),
        }
    }
}

/// An upstream that does not say where its answer ends, and leaves the connection open.
#[tokio::test]
async fn a_whole_answer_counts_although_the_connection_stays_open_behind_it() {
    for (body, is_token) in [
        (r#"{"expiresIn":"4000000000000","accessToken":"t"}"#, true),
        (r#"{"error":{"code":"61006"}}"#, false),
    ] {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_request(&mut stream).await;
            let response = format!("HTTP/1.1 200 OK\r\n\r\n{body}");
            stream.write_all(response.as_bytes()).await.unwrap();
            // The client gives up.
            let _ = stream.read(&mut [0]).await;
        });
        let clock = ManualClock::new(DateTime::from_timestamp(3_999_996_400, 0).unwrap());
        let timeout = 5 * SHORT_TIMEOUT;
        let answer = issue(&client_with(&url, timeout, Clock::Manual(clock))).await;
        match answer {
            Ok(issued) => assert!(is_token, "{issued:?}"),
            Err(error) => assert!(!is_token && error.class == FailureClass::Rejected, "{error:?}"),
        }
        server.await.unwrap();
    }
}

/// A connection that was kept may be dead when it is used again: its request would be lost, and an account would
/// wait for the minimum issue interval.
#[tokio::test]
async fn no_connection_to_the_upstream_is_used_twice() {
    let good = br#"{"expiresIn":"4000000000000","accessToken":"t"}"#;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    // It invites the client to keep the connection, and resets it when it is used again.
    let server = tokio::spawn(async move {
        for _ in 0..3 {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_request(&mut stream).await;
            let response = http("200 OK", "connection: keep-alive\r\n", good);
            stream.write_all(&response).await.unwrap();
            let more = stream.read(&mut [0]).await;
            stream.set_zero_linger().unwrap();
            assert!(matches!(more, Ok(0)), "the connection is used again: {more:?}");
        }
    });
    let clock = ManualClock::new(DateTime::from_timestamp(3_999_996_400, 0).unwrap());
    let client = client_with(&url, LONG_TIMEOUT, Clock::Manual(clock));
    for n in 0..3 {
        let answer = issue(&client).await;
        assert!(answer.is_ok(), "call {n}: {answer:?}");
    }
    tokio::time::timeout(LONG_TIMEOUT, server).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_refused_connection_cannot_have_issued_a_token() {
    let url = UnusedListener::bind().url();
    let error = issue(&client(&url)).await.unwrap_err();
    assert_eq!((error.class, error.may_have_issued), (FailureClass::Unreachable, false));
    assert_eq!(error.message, "the upstream cannot be reached: connection refused");
}

#[tokio::test]
async fn a_connection_attempt_that_times_out_cannot_have_issued_a_token() {
    // The queue of this listener becomes full, and the kernel does not answer further attempts.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    let mut unanswered = 0;
    while unanswered < 2 {
        match tokio::time::timeout(SHORT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(stream) => queued.push(stream.unwrap()),
            Err(_) => unanswered += 1,
        }
    }
    let client = client_with(&format!("http://{address}"), SHORT_TIMEOUT, Clock::System);
    let error = issue(&client).await.unwrap_err();
    assert_eq!((error.class, error.may_have_issued), (FailureClass::Unreachable, false));
    assert_eq!(error.message, "the upstream cannot be reached: connecting took too long");
}

#[tokio::test]
async fn a_failed_tls_handshake_cannot_have_issued_a_token() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut hello = [0; 1024];
        let n = stream.read(&mut hello).await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        hello[..n].to_vec()
    });
    let error = issue(&client(&url)).await.unwrap_err();
    assert_eq!((error.class, error.may_have_issued), (FailureClass::Unreachable, false));
    assert_eq!(error.message, "the upstream cannot be reached: the TLS handshake failed");
    assert!(!String::from_utf8_lossy(&server.await.unwrap()).contains("canary"));
}

#[tokio::test]
async fn rejected_credentials_and_addresses_have_the_documented_codes() {
    let simulator = simulator().await;
    let client = client(&simulator.base_url());
    let attempt = async |id: &str, secret: &str| {
        let error = client.issue(&id.parse().unwrap(), &ClientSecret::new(secret).unwrap()).await;
        let error = error.unwrap_err();
        (error.class, error.code.unwrap_or_default(), error.may_have_issued)
    };
    assert_eq!(attempt("nobody", SECRET).await, (FailureClass::Rejected, "61005".into(), false));
    assert_eq!(attempt(ID, "wrong").await, (FailureClass::Rejected, "61006".into(), false));
    simulator.lock_account(ID, true);
    assert_eq!(attempt(ID, SECRET).await, (FailureClass::EgressRejected, "61091".into(), false));
    simulator.lock_account(ID, false);
    simulator.set_faults(Faults { allowed_addresses: Some(vec![]), ..Faults::default() });
    assert_eq!(attempt(ID, SECRET).await, (FailureClass::EgressRejected, "61090".into(), false));
    assert_eq!((simulator.attempts(ID), simulator.issued(ID)), (3, 0));
}

#[tokio::test]
async fn a_rate_limit_error_has_the_retry_delay() {
    let simulator = simulator().await;
    simulator.script(ID, [Answer::RateLimited { retry_after: Some("7".into()) }]);
    let error = issue(&client(&simulator.base_url())).await.unwrap_err();
    assert_eq!(error.retry_after, Some(Duration::from_secs(7)));
}

// Tests of the simulator itself.

/// Sends a request (method and path, further header lines, body) and returns the status and the body of
/// the response.
async fn call(simulator: &Simulator, request: &str, head: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(simulator.address()).await.unwrap();
    let length = body.len();
    let request = format!(
        "{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{head}content-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn a_token_works_until_it_expires_or_is_replaced() {
    let manual = ManualClock::new(DateTime::from_timestamp_millis(1_717_135_001_944).unwrap());
    let clock = Clock::Manual(manual.clone());
    let simulator =
        Simulator::start_on_loopback(SimulatorOptions { clock: clock.clone(), ..options() })
            .await
            .unwrap();
    let client = client_with(&simulator.base_url(), LONG_TIMEOUT, clock);
    let whoami = async |head: &str| call(&simulator, "GET /api/1.1/whoami", head, "").await;
    let bearer = |issued: &IssuedToken| {
        format!("authorization: Bearer {}\r\n", issued.access_token.expose())
    };
    let first = issue(&client).await.unwrap();
    assert_eq!(whoami(&bearer(&first)).await, (200, format!(r#"{{"userId":"{ID}"}}"#)));
    let second = issue(&client).await.unwrap();
    for (head, code) in [
        (bearer(&first), "61003"),
        ("authorization: Bearer x.y.z\r\n".into(), "61003"),
        ("authorization: Basic eA==\r\n".into(), "61002"),
        (String::new(), "61001"),
    ] {
        let (status, body) = whoami(&head).await;
        assert!(status == 401 && body.contains(code), "{head} {body}");
    }
    manual.advance(Duration::from_hours(1));
    let (status, body) = whoami(&bearer(&second)).await;
    assert!(status == 401 && body.contains("61004"), "{body}");
}

#[tokio::test]
async fn protected_calls_answer_with_their_body_and_can_be_refused_or_redirected() {
    let simulator = simulator().await;
    let token = issue(&client(&simulator.base_url())).await.unwrap();
    let head = format!("authorization: Bearer {}\r\n", token.access_token.expose());
    let post = async || call(&simulator, "POST /api/1.1/whoami", &head, "text").await;
    let set = async |answer: &str| {
        let faults = format!(r#"{{"api_answer":{answer}}}"#);
        call(&simulator, "PATCH /simulator/faults", "", &faults).await;
    };
    assert_eq!(post().await, (200, format!(r#"{{"body":"text","userId":"{ID}"}}"#)));

    set(r#"{"refuse":{"status":403,"code":"63001"}}"#).await;
    let (status, body) = post().await;
    assert!(status == 403 && body.contains(r#""code":"63001""#), "{body}");

    set(r#"{"redirect":{"to":"http://127.0.0.1:9/"}}"#).await;
    assert_eq!(post().await.0, 307);

    set("null").await;
    assert_eq!(post().await.0, 200);
}

#[tokio::test]
async fn accounts_and_faults_can_be_changed_over_http() {
    let simulator = simulator().await;
    let client = client(&simulator.base_url());
    let (status, _) =
        call(&simulator, "PUT /simulator/accounts/other", "", r#"{"client_secret":"SK.o"}"#).await;
    assert_eq!(status, 204);
    let other =
        client.issue(&"other".parse().unwrap(), &ClientSecret::new("SK.o").unwrap()).await.unwrap();

    let token = serde_json::json!({"token": other.access_token.expose()}).to_string();
    let (_, live) = call(&simulator, "POST /simulator/live", "", &token).await;
    assert!(live.contains(r#""live":true"#) && live.contains(r#""client_id":"other""#), "{live}");

    let (status, faults) =
        call(&simulator, "PATCH /simulator/faults", "", r#"{"token_life":"10s"}"#).await;
    assert!(status == 200 && faults.contains(r#""token_life":"10s""#), "{faults}");
    let (_, faults) = call(&simulator, "PUT /simulator/faults", "", r#"{"answer":"html"}"#).await;
    assert!(faults.contains(r#""token_life":"1h""#), "{faults}");
    assert_eq!(issue(&client).await.unwrap_err().class, FailureClass::Malformed);
    let (status, error) = call(&simulator, "PUT /simulator/faults", "", r#"{"answr":1}"#).await;
    assert!(status == 400 && error.contains("answr"), "{error}");

    let script = r#"{"script":["issue",{"rate_limited":{}}]}"#;
    let (status, _) = call(&simulator, &format!("PUT /simulator/accounts/{ID}"), "", script).await;
    assert_eq!(status, 204);
    assert!(issue(&client).await.is_ok());
    assert_eq!(issue(&client).await.unwrap_err().class, FailureClass::RateLimited);

    let (_, accounts) = call(&simulator, "GET /simulator/accounts", "", "").await;
    let accounts: serde_json::Value = serde_json::from_str(&accounts).unwrap();
    assert_eq!(accounts[0]["client_id"], ID);
    assert_eq!((&accounts[0]["attempts"], &accounts[0]["issued"]), (&3.into(), &1.into()));
    let (_, counts) = call(&simulator, "GET /simulator/counts", "", "").await;
    let counts: serde_json::Value = serde_json::from_str(&counts).unwrap();
    assert_eq!((&counts["requests"], &counts["issued"]), (&4.into(), &2.into()));

    assert_eq!(call(&simulator, "DELETE /simulator/accounts/other", "", "").await.0, 204);
    assert!(!simulator.is_live(other.access_token.expose()));
    assert_eq!(call(&simulator, "POST /simulator/reset", "", "").await.0, 204);
    assert_eq!((simulator.requests(), simulator.faults()), (0, Faults::default()));
    assert!(issue(&client).await.is_ok());
}

#[tokio::test]
async fn a_token_is_issued_although_the_client_has_disconnected() {
    let simulator = simulator().await;
    simulator.set_faults(Faults { latency: 2 * SHORT_TIMEOUT, ..Faults::default() });
    let client = client_with(&simulator.base_url(), SHORT_TIMEOUT, Clock::System);
    let error = issue(&client).await.unwrap_err();
    assert_eq!((error.class, error.may_have_issued), (FailureClass::Unreachable, true));
    tokio::time::timeout(LONG_TIMEOUT, async {
        while simulator.issued(ID) == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_shutdown_ends_hanging_requests() {
    let simulator = simulator().await;
    simulator.set_faults(Faults { answer: Answer::Hang, ..Faults::default() });
    let client = client(&simulator.base_url());
    let hanging = tokio::spawn(async move { issue(&client).await });
    while simulator.attempts(ID) == 0 {
        tokio::task::yield_now().await;
    }
    simulator.shutdown().await;
    assert_eq!(hanging.await.unwrap().unwrap_err().class, FailureClass::Unreachable);
}
