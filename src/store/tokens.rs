//! Sealed tokens: committed under a lease, and told to the other replicas.

use std::time::Duration;

use sqlx::{PgPool, Postgres, Transaction};

use super::{StoreError, interval};
use crate::{
    domain::{
        account::{AccountId, CredentialVersion},
        clock::Timestamp,
        token::Generation,
    },
    store::leases::Lease,
};

/// The channel on which replicas tell one another that tokens or attempts changed.
pub const CHANNEL: &str = "token_broker_tokens";

/// A sealed token, ready to be stored.
#[derive(Clone, Debug)]
pub struct NewToken {
    /// The account.
    pub account: AccountId,
    /// The credential that issued it.
    pub version: CredentialVersion,
    /// Its place in the account's series.
    pub generation: Generation,
    /// The sealed JWT, bound to account and generation.
    pub sealed: Vec<u8>,
    /// When it was issued, by the replica's clock, as its end is.
    pub issued_at: Timestamp,
    /// When it ends.
    pub expires_at: Timestamp,
    /// The one address from which it may work.
    pub allowed_ip: Option<String>,
    /// Its keyed hash.
    pub fingerprint: String,
}

/// What became of a new token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Commit {
    /// It is the account's token now.
    Stored,
    /// The account has another lease by now, another credential, or is gone: the token was not
    /// stored.
    Fenced,
    /// The stored token lives longer, and new tokens do not end older ones: it was kept.
    KeptLonger,
}

/// Stores `token` as the account's, if `lease` still holds and the account still has the credential
/// that issued it (or kept it through a rotation), and gives the lease back.
///
/// Where new tokens end older ones (`ends_older`), or the stored one is suspect, the later issue
/// wins: it is the only one that is known to live. Else the later end wins; ends that differ by less
/// than the clocks' accuracy count as the same.
///
/// # Errors
/// When the database cannot be reached; whether the token was stored is then unknown.
pub async fn commit(
    pool: &PgPool,
    lease: &Lease,
    token: &NewToken,
    ends_older: bool,
) -> Result<Commit, StoreError> {
    let mut transaction = pool.begin().await?;
    // Locked in the order in which a DELETE locks them: the account, then its refreshes.
    let issuer = issuer(&mut transaction, token).await?;
    let held = sqlx::query!(
        "-- store::tokens::commit
        select suspect from refreshes where account_id = $1 and lease_id = $2 for update",
        token.account.0,
        lease.id,
    )
    .fetch_optional(&mut *transaction)
    .await?;
    let Some(held) = held.filter(|_| issuer != Issuer::Gone) else { return Ok(Commit::Fenced) };
    // A success with the credential before the current one does not hide why that one is refused.
    sqlx::query!(
        "-- store::tokens::commit
        update refreshes set lease_owner = null, lease_until = null,
            attempt_ended_at = clock_timestamp(), suspect = false, consecutive_failures = 0,
            error_class = case when $2 then null else error_class end,
            error_code = case when $2 then null else error_code end,
            error_message = case when $2 then null else error_message end,
            error_version = case when $2 then null else error_version end,
            next_attempt_at = null, changed = pg_current_xact_id()
        where account_id = $1",
        token.account.0,
        lease.attempt.current,
    )
    .execute(&mut *transaction)
    .await?;
    let stored = put(&mut transaction, token, ends_older || held.suspect).await?;
    transaction.commit().await?;
    Ok(if stored { Commit::Stored } else { Commit::KeptLonger })
}

/// What became of a token that was issued while the database was away.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Adoption {
    /// It is the account's token now.
    Stored,
    /// Another one was stored meanwhile, or the credential or the account is gone: it was dropped.
    Dropped,
    /// Another replica issues for the account just now: try again when it is done.
    Leased,
}

/// A token that was issued while the database was away.
#[derive(Clone, Debug)]
pub struct OrphanedToken {
    /// The token.
    pub token: NewToken,
    /// How long ago its attempt began.
    pub age: Duration,
    /// The generation of the token that was stored when it was issued.
    pub replaces: Option<Generation>,
    /// Whether it was issued under a lease: what was stored since is then known to be later.
    pub leased: bool,
    /// Whether a later attempt may have issued another.
    pub suspect: bool,
}

