//! Leases. A lease is the permission to issue one token for one account. Claiming it stores the start of the
//! attempt, before the upstream is called. Each later write contains the number of the lease, so that a write
//! under a superseded lease has no effect (fencing). All times are by the database's clock.
//!
//! Lock order of the tables: `refreshes`, `upstream_pace`, `upstream_calls`. Nothing here locks `accounts`, whose
//! rows admins may lock for long.

use std::time::Duration;

use sqlx::{PgConnection, PgPool, Postgres, Transaction};
use tracing::instrument;

use super::{
    StoreError,
    accounts::{self, LoadedAccount},
    begin, interval,
};
use crate::domain::{
    account::{AccountId, CredentialVersion},
    attempt_priority::{ConcurrencyLimits, PriorityClass, RunningAttempts},
    clock::{Timestamp, delta, until_from},
    plausible_time::{AttemptTimeLimits, LONGEST_LEASE},
    refresh_policy::{IssueDecision, IssueView, RefreshPolicy},
    refresh_state::{IssueAttempt, IssueFailure},
    token::{Generation, SealedToken},
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
    /// The random number of this process's start. Once another process has taken the instance over, no lease
    /// is granted to this one.
    pub start: String,
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

    /// Returns the rules that bound the times of stored attempts.
    #[must_use]
    pub fn time_limits(&self) -> AttemptTimeLimits {
        AttemptTimeLimits { policy: self.policy }
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
    /// The replicas together have reached the limit of the rate, or of concurrent attempts for accounts of
    /// this priority: no token may be issued for such an account until this time has passed.
    Paced(Duration),
    /// The account is gone, disabled or malformed, has no usable credential or another one than the claimant has
    /// scheduled, or its token has been replaced.
    NotNeeded,
}

/// What distinguishes a lease from all others of its account.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LeaseKey {
    /// See [`Lease::id`].
    pub id: i64,
    /// See [`Lease::started_at`].
    pub started_at: Timestamp,
}

