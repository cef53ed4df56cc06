//! The right to issue for one account: claimed by one replica, stamped before the call, fenced
//! afterwards. All times are the database's.

mod verdict;

use std::time::Duration;

use sqlx::{PgPool, Postgres, Transaction};

use verdict::{Row, Verdict};

use super::{StoreError, interval};
use crate::domain::{
    account::{AccountId, CredentialVersion},
    clock::until_from,
    refresh_state::{AccountCredential, IssueAttempt, IssueFailure},
    token::Generation,
};

/// When to ask again while somebody else's transaction holds the account.
const LOCKED: Duration = Duration::from_secs(1);
/// When to ask again while as many attempts are under way as may be.
const FULL: Duration = Duration::from_millis(200);

/// Who asks for the right to issue, and under what limits.
#[derive(Clone, Debug)]
pub struct LeaseHolder {
    /// The instance.
    pub instance: String,
    /// Its number in generations.
    pub replica: u16,
    /// How long the right lasts: longer than an attempt may take.
    pub lease: Duration,
    /// The least time between two attempts of one account.
    pub floor: Duration,
    /// Attempts a second of all replicas together.
    pub rate: f64,
    /// Attempts at once of all replicas together.
    pub concurrency: usize,
}

/// The answer to a claim.
#[derive(Debug)]
pub enum Claim {
    /// Issue now, under this lease.
    Granted(Box<Lease>),
    /// Not before so long: the account has another lease, the floor is not over, or the last failure
    /// is waited out. Load it.
    Wait(Duration),
    /// Not before so long: the replicas together are at the upstream's rate or concurrency.
    Paced(Duration),
    /// Nothing to issue: somebody else did, or the account is gone, disabled or parked. Load it.
    NotNeeded,
}

/// The right to issue once for one account.
#[derive(Clone, Debug)]
pub struct Lease {
    /// Grows with each lease of the account: what is done under an older one is refused.
    pub id: i64,
    /// What is to be issued.
    pub attempt: IssueAttempt,
    /// The generation of the token that was stored when it was claimed.
    pub replaces: Option<Generation>,
    /// The attempt before this one never ended: it may have issued.
    pub lost_attempt: bool,
}

/// Claims the right to replace generation `known` of `account`, and stamps the attempt. A pause after a
/// failure need not be waited out if the upstream's outage that it was for ended `outage_over` ago.
///
/// # Errors
/// When the database cannot be reached.
pub async fn claim(
    pool: &PgPool,
    account: AccountId,
    known: Option<Generation>,
    outage_over: Option<Duration>,
    claimant: &LeaseHolder,
) -> Result<Claim, StoreError> {
    let mut transaction = pool.begin().await?;
    // An admin's open transaction holds the row of the account it changes: nobody waits for it here.
    let locked = sqlx::query!(
        "-- store::leases::claim
        select account_id from refreshes where account_id = $1 for update skip locked",
        account.0,
    )
    .fetch_optional(&mut *transaction)
    .await?;
    if locked.is_none() {
        return Ok(Claim::Wait(LOCKED));
    }
    // Read after the lock was had, so that all three tables are as they are now.
    let Some(row) = sqlx::query_as!(
        Row,
        r#"-- store::leases::claim
        select a.client_id as "client_id!", a.enabled as "enabled!",
            a.credential_version as "credential_version!", a.sealed_secret as "sealed_secret?",
            a.previous_secret as "previous_secret?", a.previous_version as "previous_version?",
            a.reissue_requested_at as "reissue_requested_at?", r.lease_until as "lease_until?",
            r.attempt_started_at as "attempt_started_at?",
            r.attempt_ended_at as "attempt_ended_at?", r.attempt_version as "attempt_version?",
            r.floor_passes as "floor_passes!", r.floor_passes_since as "floor_passes_since?",
            r.error_class as "error_class?", r.error_version as "error_version?",
            r.next_attempt_at as "next_attempt_at?",
            t.generation as "generation?", clock_timestamp() as "now!"
        from accounts a
        join refreshes r on r.account_id = a.id
        left join tokens t on t.account_id = a.id
        where a.id = $1"#,
        account.0,
    )
    .fetch_optional(&mut *transaction)
    .await?
    else {
        return Ok(Claim::NotNeeded);
    };
    let (version, passes_floor) = match row.verdict(known, outage_over, claimant.floor) {
        Verdict::Go { version, passes_floor } => (version, passes_floor),
        Verdict::Wait(wait) => return Ok(Claim::Wait(wait)),
        Verdict::NotNeeded => return Ok(Claim::NotNeeded),
    };
    // The pace's row is locked last and by all, so that grants follow one another.
    if let Some(wait) = pace(&mut transaction, claimant).await? {
        return Ok(Claim::Paced(wait));
    }
    let lease = stamp(&mut transaction, account, row, version, passes_floor, claimant).await?;
    sqlx::query!(
        "-- store::leases::claim
        update upstream_pace
        set next_slot = greatest(next_slot + $1, clock_timestamp())",
        interval(Duration::from_secs_f64(1.0 / claimant.rate.max(0.001))),
    )
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(Claim::Granted(Box::new(lease)))
}

