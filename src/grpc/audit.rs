//! The layer that records each call of `TokenService`: from the arrival of its headers to the
//! durable record, without which no answer leaves.

mod call;

use std::{
    convert::Infallible,
    future::Future,
    net::IpAddr,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

pub use call::{CallContext, Draft, Peer};
use call::{Deadline, deadline_of, event_of, method_of, trace_id_of};
use futures_util::FutureExt;
use http::{Request, Response};
use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Status, body::Body, server::NamedService};
use tower::Service;
use tracing::error;

use super::{connection::Connection, identity::Identifier, status::outcome};
use crate::{
    audit::{
        fold::Folds,
        journal::{AuditUnavailable, Journal},
        record::Record,
    },
    broker::Refusal,
    clock::Clock,
    directory::Directory,
    limit::{CallerRates, Places, network_of},
    telemetry::{Method, Metrics},
};

/// The longest that an answer waits for its record.
const RECORD_WITHIN: Duration = Duration::from_secs(5);

/// What the layer needs; shared by all connections.
pub struct Desk {
    /// The audit log.
    pub journal: Journal,
    /// Makes one record of refusals that repeat.
    pub folds: Folds,
    /// The callers.
    pub directory: Arc<Directory>,
    /// Whose SPIFFE IDs count.
    pub trust_domain: Option<Arc<str>>,
    /// What each caller used of its rate.
    pub rates: CallerRates,
    /// Calls a second of a caller that has no rate of its own.
    pub default_rate: u32,
    /// The deadline of a call that brings none.
    pub default_deadline: Duration,
    /// The longest deadline that a call may bring.
    pub longest_deadline: Duration,
    /// Time.
    pub clock: Clock,
    /// The moment from which rates are counted.
    pub epoch: Instant,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The calls under way: their records are still to be written.
    pub calls: TaskTracker,
    /// The calls that are refused by their headers and not answered yet, by address.
    pub refused: Arc<Places<Option<IpAddr>>>,
}

/// A service whose every call is recorded.
#[derive(Clone)]
pub struct Recorded<S> {
    inner: S,
    desk: Arc<Desk>,
}

impl<S> Recorded<S> {
    /// Records the calls of `inner` at `desk`.
    pub fn new(inner: S, desk: Arc<Desk>) -> Self {
        Self { inner, desk }
    }
}

impl<S: NamedService> NamedService for Recorded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Recorded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let inner = self.inner.clone();
        let desk = self.desk.clone();
        let arrived = Instant::now();
        let gone = CancellationToken::new();
        // A caller that resets its stream drops this future, not the task: its record is written.
        let hangs_up = gone.clone().drop_guard();
        let calls = desk.calls.clone();
        let answer = calls.spawn(async move { desk.answer(inner, request, arrived, gone).await });
        Box::pin(async move {
            let answered = answer.await;
            hangs_up.disarm();
            Ok(answered.unwrap_or_else(|bug| {
                error!(error = %bug, "a call was lost");
                Status::internal("a fault of the broker's own").into_http()
            }))
        })
    }
}

impl Desk {
    async fn answer<S>(
        &self,
        inner: S,
        request: Request<Body>,
        arrived: Instant,
        gone: CancellationToken,
    ) -> Response<Body>
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    {
        let method = method_of(request.uri().path());
        let mut record = Record::new(self.clock.now(), event_of(method));
        let peer = request.extensions().get::<Peer>();
        record.peer = peer.map(|peer| peer.address.to_string());
        record.trace_id = trace_id_of(request.headers());
        let draft = Draft::new(record);

        let (deadline, context) = match self.admit(&request, method, arrived, &draft) {
            Ok(admitted) => admitted,
            Err(refusal) => {
                let status = draft.refuse(refusal);
                let from = peer.map(|peer| peer.address.ip());
                // The rest of it is heard meanwhile.
                drop(request);
                let answered = self.turn_away(from, status, &draft, arrived).await;
                self.metrics.call(method, code_of(&answered).into(), arrived.elapsed());
                return answered;
            }
        };
        // A method that panics is a call like any other: it is recorded.
        let responding = respond(inner, request, context, deadline, &gone, &draft);
        let responding = AssertUnwindSafe(responding);
        let response = responding.catch_unwind().await.unwrap_or_else(|_| {
            error!(?method, "a call panicked");
            Status::internal("a fault of the broker's own").into_http()
        });
        let code = code_of(&response);
        let (record, token_ends) = draft.finish(outcome(code), arrived.elapsed());
        let within = deadline.left_for_record(RECORD_WITHIN);
        let recorded = if code == Code::Ok {
            self.journal.append(record).durable(within).await
        } else {
            self.folds.recorded(record, within).await
        };
        let response = match recorded {
            // The caller's time ended first: the journal is not to blame.
            Err(AuditUnavailable::TooSlow(_)) if deadline.has_passed() => {
                Status::from(Refusal::DeadlineExceeded).into_http()
            }
            Err(_) => Status::from(Refusal::AuditUnavailable).into_http(),
            // The wait for the record may have outlived the token.
            Ok(()) if token_ends.is_some_and(|end| end <= self.clock.now()) => {
                Status::from(Refusal::TokenEnded).into_http()
            }
            Ok(()) => response,
        };
        self.metrics.call(method, code_of(&response).into(), arrived.elapsed());
        response
    }

