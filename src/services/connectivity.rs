//! Whether the database answers, and whether tokens may be issued while it does not.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
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
    /// The database does not answer, and there may be a replica that does not know of this one: it may count
    /// as the only one, and end the tokens in this one's cache. So nothing is issued, and nothing served.
    Unacknowledged,
}

/// What a replica knows about others.
#[derive(Clone, Copy, Debug)]
struct Knowledge {
    /// Until when it is known that there is no other replica; `None` if there is one, or nothing is known.
    alone_until: Option<Instant>,
    /// Until when every other replica certainly counts this one as alive; `None` if one may not know of it.
    acknowledged_until: Option<Instant>,
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
    /// What the last heartbeats say about other replicas.
    knowledge: Mutex<Knowledge>,
    /// Whether the upstream ends older tokens when it issues a new one.
    new_token_ends_older: bool,
}

impl DatabaseConnectivity {
    /// Returns the state before the first poll: connected, and others are assumed to exist and not to know of
    /// this replica until a heartbeat shows otherwise. `new_token_ends_older` says whether the upstream ends
    /// older tokens when it issues a new one.
    #[must_use]
    pub fn new(new_token_ends_older: bool) -> Self {
        Self {
            current: watch::Sender::new(Connectivity::Connected),
            answered: AtomicBool::new(false),
            problem: Mutex::new(None),
            knowledge: Mutex::new(Knowledge { alone_until: None, acknowledged_until: None }),
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

    /// Records that a heartbeat was stored. `alone_until` is the time until which it proves that there is no
    /// other replica, `None` if there is one; `acknowledged_until` is the time until which every other one counts
    /// this replica as alive, `None` if one may not know of it.
    pub fn heartbeat_stored(
        &self,
        alone_until: Option<Instant>,
        acknowledged_until: Option<Instant>,
    ) {
        *self.knowledge.lock() = Knowledge { alone_until, acknowledged_until };
    }

    /// Records that the database refuses this replica's heartbeat. The other replicas do not see this one
    /// then, so it must not count as the only one.
    pub fn heartbeat_refused(&self) {
        self.knowledge.lock().alone_until = None;
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
        let lost = self.after_loss(Instant::now());
        if self.change(Connectivity::Connected, lost) {
            let consequence = match lost {
                Connectivity::Unacknowledged => {
                    "a replica that does not know of this one may issue, so nothing is served"
                }
                Connectivity::Partitioned => {
                    "other replicas may issue, so only cached tokens are served"
                }
                _ => "issuing goes on without it, since no other replica's tokens are affected",
            };
            warn!(reason, "the database does not answer; {consequence}");
        }
    }

    /// Returns the state if the database is lost at `now`. Being alone must be known from a recent heartbeat, and
    /// so must the knowledge of the others: a replica that stored none for long may have been counted as stopped by
    /// others, which then take themselves for alone.
    fn after_loss(&self, now: Instant) -> Connectivity {
        let Knowledge { alone_until, acknowledged_until } = *self.knowledge.lock();
        let holds = |until: Option<Instant>| until.is_some_and(|until| now < until);
        if !self.new_token_ends_older || holds(alone_until) {
            Connectivity::SoleReplica
        } else if holds(acknowledged_until) {
            Connectivity::Partitioned
        } else {
            Connectivity::Unacknowledged
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
            || self.change(Connectivity::Unacknowledged, Connectivity::Connected)
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
    use std::time::Duration;

    use super::*;

    const HOUR: Duration = Duration::from_hours(1);

    /// Records a heartbeat that found no other replica.
    fn alone(connectivity: &DatabaseConnectivity) {
        let until = Some(Instant::now() + HOUR);
        connectivity.heartbeat_stored(until, until);
    }

    fn after_loss(new_token_ends_older: bool, knowledge: Option<(bool, bool)>) -> Connectivity {
        let connectivity = DatabaseConnectivity::new(new_token_ends_older);
        if let Some((alone, unacknowledged)) = knowledge {
            let until = Instant::now() + HOUR;
            connectivity
                .heartbeat_stored(alone.then_some(until), (!unacknowledged).then_some(until));
        }
        connectivity.mark_lost("test");
        connectivity.current()
    }

    #[test]
    fn a_replica_issues_without_the_database_only_if_no_other_replicas_tokens_are_affected() {
        assert_eq!(after_loss(true, None), Connectivity::Unacknowledged);
        assert_eq!(after_loss(true, Some((false, true))), Connectivity::Unacknowledged);
        assert_eq!(after_loss(true, Some((false, false))), Connectivity::Partitioned);
        assert_eq!(after_loss(true, Some((true, false))), Connectivity::SoleReplica);
        assert_eq!(after_loss(false, None), Connectivity::SoleReplica);
        assert_eq!(after_loss(false, Some((false, true))), Connectivity::SoleReplica);
    }

    #[test]
    fn old_knowledge_does_not_count() {
        let connectivity = DatabaseConnectivity::new(true);
        let (alone, acknowledged) = (Instant::now() + HOUR, Instant::now() + 2 * HOUR);
        let before = |until| until - Duration::from_millis(1);
        connectivity.heartbeat_stored(Some(alone), Some(acknowledged));
        for (at, expected) in [
            (before(alone), Connectivity::SoleReplica),
            (alone, Connectivity::Partitioned),
            (before(acknowledged), Connectivity::Partitioned),
            // The others count this replica as stopped by now, whatever they knew of it.
            (acknowledged, Connectivity::Unacknowledged),
            (acknowledged + HOUR, Connectivity::Unacknowledged),
        ] {
            assert_eq!(connectivity.after_loss(at), expected);
        }
        // A refused heartbeat proves nothing new.
        connectivity.heartbeat_refused();
        assert_eq!(connectivity.after_loss(before(alone)), Connectivity::Partitioned);
        assert_eq!(connectivity.after_loss(acknowledged), Connectivity::Unacknowledged);
    }

    #[test]
    fn a_database_that_refuses_something_is_not_lost() {
        let connectivity = DatabaseConnectivity::new(true);
        alone(&connectivity);
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
        alone(&connectivity);
        connectivity.heartbeat_refused();
        connectivity.mark_lost("test");
        assert_eq!(connectivity.current(), Connectivity::Partitioned);
    }

    #[test]
    fn a_partitioned_replica_remains_partitioned_until_the_database_answers() {
        let connectivity = DatabaseConnectivity::new(true);
        connectivity.heartbeat_stored(None, Some(Instant::now() + HOUR));
        connectivity.mark_lost("test");
        let mut changes = connectivity.changes();
        alone(&connectivity);
        connectivity.mark_lost("test");
        assert_eq!(connectivity.current(), Connectivity::Partitioned);
        assert!(!changes.has_changed().unwrap());
        connectivity.mark_connected();
        assert_eq!(*changes.borrow_and_update(), Connectivity::Connected);
    }
}
