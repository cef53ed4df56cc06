//! The database's clock beside the one of this process.
//!
//! Replicas agree on times by the database's clock. It is compared with the time of this process, which never
//! leaps, each second and at each load of accounts, so a leap of it is noticed. Grants and bearers end by it,
//! since admins write their ends in SQL. If the wall clock agrees with it and the time of this process does not, the
//! wall clock was wrong when the process started: then the process's UTC is corrected.

use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use chrono::TimeDelta;
use parking_lot::Mutex;
use sqlx::PgPool;
use tracing::{info, warn};

use crate::{
    domain::{
        clock::{Clock, Timestamp},
        plausible_time::{ClockComparison, Moment, correction, most_credible},
    },
    services::account_cache::AccountCache,
    store::{
        StoreError, deployment,
        tokens::{self, TimeLeft},
        within,
    },
};

/// The pause between two looks at the database's clock.
const INTERVAL: Duration = Duration::from_secs(1);
/// The most tokens whose ends are corrected by one statement.
const BATCH: usize = 1_000;

/// Tells the time of the database, and of this process.
#[derive(Debug)]
pub struct DatabaseClock {
    clock: Clock,
    /// `None` until the database has told its time.
    comparison: Mutex<Option<ClockComparison>>,
    /// How far the process is ahead of the database, in microseconds: the comparison's result, for readers that
    /// must not wait. 0 until the database has told its time.
    ahead_us: AtomicI64,
    /// The leaps that [`DatabaseClockWatch`] has not acted on yet.
    leaped: Mutex<TimeDelta>,
}

impl DatabaseClock {
    /// Returns a clock that has not seen the database yet.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self {
            clock,
            comparison: Mutex::default(),
            ahead_us: AtomicI64::new(0),
            leaped: Mutex::default(),
        }
    }

    /// Returns the clock of this process.
    #[must_use]
    pub fn local(&self) -> &Clock {
        &self.clock
    }

    /// Returns the database's present time, as far as it is known: between two looks it moves on like the time
    /// of this process.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.now() - self.ahead()
    }

    /// Converts a time of this process to the UTC that callers and people read, by the most credible of the
    /// known clocks.
    #[must_use]
    pub fn to_utc(&self, time: Timestamp) -> Timestamp {
        let (process, ahead) = (self.clock.now(), self.clock.utc_ahead());
        let credible = most_credible(process + ahead, self.clock.wall(), process - self.ahead());
        time + (credible - process)
    }

    fn ahead(&self) -> TimeDelta {
        TimeDelta::microseconds(self.ahead_us.load(Ordering::Relaxed))
    }

    /// Takes notice that the database's clock said `database` between `before` and now, and returns the moment
    /// by each clock.
    pub fn observe(&self, before: Timestamp, database: Timestamp) -> Moment {
        let after = self.clock.now();
        let mut comparison = self.comparison.lock();
        let (next, leap) = match &*comparison {
            Some(last) => last.next(before, database, after),
            None => (ClockComparison::new(before, database, after), None),
        };
        *comparison = Some(next);
        let ahead = next.middle().num_microseconds().unwrap_or_default();
        self.ahead_us.store(ahead, Ordering::Relaxed);
        if let Some(leap) = leap {
            *self.leaped.lock() += leap;
        }
        self.correct_utc(after - next.middle());
        let even_since = next.even_since();
        Moment { process: before, wall: self.clock.wall(), database, even_since }
    }

    /// Corrects this process's UTC if the wall clock agrees with the database's clock, which says `database`, and both
    /// contradict it. The time by which durations are measured stays as it is.
    fn correct_utc(&self, database: Timestamp) {
        let by = correction(self.clock.utc(), self.clock.wall(), database);
        if by.is_zero() {
            return;
        }
        self.clock.correct(self.clock.utc_ahead() + by);
        warn!(
            seconds = by.num_seconds(),
            "the wall clock was wrong when this process started: it and the database's clock agree, and times of \
             certificates and of the upstream are judged by them from now on"
        );
    }

    /// Returns by how much the database's clock has leaped since the last call: zero if it ran evenly.
    fn take_leap(&self) -> TimeDelta {
        mem::take(&mut *self.leaped.lock())
    }
}

