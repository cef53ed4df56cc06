//! The keyring in use, which is replaced while the broker runs.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Weak},
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::{key::KeyId, keyring::Keyring};

/// The keyring in use. Who seals a value takes [`LiveKeyring::current`], and keeps it until the value is stored: so
/// it is known which keys new values may still be sealed with.
pub struct LiveKeyring {
    current: ArcSwap<Keyring>,
    /// The keyrings before the present one, as long as somebody has them.
    earlier: Mutex<Vec<Weak<Keyring>>>,
}

impl LiveKeyring {
    /// Returns a holder of `keyring`.
    #[must_use]
    pub fn new(keyring: Arc<Keyring>) -> Self {
        Self { current: ArcSwap::new(keyring), earlier: Mutex::default() }
    }

    /// Returns the present keyring.
    #[must_use]
    pub fn current(&self) -> Arc<Keyring> {
        self.current.load_full()
    }

    /// Replaces the keyring. Who has the earlier one goes on with it.
    pub fn replace(&self, next: Arc<Keyring>) {
        let mut earlier = self.earlier.lock();
        earlier.retain(|keyring| keyring.strong_count() > 0);
        earlier.push(Arc::downgrade(&self.current.load_full()));
        self.current.store(next);
    }

    /// Returns the ids of the primary keys of this keyring, and of earlier ones that somebody may still use.
    #[must_use]
    pub fn primaries_in_use(&self) -> BTreeSet<KeyId> {
        let mut ids = self.current().primaries();
        let mut earlier = self.earlier.lock();
        earlier.retain(|keyring| {
            let used = keyring.upgrade();
            ids.extend(used.iter().flat_map(|keyring| keyring.primaries()));
            used.is_some()
        });
        ids
    }
}

impl fmt::Debug for LiveKeyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.current().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    #[test]
    fn a_replaced_keyring_counts_as_used_until_whoever_seals_with_it_is_done() {
        let [first, second] =
            [(); 2].map(|()| Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap());
        let (old, new) = (first.primaries(), second.primaries());
        let live = LiveKeyring::new(first.into());
        let sealing = live.current();
        live.replace(second.into());
        assert_eq!(live.current().primaries(), new);
        assert_eq!(live.primaries_in_use(), &old | &new);
        drop(sealing);
        assert_eq!(live.primaries_in_use(), new);
    }
}
