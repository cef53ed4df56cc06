//! Whether the database answers, and whether tokens may be issued while it does not.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::{info, warn};

/// Whether the database answers this replica, and if not, whether the replica may issue without it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Connectivity {
    /// The database answers.
    Connected,
    /// The database does not answer, and issuing without it is safe: there is no other replica, or the
    /// upstream keeps older tokens alive, so that replicas do not end each other's tokens.
    SoleReplica,
    /// The database does not answer this replica, but other replicas may reach it and issue. This replica
    /// only serves the tokens in its cache.
    Partitioned,
}

/// The present [`Connectivity`], shared between the tasks. The change feed updates it; the refresher, the
/// token provider and the readiness check read it.
#[derive(Debug)]
pub struct DatabaseConnectivity {
    current: watch::Sender<Connectivity>,
    /// Whether the database has answered since the start.
    answered: AtomicBool,
    /// The error of the change feed, if it fails although the database answers.
    problem: Mutex<Option<String>>,
    /// Whether the last stored heartbeat found no other live replica.
    only_replica: AtomicBool,
    /// Whether the upstream ends older tokens when it issues a new one.
    new_token_ends_older: bool,
}

impl DatabaseConnectivity {
    /// Returns the state before the first poll: connected, and other replicas are assumed to exist until a
    /// heartbeat finds none. `new_token_ends_older` says whether the upstream ends older tokens when it
    /// issues a new one.
    #[must_use]
    pub fn new(new_token_ends_older: bool) -> Self {
        Self {
            current: watch::Sender::new(Connectivity::Connected),
            answered: AtomicBool::new(false),
            problem: Mutex::new(None),
            only_replica: AtomicBool::new(false),
            new_token_ends_older,
        }
    }

    /// Returns the present connectivity.
    #[must_use]
    pub fn current(&self) -> Connectivity {
        *self.current.borrow()
    }

    /// Returns whether the database has answered since the start.
    #[must_use]
    pub fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Returns a receiver that wakes at each change. Subscribe before reading
    /// [`DatabaseConnectivity::current`], so that no change is missed in between.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<Connectivity> {
        self.current.subscribe()
    }

    /// Records that a heartbeat was stored, and how many other replicas had a recent one.
    pub fn heartbeat_stored(&self, other_replicas: i64) {
        self.only_replica.store(other_replicas == 0, Ordering::Relaxed);
    }

    /// Records that the database refuses this replica's heartbeat. The other replicas do not see this one
    /// then, so it must not count as the only one.
    pub fn heartbeat_refused(&self) {
        self.only_replica.store(false, Ordering::Relaxed);
    }

    /// Records that the database answers, but that the change feed fails because of `problem`. The replica
    /// counts as connected, so it may issue only with a lease.
    pub fn mark_failing(&self, problem: &str) {
        let before = self.problem.lock().replace(problem.to_owned());
        if before.as_deref() != Some(problem) {
            warn!(problem, "the database answers, but its changes cannot be followed");
        }
        self.mark_answering();
    }

    /// Returns the error of the change feed, if it fails although the database answers.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().clone()
    }

    /// Records that the database does not answer at all; `reason` is logged. For a refused statement or a
    /// single lost session, use [`Self::mark_failing`]. Whether issuing continues is decided once, when the
    /// connection is lost: a partitioned replica remains so until the database answers again.
    pub fn mark_lost(&self, reason: &str) {
        *self.problem.lock() = None;
        let safe = !self.new_token_ends_older || self.only_replica.load(Ordering::Relaxed);
        let lost = if safe { Connectivity::SoleReplica } else { Connectivity::Partitioned };
        if self.change(Connectivity::Connected, lost) {
            let consequence = if safe {
                "issuing goes on without it, since no other replica's tokens are affected"
            } else {
                "other replicas may issue, so only cached tokens are served"
            };
            warn!(reason, "the database does not answer; {consequence}");
        }
    }

    /// Records that the database answered and that its changes were loaded.
    pub fn mark_connected(&self) {
        *self.problem.lock() = None;
        self.mark_answering();
    }

    fn mark_answering(&self) {
        self.answered.store(true, Ordering::Relaxed);
        if self.change(Connectivity::SoleReplica, Connectivity::Connected)
            || self.change(Connectivity::Partitioned, Connectivity::Connected)
        {
            info!("the database answers again");
        }
    }

    /// Changes the state from `from` to `to` and wakes the receivers. Returns `false` and changes nothing if
    /// the present state is not `from`.
    fn change(&self, from: Connectivity, to: Connectivity) -> bool {
        self.current.send_if_modified(|current| {
            let changes = *current == from;
            if changes {
                *current = to;
            }
            changes
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after_loss(new_token_ends_older: bool, other_replicas: Option<i64>) -> Connectivity {
        let connectivity = DatabaseConnectivity::new(new_token_ends_older);
        if let Some(others) = other_replicas {
            connectivity.heartbeat_stored(others);
        }
        connectivity.mark_lost("test");
        connectivity.current()
    }

    #[test]
    fn a_replica_issues_without_the_database_only_if_no_other_replicas_tokens_are_affected() {
        assert_eq!(after_loss(true, None), Connectivity::Partitioned);
        assert_eq!(after_loss(true, Some(1)), Connectivity::Partitioned);
        assert_eq!(after_loss(true, Some(0)), Connectivity::SoleReplica);
        assert_eq!(after_loss(false, None), Connectivity::SoleReplica);
        assert_eq!(after_loss(false, Some(2)), Connectivity::SoleReplica);
    }

    #[test]
    fn a_database_that_refuses_something_is_not_lost() {
        let connectivity = DatabaseConnectivity::new(true);
        connectivity.heartbeat_stored(0);
        connectivity.mark_failing("refused");
        assert_eq!(
            (connectivity.current(), connectivity.problem()),
            (Connectivity::Connected, Some("refused".into()))
        );
        connectivity.mark_lost("test");
        assert_eq!(
            (connectivity.current(), connectivity.problem()),
            (Connectivity::SoleReplica, None)
        );
        connectivity.mark_failing("refused");
        assert_eq!(connectivity.current(), Connectivity::Connected, "issuing needs a lease again");
        connectivity.mark_connected();
        assert_eq!(connectivity.problem(), None);
    }

    #[test]
    fn a_replica_whose_heartbeat_is_refused_does_not_count_as_the_only_one() {
        let connectivity = DatabaseConnectivity::new(true);
        connectivity.heartbeat_stored(0);
        connectivity.heartbeat_refused();
        connectivity.mark_lost("test");
        assert_eq!(connectivity.current(), Connectivity::Partitioned);
    }

    #[test]
    fn a_partitioned_replica_remains_partitioned_until_the_database_answers() {
        let connectivity = DatabaseConnectivity::new(true);
        connectivity.heartbeat_stored(1);
        connectivity.mark_lost("test");
        let mut changes = connectivity.changes();
        connectivity.heartbeat_stored(0);
        connectivity.mark_lost("test");
        assert_eq!(connectivity.current(), Connectivity::Partitioned);
        assert!(!changes.has_changed().unwrap());
        connectivity.mark_connected();
        assert_eq!(*changes.borrow_and_update(), Connectivity::Connected);
    }
}
