//! The end of an attempt to which the upstream answered with the account's own token. Some upstreams give the same
//! token to everybody who asks until it ends.

use std::sync::Arc;

use tracing::{info, warn};

use super::{AttemptOutcome, Permission, TokenIssuer, UNAVAILABLE_PAUSE};
use crate::{
    audit::record::Event,
    domain::{
        clock::Timestamp,
        plausible_time::TOLERANCE,
        token::{Generation, IssuedToken, Token},
    },
    services::{
        account_cache::CachedAccount,
        refresher::{notify::notify_replicas, records},
    },
    store::{
        leases::Lease,
        tokens::{self, RepeatOutcome},
        within,
    },
    telemetry::IssueResult,
};

impl TokenIssuer {
    /// Keeps the account's token, with its generation, if the upstream gave it again instead of a new one, and
    /// returns the outcome of the attempt. Callers have the token already, and it was recorded when it was issued.
    /// Returns `None` if `issued` is a new token.
    pub(super) async fn keep_repeated(
        &self,
        entry: &Arc<CachedAccount>,
        permission: &Permission,
        issued: &IssuedToken,
    ) -> Option<AttemptOutcome> {
        let snapshot = entry.snapshot();
        let held = snapshot
            .token
            .as_ref()
            .filter(|held| held.access_token.expose() == issued.access_token.expose())?;
        // Two answers about one end differ by what their `Date` leaves open.
        let same_end = (issued.expires_at - held.expires_at).abs() <= TOLERANCE;
        let end = (!same_end).then_some(issued.expires_at);
        let repeated_at = match permission {
            Permission::Lease(lease) => {
                match self.mark_repeated(entry, lease, held.generation, end).await? {
                    Ok(repeated_at) => repeated_at,
                    Err(outcome) => return Some(outcome),
                }
            }
            Permission::SoleReplica { .. } => {
                self.state.pending.end(entry.id());
                self.clock().now()
            }
        };
        let token = Arc::new(Token {
            credential_version: permission.attempt().credential.version,
            expires_at: end.unwrap_or(held.expires_at),
            repeated_at: Some(repeated_at),
            ..Token::clone(held)
        });
        self.infrastructure.metrics.issue(IssueResult::Repeated);
        info!(account = %snapshot.account.name, generation = %token.generation,
            expires_at = %token.expires_at,
            "the upstream repeats its token; a new one is requested when it ends");
        let (event, clock) = (Event::TokenRepeated, self.clock());
        let record = records::issued(event, &snapshot.account, &token, issued.skew_ms, clock);
        drop(self.infrastructure.journal.append(record));
        // Without the database, a pending token stays pending.
        let stored = matches!(permission, Permission::Lease(_));
        self.state.cache.update(entry, |before| before.with_token(&token, stored));
        if stored {
            notify_replicas(&self.infrastructure.pool).await;
        }
        Some(AttemptOutcome::Done)
    }

    /// Marks the stored token as repeated, and returns the mark. If it cannot be stored, the attempt ends, and its
    /// outcome is returned; the account's token is served as before. Returns `None` if the account's stored
    /// token is another one by now.
    async fn mark_repeated(
        &self,
        entry: &CachedAccount,
        lease: &Lease,
        generation: Generation,
        end: Option<Timestamp>,
    ) -> Option<Result<Timestamp, AttemptOutcome>> {
        let pool = &self.infrastructure.pool;
        match within(tokens::repeat(pool, lease, generation, end, self.clock())).await {
            Ok(RepeatOutcome::Marked(at)) => Some(Ok(at)),
            Ok(RepeatOutcome::Replaced) => None,
            Ok(RepeatOutcome::Fenced) => Some(Err(self.reload(entry).await)),
            Err(error) => {
                warn!(account = %entry.snapshot().account.name, %error,
                    "it cannot be stored that a token was repeated; its lease will expire");
                self.end_call(lease).await;
                Some(Err(AttemptOutcome::RetryAfter(UNAVAILABLE_PAUSE)))
            }
        }
    }
}
