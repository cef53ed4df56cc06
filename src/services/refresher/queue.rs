//! The queue of accounts that are scheduled for an attempt.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use crate::domain::{
    account::AccountId,
    attempt_priority::{ConcurrencyLimits, PriorityClass, RunningAttempts},
    clock::{Timestamp, delta},
};

/// An account without a live token is ranked as if its token ended after this time, so that many new
/// accounts do not delay others until their tokens have ended.
const NO_TOKEN_RANK: Duration = Duration::from_mins(1);
/// How often a lane is passed over while it could be served. Then it is served first.
const MOST_PASSES: u32 = 3;

/// When and with which priority an account is tried.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Schedule {
    pub(super) due: Timestamp,
    pub(super) priority: PriorityClass,
    pub(super) failures: u32,
    /// The account's last token, live or ended.
    pub(super) token: Option<TokenTimes>,
}

/// The times of an account's last token that decide about its rank.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct TokenTimes {
    pub(super) ends: Timestamp,
    /// From then on, the token's replacement must not be delayed.
    pub(super) mandatory_from: Timestamp,
}

/// A group of accounts that are due. The order is that in which lanes are served.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Lane {
    /// Accounts that were never tried, or not with their present credential. The newest is first: if many
    /// of them get no answer, a further one does not wait for all of them. After them come those that never had
    /// a token and failed in an outage that has ended.
    First,
    /// Accounts whose last attempt succeeded. The one whose token ends first is first.
    Refresh,
    /// Failing accounts with a live token whose refresh is mandatory. The one whose token ends first is
    /// first.
    Expiring,
    /// Other failing accounts. Those that ever had a token and failed the fewest times are first.
    Retry,
}

impl Lane {
    const ALL: [Self; 4] = [Self::First, Self::Refresh, Self::Expiring, Self::Retry];

    fn priority(self) -> PriorityClass {
        match self {
            Self::First => PriorityClass::Untried,
            Self::Refresh => PriorityClass::Proven,
            Self::Expiring | Self::Retry => PriorityClass::Failing,
        }
    }
}

/// The rank within a lane; the smallest is first. Never issued, failures, time: each lane uses what it needs.
type Rank = (bool, u32, Timestamp, Reverse<u64>);

/// Accounts in the order in which they become due and are tried.
#[derive(Debug, Default)]
pub(super) struct RefreshQueue {
    plans: HashMap<AccountId, Plan>,
    /// Accounts that were not due yet, ordered by when they are due.
    later: BTreeSet<(Timestamp, AccountId)>,
    /// Accounts that are due, for each lane.
    lanes: [BTreeSet<(Rank, AccountId)>; Lane::ALL.len()],
    /// Those in [`Lane::Retry`] with a live token, ordered by when their refresh becomes mandatory.
    mandatory_later: BTreeSet<(Timestamp, AccountId)>,
    /// How often each lane was passed over since it was last served.
    passes: [u32; Lane::ALL.len()],
    /// Accounts with an attempt under way, which cannot be scheduled.
    busy: HashMap<AccountId, PriorityClass>,
    /// How many accounts have become due.
    arrivals: u64,
}

#[derive(Clone, Copy, Debug)]
struct Plan {
    schedule: Schedule,
    /// The place among the due accounts; `None` while the account is in `later`.
    place: Option<(Lane, Rank)>,
}

impl RefreshQueue {
    /// Schedules the account, or removes it if `schedule` is `None`. An earlier schedule is replaced. An
    /// account with an attempt under way is not scheduled.
    pub(super) fn plan(&mut self, id: AccountId, schedule: Option<Schedule>) {
        if self.plans.get(&id).is_some_and(|plan| Some(plan.schedule) == schedule) {
            return;
        }
        self.remove(id);
        if let Some(schedule) = schedule.filter(|_| !self.busy.contains_key(&id)) {
            self.plans.insert(id, Plan { schedule, place: None });
            self.later.insert((schedule.due, id));
        }
    }

    /// Removes the account, if it is scheduled.
    pub(super) fn remove(&mut self, id: AccountId) {
        let Some(plan) = self.plans.remove(&id) else { return };
        match plan.place {
            Some((lane, rank)) => {
                self.lanes[lane as usize].remove(&(rank, id));
                if let Some(token) = plan.schedule.token {
                    self.mandatory_later.remove(&(token.mandatory_from, id));
                }
            }
            None => {
                self.later.remove(&(plan.schedule.due, id));
            }
        }
    }

    /// Records that the account's attempt has ended. The account may be scheduled again.
    pub(super) fn attempt_ended(&mut self, id: AccountId) {
        self.busy.remove(&id);
    }

    /// Returns when the next attempt can start: `now`, if one can at once; `None` if none can until an attempt
    /// ends or the queue changes. `canary` is the time before which no account in [`Lane::Retry`] is tried,
    /// while only one of them is tried at a time.
    pub(super) fn next_start(
        &mut self,
        now: Timestamp,
        limits: ConcurrencyLimits,
        canary: Option<Timestamp>,
    ) -> Option<Timestamp> {
        self.update_lanes(now);
        if self.choose(now, limits, canary).is_some() {
            return Some(now);
        }
        let canary = canary.filter(|_| self.can_serve(Lane::Retry, limits, None, now));
        let canary = canary.filter(|canary| *canary > now);
        let first = |set: &BTreeSet<(Timestamp, AccountId)>| set.first().map(|(at, _)| *at);
        [canary, first(&self.later), first(&self.mandatory_later)].into_iter().flatten().min()
    }

