//! The steps of one attempt to issue a token for one account, in this order: claim a permission, call the
//! upstream, record the issue in the audit journal, store the token, and put it into the cache.
//!
//! The order matters. The start of the attempt is stored before the call, so if this process dies during
//! the call, the next attempt sees that a token may have been issued. A token is used only after its issue
//! was recorded. It is stored before it is served, so that a restart does not lose a token that a caller
//! has. A token that cannot be stored, under a lease or without the database, is served all the same, since
//! the upstream may have ended the older one; it is kept in [`PendingTokens`](super::PendingTokens) until it
//! is stored.
//!
//! While the database does not answer, a sole replica issues without it. Two steps differ then: the
//! decision is made from the cache and the start of the attempt is stored in the state directory, and the
//! token is pending from the start.

mod failed_attempt;
mod repeated;
mod storing;

use std::{
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tracing::{debug, error, info, instrument, warn};

use super::{
    dependencies::{IssueInfrastructure, IssueSettings, IssueState},
    notify::notify_replicas,
    outage::{AttemptHistory, FailingAccounts, OutageChange},
    reconcile::Reconciler,
    records,
};
use crate::{
    audit::record::Event,
    domain::{
        account::CredentialVersion,
        clock::{Clock, Timestamp, until_from},
        refresh_policy::{IssueDecision, IssueView, RefreshPolicy},
        refresh_state::{FailureClass, IssueAttempt},
        token::{Generation, IssuedToken, Token},
    },
    services::{
        account_cache::{AccountSnapshot, CachedAccount},
        connectivity::Connectivity,
    },
    store::{
        leases::{self, Claim, Lease, LeaseHolder},
        within,
    },
    upstream::IssueError,
};

/// The pause after an attempt that the database, the journal or the state directory prevented.
const UNAVAILABLE_PAUSE: Duration = Duration::from_secs(1);
/// How long the record of an issue may take to become durable. After that, the token is dropped.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long after the start of a claim the upstream is called at the latest. With the time that storing a
/// token takes, it is less than the time that a lease lasts beyond a call.
const LATEST_CALL: Duration = Duration::from_secs(8);
/// Issues tokens, one attempt at a time for each account.
pub struct TokenIssuer {
    settings: IssueSettings,
    infrastructure: IssueInfrastructure,
    state: IssueState,
    reconciler: Reconciler,
}

/// The outcome of an attempt, as far as scheduling the account's next one needs it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum AttemptOutcome {
    /// The next attempt is due as the account's snapshot says.
    Done,
    /// The attempt could not be completed. The next one starts after this pause at the earliest.
    RetryAfter(Duration),
}

