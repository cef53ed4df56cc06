//! Sealed tokens: committed under a lease, and told to the other replicas.

use sqlx::PgPool;

use super::StoreError;
use crate::{clock::Timestamp, store::leases::Lease};

/// The channel on which replicas tell one another that tokens or attempts changed.
pub const CHANNEL: &str = "token_broker_tokens";

/// A sealed token, ready to be stored.
#[derive(Clone, Debug)]
pub struct NewToken {
    /// The sealed JWT, bound to the account and the lease's generation.
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
    let account = sqlx::query!(
        "-- store::tokens::commit
        select credential_version, previous_version from accounts where id = $1 for share",
        lease.account.0,
    )
    .fetch_optional(&mut *transaction)
    .await?;
    let version = lease.version.0;
    let same = account.is_some_and(|account| {
        account.credential_version == version || account.previous_version == Some(version)
    });
    let held = sqlx::query!(
        "-- store::tokens::commit
        select suspect from refreshes where account_id = $1 and lease_id = $2 for update",
        lease.account.0,
        lease.id,
    )
    .fetch_optional(&mut *transaction)
    .await?;
    let Some(held) = held.filter(|_| same) else { return Ok(Commit::Fenced) };
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
        lease.account.0,
        lease.current,
    )
    .execute(&mut *transaction)
    .await?;
    let stored = sqlx::query!(
        "-- store::tokens::commit
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
        lease.account.0,
        version,
        lease.generation.0,
        token.sealed,
        token.issued_at,
        token.expires_at,
        token.allowed_ip,
        token.fingerprint,
        ends_older || held.suspect,
    )
    .execute(&mut *transaction)
    .await?;
    if lease.current {
        sqlx::query!(
            "-- store::tokens::commit
            update accounts set previous_secret = null, previous_version = null
            where id = $1 and credential_version = $2 and previous_secret is not null",
            lease.account.0,
            version,
        )
        .execute(&mut *transaction)
        .await?;
    }
    transaction.commit().await?;
    Ok(if stored.rows_affected() == 1 { Commit::Stored } else { Commit::KeptLonger })
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
