//! Tokens that were issued but are not stored yet, because the database did not answer or a row was locked.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::Notify, task};
use tracing::error;

use super::intent_log::IntentLog;
use crate::{
    crypto::{KeyId, Keyring},
    domain::account::AccountId,
    files::state_dir::StateDir,
    store::tokens::PendingToken,
};

/// What was issued for one account and is not stored in the database yet.
#[derive(Clone, Debug, Default)]
pub(super) struct PendingIssue {
    /// The last token that was issued.
    pub(super) token: Option<PendingToken>,
    /// Whether a later attempt may have issued another token, which was lost.
    pub(super) possibly_revoked: bool,
}

impl PendingIssue {
    fn is_same(&self, other: &Self) -> bool {
        let generation = |issue: &Self| issue.token.as_ref().map(|orphan| orphan.token.generation);
        generation(self) == generation(other) && self.possibly_revoked == other.possibly_revoked
    }
}

/// The pending tokens of all accounts, and the log on disk that survives this process.
#[derive(Debug)]
pub struct PendingTokens {
    state: Mutex<State>,
    /// Lists the accounts for which tokens were, or may have been, issued without a lease. It is cleared once
    /// nothing is pending. If this process ends before, those tokens are lost, but they may have ended the
    /// stored ones. `None` if the upstream keeps older tokens alive.
    ///
    /// Lock order: before `state`. It is locked only on the blocking pool.
    log: Option<Arc<Mutex<IntentLog>>>,
    /// Notified when something becomes pending.
    added: Notify,
}

#[derive(Debug, Default)]
struct State {
    pending: BTreeMap<AccountId, PendingIssue>,
    /// The accounts with an attempt under way that is in the log.
    under_way: BTreeSet<AccountId>,
}

impl PendingTokens {
    /// Returns an empty collection. `new_token_ends_older` says whether the upstream ends older tokens
    /// when it issues a new one.
    #[must_use]
    pub fn new(state_dir: &StateDir, new_token_ends_older: bool) -> Self {
        let log = new_token_ends_older
            .then(|| Arc::new(Mutex::new(IntentLog::new(state_dir.intent_log_file()))));
        Self { state: Mutex::default(), log, added: Notify::new() }
    }

    /// Returns the accounts for which an earlier process issued, or may have issued, tokens that it
    /// could not store. Their stored tokens are possibly revoked.
    ///
    /// # Errors
    /// When the state directory cannot be read.
    pub async fn of_earlier_process(&self) -> io::Result<Vec<AccountId>> {
        self.with_log(|log| log.read()).await.unwrap_or(Ok(vec![]))
    }

    /// Clears the accounts of [`PendingTokens::of_earlier_process`]. Call it after their stored tokens were
    /// marked as possibly revoked.
    ///
    /// # Errors
    /// When the state directory cannot be written.
    pub async fn forget_earlier_process(&self) -> io::Result<()> {
        self.with_log(IntentLog::clear).await.unwrap_or(Ok(()))
    }

    /// Writes to disk that a token may be issued for the account. Each success must be followed by one of
    /// [`PendingTokens::add`], [`PendingTokens::mark_possibly_revoked`] or [`PendingTokens::end`].
    ///
    /// # Errors
    /// When the state directory cannot be written. The upstream must not be called then.
    pub(super) async fn begin(&self, account: AccountId) -> io::Result<()> {
        self.state.lock().under_way.insert(account);
        let logged = self.with_log(move |log| log.append(account)).await.unwrap_or(Ok(()));
        logged.inspect_err(|_| self.end(account))
    }

    /// Records that the account's attempt has ended and has certainly issued no token.
    pub(super) fn end(&self, account: AccountId) {
        self.state.lock().under_way.remove(&account);
    }

    /// Records that the account's attempt issued this token. It replaces an earlier pending token.
    pub(super) fn add(&self, account: AccountId, orphan: PendingToken) {
        {
            let mut state = self.end_attempt(account);
            let issue = state.pending.entry(account).or_default();
            // The first of several pending tokens replaces the stored one.
            let replaces = issue.token.take().map_or(orphan.replaces, |first| first.replaces);
            let token = Some(PendingToken { replaces, ..orphan });
            *issue = PendingIssue { token, possibly_revoked: false };
        }
        self.added.notify_one();
    }

    /// Records that the account's attempt may have issued a token that was lost.
    pub(super) fn mark_possibly_revoked(&self, account: AccountId) {
        self.end_attempt(account).pending.entry(account).or_default().possibly_revoked = true;
        self.added.notify_one();
    }

    /// Returns whether something is pending for the account.
    pub(super) fn contains(&self, account: AccountId) -> bool {
        self.state.lock().pending.contains_key(&account)
    }

    /// Returns what is pending for the account.
    pub(super) fn get(&self, account: AccountId) -> Option<PendingIssue> {
        self.state.lock().pending.get(&account).cloned()
    }

    /// Returns the ids of the keys that the pending tokens are sealed with.
    pub(in crate::services) fn sealing_keys(&self) -> BTreeSet<KeyId> {
        let state = self.state.lock();
        let tokens = state.pending.values().filter_map(|issue| issue.token.as_ref());
        tokens.filter_map(|orphan| Keyring::sealed_with(&orphan.token.sealed).ok()).collect()
    }

