//! Which of the times that the database keeps are believed.
//!
//! The database stamps attempts, leases and tokens by its own clock, and that clock can be set, or another
//! server with another clock can take over. A time that was stamped before may then lie in the future. Each
//! such time has a largest value by its own rule: an attempt cannot have begun later than now, and a lease
//! cannot last for longer than a lease. A value beyond that is not believed, so that no account waits for
//! longer than the rules allow, whatever the clocks do.
//!
//! What is put in its place must let time pass. A start that is always taken for "now" would begin its
//! interval again with each look, so a start in the future counts as long ago.

use std::time::Duration;

use chrono::TimeDelta;

use crate::domain::{
    clock::{Timestamp, delta},
    refresh_policy::RefreshPolicy,
    refresh_state::{IntervalExceptions, RefreshState},
    token::{Generation, LONGEST_LIFE},
};

/// A difference between two clocks, or a step of one, that is not worth notice.
pub const TOLERANCE: TimeDelta = TimeDelta::seconds(5);

/// The longest time that the settings permit for a call to the upstream.
pub const LONGEST_UPSTREAM_TIMEOUT: Duration = Duration::from_mins(1);

/// How much longer a lease lasts than an attempt may take. In this time the token is stored.
pub const LEASE_BEYOND_ATTEMPT: Duration = Duration::from_secs(20);

/// The longest lease that a replica may have taken, whatever its settings. Those of another replica may differ
/// from ours, for example while a setting is changed on one after the other.
pub const LONGEST_LEASE: Duration =
    Duration::from_secs(LONGEST_UPSTREAM_TIMEOUT.as_secs() + LEASE_BEYOND_ATTEMPT.as_secs());

/// A time before every other one: whatever began then is over.
const LONG_AGO: Timestamp = Timestamp::UNIX_EPOCH;

/// The rules that bound the times of attempts.
#[derive(Clone, Copy, Debug)]
pub struct AttemptTimeLimits {
    /// The policy, which knows the longest pauses.
    pub policy: RefreshPolicy,
}

impl AttemptTimeLimits {
    /// Replaces the times of `refresh` that cannot be true at `now`, by the same clock.
    ///
    /// - An attempt in the future began before the clock was set back, so it counts as long ago, and the
    ///   pauses after it count as over. The next attempt may come early, once.
    /// - A next attempt that is further away than the longest pause is due.
    /// - A lease ends no later than the longest one that began now would. Returns `true` in this case: the caller that holds the
    ///   row's lock must store the new end, or it would be as far away at the next look. The lease is not
    ///   taken for ended, since its holder may be calling the upstream at this moment.
    /// - A window of exceptions in the future is over.
    pub fn correct(&self, refresh: &mut RefreshState, now: Timestamp) -> bool {
        let in_future = |time: Option<Timestamp>| time.is_some_and(|at| at > now + TOLERANCE);
        if in_future(refresh.attempt_started_at) {
            refresh.attempt_started_at = Some(LONG_AGO);
            refresh.next_attempt_at = refresh.next_attempt_at.map(|_| LONG_AGO);
            refresh.new_secret_retry_at = refresh.new_secret_retry_at.map(|_| LONG_AGO);
        }
        let longest_pause = delta(self.policy.longest_pause());
        for pause_until in [&mut refresh.next_attempt_at, &mut refresh.new_secret_retry_at] {
            if pause_until.is_some_and(|at| at > now + longest_pause) {
                *pause_until = Some(LONG_AGO);
            }
        }
        if in_future(refresh.interval_exceptions.since) {
            refresh.interval_exceptions = IntervalExceptions::default();
        }
        let latest = now + delta(LONGEST_LEASE);
        let shortened = refresh.lease_until.is_some_and(|until| until > latest);
        if shortened {
            refresh.lease_until = Some(latest);
        }
        shortened
    }
}

/// The life of a token as it is stored.
#[derive(Clone, Copy, Debug)]
pub struct StoredLife {
    /// When the token was issued, by the database's clock.
    pub issued_at: Timestamp,
    /// When it ends, by the database's clock.
    pub expires_at: Timestamp,
    /// When it ends, by the wall clock of the replica that issued it; `None` if an older release did.
    pub issuer_expires_at: Option<Timestamp>,
}

/// The present moment by each clock, when a token is loaded.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// The time of this process.
    pub process: Timestamp,
    /// This machine's wall clock.
    pub wall: Timestamp,
    /// The database's clock.
    pub database: Timestamp,
    /// The time of the database's clock since which it has run evenly with this process.
    pub even_since: Timestamp,
}

/// The life of a stored token by the time of this process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BelievedLife {
    /// When it was issued.
    pub issued_at: Timestamp,
    /// When it ends.
    pub expires_at: Timestamp,
    /// Whether the database's clock is known to have run evenly since the token was issued, so that no other
    /// witness was asked.
    pub certain: bool,
    /// Whether a clock says that the token has not been issued yet. That clock was set back, nobody knows how
    /// far, and the token should be replaced.
    pub from_the_future: bool,
}

