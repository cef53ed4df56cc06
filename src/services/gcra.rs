//! Rate limits by the generic cell rate algorithm (GCRA): one atomic number per limited party.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// How fast events may come: one per interval in the long run, and several at once in a burst.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Quota {
    /// Time that one event costs, in nanoseconds.
    interval: u64,
    /// How far the time up to which events are paid may be ahead of the present, in nanoseconds.
    burst: u64,
}

impl Quota {
    /// Allows `rate` events per second, of which one second's worth may come at once. A rate of 0
    /// counts as 1.
    #[must_use]
    pub const fn per_second(rate: u32) -> Self {
        const SECOND: u64 = 1_000_000_000;
        let rate = if rate == 0 { 1 } else { rate };
        Self { interval: SECOND / rate as u64, burst: SECOND }
    }

    /// Allows one event per second, and up to `burst` events at once.
    #[must_use]
    pub const fn one_per_second(burst: u32) -> Self {
        let one = Self::per_second(1);
        Self { burst: one.interval * burst as u64, ..one }
    }
}

/// The state of one limited party: the time up to which the cost of its events so far is paid, in
/// nanoseconds since an epoch that the user of this type chose. GCRA calls it the theoretical arrival time.
///
/// The quota is an argument of each call, so that it can change at any time. The present time is an
/// argument too, so that tests control it; it may differ slightly between threads.
#[derive(Debug, Default)]
pub struct Gcra(AtomicU64);

impl Gcra {
    /// Accepts one event at `now`, given as the time since the epoch, if `quota` allows it.
    ///
    /// # Errors
    /// How long to wait until an event would be accepted, when the quota is used up. A refused event
    /// costs nothing.
    pub fn take(&self, quota: Quota, now: Duration) -> Result<(), Duration> {
        self.take_within(quota.burst, quota, now)
    }

    /// Accepts one event of low priority at `now`, if it leaves half of the burst for others. So such events
    /// use what others leave of the rate.
    ///
    /// # Errors
    /// How long to wait until the event would be accepted. A refused event costs nothing.
    pub fn take_low_priority(&self, quota: Quota, now: Duration) -> Result<(), Duration> {
        self.take_within((quota.burst / 2).max(quota.interval), quota, now)
    }

    /// Counts `share` of the cost of an event at `now`, a fraction of numerator and denominator, whether the
    /// quota allows it or not. Later events wait until this is paid for, at most for `longest`.
    pub fn charge(&self, share: (u64, u64), quota: Quota, now: Duration, longest: Duration) {
        let now = nanoseconds(now);
        let cost = quota.interval.saturating_mul(share.0) / share.1.max(1);
        let latest = now.saturating_add(quota.burst).saturating_add(nanoseconds(longest));
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |paid_until| {
            let next = paid_until.max(now).saturating_add(cost).min(latest);
            (next > paid_until).then_some(next)
        });
    }

    fn take_within(&self, burst: u64, quota: Quota, now: Duration) -> Result<(), Duration> {
        let now = nanoseconds(now);
        let interval = quota.interval;
        // No other memory depends on the order in which threads see this number.
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |paid_until| {
            let next = paid_until.max(now) + interval;
            (next - now <= burst).then_some(next)
        });
        taken.map(drop).map_err(|paid_until| {
            Duration::from_nanos((paid_until.max(now) + interval).saturating_sub(now + burst))
        })
    }

    /// Whether all events are paid for at `now`, so that this state equals a new one.
    #[must_use]
    pub fn is_idle(&self, now: Duration) -> bool {
        self.0.load(Ordering::Relaxed) <= nanoseconds(now)
    }
}

