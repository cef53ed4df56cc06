//! What goes on on a connection: one on which nothing does is let go, and so is one whose client does not
//! read what it asked for.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

/// Streams of health and reflection at once.
const PUBLIC_STREAMS: usize = 16;
/// How long a connection may have no call before it is told to finish.
const IDLE: Duration = Duration::from_mins(10);
/// The same until its first call of a known caller, whatever else it is used for.
const UNKNOWN: Duration = Duration::from_mins(1);
/// How long an answer may wait for its client to read it; up to twice that.
const UNREAD: Duration = Duration::from_secs(15);

/// A connection, as its requests carry it. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Connection(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    calls: Mutex<Calls>,
    public: Arc<Semaphore>,
    leaving: CancellationToken,
}

#[derive(Debug)]
struct Calls {
    begun: Instant,
    under_way: usize,
    /// When the last one ended.
    ended: Option<Instant>,
    /// A known caller has called.
    known: bool,
    /// The answers that wait to be read: those of this turn, and those of the one before.
    unread: [usize; 2],
    turn: u64,
}

/// A call, until its answer has left or is given up.
#[derive(Debug)]
pub(super) struct Call {
    connection: Connection,
    /// The turn in which its answer was ready.
    answered: Option<u64>,
}

impl Default for Connection {
    fn default() -> Self {
        let calls = Calls {
            begun: Instant::now(),
            under_way: 0,
            ended: None,
            known: false,
            unread: [0, 0],
            turn: 0,
        };
        Self(Arc::new(Inner {
            calls: Mutex::new(calls),
            public: Arc::new(Semaphore::new(PUBLIC_STREAMS)),
            leaving: CancellationToken::new(),
        }))
    }
}

impl Connection {
    /// Counts a call.
    pub(super) fn begin(&self) -> Call {
        self.calls().under_way += 1;
        Call { connection: self.clone(), answered: None }
    }

    /// Notes that a call came from a known caller.
    pub(super) fn admitted(&self) {
        self.calls().known = true;
    }

    /// A place for a stream of a service that anybody may call.
    pub(super) fn public_stream(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.public).try_acquire_owned().ok()
    }

    /// Cancelled when the connection is to end: its streams are to end before.
    pub(super) fn leaving(&self) -> &CancellationToken {
        &self.0.leaving
    }

    /// Returns once no call has been under way for long.
    pub(super) async fn idle(&self) {
        loop {
            let until = self.calls().idle_at(Instant::now());
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }

    /// Returns once an answer has waited for long to be read.
    pub(super) async fn unread(&self) {
        loop {
            sleep(UNREAD).await;
            if self.calls().next_turn() {
                return;
            }
        }
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        // No code panics while it holds this lock.
        self.0.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Calls {
    /// When it will have been idle for too long, if no call begins and those at `now` end.
    fn idle_at(&self, now: Instant) -> Instant {
        if !self.known {
            return self.begun + UNKNOWN;
        }
        let since = if self.under_way > 0 { now } else { self.ended.unwrap_or(self.begun) };
        since + IDLE
    }

    /// Begins another turn; whether an answer has waited for all of the last one.
    fn next_turn(&mut self) -> bool {
        let waited = self.unread[1] > 0;
        self.unread = [0, self.unread[0]];
        self.turn += 1;
        waited
    }
}

impl Call {
    /// The answer is ready, and is no stream: its client is expected to read it.
    pub(super) fn answered(&mut self) {
        let mut calls = self.connection.calls();
        calls.unread[0] += 1;
        self.answered = Some(calls.turn);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut calls = self.connection.calls();
        calls.under_way -= 1;
        calls.ended = Some(Instant::now());
        if let Some(turn) = self.answered {
            // One that waited for longer has ended the connection.
            let ago = usize::try_from(calls.turn - turn).unwrap_or(usize::MAX);
            if let Some(unread) = calls.unread.get_mut(ago) {
                *unread -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_caller_s_connection_is_idle_once_its_last_answer_has_left_for_long() {
        let connection = Connection::default();
        let begun = connection.calls().begun;
        let idle_at = |minutes| connection.calls().idle_at(begun + Duration::from_mins(minutes));
        let (first, second) = (connection.begin(), connection.begin());
        assert_eq!(idle_at(3), begun + UNKNOWN, "whatever a stranger calls");
        connection.admitted();
        drop(second);
        assert_eq!(idle_at(3), begun + Duration::from_mins(13));
        drop(first);
        let ended = connection.calls().ended.unwrap();
        assert!(ended > begun && idle_at(15) == ended + IDLE);
    }

    #[test]
    fn an_answer_that_waits_for_a_whole_turn_is_told_and_one_that_leaves_is_not() {
        let connection = Connection::default();
        let turn = || connection.calls().next_turn();
        let (mut slow, mut quick) = (connection.begin(), connection.begin());
        let stream = connection.begin();
        quick.answered();
        drop(quick);
        assert!(!turn());
        slow.answered();
        assert!(!turn(), "it has waited for less than a turn");
        drop(slow);
        assert!(!turn());
        let mut stuck = connection.begin();
        stuck.answered();
        assert!(!turn());
        assert!(turn());
        assert!(!turn(), "it is told once");
        drop((stuck, stream));
        assert_eq!(connection.calls().under_way, 0);
        assert_eq!(connection.calls().unread, [0, 0]);
    }
}