    /// Returns the accounts for which something is pending.
    pub(super) fn accounts(&self) -> Vec<AccountId> {
        self.state.lock().pending.keys().copied().collect()
    }

    /// Waits until something is pending. Cancel safe.
    pub(super) async fn wait_until_any(&self) {
        while self.state.lock().pending.is_empty() {
            self.added.notified().await;
        }
    }

    /// Records that `issue` of the account is stored in the database. Clears the log if nothing is pending
    /// or under way any more.
    pub(super) async fn reconciled(self: &Arc<Self>, account: AccountId, issue: &PendingIssue) {
        {
            let mut state = self.state.lock();
            // A later attempt may have issued another token meanwhile.
            if state.pending.get(&account).is_some_and(|pending| pending.is_same(issue)) {
                state.pending.remove(&account);
            }
        }
        let this = self.clone();
        let cleared = self.with_log(move |log| {
            // An attempt that begins after this check waits for the lock of the log, and appends to it
            // after it was cleared.
            let idle = {
                let state = this.state.lock();
                state.pending.is_empty() && state.under_way.is_empty()
            };
            if idle { log.clear() } else { Ok(()) }
        });
        if let Some(Err(error)) = cleared.await {
            error!(%error, "the log of issues without the database cannot be cleared, although all tokens \
                are stored; after a restart, a new token is issued for each account in it");
        }
    }

    fn end_attempt(&self, account: AccountId) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        state.under_way.remove(&account);
        state
    }

    /// Runs `act` with the log on the blocking pool; returns `None` if no log is kept. `act` runs to its
    /// end even if the future is dropped.
    async fn with_log<T: Send + 'static>(
        &self,
        act: impl FnOnce(&mut IntentLog) -> T + Send + 'static,
    ) -> Option<T> {
        let log = self.log.clone()?;
        match task::spawn_blocking(move || act(&mut log.lock())).await {
            Ok(done) => Some(done),
            Err(bug) => std::panic::resume_unwind(bug.into_panic()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        crypto::RowBinding,
        domain::token::{Generation, SealedToken, Token},
    };

    impl PendingTokens {
        /// Returns an empty collection that keeps no log.
        pub(in crate::services) fn without_log() -> Self {
            Self { state: Mutex::default(), log: None, added: Notify::new() }
        }

        /// Makes a token pending that is sealed with the primary key of `keyring`.
        pub(in crate::services) fn add_sealed(&self, account: AccountId, keyring: &Keyring) {
            let token = Token::example(1, 3_600);
            let binding = RowBinding::token(account, token.generation);
            let token = SealedToken::new(&token, keyring.seal(&binding, b"token"));
            self.add(account, PendingToken { token, replaces: None, lease: None });
        }
    }

    const ACCOUNT: AccountId = AccountId(7);

    fn orphan(generation: i64, replaces: i64) -> PendingToken {
        PendingToken {
            token: SealedToken::new(&Token::example(generation, 3_600), vec![]),
            replaces: Some(Generation(replaces)),
            lease: None,
        }
    }

    fn pending(home: &tempfile::TempDir) -> Arc<PendingTokens> {
        Arc::new(PendingTokens {
            state: Mutex::default(),
            log: Some(Arc::new(Mutex::new(IntentLog::new(home.path().join("log"))))),
            added: Notify::new(),
        })
    }

    #[tokio::test]
    async fn the_last_of_several_tokens_is_pending_and_replaces_the_stored_one() {
        let home = tempfile::tempdir().unwrap();
        let pending = pending(&home);
        pending.add(ACCOUNT, orphan(3, 1));
        pending.mark_possibly_revoked(ACCOUNT);
        pending.add(ACCOUNT, orphan(4, 2));
        let issue = pending.get(ACCOUNT).unwrap();
        let orphan = issue.token.unwrap();
        assert_eq!(orphan.token.generation, Generation(4));
        assert_eq!(orphan.replaces, Some(Generation(1)));
        assert!(!issue.possibly_revoked);
    }

    #[tokio::test]
    async fn the_log_is_cleared_once_nothing_is_pending_or_under_way() {
        let home = tempfile::tempdir().unwrap();
        let pending = pending(&home);
        pending.begin(ACCOUNT).await.unwrap();
        pending.begin(AccountId(8)).await.unwrap();
        pending.add(ACCOUNT, orphan(2, 1));
        let issue = pending.get(ACCOUNT).unwrap();
        pending.reconciled(ACCOUNT, &issue).await;
        assert_eq!(pending.of_earlier_process().await.unwrap(), [ACCOUNT, AccountId(8)]);
        pending.end(AccountId(8));
        pending.reconciled(ACCOUNT, &issue).await;
        assert_eq!(pending.of_earlier_process().await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_token_that_was_issued_during_reconciliation_stays_pending() {
        let home = tempfile::tempdir().unwrap();
        let pending = pending(&home);
        pending.add(ACCOUNT, orphan(2, 1));
        let earlier = pending.get(ACCOUNT).unwrap();
        pending.add(ACCOUNT, orphan(3, 1));
        pending.reconciled(ACCOUNT, &earlier).await;
        assert_eq!(pending.accounts(), [ACCOUNT]);
    }
}
