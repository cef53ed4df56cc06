//! A channel without a buffer: its sender waits until the receiver waits for the next value. So a value that must
//! not be sent any more has not been sent yet.

use std::{
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Creates the two halves of a channel.
pub(super) fn handover<T>() -> (Sender<T>, Receiver<T>) {
    let (sender, values) = mpsc::channel(1);
    let demand = Arc::new(Semaphore::new(0));
    let sender = Sender { values: sender, demand: demand.clone() };
    (sender, Receiver { values, demand, waits: false, passes_on: false })
}

/// The sending half. Clones send to the same receiver.
pub(super) struct Sender<T> {
    values: mpsc::Sender<T>,
    /// Has a permit while the receiver waits for a value. Closed when the receiver is dropped.
    demand: Arc<Semaphore>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { values: self.values.clone(), demand: self.demand.clone() }
    }
}

impl<T> Sender<T> {
    /// Waits until the receiver waits for a value, and returns the place for it. `None` once the receiver was
    /// dropped. Cancel safe.
    pub(super) async fn slot(&self) -> Option<Slot<T>> {
        let demand = self.demand.clone().acquire_owned().await.ok()?;
        let place = self.values.clone().reserve_owned().await.ok()?;
        Some(Slot { demand, place })
    }

    /// Sends the last value, which may be buffered. Fails if the receiver was dropped.
    pub(super) async fn send_last(&self, value: T) -> Result<(), mpsc::error::SendError<T>> {
        self.values.send(value).await
    }

    /// Returns once the receiver was dropped. Cancel safe.
    pub(super) async fn closed(&self) {
        self.values.closed().await;
    }
}

/// The place for one value. Dropping it without a value leaves the place to another value.
pub(super) struct Slot<T> {
    demand: OwnedSemaphorePermit,
    place: mpsc::OwnedPermit<T>,
}

impl<T> Slot<T> {
    pub(super) fn send(self, value: T) {
        self.demand.forget();
        self.place.send(value);
    }
}

/// The receiving half.
pub struct Receiver<T> {
    values: mpsc::Receiver<T>,
    demand: Arc<Semaphore>,
    /// Whether the sender knows that the receiver waits for a value.
    waits: bool,
    /// Whether the last value may not have been passed on yet.
    passes_on: bool,
}

impl<T> Stream for Receiver<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        // tonic asks once more for a value before it passes the last one on, to send both at once. It is answered
        // that there is none yet, and asks again when HTTP/2 has taken the last one.
        if mem::take(&mut self.passes_on) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let polled = self.values.poll_recv(context);
        match &polled {
            Poll::Ready(value) => {
                self.waits = false;
                self.passes_on = value.is_some();
            }
            Poll::Pending => {
                if !mem::replace(&mut self.waits, true) {
                    self.demand.add_permits(1);
                }
            }
        }
        polled
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.demand.close();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt};

    use super::*;

    #[tokio::test]
    async fn a_value_is_sent_only_when_the_receiver_waits_for_it() {
        let (sender, mut receiver) = handover();
        assert!(sender.slot().now_or_never().is_none());
        assert!(receiver.next().now_or_never().is_none());
        // A place that was not used can be used by another value.
        drop(sender.slot().now_or_never().flatten().unwrap());
        sender.slot().now_or_never().flatten().unwrap().send(1);
        assert!(sender.slot().now_or_never().is_none());
        assert_eq!(receiver.next().await, Some(1));
        // The first poll after a value is that of a receiver that has not passed it on yet.
        assert!(receiver.next().now_or_never().is_none());
        assert!(sender.slot().now_or_never().is_none());
        assert!(receiver.next().now_or_never().is_none());
        sender.slot().now_or_never().flatten().unwrap().send(2);
        assert_eq!(receiver.next().await, Some(2));
    }

    #[tokio::test]
    async fn all_values_arrive_in_order_and_then_the_last_one_and_the_end() {
        let (sender, receiver) = handover();
        let sending = tokio::spawn(async move {
            for n in 0..100 {
                sender.slot().await.unwrap().send(n);
            }
            sender.send_last(100).await.unwrap();
        });
        let values: Vec<_> = receiver.collect().await;
        assert_eq!(values, (0..=100).collect::<Vec<_>>());
        sending.await.unwrap();
    }

    #[tokio::test]
    async fn a_sender_notices_that_the_receiver_is_gone() {
        let (sender, receiver) = handover::<u8>();
        let waiting = tokio::spawn({
            let sender = sender.clone();
            async move { sender.slot().await.is_none() }
        });
        drop(receiver);
        assert!(waiting.await.unwrap());
        sender.closed().await;
        assert!(sender.send_last(1).await.is_err());
    }
}
