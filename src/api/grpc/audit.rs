//! The layer around `TokenService`: it authenticates and rate limits each call, bounds it by its deadline,
//! and records it. No answer leaves before its audit record is durable.

mod context;
mod deadline;
mod draft_record;
mod token_access;

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

pub use context::CallContext;
use context::trace_id_of;
use deadline::Deadline;
pub use draft_record::DraftRecord;
use draft_record::TokenInResponse;
use futures_util::FutureExt;
use http::{Request, Response};
use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Status, body::Body, server::NamedService};
use tower::Service;
use tracing::error;

use super::{
    authentication::{Authenticator, PresentedCertificate},
    connection::{ConnectionActivity, ConnectionPeer},
    message,
    method::{event_of, has_response_stream, method_of},
    pushback::ClientTime,
    status::outcome_of,
    timeout::timeout_of,
};
use crate::{
    audit::{
        journal::{AuditUnavailable, Journal},
        record::Record,
    },
    domain::{caller::CallerKind, clock::Clock},
    services::{
        caller_directory::CallerDirectory, caller_rates::CallerRates, client_network::network_of,
        database_clock::DatabaseClock, keyed_semaphore::KeyedSemaphore,
        refusal_aggregator::RefusalAggregator, token_provider::CallRefusal,
    },
    telemetry::Metrics,
};

/// The longest time that a response waits for its audit record to become durable.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);

/// What the layer needs; all connections share it.
pub struct AuditLayer {
    /// The audit log.
    pub journal: Journal,
    /// Records refusals: many equal ones as one record with a count.
    pub refusals: RefusalAggregator,
    /// Callers with their credentials and grants, as last followed from the database.
    pub callers: Arc<CallerDirectory>,
    /// The trust domain whose SPIFFE IDs are accepted.
    pub trust_domain: Option<Arc<str>>,
    /// The rate limit of each caller.
    pub rates: Arc<CallerRates>,
    /// The time limit of a call that sends no `grpc-timeout`, counted from its arrival. It is also the
    /// longest time that a stream may take to begin.
    pub default_deadline: Duration,
    /// The longest time limit that a call may ask for; a longer one is clamped to it.
    pub max_deadline: Duration,
    /// The clock of records and tokens.
    pub clock: Clock,
    /// The clock by which bearers end.
    pub database_clock: Arc<DatabaseClock>,
    /// Counts calls by method and status.
    pub metrics: Arc<Metrics>,
    /// Tracks the calls in progress. The shutdown waits for them before it closes the journal, since each
    /// still writes its record.
    pub calls: TaskTracker,
    /// Limits the calls refused by their headers that wait for their record, by client network
    /// (`None` where the address is unknown).
    pub refusal_waits: Arc<KeyedSemaphore<Option<IpAddr>>>,
}

/// A service whose calls pass through the [`AuditLayer`].
#[derive(Clone)]
pub struct AuditService<S> {
    inner: S,
    layer: Arc<AuditLayer>,
}

impl<S> AuditService<S> {
    /// Wraps `inner`.
    pub fn new(inner: S, layer: Arc<AuditLayer>) -> Self {
        Self { inner, layer }
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

    /// Answers the call in a task of its own. A client that resets its stream drops only the returned
    /// future; that cancels `cancelled`, and the task still writes the record.
    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let inner = self.inner.clone();
        let layer = self.layer.clone();
        let arrived = Instant::now();
        let cancelled = CancellationToken::new();
        let cancel_on_drop = cancelled.clone().drop_guard();
        let calls = layer.calls.clone();
        let answer =
            calls.spawn(async move { layer.answer(inner, request, arrived, cancelled).await });
        Box::pin(async move {
            let answered = answer.await;
            cancel_on_drop.disarm();
            Ok(answered.unwrap_or_else(|error| {
                error!(%error, "the task of a call failed: the call may lack its audit record");
                internal_error()
            }))
        })
    }
}

