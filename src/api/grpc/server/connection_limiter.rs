//! Who is connected: how many, and from where.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::Instant};
use tracing::warn;

use crate::services::client_network::network_of;

/// How often it is said at most that an address has too many connections.
const WARN_AGAIN: Duration = Duration::from_mins(1);

/// The connections that are there.
#[derive(Debug)]
pub struct ConnectionLimiter {
    from: Mutex<HashMap<IpAddr, usize>>,
    all: watch::Sender<usize>,
    /// Counts those that came, for their jitter.
    came: AtomicU32,
    /// When it was last said that an address has too many.
    warned: Mutex<Option<Instant>>,
}

/// A connection that is there while this lives.
pub(super) struct ConnectionPermit {
    guests: Arc<ConnectionLimiter>,
    address: IpAddr,
    number: u32,
}

impl Default for ConnectionLimiter {
    fn default() -> Self {
        Self {
            from: Mutex::default(),
            all: watch::Sender::new(0),
            came: AtomicU32::new(0),
            warned: Mutex::default(),
        }
    }
}

impl ConnectionLimiter {
    /// Counts a connection from `address`; `None` if it has `most` already.
    pub(super) fn welcome(
        self: &Arc<Self>,
        address: IpAddr,
        most: usize,
    ) -> Option<ConnectionPermit> {
        let address = network_of(address);
        let mut from = self.from();
        let count = from.entry(address).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        self.all.send_modify(|all| *all += 1);
        let number = self.came.fetch_add(1, Ordering::Relaxed);
        Some(ConnectionPermit { guests: Arc::clone(self), address, number })
    }

    /// Says, once a minute at most, that `address` has all the connections that it may have.
    pub(super) fn warn_of_too_many(&self, address: IpAddr, most: usize) {
        let now = Instant::now();
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| now - at >= WARN_AGAIN) {
            *warned = Some(now);
            warn!(%address, most, "an address has as many connections as it may: more are closed");
        }
    }

    /// Returns once nobody is connected.
    pub async fn gone(&self) {
        // The sender lives in this, so the wait cannot fail.
        let _ = self.all.subscribe().wait_for(|all| *all == 0).await;
    }

    fn from(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // No code panics while it holds this lock.
        self.from.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionPermit {
    /// How old this connection may become, at most `limit` and up to a quarter less.
    pub(super) fn age(&self, limit: Duration) -> Duration {
        // Knuth's multiplicative hash: numbers that follow each other lie far apart.
        let spread = f64::from(self.number.wrapping_mul(2_654_435_769)) / f64::from(u32::MAX);
        limit.mul_f64(1.0 - spread / 4.0)
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut from = self.guests.from();
        if let Some(count) = from.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                from.remove(&self.address);
            }
        }
        self.guests.all.send_modify(|all| *all -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_has_so_many_and_leaves_room_for_others() {
        let guests = Arc::new(ConnectionLimiter::default());
        let (one, other): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let first = guests.welcome(one, 2).unwrap();
        let second = guests.welcome("::ffff:10.0.0.1".parse().unwrap(), 2).unwrap();
        assert!(guests.welcome(one, 2).is_none());
        let third = guests.welcome(other, 2).unwrap();
        drop(first);
        assert!(guests.welcome(one, 2).is_some());
        drop((second, third));
        guests.gone().await;
        assert!(guests.from().is_empty());
    }

    #[test]
    fn connections_of_one_moment_end_at_many() {
        let guests = Arc::new(ConnectionLimiter::default());
        let limit = Duration::from_mins(30);
        let mut ages: Vec<_> = (0..100)
            .map(|_| guests.welcome([10, 0, 0, 1].into(), 100).unwrap())
            .map(|guest| guest.age(limit))
            .collect();
        assert!(ages.iter().all(|age| (limit * 3 / 4..=limit).contains(age)));
        ages.sort_unstable();
        ages.dedup_by_key(|age| age.as_secs() / 10);
        assert!(ages.len() > 30, "{}", ages.len());
    }
}
