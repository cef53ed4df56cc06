//! The in-memory cache of all accounts with their tokens. A call can wait for a change of one account, and
//! a watch stream follows the changes of all.
//!
//! Looking up an account by its name or id takes no lock. Lists and loads take a common one.

pub mod scan;
mod snapshot;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

use arc_swap::ArcSwap;
use papaya::HashMap;
use parking_lot::{RwLock, RwLockWriteGuard};
pub use snapshot::AccountSnapshot;
use tokio::sync::{broadcast, watch};

use crate::domain::{
    account::{AccountId, AccountName},
    clock::Timestamp,
    refresh_state::{Account, RefreshState},
    token::Token,
};

/// How many changes a watch stream may lag behind before it must read all accounts again.
const WATCH_BACKLOG: usize = 4_096;

/// The cache's entry for one account. If an account is deleted and another one is inserted with the same
/// name, the new one has an entry of its own.
#[derive(Debug)]
pub struct CachedAccount {
    id: AccountId,
    snapshot: ArcSwap<AccountSnapshot>,
    changed: watch::Sender<()>,
    /// When the account was last requested, in milliseconds since 1970; 0 for never.
    requested_ms: AtomicI64,
}

impl CachedAccount {
    /// Returns the account's id.
    #[must_use]
    pub fn id(&self) -> AccountId {
        self.id
    }

    /// Returns the account's present snapshot.
    #[must_use]
    pub fn snapshot(&self) -> Arc<AccountSnapshot> {
        self.snapshot.load_full()
    }

    /// Returns a receiver that wakes at each change of the snapshot. Subscribe before reading
    /// [`CachedAccount::snapshot`], so that no change is missed in between.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Stores that a caller requested the account's token at `now`.
    pub fn note_request(&self, now: Timestamp) {
        self.requested_ms.fetch_max(now.timestamp_millis(), Ordering::Relaxed);
    }

    /// Returns when a caller of this replica last requested the account's token, in milliseconds
    /// since 1970; 0 for never.
    #[must_use]
    pub fn requested_ms(&self) -> i64 {
        self.requested_ms.load(Ordering::Relaxed)
    }
}

/// All accounts, found by name, by id, and in the order of their names.
#[derive(Debug)]
pub struct AccountCache {
    by_name: HashMap<AccountName, Arc<CachedAccount>>,
    by_id: HashMap<AccountId, Arc<CachedAccount>>,
    /// The entries of `by_name` in order, for lists. Lists and loads lock it; a request for a token
    /// never does.
    ordered: RwLock<BTreeMap<AccountName, Arc<CachedAccount>>>,
    changes: broadcast::Sender<Arc<CachedAccount>>,
}

impl Default for AccountCache {
    fn default() -> Self {
        Self {
            by_name: HashMap::new(),
            by_id: HashMap::new(),
            ordered: RwLock::default(),
            changes: broadcast::Sender::new(WATCH_BACKLOG),
        }
    }
}

impl AccountCache {
    /// Returns the account called `name`.
    #[must_use]
    pub fn by_name(&self, name: &AccountName) -> Option<Arc<CachedAccount>> {
        self.by_name.pin().get(name).cloned()
    }

    /// Returns the account with this id.
    #[must_use]
    pub fn by_id(&self, id: AccountId) -> Option<Arc<CachedAccount>> {
        self.by_id.pin().get(&id).cloned()
    }

