//! A broker for tests: it answers what a test tells it, over connections in memory, so that tests can run on
//! tokio's paused clock.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, transport::Server};
use tower::service_fn;

use crate::{
    TokenClient, TokenClientBuilder,
    connections::Connect,
    proto::{
        AccountEnded, GetTokenRequest, GetTokenResponse, ListAccountsRequest, ListAccountsResponse,
        ReportRejectedTokenRequest, ReportRejectedTokenResponse, WatchTokensRequest,
        WatchTokensResponse,
        report_rejected_token_response::Outcome,
        token_service_server::{TokenService, TokenServiceServer},
        watch_tokens_response::Event,
    },
};

/// Returns a complete answer with a token of this generation.
pub(crate) fn answer(generation: u64, reuse: Duration, expires: Duration) -> GetTokenResponse {
    GetTokenResponse {
        access_token: format!("canary-{generation}"),
        generation,
        reuse_for: Some(reuse.try_into().unwrap()),
        expires_in: Some(expires.try_into().unwrap()),
        api_base_url: "http://api.example/v1".into(),
        allowed_ip: "192.0.2.1".into(),
        ..Default::default()
    }
}

type Answer = Result<GetTokenResponse, Status>;
type StreamSender = mpsc::Sender<Result<WatchTokensResponse, Status>>;

/// The broker of a test.
#[derive(Clone, Default)]
pub(crate) struct FakeBroker(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    is_away: bool,
    /// The answers to `GetToken`. The last one is repeated.
    answers: VecDeque<Answer>,
    /// How long an answer takes.
    delay: Duration,
    /// The answers to reports, with the pause. The last one is repeated.
    outcomes: VecDeque<(Outcome, Duration)>,
    /// Whether streams are never accepted.
    hangs: bool,
    /// The last stream that a client opened.
    stream: Option<StreamSender>,
    calls: Vec<String>,
    /// The values of `authorization`.
    credentials: Vec<String>,
}

impl FakeBroker {
    /// Returns a broker with these answers to `GetToken`. The last one is repeated.
    pub(crate) fn new(answers: impl IntoIterator<Item = Answer>) -> Self {
        let broker = Self::default();
        broker.answer(answers);
        broker
    }

    pub(crate) fn answer(&self, answers: impl IntoIterator<Item = Answer>) {
        self.state().answers = answers.into_iter().collect();
    }

    pub(crate) fn delay(&self, delay: Duration) {
        self.state().delay = delay;
    }

    /// Makes the broker leave the openings of streams without an answer, or accept those that come from now on.
    pub(crate) fn leave_streams_unanswered(&self, hangs: bool) {
        self.state().hangs = hangs;
    }

    /// Sets the answers to reports, with the pause. The last one is repeated.
    pub(crate) fn report_outcomes(&self, outcomes: impl IntoIterator<Item = (Outcome, Duration)>) {
        self.state().outcomes = outcomes.into_iter().collect();
    }

    /// Makes the broker refuse connections, and end those that it has streams on.
    pub(crate) fn set_away(&self, is_away: bool) {
        let mut state = self.state();
        state.is_away = is_away;
        if is_away {
            state.stream = None;
        }
    }

    /// Returns the calls so far, such as `get acme`, without those of the watch.
    pub(crate) fn calls(&self) -> Vec<String> {
        let state = self.state();
        state.calls.iter().filter(|call| !call.starts_with("watch")).cloned().collect()
    }

    /// Returns the streams that were opened so far, such as `watch acme other`.
    pub(crate) fn streams(&self) -> Vec<String> {
        let state = self.state();
        state.calls.iter().filter(|call| call.starts_with("watch")).cloned().collect()
    }

    pub(crate) fn credentials(&self) -> Vec<String> {
        self.state().credentials.clone()
    }

    /// Pushes a token on the last stream.
    pub(crate) async fn push(&self, account: &str, token: GetTokenResponse) {
        self.send(Ok(message(account, Event::Token(token)))).await;
    }

    /// Ends the account on the last stream.
    pub(crate) async fn end(&self, account: &str) {
        self.send(Ok(message(account, Event::Ended(AccountEnded::default())))).await;
    }

    /// Ends the last stream with `status`.
    pub(crate) async fn end_stream(&self, status: Status) {
        self.send(Err(status)).await;
        self.state().stream = None;
    }

