//! Limits for health and reflection, which anybody may call without a credential.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Frame, SizeHint};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, timeout},
};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::{Status, body::Body, server::NamedService};
use tower::Service;

use super::{
    connection::ConnectionActivity,
    message,
    method::{has_request_stream, has_response_stream},
    pushback::ClientTime,
};
use crate::services::token_provider::CallRefusal;

/// How long a call may take until its response begins. The time in which its message arrives counts.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Retry delay of a stream that is refused because the connection has the maximum already.
const STREAM_RETRY: Duration = Duration::from_secs(1);

/// Wraps a service that needs no credential: limits its time and its streams per connection, and ends its
/// streams when their connection drains.
#[derive(Clone)]
pub(super) struct PublicService<S>(pub(super) S);

impl<S: NamedService> NamedService for PublicService<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for PublicService<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let time = ClientTime::of(request.headers(), Instant::now(), RESPONSE_TIMEOUT);
        let answer = self.begin(request);
        Box::pin(async move {
            let mut response = match answer {
                Ok(answer) => answer.await?,
                Err(refusal) => Status::from(refusal).into_http(),
            };
            time.limit_pushback(&mut response, Instant::now());
            Ok(response)
        })
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

impl<S> PublicService<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    /// Begins a call, unless its headers are reason enough to refuse it.
    fn begin(&mut self, request: Request<Body>) -> Result<Answer, CallRefusal> {
        message::check(&request)?;
        let mut stream = None;
        if has_response_stream(request.uri().path()) {
            let connection =
                request.extensions().get::<ConnectionActivity>().cloned().unwrap_or_default();
            let permit = connection
                .try_acquire_public_stream()
                .ok_or(CallRefusal::Overloaded { retry_after: STREAM_RETRY })?;
            stream = Some((connection, permit));
        }
        let is_unread = Arc::new(AtomicBool::new(has_request_stream(request.uri().path())));
        let request = request.map(|body| Body::new(NotedBody(body, is_unread.clone())));
        let response = timeout(RESPONSE_TIMEOUT, self.0.call(request));
        Ok(Box::pin(async move {
            let too_late = |_| Ok(Status::from(CallRefusal::DeadlineExceeded).into_http());
            let response = response.await.unwrap_or_else(too_late)?;
            if let Some(refusal) = message::refusal_of(&response) {
                return Ok(Status::from(refusal).into_http());
            }
            Ok(match stream {
                None => response,
                Some((connection, permit)) => {
                    let draining = connection.draining().clone().cancelled_owned();
                    response
                        .map(|body| Body::new(PublicStream::new(body, is_unread, draining, permit)))
                }
            })
        }))
    }
}

/// The body of a request. It notes in the flag, which says that there is more to read, when it has ended.
struct NotedBody(Body, Arc<AtomicBool>);

impl http_body::Body for NotedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.0).poll_frame(context);
        if let Poll::Ready(None | Some(Err(_))) = polled {
            self.1.store(false, Ordering::Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}

/// The body of a response stream. It ends with `UNAVAILABLE` when its connection drains, so that the client
/// opens it again on another connection, and holds its permit until then.
///
/// Reflection ends its stream as if all were well when it cannot read a message. So a stream that ends well before
/// its request has ended is given the status of a malformed message.
struct PublicStream {
    body: Body,
    is_request_unread: Arc<AtomicBool>,
    draining: Pin<Box<WaitForCancellationFutureOwned>>,
    ended: bool,
    _permit: OwnedSemaphorePermit,
}

impl PublicStream {
    fn new(
        body: Body,
        is_request_unread: Arc<AtomicBool>,
        draining: WaitForCancellationFutureOwned,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        let draining = Box::pin(draining);
        Self { body, is_request_unread, draining, ended: false, _permit: permit }
    }

    /// Returns the frame to send for `frame`, which the service sends.
    fn checked(&self, frame: Frame<Bytes>) -> Frame<Bytes> {
        let ends_well = |trailers: &HeaderMap| {
            trailers.get(Status::GRPC_STATUS).is_some_and(|status| status == "0")
        };
        let is_unread = self.is_request_unread.load(Ordering::Relaxed);
        if !(is_unread && frame.trailers_ref().is_some_and(ends_well)) {
            return frame;
        }
        let description = "it is malformed, or too large".to_owned();
        trailers_of(&CallRefusal::MessageMalformed { description }.into())
    }
}

impl http_body::Body for PublicStream {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.draining.as_mut().poll(context).is_pending() {
            let polled = Pin::new(&mut self.body).poll_frame(context);
            return polled.map(|frame| frame.map(|frame| frame.map(|frame| self.checked(frame))));
        }
        self.ended = true;
        let status = Status::unavailable("the connection is closing: open the stream again");
        Poll::Ready(Some(Ok(trailers_of(&status))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.body.is_end_stream()
    }
}

/// Returns the frame that ends a stream with `status`.
fn trailers_of(status: &Status) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    // This cannot fail: the text has only characters that a header may hold.
    let _ = status.add_header(&mut trailers);
    Frame::trailers(trailers)
}
