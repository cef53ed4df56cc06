//! Follows accounts, their tokens and their refresh states, and loads those that changed into the cache.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::duty::{Duty, POLL_INTERVAL, keep_first};
use crate::{
    domain::account::AccountId,
    services::{
        account_cache::AccountCache, account_loader::AccountLoader, refresher::RefreshTrigger,
    },
    store::{Session, StoreError, changes, within},
};

/// The most accounts that are loaded before the refresher is told of them.
const BATCH: usize = 500;

/// The duty that follows accounts.
pub(super) struct AccountFollower {
    pub(super) cache: Arc<AccountCache>,
    pub(super) loader: Arc<AccountLoader>,
    pub(super) refresh: RefreshTrigger,
    /// Up to where each source was read; `None` at the start of a session.
    pub(super) followed: Option<Followed>,
}

/// The snapshots up to which the sources of changes were read, as `pg_snapshot` text. There is one for each
/// source, since a table that cannot be read must not hinder the others.
#[derive(Clone, Debug)]
pub(super) struct Followed {
    announced: String,
    tokens: String,
    refreshes: String,
}

impl Duty for AccountFollower {
    const NAME: &'static str = "accounts";
    const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

    /// Loads the accounts that changed since the last call; at the start of a session all of them.
    async fn perform(&mut self, session: &mut Session) -> Result<(), StoreError> {
        let Some(mut followed) = self.followed.clone() else {
            self.followed = Some(self.load_all(session).await?);
            return Ok(());
        };
        let (mut touched, mut outcome) = (BTreeSet::new(), Ok(()));
        match within(changes::announced(session.connection()?, &followed.announced)).await {
            Ok(since) => {
                touched.extend(since.accounts);
                followed.announced = since.snapshot;
            }
            Err(error) => keep_first(&mut outcome, Err(error))?,
        }
        match within(changes::new_tokens(session.connection()?, &followed.tokens)).await {
            Ok(since) => {
                touched.extend(since.accounts);
                followed.tokens = since.snapshot;
            }
            Err(error) => keep_first(&mut outcome, Err(error))?,
        }
        match within(changes::new_refresh_states(session.connection()?, &followed.refreshes)).await
        {
            Ok(since) => {
                touched.extend(since.accounts);
                followed.refreshes = since.snapshot;
            }
            Err(error) => keep_first(&mut outcome, Err(error))?,
        }
        let touched: Vec<_> = touched.into_iter().collect();
        for batch in touched.chunks(BATCH) {
            self.loader.load_over(session, batch).await?;
            for id in batch {
                self.refresh.wake(AccountId(*id));
            }
        }
        // Only now: if a load fails, the next call finds the same accounts.
        self.followed = Some(followed);
        outcome
    }

    fn forget(&mut self) {
        self.followed = None;
    }

    fn pause(&self) -> Duration {
        POLL_INTERVAL
    }
}

impl AccountFollower {
    async fn load_all(&self, session: &mut Session) -> Result<Followed, StoreError> {
        let snapshot = within(changes::snapshot(session.connection()?)).await?;
        self.loader.load_all(session).await?;
        for account in self.cache.all() {
            self.refresh.wake(account.id());
        }
        Ok(Followed { announced: snapshot.clone(), tokens: snapshot.clone(), refreshes: snapshot })
    }
}
