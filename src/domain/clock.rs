//! The only source of wall time. A clock returns the present time and also sleeps, so that a test which
//! moves the clock wakes the sleepers too.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::watch;

/// A time in UTC. It is wall time, since it is compared with times that other processes stored.
pub type Timestamp = DateTime<Utc>;

/// A source of time.
#[derive(Clone, Debug, Default)]
pub enum Clock {
    /// The machine's clock.
    #[default]
    System,
    /// A test's clock, which moves only when the test moves it.
    Manual(ManualClock),
}

impl Clock {
    /// Returns the present time.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the only place that reads the wall clock")]
    pub fn now(&self) -> Timestamp {
        match self {
            Self::System => Utc::now(),
            Self::Manual(clock) => *clock.now.borrow(),
        }
    }

    /// Waits until [`Clock::now`] has reached `until`; returns at once if it has. Cancel safe.
    ///
    /// If the system clock is set during the wait, this takes effect within a second.
    pub async fn sleep_until(&self, until: Timestamp) {
        const LONGEST_SLEEP: Duration = Duration::from_secs(1);
        match self {
            Self::System => loop {
                let left = until_from(self.now(), until);
                if left.is_zero() {
                    return;
                }
                tokio::time::sleep(left.min(LONGEST_SLEEP)).await;
            },
            Self::Manual(clock) => {
                let mut now = clock.now.subscribe();
                // The sender lives in `clock`, so the wait cannot fail.
                let _ = now.wait_for(|now| *now >= until).await;
            }
        }
    }

    /// Waits until `pause` has passed on this clock. Cancel safe.
    pub async fn sleep(&self, pause: Duration) {
        self.sleep_until(self.now() + delta(pause)).await;
    }
}

/// A clock for tests, which moves only by [`ManualClock::advance`] and [`ManualClock::set`]. Clones share
/// their time.
#[derive(Clone, Debug)]
pub struct ManualClock {
    now: Arc<watch::Sender<Timestamp>>,
}

impl ManualClock {
    /// Returns a clock whose present time is `now`.
    #[must_use]
    pub fn new(now: Timestamp) -> Self {
        Self { now: Arc::new(watch::Sender::new(now)) }
    }

    /// Moves the clock forward and wakes every sleeper whose time has come.
    pub fn advance(&self, by: Duration) {
        self.now.send_modify(|now| *now += delta(by));
    }

    /// Sets the clock to `now`, which may be earlier than its present time.
    pub fn set(&self, now: Timestamp) {
        self.now.send_replace(now);
    }
}

/// Returns the time from `now` until `then`; zero if `then` has passed.
#[must_use]
pub fn until_from(now: Timestamp, then: Timestamp) -> Duration {
    (then - now).to_std().unwrap_or(Duration::ZERO)
}

/// Converts `duration` to a difference of timestamps, at most a hundred years so that sums stay in range.
#[must_use]
pub fn delta(duration: Duration) -> TimeDelta {
    const CENTURY: TimeDelta = TimeDelta::days(36_525);
    TimeDelta::from_std(duration).unwrap_or(CENTURY).min(CENTURY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_manual_clock_wakes_a_sleeper_only_when_its_time_has_come() {
        let manual = ManualClock::new(DateTime::UNIX_EPOCH);
        let clock = Clock::Manual(manual.clone());
        let sleeper = tokio::spawn({
            let clock = clock.clone();
            async move {
                clock.sleep(Duration::from_mins(1)).await;
                clock.now()
            }
        });
        while manual.now.receiver_count() == 0 {
            tokio::task::yield_now().await;
        }
        manual.advance(Duration::from_secs(59));
        tokio::task::yield_now().await;
        assert!(!sleeper.is_finished());
        manual.advance(Duration::from_secs(1));
        assert_eq!(sleeper.await.unwrap().timestamp(), 60);
    }

    #[test]
    fn the_time_until_a_past_time_is_zero() {
        let now = DateTime::UNIX_EPOCH;
        assert_eq!(until_from(now, now - TimeDelta::seconds(5)), Duration::ZERO);
        assert_eq!(until_from(now, now + TimeDelta::seconds(5)), Duration::from_secs(5));
        assert_eq!(delta(Duration::MAX), TimeDelta::days(36_525));
    }
}
