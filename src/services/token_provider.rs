//! The operations behind `TokenService`: they check a caller's grants, answer from the cache, and wait for
//! tokens that are being issued. They never call the upstream; the refresher does.
//!
//! | file | holds |
//! |---|---|
//! | `token_provider.rs` | the operations behind the RPCs, with their effects |
//! | `decide.rs` | the decisions: serve, wait or refuse; the reuse time; the outcome of a report |
//! | `refusal.rs` | the reasons for which a call is refused |
//! | `list.rs` | pages of accounts for `ListAccounts` |

mod decide;
mod list;
mod refusal;

use std::{sync::Arc, time::Duration};

use decide::{Decision, decide, decide_at_deadline, decide_report};
pub use decide::{ReportOutcome, TokenRequest};
pub use list::{ListedAccount, ListedToken};
pub use refusal::CallRefusal;
use sqlx::PgPool;
use tokio::{
    runtime::Handle,
    task::yield_now,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{instrument, warn};

use crate::{
    domain::{
        account::{AccountName, CredentialVersion},
        caller::{AccountPattern, Caller, CallerId, Right},
        clock::{Clock, Timestamp},
        refresh_policy::RefreshPolicy,
        token::{Generation, Token},
    },
    services::{
        account_cache::{AccountCache, CachedAccount},
        caller_directory::CallerDirectory,
        caller_rates::CallerRates,
        connectivity::{Connectivity, DatabaseConnectivity},
        database_clock::DatabaseClock,
        keyed_semaphore::{KeyedPermit, KeyedSemaphore},
        refresher::RefreshTrigger,
    },
    store::{callers::CredentialKey, leases},
};

/// Retry delay of a call that is shed: about as long as issuing a token takes, after which other calls no
/// longer wait.
const SHED_RETRY: Duration = Duration::from_secs(1);
/// How often a grant is compared with a name before other tasks of the thread may run.
const MATCHES_BEFORE_YIELD: usize = 10_000;
/// How long storing a report may take; also the retry delay when it failed.
const STORE_REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// Answers the calls of callers. Cheap to clone: clones share all state.
#[derive(Clone)]
pub struct TokenProvider {
    /// The accounts with their tokens.
    pub cache: Arc<AccountCache>,
    /// The callers with their credentials and grants.
    pub callers: Arc<CallerDirectory>,
    /// The clock by which tokens end.
    pub clock: Clock,
    /// The clock by which grants and bearers end.
    pub database_clock: Arc<DatabaseClock>,
    /// Decides when tokens are replaced.
    pub policy: RefreshPolicy,
    /// How long grants are trusted without confirmation by the database.
    pub max_staleness: Duration,
    /// Whether the database answers, and whether this replica may issue without it.
    pub connectivity: Arc<DatabaseConnectivity>,
    /// Limits the calls that wait at the same time. Calls that find a live token need no permit.
    pub wait_permits: Arc<KeyedSemaphore<CallerId>>,
    /// Limits the `WatchTokens` streams that are open at the same time.
    pub stream_permits: Arc<KeyedSemaphore<CallerId>>,
    /// Limits the names and patterns that all open streams together watch.
    pub pattern_permits: Arc<KeyedSemaphore<CallerId>>,
    /// The rate of each caller, which streams and lists use too.
    pub rates: Arc<CallerRates>,
    /// Makes the refresher check an account at once.
    pub refresh_trigger: RefreshTrigger,
    /// The database, where reports are stored for all replicas.
    pub pool: PgPool,
    /// The runtime that drives the pool's connections. Calls are served on other runtimes, and a connection
    /// must not be tied to one of those.
    pub runtime: Handle,
}

impl TokenProvider {
    /// Returns a live token of `account` for `caller`, with the account that it belongs to. Waits for one up to
    /// `deadline` while [`decide()`] says so.
    ///
    /// Cancel safe: a dropped call only gives back its wait permit. An attempt to issue that it triggered goes
    /// on.
    ///
    /// # Errors
    /// The refusal that the caller is to read.
    pub async fn get_token(
        &self,
        caller: &Caller,
        account: &AccountName,
        request: TokenRequest,
        deadline: Instant,
    ) -> Result<(Arc<CachedAccount>, Arc<Token>), CallRefusal> {
        let cached = self.authorize(caller, Right::Get, account)?;
        cached.note_request(self.clock.now());
        let mut wait_permit = None;
        let mut changes = None;
        loop {
            let connectivity = self.connectivity.current();
            match decide(&cached.snapshot(), &request, &self.policy, connectivity, self.clock.now())
            {
                Decision::Serve(token) => return Ok((cached, token)),
                Decision::Refuse(refusal) => return Err(refusal),
                Decision::Wait => {}
            }
            if wait_permit.is_none() {
                wait_permit = Some(acquire(&self.wait_permits, caller)?);
            }
            // Subscribe first and decide once more after it, so that no change between the decision and
            // the subscription is missed.
            let Some((account_changes, connectivity_changes)) = &mut changes else {
                changes = Some((cached.changes(), self.connectivity.changes()));
                self.refresh_trigger.wake(cached.id());
                continue;
            };
            tokio::select! {
                _ = account_changes.changed() => {}
                _ = connectivity_changes.changed() => {}
                () = sleep_until(deadline) => {
                    let token = decide_at_deadline(&cached.snapshot(), &request, self.clock.now())?;
                    return Ok((cached, token));
                }
            }
        }
    }

    /// Takes permits for a `WatchTokens` stream of `caller` with so many patterns; the stream holds them as
    /// long as it is open.
    ///
    /// # Errors
    /// [`CallRefusal::Overloaded`] when all permits, or the caller's share of them, are taken.
    pub fn acquire_stream(
        &self,
        caller: &Caller,
        patterns: usize,
    ) -> Result<[KeyedPermit<CallerId>; 2], CallRefusal> {
        let patterns = self.pattern_permits.try_acquire_many(caller.id, patterns);
        let patterns = patterns.ok_or(CallRefusal::Overloaded { retry_after: SHED_RETRY })?;
        Ok([acquire(&self.stream_permits, caller)?, patterns])
    }

    /// Handles a caller's report that the upstream refused the account's token of `generation` with the code
    /// `upstream_code`. [`decide_report`] determines the outcome. A report that leads to a reissue is stored
    /// in the database first, so that the replica that issues next knows of it.
    ///
    /// # Errors
    /// The refusal that the caller is to read: [`CallRefusal::DatabaseUnavailable`] when the report cannot
    /// be stored within 2 seconds.
    #[instrument(skip_all, fields(%account, generation))]
    pub async fn report_rejected_token(
        &self,
        caller: &Caller,
        account: &AccountName,
        generation: u64,
        upstream_code: &str,
    ) -> Result<ReportOutcome, CallRefusal> {
        let cached = self.authorize(caller, Right::Report, account)?;
        let snapshot = cached.snapshot();
        if !snapshot.account.enabled {
            return Err(CallRefusal::AccountDisabled);
        }
        let now = self.clock.now();
        let outcome = decide_report(&snapshot, generation, upstream_code, &self.policy, now);
        if !matches!(outcome, ReportOutcome::Reissuing { already_stored: false, .. }) {
            return Ok(outcome);
        }
        let reported = snapshot.token.as_ref().map(|token| token.generation);
        self.store_report(&cached, account, reported).await?;
        self.cache.update(&cached, |snapshot| {
            let mut snapshot = snapshot.clone();
            // If a new token arrived meanwhile, it is not the reported one.
            snapshot.refresh.possibly_revoked |= snapshot
                .token
                .as_ref()
                .is_some_and(|token| token.generation.as_u64() == generation);
            snapshot
        });
        self.refresh_trigger.wake(cached.id());
        Ok(outcome)
    }

    /// Marks the token of generation `reported` in the database as possibly revoked. The statement runs on
    /// [`TokenProvider::runtime`]; a dropped call aborts it.
    async fn store_report(
        &self,
        cached: &CachedAccount,
        account: &AccountName,
        reported: Option<Generation>,
    ) -> Result<(), CallRefusal> {
        let (pool, id) = (self.pool.clone(), cached.id());
        let stored = self.runtime.spawn(async move {
            timeout(STORE_REPORT_TIMEOUT, leases::mark_possibly_revoked(&pool, id, reported)).await
        });
        match AbortOnDropHandle::new(stored).await {
            Ok(Ok(Ok(()))) => return Ok(()),
            Ok(Ok(Err(error))) => warn!(%account, %error, "a report cannot be stored"),
            Ok(Err(_)) => warn!(%account, "a report was not stored in time"),
            // The runtime shuts down, or the task panicked, which is logged.
            Err(_) => {}
        }
        Err(CallRefusal::DatabaseUnavailable { retry_after: STORE_REPORT_TIMEOUT })
    }

    /// Returns up to `limit` accounts, sorted by name and after the name `after`, that `caller` may list,
    /// and whether there are more. The accounts that are looked at count towards the caller's rate.
    ///
    /// # Errors
    /// [`CallRefusal::GrantsStale`].
    pub async fn list(
        &self,
        caller: &Caller,
        after: Option<&AccountName>,
        limit: usize,
    ) -> Result<(Vec<ListedAccount>, bool), CallRefusal> {
        self.check_grants_are_current()?;
        let mut page = list::Page::new(caller, after, limit, self.database_clock.now());
        let budget = self.rates.budget(caller);
        let mut examined = 0;
        while !page.is_complete() {
            let permit = budget.scan_permit().await;
            page.read_chunk(&self.cache);
            // If the call is dropped, its work has been counted.
            self.rates.charge(caller, page.examined() - examined, Instant::now());
            examined = page.examined();
            yield_now().await;
            drop(permit);
        }
        let (found, more) = page.finish();
        let now = self.clock.now();
        let listed = |snapshot: &Arc<_>| ListedAccount::new(snapshot, &self.policy, now);
        Ok((found.iter().map(listed).collect(), more))
    }

    /// Checks whether `caller` may watch `patterns`: a pattern selects among the accounts that the caller's
    /// grants cover; a plain name must be one of them. The patterns count towards the caller's rate.
    ///
    /// # Errors
    /// [`CallRefusal::GrantsStale`], and while no token may be served. For a plain name without a grant or without
    /// an account, as in [`TokenProvider::get_token`].
    pub async fn authorize_watch(
        &self,
        caller: &Caller,
        patterns: &[AccountPattern],
    ) -> Result<(), CallRefusal> {
        self.check_grants_are_current()?;
        if self.connectivity.current() == Connectivity::Unacknowledged {
            return Err(CallRefusal::DatabaseUnavailable { retry_after: STORE_REPORT_TIMEOUT });
        }
        self.rates.charge(caller, patterns.len(), Instant::now());
        let names_before_yield = MATCHES_BEFORE_YIELD / (caller.grants.len() + 1) + 1;
        for (nth, pattern) in patterns.iter().enumerate() {
            if nth % names_before_yield == names_before_yield - 1 {
                yield_now().await;
            }
            if let Some(name) = pattern.as_name() {
                self.authorize(caller, Right::Get, &name)?;
            }
        }
        Ok(())
    }

    /// Returns the caller of an open stream as it is now, with its present grants, if the credential that
    /// opened the stream is still accepted.
    ///
    /// # Errors
    /// [`CallRefusal::GrantsStale`], or [`CallRefusal::CredentialRefused`] once the credential has ended or
    /// was revoked, or the caller was disabled.
    pub fn reauthenticate(&self, credential: &CredentialKey) -> Result<Arc<Caller>, CallRefusal> {
        self.check_grants_are_current()?;
        let admitted = self.callers.authenticate(credential, self.database_clock.now());
        admitted.map_err(|_| CallRefusal::CredentialRefused)
    }

    /// Checks after a wait that the credential is still valid, and that its caller may still get `token` of
    /// `account`.
    ///
    /// # Errors
    /// The refusal that the caller is to read.
    pub fn authorize_again(
        &self,
        credential: &CredentialKey,
        account: &CachedAccount,
        token: &Token,
    ) -> Result<(), CallRefusal> {
        let caller = self.reauthenticate(credential)?;
        let now = self.database_clock.now();
        check_still_served(&caller, account, token.credential_version, now)
    }

    /// Returns how long a caller may reuse `token` before it asks again.
    #[must_use]
    pub fn reuse_for(&self, account: &AccountName, token: &Token) -> Duration {
        decide::reuse_for(account, token, &self.policy, self.clock.now())
    }

    /// Returns the account if a grant of `caller` covers it with `right`. Only then does the answer depend
    /// on whether the account exists.
    fn authorize(
        &self,
        caller: &Caller,
        right: Right,
        account: &AccountName,
    ) -> Result<Arc<CachedAccount>, CallRefusal> {
        self.check_grants_are_current()?;
        if !caller.permits(right, account, self.database_clock.now()) {
            return Err(CallRefusal::NotGranted);
        }
        self.cache.by_name(account).ok_or(CallRefusal::NoSuchAccount)
    }

    fn check_grants_are_current(&self) -> Result<(), CallRefusal> {
        if self.callers.is_current(self.clock.now(), self.max_staleness) {
            Ok(())
        } else {
            Err(CallRefusal::GrantsStale)
        }
    }
}

/// Checks after a wait that `caller` may still get the token of `account` that was issued with the credential of
/// `version`, at `now`, by the database's clock: the account still exists, is enabled and has that login. Another
/// account may have its name by now.
///
/// # Errors
/// [`CallRefusal::NotGranted`], and only with a grant [`CallRefusal::NoSuchAccount`],
/// [`CallRefusal::AccountDisabled`] or [`CallRefusal::TokenEnded`].
pub fn check_still_served(
    caller: &Caller,
    account: &CachedAccount,
    version: CredentialVersion,
    now: Timestamp,
) -> Result<(), CallRefusal> {
    let snapshot = account.snapshot();
    if !caller.permits(Right::Get, &snapshot.account.name, now) {
        Err(CallRefusal::NotGranted)
    } else if snapshot.removed {
        Err(CallRefusal::NoSuchAccount)
    } else if !snapshot.account.enabled {
        Err(CallRefusal::AccountDisabled)
    } else if !snapshot.account.has_login_of(version) {
        Err(CallRefusal::TokenEnded)
    } else {
        Ok(())
    }
}

fn acquire(
    permits: &Arc<KeyedSemaphore<CallerId>>,
    caller: &Caller,
) -> Result<KeyedPermit<CallerId>, CallRefusal> {
    permits.try_acquire(caller.id).ok_or(CallRefusal::Overloaded { retry_after: SHED_RETRY })
}
