//! An attempt without the database, by a replica that is alone; and the way back to it.

use std::sync::Arc;

use tracing::{error, info, warn};

use super::{
    Issuing, Outcome,
    attempt::{AWAY, Under},
    unstored::{Issued, Left},
};
use crate::{
    domain::{
        account::AccountId, clock::until_from, refresh_state::IssueAttempt, token::Generation,
    },
    services::{
        account_cache::{AccountSnapshot, CachedAccount},
        connectivity::Connectivity,
    },
    store::{
        StoreError, leases,
        tokens::{self, Adoption, OrphanedToken},
        within,
    },
    telemetry::IssueResult,
};

impl Issuing {
    /// Issues by what the cache knows. The stamp that would go into the database goes into the state
    /// directory, before the call: should this process be killed, its next one knows that the
    /// stored token may be dead.
    pub(super) async fn attempt_alone(
        &self,
        slot: &Arc<CachedAccount>,
        view: &AccountSnapshot,
    ) -> Outcome {
        let id = slot.id();
        let Some(credential) = view.account.usable_credential(&view.progress) else {
            return Outcome::Done;
        };
        if let Err(error) = self.unstored.begin(id).await {
            error!(account = %view.account.name, %error, "an attempt without the database cannot be noted");
            return Outcome::NotBefore(AWAY);
        }
        let latest = view.token.as_ref().map(|token| token.generation);
        let latest = latest.max(view.progress.stored_generation);
        let attempt = IssueAttempt {
            account: id,
            client_id: view.account.client_id.clone(),
            current: credential.version == view.account.credential_version,
            credential,
            generation: Generation::next(self.clock.now(), self.claimant.replica, latest),
        };
        self.show_attempt(slot, &attempt, false);
        match self.issue(slot, &attempt, Under::NoLease).await {
            Ok(Some(token)) => {
                self.metrics.issue(IssueResult::Issued);
                let replaces = view.progress.stored_generation;
                let issued = Issued { token: token.clone(), replaces, leased: false };
                self.unstored.issued(id, issued);
                self.show_token(slot, &token, false);
                info!(account = %view.account.name, generation = %token.generation,
                    expires_at = %token.expires_at, "token issued without the database");
                Outcome::Done
            }
            Ok(None) => {
                self.unstored.doubted(id);
                Outcome::NotBefore(AWAY)
            }
            Err(error) => {
                let failed = self.failed(slot, &attempt, error);
                if failed.suspect {
                    self.unstored.doubted(id);
                } else {
                    self.unstored.ended(id);
                }
                self.show_failure(slot, &attempt, &failed);
                Outcome::Done
            }
        }
    }

    /// Stores what was issued without the database, as soon as it answers. Never ends.
    pub(super) async fn keep_settling(&self) {
        loop {
            self.unstored.some().await;
            self.settle_all().await;
            // Also where the tests' clock stands still.
            tokio::time::sleep(AWAY).await;
        }
    }

    /// Stores all that was issued without the database, if it answers.
    pub(super) async fn settle_all(&self) {
        let mut settled = 0;
        for account in self.unstored.accounts() {
            if self.reach.standing() != Connectivity::Connected {
                break;
            }
            match self.settle(account).await {
                Ok(done) => settled += usize::from(done),
                Err(error) => {
                    warn!(%error, "tokens that were issued without the database cannot be stored yet");
                    break;
                }
            }
        }
        if settled > 0 {
            info!(accounts = settled, "what was issued without the database is stored");
            self.tell_the_others().await;
        }
    }

    /// Tells the database what was issued for `account` without it. `false` when that must wait.
    pub(super) async fn settle(&self, account: AccountId) -> Result<bool, StoreError> {
        let Some(left) = self.unstored.of(account) else { return Ok(true) };
        let settled = match &left.token {
            None => within(leases::suspect(&self.pool, account, None)).await.map(|()| true)?,
            Some(issued) => self.adopt(account, issued, &left).await? != Adoption::Leased,
        };
        if settled {
            self.unstored.settled(account, &left).await;
            self.loader.these(&[account.0]).await?;
        }
        Ok(settled)
    }

    async fn adopt(
        &self,
        account: AccountId,
        issued: &Issued,
        left: &Left,
    ) -> Result<Adoption, StoreError> {
        let foundling = OrphanedToken {
            token: self.sealed(account, &issued.token),
            age: until_from(issued.token.issued_at, self.clock.now()),
            replaces: issued.replaces,
            leased: issued.leased,
            suspect: left.doubt,
        };
        let instance = &self.claimant.instance;
        let adoption =
            within(tokens::adopt(&self.pool, &foundling, instance, self.ends_older)).await?;
        if adoption == Adoption::Dropped {
            let generation = issued.token.generation;
            warn!(%account, %generation, "a token that was issued without the database is not the \
                account's any more");
        }
        Ok(adoption)
    }
}
