//! Which account is next: pure bookkeeping.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Duration,
};

use crate::domain::{
    account::AccountId,
    clock::{Timestamp, delta},
};

/// How long an account without a live token stands behind those whose token is about to end.
const COLD: Duration = Duration::from_mins(1);

/// Accounts by when they are due; those that are due, by whose token ends first.
#[derive(Debug, Default)]
pub(super) struct Queue {
    plans: HashMap<AccountId, Plan>,
    later: BTreeSet<(Timestamp, AccountId)>,
    due: BTreeSet<(Timestamp, AccountId)>,
    /// Those with an attempt under way are not started again before its end.
    busy: HashSet<AccountId>,
}

#[derive(Clone, Copy, Debug)]
struct Plan {
    due: Timestamp,
    token_ends: Option<Timestamp>,
    /// The key in `due`, once it is there.
    rank: Option<Timestamp>,
}

impl Queue {
    /// Plans the account for `due`, or for never; forgets what was planned before.
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
        self.forget(id);
        if let Some(due) = due.filter(|_| !self.busy.contains(&id)) {
            self.plans.insert(id, Plan { due, token_ends, rank: None });
            self.later.insert((due, id));
        }
    }

    /// Takes the account out.
    pub(super) fn forget(&mut self, id: AccountId) {
        if let Some(plan) = self.plans.remove(&id) {
            match plan.rank {
                Some(rank) => self.due.remove(&(rank, id)),
                None => self.later.remove(&(plan.due, id)),
            };
        }
    }

    /// An attempt for the account is under way: it is not planned until its end.
    pub(super) fn began(&mut self, id: AccountId) {
        self.busy.insert(id);
    }

    /// The attempt is over: the account may be planned again.
    pub(super) fn ended(&mut self, id: AccountId) {
        self.busy.remove(&id);
    }

    /// When the next account is due; a moment that has passed if one is due already.
    pub(super) fn next(&self, now: Timestamp) -> Option<Timestamp> {
        if !self.due.is_empty() {
            return Some(now);
        }
        self.later.first().map(|(due, _)| *due)
    }

    /// Takes the most urgent of the accounts that are due at `now`.
    pub(super) fn take(&mut self, now: Timestamp) -> Option<AccountId> {
        while let Some((due, id)) = self.later.first().copied().filter(|(due, _)| *due <= now) {
            self.later.remove(&(due, id));
            if let Some(plan) = self.plans.get_mut(&id) {
                let live = plan.token_ends.filter(|end| *end > now);
                let rank = live.unwrap_or(now + delta(COLD));
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
    fn what_ends_first_goes_first_and_what_has_no_token_a_minute_behind() {
        let mut queue = Queue::default();
        queue.plan(AccountId(1), Some(at(1)), Some(at(500)));
        queue.plan(AccountId(2), Some(at(2)), None);
        queue.plan(AccountId(3), Some(at(3)), Some(at(130)));
        queue.plan(AccountId(4), Some(at(200)), Some(at(300)));
        assert_eq!(queue.next(at(0)), Some(at(1)));
        let order: Vec<_> = std::iter::from_fn(|| queue.take(at(100))).map(|id| id.0).collect();
        assert_eq!(order, [3, 2, 1]);
        assert_eq!(queue.next(at(100)), Some(at(200)));
    }

    #[test]
    fn an_account_under_way_is_not_started_again_before_its_end() {
        let mut queue = Queue::default();
        queue.plan(AccountId(1), Some(at(0)), None);
        assert_eq!(queue.take(at(0)), Some(AccountId(1)));
        queue.began(AccountId(1));
        queue.plan(AccountId(1), Some(at(0)), None);
        assert_eq!(queue.take(at(9)), None);
        queue.ended(AccountId(1));
        queue.plan(AccountId(1), Some(at(0)), None);
        assert_eq!(queue.take(at(9)), Some(AccountId(1)));
    }

    #[test]
    fn an_account_planned_for_never_is_forgotten() {
        let mut queue = Queue::default();
        queue.plan(AccountId(1), Some(at(0)), None);
        queue.plan(AccountId(1), None, None);
        assert_eq!(queue.next(at(0)), None);
    }

    proptest! {
        #[test]
        fn each_account_is_taken_once_and_never_before_it_is_due(
            plans in proptest::collection::vec((0_i64..20, 0_i64..100, proptest::option::of(0_i64..200)), 0..60),
            now in 0_i64..100,
        ) {
            let mut queue = Queue::default();
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