/// Stores a token that `instance` issued while the database was away, unless another was stored
/// since. If nobody can say which of the two is the later one, the stored one is marked as suspect
/// where new tokens end older ones (`ends_older`).
///
/// Adopting the same token twice is the same as once.
///
/// # Errors
/// When the database cannot be reached; whether the token was stored is then unknown.
pub async fn adopt(
    pool: &PgPool,
    foundling: &OrphanedToken,
    instance: &str,
    ends_older: bool,
) -> Result<Adoption, StoreError> {
    let OrphanedToken { token, replaces, .. } = foundling;
    let mut transaction = pool.begin().await?;
    let issuer = issuer(&mut transaction, token).await?;
    let Some(found) = sqlx::query!(
        r#"-- store::tokens::adopt
        select coalesce(lease_until > clock_timestamp() and lease_owner <> $2, false) as "leased!"
        from refreshes where account_id = $1 for update"#,
        token.account.0,
        instance,
    )
    .fetch_optional(&mut *transaction)
    .await?
    else {
        return Ok(Adoption::Dropped);
    };
    if found.leased {
        return Ok(Adoption::Leased);
    }
    // Read after the lock was had.
    let stored = sqlx::query_scalar!(
        "-- store::tokens::adopt
        select generation from tokens where account_id = $1",
        token.account.0,
    )
    .fetch_optional(&mut *transaction)
    .await?
    .map(Generation);
    let ours = stored == *replaces || stored == Some(token.generation);
    if !ours || issuer == Issuer::Gone {
        if ends_older && !foundling.leased {
            sqlx::query!(
                "-- store::tokens::adopt
                update refreshes set suspect = true, changed = pg_current_xact_id()
                where account_id = $1",
                token.account.0,
            )
            .execute(&mut *transaction)
            .await?;
            transaction.commit().await?;
        }
        return Ok(Adoption::Dropped);
    }
    // A success with the credential before the current one does not hide why that one is refused.
    sqlx::query!(
        "-- store::tokens::adopt
        update refreshes set lease_owner = null, lease_until = null,
            attempt_started_at = greatest(attempt_started_at, clock_timestamp() - $2::interval),
            attempt_ended_at = clock_timestamp(), attempt_version = $3, suspect = $4,
            consecutive_failures = 0,
            error_class = case when $5 then null else error_class end,
            error_code = case when $5 then null else error_code end,
            error_message = case when $5 then null else error_message end,
            error_version = case when $5 then null else error_version end,
            next_attempt_at = null, changed = pg_current_xact_id()
        where account_id = $1",
        token.account.0,
        interval(foundling.age),
        token.version.0,
        foundling.suspect,
        issuer == Issuer::Current,
    )
    .execute(&mut *transaction)
    .await?;
    put(&mut transaction, token, true).await?;
    transaction.commit().await?;
    Ok(Adoption::Stored)
}

/// What a token's credential is to its account.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Issuer {
    Current,
    Previous,
    Gone,
}

/// Whether the account still has the credential that issued `token`; holds it until the end of the
/// transaction.
async fn issuer(
    transaction: &mut Transaction<'_, Postgres>,
    token: &NewToken,
) -> Result<Issuer, StoreError> {
    let account = sqlx::query!(
        "-- store::tokens::issuer
        select credential_version, previous_version from accounts where id = $1 for share",
        token.account.0,
    )
    .fetch_optional(&mut **transaction)
    .await?;
    let version = token.version.0;
    Ok(match account {
        Some(account) if account.credential_version == version => Issuer::Current,
        Some(account) if account.previous_version == Some(version) => Issuer::Previous,
        _ => Issuer::Gone,
    })
}

/// Makes `token` the account's, unless a later one is stored, or, without `whatever_lives_longer`,
/// one that lives longer. A success with the current credential ends the keeping of the one before.
async fn put(
    transaction: &mut Transaction<'_, Postgres>,
    token: &NewToken,
    whatever_lives_longer: bool,
) -> Result<bool, StoreError> {
    let stored = sqlx::query!(
        "-- store::tokens::put
        insert into tokens (account_id, credential_version, generation, sealed_token, issued_at,
            expires_at, allowed_ip, fingerprint)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
        on conflict (account_id) do update set
            credential_version = excluded.credential_version, generation = excluded.generation,
            sealed_token = excluded.sealed_token, issued_at = excluded.issued_at,
            expires_at = excluded.expires_at, allowed_ip = excluded.allowed_ip,
            fingerprint = excluded.fingerprint, changed = pg_current_xact_id()
        where excluded.generation >= tokens.generation
            and ($9 or excluded.expires_at >= tokens.expires_at - interval '5 seconds')",
        token.account.0,
        token.version.0,
        token.generation.0,
        token.sealed,
        token.issued_at,
        token.expires_at,
        token.allowed_ip,
        token.fingerprint,
        whatever_lives_longer,
    )
    .execute(&mut **transaction)
    .await?;
    sqlx::query!(
        "-- store::tokens::put
        update accounts set previous_secret = null, previous_version = null
        where id = $1 and credential_version = $2 and previous_secret is not null",
        token.account.0,
        token.version.0,
    )
    .execute(&mut **transaction)
    .await?;
    Ok(stored.rows_affected() == 1)
}

/// Tells the other replicas to look. Outside any transaction that matters: NOTIFY takes a lock of
/// the whole cluster until its commit.
///
/// # Errors
/// When the database cannot be reached; the others then find out by polling.
pub async fn notify(pool: &PgPool) -> Result<(), StoreError> {
    sqlx::query!("-- store::tokens::notify\nselect pg_notify($1, '')", CHANNEL)
        .execute(pool)
        .await?;
    Ok(())
}
