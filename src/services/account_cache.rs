//! The live token of each account, those who wait for one, and those who watch. Finding an account by
//! its name or number takes no lock; lists and loads share one.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{
        Arc, PoisonError, RwLock, RwLockWriteGuard,
        atomic::{AtomicI64, Ordering},
    },
};

use arc_swap::ArcSwap;
use papaya::HashMap;
use tokio::sync::{broadcast, watch};

use crate::domain::{
    account::{AccountId, AccountName},
    clock::Timestamp,
    refresh_state::{Account, AccountState, RefreshState},
    token::Token,
};

/// How many changes a watcher may lag behind before it must look at everything anew.
const WATCH_BACKLOG: usize = 4_096;

/// An account at one moment: what a call reads, whole.
#[derive(Clone, Debug)]
pub struct AccountSnapshot {
    /// The account.
    pub account: Account,
    /// Its attempts.
    pub progress: RefreshState,
    /// Its token, live or ended.
    pub token: Option<Arc<Token>>,
    /// Whether the account is gone.
    pub removed: bool,
}

impl AccountSnapshot {
    /// Where the account stands at `now`.
    #[must_use]
    pub fn state(&self, now: Timestamp) -> AccountState {
        AccountState::of(&self.account, self.token.as_deref(), &self.progress, now)
    }

    /// The token, if it may be served at `now`.
    #[must_use]
    pub fn live(&self, now: Timestamp) -> Option<&Arc<Token>> {
        self.token.as_ref().filter(|token| token.is_live(now))
    }
}

/// The place of one account. A name that is deleted and inserted again gets another slot.
#[derive(Debug)]
pub struct CachedAccount {
    id: AccountId,
    view: ArcSwap<AccountSnapshot>,
    changed: watch::Sender<()>,
    /// When the account was last asked for, in milliseconds since 1970; 0 for never.
    requested_ms: AtomicI64,
}

impl CachedAccount {
    /// The account's number.
    #[must_use]
    pub fn id(&self) -> AccountId {
        self.id
    }

    /// The account at this moment.
    #[must_use]
    pub fn view(&self) -> Arc<AccountSnapshot> {
        self.view.load_full()
    }

    /// Wakes whenever the view has changed. Subscribe before looking.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Notes that the account was asked for at `now`.
    pub fn note_request(&self, now: Timestamp) {
        self.requested_ms.fetch_max(now.timestamp_millis(), Ordering::Relaxed);
    }

    /// When the account was last asked for here, in milliseconds since 1970; 0 for never.
    #[must_use]
    pub fn requested_ms(&self) -> i64 {
        self.requested_ms.load(Ordering::Relaxed)
    }
}

/// All accounts.
#[derive(Debug)]
pub struct AccountCache {
    by_name: HashMap<AccountName, Arc<CachedAccount>>,
    by_id: HashMap<AccountId, Arc<CachedAccount>>,
    /// `by_name` once more, for lists. They and the loads lock it; a call for a token never does.
    in_order: RwLock<BTreeMap<AccountName, Arc<CachedAccount>>>,
    changes: broadcast::Sender<Arc<CachedAccount>>,
}

impl Default for AccountCache {
    fn default() -> Self {
        Self {
            by_name: HashMap::new(),
            by_id: HashMap::new(),
            in_order: RwLock::default(),
            changes: broadcast::Sender::new(WATCH_BACKLOG),
        }
    }
}

impl AccountCache {
    /// The account called `name`.
    #[must_use]
    pub fn named(&self, name: &AccountName) -> Option<Arc<CachedAccount>> {
        self.by_name.pin().get(name).cloned()
    }

    /// The account numbered `id`.
    #[must_use]
    pub fn numbered(&self, id: AccountId) -> Option<Arc<CachedAccount>> {
        self.by_id.pin().get(&id).cloned()
    }

    /// All accounts of this moment, in no order.
    #[must_use]
    pub fn slots(&self) -> Vec<Arc<CachedAccount>> {
        self.by_id.pin().values().cloned().collect()
    }

