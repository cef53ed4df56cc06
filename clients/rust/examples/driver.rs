//! The driver of the conformance suite: see `clients/conformance/README.md` in the repository.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    error::Error as StdError,
    io::Write,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy, rt::TokioExecutor};
use serde_json::{Value, json};
use token_broker_client::{
    AuthorizationLayer, AuthorizedClient, Error, ErrorKind, ReportOutcome, SendError, Token,
    TokenClient,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, stdin},
    task::{JoinSet, yield_now},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::{Layer, ServiceExt};

/// What an `op` leads to: the value of `ok` or of `error`.
type Answer = Result<Value, Value>;

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter("token_broker_client=trace")
        .with_writer(std::io::stderr)
        .init();
    let driver = Arc::new(Driver::default());
    let requests = TaskTracker::new();
    let mut lines = BufReader::new(stdin()).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let Ok(request) = serde_json::from_str::<Value>(&line) else {
            tracing::error!("a request is not JSON");
            return ExitCode::FAILURE;
        };
        let id = request["id"].clone();
        // At once, so that a `cancel` that comes next finds it.
        let cancelled = driver.register(&id);
        let driver = Arc::clone(&driver);
        requests.spawn(async move {
            let answer = tokio::select! {
                answer = driver.handle(&request) => answer,
                () = cancelled.cancelled() => Err(json!({ "kind": "CANCELLED" })),
            };
            driver.unregister(&id);
            write_answer(&id, answer);
        });
    }
    driver.close_all().await;
    requests.close();
    requests.wait().await;
    ExitCode::SUCCESS
}

