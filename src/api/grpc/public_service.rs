//! Limits for health and reflection, which anybody may call without a credential.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use tokio::{sync::OwnedSemaphorePermit, time::timeout};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::{Status, body::Body, server::NamedService};
use tower::Service;

use super::{connection::ConnectionActivity, method::has_response_stream};
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
        let mut stream = None;
        if has_response_stream(request.uri().path()) {
            let connection =
                request.extensions().get::<ConnectionActivity>().cloned().unwrap_or_default();
            let Some(permit) = connection.try_acquire_public_stream() else {
                let refusal = CallRefusal::Overloaded { retry_after: STREAM_RETRY };
                return Box::pin(async move { Ok(Status::from(refusal).into_http()) });
            };
            stream = Some((connection, permit));
        }
        let response = timeout(RESPONSE_TIMEOUT, self.0.call(request));
        Box::pin(async move {
            let too_late = |_| Ok(Status::from(CallRefusal::DeadlineExceeded).into_http());
            let response = response.await.unwrap_or_else(too_late)?;
            Ok(match stream {
                None => response,
                Some((connection, permit)) => {
                    let draining = connection.draining().clone().cancelled_owned();
                    response.map(|body| Body::new(PublicStream::new(body, draining, permit)))
                }
            })
        })
    }
}

/// The body of a response stream. It ends with `UNAVAILABLE` when its connection drains, so that the client
/// opens it again on another connection, and holds its permit until then.
struct PublicStream {
    body: Body,
    draining: Pin<Box<WaitForCancellationFutureOwned>>,
    ended: bool,
    _permit: OwnedSemaphorePermit,
}

impl PublicStream {
    fn new(
        body: Body,
        draining: WaitForCancellationFutureOwned,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        Self { body, draining: Box::pin(draining), ended: false, _permit: permit }
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
            return Pin::new(&mut self.body).poll_frame(context);
        }
        self.ended = true;
        let mut trailers = HeaderMap::new();
        let status = Status::unavailable("the connection is closing: open the stream again");
        // This cannot fail: the text has only characters that a header may hold.
        let _ = status.add_header(&mut trailers);
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.body.is_end_stream()
    }
}
