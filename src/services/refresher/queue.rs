//! The queue of accounts that are scheduled for an attempt.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Duration,
};

use crate::domain::{
    account::AccountId,
    clock::{Timestamp, delta},
};

/// An account without a live token is ranked as if its token ended after this time, so that many new
/// accounts do not delay others until their tokens have ended.
const NO_TOKEN_RANK: Duration = Duration::from_mins(1);

/// Accounts in the order in which they become due. Among the due accounts, the one whose token ends first
/// is first.
#[derive(Debug, Default)]
pub(super) struct RefreshQueue {
    plans: HashMap<AccountId, Plan>,
    /// Accounts that were not due at the last call of `take`, ordered by when they are due.
    later: BTreeSet<(Timestamp, AccountId)>,
    /// Accounts that are due, ordered by rank.
    due: BTreeSet<(Timestamp, AccountId)>,
    /// Accounts with an attempt under way, which cannot be scheduled.
    busy: HashSet<AccountId>,
}

#[derive(Clone, Copy, Debug)]
struct Plan {
    due: Timestamp,
    token_ends: Option<Timestamp>,
    /// The rank in `RefreshQueue::due`: the end of the token, or [`NO_TOKEN_RANK`] from now without a live
    /// one. `None` while the account is in `later`.
    rank: Option<Timestamp>,
}

impl RefreshQueue {
    /// Schedules the account for `due`, or removes it if `due` is `None`. An earlier schedule is replaced.
    /// An account with an attempt under way is not scheduled.
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

    /// Removes the account, if it is scheduled.
    pub(super) fn remove(&mut self, id: AccountId) {
        if let Some(plan) = self.plans.remove(&id) {
            match plan.rank {
                Some(rank) => self.due.remove(&(rank, id)),
                None => self.later.remove(&(plan.due, id)),
            };
        }
    }

    /// Records that an attempt for the account is under way.
    pub(super) fn attempt_started(&mut self, id: AccountId) {
        self.busy.insert(id);
    }

    /// Records that the attempt has ended. The account may be scheduled again.
    pub(super) fn attempt_ended(&mut self, id: AccountId) {
        self.busy.remove(&id);
    }

    /// Returns when the next account is due: `now` if one is known to be due, `None` if the queue is empty.
    pub(super) fn next_due(&self, now: Timestamp) -> Option<Timestamp> {
        if !self.due.is_empty() {
            return Some(now);
        }
        self.later.first().map(|(due, _)| *due)
    }

    /// Removes and returns the account whose token ends first among those that are due at `now`.
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
    fn the_account_whose_token_ends_first_is_first_and_a_missing_token_counts_as_ending_in_a_minute()
     {
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
    fn scheduling_an_account_for_no_time_removes_it() {
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