fn write_answer(id: &Value, answer: Answer) {
    let line = match answer {
        Ok(ok) => json!({ "id": id, "ok": ok }),
        Err(error) => json!({ "id": id, "error": error }),
    };
    // If the runner is gone, nobody needs the answer.
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

#[derive(Default)]
struct Driver {
    clients: Mutex<HashMap<String, Opened>>,
    running: Mutex<HashMap<String, CancellationToken>>,
}

/// A client, and what it returned last.
#[derive(Clone)]
struct Opened {
    client: TokenClient,
    settings: String,
    last: Arc<Mutex<Last>>,
}

#[derive(Debug, Default)]
struct Last {
    token: Option<Token>,
    error: Option<Error>,
}

impl Driver {
    async fn handle(&self, request: &Value) -> Answer {
        match text(request, "op").as_str() {
            "hello" => Ok(json!({ "language": "rust", "adapters": ["tower", "reqwest"] })),
            "open" => self.open(request),
            "token" => self.opened(request)?.token(request).await.map_err(|error| as_json(&error)),
            "tokens" => self.opened(request)?.tokens(request).await,
            "cancel" => {
                // A request that was answered already needs no end.
                if let Some(running) = lock(&self.running).get(&request["request"].to_string()) {
                    running.cancel();
                }
                Ok(json!({}))
            }
            "report" => self.opened(request)?.report(request).await,
            "api" => self.opened(request)?.api(request).await,
            "load" => self.opened(request)?.load(request).await,
            "show" => {
                let Opened { client, settings, last } = self.opened(request)?;
                let last = lock(&last);
                let error = last.error.as_ref().map(ToString::to_string);
                Ok(
                    json!({ "text": format!("{client:?} {client:#?} {settings} {last:?} {error:?}") }),
                )
            }
            "close" => {
                self.opened(request)?.client.close().await;
                Ok(json!({}))
            }
            op => Err(internal(&format!("unknown op {op}"))),
        }
    }

    fn open(&self, request: &Value) -> Answer {
        let mut builder = TokenClient::builder();
        for url in request["endpoints"].as_array().into_iter().flatten() {
            builder = builder.endpoint(url.as_str().unwrap_or_default());
        }
        if let Some(file) = request["bearer_file"].as_str() {
            builder = builder.bearer_file(file);
        }
        if let Some(file) = request["ca_file"].as_str() {
            builder = builder.ca_file(file);
        }
        if let (Some(cert), Some(key)) =
            (request["client_cert"].as_str(), request["client_key"].as_str())
        {
            builder = builder.client_certificate(cert, key);
        }
        if let Some(timeout) = milliseconds(request, "timeout_ms") {
            builder = builder.timeout(timeout);
        }
        let settings = format!("{builder:?}");
        let client = builder.build().map_err(|error| as_json(&error))?;
        let opened = Opened { client, settings, last: Arc::default() };
        lock(&self.clients).insert(text(request, "client"), opened);
        Ok(json!({}))
    }

    fn opened(&self, request: &Value) -> Result<Opened, Value> {
        let found = lock(&self.clients).get(&text(request, "client")).cloned();
        found.ok_or_else(|| json!({ "kind": "INVALID_ARGUMENT", "message": "no such client" }))
    }

    fn register(&self, id: &Value) -> CancellationToken {
        let cancelled = CancellationToken::new();
        lock(&self.running).insert(id.to_string(), cancelled.clone());
        cancelled
    }

    fn unregister(&self, id: &Value) {
        lock(&self.running).remove(&id.to_string());
    }

    async fn close_all(&self) {
        let clients: Vec<_> = lock(&self.clients).values().cloned().collect();
        for opened in clients {
            opened.client.close().await;
        }
    }
}

impl Opened {
    /// Gets a token as the program under test would, and remembers what came.
    async fn get(&self, account: &str, timeout: Option<Duration>) -> Result<Token, Error> {
        let result = match timeout {
            Some(timeout) => self.client.token_within(account, timeout).await,
            None => self.client.token(account).await,
        };
        let mut last = lock(&self.last);
        match &result {
            Ok(token) => last.token = Some(token.clone()),
            Err(error) => last.error = Some(error.clone()),
        }
        result
    }

    async fn token(&self, request: &Value) -> Result<Value, Error> {
        let token =
            self.get(&text(request, "account"), milliseconds(request, "timeout_ms")).await?;
        Ok(json!({
            "token": token.access_token(),
            "generation": token.generation().to_string(),
            "allowed_ip": token.allowed_ip(),
            "api_base_url": token.api_base_url(),
            "expires_in_ms": u64::try_from(token.expires_in().as_millis()).unwrap_or(u64::MAX),
        }))
    }

    async fn tokens(&self, request: &Value) -> Answer {
        let mut calls = JoinSet::new();
        for _ in 0..request["threads"].as_u64().unwrap_or(1) {
            let (opened, request) = (self.clone(), request.clone());
            calls.spawn(async move { opened.token(&request).await });
        }
        let results = calls.join_all().await.into_iter();
        let results: Vec<_> = results
            .map(|result| result.unwrap_or_else(|error| json!({ "error": as_json(&error) })))
            .collect();
        Ok(json!({ "results": results }))
    }

    async fn report(&self, request: &Value) -> Answer {
        let generation = match &request["generation"] {
            Value::String(text) => text.parse().unwrap_or_default(),
            number => number.as_u64().unwrap_or_default(),
        };
        let (account, code) = (text(request, "account"), text(request, "upstream_code"));
        let outcome = self.client.report(&account, generation, &code).await;
        Ok(match outcome.map_err(|error| as_json(&error))? {
            ReportOutcome::Reissuing => json!({ "outcome": "REISSUING" }),
            ReportOutcome::AlreadyReplaced => json!({ "outcome": "ALREADY_REPLACED" }),
            ReportOutcome::TooSoon { retry_after } => {
                let retry_after = u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX);
                json!({ "outcome": "TOO_SOON", "retry_after_ms": retry_after })
            }
            _ => json!({ "outcome": "NOT_A_TOKEN_FAULT" }),
        })
    }

    async fn api(&self, request: &Value) -> Answer {
        match request["adapter"].as_str() {
            Some("tower") => self.api_by_tower(request).await,
            Some("reqwest") | None => self.api_by_reqwest(request).await,
            Some(other) => Err(internal(&format!("unknown adapter {other}"))),
        }
    }

    async fn api_by_tower(&self, request: &Value) -> Answer {
        let mut layer = AuthorizationLayer::new(self.client.clone(), &text(request, "account"));
        if let Some(timeout) = milliseconds(request, "timeout_ms") {
            layer = layer.timeout(timeout);
        }
        let http = legacy::Client::builder(TokioExecutor::new()).build_http();
        let request = http::Request::builder()
            .method(text(request, "method").as_str())
            .uri(text(request, "url"))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(text(request, "body"))))
            .map_err(|error| internal(&error.to_string()))?;
        let answer = layer.layer(http).oneshot(request).await.map_err(send_error)?;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.map_err(|error| internal(&chain(&error)))?;
        Ok(json!({ "status": status, "body": String::from_utf8_lossy(&body.to_bytes()) }))
    }

    async fn api_by_reqwest(&self, request: &Value) -> Answer {
        let account = text(request, "account");
        let client = AuthorizedClient::new(
            reqwest::Client::builder().no_proxy(),
            self.client.clone(),
            &account,
        );
        let mut client = client.map_err(|error| internal(&chain(&error)))?;
        if let Some(timeout) = milliseconds(request, "timeout_ms") {
            client = client.timeout(timeout);
        }
        let method = text(request, "method").parse().unwrap_or_default();
        let sent = client
            .request(method, text(request, "url"))
            .header("content-type", "application/json")
            .body(text(request, "body"));
        let answer = client.send(sent).await.map_err(send_error)?;
        let status = answer.status().as_u16();
        let body = answer.text().await.map_err(|error| internal(&chain(&error)))?;
        Ok(json!({ "status": status, "body": body }))
    }

    async fn load(&self, request: &Value) -> Answer {
        let account = text(request, "account");
        let duration = milliseconds(request, "stop_after_ms").unwrap_or_default();
        let stop = Instant::now() + duration;
        let mut threads = JoinSet::new();
        for _ in 0..request["threads"].as_u64().unwrap_or(1) {
            let (opened, account) = (self.clone(), account.clone());
            threads.spawn(async move {
                let mut load = Load::default();
                while Instant::now() < stop {
                    // What takes longer than the load lasts is no outcome.
                    let left = stop.saturating_duration_since(Instant::now());
                    match timeout(left, opened.get(&account, None)).await {
                        Ok(outcome) => load.count(outcome),
                        Err(_) => break,
                    }
                    // Leaves the processors to the brokers now and then.
                    if load.calls % 100 == 0 {
                        sleep(Duration::from_millis(1)).await;
                    } else {
                        yield_now().await;
                    }
                }
                load
            });
        }
        let mut load = Load::default();
        for one in threads.join_all().await {
            load.calls += one.calls;
            load.generations.extend(one.generations);
            for (kind, count) in one.errors {
                *load.errors.entry(kind).or_default() += count;
            }
        }
        let generations: Vec<_> = load.generations.iter().map(ToString::to_string).collect();
        Ok(json!({ "calls": load.calls, "errors": load.errors, "generations": generations }))
    }
}

