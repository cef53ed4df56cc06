//! What hinders the work with the database: duties of the change feed and heartbeats that fail, and rows that cannot be
//! used.

use std::collections::{BTreeMap, BTreeSet};

use parking_lot::Mutex;
use tracing::{error, info, warn};

use crate::store::UnusableRow;

/// A duty of the change feed, or the heartbeat, and why it fails.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FailingDuty {
    /// The duty's name.
    pub duty: &'static str,
    /// The error of its last attempt.
    pub problem: String,
}

/// The failing duties and the unusable rows. The duties update it; readiness, metrics and the log show it.
#[derive(Debug, Default)]
pub struct FeedHealth {
    failing: Mutex<BTreeMap<&'static str, String>>,
    unusable: Mutex<BTreeSet<UnusableRow>>,
}

impl FeedHealth {
    /// Records that the duty failed because of `problem`, and logs it unless it failed so before.
    pub fn failed(&self, duty: &'static str, problem: &str) {
        let before = self.failing.lock().insert(duty, problem.to_owned());
        if before.as_deref() != Some(problem) {
            warn!(duty, problem, "a duty fails; the others go on");
        }
    }

    /// Records that the duty succeeded.
    pub fn succeeded(&self, duty: &'static str) {
        if self.failing.lock().remove(duty).is_some() {
            info!(duty, "a duty succeeds again");
        }
    }

    /// Returns the duties that fail, in the order of their names.
    #[must_use]
    pub fn failing(&self) -> Vec<FailingDuty> {
        let failing = self.failing.lock();
        let duty = |(duty, problem): (&&'static str, &String)| FailingDuty {
            duty,
            problem: problem.clone(),
        };
        failing.iter().map(duty).collect()
    }

    /// Replaces what is known of the unusable rows of `tables`, all of whose rows were read.
    pub fn replace_unusable(&self, tables: &[&str], rows: &[UnusableRow]) {
        self.update(|known| tables.contains(&known.table), rows);
    }

    /// Replaces what is known of the unusable rows of `tables` with one of `ids`, which were read.
    pub fn update_unusable(&self, tables: &[&str], ids: &[i64], rows: &[UnusableRow]) {
        // This is called for every page of accounts, and hardly ever is a row unusable.
        if rows.is_empty() && self.unusable.lock().is_empty() {
            return;
        }
        let ids: BTreeSet<_> = ids.iter().collect();
        self.update(|known| tables.contains(&known.table) && ids.contains(&known.id), rows);
    }

    /// Replaces the known rows that `was_read` selects by `rows`, and logs those that were not known.
    fn update(&self, was_read: impl Fn(&UnusableRow) -> bool, rows: &[UnusableRow]) {
        let mut unusable = self.unusable.lock();
        for row in rows.iter().filter(|row| !unusable.contains(row)) {
            error!(table = row.table, id = row.id, problem = %row.problem,
                "a row cannot be used, and is treated as if it did not exist");
        }
        unusable.retain(|known| !was_read(known));
        unusable.extend(rows.iter().cloned());
    }

    /// Returns the rows that cannot be used, in order.
    #[must_use]
    pub fn unusable(&self) -> Vec<UnusableRow> {
        self.unusable.lock().iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(table: &'static str, id: i64) -> UnusableRow {
        UnusableRow::new(table, id, "malformed")
    }

    #[test]
    fn a_duty_fails_until_it_succeeds() {
        let health = FeedHealth::default();
        health.failed("accounts", "a lock");
        health.failed("access", "another lock");
        health.failed("accounts", "a third lock");
        let failing = health.failing();
        let texts: Vec<_> = failing.iter().map(|it| (it.duty, it.problem.as_str())).collect();
        assert_eq!(texts, [("access", "another lock"), ("accounts", "a third lock")]);
        health.succeeded("access");
        health.succeeded("accounts");
        assert_eq!(health.failing(), []);
    }

    #[test]
    fn a_row_is_reported_until_it_was_read_again_and_can_be_used() {
        let health = FeedHealth::default();
        health.update_unusable(&["accounts"], &[1, 2], &[row("accounts", 1), row("accounts", 2)]);
        health.replace_unusable(&["grants"], &[row("grants", 1)]);
        health.update_unusable(&["accounts"], &[3], &[]);
        assert_eq!(health.unusable().len(), 3);
        health.update_unusable(&["accounts"], &[1], &[]);
        assert_eq!(health.unusable(), [row("accounts", 2), row("grants", 1)]);
        health.replace_unusable(&["grants"], &[row("grants", 5)]);
        assert_eq!(health.unusable(), [row("accounts", 2), row("grants", 5)]);
    }
}