/// The task that looks at the database's clock.
pub struct DatabaseClockWatch {
    /// The clock that is compared.
    pub clock: Arc<DatabaseClock>,
    /// The database.
    pub pool: PgPool,
    /// The accounts, whose tokens' ends are known whatever the database's clock says.
    pub cache: Arc<AccountCache>,
}

impl DatabaseClockWatch {
    /// Looks at the database's clock once. It must succeed before calls are served.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn look(&self) -> Result<(), StoreError> {
        let before = self.clock.local().now();
        let database = within(deployment::present_time(&self.pool)).await?;
        self.clock.observe(before, database);
        let leap = self.clock.take_leap();
        if leap.is_zero() {
            return Ok(());
        }
        let corrected = self.leaped(leap).await;
        if corrected.is_err() {
            // The next look tries it again.
            *self.clock.leaped.lock() += leap;
        }
        corrected
    }

    /// Looks once a second. Never returns. Cancel safe.
    pub async fn run(&self) {
        loop {
            // This is real time, since a test's clock may not move.
            tokio::time::sleep(INTERVAL).await;
            // The change feed reports a database that does not answer.
            let _ = self.look().await;
        }
    }

    /// After the database's clock was set back, its rows make tokens live for longer than they do. This replica
    /// knows better, and corrects them, so that neither `account_status` nor another replica's start is wrong.
    async fn leaped(&self, leap: TimeDelta) -> Result<(), StoreError> {
        warn!(seconds = leap.num_seconds(), "the database's clock was set while the broker runs");
        if leap > TimeDelta::zero() {
            return Ok(());
        }
        let now = self.clock.local().now();
        let known = self.cache.all().into_iter().filter_map(|entry| {
            let snapshot = entry.snapshot();
            let token = snapshot.token.as_ref()?;
            let (generation, time_left) = (token.generation, token.time_left(now));
            Some(TimeLeft { account: entry.id(), generation, time_left })
        });
        let known: Vec<_> = known.collect();
        let mut corrected = 0;
        for batch in known.chunks(BATCH) {
            corrected += within(tokens::correct_ends(&self.pool, batch)).await?;
        }
        info!(tokens = corrected, "the stored ends of tokens were corrected");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::domain::clock::ManualClock;

    #[test]
    fn a_wall_clock_that_was_wrong_at_the_start_is_corrected_by_two_witnesses_for_utc_alone() {
        let start = DateTime::UNIX_EPOCH + TimeDelta::days(9);
        let right = start + TimeDelta::days(300);
        let manual = ManualClock::new(start);
        let clock = DatabaseClock::new(Clock::Manual(manual.clone()));
        clock.observe(start, right);
        assert_eq!(clock.local().utc(), start, "the database alone proves nothing");
        manual.set_wall_ahead(right - start);
        clock.observe(start, right);
        assert_eq!((clock.local().utc(), clock.local().now()), (right, start));
        assert_eq!(clock.to_utc(start), right);
        // A later leap of the wall clock does not undo it.
        manual.set_wall_ahead(TimeDelta::zero());
        clock.observe(start, right);
        assert_eq!((clock.local().utc(), clock.to_utc(start)), (right, right));
    }

    #[test]
    fn the_databases_time_goes_on_between_two_looks_whatever_the_wall_clock_does() {
        let start = DateTime::UNIX_EPOCH + TimeDelta::days(9);
        let manual = ManualClock::new(start);
        let clock = DatabaseClock::new(Clock::Manual(manual.clone()));
        assert_eq!(clock.now(), start);
        let database = start - TimeDelta::hours(2);
        let moment = clock.observe(start, database);
        assert_eq!((moment.database, moment.even_since), (database, database));
        assert_eq!(clock.take_leap(), TimeDelta::zero());
        manual.advance(Duration::from_mins(1));
        manual.set_wall_ahead(TimeDelta::hours(5));
        assert_eq!(clock.now(), database + TimeDelta::minutes(1));
        let back = TimeDelta::minutes(-10);
        clock.observe(clock.local().now(), clock.now() + back);
        assert_eq!(clock.take_leap(), back);
    }
}
