//! What an attempt changes in its account's view, for those who wait, watch or list.

use std::sync::Arc;

use super::Issuing;
use crate::{
    domain::{clock::delta, refresh_state::IssueAttempt, token::Token},
    services::account_cache::{AccountSnapshot, CachedAccount},
    store::leases::FailedAttempt,
};

impl Issuing {
    /// An attempt is under way; `lost` says whether the one before it never ended.
    pub(super) fn show_attempt(
        &self,
        slot: &Arc<CachedAccount>,
        attempt: &IssueAttempt,
        lost: bool,
    ) {
        let now = self.clock.now();
        let until = now + delta(self.claimant.lease);
        self.cache.update(slot, |view| {
            let mut view = view.clone();
            view.progress.attempt_started_at = Some(now);
            view.progress.attempt_open = true;
            view.progress.attempt_version = Some(attempt.credential.version);
            view.progress.lease_until = Some(until);
            view.progress.suspect |= lost;
            view
        });
    }

    /// It issued `token`, which the database has if it is `stored`.
    pub(super) fn show_token(&self, slot: &Arc<CachedAccount>, token: &Arc<Token>, stored: bool) {
        self.cache.update(slot, |view| {
            // Another replica's later token may have been loaded meanwhile.
            let newer = view.token.clone().filter(|held| held.generation > token.generation);
            let mut view = AccountSnapshot { token: newer.or(Some(token.clone())), ..view.clone() };
            let progress = &mut view.progress;
            if stored {
                progress.stored_generation = progress.stored_generation.max(Some(token.generation));
            }
            progress.lease_until = None;
            progress.attempt_open = false;
            progress.suspect = false;
            progress.failures = 0;
            progress.next_attempt_at = None;
            if token.credential_version == view.account.credential_version {
                progress.failure = None;
                view.account.previous = None;
            }
            view
        });
    }

    /// It failed. A token that is there stays.
    pub(super) fn show_failure(
        &self,
        slot: &Arc<CachedAccount>,
        attempt: &IssueAttempt,
        failed: &FailedAttempt,
    ) {
        let now = self.clock.now();
        self.cache.update(slot, |view| {
            let mut view = view.clone();
            let progress = &mut view.progress;
            progress.lease_until = None;
            progress.attempt_open = false;
            progress.failures += 1;
            progress.suspect |= failed.suspect;
            progress.next_attempt_at = failed.retry_after.map(|pause| now + delta(pause));
            if failed.failure.class.parks() {
                let refused = failed.failure.version;
                view.account.previous.take_if(|previous| previous.version == refused);
            }
            if attempt.current {
                progress.failure = Some(failed.failure.clone());
            }
            view
        });
    }
}
