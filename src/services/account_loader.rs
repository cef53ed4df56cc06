//! Loads accounts from the database into the cache, and opens their sealed tokens.

use std::{collections::BTreeSet, sync::Arc};

use sqlx::PgPool;
use tokio::sync::Mutex;
use tracing::error;

use crate::{
    crypto::Keyring,
    domain::{
        account::AccountId,
        clock::Clock,
        token::{SealedToken, Token},
    },
    services::account_cache::AccountCache,
    store::{
        StoreError,
        accounts::{self, LoadedAccount},
        within,
    },
};

/// The most accounts that one statement loads.
const PAGE: usize = 1_000;

/// Loads accounts from the database into the cache.
#[derive(Debug)]
pub struct AccountLoader {
    pool: PgPool,
    keyring: Arc<Keyring>,
    cache: Arc<AccountCache>,
    clock: Clock,
    /// Held while a page is read and put into the cache, so that an older read never overwrites a newer
    /// one. It is an async lock, since the read waits for the database.
    one_at_a_time: Mutex<()>,
}

impl AccountLoader {
    /// Returns a loader that reads through `pool` and opens tokens with `keyring`.
    #[must_use]
    pub fn new(
        pool: PgPool,
        keyring: Arc<Keyring>,
        cache: Arc<AccountCache>,
        clock: Clock,
    ) -> Self {
        Self { pool, keyring, cache, clock, one_at_a_time: Mutex::new(()) }
    }

    /// Loads every account, and removes accounts from the cache that no longer exist. Returns the number
    /// of accounts.
    ///
    /// # Errors
    /// When the database cannot be read; the pages that were loaded before stay in the cache.
    pub async fn load_all(&self) -> Result<usize, StoreError> {
        let mut gone: BTreeSet<_> = self.cache.all().iter().map(|account| account.id()).collect();
        let mut last = i64::MIN;
        loop {
            let ids = accounts::ids_after(&self.pool, last).await?;
            let Some(end) = ids.last() else { break };
            last = *end;
            self.load(&ids).await?;
            for id in ids {
                gone.remove(&AccountId(id));
            }
        }
        for id in gone {
            self.cache.remove(id);
        }
        Ok(self.cache.len())
    }

    /// Loads the accounts `ids`, and removes those from the cache that no longer exist.
    ///
    /// # Errors
    /// When the database cannot be read; the pages that were loaded before stay in the cache.
    pub async fn load(&self, ids: &[i64]) -> Result<(), StoreError> {
        for page in ids.chunks(PAGE) {
            self.load_page(page).await?;
        }
        Ok(())
    }

    async fn load_page(&self, ids: &[i64]) -> Result<(), StoreError> {
        let _guard = self.one_at_a_time.lock().await;
        let loaded = within(accounts::load(&self.pool, ids)).await?;
        let found: BTreeSet<_> = loaded.iter().map(|loaded| loaded.account.id).collect();
        // Deleted accounts are removed first, since another account may have the same name by now.
        for id in ids.iter().map(|id| AccountId(*id)).filter(|id| !found.contains(id)) {
            self.cache.remove(id);
        }
        for mut loaded in loaded {
            self.convert_to_local_time(&mut loaded);
            let LoadedAccount { account, refresh, token, .. } = loaded;
            let token = token.and_then(|token| self.open(account.id, token));
            self.cache.put(account, refresh, token);
        }
        Ok(())
    }

    /// Converts the times that the database stamped to the local clock, so that a difference between
    /// the two clocks does not shift the next attempt.
    fn convert_to_local_time(&self, loaded: &mut LoadedAccount) {
        let ahead = self.clock.now() - loaded.now;
        let LoadedAccount { account, refresh, .. } = loaded;
        for time in [
            &mut account.reissue_requested_at,
            &mut refresh.attempt_started_at,
            &mut refresh.lease_until,
            &mut refresh.next_attempt_at,
            &mut refresh.interval_exceptions.since,
        ] {
            *time = time.map(|time| time + ahead);
        }
    }

    /// Opens a stored token. Returns `None` if it does not open; a new one is issued then.
    fn open(&self, account: AccountId, stored: SealedToken) -> Option<Token> {
        let opened = self.keyring.open_token(account, stored.generation, &stored.sealed);
        let access_token = opened
            .inspect_err(|error| error!(%account, %error, "a stored token does not open"))
            .ok()?;
        Some(stored.opened(access_token))
    }
}