impl AuditLayer {
    /// Answers one call, and counts it in the metrics.
    async fn answer<S>(
        &self,
        inner: S,
        request: Request<Body>,
        arrived: Instant,
        cancelled: CancellationToken,
    ) -> Response<Body>
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    {
        let method = method_of(request.uri().path());
        let peer = request.extensions().get::<ConnectionPeer>();
        let mut record = Record::new(self.clock.wall(), event_of(method));
        record.peer = peer.map(|peer| peer.address.to_string());
        record.trace_id = trace_id_of(request.headers());
        let draft = DraftRecord::new(record);
        let client_time = ClientTime::of(request.headers(), arrived, self.default_deadline);

        let mut response = match self.admit(&request, arrived, &draft) {
            Ok((deadline, context)) => {
                // A panic of the RPC is caught, so that the call is recorded like any other.
                let response = respond(inner, request, context, deadline, &cancelled, &draft);
                let response = AssertUnwindSafe(response).catch_unwind().await;
                let response = response.unwrap_or_else(|_| {
                    error!(?method, "an RPC panicked");
                    internal_error()
                });
                self.record(response, deadline, arrived, &draft).await
            }
            Err(refusal) => {
                let status = draft.refuse(refusal);
                let address = peer.map(|peer| peer.address.ip());
                // Dropping the request starts a task that reads and discards the rest of its body.
                drop(request);
                self.reject(address, status, arrived, &draft).await
            }
        };
        client_time.limit_pushback(&mut response, Instant::now());
        self.metrics.call(method, code_of(&response).into(), arrived.elapsed());
        response
    }

    /// Decides from the request's headers whether a call may reach its RPC: authenticates the caller, counts
    /// the call against the caller's rate limit, determines the deadline, and checks how the message is sent.
    fn admit(
        &self,
        request: &Request<Body>,
        arrived: Instant,
        draft: &DraftRecord,
    ) -> Result<(Deadline, CallContext), CallRefusal> {
        let authenticator = Authenticator {
            callers: &self.callers,
            trust_domain: self.trust_domain.as_deref(),
            now: self.database_clock.now(),
        };
        let peer = request.extensions().get::<ConnectionPeer>();
        let certificate = peer.and_then(|peer| peer.certificate.as_ref());
        let presented = certificate.map(|certificate| PresentedCertificate {
            identity: certificate.identity(),
            refusal: certificate.refusal(),
        });
        let authenticated = authenticator
            .authenticate(request.headers(), presented)
            .map_err(|failure| draft.set_authentication_failure(failure))?;
        draft.set_caller(&authenticated);
        self.rates
            .take(&authenticated.caller, arrived)
            .map_err(|retry_after| CallRefusal::CallerRate { retry_after })?;
        let timeout = timeout_of(request.headers())?.unwrap_or(self.default_deadline);
        // A stream only has to begin by its deadline; then it lasts as long as its client wants.
        let is_stream = has_response_stream(request.uri().path());
        let max_timeout = if is_stream { self.default_deadline } else { self.max_deadline };
        let deadline = Deadline(arrived + timeout.min(max_timeout));
        let connection = request.extensions().get::<ConnectionActivity>();
        connection.inspect(|connection| connection.note_authenticated());
        message::check(request)?;
        let context = CallContext {
            caller: authenticated.caller,
            certificate: certificate.filter(|_| authenticated.kind != CallerKind::Bearer).cloned(),
            credential: authenticated.credential,
            deadline: deadline.for_rpc(arrived),
            draft: draft.clone(),
            draining: connection.map(|it| it.draining().clone()).unwrap_or_default(),
        };
        Ok((deadline, context))
    }

