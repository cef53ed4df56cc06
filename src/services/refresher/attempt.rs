//! One attempt to issue a token for one account, told in order: the permission is claimed, the upstream
//! called, the issue recorded, the token stored, and then shown to callers.
//!
//! The order makes it safe. The attempt is stamped before the call: if this process dies during the
//! call, the next attempt knows that a token may have been issued. A token is used only if its issue is
//! on record, and shown only after it was stored, so that no caller has a token that a restart would
//! forget.
//!
//! While the database does not answer, a replica that cannot collide with others issues too. It differs
//! in two steps: it claims by what the cache knows and stamps the attempt in the state directory, and
//! its token waits in [`PendingTokens`](super::PendingTokens) instead of being stored.

use std::{
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tracing::{debug, error, info, instrument, warn};

use super::{
    dependencies::{IssueInfrastructure, IssueSettings, IssueState},
    notify::notify_replicas,
    outage::OutageChange,
    reconcile::Reconciler,
    records,
};
use crate::{
    domain::{
        clock::{Clock, Timestamp, until_from},
        refresh_policy::{IssueDecision, IssueView, RefreshPolicy},
        refresh_state::{FailureClass, IssueAttempt, IssueFailure},
        token::{Generation, IssuedToken, SealedToken, Token},
    },
    services::{
        account_cache::{AccountSnapshot, CachedAccount},
        connectivity::Connectivity,
    },
    store::{
        leases::{self, Claim, FailedAttempt, Lease, LeaseHolder},
        tokens::{self, Commit, OrphanedToken},
        within,
    },
    telemetry::IssueResult,
    upstream::IssueError,
};

/// The pause after an attempt that the database, the journal or the state directory prevented.
const UNAVAILABLE_PAUSE: Duration = Duration::from_secs(1);
/// The longest time that the record of an issue may take to become durable; after it the token is
/// dropped.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest time that storing a token is tried for: less than what a lease lasts beyond a call.
const STORE_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause between two tries to store a token.
const STORE_RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Issues tokens, one attempt at a time for each account.
pub struct TokenIssuer {
    settings: IssueSettings,
    infrastructure: IssueInfrastructure,
    state: IssueState,
    reconciler: Reconciler,
}

/// What an attempt leaves to the planning of the account's next one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AttemptOutcome {
    /// The account's snapshot says when the next attempt is due.
    Done,
    /// The attempt could not be made. It is repeated no earlier than after this pause.
    RetryAfter(Duration),
}

/// The permission for one attempt.
enum Permission {
    /// The account's lease, which excludes every other replica.
    Lease(Box<Lease>),
    /// The database does not answer, and no other replica can collide with this one.
    SoleReplica {
        attempt: Box<IssueAttempt>,
        /// The generation of the stored token, as far as it was known.
        replaces: Option<Generation>,
    },
}

impl Permission {
    fn attempt(&self) -> &IssueAttempt {
        match self {
            Self::Lease(lease) => &lease.attempt,
            Self::SoleReplica { attempt, .. } => attempt,
        }
    }
}

impl TokenIssuer {
    /// Returns an issuer.
    #[must_use]
    pub fn new(
        settings: IssueSettings,
        infrastructure: IssueInfrastructure,
        state: IssueState,
    ) -> Self {
        let reconciler = Reconciler {
            pool: infrastructure.pool.clone(),
            clock: infrastructure.clock.clone(),
            loader: state.loader.clone(),
            connectivity: state.connectivity.clone(),
            pending: state.pending.clone(),
            instance: settings.holder.instance.clone(),
            new_token_ends_older: settings.new_token_ends_older,
        };
        Self { settings, infrastructure, state, reconciler }
    }

    pub(super) fn holder(&self) -> &LeaseHolder {
        &self.settings.holder
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.infrastructure.clock
    }

    pub(super) fn state(&self) -> &IssueState {
        &self.state
    }

    pub(super) fn reconciler(&self) -> &Reconciler {
        &self.reconciler
    }

