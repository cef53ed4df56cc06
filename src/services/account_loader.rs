//! Loads accounts from the store into the cache, opening their tokens.

use std::{collections::BTreeSet, sync::Arc};

use sqlx::PgPool;
use tokio::sync::Mutex;
use tracing::error;

use crate::{
    crypto::Keyring,
    domain::{account::AccountId, clock::Clock, token::Token},
    services::account_cache::AccountCache,
    store::{
        StoreError,
        accounts::{self, LoadedAccount, SealedToken},
        within,
    },
};

/// How many accounts are loaded at once.
const PAGE: usize = 1_000;

/// Brings the cache to what the database has.
#[derive(Debug)]
pub struct AccountLoader {
    pool: PgPool,
    keyring: Arc<Keyring>,
    cache: Arc<AccountCache>,
    clock: Clock,
    /// Loads follow one another, so that an older one never overwrites a newer one.
    turn: Mutex<()>,
}

impl AccountLoader {
    /// A loader that reads through `pool` and opens tokens with `keyring`.
    #[must_use]
    pub fn new(
        pool: PgPool,
        keyring: Arc<Keyring>,
        cache: Arc<AccountCache>,
        clock: Clock,
    ) -> Self {
        Self { pool, keyring, cache, clock, turn: Mutex::new(()) }
    }

    /// Loads every account, and forgets those that are gone. Returns how many there are.
    ///
    /// # Errors
    /// When the database cannot be read; what was loaded so far stays.
    pub async fn all(&self) -> Result<usize, StoreError> {
        let mut gone: BTreeSet<_> = self.cache.slots().iter().map(|slot| slot.id()).collect();
        let mut last = i64::MIN;
        loop {
            let ids = accounts::ids_after(&self.pool, last).await?;
            let Some(end) = ids.last() else { break };
            last = *end;
            self.these(&ids).await?;
            for id in ids {
                gone.remove(&AccountId(id));
            }
        }
        for id in gone {
            self.cache.remove(id);
        }
        Ok(self.cache.len())
    }

    /// Loads the accounts `ids`, and forgets those of them that are gone.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn these(&self, ids: &[i64]) -> Result<(), StoreError> {
        for page in ids.chunks(PAGE) {
            self.page(page).await?;
        }
        Ok(())
    }

    async fn page(&self, ids: &[i64]) -> Result<(), StoreError> {
        let _turn = self.turn.lock().await;
        let loaded = within(accounts::load(&self.pool, ids)).await?;
        let found: BTreeSet<_> = loaded.iter().map(|loaded| loaded.account.id).collect();
        // First what is gone: its name may belong to another account by now.
        for id in ids.iter().map(|id| AccountId(*id)).filter(|id| !found.contains(id)) {
            self.cache.remove(id);
        }
        for mut loaded in loaded {
            self.by_our_clock(&mut loaded);
            let LoadedAccount { account, progress, token, .. } = loaded;
            let token = token.and_then(|token| self.open(account.id, token));
            self.cache.put(account, progress, token);
        }
        Ok(())
    }

    /// Turns the times that the database stamped into our clock's, so that a difference between the
    /// two neither delays nor hurries an attempt.
    fn by_our_clock(&self, loaded: &mut LoadedAccount) {
        let ahead = self.clock.now() - loaded.now;
        let LoadedAccount { account, progress, .. } = loaded;
        for time in [
            &mut account.reissue_requested_at,
            &mut progress.attempt_started_at,
            &mut progress.lease_until,
            &mut progress.next_attempt_at,
        ] {
            *time = time.map(|time| time + ahead);
        }
    }

    /// Opens a stored token. One that does not open is as good as none: a new one is issued.
    fn open(&self, account: AccountId, stored: SealedToken) -> Option<Token> {
        let opened = self.keyring.open_token(account, stored.generation, &stored.sealed);
        let access_token = opened
            .inspect_err(|error| error!(%account, %error, "a stored token does not open"))
            .ok()?;
        Some(Token {
            access_token,
            generation: stored.generation,
            credential_version: stored.credential_version,
            issued_at: stored.issued_at,
            expires_at: stored.expires_at,
            allowed_ip: stored.allowed_ip,
            fingerprint: stored.fingerprint,
        })
    }
}
