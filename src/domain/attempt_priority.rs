//! Which accounts are tried first when not all of them can be tried at once, so that accounts that fail do
//! not delay others.

use crate::domain::named_enum::named_enum;

named_enum! {
    /// The priority class of an account's next attempt. `IssueView::priority_class` determines it.
    ///
    /// The names are stored in `upstream_calls.priority`.
    pub enum PriorityClass {
        /// The last attempt succeeded.
        Proven = "proven",
        /// The account was never tried, its credential has changed since, or an admin asks for a new token.
        Untried = "untried",
        /// The last attempt failed.
        Failing = "failing",
    }
}

/// How many attempts are under way.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RunningAttempts {
    /// All attempts.
    pub total: usize,
    /// Those of the classes [`PriorityClass::Untried`] and [`PriorityClass::Failing`].
    pub unproven: usize,
    /// Those of the class [`PriorityClass::Failing`].
    pub failing: usize,
}

impl RunningAttempts {
    /// Returns the number of these attempts, counted by class.
    #[must_use]
    pub fn count(classes: impl IntoIterator<Item = PriorityClass>) -> Self {
        classes.into_iter().fold(Self::default(), |count, class| Self {
            total: count.total + 1,
            unproven: count.unproven + usize::from(class != PriorityClass::Proven),
            failing: count.failing + usize::from(class == PriorityClass::Failing),
        })
    }
}

/// The most attempts at the same time. An attempt that gets no answer takes as long as the upstream's
/// timeout, so accounts of which that is to be expected may not take all places.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ConcurrencyLimits {
    total: usize,
    unproven: usize,
    failing: usize,
}

impl ConcurrencyLimits {
    /// Returns limits with `total` attempts, of which a quarter, and one of three, is for proven accounts only.
    /// Failing accounts may have a quarter, and at least one.
    ///
    /// Of two attempts none is for proven accounts only, so that a new account finds a place beside a failing one.
    /// A single place is taken by whoever is next. So an account waits there until the attempt that is under way
    /// has ended, which the upstream's timeout bounds.
    #[must_use]
    pub fn new(total: usize) -> Self {
        let total = total.max(1);
        let quarter = (total / 4).max(usize::from(total == 3));
        Self { total, unproven: total - quarter, failing: quarter.max(1) }
    }

    /// Returns whether an attempt of `class` may begin beside those that are `running`.
    #[must_use]
    pub fn admit(&self, class: PriorityClass, running: RunningAttempts) -> bool {
        let unproven = running.unproven < self.unproven;
        running.total < self.total
            && match class {
                PriorityClass::Proven => true,
                PriorityClass::Untried => unproven,
                PriorityClass::Failing => unproven && running.failing < self.failing,
            }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::select};

    use super::*;

    /// Starts attempts of these classes in this order, as far as the limits admit them.
    fn started(limits: ConcurrencyLimits, classes: &[PriorityClass]) -> Vec<PriorityClass> {
        let mut running = vec![];
        for class in classes {
            if limits.admit(*class, RunningAttempts::count(running.iter().copied())) {
                running.push(*class);
            }
        }
        running
    }

    #[test]
    fn failing_accounts_get_a_quarter_of_the_places_and_a_quarter_is_left_for_proven_ones() {
        use PriorityClass::{Failing, Proven, Untried};
        let limits = ConcurrencyLimits::new(8);
        assert_eq!(started(limits, &[Failing; 20]).len(), 2);
        assert_eq!(started(limits, &[Untried; 20]).len(), 6);
        assert_eq!(started(limits, &[Proven; 20]).len(), 8);
        let all = [[Failing; 9], [Untried; 9], [Proven; 9]].concat();
        assert_eq!(started(limits, &all).len(), 8);
    }

    proptest! {
        #[test]
        fn a_proven_account_finds_a_place_beside_any_number_of_others(
            total in 3_usize..100,
            classes in proptest::collection::vec(select(PriorityClass::ALL.to_vec()), 0..200),
        ) {
            let limits = ConcurrencyLimits::new(total);
            let others: Vec<_> =
                classes.into_iter().filter(|class| *class != PriorityClass::Proven).collect();
            let running = RunningAttempts::count(started(limits, &others));
            prop_assert!(limits.admit(PriorityClass::Proven, running));
        }

        #[test]
        fn an_untried_account_finds_a_place_beside_any_number_of_failing_ones(total in 2_usize..100) {
            let limits = ConcurrencyLimits::new(total);
            let failing = started(limits, &[PriorityClass::Failing; 200]);
            prop_assert!(limits.admit(PriorityClass::Untried, RunningAttempts::count(failing)));
        }

        #[test]
        fn each_class_may_begin_when_nothing_runs(total: usize) {
            for class in PriorityClass::ALL {
                prop_assert!(ConcurrencyLimits::new(total).admit(class, RunningAttempts::default()));
            }
        }
    }
}
