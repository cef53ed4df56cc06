//! Sealed tokens: stored under a lease, or reconciled after they were issued without the database.

use std::time::Duration;

use sqlx::{PgPool, Postgres, Transaction};
use tracing::instrument;

use super::{StoreError, interval};
use crate::{
    domain::{
        account::AccountId,
        token::{Generation, SealedToken},
    },
    store::leases::Lease,
};

/// The notification channel on which replicas tell one another that tokens or attempts changed.
pub const CHANNEL: &str = "token_broker_tokens";

/// The result of [`commit`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Commit {
    /// The token is the account's token now.
    Stored,
    /// The token was not stored: the account is gone, or has another lease or credential by now.
    Fenced,
    /// The token was not stored: the stored one lives longer, and new tokens do not end older ones.
    KeptLonger,
}

/// Stores `token` as the account's if `lease` is still its latest and the account still has the
/// credential that issued the token (or keeps it through a rotation), and releases the lease.
///
/// Where a new token ends older ones (`new_token_ends_older`), or the stored one is possibly revoked,
/// the later issue wins: it is the only one that is known to be live. Otherwise the later end wins; ends
/// that differ by less than the clocks' accuracy count as the same.
///
/// Committing the same token twice is the same as once.
///
/// # Errors
/// When the database cannot be reached or refuses a statement; whether the token was stored is then
/// unknown.
#[instrument(level = "debug", skip_all, fields(account = %lease.attempt.account))]
pub async fn commit(
    pool: &PgPool,
    lease: &Lease,
    token: &SealedToken,
    new_token_ends_older: bool,
) -> Result<Commit, StoreError> {
    let account = lease.attempt.account;
    let mut transaction = pool.begin().await?;
    // Locked in the order in which a DELETE locks them: the account, then its refreshes.
    let issuer = lock_issuer(&mut transaction, account, token).await?;
    let held = sqlx::query!(
        "-- store::tokens::commit
        select possibly_revoked from refreshes where account_id = $1 and lease_id = $2 for update",
        account.0,
        lease.id,
    )
    .fetch_optional(&mut *transaction)
    .await?;
    let Some(held) = held.filter(|_| issuer != Issuer::Gone) else { return Ok(Commit::Fenced) };
    // A success with the previous credential does not hide why the current one is refused.
    sqlx::query!(
        "-- store::tokens::commit
        update refreshes set lease_holder = null, lease_until = null,
            attempt_ended_at = clock_timestamp(), possibly_revoked = false, consecutive_failures = 0,
            error_class = case when $2 then null else error_class end,
            error_code = case when $2 then null else error_code end,
            error_message = case when $2 then null else error_message end,
            error_version = case when $2 then null else error_version end,
            next_attempt_at = null, changed = pg_current_xact_id()
        where account_id = $1",
        account.0,
        lease.attempt.uses_current_credential,
    )
    .execute(&mut *transaction)
    .await?;
    let replace_longer = new_token_ends_older || held.possibly_revoked;
    let stored = put(&mut transaction, account, token, replace_longer).await?;
    transaction.commit().await?;
    Ok(if stored { Commit::Stored } else { Commit::KeptLonger })
}

/// The result of [`reconcile`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reconciliation {
    /// The token is the account's token now.
    Stored,
    /// The token was dropped: another one was stored meanwhile, or the credential or the account is
    /// gone.
    Dropped,
    /// Nothing was done, since another replica holds the account's lease: try again later.
    LeaseHeld,
}

/// A token that was issued and could not be stored, as the database was away.
#[derive(Clone, Debug)]
pub struct OrphanedToken {
    /// The token.
    pub token: SealedToken,
    /// The generation of the stored token when this one was issued.
    pub replaces: Option<Generation>,
    /// Whether it was issued under a lease. A token that was stored since is then known to be later.
    pub under_lease: bool,
}

/// What [`reconcile`] needs to know beside the token.
#[derive(Clone, Copy, Debug)]
pub struct Reconcile<'a> {
    /// The instance that issued the token.
    pub instance: &'a str,
    /// How long ago its attempt began.
    pub age: Duration,
    /// Whether a later attempt may have issued another token.
    pub possibly_revoked: bool,
    /// Whether the upstream ends older tokens when it issues a new one.
    pub new_token_ends_older: bool,
}

