//! What each request knows of its connection: who the peer is, and what else the connection is doing.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::tls::ClientCertificate;

/// How many streams of health and reflection a connection may have at the same time.
const MAX_PUBLIC_STREAMS: usize = 16;
/// How long a connection may have no call before it is closed.
const IDLE_TIMEOUT: Duration = Duration::from_mins(10);
/// How long a connection may last without a call of an authenticated caller, whatever else it is used for.
const UNAUTHENTICATED_TIMEOUT: Duration = Duration::from_mins(1);
/// How long a response may wait for its client to read it. The check runs once per interval of this length,
/// so the connection is closed after one to two intervals.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(15);

/// The other end of a connection. Each request carries it as an extension.
#[derive(Clone, Debug)]
pub(super) struct ConnectionPeer {
    /// The client's address; behind a trusted balancer, the address that the balancer names.
    pub(super) address: SocketAddr,
    /// The client certificate, if the client presented one. The handshake has verified it.
    pub(super) certificate: Option<Arc<ClientCertificate>>,
}

impl ConnectionPeer {
    /// Returns once the client certificate is not accepted any more, with the reason; never without one.
    /// Cancel safe.
    pub(super) async fn certificate_refused(&self) -> &'static str {
        match &self.certificate {
            Some(certificate) => certificate.refused().await,
            None => std::future::pending().await,
        }
    }
}

/// Tracks the calls of a connection, to decide when it is idle and whether its client reads the responses.
/// Each request carries it as an extension. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct ConnectionActivity(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    calls: Mutex<Calls>,
    public_streams: Arc<Semaphore>,
    draining: CancellationToken,
}

#[derive(Debug)]
struct Calls {
    connected_at: Instant,
    in_flight: usize,
    last_ended_at: Option<Instant>,
    /// Whether an authenticated caller has made a call.
    authenticated: bool,
    /// The number of responses that are ready and not sent completely: those that became ready in the
    /// present period of [`UNREAD_TIMEOUT`], and those of the period before.
    unread: [usize; 2],
    /// The number of the present period.
    period: u64,
}

/// Counts a call as in flight until its response has been sent completely or was abandoned.
#[derive(Debug)]
pub(super) struct CallGuard {
    connection: ConnectionActivity,
    /// The period in which the response became ready.
    response_ready_in: Option<u64>,
}

impl Default for ConnectionActivity {
    fn default() -> Self {
        let calls = Calls {
            connected_at: Instant::now(),
            in_flight: 0,
            last_ended_at: None,
            authenticated: false,
            unread: [0, 0],
            period: 0,
        };
        Self(Arc::new(Shared {
            calls: Mutex::new(calls),
            public_streams: Arc::new(Semaphore::new(MAX_PUBLIC_STREAMS)),
            draining: CancellationToken::new(),
        }))
    }
}

impl ConnectionActivity {
    /// Counts a call that begins.
    #[must_use]
    pub(super) fn begin_call(&self) -> CallGuard {
        self.calls().in_flight += 1;
        CallGuard { connection: self.clone(), response_ready_in: None }
    }

    /// Notes that a caller was authenticated, after which the longer idle timeout applies.
    pub(super) fn note_authenticated(&self) {
        self.calls().authenticated = true;
    }

    /// Takes a permit for a stream of health or reflection; `None` if the connection has 16 already.
    pub(super) fn try_acquire_public_stream(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.public_streams).try_acquire_owned().ok()
    }

    /// Returns the token that is cancelled when the connection drains. Its streams must end then.
    pub(super) fn draining(&self) -> &CancellationToken {
        &self.0.draining
    }

    /// Returns once the connection was idle for too long. Cancel safe.
    pub(super) async fn idle(&self) {
        loop {
            let deadline = self.calls().idle_deadline(Instant::now());
            if deadline <= Instant::now() {
                return;
            }
            sleep_until(deadline).await;
        }
    }

    /// Returns once a response has waited for too long to be read. Cancel safe.
    pub(super) async fn unread(&self) {
        loop {
            sleep(UNREAD_TIMEOUT).await;
            if self.calls().begin_period() {
                return;
            }
        }
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.0.calls.lock()
    }
}

impl Calls {
    /// Returns when the connection will have been idle for too long, if the calls in flight end at `now` and
    /// no other begins.
    fn idle_deadline(&self, now: Instant) -> Instant {
        if !self.authenticated {
            return self.connected_at + UNAUTHENTICATED_TIMEOUT;
        }
        let idle_since =
            if self.in_flight > 0 { now } else { self.last_ended_at.unwrap_or(self.connected_at) };
        idle_since + IDLE_TIMEOUT
    }

    /// Begins the next period. Returns whether a response was unread during all of the last one.
    fn begin_period(&mut self) -> bool {
        let unread_for_a_period = self.unread[1] > 0;
        self.unread = [0, self.unread[0]];
        self.period += 1;
        unread_for_a_period
    }
}

impl CallGuard {
    /// Notes that the response is ready, so that its client is expected to read it from now on. Must not be
    /// called for a response stream, which lasts as long as its client wants.
    pub(super) fn response_ready(&mut self) {
        let mut calls = self.connection.calls();
        calls.unread[0] += 1;
        self.response_ready_in = Some(calls.period);
    }
}

impl Drop for CallGuard {
    fn drop(&mut self) {
        let mut calls = self.connection.calls();
        calls.in_flight -= 1;
        calls.last_ended_at = Some(Instant::now());
        if let Some(period) = self.response_ready_in {
            // Responses of earlier periods are no longer counted: `begin_period` has reported one of them,
            // which ends the connection.
            let age = usize::try_from(calls.period - period).unwrap_or(usize::MAX);
            if let Some(unread) = calls.unread.get_mut(age) {
                *unread -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authenticated_connection_is_idle_some_time_after_its_last_call_ended() {
        let connection = ConnectionActivity::default();
        let connected_at = connection.calls().connected_at;
        let idle_deadline =
            |minutes| connection.calls().idle_deadline(connected_at + Duration::from_mins(minutes));
        let (first, second) = (connection.begin_call(), connection.begin_call());
        let unauthenticated = connected_at + UNAUTHENTICATED_TIMEOUT;
        assert_eq!(idle_deadline(3), unauthenticated, "whatever is in flight");
        connection.note_authenticated();
        drop(second);
        assert_eq!(idle_deadline(3), connected_at + Duration::from_mins(13));
        drop(first);
        let ended_at = connection.calls().last_ended_at.unwrap();
        assert!(ended_at > connected_at && idle_deadline(15) == ended_at + IDLE_TIMEOUT);
    }

    #[test]
    fn a_response_that_is_unread_for_a_whole_period_is_reported_once() {
        let connection = ConnectionActivity::default();
        let begin_period = || connection.calls().begin_period();
        let (mut slow, mut quick) = (connection.begin_call(), connection.begin_call());
        let stream = connection.begin_call();
        quick.response_ready();
        drop(quick);
        assert!(!begin_period());
        slow.response_ready();
        assert!(!begin_period(), "it is unread for less than a period");
        drop(slow);
        assert!(!begin_period());
        let mut stuck = connection.begin_call();
        stuck.response_ready();
        assert!(!begin_period());
        assert!(begin_period());
        assert!(!begin_period(), "it is reported once");
        drop((stuck, stream));
        assert_eq!(connection.calls().in_flight, 0);
        assert_eq!(connection.calls().unread, [0, 0]);
    }
}
