//! Leases. A lease is the permission to issue one token for one account. Claiming it stores the start of the
//! attempt, before the upstream is called. Each later write contains the number of the lease, so that a write
//! under a superseded lease has no effect (fencing). All times are by the database's clock.
//!
//! Lock order of the tables: `accounts`, `refreshes`, `upstream_pace`.

use std::time::Duration;

use sqlx::{PgConnection, PgPool, Postgres, Transaction};
use tracing::instrument;

use super::{
    StoreError,
    accounts::{self, LoadedAccount},
    interval,
};
use crate::domain::{
    account::{AccountId, CredentialVersion},
    clock::{delta, until_from},
    refresh_policy::{IssueDecision, IssueView, RefreshPolicy},
    refresh_state::{IssueAttempt, IssueFailure},
    token::Generation,
};

/// The pause before a claim is repeated for an account whose row another transaction has locked.
const ROW_LOCKED_PAUSE: Duration = Duration::from_secs(1);
/// The pause before a claim is repeated when the limit of concurrent attempts is reached.
const CONCURRENCY_PAUSE: Duration = Duration::from_millis(200);

/// The replica that claims leases, and the limits that apply to its claims. All replicas of a database are
/// expected to have the same limits.
#[derive(Clone, Debug)]
pub struct LeaseHolder {
    /// The instance's id, unique among replicas.
    pub instance: String,
    /// The replica's number, which is part of the generations of its tokens.
    pub replica: u16,
    /// How long a lease lasts. This must be longer than an attempt may take, including storing its token.
    pub lease_duration: Duration,
    /// The rule that decides when a token may be issued for an account.
    pub policy: RefreshPolicy,
    /// The most attempts per second, of all replicas together.
    pub rate: f64,
    /// The most attempts at the same time, of all replicas together.
    pub concurrency: usize,
}

impl LeaseHolder {
    /// Returns the least time between the starts of two attempts, by the rate.
    #[must_use]
    pub fn pause_between_attempts(&self) -> Duration {
        Duration::from_secs_f64(1.0 / self.rate.max(0.001))
    }
}

/// The answer to a claim. After [`Claim::Wait`] and [`Claim::NotNeeded`], the caller should load the account,
/// since its state in the cache is outdated.
#[derive(Debug)]
#[must_use]
pub enum Claim {
    /// A token may be issued now, under this lease.
    Granted(Box<Lease>),
    /// No token may be issued for the account until this time has passed.
    Wait(Duration),
    /// The replicas together have reached the limit of the rate or of concurrent attempts: no token may be
    /// issued for any account until this time has passed.
    Paced(Duration),
    /// The account is gone, disabled or malformed, has no usable credential, or its token has been replaced.
    NotNeeded,
}

/// The permission to issue one token for one account, until the lease expires.
#[derive(Clone, Debug)]
#[must_use]
pub struct Lease {
    /// The fencing number, which grows with each lease of the account. Writes under an older one
    /// change nothing.
    pub id: i64,
    /// The attempt that the lease permits.
    pub attempt: IssueAttempt,
    /// The generation of the stored token when the lease was claimed.
    pub replaces: Option<Generation>,
    /// Whether the previous attempt has no recorded end, so that it may have issued a token.
    pub previous_attempt_lost: bool,
}

