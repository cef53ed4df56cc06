//! Whether the database answers, and whether tokens may be issued while it does not.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::{info, warn};

/// The replica's relation to the database.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Connectivity {
    /// The database answers.
    Connected,
    /// The database does not answer, and issuing without it is safe: there is no other replica, or
    /// two replicas that issue do not end one another's tokens.
    SoleReplica,
    /// The database does not answer here, but other replicas may reach it and issue. This replica
    /// only serves the tokens that it has.
    Partitioned,
}

/// The present [`Connectivity`]. The change feed reports to it; the refresher, the token provider and
/// readiness read it.
#[derive(Debug)]
pub struct DatabaseConnectivity {
    current: watch::Sender<Connectivity>,
    /// Whether the database has answered since the start.
    answered: AtomicBool,
    /// Why the change feed fails although the database answers.
    problem: Mutex<Option<String>>,
    /// Whether the last stored heartbeat found no other live replica.
    only_replica: AtomicBool,
    /// Whether the upstream ends older tokens when it issues a new one.
    new_token_ends_older: bool,
}

impl DatabaseConnectivity {
    /// Returns the state at the start: connected, and with other replicas until a heartbeat tells
    /// otherwise. `new_token_ends_older` says whether the upstream ends older tokens when it issues a
    /// new one.
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

    /// Notes that a heartbeat was stored, and how many other replicas had a recent one.
    pub fn heartbeat_stored(&self, other_replicas: i64) {
        self.only_replica.store(other_replicas == 0, Ordering::Relaxed);
    }

    /// Forgets how many other replicas there are, because the database refuses this replica's heartbeat:
    /// the others do not see it, and it must not take itself for the only one.
    pub fn heartbeat_refused(&self) {
        self.only_replica.store(false, Ordering::Relaxed);
    }

    /// Notes that the database answers, but that the change feed fails because of `problem`. The replica
    /// counts as connected: it may issue only with a lease.
    pub fn mark_failing(&self, problem: String) {
        let changed = self.problem.lock().replace(problem.clone()).as_ref() != Some(&problem);
        if changed {
            warn!(%problem, "the database answers, but its changes cannot be followed");
        }
        self.mark_answering();
    }

    /// Returns why the change feed fails although the database answers, if it does.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().clone()
    }

    /// Notes that the database did not answer at all; `reason` is logged. A refused statement or a single
    /// lost session is no such reason: see [`Self::mark_failing`]. Whether issuing goes on is decided once,
    /// as the connection is lost: a replica that is partitioned stays so until the database answers again.
    pub fn mark_lost(&self, reason: &str) {
        *self.problem.lock() = None;
        let safe = !self.new_token_ends_older || self.only_replica.load(Ordering::Relaxed);
        let lost = if safe { Connectivity::SoleReplica } else { Connectivity::Partitioned };
        if self.change(Connectivity::Connected, lost) {
            let consequence = if safe {
                "issuing goes on without it, which no other replica can collide with"
            } else {
                "other replicas may issue, so only known tokens are served"
            };
            warn!(reason, "the database does not answer; {consequence}");
        }
    }

    /// Notes that the database answered and that its changes were followed.
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

    /// Changes from `from` to `to`, and wakes the receivers; returns `false` if the present state is
    /// another one.
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
    fn a_replica_issues_without_the_database_only_where_no_other_can_collide() {
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
        connectivity.mark_failing("refused".into());
        assert_eq!(
            (connectivity.current(), connectivity.problem()),
            (Connectivity::Connected, Some("refused".into()))
        );
        connectivity.mark_lost("test");
        assert_eq!(
            (connectivity.current(), connectivity.problem()),
            (Connectivity::SoleReplica, None)
        );
        connectivity.mark_failing("refused".into());
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
    fn a_partitioned_replica_stays_so_until_the_database_answers() {
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
