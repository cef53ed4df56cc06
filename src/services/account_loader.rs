//! Loads accounts from the database into the cache, and opens their sealed tokens.

use std::{collections::BTreeSet, sync::Arc};

use sqlx::PgPool;
use tokio::sync::Mutex;
use tracing::error;

use crate::{
    crypto::Keyring,
    domain::{
        account::AccountId,
        plausible_time::{AttemptTimeLimits, Moment, StoredLife, TOLERANCE},
        token::{SealedToken, Token},
    },
    services::{account_cache::AccountCache, database_clock::DatabaseClock},
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
    clock: Arc<DatabaseClock>,
    time_limits: AttemptTimeLimits,
    /// Held while a page is read and put into the cache, so that an older read never overwrites a newer
    /// one. It is an async lock, since the read waits for the database.
    one_at_a_time: Mutex<()>,
}

impl AccountLoader {
    /// Returns a loader that reads through `pool` and opens tokens with `keyring`. It converts times with
    /// `clock`, and those of attempts must keep `time_limits`.
    #[must_use]
    pub fn new(
        pool: PgPool,
        keyring: Arc<Keyring>,
        cache: Arc<AccountCache>,
        clock: Arc<DatabaseClock>,
        time_limits: AttemptTimeLimits,
    ) -> Self {
        Self { pool, keyring, cache, clock, time_limits, one_at_a_time: Mutex::new(()) }
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
        let before = self.clock.local().now();
        let loaded = within(accounts::load(&self.pool, ids)).await?;
        let found: BTreeSet<_> = loaded.iter().map(|loaded| loaded.account.id).collect();
        // Deleted accounts are removed first, since another account may have the same name by now.
        for id in ids.iter().map(|id| AccountId(*id)).filter(|id| !found.contains(id)) {
            self.cache.remove(id);
        }
        for mut loaded in loaded {
            let moment = self.clock.observe(before, loaded.now);
            self.convert_to_local_time(&mut loaded);
            let LoadedAccount { account, mut refresh, token, .. } = loaded;
            let token = token.and_then(|stored| {
                let (stored, from_the_future) = self.believe(account.id, stored, &moment);
                refresh.possibly_revoked |= from_the_future;
                self.open(account.id, stored)
            });
            self.cache.put(account, refresh, token);
        }
        Ok(())
    }

    /// Returns the token with its times by this process, and whether it should be replaced because it was
    /// issued in the future.
    ///
    /// A cached token keeps the times that this process has measured, unless the database's clock has run
    /// evenly since its issue and the database has an earlier end.
    fn believe(
        &self,
        account: AccountId,
        mut stored: SealedToken,
        moment: &Moment,
    ) -> (SealedToken, bool) {
        let life = StoredLife {
            issued_at: stored.issued_at,
            expires_at: stored.expires_at,
            issuer_expires_at: stored.issuer_expires_at,
        };
        let believed = life.believed(moment);
        (stored.issued_at, stored.expires_at) = (believed.issued_at, believed.expires_at);
        let cached = self.cache.by_id(account).and_then(|entry| entry.snapshot().token.clone());
        let Some(cached) = cached.filter(|cached| cached.generation == stored.generation) else {
            return (stored, believed.from_the_future);
        };
        let shortened = believed.expires_at < cached.expires_at - TOLERANCE;
        if !(believed.certain && shortened) {
            (stored.issued_at, stored.expires_at) = (cached.issued_at, cached.expires_at);
        }
        (stored, false)
    }

    /// Converts the times of attempts, which the database stamped, to the time of this process, so that a
    /// difference between the two clocks does not shift the next attempt. Times that cannot be true are
    /// corrected first.
    fn convert_to_local_time(&self, loaded: &mut LoadedAccount) {
        let ahead = self.clock.local().now() - loaded.now;
        let LoadedAccount { account, refresh, .. } = loaded;
        // The claim stores the end of a shortened lease; here the cache keeps it.
        let _ = self.time_limits.correct(refresh, loaded.now);
        for time in [
            &mut account.reissue_requested_at,
            &mut refresh.attempt_started_at,
            &mut refresh.lease_until,
            &mut refresh.next_attempt_at,
            &mut refresh.interval_exceptions.since,
            &mut refresh.answered_reissue,
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