/// How long the upstream's rate and concurrency make the claimant wait; `None` for not at all.
async fn pace(
    transaction: &mut Transaction<'_, Postgres>,
    claimant: &LeaseHolder,
) -> Result<Option<Duration>, StoreError> {
    let slot = sqlx::query!(
        r#"-- store::leases::pace
        select next_slot, clock_timestamp() as "now!" from upstream_pace for update"#
    )
    .fetch_one(&mut **transaction)
    .await?;
    if slot.next_slot > slot.now {
        return Ok(Some(until_from(slot.now, slot.next_slot)));
    }
    let leases = sqlx::query_scalar!(
        r#"-- store::leases::pace
        select count(*) as "leases!"
        from refreshes where lease_until > clock_timestamp()"#
    )
    .fetch_one(&mut **transaction)
    .await?;
    let full = usize::try_from(leases).is_ok_and(|leases| leases >= claimant.concurrency);
    Ok(full.then_some(FULL))
}

async fn stamp(
    transaction: &mut Transaction<'_, Postgres>,
    account: AccountId,
    row: Row,
    version: i64,
    passes_floor: bool,
    claimant: &LeaseHolder,
) -> Result<Lease, StoreError> {
    let lost_attempt = row.attempt_started_at.is_some() && row.attempt_ended_at.is_none();
    let passes = row.passes_so_far();
    let since = row.floor_passes_since.filter(|_| passes > 0).unwrap_or(row.now);
    let stamped = sqlx::query!(
        r#"-- store::leases::stamp
        update refreshes set lease_owner = $2, lease_id = lease_id + 1,
            lease_until = clock_timestamp() + $3, attempt_started_at = clock_timestamp(),
            attempt_ended_at = null, attempt_version = $4, suspect = suspect or $5,
            floor_passes = $6, floor_passes_since = $7, changed = pg_current_xact_id()
        where account_id = $1
        returning lease_id, attempt_started_at as "attempt_started_at!""#,
        account.0,
        claimant.instance,
        interval(claimant.lease),
        version,
        lost_attempt,
        passes + i32::from(passes_floor),
        since,
    )
    .fetch_one(&mut **transaction)
    .await?;
    let sealed_secret =
        if version == row.credential_version { row.sealed_secret } else { row.previous_secret };
    let replaces = row.generation.map(Generation);
    let attempt = IssueAttempt {
        account,
        client_id: row
            .client_id
            .parse()
            .map_err(|_| StoreError::unreadable_row("accounts", account, "malformed client_id"))?,
        credential: AccountCredential {
            version: CredentialVersion(version),
            secret: sealed_secret.unwrap_or_default().into(),
        },
        current: version == row.credential_version,
        generation: Generation::next(stamped.attempt_started_at, claimant.replica, replaces),
    };
    Ok(Lease { id: stamped.lease_id, attempt, replaces, lost_attempt })
}

