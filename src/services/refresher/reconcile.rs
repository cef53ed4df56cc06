//! Stores the tokens that were issued while the database did not answer, or while an admin's transaction had
//! locked their accounts' rows.

use std::{sync::Arc, time::Duration};

use sqlx::PgPool;
use tracing::{debug, info, instrument, warn};

use super::{
    notify::notify_replicas,
    pending::{PendingIssue, PendingTokens},
};
use crate::{
    crypto::{LiveKeyring, RowBinding},
    domain::{account::AccountId, clock::Clock},
    services::{
        account_loader::AccountLoader,
        connectivity::{Connectivity, DatabaseConnectivity},
    },
    store::{
        StoreError, leases,
        tokens::{self, PendingToken, ReconcileContext, ReconcileOutcome},
        within,
    },
};

/// The pause between two rounds while tokens are pending.
const PAUSE: Duration = Duration::from_secs(1);

/// Stores pending tokens once the database answers.
pub(super) struct Reconciler {
    pub(super) pool: PgPool,
    pub(super) keyring: Arc<LiveKeyring>,
    pub(super) clock: Clock,
    pub(super) loader: Arc<AccountLoader>,
    pub(super) connectivity: Arc<DatabaseConnectivity>,
    pub(super) pending: Arc<PendingTokens>,
    /// The id of this instance. Its own leases do not delay reconciliation.
    pub(super) instance: String,
    pub(super) new_token_ends_older: bool,
    /// How long a lease lasts.
    pub(super) lease_duration: Duration,
}

impl Reconciler {
    /// Reconciles in a loop while tokens are pending. Never returns. Cancel safe: if the future is dropped,
    /// tokens that were not stored remain pending.
    pub(super) async fn run(&self) {
        loop {
            self.pending.wait_until_any().await;
            self.reconcile_all().await;
            // This is real time, since a test's clock may not move.
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Reconciles every account with pending tokens, except those that another transaction has locked. Stops
    /// at any other error, and if the database is not connected.
    pub(super) async fn reconcile_all(&self) {
        let mut reconciled = 0;
        for account in self.pending.accounts() {
            if self.connectivity.current() != Connectivity::Connected {
                break;
            }
            match self.reconcile(account).await {
                Ok(done) => reconciled += usize::from(done),
                Err(error @ StoreError::Locked(_)) => {
                    debug!(%account, %error, "a token cannot be stored yet");
                }
                Err(error) => {
                    warn!(%error, "pending tokens cannot be stored yet");
                    break;
                }
            }
        }
        if reconciled > 0 {
            info!(accounts = reconciled, "pending tokens are stored now");
            notify_replicas(&self.pool).await;
        }
    }

    /// Stores the pending state of the account in the database, and loads the account into the cache.
    /// Returns `false` if this must wait for the end of another replica's lease.
    ///
    /// # Errors
    /// Returns the database's error. The state remains pending, unless only loading failed.
    #[instrument(level = "debug", skip_all, fields(%account))]
    pub(super) async fn reconcile(&self, account: AccountId) -> Result<bool, StoreError> {
        let Some(issue) = self.pending.get(account) else { return Ok(true) };
        match &issue.token {
            None => within(leases::mark_possibly_revoked(&self.pool, account, None)).await?,
            Some(orphan) => {
                let result = self.store(account, orphan, &issue).await?;
                if result == ReconcileOutcome::LeaseHeld {
                    return Ok(false);
                }
            }
        }
        self.pending.reconciled(account, &issue).await;
        self.loader.load(&[account.0]).await?;
        Ok(true)
    }

    async fn store(
        &self,
        account: AccountId,
        orphan: &PendingToken,
        issue: &PendingIssue,
    ) -> Result<ReconcileOutcome, StoreError> {
        let context = ReconcileContext {
            instance: &self.instance,
            clock: &self.clock,
            lease_duration: self.lease_duration,
            possibly_revoked: issue.possibly_revoked,
            new_token_ends_older: self.new_token_ends_older,
        };
        // Another key may be the primary one by now. The keyring is kept until the token is stored, so that its
        // primary key counts as used.
        let keyring = self.keyring.current();
        let mut orphan = orphan.clone();
        let sealed = &mut orphan.token.sealed;
        if !keyring.is_sealed_with_primary(sealed) {
            let binding = RowBinding::token(account, orphan.token.generation);
            match keyring.reseal(&binding, sealed) {
                Ok(resealed) => *sealed = resealed,
                // It is stored as it is, and replaced by whoever loads it.
                Err(error) => warn!(%account, %error, "a pending token does not open"),
            }
        }
        let stored = tokens::reconcile(&self.pool, account, &orphan, context);
        let result = within(stored).await?;
        if result == ReconcileOutcome::Dropped {
            warn!(%account, generation = %orphan.token.generation,
                "a pending token is dropped: the account has another \
                 token or credential, or is gone");
        }
        Ok(result)
    }
}
