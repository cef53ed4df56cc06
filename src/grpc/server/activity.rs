//! What goes on on a connection: a connection on which nothing does is let go.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

/// The calls of a connection. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Activity(Arc<Mutex<Calls>>);

#[derive(Debug)]
struct Calls {
    under_way: usize,
    /// When the last one ended, or the connection began.
    since: Instant,
}

impl Calls {
    /// When no call will have been under way for `limit`, if none begins and those at `now` end.
    fn idle_at(&self, limit: Duration, now: Instant) -> Instant {
        let since = if self.under_way > 0 { now } else { self.since };
        since + limit
    }
}

/// A call, until its answer has left or is given up.
#[derive(Debug)]
pub(super) struct Call(Activity);

impl Activity {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Calls { under_way: 0, since: Instant::now() })))
    }

    /// Counts a call.
    pub(super) fn begin(&self) -> Call {
        self.calls().under_way += 1;
        Call(self.clone())
    }

    /// Returns once no call has been under way for `limit`.
    pub(super) async fn idle(&self, limit: Duration) {
        loop {
            let until = self.calls().idle_at(limit, Instant::now());
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        // No code panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut calls = self.0.calls();
        calls.under_way -= 1;
        calls.since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use tonic::body::Body;

    use super::*;
    use crate::grpc::held::Held;

    #[test]
    fn a_connection_is_idle_once_its_last_answer_has_left_for_long() {
        let limit = Duration::from_mins(10);
        let activity = Activity::new();
        let begun = activity.calls().since;
        let idle_at =
            |minutes| activity.calls().idle_at(limit, begun + Duration::from_mins(minutes));
        assert_eq!(idle_at(3), begun + limit);
        let (first, second) = (activity.begin(), activity.begin());
        drop(second);
        assert_eq!(idle_at(3), begun + Duration::from_mins(13));
        let answer = Held::new(Body::empty(), first);
        assert_eq!(idle_at(15), begun + Duration::from_mins(25));
        drop(answer);
        let ended = activity.calls().since;
        assert!(ended > begun && idle_at(15) == ended + limit);
    }

    #[tokio::test]
    async fn a_wait_for_idleness_ends_once_there_is_some() {
        let activity = Activity::new();
        activity.idle(Duration::ZERO).await;
        let call = activity.begin();
        let mut idle = std::pin::pin!(activity.idle(Duration::from_millis(1)));
        let waited = tokio::time::timeout(Duration::from_millis(20), &mut idle).await;
        assert!(waited.is_err(), "a call is under way");
        drop(call);
        idle.await;
    }
}
