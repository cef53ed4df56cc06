//! Loads accounts from the database into the cache, and opens their sealed tokens.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use sqlx::{PgConnection, PgPool};
use tokio::sync::Mutex;
use tracing::error;

use crate::{
    crypto::LiveKeyring,
    domain::{
        account::AccountId,
        clock::Timestamp,
        plausible_time::{AttemptTimeLimits, LONGEST_LEASE, Moment, StoredLife, TOLERANCE},
        secret::AccessToken,
        token::{SealedToken, Token},
    },
    services::{
        account_cache::{AccountCache, AccountSnapshot},
        database_clock::DatabaseClock,
        feed_health::FeedHealth,
    },
    store::{
        Session, StoreError,
        accounts::{self, AccountVersion, LoadedAccount, WithdrawnAccount},
        within,
    },
    upstream::rcs::stated_life,
};

/// The most accounts that one statement loads.
const PAGE: usize = 500;
/// The tables whose rows make up an account.
const TABLES: [&str; 3] = ["accounts", "refreshes", "tokens"];

/// Loads accounts from the database into the cache.
#[derive(Debug)]
pub struct AccountLoader {
    pool: PgPool,
    keyring: Arc<LiveKeyring>,
    cache: Arc<AccountCache>,
    health: Arc<FeedHealth>,
    clock: Arc<DatabaseClock>,
    time_limits: AttemptTimeLimits,
    /// Held while a page is read and put into the cache, so that an older read never overwrites a newer
    /// one. It is an async lock, since the read waits for the database.
    one_at_a_time: Mutex<()>,
    /// When accounts were withdrawn from the cache. A read over a connection from before does not put them back.
    withdrawn: parking_lot::Mutex<HashMap<i64, Instant>>,
    /// The version of each account that was read, whether it could be used or not.
    versions: parking_lot::Mutex<HashMap<i64, i64>>,
}

impl AccountLoader {
    /// Returns a loader that reads through `pool` and opens tokens with `keyring`. It reports the rows that
    /// cannot be used to `health`.
    /// It converts times with `clock`, and those of attempts must keep `time_limits`.
    #[must_use]
    pub fn new(
        pool: PgPool,
        keyring: Arc<LiveKeyring>,
        cache: Arc<AccountCache>,
        health: Arc<FeedHealth>,
        clock: Arc<DatabaseClock>,
        time_limits: AttemptTimeLimits,
    ) -> Self {
        Self {
            pool,
            keyring,
            cache,
            health,
            clock,
            time_limits,
            one_at_a_time: Mutex::new(()),
            withdrawn: parking_lot::Mutex::default(),
            versions: parking_lot::Mutex::default(),
        }
    }

    /// Loads every account over `session`, and removes accounts from the cache that no longer exist.
    /// Returns the number of accounts.
    ///
    /// # Errors
    /// When the database cannot be read; the pages that were loaded before stay in the cache.
    pub async fn load_all(&self, session: &mut Session) -> Result<usize, StoreError> {
        let mut gone: BTreeSet<_> = self.versions.lock().keys().copied().collect();
        gone.extend(self.cache.all().iter().map(|account| account.id().0));
        let mut last = i64::MIN;
        loop {
            let ids = within(accounts::ids_after(session.connection()?, last)).await?;
            let Some(end) = ids.last() else { break };
            last = *end;
            self.load_over(session, &ids).await?;
            for id in ids {
                gone.remove(&id);
            }
        }
        let gone: Vec<_> = gone.into_iter().collect();
        self.load_over(session, &gone).await?;
        Ok(self.cache.len())
    }

    /// Loads the accounts `ids` over the pool, and removes those from the cache that no longer exist.
    ///
    /// # Errors
    /// When the database cannot be read; the pages that were loaded before stay in the cache.
    pub async fn load(&self, ids: &[i64]) -> Result<(), StoreError> {
        for page in ids.chunks(PAGE) {
            let mut again = page.to_vec();
            while !again.is_empty() {
                let believed_at = Instant::now();
                let mut connection = self.pool.acquire().await?;
                again = self.load_page(&mut connection, &again, believed_at).await?;
            }
        }
        Ok(())
    }

