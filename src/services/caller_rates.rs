//! The rate limit of each caller.

use std::{sync::Arc, time::Duration};

use papaya::HashMap;
use tokio::time::Instant;

use super::gcra::{Gcra, Quota};
use crate::domain::caller::{Caller, CallerId};

/// Limits the calls of each caller. A caller may make one second's worth of its calls at once.
///
/// The limit is per replica. An entry (about 100 bytes) is kept for each caller that ever called this
/// process; callers are few, since an admin registers each.
#[derive(Debug)]
pub struct CallerRates {
    default_rate: u32,
    epoch: Instant,
    callers: HashMap<CallerId, Arc<Gcra>>,
}

impl CallerRates {
    /// Creates the limits. A caller without a rate of its own may make `default_rate` calls a second.
    #[must_use]
    pub fn new(default_rate: u32) -> Self {
        Self { default_rate, epoch: Instant::now(), callers: HashMap::default() }
    }

    /// Counts one call of `caller` that arrived at `now`. Takes no lock: it is on the path of every call.
    ///
    /// # Errors
    /// The time until the next call is permitted, when the caller exceeded its rate.
    pub fn take(&self, caller: &Caller, now: Instant) -> Result<(), Duration> {
        let quota = Quota::per_second(caller.rate_limit.unwrap_or(self.default_rate));
        let callers = self.callers.pin();
        let used = callers.get_or_insert_with(caller.id, Arc::default);
        used.take(quota, now.saturating_duration_since(self.epoch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(id: i64, rate_limit: Option<u32>) -> Caller {
        Caller {
            id: CallerId(id),
            name: format!("caller-{id}").into(),
            enabled: true,
            rate_limit,
            grants: vec![],
        }
    }

    #[test]
    fn a_caller_may_use_a_second_of_its_rate_at_once_and_then_waits() {
        let rates = CallerRates::new(10);
        let now = rates.epoch + Duration::from_secs(5);
        for _ in 0..10 {
            rates.take(&caller(1, None), now).unwrap();
        }
        let wait = Duration::from_millis(100);
        assert_eq!(rates.take(&caller(1, None), now), Err(wait));
        assert_eq!(rates.take(&caller(2, None), now), Ok(()), "another caller");
        assert_eq!(rates.take(&caller(1, None), now + wait), Ok(()));
    }

    #[test]
    fn a_rate_of_a_caller_s_own_replaces_the_default_as_soon_as_it_changes() {
        let rates = CallerRates::new(1);
        let now = rates.epoch;
        assert_eq!(rates.take(&caller(1, None), now), Ok(()));
        assert!(rates.take(&caller(1, None), now).is_err());
        let later = now + Duration::from_millis(500);
        assert!(rates.take(&caller(1, None), later).is_err());
        assert_eq!(rates.take(&caller(1, Some(10)), later), Ok(()));
    }
}
