//! The fourth step of an attempt: the token is stored under the attempt's lease, is pending until that is possible, or
//! is dropped because the lease was superseded. Also how an attempt ends without a call or without a result.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{debug, error, warn};

use super::{AttemptOutcome, Permission, TokenIssuer};
use crate::{
    domain::token::{SealedToken, Token},
    services::{account_cache::CachedAccount, connectivity::Connectivity},
    store::{
        StoreError,
        leases::{self, Lease},
        tokens::{self, CommitOutcome, PendingToken},
        within,
    },
    telemetry::IssueResult,
};

/// How long storing a token is retried. It is less than the time that a lease lasts beyond a call.
const STORE_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause between two tries to store a token.
const STORE_RETRY_PAUSE: Duration = Duration::from_millis(500);

impl TokenIssuer {
    /// Stores the token and returns `true`, or returns `false` if it is pending until the database answers or
    /// another transaction releases its lock. If the token was not accepted as the account's token, the attempt ends, and its outcome is
    /// returned.
    ///
    /// A pending token is served, since the upstream may have ended the stored one. If this process ends
    /// before the token is stored, the next one issues a new token, since the attempt has no recorded end in
    /// the database, or is in the log of the state directory.
    pub(super) async fn store(
        &self,
        entry: &CachedAccount,
        permission: &Permission,
        token: &Token,
    ) -> Result<bool, AttemptOutcome> {
        // It is kept until the token is stored, so that its primary key counts as used.
        let keyring = self.infrastructure.keyring.current();
        let sealed = keyring.seal_token(entry.id(), token.generation, &token.access_token);
        let token = SealedToken::new(token, sealed);
        let (result, replaces, under) = match permission {
            Permission::Lease(lease) => match self.commit(lease, &token).await {
                Some(CommitOutcome::Stored) => {
                    self.infrastructure.metrics.issue(IssueResult::Issued);
                    return Ok(true);
                }
                Some(CommitOutcome::StoredLivesLonger) => {
                    self.infrastructure.metrics.issue(IssueResult::Issued);
                    return Err(self.reload(entry).await);
                }
                Some(CommitOutcome::Fenced) => {
                    return Err(self.discard(entry, lease, &token).await);
                }
                None => {
                    self.end_call(lease).await;
                    (IssueResult::NotStored, lease.replaces, Some(lease.key()))
                }
            },
            Permission::SoleReplica { replaces, .. } => (IssueResult::Issued, *replaces, None),
        };
        self.infrastructure.metrics.issue(result);
        self.state.pending.add(entry.id(), PendingToken { token, replaces, lease: under });
        Ok(false)
    }

    /// Commits the token, and retries after errors for [`STORE_TIMEOUT`] while the database is connected.
    /// Returns `None` if all tries failed; the last one may have stored the token. A lock that is held for
    /// long is not waited for: callers need the token now, and other accounts need this attempt's place.
    async fn commit(&self, lease: &Lease, token: &SealedToken) -> Option<CommitOutcome> {
        let account = lease.attempt.account;
        let (pool, ends_older) = (&self.infrastructure.pool, self.settings.new_token_ends_older);
        let until = Instant::now() + STORE_TIMEOUT;
        loop {
            match within(tokens::commit(pool, lease, token, ends_older, self.clock())).await {
                Ok(commit) => return Some(commit),
                Err(error @ StoreError::Locked(_)) => {
                    warn!(%account, %error, "a token is served, and stored once the lock is released");
                    return None;
                }
                // Callers may be waiting for the token, so do not retry once the connection is known to
                // be lost.
                Err(error)
                    if self.state.connectivity.current() == Connectivity::Connected
                        && Instant::now() < until =>
                {
                    warn!(%account, %error, "a token cannot be stored yet; retrying");
                    sleep(STORE_RETRY_PAUSE).await;
                }
                Err(error) => {
                    error!(%account, %error, "a token could not be stored; it is served, and stored later");
                    return None;
                }
            }
        }
    }

    /// Stores that the call under `lease` has ended, so that other accounts can be called for.
    pub(super) async fn end_call(&self, lease: &Lease) {
        if self.state.connectivity.current() != Connectivity::Connected {
            return;
        }
        if let Err(error) = within(leases::end_call(&self.infrastructure.pool, lease)).await {
            debug!(account = %lease.attempt.account, %error,
                "an ended call counts until its lease expires");
        }
    }

    /// Gives back a lease without a call: the process was paused since the claim, and the lease might end
    /// before the call does. Then another replica could issue at the same time.
    pub(super) async fn give_up(&self, entry: &CachedAccount, lease: &Lease) -> AttemptOutcome {
        let account = &entry.snapshot().account.name;
        warn!(%account, "this process was paused after a claim, so the upstream is not called");
        if let Err(error) = within(leases::release(&self.infrastructure.pool, lease)).await {
            debug!(%account, %error, "a lease that is not used ends by itself");
        }
        self.reload(entry).await
    }

    /// Drops a token that came after its lease was superseded, and releases the lease. If the upstream ends
    /// older tokens, the stored one is marked as possibly revoked.
    async fn discard(
        &self,
        entry: &CachedAccount,
        lease: &Lease,
        token: &SealedToken,
    ) -> AttemptOutcome {
        let account = &entry.snapshot().account.name;
        self.infrastructure.metrics.issue(IssueResult::Fenced);
        warn!(%account, generation = %token.generation,
            "a token was dropped: the account has another lease or credential by now");
        let pool = &self.infrastructure.pool;
        // A changed credential must not have to wait until the lease expires.
        if let Err(error) = within(leases::release(pool, lease)).await {
            warn!(%account, %error, "cannot store in the database that a token was dropped");
            self.end_call(lease).await;
        }
        if self.settings.new_token_ends_older {
            self.mark_possibly_revoked(entry).await;
        }
        self.reload(entry).await
    }

    /// Marks the account's stored token as possibly revoked, at once or when the database takes it: this attempt
    /// may have issued a token after the attempt under a later lease did.
    pub(super) async fn mark_possibly_revoked(&self, entry: &CachedAccount) {
        let pool = &self.infrastructure.pool;
        let marked = within(leases::mark_possibly_revoked(pool, entry.id(), None)).await;
        if let Err(error) = marked {
            let account = &entry.snapshot().account.name;
            warn!(%account, %error, "cannot store yet that a token may have been revoked");
            self.state.pending.mark_possibly_revoked(entry.id());
        }
    }
}