    /// Returns when the next attempt for the account is due, which may have passed; `None` until
    /// something changes.
    ///
    /// Without the database, a sole replica issues only what cannot be put off, since the database may
    /// be back before that.
    pub(super) fn next_attempt_at(&self, snapshot: &AccountSnapshot) -> Option<Timestamp> {
        let policy = &self.settings.holder.policy;
        let at = policy.next_issue_at(&self.view(snapshot))?;
        match self.state.connectivity.current() {
            Connectivity::Connected => Some(at),
            Connectivity::SoleReplica => {
                let token = snapshot.token.as_deref();
                Some(at.max(RefreshPolicy::mandatory_refresh_at(&snapshot.refresh, token)))
            }
            Connectivity::Partitioned => None,
        }
    }

    fn view<'a>(&self, snapshot: &'a AccountSnapshot) -> IssueView<'a> {
        let AccountSnapshot { account, refresh, token, .. } = snapshot;
        let scheduled_at =
            self.settings.holder.policy.scheduled_at(&account.name, token.as_deref());
        IssueView::cached(account, refresh, scheduled_at, self.state.outage.ended_at())
    }

    /// Tries to replace the account's token. It does not fail: what went wrong is shown in the
    /// account's snapshot, in the audit log and in the metrics.
    ///
    /// Not cancel safe: if the future is dropped, a token that was just issued is lost. The next attempt
    /// knows that from the stamp.
    #[instrument(level = "debug", skip_all, fields(account = %entry.snapshot().account.name))]
    pub async fn attempt(&self, entry: &Arc<CachedAccount>) -> AttemptOutcome {
        // An issue that cannot be recorded must not be made.
        if !self.infrastructure.journal.is_writable() {
            return AttemptOutcome::RetryAfter(UNAVAILABLE_PAUSE);
        }
        let snapshot = entry.snapshot();
        // Another replica's token may have been loaded since the account was planned. The claim would
        // take that token for the one to be replaced.
        if self.next_attempt_at(&snapshot).is_none_or(|at| at > self.clock().now()) {
            return AttemptOutcome::Done;
        }
        let permission = match self.claim(entry, &snapshot).await {
            Ok(permission) => permission,
            Err(outcome) => return outcome,
        };
        let issued = match self.call_upstream(permission.attempt()).await {
            Ok(issued) => issued,
            Err(error) => return self.fail(entry, &permission, error).await,
        };
        let Some(token) = self.record(entry, &permission, issued).await else {
            // That a token may be out is known from the lease's attempt, which stays without an end. A
            // sole replica notes it itself.
            if let Permission::SoleReplica { .. } = permission {
                self.state.pending.mark_possibly_revoked(entry.id());
            }
            return AttemptOutcome::RetryAfter(UNAVAILABLE_PAUSE);
        };
        let stored = match self.store(entry, &permission, &token).await {
            Ok(stored) => stored,
            Err(outcome) => return outcome,
        };
        self.state.cache.update(entry, |before| before.with_token(&token, stored));
        info!(account = %snapshot.account.name, generation = %token.generation,
            expires_at = %token.expires_at, stored, "token issued");
        if stored {
            notify_replicas(&self.infrastructure.pool).await;
        }
        AttemptOutcome::Done
    }

    // 1. Claim.

    /// Gets the permission for the attempt, and shows callers that it is under way. Otherwise returns
    /// the outcome of the attempt, which ends here.
    async fn claim(
        &self,
        entry: &Arc<CachedAccount>,
        snapshot: &AccountSnapshot,
    ) -> Result<Permission, AttemptOutcome> {
        let permission = match self.state.connectivity.current() {
            Connectivity::Connected if self.state.pending.contains(entry.id()) => {
                // The token that the database does not have may be why the account seems due.
                let reconciled = self.reconciler.reconcile(entry.id()).await.unwrap_or(false);
                return Err(if reconciled {
                    AttemptOutcome::Done
                } else {
                    AttemptOutcome::RetryAfter(UNAVAILABLE_PAUSE)
                });
            }
            Connectivity::Connected => self.claim_lease(entry, snapshot).await?,
            Connectivity::SoleReplica => self.claim_as_sole_replica(snapshot).await?,
            // All accounts are planned again when the database answers.
            Connectivity::Partitioned => return Err(AttemptOutcome::Done),
        };
        let lost = matches!(&permission, Permission::Lease(lease) if lease.previous_attempt_lost);
        let (now, lease_duration) = (self.clock().now(), self.holder().lease_duration);
        self.state.cache.update(entry, |before| {
            before.with_attempt_started(permission.attempt(), lost, now, lease_duration)
        });
        Ok(permission)
    }

    /// Claims the account's lease, which stamps the attempt in the database.
    async fn claim_lease(
        &self,
        entry: &CachedAccount,
        snapshot: &AccountSnapshot,
    ) -> Result<Permission, AttemptOutcome> {
        // Not the cached token's generation: a load that a commit overtook leaves our newer token
        // beside an older refresh state, which may be all that makes the account due.
        let replaces = snapshot.refresh.stored_generation;
        let outage_ended =
            self.state.outage.ended_at().map(|at| until_from(at, self.clock().now()));
        let pool = &self.infrastructure.pool;
        let claim = leases::claim(pool, entry.id(), replaces, outage_ended, self.holder());
        match within(claim).await {
            Ok(Claim::Granted(lease)) => Ok(Permission::Lease(lease)),
            Ok(Claim::Paced(pause)) => Err(AttemptOutcome::RetryAfter(pause)),
            Ok(Claim::Wait(pause)) => {
                // Calls that wait for a token see what the database knows.
                self.reload(entry).await;
                Err(AttemptOutcome::RetryAfter(pause))
            }
            Ok(Claim::NotNeeded) => Err(self.reload(entry).await),
            Err(error) => {
                debug!(account = %snapshot.account.name, %error, "no lease can be claimed");
                Err(AttemptOutcome::RetryAfter(UNAVAILABLE_PAUSE))
            }
        }
    }

    /// Decides by what the cache knows, and stamps the attempt in the state directory: if this process
    /// is killed, the next one knows that the stored token is possibly revoked.
    async fn claim_as_sole_replica(
        &self,
        snapshot: &AccountSnapshot,
    ) -> Result<Permission, AttemptOutcome> {
        let AccountSnapshot { account, refresh, token, .. } = snapshot;
        let now = self.clock().now();
        let decision = self.settings.holder.policy.decide(&self.view(snapshot), now);
        let IssueDecision::Issue { credential_version, .. } = decision else {
            return Err(AttemptOutcome::Done);
        };
        let latest = token.as_ref().map(|token| token.generation).max(refresh.stored_generation);
        let generation = Generation::next(now, self.holder().replica, latest);
        let attempt = account.attempt(credential_version, generation);
        let attempt = Box::new(attempt.ok_or(AttemptOutcome::Done)?);
        if let Err(error) = self.state.pending.begin(account.id).await {
            error!(account = %account.name, %error,
                "no token can be issued without the database: the state directory cannot be written");
            return Err(AttemptOutcome::RetryAfter(UNAVAILABLE_PAUSE));
        }
        Ok(Permission::SoleReplica { attempt, replaces: refresh.stored_generation })
    }

    /// Loads the account from the database, so that it is planned by what the database knows.
    async fn reload(&self, entry: &CachedAccount) -> AttemptOutcome {
        match self.state.loader.load(&[entry.id().0]).await {
            Ok(()) => AttemptOutcome::Done,
            Err(error) => {
                let account = &entry.snapshot().account.name;
                warn!(%account, %error, "an account cannot be loaded");
                AttemptOutcome::RetryAfter(UNAVAILABLE_PAUSE)
            }
        }
    }

    // 2. Call.

    /// Calls the upstream with the attempt's credential, and notes whether the upstream answered.
    async fn call_upstream(&self, attempt: &IssueAttempt) -> Result<IssuedToken, IssueError> {
        let credential = &attempt.credential;
        let opened = self.infrastructure.keyring.open_secret(
            attempt.account,
            credential.version,
            credential.secret.bytes(),
        );
        let issued = match opened {
            Ok(secret) => self.infrastructure.upstream.issue(&attempt.client_id, &secret).await,
            Err(error) => Err(IssueError {
                class: FailureClass::Intake,
                code: None,
                message: format!("the stored secret does not open: {error}"),
                retry_after: None,
                may_have_issued: false,
            }),
        };
        let failure = issued.as_ref().err().map(|error| error.class);
        match self.state.outage.attempt_ended(attempt.account, failure, self.clock().now()) {
            OutageChange::None => {}
            OutageChange::Began => {
                warn!("the upstream is away: several accounts in a row failed alike");
            }
            OutageChange::Ended => info!("the upstream answers again"),
        }
        if let Some(skew) = issued.as_ref().ok().and_then(|issued| issued.skew_ms) {
            self.infrastructure.upstream_skew_ms.store(skew, Ordering::Relaxed);
        }
        issued
    }

    // 3. Record.

    /// Records the issue and returns its token. Returns `None` if the record did not become durable in
    /// time: it is still written as soon as possible, but the token is dropped, since nobody could say
    /// when that will be.
    async fn record(
        &self,
        entry: &CachedAccount,
        permission: &Permission,
        issued: IssuedToken,
    ) -> Option<Arc<Token>> {
        let attempt = permission.attempt();
        let now = self.clock().now();
        let token = Arc::new(Token {
            generation: attempt.generation,
            credential_version: attempt.credential.version,
            issued_at: now.min(issued.expires_at),
            expires_at: issued.expires_at,
            allowed_ip: issued.allowed_ip,
            fingerprint: self.infrastructure.keyring.fingerprint(&issued.access_token),
            access_token: issued.access_token,
        });
        let account = &entry.snapshot().account;
        let mut record = records::issued(account, &token, issued.skew_ms, now);
        if let Permission::SoleReplica { .. } = permission {
            record = record.with("database", "away");
        }
        if let Some(ip) = token.allowed_ip.as_deref().filter(|ip| !self.expects_egress(ip)) {
            warn!(account = %account.name, allowed_ip = %ip,
                "the token works only from an address that is not among the expected egress addresses");
            record = record.with("egress", "unexpected");
        }
        match self.infrastructure.journal.append(record).durable(RECORD_TIMEOUT).await {
            Ok(()) => Some(token),
            Err(error) => {
                error!(account = %account.name, %error,
                    "an issue cannot be recorded: its token is dropped");
                None
            }
        }
    }

    fn expects_egress(&self, ip: &str) -> bool {
        let expected = &self.settings.expected_egress;
        expected.is_empty()
            || ip.parse::<IpAddr>().is_ok_and(|ip| expected.iter().any(|net| net.contains(&ip)))
    }

    // 4. Store.

    /// Stores the token and returns `true`, or returns `false` if it is pending until the database
    /// answers. Otherwise returns the outcome of the attempt, since the token is not the account's.
    ///
    /// A pending token is served: it is the live one, whatever the database has. If this process ends
    /// before it is stored, a new one is issued, since the attempt has no recorded end.
    async fn store(
        &self,
        entry: &CachedAccount,
        permission: &Permission,
        token: &Token,
    ) -> Result<bool, AttemptOutcome> {
        let sealed = self.infrastructure.keyring.seal_token(
            entry.id(),
            token.generation,
            &token.access_token,
        );
        let token = SealedToken::new(token, sealed);
        let (result, replaces, under_lease) = match permission {
            Permission::Lease(lease) => match self.commit(lease, &token).await {
                Some(Commit::Stored) => {
                    self.infrastructure.metrics.issue(IssueResult::Issued);
                    return Ok(true);
                }
                Some(Commit::KeptLonger) => {
                    self.infrastructure.metrics.issue(IssueResult::Issued);
                    return Err(self.reload(entry).await);
                }
                Some(Commit::Fenced) => return Err(self.discard(entry, lease, &token).await),
                None => (IssueResult::NotStored, lease.replaces, true),
            },
            Permission::SoleReplica { replaces, .. } => (IssueResult::Issued, *replaces, false),
        };
        self.infrastructure.metrics.issue(result);
        self.state.pending.add(entry.id(), OrphanedToken { token, replaces, under_lease });
        Ok(false)
    }

    /// Commits the token, trying again for [`STORE_TIMEOUT`] while the database is connected; returns
    /// `None` if it could not be reached.
    async fn commit(&self, lease: &Lease, token: &SealedToken) -> Option<Commit> {
        let account = lease.attempt.account;
        let (pool, ends_older) = (&self.infrastructure.pool, self.settings.new_token_ends_older);
        let until = Instant::now() + STORE_TIMEOUT;
        loop {
            match within(tokens::commit(pool, lease, token, ends_older)).await {
                Ok(commit) => return Some(commit),
                // Callers may be waiting for the token: once the connection is known to be lost, they
                // are not kept waiting.
                Err(error)
                    if self.state.connectivity.current() == Connectivity::Connected
                        && Instant::now() < until =>
                {
                    warn!(%account, %error, "a token cannot be stored; trying again");
                    sleep(STORE_RETRY_PAUSE).await;
                }
                Err(error) => {
                    error!(%account, %error, "a token could not be stored; it is served, and stored later");
                    return None;
                }
            }
        }
    }

    /// Drops a token that was fenced off. Where new tokens end older ones, it may have ended the stored
    /// one.
    async fn discard(
        &self,
        entry: &CachedAccount,
        lease: &Lease,
        token: &SealedToken,
    ) -> AttemptOutcome {
        let account = &entry.snapshot().account.name;
        self.infrastructure.metrics.issue(IssueResult::Fenced);
        warn!(%account, generation = %token.generation,
            "a token came too late: the account has another lease or credential");
        let pool = &self.infrastructure.pool;
        // A changed credential must not wait until the lease expires.
        let released = within(leases::release(pool, lease)).await;
        let marked = if self.settings.new_token_ends_older {
            within(leases::mark_possibly_revoked(pool, entry.id(), None)).await
        } else {
            Ok(())
        };
        if let Err(error) = released.and(marked) {
            warn!(%account, %error, "it cannot be noted that a token came too late");
        }
        self.reload(entry).await
    }

    // Instead of 3 and 4, after a failure.

    /// Records the failure in the audit log and the metrics, stores it, and shows it.
    async fn fail(
        &self,
        entry: &Arc<CachedAccount>,
        permission: &Permission,
        error: IssueError,
    ) -> AttemptOutcome {
        let failed = self.record_failure(entry, permission.attempt(), error);
        let account = &entry.snapshot().account.name;
        match permission {
            Permission::Lease(lease) => {
                let recorded = leases::record_failure(&self.infrastructure.pool, lease, &failed);
                match within(recorded).await {
                    Ok(true) => {}
                    // Another replica has the lease by now: its result counts.
                    Ok(false) => return self.reload(entry).await,
                    Err(error) => {
                        warn!(%account, %error, "a failure cannot be stored; its lease will expire");
                    }
                }
            }
            Permission::SoleReplica { .. } if failed.possibly_revoked => {
                self.state.pending.mark_possibly_revoked(entry.id());
            }
            Permission::SoleReplica { .. } => self.state.pending.end(entry.id()),
        }
        let now = self.clock().now();
        self.state
            .cache
            .update(entry, |before| before.with_failure(permission.attempt(), &failed, now));
        AttemptOutcome::Done
    }

    /// Records the failure in the audit log and the metrics, and decides on the pause after it. The
    /// record need not be durable before the attempt goes on.
    fn record_failure(
        &self,
        entry: &CachedAccount,
        attempt: &IssueAttempt,
        error: IssueError,
    ) -> FailedAttempt {
        let snapshot = entry.snapshot();
        let name = &snapshot.account.name;
        self.infrastructure.metrics.issue(error.class.into());
        warn!(account = %name, class = error.class.as_str(), code = error.code.as_deref(),
            message = %error.message, "no token was issued");
        let record = records::failed(name, &error, self.clock().now());
        drop(self.infrastructure.journal.append(record));

        let retry_after = self.settings.holder.policy.pause_after_failure(
            name,
            error.class,
            snapshot.refresh.consecutive_failures + 1,
            error.retry_after,
            self.state.outage.pause_cap(),
        );
        FailedAttempt {
            failure: IssueFailure {
                class: error.class,
                code: error.code,
                message: error.message,
                version: attempt.credential.version,
            },
            retry_after,
            possibly_revoked: self.settings.new_token_ends_older && error.may_have_issued,
        }
    }
}
