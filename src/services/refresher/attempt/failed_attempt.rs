//! What an attempt does instead of its third and fourth step when the upstream issued no token.

use std::{sync::Arc, time::Duration};

use tracing::warn;

use super::{AttemptOutcome, Permission, TokenIssuer};
use crate::{
    domain::{
        refresh_policy::RefreshPolicy,
        refresh_state::{IssueAttempt, IssueFailure},
        token::Token,
    },
    services::{
        account_cache::{AccountSnapshot, CachedAccount},
        refresher::records,
    },
    store::{
        leases::{self, FailedAttempt},
        within,
    },
    upstream::IssueError,
};

impl TokenIssuer {
    /// Records the failure in the audit journal and the metrics, and stores it in the database and the
    /// cache.
    pub(super) async fn fail(
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
                    // The account has another lease by now, whose result must not be overwritten.
                    Ok(false) => {
                        if failed.possibly_revoked {
                            self.mark_possibly_revoked(entry).await;
                        }
                        return self.reload(entry).await;
                    }
                    Err(error) => {
                        warn!(%account, %error, "a failure cannot be stored; its lease will expire");
                        self.end_call(lease).await;
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

    /// Records the failure in the audit journal and the metrics, and computes the pause after it. Does not
    /// wait until the record is durable.
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
        let record = records::failed(name, &error, self.clock().wall());
        drop(self.infrastructure.journal.append(record));

        FailedAttempt {
            retry_after: self.pause_after(&snapshot, attempt, &error),
            failure: IssueFailure {
                class: error.class,
                code: error.code,
                message: error.message,
                version: attempt.credential.version,
            },
            possibly_revoked: self.settings.new_token_ends_older && error.may_have_issued,
        }
    }

    /// Returns the pause before the credential of the failed attempt is tried again.
    fn pause_after(
        &self,
        snapshot: &AccountSnapshot,
        attempt: &IssueAttempt,
        error: &IssueError,
    ) -> Option<Duration> {
        let (policy, now) = (&self.settings.holder.policy, self.clock().now());
        let (name, refresh) = (&snapshot.account.name, &snapshot.refresh);
        if attempt.has_fallback {
            let failures = refresh.new_secret_failures(attempt.credential.version) + 1;
            return policy.pause_of_new_secret(name, error.class, failures, error.retry_after);
        }
        let repeats_until = snapshot.token.as_deref().and_then(Token::repeats_until);
        let late = RefreshPolicy::pause_after_late_repeat(
            error.class,
            error.retry_after,
            repeats_until,
            refresh.attempt_started_at,
        );
        if late.is_some() {
            return late;
        }
        policy.pause_after_failure(
            name,
            error.class,
            refresh.consecutive_failures + 1,
            error.retry_after,
            self.state.outage.pause_cap(),
            snapshot.live_token(now).map(|token| token.time_left(now)),
        )
    }
}