/// The permission to issue one token for one account, until the lease expires.
#[derive(Clone, Debug)]
#[must_use]
pub struct Lease {
    /// The fencing number, which grows with each lease of the account. Writes under an older one
    /// change nothing.
    pub id: i64,
    /// When the attempt began, by the database's clock. The number alone is not enough: if a failover loses a claim,
    /// the next lease gets the same number again.
    pub started_at: Timestamp,
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
/// `credential` is the one that the claimant has scheduled; `None` for any. If another one is to be used by now,
/// the answer is [`Claim::NotNeeded`].
///
/// `outage_ended` is how long ago the upstream's last outage ended, by the claimant's attempts. The pause
/// after a failure in that outage is skipped.
///
/// If another transaction has locked the row, the claim does not wait for it; for other locks it waits half a
/// second at most. If the future is dropped, the transaction is rolled back, unless it was already committing;
/// the lease expires in that case.
///
/// # Errors
/// When the database cannot be reached or refuses a statement.
#[instrument(level = "debug", skip_all, fields(%account))]
pub async fn claim(
    pool: &PgPool,
    account: AccountId,
    replaces: Option<Generation>,
    credential: Option<CredentialVersion>,
    outage_ended: Option<Duration>,
    holder: &LeaseHolder,
) -> Result<Claim, StoreError> {
    let mut transaction = begin(pool).await?;
    // The row may be locked for long, for example by an admin's open transaction.
    let locked = sqlx::query!(
        "-- store::leases::claim
        select account_id from refreshes
        where account_id = $1
            and not exists (select from instances where id = $2 and start_nonce <> $3)
        for update skip locked",
        account.0,
        holder.instance,
        holder.start,
    )
    .fetch_optional(&mut *transaction)
    .await?;
    if locked.is_none() {
        return Ok(Claim::Wait(ROW_LOCKED_PAUSE));
    }
    // This must be a second statement, after the lock, so that its snapshot includes what the previous
    // owner of the lock committed.
    let Some(mut row) = accounts::load(&mut *transaction, &[account.0]).await?.rows.pop() else {
        return Ok(Claim::NotNeeded);
    };
    let lease_shortened = holder.time_limits().correct(&mut row.refresh, row.now);
    let outage_ended_at = outage_ended.map(|ago| row.now - delta(ago));
    // A token that was issued in the future was stored before the database's clock was set back.
    let token = row.token.as_ref().filter(|token| token.issued_at <= row.now);
    let view = IssueView::locked(&row.account, &row.refresh, replaces, outage_ended_at)
        .repeating_until(token.and_then(SealedToken::repeats_until))
        .for_credential(credential);
    let (version, uses_interval_exception) = match holder.policy.decide(&view, row.now) {
        IssueDecision::Issue { credential_version, uses_interval_exception } => {
            (credential_version, uses_interval_exception)
        }
        IssueDecision::WaitUntil(at) => {
            if lease_shortened {
                store_shortened_lease(transaction, &row).await?;
            }
            return Ok(Claim::Wait(until_from(row.now, at)));
        }
        IssueDecision::NotNeeded => return Ok(Claim::NotNeeded),
    };
    // Every claim locks the row of `upstream_pace`, so that leases are granted one after the other. It is
    // locked last, to be locked as briefly as possible.
    let priority = view.priority_class(version);
    if let Some(pause) = upstream_pause(&mut transaction, priority, holder).await? {
        return Ok(Claim::Paced(pause));
    }
    let lease =
        stamp_attempt(&mut transaction, row, version, uses_interval_exception, holder).await?;
    sqlx::query!(
        "-- store::leases::claim
        insert into upstream_calls (account_id, lease_id, until, priority)
        values ($1, $2, clock_timestamp() + $3, $4)
        on conflict (account_id) do update
        set lease_id = excluded.lease_id, until = excluded.until, priority = excluded.priority",
        account.0,
        lease.id,
        interval(holder.lease_duration),
        priority.as_str(),
    )
    .execute(&mut *transaction)
    .await?;
    // A slot in the future was stored before the database's clock was set back.
    sqlx::query!(
        "-- store::leases::claim
        update upstream_pace set next_slot =
            greatest(least(next_slot, clock_timestamp()) + $1, clock_timestamp())",
        interval(holder.pause_between_attempts()),
    )
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(Claim::Granted(Box::new(lease)))
}

/// Stores the end of a lease that [`AttemptTimeLimits::correct`] has shortened, so that it comes, and commits.
async fn store_shortened_lease(
    mut transaction: Transaction<'_, Postgres>,
    row: &LoadedAccount,
) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::leases::store_shortened_lease
        update refreshes set lease_until = $2 where account_id = $1",
        row.account.id.0,
        row.refresh.lease_until,
    )
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(())
}

/// Returns how long the limits of the rate and of concurrent attempts delay the claim; `None` if they do not.
async fn upstream_pause(
    transaction: &mut Transaction<'_, Postgres>,
    priority: PriorityClass,
    holder: &LeaseHolder,
) -> Result<Option<Duration>, StoreError> {
    let pace = sqlx::query!(
        r#"-- store::leases::upstream_pause
        select case when next_slot between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then next_slot else clock_timestamp() end as "next_slot!",
            clock_timestamp() as "now!"
        from upstream_pace for update"#
    )
    .fetch_one(&mut **transaction)
    .await?;
    // A claim sets the slot to one pause after its own time. Slots that are further away, and leases that are
    // longer than any replica's, were stored before the database's clock was set back, and would stop every
    // account.
    let pause = until_from(pace.now, pace.next_slot);
    if !pause.is_zero() && pause <= holder.pause_between_attempts() {
        return Ok(Some(pause));
    }
    let calls = sqlx::query_scalar!(
        "-- store::leases::upstream_pause
        select priority from upstream_calls
        where until > clock_timestamp() and until <= clock_timestamp() + $1",
        interval(LONGEST_LEASE),
    )
    .fetch_all(&mut **transaction)
    .await?;
    // A later release may have other classes.
    let class = |name: String| {
        let mut classes = PriorityClass::ALL.into_iter();
        classes.find(|class| class.as_str() == name).unwrap_or(PriorityClass::Proven)
    };
    let running = RunningAttempts::count(calls.into_iter().map(class));
    let admitted = ConcurrencyLimits::new(holder.concurrency).admit(priority, running);
    Ok((!admitted).then_some(CONCURRENCY_PAUSE))
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
            interval_exceptions = $6, interval_exceptions_since = $7, answered_reissue = $8,
            changed = pg_current_xact_id()
        where account_id = $1
        returning lease_id, attempt_started_at as "attempt_started_at!""#,
        account.id.0,
        holder.instance,
        interval(holder.lease_duration),
        version.0,
        previous_attempt_lost,
        i32::try_from(exceptions.used).unwrap_or(i32::MAX),
        exceptions.since,
        account.reissue_requested_at,
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
    let (id, started_at) = (stamped.lease_id, stamped.attempt_started_at);
    Ok(Lease { id, started_at, attempt, replaces, previous_attempt_lost })
}