    async fn send(&self, message: Result<WatchTokensResponse, Status>) {
        let stream = self.state().stream.clone().expect("a client opened a stream");
        stream.send(message).await.unwrap();
        // On the paused clock, this is over when no task has anything to do.
        sleep(Duration::from_millis(1)).await;
    }

    pub(crate) fn client(&self) -> TokenClient {
        self.builder().bearer("tbk_canary").build().unwrap()
    }

    pub(crate) fn builder(&self) -> TokenClientBuilder {
        TokenClient::builder().endpoint("http://127.0.0.1:1").connect(self.connect())
    }

    /// Connects to this broker in memory.
    pub(crate) fn connect(&self) -> Connect {
        let broker = self.clone();
        Arc::new(move |endpoint| {
            let broker = broker.clone();
            endpoint.connect_with_connector_lazy(service_fn(move |_| {
                let broker = broker.clone();
                async move {
                    if broker.state().is_away {
                        return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
                    }
                    let (ours, theirs) = tokio::io::duplex(64 * 1024);
                    let incoming = tokio_stream::once(Ok::<_, io::Error>(theirs));
                    let server = Server::builder().add_service(TokenServiceServer::new(broker));
                    tokio::spawn(server.serve_with_incoming(incoming));
                    Ok(TokioIo::new(ours))
                }
            }))
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn log<T>(&self, request: &Request<T>, call: String) {
        let mut state = self.state();
        state.calls.push(call);
        if let Some(value) = request.metadata().get("authorization") {
            state.credentials.push(value.to_str().unwrap().to_owned());
        }
    }
}

fn message(account: &str, event: Event) -> WatchTokensResponse {
    WatchTokensResponse { account: account.into(), event: Some(event) }
}

#[tonic::async_trait]
impl TokenService for FakeBroker {
    async fn get_token(
        &self,
        request: Request<GetTokenRequest>,
    ) -> Result<Response<GetTokenResponse>, Status> {
        let GetTokenRequest { account, newer_than_generation, .. } = request.get_ref();
        let newer = match newer_than_generation {
            0 => String::new(),
            generation => format!(" newer than {generation}"),
        };
        self.log(&request, format!("get {account}{newer}"));
        let (delay, answer) = {
            let mut state = self.state();
            let answer = match state.answers.len() {
                0 | 1 => state.answers.front().cloned(),
                _ => state.answers.pop_front(),
            };
            (state.delay, answer.expect("the test has an answer"))
        };
        sleep(delay).await;
        // The connections of a broker that is away break.
        if self.state().is_away {
            return Err(Status::unavailable("away"));
        }
        answer.map(Response::new)
    }

    type WatchTokensStream = ReceiverStream<Result<WatchTokensResponse, Status>>;

    async fn watch_tokens(
        &self,
        request: Request<WatchTokensRequest>,
    ) -> Result<Response<Self::WatchTokensStream>, Status> {
        let mut names = request.get_ref().accounts.clone();
        names.sort();
        self.log(&request, format!("watch {}", names.join(" ")));
        if self.state().hangs {
            std::future::pending::<()>().await;
        }
        let (sender, receiver) = mpsc::channel(8);
        self.state().stream = Some(sender);
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn report_rejected_token(
        &self,
        request: Request<ReportRejectedTokenRequest>,
    ) -> Result<Response<ReportRejectedTokenResponse>, Status> {
        let ReportRejectedTokenRequest { account, generation, upstream_code } = request.get_ref();
        self.log(&request, format!("report {account} {generation} {upstream_code}"));
        let mut state = self.state();
        let (outcome, retry_after) = match state.outcomes.len() {
            0 | 1 => state.outcomes.front().copied(),
            _ => state.outcomes.pop_front(),
        }
        .expect("the test has an outcome");
        Ok(Response::new(ReportRejectedTokenResponse {
            outcome: outcome.into(),
            retry_after: Some(retry_after.try_into().unwrap()),
        }))
    }

    async fn list_accounts(
        &self,
        _: Request<ListAccountsRequest>,
    ) -> Result<Response<ListAccountsResponse>, Status> {
        Err(Status::unimplemented("no client lists accounts"))
    }
}

/// Waits until `done`, for a real thread of tokio's file access or for a task.
pub(crate) async fn until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        sleep(Duration::from_millis(1)).await;
    }
}