/// Stores a token that was issued while the database was away, unless another was stored since. If
/// nobody can say which of the two is the later one, the stored one is marked as possibly revoked
/// where new tokens end older ones.
///
/// Reconciling the same token twice is the same as once.
///
/// # Errors
/// When the database cannot be reached or refuses a statement; whether the token was stored is then
/// unknown.
#[instrument(level = "debug", skip_all, fields(%account))]
pub async fn reconcile(
    pool: &PgPool,
    account: AccountId,
    orphan: &OrphanedToken,
    circumstances: Reconcile<'_>,
) -> Result<Reconciliation, StoreError> {
    let OrphanedToken { token, replaces, under_lease } = orphan;
    let mut transaction = pool.begin().await?;
    let issuer = lock_issuer(&mut transaction, account, token).await?;
    let Some(found) = sqlx::query!(
        r#"-- store::tokens::reconcile
        select coalesce(lease_until > clock_timestamp() and lease_holder <> $2, false) as "leased!"
        from refreshes where account_id = $1 for update"#,
        account.0,
        circumstances.instance,
    )
    .fetch_optional(&mut *transaction)
    .await?
    else {
        return Ok(Reconciliation::Dropped);
    };
    if found.leased {
        return Ok(Reconciliation::LeaseHeld);
    }
    // A statement of its own, after the lock: its snapshot has what the lock's last owner committed.
    let stored = sqlx::query_scalar!(
        "-- store::tokens::reconcile
        select generation from tokens where account_id = $1",
        account.0,
    )
    .fetch_optional(&mut *transaction)
    .await?
    .map(Generation);
    let unchanged = stored == *replaces || stored == Some(token.generation);
    if !unchanged || issuer == Issuer::Gone {
        if circumstances.new_token_ends_older && !under_lease {
            sqlx::query!(
                "-- store::tokens::reconcile
                update refreshes set possibly_revoked = true, changed = pg_current_xact_id()
                where account_id = $1",
                account.0,
            )
            .execute(&mut *transaction)
            .await?;
            transaction.commit().await?;
        }
        return Ok(Reconciliation::Dropped);
    }
    // A success with the previous credential does not hide why the current one is refused.
    sqlx::query!(
        "-- store::tokens::reconcile
        update refreshes set lease_holder = null, lease_until = null,
            attempt_started_at = greatest(attempt_started_at, clock_timestamp() - $2::interval),
            attempt_ended_at = clock_timestamp(), attempt_version = $3, possibly_revoked = $4,
            consecutive_failures = 0,
            error_class = case when $5 then null else error_class end,
            error_code = case when $5 then null else error_code end,
            error_message = case when $5 then null else error_message end,
            error_version = case when $5 then null else error_version end,
            next_attempt_at = null, changed = pg_current_xact_id()
        where account_id = $1",
        account.0,
        interval(circumstances.age),
        token.credential_version.0,
        circumstances.possibly_revoked,
        issuer == Issuer::Current,
    )
    .execute(&mut *transaction)
    .await?;
    put(&mut transaction, account, token, true).await?;
    transaction.commit().await?;
    Ok(Reconciliation::Stored)
}

/// The relation of a token's credential to its account.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Issuer {
    /// The account's current credential issued the token.
    Current,
    /// The credential before the last rotation issued it, and is still kept.
    Previous,
    /// The account does not have that credential any more, or does not exist.
    Gone,
}

/// Returns whether the account still has the credential that issued `token`, and locks the account
/// against changes until the end of the transaction.
async fn lock_issuer(
    transaction: &mut Transaction<'_, Postgres>,
    account: AccountId,
    token: &SealedToken,
) -> Result<Issuer, StoreError> {
    let row = sqlx::query!(
        "-- store::tokens::lock_issuer
        select credential_version, previous_version from accounts where id = $1 for share",
        account.0,
    )
    .fetch_optional(&mut **transaction)
    .await?;
    let version = token.credential_version.0;
    Ok(match row {
        Some(row) if row.credential_version == version => Issuer::Current,
        Some(row) if row.previous_version == Some(version) => Issuer::Previous,
        _ => Issuer::Gone,
    })
}

/// Makes `token` the account's, unless one of a later generation is stored, or one that lives longer
/// and is not to be replaced (`replace_longer`). Returns whether it was stored.
///
/// The previous credential is dropped if the current one issued the token.
async fn put(
    transaction: &mut Transaction<'_, Postgres>,
    account: AccountId,
    token: &SealedToken,
    replace_longer: bool,
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
        account.0,
        token.credential_version.0,
        token.generation.0,
        token.sealed,
        token.issued_at,
        token.expires_at,
        token.allowed_ip,
        token.fingerprint,
        replace_longer,
    )
    .execute(&mut **transaction)
    .await?;
    sqlx::query!(
        "-- store::tokens::put
        update accounts set previous_secret = null, previous_version = null
        where id = $1 and credential_version = $2 and previous_secret is not null",
        account.0,
        token.credential_version.0,
    )
    .execute(&mut **transaction)
    .await?;
    Ok(stored.rows_affected() == 1)
}

/// Notifies the other replicas that tokens changed. Not part of the transaction that stores a token:
/// NOTIFY takes a lock of the whole database cluster until its commit.
///
/// # Errors
/// When the database cannot be reached; the others then find out by polling.
#[instrument(level = "debug", skip_all)]
pub async fn notify(pool: &PgPool) -> Result<(), StoreError> {
    sqlx::query!("-- store::tokens::notify\nselect pg_notify($1, '')", CHANNEL)
        .execute(pool)
        .await?;
    Ok(())
}
