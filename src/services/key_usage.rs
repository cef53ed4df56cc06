//! Which keys a replica has, and which it needs, for its heartbeat and for the decision whether a changed keyring can
//! be used.

use std::{collections::BTreeSet, sync::Arc};

use super::{account_cache::AccountCache, refresher::PendingTokens};
use crate::crypto::{KeyId, Keyring, LiveKeyring};

/// The keyring in use, with the accounts and pending tokens that are sealed with its keys.
#[derive(Clone, Debug)]
pub struct KeyUsage {
    /// The keyring in use.
    pub keyring: Arc<LiveKeyring>,
    /// The loaded accounts. Without the database, a sole replica issues with the secrets that they hold.
    pub cache: Arc<AccountCache>,
    /// Tokens that are sealed and not stored yet.
    pub pending: Arc<PendingTokens>,
}

impl KeyUsage {
    /// Returns the ids of the keys that are loaded and not retired.
    #[must_use]
    pub fn loaded(&self) -> Vec<String> {
        self.keyring.current().key_ids().iter().map(ToString::to_string).collect()
    }

    /// Returns the ids of the keys that this replica may still make values with, or needs for loaded secrets and pending
    /// tokens. Another key can be retired as far as this replica is concerned.
    #[must_use]
    pub fn used(&self) -> Vec<String> {
        let mut used = self.keyring.primaries_in_use();
        // As long as there is no second sealing key, everything is sealed with the primary one.
        if !self.keyring.current().has_one_sealing_key() {
            used.extend(self.of_values());
        }
        used.iter().map(ToString::to_string).collect()
    }

    /// Returns a key that loaded secrets or pending tokens need and `next` lacks, if the present keyring has it.
    #[must_use]
    pub fn missing_in(&self, next: &Keyring) -> Option<KeyId> {
        let current = self.keyring.current();
        let is_missing = |id: &KeyId| !next.has_sealing_key(id) && current.has_sealing_key(id);
        if current.key_ids().iter().all(|id| !is_missing(id)) {
            return None;
        }
        self.of_values().into_iter().find(is_missing)
    }

    /// Returns the ids of the keys that the secrets of loaded accounts and the pending tokens are sealed with.
    fn of_values(&self) -> BTreeSet<KeyId> {
        let mut ids = self.pending.sealing_keys();
        for entry in self.cache.all() {
            let account = &entry.snapshot().account;
            let secrets = account.secret.iter().chain(account.previous.iter().map(|it| &it.secret));
            ids.extend(secrets.filter_map(|secret| Keyring::sealed_with(secret.bytes()).ok()));
        }
        ids
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::{crypto::KeyKind, domain::account::AccountId};

    #[test]
    fn the_key_of_a_pending_token_is_missing_in_a_keyring_without_it() {
        let keyring = || Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap();
        let (current, other) = (Arc::new(keyring()), keyring());
        let pending = Arc::new(PendingTokens::without_log());
        let keys = KeyUsage {
            keyring: Arc::new(LiveKeyring::new(current.clone())),
            cache: Arc::default(),
            pending: pending.clone(),
        };
        assert_eq!(keys.missing_in(&other), None);
        pending.add_sealed(AccountId(1), &current);
        let expected = current.primary(KeyKind::Sealing).clone();
        assert_eq!(keys.missing_in(&other), Some(expected));
        assert_eq!(keys.missing_in(&current), None);
    }
}
