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

pub use call::{CallContext, DraftRecord, Peer};
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
        journal::{AuditUnavailable, Journal},
        record::Record,
    },
    domain::clock::Clock,
    services::{
        caller_directory::CallerDirectory, caller_rates::CallerRates, client_network::network_of,
        keyed_semaphore::KeyedSemaphore, refusal_aggregator::RefusalAggregator,
        token_provider::Refusal,
    },
    telemetry::{Method, Metrics},
};

/// The longest that an answer waits for its record.
const RECORD_WITHIN: Duration = Duration::from_secs(5);

/// What the layer needs; shared by all connections.
pub struct AuditLayer {
    /// The audit log.
    pub journal: Journal,
    /// Makes one record of refusals that repeat.
    pub folds: RefusalAggregator,
    /// The callers.
    pub directory: Arc<CallerDirectory>,
    /// Whose SPIFFE IDs count.
    pub trust_domain: Option<Arc<str>>,
    /// The rate limit of each caller.
    pub rates: CallerRates,
    /// The deadline of a call that brings none.
    pub default_deadline: Duration,
    /// The longest deadline that a call may bring.
    pub longest_deadline: Duration,
    /// Time.
    pub clock: Clock,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The calls under way: their records are still to be written.
    pub calls: TaskTracker,
    /// The calls that are refused by their headers and not answered yet, by address.
    pub refused: Arc<KeyedSemaphore<Option<IpAddr>>>,
}

/// A service whose every call is recorded.
#[derive(Clone)]
pub struct AuditService<S> {
    inner: S,
    desk: Arc<AuditLayer>,
}

impl<S> AuditService<S> {
    /// Records the calls of `inner` at `desk`.
    pub fn new(inner: S, desk: Arc<AuditLayer>) -> Self {
        Self { inner, desk }
    }
}

impl<S: NamedService> NamedService for AuditService<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for AuditService<S>
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

impl AuditLayer {
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
        let draft = DraftRecord::new(record);

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
        draft: &DraftRecord,
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
        draft: &DraftRecord,
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
        self.rates
            .take(&identified.caller, arrived)
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
    draft: &DraftRecord,
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
mod tests;