    /// Removes and returns the account to try next, which then has an attempt under way; `None` if no attempt
    /// can start at `now`. The arguments are those of [`RefreshQueue::next_start`].
    pub(super) fn take(
        &mut self,
        now: Timestamp,
        limits: ConcurrencyLimits,
        canary: Option<Timestamp>,
    ) -> Option<AccountId> {
        self.update_lanes(now);
        let chosen = self.choose(now, limits, canary)?;
        for lane in Lane::ALL {
            let skipped = lane != chosen && self.can_serve(lane, limits, canary, now);
            let passes = &mut self.passes[lane as usize];
            *passes = if skipped { *passes + 1 } else { 0 };
        }
        let (_, id) = *self.lanes[chosen as usize].first()?;
        self.remove(id);
        self.busy.insert(id, chosen.priority());
        Some(id)
    }

    /// Returns the lane to serve next.
    fn choose(
        &self,
        now: Timestamp,
        limits: ConcurrencyLimits,
        canary: Option<Timestamp>,
    ) -> Option<Lane> {
        let can_serve = |lane: &Lane| self.can_serve(*lane, limits, canary, now);
        let passed_over = Lane::ALL
            .into_iter()
            .filter(|lane| self.passes[*lane as usize] >= MOST_PASSES && can_serve(lane))
            .max_by_key(|lane| self.passes[*lane as usize]);
        let soonest = self.lanes[Lane::Refresh as usize].first().map(|((_, _, ends, _), _)| *ends);
        let urgent = soonest.is_some_and(|ends| ends <= now + delta(NO_TOKEN_RANK));
        let urgent = Some(Lane::Refresh).filter(|lane| urgent && can_serve(lane));
        passed_over.or(urgent).or_else(|| Lane::ALL.into_iter().find(can_serve))
    }

    fn can_serve(
        &self,
        lane: Lane,
        limits: ConcurrencyLimits,
        canary: Option<Timestamp>,
        now: Timestamp,
    ) -> bool {
        let running = RunningAttempts::count(self.busy.values().copied());
        let is_canary_time = canary.is_none_or(|at| at <= now && running.failing == 0);
        !self.lanes[lane as usize].is_empty()
            && limits.admit(lane.priority(), running)
            && (lane != Lane::Retry || is_canary_time)
    }

    /// Moves accounts that have become due into their lanes, and failing ones to [`Lane::Expiring`] and back
    /// as the time of their tokens passes.
    fn update_lanes(&mut self, now: Timestamp) {
        let passed = |set: &BTreeSet<(Timestamp, AccountId)>| {
            set.first().filter(|(at, _)| *at <= now).copied()
        };
        while let Some((at, id)) = passed(&self.later) {
            self.later.remove(&(at, id));
            self.arrivals += 1;
            self.enter_lane(id, now);
        }
        while let Some((_, id)) = passed(&self.mandatory_later) {
            self.change_lane(id, now);
        }
        while let Some(((_, _, ends, _), id)) = self.lanes[Lane::Expiring as usize].first().copied()
            && ends <= now
        {
            self.change_lane(id, now);
        }
    }

    fn change_lane(&mut self, id: AccountId, now: Timestamp) {
        let Some(plan) = self.plans.get(&id).copied() else { return };
        self.remove(id);
        self.plans.insert(id, Plan { place: None, ..plan });
        self.enter_lane(id, now);
    }

    /// Puts a due account that is in no set into its lane.
    fn enter_lane(&mut self, id: AccountId, now: Timestamp) {
        let Some(plan) = self.plans.get_mut(&id) else { return };
        let Schedule { due, priority, failures, token } = plan.schedule;
        let live = token.filter(|token| token.ends > now);
        let arrival = Reverse(self.arrivals);
        let (lane, rank) = match (priority, live) {
            (PriorityClass::Untried, _) => {
                (Lane::First, (false, failures, Timestamp::UNIX_EPOCH, arrival))
            }
            (PriorityClass::Proven, live) => {
                let ends = live.map_or(now + delta(NO_TOKEN_RANK), |token| token.ends);
                (Lane::Refresh, (false, 0, ends, Reverse(0)))
            }
            (PriorityClass::Failing, Some(token)) if token.mandatory_from <= now => {
                (Lane::Expiring, (false, 0, token.ends, Reverse(0)))
            }
            (PriorityClass::Failing, live) => {
                if let Some(token) = live {
                    self.mandatory_later.insert((token.mandatory_from, id));
                }
                (Lane::Retry, (token.is_none(), failures, due, Reverse(0)))
            }
        };
        plan.place = Some((lane, rank));
        self.lanes[lane as usize].insert((rank, id));
    }
}

#[cfg(test)]
mod tests;
