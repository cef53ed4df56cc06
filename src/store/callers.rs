//! Callers, their credentials and their grants, for authentication and authorisation.

use std::{collections::HashMap, ops::RangeInclusive, sync::Arc};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use sqlx::{Connection, PgConnection, PgExecutor};
use tracing::instrument;

use super::{
    StoreError,
    lenient::{Lenient, LenientTime, Readable, UnusableRow},
};
use crate::domain::{
    account::AccountName,
    caller::{Caller, CallerId, CallerKind, Grant},
    clock::Timestamp,
};

/// The limits of a caller's rate that the trigger accepts, in calls per second.
const RATE_LIMITS: RangeInclusive<u32> = 1..=1_000_000;

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

/// A usable row of `caller_credentials`.
#[derive(Clone, Debug, PartialEq)]
pub struct CredentialRow {
    id: i64,
    caller: i64,
    key: CredentialKey,
    ends_at: Option<Timestamp>,
    revoked: bool,
}

/// A usable row of `grants`.
#[derive(Clone, Debug, PartialEq)]
pub struct GrantRow {
    id: i64,
    caller: i64,
    grant: Grant,
}

impl CredentialRow {
    /// Returns the row's id.
    #[must_use]
    pub fn id(&self) -> i64 {
        self.id
    }
}

impl GrantRow {
    /// Returns the row's id.
    #[must_use]
    pub fn id(&self) -> i64 {
        self.id
    }
}

/// The three tables that say who may do what.
#[derive(Clone, Debug)]
pub struct Access {
    /// The callers, without their grants.
    pub callers: Readable<Caller>,
    /// The credentials, revoked ones first.
    pub credentials: Readable<CredentialRow>,
    /// The grants.
    pub grants: Readable<GrantRow>,
}

/// Loads the three tables from one snapshot: a caller without its grants would be refused.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn load(connection: &mut PgConnection) -> Result<Access, StoreError> {
    let mut transaction =
        connection.begin_with("begin isolation level repeatable read read only").await?;
    let access = Access {
        callers: load_callers(&mut *transaction).await?,
        credentials: load_credentials(&mut *transaction).await?,
        grants: load_grants(&mut *transaction).await?,
    };
    transaction.commit().await?;
    Ok(access)
}

/// Loads all callers, without their grants.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn load_callers(executor: impl PgExecutor<'_>) -> Result<Readable<Caller>, StoreError> {
    let rows = sqlx::query!(
        r#"-- store::callers::load_callers
        select id, name as "name: Lenient<String>", enabled, rate_limit from callers order by id"#
    )
    .fetch_all(executor)
    .await?;
    let read = rows.into_iter().map(|row| {
        let unusable = |problem| UnusableRow::new("callers", row.id, problem);
        // Callers have the names that accounts may have.
        let malformed_name = || unusable("malformed name");
        let name = row.name.or(malformed_name())?;
        let name = name.parse::<AccountName>().map_err(|_| malformed_name())?;
        let rate_limit = row.rate_limit.map(|rate| {
            u32::try_from(rate)
                .ok()
                .filter(|rate| RATE_LIMITS.contains(rate))
                .ok_or(unusable("rate_limit is not between 1 and 1000000"))
        });
        Ok(Caller {
            id: CallerId(row.id),
            name: name.as_str().into(),
            enabled: row.enabled,
            rate_limit: rate_limit.transpose()?,
            grants: Vec::new(),
        })
    });
    Ok(read.collect())
}

/// Loads all credentials, including revoked ones. Those come first, so that the later ones take precedence.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn load_credentials(
    executor: impl PgExecutor<'_>,
) -> Result<Readable<CredentialRow>, StoreError> {
    let rows = sqlx::query!(
        r#"-- store::callers::load_credentials
        select id, caller_id, kind as "kind: Lenient<String>", bearer_sha256,
            identity as "identity: Lenient<String>", ends_at as "ends_at: LenientTime",
            revoked_at is not null as "revoked!"
        from caller_credentials
        order by revoked_at nulls last, id"#
    )
    .fetch_all(executor)
    .await?;
    let read = rows.into_iter().map(|row| {
        let unusable = |problem| UnusableRow::new("caller_credentials", row.id, problem);
        let kind = row.kind.or(unusable("malformed kind"))?;
        let identity = row.identity.map(|it| it.or(unusable("malformed identity"))).transpose()?;
        let ends_at =
            row.ends_at.map(|end| end.or(unusable("ends_at is not a time between 1970 and 9999")));
        Ok(CredentialRow {
            id: row.id,
            caller: row.caller_id,
            key: credential_key(&kind, row.bearer_sha256, identity).map_err(unusable)?,
            ends_at: ends_at.transpose()?,
            revoked: row.revoked,
        })
    });
    Ok(read.collect())
}

