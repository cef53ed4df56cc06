//! KeyedSemaphore of which there are so many, and so many for each who takes them.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// KeyedSemaphore for what lasts. One who takes all that he may leaves half of them to others.
#[derive(Debug)]
pub struct KeyedSemaphore<K> {
    all: usize,
    taken: Mutex<Taken<K>>,
}

#[derive(Debug)]
struct Taken<K> {
    all: usize,
    by: HashMap<K, usize>,
}

/// A place, taken for as long as this lives.
#[derive(Debug)]
pub struct KeyedPermit<K: Eq + Hash> {
    places: Arc<KeyedSemaphore<K>>,
    by: K,
}

impl<K: Copy + Eq + Hash> KeyedSemaphore<K> {
    /// So many places.
    #[must_use]
    pub fn new(all: usize) -> Self {
        Self { all, taken: Mutex::new(Taken { all: 0, by: HashMap::new() }) }
    }

    /// Takes a place for `by`; `None` if none is left, or `by` has half of them.
    pub fn take(self: &Arc<Self>, by: K) -> Option<KeyedPermit<K>> {
        let mut taken = self.taken();
        let Taken { all, by: each } = &mut *taken;
        let own = each.get(&by).copied().unwrap_or_default();
        if *all >= self.all || own >= self.all.div_ceil(2) {
            return None;
        }
        *all += 1;
        each.insert(by, own + 1);
        Some(KeyedPermit { places: Arc::clone(self), by })
    }
}

impl<K> KeyedSemaphore<K> {
    fn taken(&self) -> MutexGuard<'_, Taken<K>> {
        // No code panics while it holds this lock.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for KeyedPermit<K> {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.all -= 1;
        if let Some(own) = taken.by.get_mut(&self.by) {
            *own -= 1;
            if *own == 0 {
                taken.by.remove(&self.by);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_half_of_the_places_and_all_have_all_of_them() {
        let places = Arc::new(KeyedSemaphore::new(5));
        let of = |by: char| places.take(by);
        let first: Vec<_> = (0..3).map(|_| of('a').unwrap()).collect();
        assert!(of('a').is_none());
        let (second, third) = (of('b').unwrap(), of('c').unwrap());
        assert!(of('c').is_none(), "all are taken");
        drop(second);
        drop(first);
        assert!(of('a').is_some());
        drop(third);
        assert_eq!(places.taken().all, 0);
        assert!(places.taken().by.is_empty());
    }
}
