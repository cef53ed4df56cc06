//! A semaphore with a total limit and a limit per key.

use std::{collections::HashMap, hash::Hash, sync::Arc};

use parking_lot::Mutex;

/// A semaphore of which each key can hold at most half of the permits (rounded up), so that one caller
/// cannot take them all. Acquiring never waits.
#[derive(Debug)]
pub struct KeyedSemaphore<K> {
    limit: usize,
    held: Mutex<HeldPermits<K>>,
}

#[derive(Debug)]
struct HeldPermits<K> {
    total: usize,
    /// Only keys that hold a permit.
    by_key: HashMap<K, usize>,
}

/// A permit of a [`KeyedSemaphore`], returned when dropped.
#[derive(Debug)]
#[must_use = "dropping the permit returns it at once"]
pub struct KeyedPermit<K: Eq + Hash> {
    semaphore: Arc<KeyedSemaphore<K>>,
    key: K,
    count: usize,
}

impl<K: Copy + Eq + Hash> KeyedSemaphore<K> {
    /// Returns a semaphore with `limit` permits.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, held: Mutex::new(HeldPermits { total: 0, by_key: HashMap::new() }) }
    }

    /// Takes a permit for `key`. Returns `None` if no permit is left, or `key` holds half of them already.
    #[must_use = "dropping the permit returns it at once"]
    pub fn try_acquire(self: &Arc<Self>, key: K) -> Option<KeyedPermit<K>> {
        self.try_acquire_many(key, 1)
    }

    /// Takes `count` permits for `key` as one. Returns `None` if fewer are left, or `key` would hold more
    /// than half of them.
    #[must_use = "dropping the permit returns all of them at once"]
    pub fn try_acquire_many(self: &Arc<Self>, key: K, count: usize) -> Option<KeyedPermit<K>> {
        let mut held = self.held.lock();
        let of_key = held.by_key.get(&key).copied().unwrap_or_default();
        if held.total + count > self.limit || of_key + count > self.limit.div_ceil(2) {
            return None;
        }
        held.total += count;
        held.by_key.insert(key, of_key + count);
        Some(KeyedPermit { semaphore: Arc::clone(self), key, count })
    }
}

impl<K: Eq + Hash> Drop for KeyedPermit<K> {
    fn drop(&mut self) {
        let mut held = self.semaphore.held.lock();
        held.total -= self.count;
        if let Some(of_key) = held.by_key.get_mut(&self.key) {
            *of_key -= self.count;
            if *of_key == 0 {
                held.by_key.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_can_hold_half_of_the_permits_and_all_keys_together_all_of_them() {
        let semaphore = Arc::new(KeyedSemaphore::new(5));
        let acquire = |key: char| semaphore.try_acquire(key);
        let first: Vec<_> = (0..3).map(|_| acquire('a').unwrap()).collect();
        assert!(acquire('a').is_none());
        let (second, third) = (acquire('b').unwrap(), acquire('c').unwrap());
        assert!(acquire('c').is_none(), "all permits are held");
        drop(second);
        drop(first);
        assert!(acquire('a').is_some());
        assert!(semaphore.try_acquire_many('a', 4).is_none());
        assert!(semaphore.try_acquire_many('a', 3).is_some());
        drop(third);
        assert_eq!(semaphore.held.lock().total, 0);
        assert!(semaphore.held.lock().by_key.is_empty());
    }
}