/// Claims a lease to replace generation `replaces` of the account's token, and stores the start of the
/// attempt.
///
/// `outage_ended` is how long ago the upstream's last outage ended, by the claimant's attempts. The pause
/// after a failure in that outage is skipped.
///
/// If another transaction has locked the row, the claim does not wait for it. If the future is dropped, the
/// transaction is rolled back, unless it was already committing; the lease expires in that case.
///
/// # Errors
/// When the database cannot be reached or refuses a statement.
#[instrument(level = "debug", skip_all, fields(%account))]
pub async fn claim(
    pool: &PgPool,
    account: AccountId,
    replaces: Option<Generation>,
    outage_ended: Option<Duration>,
    holder: &LeaseHolder,
) -> Result<Claim, StoreError> {
    let mut transaction = pool.begin().await?;
    // The row may be locked for long, for example by an admin's open transaction.
    let locked = sqlx::query!(
        "-- store::leases::claim
        select account_id from refreshes where account_id = $1 for update skip locked",
        account.0,
    )
    .fetch_optional(&mut *transaction)
    .await?;
    if locked.is_none() {
        return Ok(Claim::Wait(ROW_LOCKED_PAUSE));
    }
    // This must be a second statement, after the lock, so that its snapshot includes what the previous
    // owner of the lock committed.
    let Some(row) = accounts::load(&mut *transaction, &[account.0]).await?.rows.pop() else {
        return Ok(Claim::NotNeeded);
    };
    let outage_ended_at = outage_ended.map(|ago| row.now - delta(ago));
    let view = IssueView::locked(&row.account, &row.refresh, replaces, outage_ended_at);
    let (version, uses_interval_exception) = match holder.policy.decide(&view, row.now) {
        IssueDecision::Issue { credential_version, uses_interval_exception } => {
            (credential_version, uses_interval_exception)
        }
        IssueDecision::WaitUntil(at) => return Ok(Claim::Wait(until_from(row.now, at))),
        IssueDecision::NotNeeded => return Ok(Claim::NotNeeded),
    };
    // Every claim locks the row of `upstream_pace`, so that leases are granted one after the other. It is
    // locked last, to be locked as briefly as possible.
    if let Some(pause) = upstream_pause(&mut transaction, holder).await? {
        return Ok(Claim::Paced(pause));
    }
    let lease =
        stamp_attempt(&mut transaction, row, version, uses_interval_exception, holder).await?;
    sqlx::query!(
        "-- store::leases::claim
        update upstream_pace
        set next_slot = greatest(next_slot + $1, clock_timestamp())",
        interval(holder.pause_between_attempts()),
    )
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(Claim::Granted(Box::new(lease)))
}

/// Returns how long the limits of the rate and of concurrent attempts delay the claim; `None` if they do not.
async fn upstream_pause(
    transaction: &mut Transaction<'_, Postgres>,
    holder: &LeaseHolder,
) -> Result<Option<Duration>, StoreError> {
    let pace = sqlx::query!(
        r#"-- store::leases::upstream_pause
        select next_slot, clock_timestamp() as "now!" from upstream_pace for update"#
    )
    .fetch_one(&mut **transaction)
    .await?;
    if pace.next_slot > pace.now {
        return Ok(Some(until_from(pace.now, pace.next_slot)));
    }
    let leases = sqlx::query_scalar!(
        r#"-- store::leases::upstream_pause
        select count(*) as "leases!"
        from refreshes where lease_until > clock_timestamp()"#
    )
    .fetch_one(&mut **transaction)
    .await?;
    let full = usize::try_from(leases).is_ok_and(|leases| leases >= holder.concurrency);
    Ok(full.then_some(CONCURRENCY_PAUSE))
}

/// Stores the lease of `holder` and the start of the attempt in the account's locked row.
async fn stamp_attempt(
    transaction: &mut Transaction<'_, Postgres>,
    row: LoadedAccount,
    version: CredentialVersion,
    uses_interval_exception: bool,
    holder: &LeaseHolder,
) -> Result<Lease, StoreError> {
    let LoadedAccount { account, refresh, now, .. } = row;
    let previous_attempt_lost = refresh.attempt_open;
    let exceptions = refresh.interval_exceptions.after_issue(now, uses_interval_exception);
    let stamped = sqlx::query!(
        r#"-- store::leases::stamp_attempt
        update refreshes set lease_holder = $2, lease_id = lease_id + 1,
            lease_until = clock_timestamp() + $3, attempt_started_at = clock_timestamp(),
            attempt_ended_at = null, attempt_version = $4, possibly_revoked = possibly_revoked or $5,
            interval_exceptions = $6, interval_exceptions_since = $7, changed = pg_current_xact_id()
        where account_id = $1
        returning lease_id, attempt_started_at as "attempt_started_at!""#,
        account.id.0,
        holder.instance,
        interval(holder.lease_duration),
        version.0,
        previous_attempt_lost,
        i32::try_from(exceptions.used).unwrap_or(i32::MAX),
        exceptions.since,
    )
    .fetch_one(&mut **transaction)
    .await?;
    let replaces = refresh.stored_generation;
    let generation = Generation::next(stamped.attempt_started_at, holder.replica, replaces);
    let attempt = account.attempt(version, generation).ok_or_else(|| {
        StoreError::unreadable_row(
            "accounts",
            account.id,
            "it has no credential of the decided version",
        )
    })?;
    Ok(Lease { id: stamped.lease_id, attempt, replaces, previous_attempt_lost })
}

/// A failed attempt, with the values that are stored in the account's row.
#[derive(Clone, Debug)]
pub struct FailedAttempt {
    /// The failure.
    pub failure: IssueFailure,
    /// The pause before the next attempt; `None` if the account is suspended.
    pub retry_after: Option<Duration>,
    /// Whether the attempt may have issued a token that ended the stored one.
    pub possibly_revoked: bool,
}