    /// Writes the record of a call that reached its RPC. Returns the response to send: the RPC's own only
    /// when the record is durable, and, if it holds a token, while the token is live and the caller may have it.
    async fn record(
        &self,
        response: Response<Body>,
        deadline: Deadline,
        arrived: Instant,
        draft: &DraftRecord,
    ) -> Response<Body> {
        let code = code_of(&response);
        let (record, token) = draft.finish(outcome_of(code), arrived.elapsed());
        let timeout = deadline.time_for_record(RECORD_TIMEOUT);
        let recorded = if code == Code::Ok {
            self.journal.append(record).durable(timeout).await
        } else {
            self.refusals.record(record, timeout).await
        };
        match recorded {
            // The call's deadline passed first, so the journal is not at fault.
            Err(AuditUnavailable::TooSlow(_)) if deadline.has_passed() => {
                Status::from(CallRefusal::DeadlineExceeded).into_http()
            }
            Err(_) => Status::from(CallRefusal::AuditUnavailable).into_http(),
            Ok(()) => match token.map_or(Ok(()), |token| self.check_again(&token)) {
                Ok(()) => response,
                Err(refusal) => Status::from(refusal).into_http(),
            },
        }
    }

    /// Checks that a token may still be sent. It, the credential, the grant or the account may have ended during the
    /// wait for the record, which says that the call was answered.
    fn check_again(&self, token: &TokenInResponse) -> Result<(), CallRefusal> {
        if token.expires_at <= self.clock.now() {
            return Err(CallRefusal::TokenEnded);
        }
        token.access.check(&self.callers, self.database_clock.now())
    }

    /// Records a call that did not reach its RPC. Returns the response to send.
    ///
    /// Anybody can cause such calls, as many as connections and streams allow. So only a limited number of
    /// them waits for the record; beyond it, calls are answered while their record is being written, unless
    /// nothing can be recorded.
    async fn reject(
        &self,
        address: Option<IpAddr>,
        status: Status,
        arrived: Instant,
        draft: &DraftRecord,
    ) -> Response<Body> {
        let wait_permit = self.refusal_waits.try_acquire(address.map(network_of));
        let (record, _) = draft.finish(outcome_of(status.code()), arrived.elapsed());
        let timeout = if wait_permit.is_some() { RECORD_TIMEOUT } else { Duration::ZERO };
        match self.refusals.record(record, timeout).await {
            Ok(()) => status.into_http(),
            Err(AuditUnavailable::TooSlow(_)) if wait_permit.is_none() => status.into_http(),
            Err(_) => Status::from(CallRefusal::AuditUnavailable).into_http(),
        }
    }
}

/// Calls the RPC. Refuses the call instead if its deadline passes, or its client cancels it, before the RPC
/// has answered.
async fn respond<S>(
    mut inner: S,
    mut request: Request<Body>,
    context: CallContext,
    deadline: Deadline,
    cancelled: &CancellationToken,
    draft: &DraftRecord,
) -> Response<Body>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    // The call may have waited for its turn on the thread until after its deadline.
    if deadline.has_passed() {
        return draft.refuse(CallRefusal::DeadlineExceeded).into_http();
    }
    request.extensions_mut().insert(context);
    tokio::select! {
        biased;
        answered = inner.call(request) => match answered {
            Ok(response) => match message::refusal_of(&response) {
                Some(refusal) => draft.refuse(refusal).into_http(),
                None => response,
            },
            Err(never) => match never {},
        },
        () = cancelled.cancelled() => draft.refuse(CallRefusal::Cancelled).into_http(),
        () = deadline.passes() => draft.refuse(CallRefusal::DeadlineExceeded).into_http(),
    }
}

/// Returns the response to a call that failed by a bug of the broker. Only the log names the cause.
fn internal_error() -> Response<Body> {
    Status::internal("internal error").into_http()
}

/// Returns the gRPC status in a response's headers. A successful response has none there: its status comes
/// in the trailers.
fn code_of(response: &Response<Body>) -> Code {
    response
        .headers()
        .get("grpc-status")
        .map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes()))
}

#[cfg(test)]
mod tests;