    /// Returns all accounts, in no particular order.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<CachedAccount>> {
        self.by_id.pin().values().cloned().collect()
    }

    /// Returns the number of accounts.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_id.pin().len()
    }

    /// Returns whether there are no accounts.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns a receiver of every account whose token was replaced, or that was added, removed,
    /// enabled or disabled. It reports `Lagged` when it falls more than 4096 changes behind.
    #[must_use]
    pub fn changes(&self) -> broadcast::Receiver<Arc<CachedAccount>> {
        self.changes.subscribe()
    }

    /// Inserts an account that was read from the database, or updates its entry. A cached token of a later
    /// generation is kept, since it was committed after the account was read, unless it is of an earlier login.
    ///
    /// Calls for one account must not overlap: [`AccountLoader`](super::account_loader::AccountLoader)
    /// ensures that.
    pub fn put(
        &self,
        account: Account,
        refresh: RefreshState,
        token: Option<Token>,
    ) -> Arc<CachedAccount> {
        let by_id = self.by_id.pin();
        if let Some(entry) = by_id.get(&account.id) {
            let renamed = entry.snapshot.load().account.name != account.name;
            if renamed {
                self.remove_name(entry);
            }
            let token = token.map(Arc::new);
            self.update(entry, |before| {
                let is_newer = |cached: &Arc<Token>| {
                    account.has_login_of(cached.credential_version)
                        && token.as_ref().is_none_or(|loaded| cached.generation > loaded.generation)
                };
                AccountSnapshot {
                    account: account.clone(),
                    refresh: refresh.clone(),
                    token: before.token.clone().filter(is_newer).or_else(|| token.clone()),
                    removed: false,
                }
            });
            if renamed {
                self.insert_name(account.name, entry);
            }
            return entry.clone();
        }
        let name = account.name.clone();
        let entry = Arc::new(CachedAccount {
            id: account.id,
            snapshot: ArcSwap::from_pointee(AccountSnapshot {
                account,
                refresh,
                token: token.map(Arc::new),
                removed: false,
            }),
            changed: watch::Sender::new(()),
            requested_ms: AtomicI64::new(0),
        });
        by_id.insert(entry.id, entry.clone());
        self.insert_name(name, &entry);
        let _ = self.changes.send(entry.clone());
        entry
    }

    /// Removes the account, and wakes the calls that wait for it and the streams that watch it. Its last
    /// snapshot is marked as removed.
    pub fn remove(&self, id: AccountId) {
        let by_id = self.by_id.pin();
        let Some(entry) = by_id.remove(&id) else { return };
        self.remove_name(entry);
        self.update(entry, |before| AccountSnapshot { removed: true, ..before.clone() });
    }

    /// Replaces the account's snapshot by the one that `change` returns for it, and wakes the calls that
    /// wait for a change. Watch streams are notified if the token was replaced, or the account was removed,
    /// enabled or disabled. `change` may run more than once.
    pub fn update(
        &self,
        entry: &Arc<CachedAccount>,
        change: impl Fn(&AccountSnapshot) -> AccountSnapshot,
    ) {
        let before = entry.snapshot.rcu(|snapshot| change(snapshot));
        let after = entry.snapshot.load();
        entry.changed.send_replace(());
        let generation =
            |snapshot: &AccountSnapshot| snapshot.token.as_ref().map(|token| token.generation);
        if generation(&before) != generation(&after)
            || before.removed != after.removed
            || before.account.enabled != after.account.enabled
        {
            // Sending fails if there are no watch streams.
            let _ = self.changes.send(entry.clone());
        }
    }

    fn insert_name(&self, name: AccountName, entry: &Arc<CachedAccount>) {
        let mut ordered = self.lock_names();
        self.by_name.pin().insert(name.clone(), entry.clone());
        ordered.insert(name, entry.clone());
    }

    /// Removes the entry's name, unless another account has this name by now.
    fn remove_name(&self, entry: &Arc<CachedAccount>) {
        let mut ordered = self.lock_names();
        let name = &entry.snapshot.load().account.name;
        if ordered.get(name).is_some_and(|named| named.id == entry.id) {
            self.by_name.pin().remove(name);
            ordered.remove(name);
        }
    }

    /// Locks the names. Hold the guard while changing `by_name` and `ordered`, so that both have the same
    /// names.
    fn lock_names(&self) -> RwLockWriteGuard<'_, BTreeMap<AccountName, Arc<CachedAccount>>> {
        self.ordered.write()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::account::CredentialVersion;

    fn account(id: i64, name: &str) -> Account {
        Account::example(id, name)
    }

    fn token(generation: i64) -> Token {
        Token::example(generation, 3_600)
    }

    fn moved_to_another_login(id: i64, name: &str) -> Account {
        let version = CredentialVersion(2);
        Account { credential_version: version, login_version: version, ..account(id, name) }
    }

    fn generation(entry: &CachedAccount) -> Option<i64> {
        entry.snapshot().token.as_ref().map(|token| token.generation.0)
    }

    fn names(cache: &AccountCache) -> Vec<String> {
        cache.ordered.read().keys().map(ToString::to_string).collect()
    }

    #[test]
    fn a_load_does_not_replace_a_token_that_was_committed_after_its_read() {
        let cache = AccountCache::default();
        let entry = cache.put(account(1, "acme"), RefreshState::default(), Some(token(2)));
        cache.put(account(1, "acme"), RefreshState::default(), Some(token(1)));
        assert_eq!(generation(&entry), Some(2));
        cache.put(account(1, "acme"), RefreshState::default(), Some(token(3)));
        assert_eq!(generation(&entry), Some(3));
    }

    #[test]
    fn a_load_takes_the_token_of_another_login_away_whatever_its_generation() {
        for loaded in [None, Some(Token { credential_version: CredentialVersion(2), ..token(3) })] {
            let cache = AccountCache::default();
            let entry = cache.put(account(1, "acme"), RefreshState::default(), Some(token(7)));
            let mut changes = cache.changes();
            let expected = loaded.as_ref().map(|token| token.generation.0);
            cache.put(moved_to_another_login(1, "acme"), RefreshState::default(), loaded);
            assert_eq!(generation(&entry), expected);
            assert_eq!(changes.try_recv().unwrap().id(), entry.id());
        }
    }

    #[test]
    fn a_name_that_was_deleted_and_inserted_again_is_another_account() {
        let cache = AccountCache::default();
        let old = cache.put(account(1, "acme"), RefreshState::default(), Some(token(1)));
        let new = cache.put(account(2, "acme"), RefreshState::default(), None);
        cache.remove(AccountId(1));
        assert!(old.snapshot().removed);
        let found = cache.by_name(&"acme".parse().unwrap()).unwrap();
        assert_eq!(found.id(), new.id());
        assert_eq!(generation(&found), None);
    }

    #[test]
    fn a_renamed_account_is_found_under_its_new_name_only() {
        let cache = AccountCache::default();
        cache.put(account(1, "acme"), RefreshState::default(), None);
        cache.put(account(1, "acme-eu"), RefreshState::default(), None);
        assert!(cache.by_name(&"acme".parse().unwrap()).is_none());
        assert!(cache.by_name(&"acme-eu".parse().unwrap()).is_some());
        assert_eq!(cache.len(), 1);
        assert_eq!(names(&cache), ["acme-eu"]);
    }

    #[test]
    fn accounts_are_found_in_the_order_of_their_names() {
        let cache = AccountCache::default();
        for (id, name) in [(1, "c"), (2, "a"), (3, "a-1"), (4, "b"), (5, "0")] {
            cache.put(account(id, name), RefreshState::default(), None);
        }
        cache.remove(AccountId(4));
        // The new account called `c` is loaded before the old one is removed.
        cache.put(account(6, "c"), RefreshState::default(), None);
        cache.remove(AccountId(1));
        assert_eq!(names(&cache), ["0", "a", "a-1", "c"]);
        assert_eq!(cache.ordered.read()["c"].id(), AccountId(6));
    }

    #[tokio::test]
    async fn watch_streams_are_notified_of_new_tokens_and_removals_but_not_of_attempts() {
        let cache = AccountCache::default();
        let entry = cache.put(account(1, "acme"), RefreshState::default(), None);
        let mut changes = cache.changes();
        let attempted = RefreshState { consecutive_failures: 1, ..RefreshState::default() };
        cache.put(account(1, "acme"), attempted, None);
        assert!(changes.try_recv().is_err());
        cache.put(account(1, "acme"), RefreshState::default(), Some(token(1)));
        assert_eq!(changes.try_recv().unwrap().id(), entry.id());
        cache.remove(entry.id());
        assert!(changes.try_recv().unwrap().snapshot().removed);
    }
}