/// Stores that the attempt under `lease` failed, and releases the lease. Returns `false`, and stores nothing,
/// if the account has another lease by now.
///
/// A failure of the previous credential does not overwrite the failure of the current one.
///
/// # Errors
/// When the database cannot be reached or refuses a statement; the lease then expires by itself.
#[instrument(level = "debug", skip_all, fields(account = %lease.attempt.account))]
pub async fn record_failure(
    pool: &PgPool,
    lease: &Lease,
    attempt: &FailedAttempt,
) -> Result<bool, StoreError> {
    let mut transaction = pool.begin().await?;
    if attempt.failure.class.suspends() {
        // If the secret was rotated during the attempt, the refused one was kept as the previous one.
        sqlx::query!(
            "-- store::leases::record_failure
            update accounts set previous_secret = null, previous_version = null
            where id = $1 and previous_version = $2",
            lease.attempt.account.0,
            lease.attempt.credential.version.0,
        )
        .execute(&mut *transaction)
        .await?;
    }
    let done = sqlx::query!(
        "-- store::leases::record_failure
        update refreshes set lease_holder = null, lease_until = null,
            attempt_ended_at = clock_timestamp(), possibly_revoked = possibly_revoked or $3,
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
        attempt.possibly_revoked,
        attempt.failure.class.as_str(),
        attempt.failure.code,
        attempt.failure.message,
        attempt.failure.version.0,
        attempt.retry_after.map(interval),
        lease.attempt.uses_current_credential,
    )
    .execute(&mut *transaction)
    .await?;
    if done.rows_affected() == 0 {
        return Ok(false);
    }
    transaction.commit().await?;
    Ok(true)
}

/// Releases a lease and stores the end of its attempt, without a result. The start of the attempt is kept,
/// since the minimum issue interval counts from it. Does nothing if the account has another lease by now.
///
/// # Errors
/// When the database cannot be reached or refuses the statement; the lease then expires by itself.
#[instrument(level = "debug", skip_all, fields(account = %lease.attempt.account))]
pub async fn release(pool: &PgPool, lease: &Lease) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::leases::release
        update refreshes set lease_holder = null, lease_until = null,
            attempt_ended_at = clock_timestamp(), changed = pg_current_xact_id()
        where account_id = $1 and lease_id = $2",
        lease.attempt.account.0,
        lease.id,
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Releases the leases of earlier processes of `instance`, all of which must have ended. Their attempts keep
/// no recorded end, since they may have issued tokens. A row that another transaction has locked is skipped;
/// its lease expires by itself.
///
/// # Errors
/// When the database cannot be reached or refuses the statement.
#[instrument(level = "debug", skip_all, fields(instance))]
pub async fn release_all(pool: &PgPool, instance: &str) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::leases::release_all
        with free as (
            select account_id from refreshes where lease_holder = $1 for update skip locked
        )
        update refreshes set lease_holder = null, lease_until = null,
            changed = pg_current_xact_id()
        from free where refreshes.account_id = free.account_id",
        instance,
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Marks the stored token as possibly revoked, so that it is replaced. With `reported`, it is marked
/// only if its generation is still the one that a caller reported as refused.
///
/// # Errors
/// When the database cannot be reached or refuses the statement.
#[instrument(level = "debug", skip_all, fields(%account))]
pub async fn mark_possibly_revoked(
    pool: &PgPool,
    account: AccountId,
    reported: Option<Generation>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::leases::mark_possibly_revoked
        update refreshes set possibly_revoked = true, changed = pg_current_xact_id()
        where account_id = $1 and ($2::bigint is null
            or exists (select from tokens where account_id = $1 and generation = $2))",
        account.0,
        reported.map(|generation| generation.0),
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Inserts the row of `upstream_pace` if somebody deleted it: without it, no lease can be claimed. Returns
/// whether it was missing.
///
/// # Errors
/// When the database cannot be reached or refuses the statement.
#[instrument(level = "debug", skip_all)]
pub async fn insert_missing_pace(connection: &mut PgConnection) -> Result<bool, StoreError> {
    let missing = sqlx::query_scalar!(
        r#"-- store::leases::insert_missing_pace
        select not exists (select from upstream_pace) as "missing!""#
    )
    .fetch_one(&mut *connection)
    .await?;
    // A login whose role is older than this statement may still read the row, but not insert one.
    if missing {
        sqlx::query!(
            "-- store::leases::insert_missing_pace
            insert into upstream_pace default values on conflict (single) do nothing"
        )
        .execute(connection)
        .await?;
    }
    Ok(missing)
}