/// Converts to nanoseconds, at most half of the range (292 years), so that sums do not overflow.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).min(u64::MAX / 2)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn accepted(gcra: &Gcra, quota: Quota, now: Duration) -> usize {
        (0..100).filter(|_| gcra.take(quota, now).is_ok()).count()
    }

    #[test]
    fn a_burst_is_accepted_at_once_and_then_one_event_per_interval() {
        let (gcra, quota) = (Gcra::default(), Quota::one_per_second(20));
        assert_eq!(accepted(&gcra, quota, Duration::ZERO), 20);
        assert_eq!(accepted(&gcra, quota, Duration::from_millis(999)), 0);
        assert_eq!(accepted(&gcra, quota, Duration::from_secs(1)), 1);
        assert!(!gcra.is_idle(Duration::from_secs(20)));
        assert!(gcra.is_idle(Duration::from_secs(21)));
        assert_eq!(accepted(&gcra, quota, Duration::from_mins(1)), 20);
    }

    #[test]
    fn a_refusal_says_when_the_next_event_is_accepted() {
        let (gcra, quota) = (Gcra::default(), Quota::per_second(10));
        let now = Duration::from_secs(5);
        assert_eq!(accepted(&gcra, quota, now), 10);
        let wait = gcra.take(quota, now).unwrap_err();
        assert_eq!(wait, Duration::from_millis(100));
        let too_early = now + wait.saturating_sub(Duration::from_nanos(1));
        assert!(gcra.take(quota, too_early).is_err());
        assert_eq!(gcra.take(quota, now + wait), Ok(()));
    }

    #[test]
    fn events_of_low_priority_leave_half_of_the_burst_and_use_the_whole_rate() {
        for rate in [1, 2, 5, 1_000] {
            let (gcra, quota) = (Gcra::default(), Quota::per_second(rate));
            let mut now = Duration::ZERO;
            let mut accepted = 0_u32;
            while now < Duration::from_secs(10) {
                match gcra.take_low_priority(quota, now) {
                    Ok(()) => accepted += 1,
                    Err(wait) => now += wait,
                }
            }
            assert!(accepted.abs_diff(10 * rate) <= rate.div_ceil(2), "{accepted} at {rate}/s");
            if rate > 1 {
                assert_eq!(gcra.take(quota, now), Ok(()), "others find a place at {rate}/s");
            }
        }
    }

    #[test]
    fn what_is_charged_delays_later_events_up_to_a_limit() {
        let (gcra, quota) = (Gcra::default(), Quota::per_second(10));
        let (now, longest) = (Duration::from_secs(5), Duration::from_secs(10));
        gcra.charge((30, 2), quota, now, longest);
        assert_eq!(gcra.take(quota, now), Err(Duration::from_millis(600)));
        gcra.charge((u64::MAX, 1), quota, now, longest);
        let wait = gcra.take(quota, now).unwrap_err();
        assert_eq!(wait, longest + Duration::from_millis(100));
        assert_eq!(gcra.take(quota, now + wait), Ok(()));
    }

    #[test]
    fn the_quota_can_change_between_calls() {
        let gcra = Gcra::default();
        let now = Duration::from_secs(5);
        assert_eq!(accepted(&gcra, Quota::per_second(10), now), 10);
        assert_eq!(accepted(&gcra, Quota::per_second(1_000), now), 0);
        let later = now + Duration::from_millis(100);
        assert_eq!(accepted(&gcra, Quota::per_second(1_000), later), 100);
    }

    proptest! {
        #[test]
        fn no_more_than_the_rate_and_one_burst_is_ever_accepted(
            rate in 1_u32..500, steps in proptest::collection::vec(0_u64..20_000_000, 1..500),
        ) {
            let (gcra, quota) = (Gcra::default(), Quota::per_second(rate));
            let (mut now, mut taken) = (0, 0_u64);
            for step in steps {
                now += step;
                taken += u64::from(gcra.take(quota, Duration::from_nanos(now)).is_ok());
            }
            // The interval is rounded down, which lets at most one event in a million through more.
            prop_assert!(taken <= u64::from(rate) + now * u64::from(rate) / 1_000_000_000 + 1);
        }

        #[test]
        fn no_time_and_no_rate_make_it_panic(rate: u32, times: Vec<u64>) {
            let gcra = Gcra::default();
            for seconds in times {
                let _ = gcra.take(Quota::per_second(rate), Duration::from_secs(seconds));
            }
        }
    }
}
