//! The rate limit of each caller: of its calls, of the tokens that its streams push, and of the accounts that
//! are looked at for its lists and streams.

use std::{sync::Arc, time::Duration};

use papaya::HashMap;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::Instant,
};

use super::gcra::{Gcra, Quota};
use crate::domain::caller::{Caller, CallerId};

/// How many names, patterns or accounts cost as much as one call.
const ITEMS_A_CALL: u64 = 100;
/// How long a caller waits at most because of the work of earlier calls.
const LONGEST_DEBT: Duration = Duration::from_secs(10);
/// How many of a caller's lists and streams may look through accounts at the same time; others of the same
/// caller wait. So other callers do not wait for all of them.
const SCANS: usize = 2;

/// Limits the calls of each caller. A caller may make one second's worth of its calls at once.
///
/// The limit is per replica. An entry (about 200 bytes) is kept for each caller that ever called this
/// process; callers are few, since an admin registers each.
#[derive(Debug)]
pub struct CallerRates {
    default_rate: u32,
    epoch: Instant,
    callers: HashMap<CallerId, Arc<Budget>>,
}

/// What one caller has used.
#[derive(Debug)]
pub struct Budget {
    used: Gcra,
    scans: Semaphore,
    pushes: Semaphore,
}

impl Default for Budget {
    fn default() -> Self {
        Self { used: Gcra::default(), scans: Semaphore::new(SCANS), pushes: Semaphore::new(1) }
    }
}

impl Budget {
    /// Waits for a permit to look through some accounts. Hold it only for that, since others of the same
    /// caller wait for it. Cancel safe.
    pub async fn scan_permit(&self) -> Option<SemaphorePermit<'_>> {
        // This fails only for a closed semaphore, and this one is never closed.
        self.scans.acquire().await.ok()
    }

    /// Waits for the caller's turn to push a token. Of all streams of the caller, only the one that has the turn
    /// waits for the rate; otherwise all would wake whenever it permits one token. Streams get the turn in the
    /// order in which they asked for it. Cancel safe, but loses the place in that order.
    pub async fn push_turn(&self) -> Option<SemaphorePermit<'_>> {
        // This fails only for a closed semaphore, and this one is never closed.
        self.pushes.acquire().await.ok()
    }
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
        let callers = self.callers.pin();
        let budget = callers.get_or_insert_with(caller.id, Arc::default);
        budget.used.take(self.quota(caller), now.saturating_duration_since(self.epoch))
    }

    /// Counts one token that a stream pushes to `caller` at `now`. Half of what may come at once is left for
    /// calls, so that a stream with many accounts does not make its caller's calls fail.
    ///
    /// # Errors
    /// How long to wait before the token may be pushed.
    pub fn take_push(&self, caller: &Caller, now: Instant) -> Result<(), Duration> {
        let now = now.saturating_duration_since(self.epoch);
        self.budget(caller).used.take_low_priority(self.quota(caller), now)
    }

    /// Counts work beside the call itself: `items` names, patterns or accounts that were looked at for
    /// `caller`. A hundred cost as much as a call. The caller's next calls wait for it, for 10 seconds at
    /// most.
    pub fn charge(&self, caller: &Caller, items: usize, now: Instant) {
        let share = (u64::try_from(items).unwrap_or(u64::MAX), ITEMS_A_CALL);
        let now = now.saturating_duration_since(self.epoch);
        self.budget(caller).used.charge(share, self.quota(caller), now, LONGEST_DEBT);
    }

    /// Returns what `caller` has used.
    #[must_use]
    pub fn budget(&self, caller: &Caller) -> Arc<Budget> {
        self.callers.pin().get_or_insert_with(caller.id, Arc::default).clone()
    }

    fn quota(&self, caller: &Caller) -> Quota {
        Quota::per_second(caller.rate_limit.unwrap_or(self.default_rate))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

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
    fn pushed_tokens_and_accounts_that_were_looked_at_use_the_same_rate_as_calls() {
        let rates = CallerRates::new(10);
        let caller = caller(1, None);
        let now = rates.epoch;
        let pushes = (0..100).filter(|_| rates.take_push(&caller, now).is_ok()).count();
        let calls = (0..100).filter(|_| rates.take(&caller, now).is_ok()).count();
        assert_eq!((pushes, calls), (5, 5));
        let later = now + Duration::from_secs(1);
        rates.charge(&caller, 500, later);
        assert_eq!((0..100).filter(|_| rates.take(&caller, later).is_ok()).count(), 5);
        rates.charge(&caller, 99, later + Duration::from_secs(1));
        assert_eq!(rates.take_push(&caller, later + Duration::from_secs(1)), Ok(()));
    }

    #[tokio::test]
    async fn streams_of_a_caller_get_the_turn_to_push_in_the_order_in_which_they_asked() {
        let budget = Budget::default();
        let held = budget.push_turn().await;
        let (mut second, mut third) = (Box::pin(budget.push_turn()), Box::pin(budget.push_turn()));
        assert!(second.as_mut().now_or_never().is_none());
        assert!(third.as_mut().now_or_never().is_none());
        drop(held);
        assert!(third.as_mut().now_or_never().is_none());
        let held = second.as_mut().now_or_never().unwrap();
        assert!(third.as_mut().now_or_never().is_none());
        drop(held);
        assert!(third.as_mut().now_or_never().is_some());
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
