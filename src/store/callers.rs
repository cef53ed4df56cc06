//! Callers, their credentials and their grants, for authentication and authorisation.

use std::{collections::HashMap, sync::Arc};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use sqlx::PgPool;
use tracing::{error, instrument};

use super::{StoreError, execution::repeat_on_conflict};
use crate::domain::{
    caller::{Caller, CallerId, CallerKind, Grant},
    clock::Timestamp,
};

/// A credential by which a caller is recognised.
#[derive(Clone, Debug)]
pub struct CallerCredential {
    /// The caller to whom the credential belongs.
    pub caller: Arc<Caller>,
    /// What the caller must present.
    pub key: CredentialKey,
    /// When the credential stops being accepted; `None` for never.
    pub ends_at: Option<Timestamp>,
    /// Whether an admin revoked it. Revoked credentials are kept, so that the audit log can name the
    /// caller of a refused call.
    pub revoked: bool,
}

/// What a caller presents, by which its credential is looked up.
#[expect(clippy::derived_hash_with_manual_eq, reason = "equal keys have the same hash")]
#[derive(Clone, Debug, Eq, Hash)]
pub enum CredentialKey {
    /// The SHA-256 of a bearer.
    BearerSha256([u8; 32]),
    /// A name in a verified client certificate, and which kind of name it is.
    Identity(CallerKind, String),
}

impl PartialEq for CredentialKey {
    /// Compares hashes of bearers in constant time.
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

/// Loads all credentials, including revoked ones, with their callers and the callers' grants. Unreadable
/// rows are logged and left out. Revoked credentials come before the others.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn load(pool: &PgPool) -> Result<Vec<CallerCredential>, StoreError> {
    repeat_on_conflict(|| try_load(pool)).await
}

async fn try_load(pool: &PgPool) -> Result<Vec<CallerCredential>, StoreError> {
    // All three tables are read from one snapshot: a caller without its grants would be refused.
    let mut transaction =
        pool.begin_with("begin isolation level repeatable read read only").await?;
    let callers = sqlx::query!(
        "-- store::callers::try_load
        select id, name, enabled, rate_limit from callers"
    )
    .fetch_all(&mut *transaction)
    .await?;
    let mut grants: HashMap<i64, Vec<Grant>> = HashMap::new();
    for row in sqlx::query!(
        "-- store::callers::try_load
        select caller_id, pattern, rights, ends_at from grants"
    )
    .fetch_all(&mut *transaction)
    .await?
    {
        let rights = row.rights.iter().map(|right| right.parse()).collect();
        // A malformed row, which was written while the triggers were disabled, must not prevent the
        // others from being loaded.
        let (Ok(pattern), Ok(rights)) = (row.pattern.parse(), rights) else {
            error!(caller = row.caller_id, "a malformed grant is ignored");
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
        "-- store::callers::try_load
        select id, caller_id, kind, bearer_sha256, identity, ends_at, revoked_at
        from caller_credentials
        order by revoked_at nulls last"
    )
    .fetch_all(&mut *transaction)
    .await?;
    transaction.commit().await?;

    let mut credentials = Vec::with_capacity(rows.len());
    for row in rows {
        let Some(caller) = callers.get(&row.caller_id) else { continue };
        let key = match (row.kind.as_str(), row.bearer_sha256, row.identity) {
            ("bearer", Some(hash), None) => {
                <[u8; 32]>::try_from(hash).ok().map(CredentialKey::BearerSha256)
            }
            ("spiffe", None, Some(id)) => Some(CredentialKey::Identity(CallerKind::Spiffe, id)),
            ("dns", None, Some(name)) => Some(CredentialKey::Identity(CallerKind::Dns, name)),
            _ => None,
        };
        let Some(key) = key else {
            error!(credential = row.id, "a malformed credential is ignored");
            continue;
        };
        credentials.push(CallerCredential {
            caller: caller.clone(),
            key,
            ends_at: row.ends_at,
            revoked: row.revoked_at.is_some(),
        });
    }
    Ok(credentials)
}