    /// Records a call that is refused by its headers, and answers it. Anybody may send these, as many as
    /// connections have streams: only so many wait for their record. The others are answered while it is
    /// on its way, unless nothing can be recorded.
    async fn turn_away(
        &self,
        from: Option<IpAddr>,
        status: Status,
        draft: &Draft,
        arrived: Instant,
    ) -> Response<Body> {
        let place = self.refused.take(from.map(network_of));
        let (record, _) = draft.finish(outcome(status.code()), arrived.elapsed());
        let within = if place.is_some() { RECORD_WITHIN } else { Duration::ZERO };
        match self.folds.recorded(record, within).await {
            Ok(()) => status.into_http(),
            Err(AuditUnavailable::TooSlow(_)) if place.is_none() => status.into_http(),
            Err(_) => Status::from(Refusal::AuditUnavailable).into_http(),
        }
    }

    fn admit(
        &self,
        request: &Request<Body>,
        method: Method,
        arrived: Instant,
        draft: &Draft,
    ) -> Result<(Deadline, CallContext), Refusal> {
        let finder = Identifier {
            directory: &self.directory,
            trust_domain: self.trust_domain.as_deref(),
            now: self.clock.now(),
        };
        let certificate =
            request.extensions().get::<Peer>().and_then(|it| it.certificate.as_deref());
        let found = finder.identify(request.headers(), certificate);
        let identified = found.map_err(|unidentified| draft.unidentified(unidentified))?;
        draft.identified(&identified);
        let rate = identified.caller.rate_limit.unwrap_or(self.default_rate);
        self.rates
            .take(identified.caller.id, rate, arrived.saturating_duration_since(self.epoch))
            .map_err(|retry_after| Refusal::CallerRate { retry_after })?;
        let asked = deadline_of(request.headers())?.unwrap_or(self.default_deadline);
        // A stream only begins by then: it lasts for as long as its caller wants.
        let longest = if streams(method) { self.default_deadline } else { self.longest_deadline };
        let deadline = Deadline(arrived + asked.min(longest));
        let connection = request.extensions().get::<Connection>();
        connection.inspect(|connection| connection.admitted());
        let context = CallContext {
            caller: identified.caller,
            proof: identified.proof,
            deadline: deadline.for_method(arrived),
            draft: draft.clone(),
            leaving: connection.map(|it| it.leaving().clone()).unwrap_or_default(),
        };
        Ok((deadline, context))
    }
}

/// Has an admitted call answered, unless its deadline or its caller ends it first.
async fn respond<S>(
    mut inner: S,
    mut request: Request<Body>,
    context: CallContext,
    deadline: Deadline,
    gone: &CancellationToken,
    draft: &Draft,
) -> Response<Body>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    // A call that waited for its turn until now is not worth an answer that nobody hears.
    if deadline.has_passed() {
        return draft.refuse(Refusal::DeadlineExceeded).into_http();
    }
    request.extensions_mut().insert(context);
    tokio::select! {
        biased;
        answered = inner.call(request) => match answered {
            Ok(response) => response,
            Err(never) => match never {},
        },
        () = gone.cancelled() => draft.refuse(Refusal::Cancelled).into_http(),
        () = deadline.passes() => draft.refuse(Refusal::DeadlineExceeded).into_http(),
    }
}

/// Whether a call of `method` is answered with a stream, which lasts as long as its caller wants.
fn streams(method: Method) -> bool {
    method == Method::WatchTokens
}