/// How a failed attempt is to be remembered.
#[derive(Clone, Debug)]
pub struct FailedAttempt {
    /// What went wrong.
    pub failure: IssueFailure,
    /// Not before so long; `None` parks the account.
    pub retry_after: Option<Duration>,
    /// The stored token may have been ended by what this attempt issued.
    pub suspect: bool,
}

/// Records that the attempt under `lease` failed, and gives the lease back. `false` when the lease
/// had passed to another by then. A failure of the credential before the current one does not hide
/// why the current one is refused.
///
/// # Errors
/// When the database cannot be reached; the lease then runs out by itself.
pub async fn fail(
    pool: &PgPool,
    lease: &Lease,
    attempt: &FailedAttempt,
) -> Result<bool, StoreError> {
    let mut transaction = pool.begin().await?;
    if attempt.failure.class.parks() {
        // One that is refused is not kept, be it that a rotation came during the attempt.
        sqlx::query!(
            "-- store::leases::fail
            update accounts set previous_secret = null, previous_version = null
            where id = $1 and previous_version = $2",
            lease.attempt.account.0,
            lease.attempt.credential.version.0,
        )
        .execute(&mut *transaction)
        .await?;
    }
    let done = sqlx::query!(
        "-- store::leases::fail
        update refreshes set lease_owner = null, lease_until = null,
            attempt_ended_at = clock_timestamp(), suspect = suspect or $3,
            consecutive_failures = consecutive_failures + 1,
            error_class = case when $9 then $4 else error_class end,
            error_code = case when $9 then $5 else error_code end,
            error_message = case when $9 then $6 else error_message end,
            error_version = case when $9 then $7 else error_version end,
            next_attempt_at = clock_timestamp() + $8,
            changed = pg_current_xact_id()
        where account_id = $1 and lease_id = $2",
        lease.attempt.account.0,
        lease.id,
        attempt.suspect,
        attempt.failure.class.as_str(),
        attempt.failure.code,
        attempt.failure.message,
        attempt.failure.version.0,
        attempt.retry_after.map(interval),
        lease.attempt.current,
    )
    .execute(&mut *transaction)
    .await?;
    if done.rows_affected() == 0 {
        return Ok(false);
    }
    transaction.commit().await?;
    Ok(true)
}

/// Gives back a lease under which the upstream was not called. The stamp stays: the floor counts
/// from it.
///
/// # Errors
/// When the database cannot be reached; the lease then runs out by itself.
pub async fn give_back(pool: &PgPool, lease: &Lease) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::leases::give_back
        update refreshes set lease_owner = null, lease_until = null,
            attempt_ended_at = clock_timestamp(), changed = pg_current_xact_id()
        where account_id = $1 and lease_id = $2",
        lease.attempt.account.0,
        lease.id,
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Gives back what leases `instance` has from an earlier process, which must be gone. Their attempts
/// stay without an end: they may have issued. Rows that somebody else holds keep theirs.
///
/// # Errors
/// When the database cannot be reached.
pub async fn give_back_all(pool: &PgPool, instance: &str) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::leases::give_back_all
        with free as (
            select account_id from refreshes where lease_owner = $1 for update skip locked
        )
        update refreshes set lease_owner = null, lease_until = null,
            changed = pg_current_xact_id()
        from free where refreshes.account_id = free.account_id",
        instance,
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Marks the stored token as possibly ended: by an issue that could not be stored, or, where
/// `reported` names its generation, by what a caller reports of it. A token of another generation
/// than the reported one is left alone.
///
/// # Errors
/// When the database cannot be reached.
pub async fn suspect(
    pool: &PgPool,
    account: AccountId,
    reported: Option<Generation>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::leases::suspect
        update refreshes set suspect = true, changed = pg_current_xact_id()
        where account_id = $1 and ($2::bigint is null
            or exists (select from tokens where account_id = $1 and generation = $2))",
        account.0,
        reported.map(|generation| generation.0),
    )
    .execute(pool)
    .await?;
    Ok(())
}
