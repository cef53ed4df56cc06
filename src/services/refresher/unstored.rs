//! What was issued and is not stored yet, because the database was away.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{sync::Notify, task};
use tracing::error;

use super::stamps::Stamps;
use crate::{
    domain::{
        account::AccountId,
        token::{Generation, Token},
    },
    files::state_dir::StateDir,
};

/// What is left to be told to the database of one account.
#[derive(Clone, Debug, Default)]
pub(super) struct Left {
    /// The last token that was issued.
    pub(super) token: Option<Issued>,
    /// Whether an attempt after it may have issued another.
    pub(super) doubt: bool,
}

/// A token that the database does not have.
#[derive(Clone, Debug)]
pub(super) struct Issued {
    pub(super) token: Arc<Token>,
    /// The generation of the token that was stored when it was issued.
    pub(super) replaces: Option<Generation>,
    /// Whether it was issued under a lease.
    pub(super) leased: bool,
}

impl Left {
    fn is_the_same(&self, other: &Self) -> bool {
        let generation = |left: &Self| left.token.as_ref().map(|issued| issued.token.generation);
        generation(self) == generation(other) && self.doubt == other.doubt
    }
}

/// All of it.
#[derive(Debug)]
pub struct PendingTokens {
    state: Mutex<State>,
    /// Kept while a token that is lost with this process may have ended the stored one.
    stamps: Option<Arc<Mutex<Stamps>>>,
    /// Told when something is left.
    more: Notify,
}

#[derive(Debug, Default)]
struct State {
    left: BTreeMap<AccountId, Left>,
    under_way: BTreeSet<AccountId>,
}

impl PendingTokens {
    /// Nothing is left, as far as this process knows. `ends_older` says whether the upstream ends
    /// older tokens when it issues a new one.
    #[must_use]
    pub fn new(state_dir: &StateDir, ends_older: bool) -> Self {
        let stamps =
            ends_older.then(|| Arc::new(Mutex::new(Stamps::at(state_dir.issued_alone_file()))));
        Self { state: Mutex::default(), stamps, more: Notify::new() }
    }

    /// The accounts for which an earlier process issued what it could not store: their stored
    /// tokens may be dead.
    ///
    /// # Errors
    /// When the state directory cannot be read.
    pub async fn of_earlier_process(&self) -> io::Result<Vec<AccountId>> {
        self.with_stamps(|stamps| stamps.read()).await.unwrap_or(Ok(vec![]))
    }

    /// Forgets what [`PendingTokens::of_earlier_process`] tells, once the database knows it.
    ///
    /// # Errors
    /// When the state directory cannot be written.
    pub async fn forget_earlier_process(&self) -> io::Result<()> {
        self.with_stamps(Stamps::clear).await.unwrap_or(Ok(()))
    }

    /// Has on disk that a token may be issued for `account`. Call [`PendingTokens::ended`] afterwards.
    ///
    /// # Errors
    /// When the state directory cannot be written: the upstream must not be called then.
    pub(super) async fn begin(&self, account: AccountId) -> io::Result<()> {
        self.state().under_way.insert(account);
        let stamped = self.with_stamps(move |stamps| stamps.add(account)).await.unwrap_or(Ok(()));
        stamped.inspect_err(|_| {
            self.state().under_way.remove(&account);
        })
    }

    /// The attempt is over, and left nothing new.
    pub(super) fn ended(&self, account: AccountId) {
        self.state().under_way.remove(&account);
    }

    /// `issued` is to be stored; it takes the place of what was left before.
    pub(super) fn issued(&self, account: AccountId, issued: Issued) {
        let mut state = self.state();
        state.under_way.remove(&account);
        let left = state.left.entry(account).or_default();
        // What the database has is what the first of several replaces.
        let replaces = left.token.take().map_or(issued.replaces, |first| first.replaces);
        *left = Left { token: Some(Issued { replaces, ..issued }), doubt: false };
        drop(state);
        self.more.notify_one();
    }

    /// The attempt may have issued a token that nobody has.
    pub(super) fn doubted(&self, account: AccountId) {
        let mut state = self.state();
        state.under_way.remove(&account);
        state.left.entry(account).or_default().doubt = true;
        drop(state);
        self.more.notify_one();
    }

    /// What is left of `account`.
    pub(super) fn of(&self, account: AccountId) -> Option<Left> {
        self.state().left.get(&account).cloned()
    }

    /// The accounts of which something is left.
    pub(super) fn accounts(&self) -> Vec<AccountId> {
        self.state().left.keys().copied().collect()
    }

    /// Returns once something may be left.
    pub(super) async fn some(&self) {
        while self.state().left.is_empty() {
            self.more.notified().await;
        }
    }

    /// The database knows `settled` of `account`. When nothing else is left, the stamps go.
    pub(super) async fn settled(self: &Arc<Self>, account: AccountId, settled: &Left) {
        {
            let mut state = self.state();
            // A later attempt may have left something else meanwhile.
            if state.left.get(&account).is_some_and(|left| left.is_the_same(settled)) {
                state.left.remove(&account);
            }
        }
        let this = self.clone();
        let cleared = self.with_stamps(move |stamps| {
            // Who begins now stamps after this.
            let state = this.state();
            let idle = state.left.is_empty() && state.under_way.is_empty();
            drop(state);
            if idle { stamps.clear() } else { Ok(()) }
        });
        if let Some(Err(error)) = cleared.await {
            error!(%error, "the stamps of tokens that are stored now cannot be removed; \
                after a restart their accounts are issued for once more");
        }
    }

    /// Does `act` on the stamps, if there are any to be kept, off the runtime's threads.
    async fn with_stamps<T: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Stamps) -> T + Send + 'static,
    ) -> Option<T> {
        let stamps = self.stamps.clone()?;
        let done = task::spawn_blocking(move || {
            act(&mut stamps.lock().unwrap_or_else(PoisonError::into_inner))
        });
        match done.await {
            Ok(done) => Some(done),
            Err(bug) => std::panic::resume_unwind(bug.into_panic()),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
