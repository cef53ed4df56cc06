//! Counts the open connections, and limits those of each address.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tracing::warn;

use crate::services::client_network::network_of;

/// The shortest time between two warnings that an address has too many connections.
const WARNING_INTERVAL: Duration = Duration::from_mins(1);

/// The open connections by address. The addresses of one IPv6 /64 count as one.
#[derive(Debug)]
pub struct ConnectionLimiter {
    by_address: Mutex<HashMap<IpAddr, usize>>,
    total: watch::Sender<usize>,
    /// The number of connections accepted so far. Each connection's number determines its maximum age.
    accepted: AtomicU32,
    last_warning: Mutex<Option<Instant>>,
}

/// Counts a connection as open until it is dropped.
#[must_use]
pub(super) struct ConnectionPermit {
    limiter: Arc<ConnectionLimiter>,
    address: IpAddr,
    number: u32,
}

impl Default for ConnectionLimiter {
    fn default() -> Self {
        Self {
            by_address: Mutex::default(),
            total: watch::Sender::new(0),
            accepted: AtomicU32::new(0),
            last_warning: Mutex::default(),
        }
    }
}

impl ConnectionLimiter {
    /// Counts a connection from `address`. Returns `None` if the address has `max` already.
    pub(super) fn try_acquire(
        self: &Arc<Self>,
        address: IpAddr,
        max: usize,
    ) -> Option<ConnectionPermit> {
        let address = network_of(address);
        let mut by_address = self.by_address.lock();
        let count = by_address.entry(address).or_default();
        if *count >= max {
            return None;
        }
        *count += 1;
        self.total.send_modify(|total| *total += 1);
        let number = self.accepted.fetch_add(1, Ordering::Relaxed);
        Some(ConnectionPermit { limiter: Arc::clone(self), address, number })
    }

    /// Warns that `address` has as many connections as it may have. Logs at most one such warning a minute,
    /// for all addresses together.
    pub(super) fn warn_of_too_many(&self, address: IpAddr, max: usize) {
        let now = Instant::now();
        let mut last_warning = self.last_warning.lock();
        if last_warning.is_none_or(|at| now - at >= WARNING_INTERVAL) {
            *last_warning = Some(now);
            warn!(%address, max, "an address has as many connections as it may: more are closed");
        }
    }

    /// Returns once no connection is open. Cancel safe.
    pub async fn until_none(&self) {
        // The wait fails only if the sender is dropped, and `self` owns it.
        let _ = self.total.subscribe().wait_for(|total| *total == 0).await;
    }
}

impl ConnectionPermit {
    /// Returns `limit` reduced by up to a quarter. Connections that follow each other get different results.
    #[must_use]
    pub(super) fn jittered(&self, limit: Duration) -> Duration {
        // Knuth's multiplicative hash maps consecutive numbers to values that are far apart.
        let spread = f64::from(self.number.wrapping_mul(2_654_435_769)) / f64::from(u32::MAX);
        limit.mul_f64(1.0 - spread / 4.0)
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut by_address = self.limiter.by_address.lock();
        if let Some(count) = by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&self.address);
            }
        }
        self.limiter.total.send_modify(|total| *total -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_has_its_maximum_of_connections_and_others_are_not_affected() {
        let limiter = Arc::new(ConnectionLimiter::default());
        let (one, other): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let first = limiter.try_acquire(one, 2).unwrap();
        let second = limiter.try_acquire("::ffff:10.0.0.1".parse().unwrap(), 2).unwrap();
        assert!(limiter.try_acquire(one, 2).is_none());
        let third = limiter.try_acquire(other, 2).unwrap();
        drop(first);
        assert!(limiter.try_acquire(one, 2).is_some());
        drop((second, third));
        limiter.until_none().await;
        assert!(limiter.by_address.lock().is_empty());
    }

    #[test]
    fn connections_opened_together_have_different_maximum_ages() {
        let limiter = Arc::new(ConnectionLimiter::default());
        let limit = Duration::from_mins(30);
        let mut ages: Vec<_> = (0..100)
            .map(|_| limiter.try_acquire([10, 0, 0, 1].into(), 100).unwrap())
            .map(|permit| permit.jittered(limit))
            .collect();
        assert!(ages.iter().all(|age| (limit * 3 / 4..=limit).contains(age)));
        ages.sort_unstable();
        ages.dedup_by_key(|age| age.as_secs() / 10);
        assert!(ages.len() > 30, "{}", ages.len());
    }
}
