//! An attempt under a lease: claimed, recorded, stored, shown.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};
use tracing::{debug, error, info, warn};

use super::{
    Issuing, Outcome,
    attempt::{AWAY, Under},
    unstored::Issued,
};
use crate::{
    domain::token::Token,
    services::{
        account_cache::{AccountSnapshot, CachedAccount},
        connectivity::Connectivity,
    },
    store::{
        leases::{self, Claim, Lease},
        tokens::{self, Commit},
        within,
    },
    telemetry::IssueResult,
    upstream::IssueError,
};

/// How long to try to store a token that was issued: less than what a lease lasts beyond an attempt.
const STORE_WITHIN: Duration = Duration::from_secs(10);
/// The pause between two tries.
const STORE_AGAIN: Duration = Duration::from_millis(500);

impl Issuing {
    pub(super) async fn attempt_by_lease(
        &self,
        slot: &Arc<CachedAccount>,
        view: &AccountSnapshot,
    ) -> Outcome {
        // Not the token's generation: a load that a commit overtook leaves our newer token beside
        // older progress, which may be all that makes it due.
        let known = view.progress.stored_generation;
        let over = self.outage_over(view);
        let claimed = leases::claim(&self.pool, slot.id(), known, over, &self.claimant);
        let claimed = within(claimed).await;
        let lease = match claimed {
            Ok(Claim::Granted(lease)) => *lease,
            Ok(Claim::Paced(pause)) => return Outcome::NotBefore(pause),
            Ok(Claim::Wait(pause)) => {
                // Whoever waits for a token hears what the database knows.
                self.reload(slot).await;
                return Outcome::NotBefore(pause);
            }
            Ok(Claim::NotNeeded) => return self.reload(slot).await,
            Err(error) => {
                debug!(account = %view.account.name, %error, "no lease can be claimed");
                return Outcome::NotBefore(AWAY);
            }
        };
        self.show_attempt(slot, &lease.attempt, lease.lost_attempt);
        match self.issue(slot, &lease.attempt, Under::Lease).await {
            Ok(Some(token)) => self.keep(slot, &lease, token).await,
            // The attempt has no end, so the next claim knows that a token may be out.
            Ok(None) => Outcome::NotBefore(AWAY),
            Err(error) => self.fail(slot, &lease, error).await,
        }
    }

    /// Stores and shows a new token, in this order: no caller may see one that a restart would
    /// forget.
    async fn keep(&self, slot: &Arc<CachedAccount>, lease: &Lease, token: Arc<Token>) -> Outcome {
        let stored = match self.store(lease, &token).await {
            Some(Commit::Stored) => {
                self.metrics.issue(IssueResult::Issued);
                true
            }
            Some(Commit::KeptLonger) => {
                self.metrics.issue(IssueResult::Issued);
                return self.reload(slot).await;
            }
            Some(Commit::Fenced) => {
                self.metrics.issue(IssueResult::Fenced);
                warn!(account = %slot.view().account.name, generation = %token.generation,
                    "a token came too late: the account has another lease or credential");
                return self.fenced(slot, lease).await;
            }
            // It is the live one, whatever the database knows: it is served, and stored later. The
            // attempt has no end there, so a restart before that issues anew.
            None => {
                self.metrics.issue(IssueResult::NotStored);
                let replaces = lease.replaces;
                let issued = Issued { token: token.clone(), replaces, leased: true };
                self.unstored.issued(slot.id(), issued);
                false
            }
        };
        self.show_token(slot, &token, stored);
        info!(account = %slot.view().account.name, generation = %token.generation,
            expires_at = %token.expires_at, "token issued");
        if stored {
            self.tell_the_others().await;
        }
        Outcome::Done
    }

    /// Stores the token, trying again for [`STORE_WITHIN`]; `None` when the database stayed away.
    /// Storing the same generation twice is the same as once.
    async fn store(&self, lease: &Lease, token: &Token) -> Option<Commit> {
        let account = lease.attempt.account;
        let new = self.sealed(account, token);
        let until = Instant::now() + STORE_WITHIN;
        loop {
            match within(tokens::commit(&self.pool, lease, &new, self.ends_older)).await {
                Ok(commit) => return Some(commit),
                // Callers may be waiting for it.
                Err(error)
                    if self.reach.standing() == Connectivity::Connected
                        && Instant::now() < until =>
                {
                    warn!(%account, %error, "a token cannot be stored; trying again");
                    sleep(STORE_AGAIN).await;
                }
                Err(error) => {
                    error!(%account, %error, "a token could not be stored; it is served, and stored later");
                    return None;
                }
            }
        }
    }

    /// A token was issued but is not the account's: where new tokens end older ones, the stored one
    /// may be dead.
    async fn fenced(&self, slot: &CachedAccount, lease: &Lease) -> Outcome {
        // A changed credential must not wait for the lease to run out.
        let given_back = within(leases::give_back(&self.pool, lease)).await;
        let marked = if self.ends_older {
            within(leases::suspect(&self.pool, slot.id(), None)).await
        } else {
            Ok(())
        };
        if let Err(error) = given_back.and(marked) {
            warn!(account = %slot.id(), %error, "a token that came too late cannot be noted");
        }
        self.reload(slot).await
    }

    async fn fail(&self, slot: &Arc<CachedAccount>, lease: &Lease, error: IssueError) -> Outcome {
        let failed = self.failed(slot, &lease.attempt, error);
        match within(leases::fail(&self.pool, lease, &failed)).await {
            Ok(true) => {}
            // Another replica has the account by now, and knows better.
            Ok(false) => return self.reload(slot).await,
            Err(error) => {
                let account = &slot.view().account.name;
                warn!(%account, %error, "a failure cannot be stored; its lease will run out");
            }
        }
        self.show_failure(slot, &lease.attempt, &failed);
        Outcome::Done
    }
}