impl StoredLife {
    /// Returns the life without what nobody issued. The columns of the times can be changed by whoever can write the
    /// row, but the token opens only with its generation, which says when its issue began, and its claims state how
    /// long it lives (`stated`). An issue takes `attempt` at most.
    ///
    /// The generation is by the database's clock, and later than the issue only if that clock was set back.
    #[must_use]
    pub fn bounded(
        mut self,
        generation: Generation,
        stated: Option<TimeDelta>,
        attempt: Duration,
    ) -> Self {
        let Some(started_at) = generation.started_at() else { return self };
        let life = stated.map_or(LONGEST_LIFE, |life| life.clamp(TimeDelta::zero(), LONGEST_LIFE));
        let latest = started_at + delta(attempt) + TOLERANCE;
        if self.issued_at > latest {
            self.issued_at = started_at;
        }
        self.expires_at = self.expires_at.min(latest + life);
        self
    }

    /// Returns what this process should believe. The token never lives longer than it was issued for.
    ///
    /// If the database's clock may have been set since the issue, the wall clock is the second witness, and the
    /// earlier end counts. A clock by which the token has not been issued yet is no witness. Without any, the
    /// token counts as ended, since it may have.
    #[must_use]
    pub fn believed(&self, moment: &Moment) -> BelievedLife {
        let life = (self.expires_at - self.issued_at).clamp(TimeDelta::zero(), LONGEST_LIFE);
        let by_database = self.expires_at - moment.database;
        let is_credible = |left: &TimeDelta| *left <= life + TOLERANCE;
        let certain = self.issued_at >= moment.even_since && is_credible(&by_database);
        let by_wall = self.issuer_expires_at.filter(|_| !certain).map(|end| end - moment.wall);
        let witnesses = [Some(by_database), by_wall].into_iter().flatten();
        let from_the_future = !witnesses.clone().all(|left| is_credible(&left));
        let left = witnesses.filter(is_credible).min().unwrap_or(TimeDelta::zero());
        // The difference of two times of a table can be thousands of years.
        let expires_at = moment.process + left.min(life).max(-LONGEST_LIFE);
        BelievedLife { issued_at: expires_at - life, expires_at, certain, from_the_future }
    }
}

/// How the database's clock runs beside the time of this process.
#[derive(Clone, Copy, Debug)]
pub struct ClockComparison {
    /// The bounds of how far the process is ahead of the database.
    least: TimeDelta,
    most: TimeDelta,
    /// See [`Moment::even_since`].
    even_since: Timestamp,
}

impl ClockComparison {
    /// Returns the first comparison: the database said `database` between `before` and `after` of the process.
    #[must_use]
    pub fn new(before: Timestamp, database: Timestamp, after: Timestamp) -> Self {
        Self { least: before - database, most: after - database, even_since: database }
    }

    /// Returns the comparison after a further look, and by how much the database's clock went forward (or
    /// back, if negative) between the two; `None` if it ran evenly.
    #[must_use]
    pub fn next(
        &self,
        before: Timestamp,
        database: Timestamp,
        after: Timestamp,
    ) -> (Self, Option<TimeDelta>) {
        let next = Self::new(before, database, after);
        let leaped = next.most < self.least - TOLERANCE || next.least > self.most + TOLERANCE;
        if leaped {
            return (next, Some(self.middle() - next.middle()));
        }
        (Self { even_since: self.even_since, ..next }, None)
    }

    /// Returns the best estimate of how far the process is ahead of the database.
    #[must_use]
    pub fn middle(&self) -> TimeDelta {
        self.least + (self.most - self.least) / 2
    }

    /// Returns the time of the database's clock since which it has run evenly with this process.
    #[must_use]
    pub fn even_since(&self) -> Timestamp {
        self.even_since
    }
}

/// Returns by how much this process's UTC has to be corrected: zero, unless the wall clock and the database's clock
/// agree with each other and not with it. Then the wall clock was wrong when the process started, and was set right
/// since. Of the two, the earlier counts, as long as they agree.
#[must_use]
pub fn correction(utc: Timestamp, wall: Timestamp, database: Timestamp) -> TimeDelta {
    let agree = |one: Timestamp, other: Timestamp| (one - other).abs() <= TOLERANCE;
    if agree(utc, wall) || agree(utc, database) || !agree(wall, database) {
        return TimeDelta::zero();
    }
    wall.min(database) - utc
}

/// Returns the most credible present time of three clocks: this process's, this machine's wall clock, and the
/// database's.
///
/// The first two part only if the wall clock was set while the process ran. Then two of three decide. While
/// they agree they are one witness, and the earlier one of the two counts, since a time that callers read too
/// late could make them use a token that has ended.
#[must_use]
pub fn most_credible(process: Timestamp, wall: Timestamp, database: Timestamp) -> Timestamp {
    let agree = |one: Timestamp, other: Timestamp| (one - other).abs() <= TOLERANCE;
    if agree(process, wall) {
        // While all agree, this process's time is taken, so that each answer states the same end.
        return if agree(process, database) { process } else { wall.min(database) };
    }
    let mut clocks = [process, wall, database];
    clocks.sort_unstable();
    clocks[1]
}

#[cfg(test)]
mod tests;
