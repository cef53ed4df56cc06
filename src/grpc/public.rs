//! Health and reflection need no credential: what they may cost is bounded here.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use tokio::{sync::Semaphore, time::timeout};
use tonic::{Status, body::Body, server::NamedService};
use tower::Service;

use super::held::Held;
use crate::broker::Refusal;

/// Streams at once on a connection.
const MOST_STREAMS: usize = 16;
/// How long a call that is no stream may take, the arrival of its message included.
const ANSWERED_WITHIN: Duration = Duration::from_secs(5);
/// When a stream that is refused may be tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// The methods whose calls last for as long as the client wants.
const STREAMS: [&str; 2] = ["Watch", "ServerReflectionInfo"];

/// The places for such streams of one connection; an extension of each of its requests.
#[derive(Clone, Debug)]
pub(super) struct PublicStreams(Arc<Semaphore>);

impl Default for PublicStreams {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MOST_STREAMS)))
    }
}

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
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        if !STREAMS.contains(&method) {
            let answer = timeout(ANSWERED_WITHIN, self.0.call(request));
            return Box::pin(async move {
                let late = |_| Ok(Status::from(Refusal::DeadlineExceeded).into_http());
                answer.await.unwrap_or_else(late)
            });
        }
        let places = request.extensions().get::<PublicStreams>().cloned().unwrap_or_default();
        let Ok(place) = places.0.try_acquire_owned() else {
            let shed = Refusal::Overloaded { retry_after: AGAIN };
            return Box::pin(async move { Ok(Status::from(shed).into_http()) });
        };
        let answer = self.0.call(request);
        Box::pin(async move { Ok(answer.await?.map(|body| Body::new(Held::new(body, place)))) })
    }
}
