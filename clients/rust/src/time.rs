//! Pauses between attempts, and sums of times.

use std::time::Duration;

use tokio::time::Instant;

/// Returns `instant` plus `span`. A span that is too long for a sum stands for 30 years.
pub(crate) fn later(instant: Instant, span: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
    instant + span.min(FAR)
}

/// Pauses that double from `first` to `longest`, each shortened at random by up to half, so that clients that
/// failed together do not return together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    pub(crate) first: Duration,
    pub(crate) longest: Duration,
}

impl Backoff {
    /// Returns the pause after an attempt that failed after `failures` earlier ones. `random` is from 0, which
    /// leads to the longest pause, to 1.
    pub(crate) fn pause(self, failures: u32, random: f64) -> Duration {
        let doubled = self.first.saturating_mul(1 << failures.min(20));
        doubled.min(self.longest).mul_f64(1.0 - random.clamp(0.0, 1.0) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn pauses_double_up_to_the_longest_and_are_shortened_by_up_to_half() {
        let backoff = Backoff { first: MS(100), longest: MS(1000) };
        let pauses = |random| [0, 1, 2, 3, 4, u32::MAX].map(|n| backoff.pause(n, random));
        assert_eq!(pauses(0.0), [MS(100), MS(200), MS(400), MS(800), MS(1000), MS(1000)]);
        assert_eq!(pauses(1.0), [MS(50), MS(100), MS(200), MS(400), MS(500), MS(500)]);
    }
}
