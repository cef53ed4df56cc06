//! The body of a request: it limits how long a message may take to arrive, and discards what is left unread.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::{
    runtime::Handle,
    sync::Semaphore,
    time::{Sleep, sleep, timeout},
};
use tonic::Status;
use tower::BoxError;

use crate::api::grpc::limits::MAX_REQUEST_BYTES;

/// How long a message may take to arrive. In a request stream, how long the next data may take to arrive.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an unread body is read and discarded.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(1);
/// How many bodies are discarded at the same time in this process; others are dropped at once.
const MAX_DISCARDS: usize = 10_000;

static DISCARDS: LazyLock<Arc<Semaphore>> =
    LazyLock::new(|| Arc::new(Semaphore::new(MAX_DISCARDS)));

/// The body of a request, which must arrive in time.
///
/// A call may be answered before its body has arrived: it is refused by its headers, or its message is too
/// large. HTTP/2 data for a stream that has ended counts as a fault of the client, and too many of them close
/// the connection with all its other calls. So when this is dropped, the rest of the body is read and
/// discarded in a task of its own, up to the largest request and for one second.
pub(super) struct RequestBody<B: Body<Data = Bytes> + Send + Unpin + 'static> {
    /// `None` once the body was read to its end, failed, or took too long.
    body: Option<B>,
    /// Set when data is first waited for. In a request stream, data that arrives clears it.
    message_deadline: Option<Pin<Box<Sleep>>>,
    /// Whether the request is a stream of messages, so that the time limit starts again with each arrival of
    /// data.
    is_stream: bool,
}

impl<B: Body<Data = Bytes> + Send + Unpin> RequestBody<B> {
    pub(super) fn new(body: B, is_stream: bool) -> Self {
        Self { body: Some(body), message_deadline: None, is_stream }
    }
}

impl<B> Body for RequestBody<B>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        match Pin::new(body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if self.is_stream {
                    self.message_deadline = None;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(end) => {
                self.body = None;
                Poll::Ready(end.map(|failed| failed.map_err(Into::into)))
            }
            Poll::Pending => {
                let deadline =
                    self.message_deadline.get_or_insert_with(|| Box::pin(sleep(MESSAGE_TIMEOUT)));
                if deadline.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                self.body = None;
                let late = Status::deadline_exceeded("the message did not arrive in time");
                Poll::Ready(Some(Err(late.into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl<B: Body<Data = Bytes> + Send + Unpin> Drop for RequestBody<B> {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| !body.is_end_stream()) else { return };
        let permit = Arc::clone(&DISCARDS).try_acquire_owned();
        let (Ok(permit), Ok(runtime)) = (permit, Handle::try_current()) else { return };
        runtime.spawn(async move {
            let _permit = permit;
            // After the timeout, the rest is not read.
            let _ = timeout(DISCARD_TIMEOUT, discard(&mut body)).await;
        });
    }
}

/// Reads `body` to its end, or until it is larger than any valid request.
async fn discard(body: &mut (impl Body<Data = Bytes> + Unpin)) {
    let mut bytes = 0;
    while bytes <= MAX_REQUEST_BYTES {
        match poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await {
            Some(Ok(frame)) => bytes += frame.data_ref().map_or(0, Bytes::len),
            Some(Err(_)) | None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    /// A body of `left` chunks of 16 KiB, after which it stays pending. It counts the chunks that were read.
    struct ChunksThenSilence {
        left: usize,
        read: Arc<AtomicUsize>,
    }

    fn chunks(left: usize, read: &Arc<AtomicUsize>) -> ChunksThenSilence {
        ChunksThenSilence { left, read: Arc::clone(read) }
    }

    impl Body for ChunksThenSilence {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            let Some(left) = self.left.checked_sub(1) else { return Poll::Pending };
            self.left = left;
            self.read.fetch_add(1, Relaxed);
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[0; 16 * 1024])))))
        }
    }

    /// Waits until the body was dropped. Returns how many of its chunks were read.
    async fn read_until_dropped(read: &Arc<AtomicUsize>) -> usize {
        while Arc::strong_count(read) > 1 {
            sleep(Duration::from_millis(5)).await;
        }
        read.load(Relaxed)
    }

    #[tokio::test]
    async fn an_unread_body_is_discarded_up_to_the_largest_request() {
        for (sent, discarded) in [(3, 3), (1_000, 5)] {
            let read = Arc::default();
            drop(RequestBody::new(chunks(sent, &read), false));
            assert_eq!(read_until_dropped(&read).await, discarded);
        }
    }

    #[tokio::test]
    async fn a_message_that_does_not_arrive_in_time_ends_the_body_with_an_error() {
        let read = Arc::default();
        let mut body = RequestBody::new(chunks(1, &read), false);
        body.message_deadline = Some(Box::pin(sleep(Duration::from_millis(1))));
        let mut next = async || poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
        assert!(next().await.unwrap().is_ok());
        let late = next().await.unwrap().unwrap_err();
        let late = late.downcast::<Status>().unwrap();
        assert_eq!(late.code(), tonic::Code::DeadlineExceeded);
        assert!(next().await.is_none());
        assert_eq!(read_until_dropped(&read).await, 1);
    }

    #[tokio::test]
    async fn data_that_arrives_in_a_request_stream_resets_the_time_limit() {
        let mut body = RequestBody::new(chunks(1, &Arc::default()), true);
        body.message_deadline = Some(Box::pin(sleep(Duration::ZERO)));
        assert!(poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await.unwrap().is_ok());
        assert!(body.message_deadline.is_none());
    }
}
