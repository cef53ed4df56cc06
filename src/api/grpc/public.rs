//! Health and reflection need no credential: what they may cost is bounded here.

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

use super::{connection::Connection, is_stream};
use crate::services::token_provider::Refusal;

/// The longest request of these services that is read, in bytes: a name.
pub(super) const LONGEST_REQUEST: usize = 4 * 1024;
/// How long a call may take until its answer begins, the arrival of its message included.
const ANSWERED_WITHIN: Duration = Duration::from_secs(5);
/// When a stream that is refused may be tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// A service that anybody may call.
#[derive(Clone)]
pub(super) struct Public<S>(pub(super) S);

impl<S: NamedService> NamedService for Public<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Public<S>
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
        if is_stream(request.uri().path()) {
            let connection = request.extensions().get::<Connection>().cloned().unwrap_or_default();
            let Some(place) = connection.public_stream() else {
                let shed = Refusal::Overloaded { retry_after: AGAIN };
                return Box::pin(async move { Ok(Status::from(shed).into_http()) });
            };
            stream = Some((connection, place));
        }
        let answer = timeout(ANSWERED_WITHIN, self.0.call(request));
        Box::pin(async move {
            let late = |_| Ok(Status::from(Refusal::DeadlineExceeded).into_http());
            let answer = answer.await.unwrap_or_else(late)?;
            Ok(match stream {
                None => answer,
                Some((connection, place)) => {
                    let leaving = connection.leaving().clone().cancelled_owned();
                    answer.map(|body| Body::new(Lasting::new(body, leaving, place)))
                }
            })
        })
    }
}

/// A stream that lasts until its connection is to end.
struct Lasting {
    body: Body,
    leaving: Pin<Box<WaitForCancellationFutureOwned>>,
    over: bool,
    _place: OwnedSemaphorePermit,
}

impl Lasting {
    fn new(
        body: Body,
        leaving: WaitForCancellationFutureOwned,
        place: OwnedSemaphorePermit,
    ) -> Self {
        Self { body, leaving: Box::pin(leaving), over: false, _place: place }
    }
}

impl http_body::Body for Lasting {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.over {
            return Poll::Ready(None);
        }
        if self.leaving.as_mut().poll(context).is_pending() {
            return Pin::new(&mut self.body).poll_frame(context);
        }
        self.over = true;
        let mut trailers = HeaderMap::new();
        let ended = Status::unavailable("the connection ends: come again");
        let _ = ended.add_header(&mut trailers);
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }
}
