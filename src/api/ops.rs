//! The HTTP endpoints for operators and probes: liveness, readiness, metrics.
//!
//! They show no secret and change nothing, and listen on loopback unless configured otherwise. Each
//! connection carries one request, whose headers must arrive within [`HEADERS_TIMEOUT`], and which must be
//! answered within [`CONNECTION_TIMEOUT`]. When [`MAX_CONNECTIONS`] are open, the oldest is closed for a new
//! one. So idle sockets cannot keep a probe out: a probe ends long before its connection is the oldest.

use std::{collections::VecDeque, fmt, io, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::telemetry::{METRICS_CONTENT_TYPE, Metrics};

/// How many connections may be open at the same time.
const MAX_CONNECTIONS: usize = 64;
/// How long the headers of a request may take to arrive.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may last.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause after a failed `accept`, which fails again at once as long as no file descriptors are left.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The text of the index page.
const INDEX: &str = "\
token-broker

/livez    the process runs
/readyz   whether it can answer calls, and each check, in JSON
/metrics  OpenMetrics
";

/// What the endpoints show. Cheap to clone.
#[derive(Clone)]
pub struct Ops {
    /// Returns the present readiness. It must not block.
    pub readiness: Arc<dyn Fn() -> Readiness + Send + Sync>,
    /// The metrics to export.
    pub metrics: Arc<Metrics>,
}

impl fmt::Debug for Ops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ops").finish_non_exhaustive()
    }
}

/// Whether the broker can answer calls, and the checks that decide it.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    /// The results of the checks, in the order in which they are shown.
    pub checks: Vec<Check>,
}

impl Readiness {
    /// Ready when every required check passes.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.checks.iter().all(|check| check.ok || !check.required)
    }
}

/// The result of a check of something that the broker depends on.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The name, such as `journal` or `postgres`.
    pub name: &'static str,
    /// Whether the check passes.
    pub ok: bool,
    /// Whether the broker is unready without it. Postgres and the upstream are not required: live tokens are
    /// served without them, and if every replica became unready, nobody would be served.
    pub required: bool,
    /// An explanation for people. It never holds a secret.
    pub detail: String,
}