impl Lease {
    /// Returns what distinguishes this lease from all others of its account.
    #[must_use]
    pub fn key(&self) -> LeaseKey {
        LeaseKey { id: self.id, started_at: self.started_at }
    }
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
/// A failure of the previous credential does not overwrite the failure of the current one. If the upstream
/// refused it, it is not used again: see [`accounts::drop_replaced_credentials`]. A failure of the current one
/// does not delay the previous one, which is kept beside it.
///
/// # Errors
/// When the database cannot be reached or refuses a statement; the lease then expires by itself.
#[instrument(level = "debug", skip_all, fields(account = %lease.attempt.account))]
pub async fn record_failure(
    pool: &PgPool,
    lease: &Lease,
    attempt: &FailedAttempt,
) -> Result<bool, StoreError> {
    let mut transaction = begin(pool).await?;
    let done = sqlx::query!(
        "-- store::leases::record_failure
        update refreshes set lease_holder = null, lease_until = null,
            attempt_ended_at = clock_timestamp(), possibly_revoked = possibly_revoked or $3,
            consecutive_failures = consecutive_failures + case when $11 then 0 else 1 end,
            error_class = case when $9 then $4 else error_class end,
            error_code = case when $9 then $5 else error_code end,
            error_message = case when $9 then $6 else error_message end,
            error_version = case when $9 then $7 else error_version end,
            refused_version = case when $10 then $7 else refused_version end,
            next_attempt_at = case when $11 then next_attempt_at else clock_timestamp() + $8 end,
            new_secret_failures = case when not $11 then new_secret_failures
                when error_version = $7 then new_secret_failures + 1 else 1 end,
            new_secret_retry_at = case when $11 then clock_timestamp() + $8
                else new_secret_retry_at end,
            changed = pg_current_xact_id()
        where account_id = $1 and lease_id = $2 and attempt_started_at = $12",
        lease.attempt.account.0,
        lease.id,
        attempt.possibly_revoked,
        attempt.failure.class.as_str(),
        attempt.failure.code,
        attempt.failure.message,
        attempt.failure.version.0,
        attempt.retry_after.map(interval),
        lease.attempt.uses_current_credential,
        attempt.failure.class.suspends(),
        lease.attempt.has_fallback,
        lease.started_at,
    )
    .execute(&mut *transaction)
    .await?;
    delete_call(&mut transaction, lease).await?;
    transaction.commit().await?;
    Ok(done.rows_affected() == 1)
}

/// Releases a lease and stores the end of its attempt, without a result. The start of the attempt is kept,
/// since the minimum issue interval counts from it. Does nothing if the account has another lease by now.
///
/// # Errors
/// When the database cannot be reached or refuses the statement; the lease then expires by itself.
#[instrument(level = "debug", skip_all, fields(account = %lease.attempt.account))]
pub async fn release(pool: &PgPool, lease: &Lease) -> Result<(), StoreError> {
    let mut transaction = begin(pool).await?;
    sqlx::query!(
        "-- store::leases::release
        update refreshes set lease_holder = null, lease_until = null,
            attempt_ended_at = clock_timestamp(), changed = pg_current_xact_id()
        where account_id = $1 and lease_id = $2 and attempt_started_at = $3",
        lease.attempt.account.0,
        lease.id,
        lease.started_at,
    )
    .execute(&mut *transaction)
    .await?;
    delete_call(&mut transaction, lease).await?;
    Ok(transaction.commit().await?)
}

/// Stores that the call to the upstream under `lease` has ended, while its result cannot be stored because
/// the account's row is locked. The call no longer counts towards the limit of concurrent ones.
///
/// # Errors
/// When the database cannot be reached or refuses the statement; the call then counts until its lease
/// expires.
#[instrument(level = "debug", skip_all, fields(account = %lease.attempt.account))]
pub async fn end_call(pool: &PgPool, lease: &Lease) -> Result<(), StoreError> {
    let mut transaction = begin(pool).await?;
    delete_call(&mut transaction, lease).await?;
    Ok(transaction.commit().await?)
}

/// Deletes the call of `lease`, but not that of another lease that has the same number.
pub(super) async fn delete_call(
    transaction: &mut Transaction<'_, Postgres>,
    lease: &Lease,
) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::leases::delete_call
        delete from upstream_calls
        where account_id = $1 and lease_id = $2 and not exists (
            select from refreshes where account_id = $1 and attempt_started_at is distinct from $3)",
        lease.attempt.account.0,
        lease.id,
        lease.started_at,
    )
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