    /// Up to `limit` accounts from `from` on, in the order of their names.
    #[must_use]
    pub fn in_order(
        &self,
        from: Bound<&str>,
        limit: usize,
    ) -> Vec<(AccountName, Arc<CachedAccount>)> {
        let in_order = self.in_order.read().unwrap_or_else(PoisonError::into_inner);
        let stretch = in_order.range::<str, _>((from, Bound::Unbounded)).take(limit);
        stretch.map(|(name, slot)| (name.clone(), slot.clone())).collect()
    }

    /// How many accounts there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_id.pin().len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every change of an account's token, or of whether it may be used, as it happens.
    #[must_use]
    pub fn changes(&self) -> broadcast::Receiver<Arc<CachedAccount>> {
        self.changes.subscribe()
    }

    /// Puts the account as the database has it. A token that the cache has of a later generation is
    /// kept: the load was overtaken by a commit.
    ///
    /// Calls for one account must not overlap with one another: the loader makes sure.
    pub fn put(
        &self,
        account: Account,
        progress: RefreshState,
        token: Option<Token>,
    ) -> Arc<CachedAccount> {
        let by_id = self.by_id.pin();
        if let Some(slot) = by_id.get(&account.id) {
            let renamed = slot.view.load().account.name != account.name;
            if renamed {
                self.forget_name(slot);
            }
            let token = token.map(Arc::new);
            self.update(slot, |view| {
                let newer = |mine: &Arc<Token>| {
                    token.as_ref().is_none_or(|theirs| mine.generation > theirs.generation)
                };
                let token = view.token.clone().filter(newer).or_else(|| token.clone());
                AccountSnapshot {
                    account: account.clone(),
                    progress: progress.clone(),
                    token,
                    removed: false,
                }
            });
            if renamed {
                self.know_name(account.name, slot);
            }
            return slot.clone();
        }
        let name = account.name.clone();
        let slot = Arc::new(CachedAccount {
            id: account.id,
            view: ArcSwap::from_pointee(AccountSnapshot {
                account,
                progress,
                token: token.map(Arc::new),
                removed: false,
            }),
            changed: watch::Sender::new(()),
            requested_ms: AtomicI64::new(0),
        });
        by_id.insert(slot.id, slot.clone());
        self.know_name(name, &slot);
        let _ = self.changes.send(slot.clone());
        slot
    }

    /// Takes the account out: its waiters and watchers hear that it is gone.
    pub fn remove(&self, id: AccountId) {
        let by_id = self.by_id.pin();
        let Some(slot) = by_id.remove(&id) else { return };
        self.forget_name(slot);
        self.update(slot, |view| AccountSnapshot { removed: true, ..view.clone() });
    }

    /// Changes the account's view by `change`, which may run more than once, and wakes those who
    /// wait or watch.
    pub fn update(
        &self,
        slot: &Arc<CachedAccount>,
        change: impl Fn(&AccountSnapshot) -> AccountSnapshot,
    ) {
        let before = slot.view.rcu(|view| change(view));
        let after = slot.view.load();
        slot.changed.send_replace(());
        let generation = |view: &AccountSnapshot| view.token.as_ref().map(|token| token.generation);
        if generation(&before) != generation(&after)
            || before.removed != after.removed
            || before.account.enabled != after.account.enabled
        {
            // No watcher is no error.
            let _ = self.changes.send(slot.clone());
        }
    }

    /// Has the slot found under `name`.
    fn know_name(&self, name: AccountName, slot: &Arc<CachedAccount>) {
        let mut in_order = self.lock_order();
        self.by_name.pin().insert(name.clone(), slot.clone());
        in_order.insert(name, slot.clone());
    }

    /// Forgets the slot's name, unless another account has it by now.
    fn forget_name(&self, slot: &Arc<CachedAccount>) {
        let mut in_order = self.lock_order();
        let name = &slot.view.load().account.name;
        if in_order.get(name).is_some_and(|held| held.id == slot.id) {
            self.by_name.pin().remove(name);
            in_order.remove(name);
        }
    }