/// Serves `ops` on `listener` until `stop` is cancelled. Then waits for the requests in progress to end, which
/// takes at most [`CONNECTION_TIMEOUT`].
pub async fn serve(listener: TcpListener, ops: Ops, stop: CancellationToken) {
    let router = router(ops);
    let mut connections = JoinSet::new();
    let mut oldest_first: VecDeque<AbortHandle> = VecDeque::with_capacity(MAX_CONNECTIONS);
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                pause_after(&error).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        oldest_first.retain(|connection| !connection.is_finished());
        if oldest_first.len() >= MAX_CONNECTIONS
            && let Some(oldest) = oldest_first.pop_front()
        {
            oldest.abort();
        }
        oldest_first.push_back(connections.spawn(serve_connection(stream, router.clone())));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Serves one request. Errors are ignored: they mean that the client is gone or does not speak HTTP.
async fn serve_connection(stream: TcpStream, router: Router) {
    let service = service_fn(move |request| router.clone().oneshot(request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_TIMEOUT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    let _ = timeout(CONNECTION_TIMEOUT, connection).await;
}

/// Waits after `accept` failed, unless only the accepted connection failed: without file descriptors,
/// `accept` would fail again at once.
async fn pause_after(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        tracing::warn!(%error, "cannot accept a connection to the ops port");
        sleep(ACCEPT_RETRY).await;
    }
}

fn router(ops: Ops) -> Router {
    Router::new()
        .route("/", get(|| async { uncached(INDEX) }))
        .route("/livez", get(|| async { uncached("ok\n") }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(ops)
}

async fn readyz(State(ops): State<Ops>) -> Response {
    #[derive(Serialize)]
    struct Body {
        ready: bool,
        checks: Vec<Check>,
    }
    let readiness = (ops.readiness)();
    let ready = readiness.is_ready();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    uncached((status, Json(Body { ready, checks: readiness.checks })))
}

async fn metrics(State(ops): State<Ops>) -> Response {
    uncached(([(header::CONTENT_TYPE, METRICS_CONTENT_TYPE)], ops.metrics.encode()))
}

/// Returns `response` with the header that forbids proxies and clients to cache it.
fn uncached(response: impl IntoResponse) -> Response {
    const NO_STORE: [(HeaderName, &str); 1] = [(header::CACHE_CONTROL, "no-store")];
    (NO_STORE, response).into_response()
}

#[cfg(test)]
mod tests {
    use std::{
        net::SocketAddr,
        sync::atomic::{AtomicBool, Ordering},
    };

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        task::JoinHandle,
    };

    use super::*;

    struct TestServer {
        address: SocketAddr,
        journal_is_writable: Arc<AtomicBool>,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    impl TestServer {
        async fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let journal = Arc::new(AtomicBool::new(true));
            let readiness = {
                let journal = journal.clone();
                Arc::new(move || readiness(journal.load(Ordering::Relaxed)))
            };
            let stop = CancellationToken::new();
            let ops = Ops { readiness, metrics: Arc::new(Metrics::new("1.2.3")) };
            let task = tokio::spawn(serve(listener, ops, stop.clone()));
            Self { address, journal_is_writable: journal, stop, task }
        }

        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.address).await.unwrap()
        }

        /// Returns the whole response to a GET; the server closes the connection after it.
        async fn get(&self, path: &str) -> String {
            let mut stream = self.connect().await;
            let request = format!("GET {path} HTTP/1.1\r\nhost: ops\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            read_to_end(stream).await
        }
    }

    async fn read_to_end(mut stream: TcpStream) -> String {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// The readiness of a broker without Postgres, whose journal is writable or not.
    fn readiness(journal: bool) -> Readiness {
        let check = |name, ok, required| Check { name, ok, required, detail: String::new() };
        Readiness { checks: vec![check("journal", journal, true), check("postgres", false, false)] }
    }

    fn body_of(answer: &str) -> &str {
        answer.split_once("\r\n\r\n").unwrap().1
    }

    #[tokio::test]
    async fn a_running_broker_is_live() {
        let answer = TestServer::start().await.get("/livez").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert_eq!(body_of(&answer), "ok\n");
    }

    #[tokio::test]
    async fn without_postgres_a_replica_is_ready_and_reports_the_failed_check() {
        let answer = TestServer::start().await.get("/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let body: serde_json::Value = serde_json::from_str(body_of(&answer)).unwrap();
        assert_eq!(body["ready"], true);
        assert_eq!(body["checks"][1]["name"], "postgres");
        assert_eq!(body["checks"][1]["ok"], false);
    }

    #[tokio::test]
    async fn a_failed_required_check_makes_a_replica_unready_until_it_passes_again() {
        let server = TestServer::start().await;
        server.journal_is_writable.store(false, Ordering::Relaxed);
        let answer = server.get("/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(body_of(&answer).starts_with("{\"ready\":false,"), "{answer}");
        server.journal_is_writable.store(true, Ordering::Relaxed);
        assert!(server.get("/readyz").await.starts_with("HTTP/1.1 200 "));
    }

    #[tokio::test]
    async fn metrics_are_in_the_open_metrics_format() {
        let answer = TestServer::start().await.get("/metrics").await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"));
        assert!(head.contains("cache-control: no-store"));
        assert!(body.contains("token_broker_build_info{version=\"1.2.3\"} 1"));
        assert!(body.ends_with("# EOF\n"));
    }

    #[tokio::test]
    async fn the_index_lists_every_path() {
        let server = TestServer::start().await;
        let index = server.get("/").await;
        for path in ["/livez", "/readyz", "/metrics"] {
            assert!(body_of(&index).contains(path));
            assert!(!server.get(path).await.starts_with("HTTP/1.1 404 "));
        }
        assert!(server.get("/nothing").await.starts_with("HTTP/1.1 404 "));
    }

    #[tokio::test]
    async fn idle_sockets_are_closed_to_make_room_for_a_probe() {
        let server = TestServer::start().await;
        let mut idle = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            idle.push(server.connect().await);
        }
        assert!(server.get("/livez").await.starts_with("HTTP/1.1 200 "));
        let oldest = idle.swap_remove(0);
        assert_eq!(read_to_end(oldest).await, "", "the oldest was closed without an answer");
    }

    #[tokio::test]
    async fn a_stop_waits_for_a_request_in_progress() {
        let server = TestServer::start().await;
        let mut stream = server.connect().await;
        stream.write_all(b"GET /livez HTTP/1.1\r\n").await.unwrap();
        // Connections are accepted in order: once a later one was answered, this one is accepted.
        server.get("/livez").await;
        server.stop.cancel();
        stream.write_all(b"host: ops\r\n\r\n").await.unwrap();
        assert!(read_to_end(stream).await.starts_with("HTTP/1.1 200 "));
        server.task.await.unwrap();
    }
}
