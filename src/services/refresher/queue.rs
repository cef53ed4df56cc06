//! The order in which accounts are issued for.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Duration,
};

use crate::domain::{
    account::AccountId,
    clock::{Timestamp, delta},
};

/// An account without a live token has the rank of one whose token ends this much later: many new
/// accounts must not let the tokens of others end.
const NO_TOKEN_RANK: Duration = Duration::from_mins(1);

/// Accounts in the order in which they become due. Of those that are due, the one whose token ends
/// first goes first.
#[derive(Debug, Default)]
pub(super) struct RefreshQueue {
    plans: HashMap<AccountId, Plan>,
    /// Accounts that were not due when the queue was last asked, by when they are due.
    later: BTreeSet<(Timestamp, AccountId)>,
    /// Accounts that are due, by rank.
    due: BTreeSet<(Timestamp, AccountId)>,
    /// Accounts with an attempt under way. They are not planned.
    busy: HashSet<AccountId>,
}

#[derive(Clone, Copy, Debug)]
struct Plan {
    due: Timestamp,
    token_ends: Option<Timestamp>,
    /// The key in `RefreshQueue::due`; `None` while the account is in `later`.
    rank: Option<Timestamp>,
}

impl RefreshQueue {
    /// Plans the account for `due`, or takes it out if that is `None`. It replaces an earlier plan. An
    /// account with an attempt under way is not planned.
    pub(super) fn plan(
        &mut self,
        id: AccountId,
        due: Option<Timestamp>,
        token_ends: Option<Timestamp>,
    ) {
        let planned = self.plans.get(&id).copied();
        if planned.is_some_and(|plan| Some(plan.due) == due && plan.token_ends == token_ends) {
            return;
        }
        self.remove(id);
        if let Some(due) = due.filter(|_| !self.busy.contains(&id)) {
            self.plans.insert(id, Plan { due, token_ends, rank: None });
            self.later.insert((due, id));
        }
    }

    /// Takes the account out.
    pub(super) fn remove(&mut self, id: AccountId) {
        if let Some(plan) = self.plans.remove(&id) {
            match plan.rank {
                Some(rank) => self.due.remove(&(rank, id)),
                None => self.later.remove(&(plan.due, id)),
            };
        }
    }

    /// Notes that an attempt for the account is under way.
    pub(super) fn attempt_started(&mut self, id: AccountId) {
        self.busy.insert(id);
    }

    /// Notes that the attempt has ended. The account may be planned again.
    pub(super) fn attempt_ended(&mut self, id: AccountId) {
        self.busy.remove(&id);
    }

    /// Returns when the next account is due: `now` if one is known to be due, `None` if none is planned.
    pub(super) fn next_due(&self, now: Timestamp) -> Option<Timestamp> {
        if !self.due.is_empty() {
            return Some(now);
        }
        self.later.first().map(|(due, _)| *due)
    }

    /// Takes out the account that is due at `now` and whose token ends first.
    pub(super) fn take(&mut self, now: Timestamp) -> Option<AccountId> {
        while let Some((due, id)) = self.later.first().copied().filter(|(due, _)| *due <= now) {
            self.later.remove(&(due, id));
            if let Some(plan) = self.plans.get_mut(&id) {
                let live = plan.token_ends.filter(|end| *end > now);
                let rank = live.unwrap_or(now + delta(NO_TOKEN_RANK));
                plan.rank = Some(rank);
                self.due.insert((rank, id));
            }
        }
        let (_, id) = self.due.pop_first()?;
        self.plans.remove(&id);
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Timestamp {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
    }

    #[test]
    fn the_token_that_ends_first_goes_first_and_a_missing_one_counts_as_ending_in_a_minute() {
        let mut queue = RefreshQueue::default();
        queue.plan(AccountId(1), Some(at(1)), Some(at(500)));
        queue.plan(AccountId(2), Some(at(2)), None);
        queue.plan(AccountId(3), Some(at(3)), Some(at(130)));
        queue.plan(AccountId(4), Some(at(200)), Some(at(300)));
        assert_eq!(queue.next_due(at(0)), Some(at(1)));
        let order: Vec<_> = std::iter::from_fn(|| queue.take(at(100))).map(|id| id.0).collect();
        assert_eq!(order, [3, 2, 1]);
        assert_eq!(queue.next_due(at(100)), Some(at(200)));
    }

    #[test]
    fn an_account_with_an_attempt_under_way_is_not_started_again() {
        let mut queue = RefreshQueue::default();
        queue.plan(AccountId(1), Some(at(0)), None);
        assert_eq!(queue.take(at(0)), Some(AccountId(1)));
        queue.attempt_started(AccountId(1));
        queue.plan(AccountId(1), Some(at(0)), None);
        assert_eq!(queue.take(at(9)), None);
        queue.attempt_ended(AccountId(1));
        queue.plan(AccountId(1), Some(at(0)), None);
        assert_eq!(queue.take(at(9)), Some(AccountId(1)));
    }

    #[test]
    fn an_account_that_is_planned_for_no_time_is_removed() {
        let mut queue = RefreshQueue::default();
        queue.plan(AccountId(1), Some(at(0)), None);
        queue.plan(AccountId(1), None, None);
        assert_eq!(queue.next_due(at(0)), None);
    }

    proptest! {
        #[test]
        fn each_account_is_taken_once_and_never_before_it_is_due(
            plans in proptest::collection::vec((0_i64..20, 0_i64..100, proptest::option::of(0_i64..200)), 0..60),
            now in 0_i64..100,
        ) {
            let mut queue = RefreshQueue::default();
            let mut last = HashMap::new();
            for (id, due, ends) in plans {
                queue.plan(AccountId(id), Some(at(due)), ends.map(at));
                last.insert(id, due);
            }
            let mut taken: Vec<_> = std::iter::from_fn(|| queue.take(at(now))).map(|id| id.0).collect();
            taken.sort_unstable();
            let mut expected: Vec<_> = last.into_iter().filter(|(_, due)| *due <= now).map(|(id, _)| id).collect();
            expected.sort_unstable();
            prop_assert_eq!(taken, expected);
        }
    }
}