#[derive(Default)]
struct Load {
    calls: u64,
    errors: BTreeMap<&'static str, u64>,
    generations: BTreeSet<u64>,
}

impl Load {
    fn count(&mut self, outcome: Result<Token, Error>) {
        self.calls += 1;
        match outcome {
            Ok(token) => {
                self.generations.insert(token.generation());
            }
            Err(error) => *self.errors.entry(error.kind().name()).or_default() += 1,
        }
    }
}

fn text(request: &Value, key: &str) -> String {
    request[key].as_str().unwrap_or_default().to_owned()
}

fn milliseconds(request: &Value, key: &str) -> Option<Duration> {
    request[key].as_u64().map(Duration::from_millis)
}

/// Returns an error in the form of the protocol, without what does not apply.
fn as_json(error: &Error) -> Value {
    let mut fields = json!({ "kind": error.kind().name(), "message": error.message() });
    let optional = [
        ("code", error.code().map(Value::from)),
        ("reason", error.reason().map(Value::from)),
        ("upstream_code", error.upstream_code().map(Value::from)),
        (
            "retry_after_ms",
            error.retry_after().and_then(|it| u64::try_from(it.as_millis()).ok()).map(Value::from),
        ),
    ];
    for (key, value) in optional {
        if let Some(value) = value {
            fields[key] = value;
        }
    }
    fields
}

fn internal(message: &str) -> Value {
    json!({ "kind": ErrorKind::Internal.name(), "message": message })
}

fn send_error<E: StdError>(error: SendError<E>) -> Value {
    match error {
        SendError::Token(error) => as_json(&error),
        SendError::Request(error) => internal(&chain(&error)),
    }
}

/// Returns the texts of an error and of its causes.
fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
