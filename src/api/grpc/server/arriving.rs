//! Messages on their way: how long they may take, and what becomes of those that nobody waits for.

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

use super::Broken;
use crate::api::grpc::LONGEST_MESSAGE;

/// How long a message may take to arrive; of a stream of them, each.
const ARRIVES_WITHIN: Duration = Duration::from_secs(5);
/// How long the rest of a call that was answered before is heard.
const HEARD_FOR: Duration = Duration::from_secs(1);
/// Such calls at once; more are not heard.
const MOST_HEARD: usize = 10_000;

static HEARING: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(MOST_HEARD)));

/// The body of a request, within its time.
///
/// A call may be answered before all of it has come: it is refused by its headers, or its message is too
/// long. What comes for a stream that is over counts as its client's fault, and many of these end the
/// connection, with all other calls on it. So the rest is heard when this is dropped, within bounds.
pub(super) struct Arriving<B: Body<Data = Bytes> + Send + Unpin + 'static> {
    /// Not there once it is over.
    body: Option<B>,
    /// Made when it has to be waited for.
    late: Option<Pin<Box<Sleep>>>,
    /// It is a stream of messages.
    many: bool,
}

impl<B: Body<Data = Bytes> + Send + Unpin> Arriving<B> {
    pub(super) fn new(body: B, many: bool) -> Self {
        Self { body: Some(body), late: None, many }
    }
}

impl<B> Body for Arriving<B>
where
    B: Body<Data = Bytes, Error: Into<Broken>> + Send + Unpin,
{
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        match Pin::new(body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if self.many {
                    self.late = None;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(over) => {
                self.body = None;
                Poll::Ready(over.map(|failed| failed.map_err(Into::into)))
            }
            Poll::Pending => {
                let late = self.late.get_or_insert_with(|| Box::pin(sleep(ARRIVES_WITHIN)));
                if late.as_mut().poll(context).is_pending() {
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

impl<B: Body<Data = Bytes> + Send + Unpin> Drop for Arriving<B> {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| !body.is_end_stream()) else { return };
        let place = Arc::clone(&HEARING).try_acquire_owned();
        let (Ok(place), Ok(runtime)) = (place, Handle::try_current()) else { return };
        runtime.spawn(async move {
            let _place = place;
            // Who takes longer is no longer heard.
            let _ = timeout(HEARD_FOR, hear(&mut body)).await;
        });
    }
}

/// Reads `body` to its end, or until it is longer than any request.
async fn hear(body: &mut (impl Body<Data = Bytes> + Unpin)) {
    let mut heard = 0;
    while heard <= LONGEST_MESSAGE {
        match poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await {
            Some(Ok(frame)) => heard += frame.data_ref().map_or(0, Bytes::len),
            Some(Err(_)) | None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    /// Pieces of 16 KiB and then silence; how many were taken, and whether it is gone.
    struct Pieces(usize, Arc<AtomicUsize>);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = Broken;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
            let Some(left) = self.0.checked_sub(1) else { return Poll::Pending };
            self.0 = left;
            self.1.fetch_add(1, Relaxed);
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[0; 16 * 1024])))))
        }
    }

    async fn gone(taken: &Arc<AtomicUsize>) -> usize {
        while Arc::strong_count(taken) > 1 {
            sleep(Duration::from_millis(5)).await;
        }
        taken.load(Relaxed)
    }

    #[tokio::test]
    async fn a_call_that_is_answered_early_is_heard_out_unless_it_is_too_long() {
        for (pieces, heard) in [(3, 3), (1_000, 5)] {
            let taken = Arc::default();
            drop(Arriving::new(Pieces(pieces, Arc::clone(&taken)), false));
            assert_eq!(gone(&taken).await, heard);
        }
    }

    #[tokio::test]
    async fn a_message_that_does_not_come_is_an_error_and_not_waited_for_again() {
        let taken = Arc::default();
        let mut body = Arriving::new(Pieces(1, Arc::clone(&taken)), false);
        body.late = Some(Box::pin(sleep(Duration::from_millis(1))));
        let mut next = async || poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
        assert!(next().await.unwrap().is_ok());
        let late = next().await.unwrap().unwrap_err();
        let late = late.downcast::<Status>().unwrap();
        assert_eq!(late.code(), tonic::Code::DeadlineExceeded);
        assert!(next().await.is_none());
        assert_eq!(gone(&taken).await, 1);
    }

    #[tokio::test]
    async fn each_message_of_a_stream_has_its_own_time() {
        let mut body = Arriving::new(Pieces(1, Arc::default()), true);
        body.late = Some(Box::pin(sleep(Duration::ZERO)));
        assert!(poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await.unwrap().is_ok());
        assert!(body.late.is_none());
    }
}