    /// Like [`Self::load`], over `session`.
    ///
    /// # Errors
    /// When the database cannot be read; the pages that were loaded before stay in the cache.
    pub async fn load_over(&self, session: &mut Session, ids: &[i64]) -> Result<(), StoreError> {
        for page in ids.chunks(PAGE) {
            let mut again = page.to_vec();
            while !again.is_empty() {
                let believed_at = Instant::now();
                again = self.load_page(session.connection()?, &again, believed_at).await?;
            }
        }
        Ok(())
    }

    /// Loads the accounts `ids` over `connection`, whose server was believed after `believed_at`. Returns those that
    /// were withdrawn since, so that the read may be older than the withdrawal, or from a server that another one has
    /// replaced: they must be read again.
    async fn load_page(
        &self,
        connection: &mut PgConnection,
        ids: &[i64],
        believed_at: Instant,
    ) -> Result<Vec<i64>, StoreError> {
        let _guard = self.one_at_a_time.lock().await;
        let before = self.clock.local().now();
        let loaded = within(accounts::load(connection, ids)).await?;
        let found: BTreeSet<_> = loaded.rows.iter().map(|loaded| loaded.account.id.0).collect();
        let mut withdrawn = self.withdrawn.lock();
        let is_older = |id: &i64| withdrawn.get(id).is_some_and(|at| *at >= believed_at);
        let (again, current): (Vec<i64>, Vec<i64>) =
            ids.iter().copied().partition(|id| found.contains(id) && is_older(id));
        {
            let mut versions = self.versions.lock();
            for id in &current {
                withdrawn.remove(id);
                versions.remove(id);
            }
            versions.extend(loaded.versions.iter().copied());
            // Forgetting their versions makes the comparison read them again, too.
            for id in &again {
                versions.remove(id);
            }
        }
        self.health.update_unusable(&TABLES, &current, &loaded.unusable);
        // Accounts that do not exist or cannot be used are removed first, since another account may have the
        // same name by now.
        for id in current.iter().filter(|id| !found.contains(id)) {
            self.cache.remove(AccountId(*id));
        }
        for loaded in loaded.rows.into_iter().filter(|it| !again.contains(&it.account.id.0)) {
            self.put(loaded, before);
        }
        drop(withdrawn);
        Ok(again)
    }

    /// Puts an account into the cache, which was read after `before`.
    fn put(&self, mut loaded: LoadedAccount, before: Timestamp) {
        let moment = self.clock.observe(before, loaded.now);
        self.convert_to_local_time(&mut loaded);
        let LoadedAccount { account, mut refresh, token, .. } = loaded;
        let token = token.and_then(|stored| {
            let opened = self.open(account.id, &stored)?;
            let (stored, from_the_future) = self.believe(account.id, stored, &opened, &moment);
            refresh.possibly_revoked |= from_the_future;
            Some(stored.opened(opened))
        });
        self.cache.put(account, refresh, token);
    }

    /// Takes accounts away from their callers at once: they were disabled or deleted. They are loaded later,
    /// with everything else that has changed, or by the comparison: since their versions are forgotten, an account
    /// that was enabled again and loaded meanwhile is read once more.
    pub fn withdraw(&self, accounts: &[WithdrawnAccount]) {
        if accounts.is_empty() {
            return;
        }
        let mut withdrawn = self.withdrawn.lock();
        let now = Instant::now();
        for account in accounts {
            let id = AccountId(account.id);
            if account.deleted {
                self.cache.remove(id);
            } else if let Some(entry) = self.cache.by_id(id)
                && entry.snapshot().account.enabled
            {
                self.cache.update(&entry, disabled);
            }
            withdrawn.insert(account.id, now);
            self.versions.lock().remove(&account.id);
        }
    }

