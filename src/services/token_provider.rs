//! The use case: who may, what is there, what to wait for. An answer never calls the upstream.

mod decide;
mod list;
mod refusal;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use decide::{Decision, decide, judge_report};
pub use decide::{ReportOutcome, TokenRequest};
pub use refusal::Refusal;
use sqlx::PgPool;
use tokio::{
    runtime::Handle,
    task::yield_now,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use crate::{
    domain::{
        account::AccountName,
        caller::{AccountPattern, Caller, CallerId, Right},
        clock::{Clock, Timestamp},
        refresh_policy::RefreshPolicy,
        refresh_state::AccountState,
        token::{Generation, Token},
    },
    services::{
        account_cache::{AccountCache, AccountSnapshot, CachedAccount},
        caller_directory::CallerDirectory,
        connectivity::DatabaseConnectivity,
        keyed_semaphore::{KeyedPermit, KeyedSemaphore},
        refresher::RefreshTrigger,
    },
    store::{callers::CredentialKey, leases},
};

/// When a call that is shed may come again: what others wait for is there by then, or is not to be had.
const SHED_FOR: Duration = Duration::from_secs(1);
/// How many times a pattern is held against a name before others on the same thread have their turn.
const LOOKS: usize = 10_000;
/// How long one look at the database for a report may take.
const REPORT_WITHIN: Duration = Duration::from_secs(2);

/// Answers callers. Cheap to clone.
#[derive(Clone)]
pub struct TokenProvider {
    /// The accounts.
    pub cache: Arc<AccountCache>,
    /// The callers.
    pub directory: Arc<CallerDirectory>,
    /// Time.
    pub clock: Clock,
    /// When tokens are replaced.
    pub policy: RefreshPolicy,
    /// How long grants are trusted without the database.
    pub max_staleness: Duration,
    /// Whether tokens can be issued without the database, while it is away.
    pub reach: Arc<DatabaseConnectivity>,
    /// The calls that may wait at once. Those that find a live token never do.
    pub waits: Arc<KeyedSemaphore<CallerId>>,
    /// The streams that may be open at once.
    pub streams: Arc<KeyedSemaphore<CallerId>>,
    /// Whom to wake when somebody waits.
    pub waker: RefreshTrigger,
    /// Where a report is noted, for all replicas.
    pub pool: PgPool,
    /// Where the pool's connections live. A call may be answered on another runtime.
    pub runtime: Handle,
}

/// An account as a caller may list it.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its name.
    pub name: AccountName,
    /// Where it stands.
    pub state: AccountState,
    /// Its token's times and generation, without the token.
    pub token: Option<(Timestamp, Timestamp, Generation)>,
    /// When the upstream is called next.
    pub next_attempt_at: Option<Timestamp>,
}

impl TokenProvider {
    /// The account's token for `caller`, as `ask` wants it; waits up to `deadline`.
    ///
    /// # Errors
    /// The [`Refusal`] to be told.
    pub async fn get_token(
        &self,
        caller: &Caller,
        account: &AccountName,
        ask: TokenRequest,
        deadline: Instant,
    ) -> Result<Arc<Token>, Refusal> {
        let slot = self.permitted(caller, Right::Get, account)?;
        slot.note_request(self.clock.now());
        // Armed before the look, so that no change falls between the look and the wait.
        let mut changes = None;
        let mut place = None;
        loop {
            let standing = self.reach.standing();
            match decide(&slot.view(), &ask, &self.policy, standing, self.clock.now()) {
                Decision::Serve(token) => return Ok(token),
                Decision::Refuse(refusal) => return Err(refusal),
                Decision::Wait => {}
            }
            if place.is_none() {
                place = Some(place_of(&self.waits, caller)?);
            }
            let Some((changes, reach)) = &mut changes else {
                changes = Some((slot.changes(), self.reach.changes()));
                self.waker.wake(slot.id());
                continue;
            };
            tokio::select! {
                _ = changes.changed() => {}
                _ = reach.changed() => {}
                () = sleep_until(deadline) => return self.too_late(&slot, &ask),
            }
        }
    }

    /// A place for a stream of `caller`, which lasts as long as it.
    ///
    /// # Errors
    /// [`Refusal::Overloaded`] when there is none.
    pub fn stream(&self, caller: &Caller) -> Result<KeyedPermit<CallerId>, Refusal> {
        place_of(&self.streams, caller)
    }

    /// What to say at the deadline: a live token that is not what was asked for in time to live is
    /// still better than none.
    fn too_late(&self, slot: &CachedAccount, ask: &TokenRequest) -> Result<Arc<Token>, Refusal> {
        let now = self.clock.now();
        match slot.view().live(now) {
            Some(token) if token.generation > ask.newer_than => Ok(token.clone()),
            _ => Err(Refusal::DeadlineExceeded),
        }
    }