/// The gRPC status that a response's headers tell; a success tells it in its trailers.
fn code_of(response: &Response<Body>) -> Code {
    response
        .headers()
        .get("grpc-status")
        .map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;
    use tower::service_fn;

    use super::*;
    use crate::{
        audit::journal::JournalSettings,
        bearer::Bearer,
        caller::{Caller, CallerId},
        clock::ManualClock,
        state_dir::StateDir,
        store::callers::{Credential, Proof},
        token::Token,
    };

    /// A desk with one caller, and a journal in a directory of its own.
    struct Office {
        desk: Arc<Desk>,
        bearer: Bearer,
        manual: ManualClock,
        state_dir: StateDir,
        _home: TempDir,
    }

    impl Office {
        fn open() -> Self {
            let manual = ManualClock::new(Clock::System.now());
            let clock = Clock::Manual(manual.clone());
            let home = TempDir::new().unwrap();
            let state_dir = StateDir::open(home.path()).unwrap();
            let journal =
                Journal::open(&state_dir, JournalSettings::default(), clock.clone()).unwrap();
            let bearer = Bearer::generate();
            let directory = Directory::default();
            directory.replace(vec![Credential {
                caller: Arc::new(Caller {
                    id: CallerId(1),
                    name: "demo".into(),
                    enabled: true,
                    rate_limit: None,
                    grants: vec![],
                }),
                proof: Proof::BearerSha256(bearer.sha256()),
                ends_at: None,
                revoked: false,
            }]);
            let calls = TaskTracker::new();
            let desk = Desk {
                folds: Folds::new(journal.clone(), calls.clone()),
                journal,
                directory: Arc::new(directory),
                trust_domain: None,
                rates: CallerRates::default(),
                default_rate: 1_000,
                default_deadline: Duration::from_mins(1),
                longest_deadline: Duration::from_mins(1),
                clock,
                epoch: Instant::now(),
                metrics: Arc::new(Metrics::new("test")),
                calls,
                refused: Arc::new(Places::new(1)),
            };
            Self { desk: Arc::new(desk), bearer, manual, state_dir, _home: home }
        }

        /// What becomes of a `GetToken` that `method` answers: the status, and the journal's text.
        async fn call<F>(
            &self,
            method: impl Fn(CallContext) -> F + Clone + Send + 'static,
        ) -> (Code, String)
        where
            F: Future<Output = ()> + Send + 'static,
        {
            let inner = service_fn(move |request: Request<Body>| {
                let context = request.extensions().get::<CallContext>().unwrap().clone();
                let answered = method(context);
                async move {
                    answered.await;
                    Ok::<_, Infallible>(Response::new(Body::empty()))
                }
            });
            let code = self.send(inner, &self.bearer, Body::empty()).await;
            (code, self.journal().await)
        }

        async fn send<S>(&self, inner: S, bearer: &Bearer, body: Body) -> Code
        where
            S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
                + Clone
                + Send
                + 'static,
            S::Future: Send,
        {
            let request = Request::builder()
                .uri("/token_broker.v1.TokenService/GetToken")
                .header("authorization", format!("Bearer {}", bearer.expose()))
                .body(body)
                .unwrap();
            let response = Recorded::new(inner, self.desk.clone()).call(request).await.unwrap();
            code_of(&response)
        }

        /// What the journal holds in the end.
        async fn journal(&self) -> String {
            self.desk.calls.close();
            self.desk.calls.wait().await;
            self.desk.journal.close().await;
            let segments = fs::read_dir(self.state_dir.journal_dir()).unwrap();
            segments
                .map(|segment| segment.unwrap().path())
                .filter(|path| path.extension().is_some_and(|it| it == "jsonl"))
                .map(|path| fs::read_to_string(path).unwrap())
                .collect()
        }
    }

    #[tokio::test]
    async fn a_token_that_ends_while_its_record_is_written_does_not_leave() {
        let office = Office::open();
        let mut token = Token::example(7, 1);
        token.expires_at = office.desk.clock.now() + chrono::TimeDelta::seconds(1);
        let manual = office.manual.clone();
        let (code, journal) = office
            .call(move |context| {
                context.draft.token(&token);
                // Time passes between the decision and the commit of the record.
                manual.advance(Duration::from_secs(1));
                async {}
            })
            .await;
        assert_eq!(code, Code::Unavailable);
        assert!(journal.contains("\"generation\":\"7\""), "{journal}");
    }

    #[tokio::test]
    async fn a_live_token_leaves_once_its_record_is_durable() {
        let office = Office::open();
        let mut token = Token::example(7, 1);
        token.expires_at = office.desk.clock.now() + chrono::TimeDelta::seconds(1);
        let (code, journal) = office
            .call(move |context| {
                context.draft.token(&token);
                async {}
            })
            .await;
        assert_eq!(code, Code::Ok);
        assert!(journal.contains("\"outcome\":\"ok\""), "{journal}");
    }

    #[tokio::test]
    async fn a_call_that_panics_is_recorded_as_internal() {
        let office = Office::open();
        let (code, journal) =
            office.call(|_| async { panic!("a fault that the test is about") }).await;
        assert_eq!(code, Code::Internal);
        assert!(journal.contains("\"outcome\":\"internal\""), "{journal}");
    }

    #[tokio::test]
    async fn a_call_that_cannot_be_recorded_is_not_answered() {
        let office = Office::open();
        office.desk.journal.close().await;
        let (code, journal) = office.call(|_| async {}).await;
        assert_eq!(code, Code::Unavailable);
        assert!(!journal.contains("get_token"), "{journal}");
    }

    #[tokio::test]
    async fn refusals_beyond_those_that_may_wait_are_answered_at_once_and_recorded_all_the_same() {
        let office = Office::open();
        let never = service_fn(|_| async { panic!("it is not admitted") });
        let stranger = Bearer::generate();
        let waits = office.desk.refused.take(None).unwrap();
        for _ in 0..25 {
            let code = office.send(never, &stranger, Body::empty()).await;
            assert_eq!(code, Code::Unauthenticated);
        }
        drop(waits);
        // Who has a place waits for the record of them all.
        let code = office.send(never, &stranger, Body::empty()).await;
        assert_eq!(code, Code::Unauthenticated);
        let journal = office.journal().await;
        let counts = journal.split("\"count\":").skip(1).map(|rest| {
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            digits.parse::<u32>().unwrap()
        });
        assert_eq!(counts.sum::<u32>(), 26, "{journal}");
        assert!(journal.lines().count() < 26, "{journal}");
    }
}
