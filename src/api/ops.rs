//! The HTTP face for operators: liveness, readiness, metrics.
//!
//! It has no secrets to tell and does nothing, and listens on loopback unless told otherwise. Each
//! connection carries one request, which must be whole within [`HEADERS_WITHIN`] and over within
//! [`ENDS_WITHIN`]. When there are [`MAX_CONNECTIONS`], the oldest gives way to a new one: silent
//! sockets cannot keep a probe out, as it ends long before it is the oldest.

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

/// How many connections are open at most.
const MAX_CONNECTIONS: usize = 64;
/// How long a request's head may take to arrive.
const HEADERS_WITHIN: Duration = Duration::from_secs(5);
/// How long a connection lasts at most.
const ENDS_WITHIN: Duration = Duration::from_secs(10);
/// How long to wait when no connection can be accepted, mostly for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the index page says.
const INDEX: &str = "\
token-broker

/livez    the process runs
/readyz   it can answer calls; what is missing, in JSON
/metrics  OpenMetrics
";

/// What the operators' face shows.
#[derive(Clone)]
pub struct Ops {
    /// Tells how things stand now. It must not block.
    pub readiness: Arc<dyn Fn() -> Readiness + Send + Sync>,
    /// The metrics to export.
    pub metrics: Arc<Metrics>,
}

impl fmt::Debug for Ops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ops").finish_non_exhaustive()
    }
}

/// Whether the broker can answer calls, and what it stands on.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    /// What was looked at, in the order in which to show it.
    pub checks: Vec<Check>,
}

impl Readiness {
    /// Ready is who has all that is required.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.checks.iter().all(|check| check.ok || !check.required)
    }
}

/// One thing that the broker stands on.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Its name, such as `journal` or `postgres`.
    pub name: &'static str,
    /// Whether it is there.
    pub ok: bool,
    /// Whether the broker is unready without it. Postgres and the upstream are not required: live
    /// tokens are served without them, and to take every replica away would help nobody.
    pub required: bool,
    /// More, in words; never a secret.
    pub detail: String,
}

/// Serves `ops` on `listener` until `stop`, then lets the requests under way end.
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

/// Serves one request. What fails is the client's own affair: it is gone, or no client at all.
async fn serve_connection(stream: TcpStream, router: Router) {
    let service = service_fn(move |request| router.clone().oneshot(request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_WITHIN)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    let _ = timeout(ENDS_WITHIN, connection).await;
}

/// Waits, unless it was the one connection that failed: without file descriptors, `accept` would
/// fail again at once.
async fn pause_after(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        tracing::warn!(%error, "cannot accept a connection to the operators' port");
        sleep(ACCEPT_PAUSE).await;
    }
}

fn router(ops: Ops) -> Router {
    Router::new()
        .route("/", get(|| async { fresh(INDEX) }))
        .route("/livez", get(|| async { fresh("ok\n") }))
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
    fresh((status, Json(Body { ready, checks: readiness.checks })))
}

async fn metrics(State(ops): State<Ops>) -> Response {
    fresh(([(header::CONTENT_TYPE, METRICS_CONTENT_TYPE)], ops.metrics.encode()))
}

/// An answer that nothing on its way may keep.
fn fresh(answer: impl IntoResponse) -> Response {
    const NO_STORE: [(HeaderName, &str); 1] = [(header::CACHE_CONTROL, "no-store")];
    (NO_STORE, answer).into_response()
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

    struct Face {
        address: SocketAddr,
        journal: Arc<AtomicBool>,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Face {
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
            Self { address, journal, stop, task }
        }

        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.address).await.unwrap()
        }

        /// The whole answer to a GET; the server closes the connection after it.
        async fn get(&self, path: &str) -> String {
            let mut stream = self.connect().await;
            let request = format!("GET {path} HTTP/1.1\r\nhost: ops\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            rest_of(stream).await
        }
    }

    async fn rest_of(mut stream: TcpStream) -> String {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// A broker without Postgres, whose journal is writable or not.
    fn readiness(journal: bool) -> Readiness {
        let check = |name, ok, required| Check { name, ok, required, detail: String::new() };
        Readiness { checks: vec![check("journal", journal, true), check("postgres", false, false)] }
    }

    fn body(answer: &str) -> &str {
        answer.split_once("\r\n\r\n").unwrap().1
    }

    #[tokio::test]
    async fn a_running_broker_is_live() {
        let answer = Face::start().await.get("/livez").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert_eq!(body(&answer), "ok\n");
    }

    #[tokio::test]
    async fn postgres_away_is_said_but_does_not_make_a_replica_unready() {
        let answer = Face::start().await.get("/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let told: serde_json::Value = serde_json::from_str(body(&answer)).unwrap();
        assert_eq!(told["ready"], true);
        assert_eq!(told["checks"][1]["name"], "postgres");
        assert_eq!(told["checks"][1]["ok"], false);
    }

    #[tokio::test]
    async fn what_is_required_and_missing_makes_a_replica_unready_until_it_is_back() {
        let face = Face::start().await;
        face.journal.store(false, Ordering::Relaxed);
        let answer = face.get("/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(body(&answer).starts_with("{\"ready\":false,"), "{answer}");
        face.journal.store(true, Ordering::Relaxed);
        assert!(face.get("/readyz").await.starts_with("HTTP/1.1 200 "));
    }

    #[tokio::test]
    async fn metrics_are_open_metrics() {
        let answer = Face::start().await.get("/metrics").await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"));
        assert!(head.contains("cache-control: no-store"));
        assert!(body.contains("token_broker_build_info{version=\"1.2.3\"} 1"));
        assert!(body.ends_with("# EOF\n"));
    }

    #[tokio::test]
    async fn the_index_lists_every_path() {
        let face = Face::start().await;
        let index = face.get("/").await;
        for path in ["/livez", "/readyz", "/metrics"] {
            assert!(body(&index).contains(path));
            assert!(!face.get(path).await.starts_with("HTTP/1.1 404 "));
        }
        assert!(face.get("/nothing").await.starts_with("HTTP/1.1 404 "));
    }

    #[tokio::test]
    async fn silent_sockets_give_way_to_a_probe() {
        let face = Face::start().await;
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            silent.push(face.connect().await);
        }
        assert!(face.get("/livez").await.starts_with("HTTP/1.1 200 "));
        let oldest = silent.swap_remove(0);
        assert_eq!(rest_of(oldest).await, "", "the oldest was closed without an answer");
    }

    #[tokio::test]
    async fn stopping_lets_a_request_under_way_end() {
        let face = Face::start().await;
        let mut stream = face.connect().await;
        stream.write_all(b"GET /livez HTTP/1.1\r\n").await.unwrap();
        // Connections are accepted in order: once a later one was answered, this one is in.
        face.get("/livez").await;
        face.stop.cancel();
        stream.write_all(b"host: ops\r\n\r\n").await.unwrap();
        assert!(rest_of(stream).await.starts_with("HTTP/1.1 200 "));
        face.task.await.unwrap();
    }
}