/// Deletes the calls of replicas that were killed, once their leases have expired.
///
/// # Errors
/// When the database cannot be reached or refuses the statement.
#[instrument(level = "debug", skip_all)]
pub async fn delete_expired_calls(pool: &PgPool) -> Result<(), StoreError> {
    let mut transaction = begin(pool).await?;
    sqlx::query!(
        "-- store::leases::delete_expired_calls
        with expired as (
            select account_id from upstream_calls where until < clock_timestamp()
            for update skip locked
        )
        delete from upstream_calls c using expired where c.account_id = expired.account_id",
    )
    .execute(&mut *transaction)
    .await?;
    Ok(transaction.commit().await?)
}

/// Releases the leases and the places of the calls of earlier processes of `instance`, all of which must have ended. Their attempts keep
/// no recorded end, since they may have issued tokens. A row that another transaction has locked is skipped;
/// its lease expires by itself.
///
/// # Errors
/// When the database cannot be reached or refuses the statement.
#[instrument(level = "debug", skip_all, fields(instance))]
pub async fn release_all(pool: &PgPool, instance: &str) -> Result<(), StoreError> {
    let mut transaction = begin(pool).await?;
    sqlx::query!(
        "-- store::leases::release_all
        with free as (
            select account_id from refreshes where lease_holder = $1 for update skip locked
        ), ended as (
            delete from upstream_calls c using refreshes r, free
            where r.account_id = free.account_id
                and c.account_id = r.account_id and c.lease_id = r.lease_id
        )
        update refreshes set lease_holder = null, lease_until = null,
            changed = pg_current_xact_id()
        from free where refreshes.account_id = free.account_id",
        instance,
    )
    .execute(&mut *transaction)
    .await?;
    Ok(transaction.commit().await?)
}

/// Marks the stored token as possibly revoked, so that it is replaced. With `reported`, it is marked
/// only if its generation is still the one that a caller reported as refused.
///
/// # Errors
/// When the database cannot be reached or refuses the statement, or the account's row stays locked.
#[instrument(level = "debug", skip_all, fields(%account))]
pub async fn mark_possibly_revoked(
    pool: &PgPool,
    account: AccountId,
    reported: Option<Generation>,
) -> Result<(), StoreError> {
    let mut transaction = begin(pool).await?;
    sqlx::query!(
        "-- store::leases::mark_possibly_revoked
        update refreshes set possibly_revoked = true, changed = pg_current_xact_id()
        where account_id = $1 and ($2::bigint is null
            or exists (select from tokens where account_id = $1 and generation = $2))",
        account.0,
        reported.map(|generation| generation.0),
    )
    .execute(&mut *transaction)
    .await?;
    Ok(transaction.commit().await?)
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
