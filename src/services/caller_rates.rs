//! A rate for each caller: the generic cell rate algorithm, on one atomic number a caller. And places for
//! what lasts.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use papaya::HashMap;

use crate::domain::caller::CallerId;

/// How many seconds' worth of calls may come at once.
const BURST: u64 = 1_000_000_000;

/// The rates of all callers. Each may use one second's worth of its calls at once.
#[derive(Debug, Default)]
pub struct CallerRates {
    cells: HashMap<CallerId, Arc<Cell>>,
}

/// When, in nanoseconds, the calls taken so far would have been paid for.
#[derive(Debug, Default)]
struct Cell(AtomicU64);

impl CallerRates {
    /// Takes one call of `caller` at `elapsed` since any fixed moment, at `rate` calls a second.
    ///
    /// # Errors
    /// How long to wait, when the caller is beyond its rate.
    pub fn take(&self, caller: CallerId, rate: u32, elapsed: Duration) -> Result<(), Duration> {
        let cells = self.cells.pin();
        let cell = cells.get_or_insert_with(caller, Arc::default);
        cell.take(rate, u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX / 2))
    }
}

impl Cell {
    fn take(&self, rate: u32, now: u64) -> Result<(), Duration> {
        let cost = BURST / u64::from(rate.max(1));
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |paid_until| {
            let next = paid_until.max(now) + cost;
            (next - now <= BURST).then_some(next)
        });
        taken.map(drop).map_err(|paid_until| {
            Duration::from_nanos((paid_until.max(now) + cost).saturating_sub(now + BURST))
        })
    }
}

/// An address as that of one origin: of IPv6 the first 64 bits, since a host has all addresses behind
/// them.
#[must_use]
pub fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CALLER: CallerId = CallerId(1);

    #[test]
    fn a_caller_may_use_a_second_of_its_rate_at_once_and_then_waits() {
        let rates = CallerRates::default();
        let now = Duration::from_secs(5);
        for _ in 0..10 {
            rates.take(CALLER, 10, now).unwrap();
        }
        assert_eq!(rates.take(CALLER, 10, now), Err(Duration::from_millis(100)));
        assert_eq!(rates.take(CallerId(2), 10, now), Ok(()));
        assert_eq!(rates.take(CALLER, 10, now + Duration::from_millis(100)), Ok(()));
    }

    proptest! {
        #[test]
        fn no_more_than_the_rate_and_one_burst_is_ever_taken(
            rate in 1_u32..500, steps in proptest::collection::vec(0_u64..20_000_000, 1..500),
        ) {
            let rates = CallerRates::default();
            let (mut now, mut taken) = (0, 0_u64);
            for step in steps {
                now += step;
                taken += u64::from(rates.take(CALLER, rate, Duration::from_nanos(now)).is_ok());
            }
            // Rounding the cost of a call down lets one in a million through more.
            prop_assert!(taken <= u64::from(rate) + now * u64::from(rate) / BURST + 1);
        }
    }
}
