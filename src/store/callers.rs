//! Callers, their credentials and grants, as identity and permits need them.

use std::{collections::HashMap, sync::Arc};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use sqlx::PgPool;
use tracing::error;

use super::StoreError;
use crate::domain::{
    caller::{Caller, CallerId, CallerKind, Grant},
    clock::Timestamp,
};

/// One way in which a caller may show who it is.
#[derive(Clone, Debug)]
pub struct CallerCredential {
    /// Whose it is.
    pub caller: Arc<Caller>,
    /// What must be shown.
    pub proof: CredentialKey,
    /// From when on it is refused.
    pub ends_at: Option<Timestamp>,
    /// Whether an admin took it back. It is known still, so that the log can tell whose it was.
    pub revoked: bool,
}

/// What a caller shows.
#[expect(clippy::derived_hash_with_manual_eq, reason = "what is equal has the same hash")]
#[derive(Clone, Debug, Eq, Hash)]
pub enum CredentialKey {
    /// A bearer with this SHA-256.
    BearerSha256([u8; 32]),
    /// A verified certificate with this name.
    Identity(CallerKind, String),
}

impl PartialEq for CredentialKey {
    /// Hashes of bearers are compared in constant time.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::BearerSha256(ours), Self::BearerSha256(theirs)) => {
                verify_slices_are_equal(ours, theirs).is_ok()
            }
            (Self::Identity(kind, name), Self::Identity(their_kind, their_name)) => {
                kind == their_kind && name == their_name
            }
            _ => false,
        }
    }
}

/// Every credential that is not revoked, with its caller and the caller's grants.
///
/// # Errors
/// When the database cannot be read.
pub async fn load(pool: &PgPool) -> Result<Vec<CallerCredential>, StoreError> {
    // One transaction at one snapshot: a caller and its grants belong together.
    let mut transaction =
        pool.begin_with("begin isolation level repeatable read read only").await?;
    let callers = sqlx::query!(
        "-- store::callers::load
        select id, name, enabled, rate_limit from callers"
    )
    .fetch_all(&mut *transaction)
    .await?;
    let mut grants: HashMap<i64, Vec<Grant>> = HashMap::new();
    for row in sqlx::query!(
        "-- store::callers::load
        select caller_id, pattern, rights, ends_at from grants"
    )
    .fetch_all(&mut *transaction)
    .await?
    {
        let rights = row.rights.iter().map(|right| right.parse()).collect();
        // One row that somebody wrote past the triggers must not stop all the others.
        let (Ok(pattern), Ok(rights)) = (row.pattern.parse(), rights) else {
            error!(caller = row.caller_id, "a malformed grant is passed over");
            continue;
        };
        let grant = Grant { pattern, rights, ends_at: row.ends_at };
        grants.entry(row.caller_id).or_default().push(grant);
    }
    let callers: HashMap<i64, Arc<Caller>> = callers
        .into_iter()
        .map(|row| {
            let caller = Caller {
                id: CallerId(row.id),
                name: row.name.into(),
                enabled: row.enabled,
                rate_limit: row.rate_limit.map(i32::unsigned_abs),
                grants: grants.remove(&row.id).unwrap_or_default(),
            };
            (row.id, Arc::new(caller))
        })
        .collect();
    let rows = sqlx::query!(
        "-- store::callers::load
        select id, caller_id, kind, bearer_sha256, identity, ends_at, revoked_at
        from caller_credentials
        -- Of an identity that was revoked and given anew, the last one counts.
        order by revoked_at nulls last"
    )
    .fetch_all(&mut *transaction)
    .await?;
    transaction.commit().await?;

    let mut credentials = Vec::with_capacity(rows.len());
    for row in rows {
        let Some(caller) = callers.get(&row.caller_id) else { continue };
        let proof = match (row.kind.as_str(), row.bearer_sha256, row.identity) {
            ("bearer", Some(hash), None) => {
                <[u8; 32]>::try_from(hash).ok().map(CredentialKey::BearerSha256)
            }
            ("spiffe", None, Some(id)) => Some(CredentialKey::Identity(CallerKind::Spiffe, id)),
            ("dns", None, Some(name)) => Some(CredentialKey::Identity(CallerKind::Dns, name)),
            _ => None,
        };
        let Some(proof) = proof else {
            error!(credential = row.id, "a malformed credential is passed over");
            continue;
        };
        credentials.push(CallerCredential {
            caller: caller.clone(),
            proof,
            ends_at: row.ends_at,
            revoked: row.revoked_at.is_some(),
        });
    }
    Ok(credentials)
}