    /// Held while both ways to find a name are changed, so that they stay the same.
    fn lock_order(&self) -> RwLockWriteGuard<'_, BTreeMap<AccountName, Arc<CachedAccount>>> {
        self.in_order.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(id: i64, name: &str) -> Account {
        Account::example(id, name)
    }

    fn token(generation: i64) -> Token {
        Token::example(generation, 3_600)
    }

    fn generation(slot: &CachedAccount) -> Option<i64> {
        slot.view().token.as_ref().map(|token| token.generation.0)
    }

    fn names(cache: &AccountCache, from: Bound<&str>, limit: usize) -> Vec<String> {
        cache.in_order(from, limit).iter().map(|(name, _)| name.to_string()).collect()
    }

    #[test]
    fn a_load_overtaken_by_a_commit_does_not_bring_the_older_token_back() {
        let cache = AccountCache::default();
        let slot = cache.put(account(1, "acme"), RefreshState::default(), Some(token(2)));
        cache.put(account(1, "acme"), RefreshState::default(), Some(token(1)));
        assert_eq!(generation(&slot), Some(2));
        cache.put(account(1, "acme"), RefreshState::default(), Some(token(3)));
        assert_eq!(generation(&slot), Some(3));
    }

    #[test]
    fn a_name_deleted_and_inserted_again_is_another_account() {
        let cache = AccountCache::default();
        let old = cache.put(account(1, "acme"), RefreshState::default(), Some(token(1)));
        let new = cache.put(account(2, "acme"), RefreshState::default(), None);
        cache.remove(AccountId(1));
        assert!(old.view().removed);
        let found = cache.named(&"acme".parse().unwrap()).unwrap();
        assert_eq!(found.id(), new.id());
        assert_eq!(generation(&found), None);
    }

    #[test]
    fn a_renamed_account_is_found_under_its_new_name_alone() {
        let cache = AccountCache::default();
        cache.put(account(1, "acme"), RefreshState::default(), None);
        cache.put(account(1, "acme-eu"), RefreshState::default(), None);
        assert!(cache.named(&"acme".parse().unwrap()).is_none());
        assert!(cache.named(&"acme-eu".parse().unwrap()).is_some());
        assert_eq!(cache.len(), 1);
        assert_eq!(names(&cache, Bound::Unbounded, 9), ["acme-eu"]);
    }

    #[test]
    fn accounts_are_found_in_the_order_of_their_names() {
        let cache = AccountCache::default();
        for (id, name) in [(1, "c"), (2, "a"), (3, "a-1"), (4, "b"), (5, "0")] {
            cache.put(account(id, name), RefreshState::default(), None);
        }
        cache.remove(AccountId(4));
        // The name's new account, before the old one is known to be gone.
        cache.put(account(6, "c"), RefreshState::default(), None);
        cache.remove(AccountId(1));
        assert_eq!(names(&cache, Bound::Unbounded, 9), ["0", "a", "a-1", "c"]);
        assert_eq!(names(&cache, Bound::Included("a"), 2), ["a", "a-1"]);
        assert_eq!(names(&cache, Bound::Excluded("a"), 9), ["a-1", "c"]);
        assert_eq!(names(&cache, Bound::Excluded("c"), 9), [""; 0]);
        assert_eq!(cache.in_order(Bound::Included("c"), 1)[0].1.id(), AccountId(6));
    }

    #[tokio::test]
    async fn watchers_hear_of_a_new_token_and_of_the_end_but_not_of_attempts() {
        let cache = AccountCache::default();
        let slot = cache.put(account(1, "acme"), RefreshState::default(), None);
        let mut changes = cache.changes();
        let attempted = RefreshState { failures: 1, ..RefreshState::default() };
        cache.put(account(1, "acme"), attempted, None);
        assert!(changes.try_recv().is_err());
        cache.put(account(1, "acme"), RefreshState::default(), Some(token(1)));
        assert_eq!(changes.try_recv().unwrap().id(), slot.id());
        cache.remove(slot.id());
        assert!(changes.try_recv().unwrap().view().removed);
    }
}