    /// Takes a caller's report that the upstream refused `generation` of the account's token.
    ///
    /// # Errors
    /// The [`Refusal`] to be told.
    pub async fn report(
        &self,
        caller: &Caller,
        account: &AccountName,
        generation: u64,
        upstream_code: &str,
    ) -> Result<ReportOutcome, Refusal> {
        let slot = self.permitted(caller, Right::Report, account)?;
        let now = self.clock.now();
        let view = slot.view();
        if !view.account.enabled {
            return Err(Refusal::AccountDisabled);
        }
        let outcome = judge_report(&view, generation, upstream_code, &self.policy, now);
        if !matches!(outcome, ReportOutcome::Reissuing { noted: false, .. }) {
            return Ok(outcome);
        }
        let reported = view.token.as_ref().map(|token| token.generation);
        let (pool, id) = (self.pool.clone(), slot.id());
        let note = self.runtime.spawn(async move {
            timeout(REPORT_WITHIN, leases::suspect(&pool, id, reported)).await
        });
        match AbortOnDropHandle::new(note).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => {
                warn!(%account, %error, "a report cannot be noted");
                return Err(Refusal::DatabaseUnavailable { retry_after: REPORT_WITHIN });
            }
            // No answer in time, or the runtime ends.
            Ok(Err(_)) | Err(_) => {
                return Err(Refusal::DatabaseUnavailable { retry_after: REPORT_WITHIN });
            }
        }
        self.cache.update(&slot, |view| {
            let mut view = view.clone();
            // A successor that came meanwhile was not reported.
            view.progress.suspect |=
                view.token.as_ref().is_some_and(|token| token.generation.as_u64() == generation);
            view
        });
        self.waker.wake(slot.id());
        Ok(outcome)
    }

    /// Up to `limit` accounts after `after` that `caller` may list, by name, and whether there are
    /// more.
    ///
    /// # Errors
    /// [`Refusal::GrantsStale`].
    pub fn list(
        &self,
        caller: &Caller,
        after: Option<&AccountName>,
        limit: usize,
    ) -> Result<(Vec<Listed>, bool), Refusal> {
        self.trust_grants()?;
        let now = self.clock.now();
        let (found, more) = list::page(&self.cache, caller, after, limit, now);
        Ok((found.iter().map(|view| self.listed(view, now)).collect(), more))
    }

    fn listed(&self, view: &AccountSnapshot, now: Timestamp) -> Listed {
        let token = view.token.as_deref();
        Listed {
            name: view.account.name.clone(),
            state: view.state(now),
            token: token.map(|token| (token.issued_at, token.expires_at, token.generation)),
            next_attempt_at: self
                .policy
                .next_attempt(&view.account, &view.progress, token)
                .map(|at| at.max(now)),
        }
    }

    /// The accounts that `patterns` mean for `caller` at this moment.
    ///
    /// # Errors
    /// For a plain name without a grant or without an account, as [`TokenProvider::get_token`] has them; a
    /// pattern is silently limited to what the caller may have.
    pub async fn watched(
        &self,
        caller: &Caller,
        patterns: &[AccountPattern],
    ) -> Result<Vec<Arc<CachedAccount>>, Refusal> {
        self.trust_grants()?;
        let mut named = BTreeMap::new();
        let mut wild = Vec::new();
        for pattern in patterns {
            match pattern.as_name() {
                Some(name) => {
                    let slot = self.permitted(caller, Right::Get, &name)?;
                    named.insert(slot.id(), slot);
                }
                None => wild.push(pattern),
            }
        }
        if !wild.is_empty() {
            let now = self.clock.now();
            let between = LOOKS.div_ceil(wild.len());
            for (nth, slot) in self.cache.slots().into_iter().enumerate() {
                if nth % between == between - 1 {
                    yield_now().await;
                }
                let name = &slot.view().account.name;
                let meant = wild.iter().any(|pattern| pattern.matches(name.as_str()));
                if meant && caller.permits(Right::Get, name, now) {
                    named.insert(slot.id(), slot.clone());
                }
            }
        }
        Ok(named.into_values().collect())
    }

    /// The caller as it is now, for a stream that outlives a change of its grants or the end of the
    /// credential that it was opened with.
    ///
    /// # Errors
    /// [`Refusal::GrantsStale`], or [`Refusal::CredentialRefused`] once the credential is of no use.
    pub fn still_admitted(&self, proof: &CredentialKey) -> Result<Arc<Caller>, Refusal> {
        self.trust_grants()?;
        let admitted = self.directory.authenticate(proof, self.clock.now());
        admitted.map_err(|_| Refusal::CredentialRefused)
    }

    /// How long `token` may be kept before asking again.
    #[must_use]
    pub fn reuse_for(&self, account: &AccountName, token: &Token) -> Duration {
        decide::reuse_for(account, token, &self.policy, self.clock.now())
    }

    /// The account, if a grant of `caller` covers it. Whether it exists is told only then.
    fn permitted(
        &self,
        caller: &Caller,
        right: Right,
        account: &AccountName,
    ) -> Result<Arc<CachedAccount>, Refusal> {
        self.trust_grants()?;
        if !caller.permits(right, account, self.clock.now()) {
            return Err(Refusal::NotGranted);
        }
        self.cache.named(account).ok_or(Refusal::NoSuchAccount)
    }

    fn trust_grants(&self) -> Result<(), Refusal> {
        if self.directory.is_current(self.clock.now(), self.max_staleness) {
            Ok(())
        } else {
            Err(Refusal::GrantsStale)
        }
    }
}

fn place_of(
    places: &Arc<KeyedSemaphore<CallerId>>,
    caller: &Caller,
) -> Result<KeyedPermit<CallerId>, Refusal> {
    places.take(caller.id).ok_or(Refusal::Overloaded { retry_after: SHED_FOR })
}