/// Loads all grants.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn load_grants(executor: impl PgExecutor<'_>) -> Result<Readable<GrantRow>, StoreError> {
    let rows = sqlx::query!(
        r#"-- store::callers::load_grants
        select id, caller_id, pattern as "pattern: Lenient<String>",
            rights as "rights: Lenient<Vec<String>>", ends_at as "ends_at: LenientTime"
        from grants order by id"#
    )
    .fetch_all(executor)
    .await?;
    let read = rows.into_iter().map(|row| {
        let unusable = |problem| UnusableRow::new("grants", row.id, problem);
        let malformed_pattern = || unusable("malformed pattern");
        let pattern = row.pattern.or(malformed_pattern())?;
        let malformed_rights = || unusable("malformed rights");
        let rights = row.rights.or(malformed_rights())?;
        let rights: Result<_, _> = rights.iter().map(|right| right.parse()).collect();
        let ends_at =
            row.ends_at.map(|end| end.or(unusable("ends_at is not a time between 1970 and 9999")));
        Ok(GrantRow {
            id: row.id,
            caller: row.caller_id,
            grant: Grant {
                pattern: pattern.parse().map_err(|_| malformed_pattern())?,
                rights: rights.map_err(|_| malformed_rights())?,
                ends_at: ends_at.transpose()?,
            },
        })
    });
    Ok(read.collect())
}

/// Returns what a caller must present, or why the row's values do not say it.
fn credential_key(
    kind: &str,
    bearer_sha256: Option<Vec<u8>>,
    identity: Option<String>,
) -> Result<CredentialKey, &'static str> {
    match (kind, bearer_sha256, identity) {
        ("bearer", Some(hash), None) => {
            let hash = <[u8; 32]>::try_from(hash).map_err(|_| "bearer_sha256 has not 32 bytes")?;
            Ok(CredentialKey::BearerSha256(hash))
        }
        ("spiffe", None, Some(id)) => Ok(CredentialKey::Identity(CallerKind::Spiffe, id)),
        ("dns", None, Some(name)) => Ok(CredentialKey::Identity(CallerKind::Dns, name)),
        _ => Err("kind, bearer_sha256 and identity do not fit together"),
    }
}

/// Returns the credentials with their callers and the callers' grants. A credential of a caller that cannot
/// be used or does not exist is left out, so it is refused like an unknown one.
#[must_use]
pub fn assemble(
    callers: &[Caller],
    credentials: &[CredentialRow],
    grants: &[GrantRow],
) -> Vec<CallerCredential> {
    let mut grants_of: HashMap<i64, Vec<Grant>> = HashMap::new();
    for row in grants {
        grants_of.entry(row.caller).or_default().push(row.grant.clone());
    }
    let callers: HashMap<i64, Arc<Caller>> = callers
        .iter()
        .map(|caller| {
            let grants = grants_of.remove(&caller.id.0).unwrap_or_default();
            (caller.id.0, Arc::new(Caller { grants, ..caller.clone() }))
        })
        .collect();
    credentials
        .iter()
        .filter_map(|row| {
            Some(CallerCredential {
                caller: callers.get(&row.caller)?.clone(),
                key: row.key.clone(),
                ends_at: row.ends_at,
                revoked: row.revoked,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::domain::caller::Right;

    fn caller(id: i64, name: &str) -> Caller {
        let (id, name) = (CallerId(id), name.into());
        Caller { id, name, enabled: true, rate_limit: None, grants: vec![] }
    }

    fn credential(caller: i64, byte: u8) -> CredentialRow {
        let key = CredentialKey::BearerSha256([byte; 32]);
        CredentialRow { id: i64::from(byte), caller, key, ends_at: None, revoked: false }
    }

    fn grant(caller: i64, pattern: &str) -> GrantRow {
        let rights = [Right::Get].into_iter().collect();
        let grant = Grant { pattern: pattern.parse().unwrap(), rights, ends_at: None };
        GrantRow { id: caller, caller, grant }
    }

    #[test]
    fn each_credential_gets_its_own_callers_grants_and_one_without_a_caller_is_left_out() {
        let assembled = assemble(
            &[caller(1, "shop"), caller(2, "bank")],
            &[credential(1, 1), credential(2, 2), credential(2, 3), credential(9, 4)],
            &[grant(1, "acme"), grant(2, "bank-*"), grant(9, "*")],
        );
        let permits = |credential: &CallerCredential, account: &str| {
            let account = account.parse().unwrap();
            credential.caller.permits(Right::Get, &account, DateTime::UNIX_EPOCH)
        };
        assert_eq!(assembled.len(), 3);
        assert!(permits(&assembled[0], "acme") && !permits(&assembled[0], "bank-1"));
        for credential in &assembled[1..] {
            assert!(permits(credential, "bank-1") && !permits(credential, "acme"));
        }
    }

    #[test]
    fn a_credential_must_have_exactly_the_values_of_its_kind() {
        let hash = || Some(vec![7; 32]);
        let name = || Some("shop.example".to_owned());
        assert!(credential_key("bearer", hash(), None).is_ok());
        assert!(credential_key("dns", None, name()).is_ok());
        assert!(credential_key("spiffe", None, name()).is_ok());
        for (kind, hash, identity) in [
            ("bearer", None, None),
            ("bearer", Some(vec![7; 31]), None),
            ("bearer", Some(vec![7; 33]), None),
            ("bearer", hash(), name()),
            ("dns", hash(), None),
            ("dns", hash(), name()),
            ("dns", None, None),
            ("spiffe", None, None),
            ("Bearer", hash(), None),
            ("", hash(), None),
        ] {
            assert!(credential_key(kind, hash.clone(), identity).is_err(), "{kind} {hash:?}");
        }
    }
}
