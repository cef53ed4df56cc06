//! The only source of time that has a date. A clock returns the present time and also sleeps, so that a test
//! which moves the clock wakes the sleepers too.
//!
//! There are three times, because a machine's wall clock can be set while the process runs:
//!
//! - [`Clock::now`] never leaps. Whatever ends after a duration is measured by it: tokens, pauses, leases, the
//!   confirmation of grants.
//! - [`Clock::utc`] is the same, corrected once it is known that the wall clock was wrong when the process started.
//!   Times that somebody outside has fixed, such as the end of a certificate, are compared with it.
//! - [`Clock::wall`] is the machine's wall clock. It is written into records and shown to people, and it is one
//!   of several witnesses where a time of another process is judged.

use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::watch;

/// A time in UTC. Times of [`Clock::now`] can be compared only with others of the same process.
pub type Timestamp = DateTime<Utc>;

/// The wall clock's time and the monotonic clock's when this process first asked for the time.
static ANCHOR: LazyLock<(Timestamp, Duration)> = LazyLock::new(|| (wall_clock(), monotonic()));

/// How far UTC is ahead of [`Clock::now`] of the machine's clock, in microseconds.
static UTC_AHEAD_US: AtomicI64 = AtomicI64::new(0);

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
    /// Returns the present time of this process: the wall clock's time when the process first asked for it,
    /// moved on by the machine's monotonic clock. So it does not follow when the wall clock is set.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        match self {
            Self::System => {
                let (wall, monotonic_then) = *ANCHOR;
                wall + delta(monotonic().saturating_sub(monotonic_then))
            }
            Self::Manual(clock) => *clock.now.borrow(),
        }
    }

    /// Returns the present time of the world, as far as it is known. It leaps only by [`Clock::correct`], so durations
    /// must not be measured by it.
    #[must_use]
    pub fn utc(&self) -> Timestamp {
        self.now() + self.utc_ahead()
    }

    /// Returns how far [`Clock::utc`] is ahead of [`Clock::now`].
    #[must_use]
    pub fn utc_ahead(&self) -> TimeDelta {
        TimeDelta::microseconds(self.utc_ahead_us().load(Ordering::Relaxed))
    }

    /// Sets how far [`Clock::utc`] is ahead of [`Clock::now`], for the whole process.
    pub fn correct(&self, ahead: TimeDelta) {
        let ahead = ahead.num_microseconds().unwrap_or_default();
        self.utc_ahead_us().store(ahead, Ordering::Relaxed);
    }

    fn utc_ahead_us(&self) -> &AtomicI64 {
        match self {
            Self::System => &UTC_AHEAD_US,
            Self::Manual(clock) => &clock.utc_ahead_us,
        }
    }

    /// Returns the wall clock's time, which may leap in both directions.
    #[must_use]
    pub fn wall(&self) -> Timestamp {
        match self {
            Self::System => wall_clock(),
            Self::Manual(clock) => {
                let ahead = clock.wall_ahead_ms.load(Ordering::Relaxed);
                self.now() + TimeDelta::milliseconds(ahead)
            }
        }
    }

    /// Waits until [`Clock::now`] has reached `until`; returns at once if it has. Cancel safe.
    pub async fn sleep_until(&self, until: Timestamp) {
        // tokio's timers stand still while the machine is suspended, and this clock does not.
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

#[expect(clippy::disallowed_methods, reason = "the only place that reads the wall clock")]
fn wall_clock() -> Timestamp {
    Utc::now()
}

/// Returns the time since the machine's start, suspension included: a token's life goes on while the machine
/// is suspended, and `std::time::Instant` does not.
#[cfg(target_os = "linux")]
fn monotonic() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// Returns the time since the first call.
#[cfg(not(target_os = "linux"))]
fn monotonic() -> Duration {
    static FIRST: LazyLock<std::time::Instant> = LazyLock::new(std::time::Instant::now);
    FIRST.elapsed()
}

/// A clock for tests, which moves only by [`ManualClock::advance`] and [`ManualClock::set`]. Clones share
/// their time.
#[derive(Clone, Debug)]
pub struct ManualClock {
    now: Arc<watch::Sender<Timestamp>>,
    /// How far [`Clock::wall`] is ahead of [`Clock::now`], in milliseconds.
    wall_ahead_ms: Arc<AtomicI64>,
    /// How far [`Clock::utc`] is ahead of [`Clock::now`], in microseconds.
    utc_ahead_us: Arc<AtomicI64>,
}

impl ManualClock {
    /// Returns a clock whose present time is `now`.
    #[must_use]
    pub fn new(now: Timestamp) -> Self {
        let now = Arc::new(watch::Sender::new(now));
        Self { now, wall_ahead_ms: Arc::default(), utc_ahead_us: Arc::default() }
    }

    /// Sets the wall clock to be `by` ahead of the time of the process, or behind if that is negative.
    pub fn set_wall_ahead(&self, by: TimeDelta) {
        self.wall_ahead_ms.store(by.num_milliseconds(), Ordering::Relaxed);
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
    fn a_leap_of_the_wall_clock_does_not_move_the_time_of_the_process() {
        let manual = ManualClock::new(DateTime::UNIX_EPOCH);
        let clock = Clock::Manual(manual.clone());
        manual.set_wall_ahead(TimeDelta::hours(-2));
        assert_eq!(clock.now(), DateTime::UNIX_EPOCH);
        assert_eq!(clock.wall(), DateTime::UNIX_EPOCH - TimeDelta::hours(2));
    }

    #[test]
    fn the_systems_time_begins_at_the_wall_clocks_and_never_goes_back() {
        let mut before = Clock::System.now();
        assert!((Clock::System.wall() - before).abs() < TimeDelta::minutes(5));
        for _ in 0..1_000 {
            let now = Clock::System.now();
            assert!(now >= before);
            before = now;
        }
    }

    #[test]
    fn the_time_until_a_past_time_is_zero() {
        let now = DateTime::UNIX_EPOCH;
        assert_eq!(until_from(now, now - TimeDelta::seconds(5)), Duration::ZERO);
        assert_eq!(until_from(now, now + TimeDelta::seconds(5)), Duration::from_secs(5));
        assert_eq!(delta(Duration::MAX), TimeDelta::days(36_525));
    }
}