    /// Returns the ids of the accounts that must be loaded to be as in `page`: the versions of all accounts
    /// after the id `after`, up to the last one in the page. An empty page means that there are no more.
    #[must_use]
    pub fn outdated(&self, after: i64, page: &[AccountVersion]) -> Vec<i64> {
        outdated(&self.versions.lock(), after, page)
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
        opened: &AccessToken,
        moment: &Moment,
    ) -> (SealedToken, bool) {
        let life = StoredLife {
            issued_at: stored.issued_at,
            expires_at: stored.expires_at,
            issuer_expires_at: stored.issuer_expires_at,
        };
        let stated = stated_life(opened).map(|(begin, end)| end - begin);
        let life = life.bounded(stored.generation, stated, LONGEST_LEASE);
        let believed = life.believed(moment);
        (stored.issued_at, stored.expires_at) = (believed.issued_at, believed.expires_at);
        let cached = self.cache.by_id(account).and_then(|entry| entry.snapshot().token.clone());
        // Where the upstream gave the token again meanwhile, it may have stated another end.
        let is_same = |cached: &Arc<Token>| {
            cached.generation == stored.generation && cached.repeated_at == stored.repeated_at
        };
        let Some(cached) = cached.filter(is_same) else {
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
            &mut refresh.new_secret_retry_at,
            &mut refresh.interval_exceptions.since,
            &mut refresh.answered_reissue,
        ] {
            *time = time.map(|time| time + ahead);
        }
    }

    /// Opens a stored token. Returns `None` if it does not open; a new one is issued then.
    fn open(&self, account: AccountId, stored: &SealedToken) -> Option<AccessToken> {
        let opened = self.keyring.current().open_token(account, stored.generation, &stored.sealed);
        opened.inspect_err(|error| error!(%account, %error, "a stored token does not open")).ok()
    }
}

fn disabled(snapshot: &AccountSnapshot) -> AccountSnapshot {
    let mut disabled = snapshot.clone();
    disabled.account.enabled = false;
    disabled
}

/// See [`AccountLoader::outdated`]; `known` has the versions that were loaded.
fn outdated(known: &HashMap<i64, i64>, after: i64, page: &[AccountVersion]) -> Vec<i64> {
    let end = page.last().map_or(i64::MAX, |account| account.id);
    let present: HashSet<_> = page.iter().map(|account| account.id).collect();
    let changed = page.iter().filter(|account| known.get(&account.id) != Some(&account.version));
    let gone = known.keys().filter(|id| after < **id && **id <= end && !present.contains(*id));
    changed.map(|account| account.id).chain(gone.copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(versions: &[(i64, i64)]) -> Vec<AccountVersion> {
        let version = |&(id, version)| AccountVersion { id, version, lacks_refresh_state: false };
        versions.iter().map(version).collect()
    }

    #[test]
    fn accounts_that_are_new_changed_or_gone_are_outdated_each_in_the_page_that_covers_its_id() {
        let known = HashMap::from([(1, 10), (2, 20), (3, 30), (5, 50), (9, 90)]);
        let sorted = |after, versions: &[(i64, i64)]| {
            let mut ids = outdated(&known, after, &page(versions));
            ids.sort_unstable();
            ids
        };
        assert_eq!(sorted(i64::MIN, &[(1, 10), (2, 20), (3, 30)]), [0; 0]);
        assert_eq!(sorted(i64::MIN, &[(1, 10), (3, 31), (4, 40)]), [2, 3, 4]);
        assert_eq!(sorted(4, &[(5, 50), (7, 70)]), [7]);
        assert_eq!(sorted(7, &[]), [9], "the empty page at the end covers all ids after the last");
        assert_eq!(sorted(9, &[]), [0; 0]);
    }
}
