//! Whether the database answers, and what a replica may do while it does not.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::{info, warn};

/// How a replica stands with the database.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Connectivity {
    /// It answers.
    Connected,
    /// It does not, and no other replica can be at odds with this one: tokens are issued without it.
    SoleReplica,
    /// It does not, and may answer others, who issue: this replica serves what it has.
    Partitioned,
}

/// What is known of the database's reach: told by whoever follows it, read by whoever needs it.
#[derive(Debug)]
pub struct DatabaseConnectivity {
    standing: watch::Sender<Connectivity>,
    /// Whether it has answered at all.
    answered: AtomicBool,
    /// Why the change feed fails although the database answers.
    problem: Mutex<Option<String>>,
    /// Whether the last heartbeat met no other replica.
    lone: AtomicBool,
    /// Whether the upstream ends older tokens when it issues a new one. Where it does not, two
    /// replicas that both issue do no harm.
    ends_older: bool,
}

impl DatabaseConnectivity {
    /// A database that answers. Until a heartbeat is told of, others may be there.
    #[must_use]
    pub fn new(ends_older: bool) -> Self {
        Self {
            standing: watch::Sender::new(Connectivity::Connected),
            answered: AtomicBool::new(false),
            problem: Mutex::new(None),
            lone: AtomicBool::new(false),
            ends_older,
        }
    }

    /// How things stand now.
    #[must_use]
    pub fn standing(&self) -> Connectivity {
        *self.standing.borrow()
    }

    /// Whether the database has answered since the start.
    #[must_use]
    pub fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Wakes whenever that changes. Subscribe before looking.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<Connectivity> {
        self.standing.subscribe()
    }

    /// A heartbeat was stored beside that of `others`.
    pub fn met(&self, others: i64) {
        self.lone.store(others == 0, Ordering::Relaxed);
    }

    /// Forgets how many other replicas there are, because the database refuses this replica's heartbeat:
    /// the others do not see it, and it must not take itself for the only one.
    pub fn heartbeat_refused(&self) {
        self.lone.store(false, Ordering::Relaxed);
    }

    /// Stores that the database answers, but that the change feed fails because of `problem`. The replica
    /// counts as connected: it may issue only by lease.
    pub fn failing(&self, problem: String) {
        let news = self.problem.lock().replace(problem.clone()).as_ref() != Some(&problem);
        if news {
            warn!(%problem, "the database answers, but its changes cannot be followed");
        }
        self.answers();
    }

    /// Returns why the change feed fails although the database answers, if it does.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().clone()
    }

    /// Stores that the database does not answer at all, for the reason `why`. A statement that was
    /// refused, or a single lost session, is no such reason: see [`Self::failing`].
    pub fn lost(&self, why: &str) {
        *self.problem.lock() = None;
        let alone = !self.ends_older || self.lone.load(Ordering::Relaxed);
        let standing = if alone { Connectivity::SoleReplica } else { Connectivity::Partitioned };
        if self.change(standing, Connectivity::Connected) {
            let issuing = if alone {
                "no other replica is there: issuing goes on"
            } else {
                "other replicas may issue: serving what is known"
            };
            warn!(why, "the database does not answer; {issuing}");
        }
    }

    /// Stores that the database answered and that its changes were followed.
    pub fn found(&self) {
        *self.problem.lock() = None;
        self.answers();
    }

    fn answers(&self) {
        self.answered.store(true, Ordering::Relaxed);
        if self.change(Connectivity::Connected, Connectivity::SoleReplica)
            || self.change(Connectivity::Connected, Connectivity::Partitioned)
        {
            info!("the database is back");
        }
    }

    /// Moves to `to`, if things stand at `from`.
    fn change(&self, to: Connectivity, from: Connectivity) -> bool {
        self.standing.send_if_modified(|standing| {
            let moves = *standing == from;
            if moves {
                *standing = to;
            }
            moves
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing_of(ends_older: bool, others: Option<i64>) -> Connectivity {
        let reach = DatabaseConnectivity::new(ends_older);
        if let Some(others) = others {
            reach.met(others);
        }
        reach.lost("test");
        reach.standing()
    }

    #[test]
    fn only_who_met_no_other_or_can_do_no_harm_is_alone() {
        assert_eq!(standing_of(true, None), Connectivity::Partitioned);
        assert_eq!(standing_of(true, Some(1)), Connectivity::Partitioned);
        assert_eq!(standing_of(true, Some(0)), Connectivity::SoleReplica);
        assert_eq!(standing_of(false, None), Connectivity::SoleReplica);
        assert_eq!(standing_of(false, Some(2)), Connectivity::SoleReplica);
    }

    #[test]
    fn a_database_that_refuses_something_is_not_lost() {
        let reach = DatabaseConnectivity::new(true);
        reach.met(0);
        reach.failing("refused".into());
        assert_eq!(
            (reach.standing(), reach.problem()),
            (Connectivity::Connected, Some("refused".into()))
        );
        reach.lost("test");
        assert_eq!((reach.standing(), reach.problem()), (Connectivity::SoleReplica, None));
        reach.failing("refused".into());
        assert_eq!(reach.standing(), Connectivity::Connected, "issuing needs a lease again");
        reach.found();
        assert_eq!(reach.problem(), None);
    }

    #[test]
    fn a_replica_whose_heartbeat_is_refused_does_not_count_as_the_only_one() {
        let reach = DatabaseConnectivity::new(true);
        reach.met(0);
        reach.heartbeat_refused();
        reach.lost("test");
        assert_eq!(reach.standing(), Connectivity::Partitioned);
    }

    #[test]
    fn who_was_cut_off_stays_so_until_the_database_is_back() {
        let reach = DatabaseConnectivity::new(true);
        reach.met(1);
        reach.lost("test");
        let mut changes = reach.changes();
        reach.met(0);
        reach.lost("test");
        assert_eq!(reach.standing(), Connectivity::Partitioned);
        assert!(!changes.has_changed().unwrap());
        reach.found();
        assert_eq!(*changes.borrow_and_update(), Connectivity::Connected);
    }
}