/// The permission for one attempt.
enum Permission {
    /// The account's lease, which excludes every other replica.
    Lease(Box<Lease>),
    /// The database does not answer, and no other replica's tokens are affected.
    SoleReplica {
        attempt: Box<IssueAttempt>,
        /// The generation of the stored token, by the cache.
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
            keyring: infrastructure.keyring.clone(),
            clock: infrastructure.clock.clone(),
            loader: state.loader.clone(),
            connectivity: state.connectivity.clone(),
            pending: state.pending.clone(),
            instance: settings.holder.instance.clone(),
            new_token_ends_older: settings.new_token_ends_older,
            lease_duration: settings.holder.lease_duration,
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

    /// Returns when the next attempt for the account is due, which may have passed, and with which credential;
    /// `None` if none is due until the account or the connectivity changes.
    ///
    /// Without the database, a sole replica waits until the refresh is mandatory, since the database may
    /// answer again before that.
    pub(super) fn next_attempt(
        &self,
        snapshot: &AccountSnapshot,
    ) -> Option<(Timestamp, CredentialVersion)> {
        let earliest = self.settings.holder.policy.earliest_issue(&self.view(snapshot))?;
        let at = match self.state.connectivity.current() {
            Connectivity::Connected => earliest.at,
            Connectivity::SoleReplica => {
                let token = snapshot.token.as_deref();
                earliest.at.max(RefreshPolicy::mandatory_refresh_at(&snapshot.refresh, token))
            }
            Connectivity::Partitioned | Connectivity::Unacknowledged => return None,
        };
        Some((at, earliest.credential_version))
    }

    /// Begins with the outage that an earlier process left, if most accounts fail at the start.
    pub(super) fn resume_outage(&self) {
        self.state.outage.resume(&self.failing_accounts(), self.clock().now());
    }

    fn failing_accounts(&self) -> FailingAccounts {
        let accounts = self.state.cache.all();
        let classes = accounts
            .iter()
            .filter_map(|entry| entry.snapshot().refresh.failure.as_ref().map(|it| it.class))
            .filter(|class| class.is_transient())
            .collect();
        FailingAccounts { classes, of: accounts.len() }
    }

    pub(super) fn view<'a>(&self, snapshot: &'a AccountSnapshot) -> IssueView<'a> {
        let AccountSnapshot { account, refresh, token, .. } = snapshot;
        let scheduled_at =
            self.settings.holder.policy.scheduled_at(&account.name, token.as_deref());
        IssueView::cached(account, refresh, scheduled_at, self.state.outage.ended_at())
            .repeating_until(token.as_deref().and_then(Token::repeats_until))
    }

    /// Tries to replace the account's token. Errors are not returned: a failure is shown in the account's
    /// snapshot, in the audit log and in the metrics.
    ///
    /// Not cancel safe: if the future is dropped, a token that was just issued is lost. The next attempt
    /// sees then that this one was started and has no end.
    #[instrument(level = "debug", skip_all, fields(account = %entry.snapshot().account.name))]
    pub async fn attempt(&self, entry: &Arc<CachedAccount>) -> AttemptOutcome {
        // An issue that cannot be recorded must not be made.
        if !self.infrastructure.journal.is_writable() {
            return AttemptOutcome::RetryAfter(UNAVAILABLE_PAUSE);
        }
        let snapshot = entry.snapshot();
        // Another replica's token may have been loaded since the account was scheduled. Without this
        // check, the claim would replace that token.
        let due = self.next_attempt(&snapshot).filter(|(at, _)| *at <= self.clock().now());
        let Some((_, version)) = due else { return AttemptOutcome::Done };
        let began = self.clock().now();
        let permission = match self.claim(entry, &snapshot, version).await {
            Ok(permission) => permission,
            Err(outcome) => return outcome,
        };
        if let Permission::Lease(lease) = &permission
            && until_from(began, self.clock().now()) > LATEST_CALL
        {
            return self.give_up(entry, lease).await;
        }
        let view = self.view(&snapshot);
        let history = AttemptHistory::of(view.priority_class(version), view.failures(version));
        let issued = match self.call_upstream(permission.attempt(), history).await {
            Ok(issued) => issued,
            Err(error) => return self.fail(entry, &permission, error).await,
        };
        if let Some(outcome) = self.keep_repeated(entry, &permission, &issued).await {
            return outcome;
        }
        let Some(token) = self.record(entry, &permission, issued).await else {
            // Under a lease, the attempt has no recorded end, which means that a token may have been
            // issued. Without a lease, it must be marked here.
            match &permission {
                Permission::Lease(lease) => {
                    self.end_call(lease).await;
                    // The lease may have been superseded by now, and then another attempt is the last one.
                    if self.settings.new_token_ends_older {
                        self.mark_possibly_revoked(entry).await;
                    }
                }
                Permission::SoleReplica { .. } => {
                    self.state.pending.mark_possibly_revoked(entry.id());
                }
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

    /// Returns the permission for the attempt, after the snapshot shows that it is under way. If there is
    /// none, the attempt ends, and its outcome is returned.
    async fn claim(
        &self,
        entry: &Arc<CachedAccount>,
        snapshot: &AccountSnapshot,
        version: CredentialVersion,
    ) -> Result<Permission, AttemptOutcome> {
        let permission = match self.state.connectivity.current() {
            Connectivity::Connected if self.state.pending.contains(entry.id()) => {
                // The account may seem due only because the database lacks the pending token.
                let reconciled = self.reconciler.reconcile(entry.id()).await.unwrap_or(false);
                return Err(if reconciled {
                    AttemptOutcome::Done
                } else {
                    AttemptOutcome::RetryAfter(UNAVAILABLE_PAUSE)
                });
            }
            Connectivity::Connected => self.claim_lease(entry, snapshot, version).await?,
            Connectivity::SoleReplica => self.claim_as_sole_replica(snapshot).await?,
            // All accounts are rescheduled when the database answers.
            Connectivity::Partitioned | Connectivity::Unacknowledged => {
                return Err(AttemptOutcome::Done);
            }
        };
        let lost = matches!(&permission, Permission::Lease(lease) if lease.previous_attempt_lost);
        let (now, lease_duration) = (self.clock().now(), self.holder().lease_duration);
        self.state.cache.update(entry, |before| {
            before.with_attempt_started(permission.attempt(), lost, now, lease_duration)
        });
        Ok(permission)
    }

    /// Claims the account's lease, which stores the start of the attempt in the database.
    async fn claim_lease(
        &self,
        entry: &CachedAccount,
        snapshot: &AccountSnapshot,
        version: CredentialVersion,
    ) -> Result<Permission, AttemptOutcome> {
        // This is not the generation of the cached token. If a token was committed during a load, the
        // cache keeps the newer token beside the older refresh state, by which the account may seem due.
        let replaces = snapshot.refresh.stored_generation;
        let outage_ended =
            self.state.outage.ended_at().map(|at| until_from(at, self.clock().now()));
        let pool = &self.infrastructure.pool;
        let credential = Some(version);
        let claim =
            leases::claim(pool, entry.id(), replaces, credential, outage_ended, self.holder());
        match within(claim).await {
            Ok(Claim::Granted(lease)) => Ok(Permission::Lease(lease)),
            Ok(Claim::Paced(pause)) => Err(AttemptOutcome::RetryAfter(pause)),
            Ok(Claim::Wait(pause)) => {
                // Calls that wait for a token get the state in the database. The pause is the same
                // whether loading succeeds or not.
                let _ = self.reload(entry).await;
                Err(AttemptOutcome::RetryAfter(pause))
            }
            Ok(Claim::NotNeeded) => Err(self.reload(entry).await),
            Err(error) => {
                debug!(account = %snapshot.account.name, %error, "no lease can be claimed");
                Err(AttemptOutcome::RetryAfter(UNAVAILABLE_PAUSE))
            }
        }
    }

    /// Decides from the cached account, and stores the start of the attempt in the state directory. If this
    /// process is killed, the next one reads there that the stored token is possibly revoked.
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
        // Generations under leases are by the database's clock. One by another clock that is ahead could outrank
        // all that follow.
        let database_now = self.infrastructure.database_clock.now();
        let generation = Generation::next(database_now, self.holder().replica, latest);
        let attempt = account.attempt(credential_version, generation);
        let attempt = Box::new(attempt.ok_or(AttemptOutcome::Done)?);
        if let Err(error) = self.state.pending.begin(account.id).await {
            error!(account = %account.name, %error,
                "no token can be issued without the database: the state directory cannot be written");
            return Err(AttemptOutcome::RetryAfter(UNAVAILABLE_PAUSE));
        }
        Ok(Permission::SoleReplica { attempt, replaces: refresh.stored_generation })
    }

    /// Loads the account from the database into the cache.
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

    /// Calls the upstream with the attempt's credential, and updates whether the upstream is in an outage.
    /// `history` is the account's before the attempt.
    async fn call_upstream(
        &self,
        attempt: &IssueAttempt,
        history: AttemptHistory,
    ) -> Result<IssuedToken, IssueError> {
        let credential = &attempt.credential;
        let opened = self.infrastructure.keyring.current().open_secret(
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
        let (outage, now) = (&self.state.outage, self.clock().now());
        let failing = || self.failing_accounts();
        match outage.attempt_ended(attempt.account, history, failure, failing, now) {
            OutageChange::None => {}
            OutageChange::Began => {
                warn!("an outage of the upstream began: it failed for several accounts in a row");
            }
            OutageChange::Ended => info!("the outage of the upstream ended: it answers again"),
        }
        if let Some(skew) = issued.as_ref().ok().and_then(|issued| issued.skew_ms) {
            self.infrastructure.upstream_skew_ms.store(skew, Ordering::Relaxed);
        }
        issued
    }

    // 3. Record.

    /// Records the issue in the audit journal and returns its token. Returns `None` if the record did not
    /// become durable in time. The journal still writes the record as soon as it can, but the token is
    /// dropped, since a token must not be served before its issue is recorded.
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
            fingerprint: self.infrastructure.keyring.current().fingerprint(&issued.access_token),
            access_token: issued.access_token,
            repeated_at: None,
        });
        let account = &entry.snapshot().account;
        let event = Event::TokenIssued;
        let mut record = records::issued(event, account, &token, issued.skew_ms, self.clock());
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
}
