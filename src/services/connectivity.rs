//! Whether the database answers, and what a replica may do while it does not.

use std::sync::atomic::{AtomicBool, Ordering};

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

    /// The database did not answer, for the reason `why`.
    pub fn lost(&self, why: &str) {
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

    /// The database answered.
    pub fn found(&self) {
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
