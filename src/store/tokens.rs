//! Sealed tokens, which are stored under a lease, or reconciled after they were issued without the database.

use std::time::Duration;

use sqlx::{PgPool, Postgres, Transaction};
use tracing::instrument;

use super::{StoreError, begin, interval};
use crate::{
    domain::{
        account::{AccountId, CredentialVersion},
        clock::{Clock, Timestamp, delta, until_from},
        token::{Generation, SealedToken},
    },
    store::leases::{self, Lease, LeaseKey},
};

/// The channel on which replicas notify each other of new tokens.
pub const CHANNEL: &str = "token_broker_tokens";

/// The result of [`commit`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum CommitOutcome {
    /// The token is the account's token now.
    Stored,
    /// The token was not stored: the account is gone, or has another lease or credential by now.
    Fenced,
    /// The token was not stored: the stored one lives longer, and new tokens do not end older ones, or the
    /// stored one has a later generation.
    StoredLivesLonger,
}

/// Stores `token` as the account's token and releases `lease`, if the lease is still the account's latest
/// one, and the token's credential is still the account's current or previous one.
///
/// If a new token ends older ones (`new_token_ends_older`), or the stored token is possibly revoked, the
/// later issued token replaces the other, since only that one is known to be live. Otherwise the token with
/// the later end is kept. Ends that differ by less than 5 seconds count as equal, since clocks differ. A stored
/// token with a later generation is always kept; if new tokens end older ones, it is marked as possibly revoked.
///
/// Takes no lock of `accounts`, so no statement of an admin on accounts delays it.
///
/// `clock` tells the token's age and the rest of its life, from which its times by the database's clock follow.
///
/// Idempotent: committing the same token again has no further effect.
///
/// # Errors
/// [`StoreError::Locked`] if another transaction has locked the account's row of `refreshes` or one of the
/// tables; the token was not stored then. After any other error, whether it was stored is unknown.
#[instrument(level = "debug", skip_all, fields(account = %lease.attempt.account))]
pub async fn commit(
    pool: &PgPool,
    lease: &Lease,
    token: &SealedToken,
    new_token_ends_older: bool,
    clock: &Clock,
) -> Result<CommitOutcome, StoreError> {
    let account = lease.attempt.account;
    let mut transaction = begin(pool).await?;
    let held = sqlx::query!(
        "-- store::tokens::commit
        select possibly_revoked from refreshes
        where account_id = $1 and lease_id = $2 and attempt_started_at = $3 for update",
        account.0,
        lease.id,
        lease.started_at,
    )
    .fetch_optional(&mut *transaction)
    .await?;
    let Some(held) = held else {
        return Ok(CommitOutcome::Fenced);
    };
    if issuer(&mut transaction, account, token.credential_version).await? == Issuer::Gone {
        return Ok(CommitOutcome::Fenced);
    }
    let replace_longer_lived = new_token_ends_older || held.possibly_revoked;
    let stored = put(&mut transaction, account, token, replace_longer_lived, clock).await?;
    let possibly_revoked = new_token_ends_older && !stored;
    record_success(&mut transaction, lease, token.credential_version, possibly_revoked).await?;
    transaction.commit().await?;
    Ok(if stored { CommitOutcome::Stored } else { CommitOutcome::StoredLivesLonger })
}

/// Stores that the attempt under `lease` succeeded with the credential of `version`, and whether the stored token
/// may be revoked, and releases the lease.
async fn record_success(
    transaction: &mut Transaction<'_, Postgres>,
    lease: &Lease,
    version: CredentialVersion,
    possibly_revoked: bool,
) -> Result<(), StoreError> {
    // A success must not clear the failure of a later credential.
    sqlx::query!(
        "-- store::tokens::record_success
        update refreshes set lease_holder = null, lease_until = null,
            attempt_ended_at = clock_timestamp(), possibly_revoked = $3, consecutive_failures = 0,
            error_class = case when error_version > $2 then error_class end,
            error_code = case when error_version > $2 then error_code end,
            error_message = case when error_version > $2 then error_message end,
            error_version = case when error_version > $2 then error_version end,
            refused_version = nullif(refused_version, $2),
            new_secret_failures = case when error_version > $2 then new_secret_failures else 0 end,
            new_secret_retry_at = case when error_version > $2 then new_secret_retry_at end,
            next_attempt_at = null, changed = pg_current_xact_id()
        where account_id = $1",
        lease.attempt.account.0,
        version.0,
        possibly_revoked,
    )
    .execute(&mut **transaction)
    .await?;
    leases::delete_call(transaction, lease).await
}

/// The result of [`repeat`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum RepeatOutcome {
    /// The stored token is marked as repeated at this time of the database's clock: see
    /// [`Token::repeated_at`](crate::domain::token::Token::repeated_at).
    Marked(Timestamp),
    /// Nothing was stored, since the account has another token, or none, by now.
    Replaced,
    /// Nothing was stored: the account is gone, or has another lease or credential by now.
    Fenced,
}

/// Marks the stored token of `generation` as one that the upstream gave again under `lease`, and releases the
/// lease. The token counts as one of the lease's credential from then on, so that this credential counts as one
/// that has issued. `end` is the token's new end by the time of this process, if it has changed.
///
/// # Errors
/// As those of [`commit`].
#[instrument(level = "debug", skip_all, fields(account = %lease.attempt.account))]
pub async fn repeat(
    pool: &PgPool,
    lease: &Lease,
    generation: Generation,
    end: Option<Timestamp>,
    clock: &Clock,
) -> Result<RepeatOutcome, StoreError> {
    let (account, version) = (lease.attempt.account, lease.attempt.credential.version);
    let mut transaction = begin(pool).await?;
    let held = sqlx::query!(
        "-- store::tokens::repeat
        select lease_id from refreshes
        where account_id = $1 and lease_id = $2 and attempt_started_at = $3 for update",
        account.0,
        lease.id,
        lease.started_at,
    )
    .fetch_optional(&mut *transaction)
    .await?;
    if held.is_none() || issuer(&mut transaction, account, version).await? == Issuer::Gone {
        return Ok(RepeatOutcome::Fenced);
    }
    let left = end.map(|end| until_from(clock.now(), end));
    let marked = sqlx::query_scalar!(
        r#"-- store::tokens::repeat
        update tokens set repeated_at = clock_timestamp(), credential_version = $3,
            expires_at = coalesce(clock_timestamp() + $4::interval, expires_at),
            issuer_expires_at = coalesce($5, issuer_expires_at), changed = pg_current_xact_id()
        where account_id = $1 and generation = $2
        returning repeated_at as "repeated_at!""#,
        account.0,
        generation.0,
        version.0,
        left.map(interval),
        left.map(|left| clock.wall() + delta(left)),
    )
    .fetch_optional(&mut *transaction)
    .await?;
    let Some(repeated_at) = marked else { return Ok(RepeatOutcome::Replaced) };
    record_success(&mut transaction, lease, version, false).await?;
    transaction.commit().await?;
    Ok(RepeatOutcome::Marked(repeated_at))
}

/// The result of [`reconcile`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum ReconcileOutcome {
    /// The token is the account's token now.
    Stored,
    /// The token was dropped: another one was stored meanwhile, or its account or credential no longer
    /// exists.
    Dropped,
    /// Nothing was done, since another replica holds the account's lease: try again later.
    LeaseHeld,
}

/// A token that was issued but could not be stored, because the database did not answer.
#[derive(Clone, Debug)]
pub struct PendingToken {
    /// The token.
    pub token: SealedToken,
    /// The generation of the stored token when this one was issued.
    pub replaces: Option<Generation>,
    /// The lease under which it was issued; `None` if there was none. A token that was stored since a lease is
    /// known to be later.
    pub lease: Option<LeaseKey>,
}

/// The input of [`reconcile`] besides the token.
#[derive(Clone, Copy, Debug)]
pub struct ReconcileContext<'a> {
    /// The instance that issued the token.
    pub instance: &'a str,
    /// The clock by which the token was issued and ends.
    pub clock: &'a Clock,
    /// How long a lease lasts. A lease that ends later was claimed before the database's clock was set back.
    pub lease_duration: Duration,
    /// Whether a later attempt may have issued another token.
    pub possibly_revoked: bool,
    /// Whether the upstream ends older tokens when it issues a new one.
    pub new_token_ends_older: bool,
}

/// Stores a token that was issued while the database did not answer, unless another one was stored since. If
/// it is not known which of the two was issued later, and new tokens end older ones, the stored one is marked
/// as possibly revoked.
///
/// If another attempt began after the token's issue, the token is stored, but what the rows say of that attempt
/// remains: it may have issued a token that ended this one, so this one counts as possibly revoked where new
/// tokens end older ones.
///
/// Idempotent: reconciling the same token again has no further effect.
///
/// # Errors
/// [`StoreError::Locked`], at once, if another transaction has locked the account's row of `refreshes`.
/// After any other error, whether the token was stored is unknown.
#[instrument(level = "debug", skip_all, fields(%account))]
pub async fn reconcile(
    pool: &PgPool,
    account: AccountId,
    orphan: &PendingToken,
    context: ReconcileContext<'_>,
) -> Result<ReconcileOutcome, StoreError> {
    let PendingToken { token, replaces, lease } = orphan;
    let mut transaction = begin(pool).await?;
    let Some(found) = sqlx::query!(
        r#"-- store::tokens::reconcile
        select coalesce(lease_until > clock_timestamp() and lease_until <= clock_timestamp() + $3
            and lease_holder <> $2, false) as "leased!", lease_id,
            case when attempt_started_at
                    between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then attempt_started_at end as started_at, clock_timestamp() as "now!"
        from refreshes where account_id = $1 for update nowait"#,
        account.0,
        context.instance,
        interval(context.lease_duration),
    )
    .fetch_optional(&mut *transaction)
    .await?
    else {
        return Ok(ReconcileOutcome::Dropped);
    };
    if found.leased {
        return Ok(ReconcileOutcome::LeaseHeld);
    }
    // The age is taken after the database's time, so that the issue is not dated too late.
    let issued_at = found.now - delta(until_from(token.issued_at, context.clock.now()));
    let last = found.started_at.map(|started_at| LeaseKey { id: found.lease_id, started_at });
    let attempted_since = is_later_attempt(last, *lease, issued_at);
    // This must be a second statement, after the lock, so that its snapshot includes what the previous
    // owner of the lock committed.
    let stored = sqlx::query_scalar!(
        "-- store::tokens::reconcile
        select generation from tokens where account_id = $1",
        account.0,
    )
    .fetch_optional(&mut *transaction)
    .await?
    .map(Generation);
    // An earlier try, whose answer was lost, has stored it. What happened since must remain.
    if stored == Some(token.generation) {
        mark_if(context.possibly_revoked, transaction, account).await?;
        return Ok(ReconcileOutcome::Stored);
    }
    if stored != *replaces
        || issuer(&mut transaction, account, token.credential_version).await? == Issuer::Gone
    {
        let unordered = context.new_token_ends_older && lease.is_none();
        mark_if(unordered || context.possibly_revoked, transaction, account).await?;
        return Ok(ReconcileOutcome::Dropped);
    }
    put(&mut transaction, account, token, true, context.clock).await?;
    if attempted_since {
        let marked = context.new_token_ends_older || context.possibly_revoked;
        mark_if(marked, transaction, account).await?;
        return Ok(ReconcileOutcome::Stored);
    }
    // A success must not clear the failure of a later credential.
    sqlx::query!(
        "-- store::tokens::reconcile
        update refreshes set lease_holder = null, lease_until = null,
            attempt_started_at = greatest(clock_timestamp() - $2::interval,
                case when attempt_started_at <= clock_timestamp() then attempt_started_at end),
            attempt_ended_at = clock_timestamp(), attempt_version = $3, possibly_revoked = $4,
            consecutive_failures = 0,
            error_class = case when error_version > $3 then error_class end,
            error_code = case when error_version > $3 then error_code end,
            error_message = case when error_version > $3 then error_message end,
            error_version = case when error_version > $3 then error_version end,
            refused_version = nullif(refused_version, $3),
            new_secret_failures = case when error_version > $3 then new_secret_failures else 0 end,
            new_secret_retry_at = case when error_version > $3 then new_secret_retry_at end,
            next_attempt_at = null, changed = pg_current_xact_id()
        where account_id = $1",
        account.0,
        interval(until_from(token.issued_at, context.clock.now())),
        token.credential_version.0,
        context.possibly_revoked,
    )
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(ReconcileOutcome::Stored)
}

/// Whether the account's `last` attempt began after a token was issued, under `lease` or at `issued_at` without
/// one. Without a lease only the database's clock tells.
fn is_later_attempt(last: Option<LeaseKey>, lease: Option<LeaseKey>, issued_at: Timestamp) -> bool {
    match lease {
        Some(lease) => last != Some(lease),
        None => last.is_some_and(|last| last.started_at > issued_at),
    }
}

/// Marks the account's token as possibly revoked if `marked`, and commits.
async fn mark_if(
    marked: bool,
    mut transaction: Transaction<'_, Postgres>,
    account: AccountId,
) -> Result<(), StoreError> {
    if marked {
        sqlx::query!(
            "-- store::tokens::mark_if
            update refreshes set possibly_revoked = true, changed = pg_current_xact_id()
            where account_id = $1",
            account.0,
        )
        .execute(&mut *transaction)
        .await?;
    }
    Ok(transaction.commit().await?)
}

/// The relation of a token's credential to its account.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Issuer {
    /// The account's current credential, or the previous one, which is still kept, issued the token.
    Known,
    /// The account no longer has the credential, or does not exist.
    Gone,
}

/// Returns whether the account still has the credential of `version`, which issued a token.
///
/// The account is read without a lock, because an admin's open transaction may hold one for long. A change that
/// is committed after this read counts as later than the token: the token is stored as if it had been issued
/// just before, and the changed credential is tried at once, as after every change. Call it after the account's
/// row of `refreshes` was locked, in a statement of its own, so that it sees what was committed before.
async fn issuer(
    transaction: &mut Transaction<'_, Postgres>,
    account: AccountId,
    version: CredentialVersion,
) -> Result<Issuer, StoreError> {
    let known = sqlx::query_scalar!(
        r#"-- store::tokens::issuer
        select exists (select from accounts
            where id = $1 and $2 in (credential_version, previous_version)) as "known!""#,
        account.0,
        version.0,
    )
    .fetch_one(&mut **transaction)
    .await?;
    Ok(if known { Issuer::Known } else { Issuer::Gone })
}

/// Stores `token` as the account's token and returns `true`, unless the stored token has a later generation,
/// or ends later and `replace_longer_lived` is not set. A token of an earlier login is always replaced.
///
/// The token's times are stored by the database's clock, which all replicas share. Its end by this machine's
/// wall clock is stored beside them: the database's clock may be set, and then it is the second witness.
async fn put(
    transaction: &mut Transaction<'_, Postgres>,
    account: AccountId,
    token: &SealedToken,
    replace_longer_lived: bool,
    clock: &Clock,
) -> Result<bool, StoreError> {
    let now = clock.now();
    let time_left = until_from(now, token.expires_at);
    // A stored token that was issued in the future may have ended: the database's clock was set back.
    let stored = sqlx::query!(
        "-- store::tokens::put
        insert into tokens (account_id, credential_version, generation, sealed_token, issued_at,
            expires_at, issuer_expires_at, allowed_ip, fingerprint)
        values ($1, $2, $3, $4, clock_timestamp() - $5::interval, clock_timestamp() + $6::interval,
            $10, $7, $8)
        on conflict (account_id) do update set
            credential_version = excluded.credential_version, generation = excluded.generation,
            sealed_token = excluded.sealed_token, issued_at = excluded.issued_at,
            expires_at = excluded.expires_at, issuer_expires_at = excluded.issuer_expires_at,
            allowed_ip = excluded.allowed_ip, repeated_at = null,
            fingerprint = excluded.fingerprint, changed = pg_current_xact_id()
        where excluded.generation >= tokens.generation
            and ($9 or excluded.expires_at >= tokens.expires_at - interval '5 seconds'
                or tokens.issued_at > clock_timestamp() + interval '5 seconds'
                or tokens.credential_version < (select login_version from accounts where id = $1))",
        account.0,
        token.credential_version.0,
        token.generation.0,
        token.sealed,
        interval(until_from(token.issued_at, now)),
        interval(time_left),
        token.allowed_ip,
        token.fingerprint,
        replace_longer_lived,
        clock.wall() + delta(time_left),
    )
    .execute(&mut **transaction)
    .await?;
    Ok(stored.rows_affected() == 1)
}

/// A token with the rest of its life, as a replica knows it.
#[derive(Clone, Copy, Debug)]
pub struct TimeLeft {
    /// The token's account.
    pub account: AccountId,
    /// The token's generation.
    pub generation: Generation,
    /// How long the token still lives.
    pub time_left: Duration,
}

/// Moves the stored times of the given tokens back where the database's clock, which was set back, makes them
/// live for more than 5 seconds longer than they do. Ends are never moved to a later time.
///
/// # Errors
/// When the database cannot be reached or refuses the statement.
#[instrument(level = "debug", skip_all, fields(tokens = known.len()))]
pub async fn correct_ends(pool: &PgPool, known: &[TimeLeft]) -> Result<u64, StoreError> {
    let accounts: Vec<_> = known.iter().map(|known| known.account.0).collect();
    let generations: Vec<_> = known.iter().map(|known| known.generation.0).collect();
    let left: Vec<_> = known.iter().map(|known| known.time_left.as_secs_f64()).collect();
    let done = sqlx::query!(
        "-- store::tokens::correct_ends
        update tokens t set
            issued_at = t.issued_at - (t.expires_at - clock_timestamp() - known.time_left),
            expires_at = clock_timestamp() + known.time_left, changed = pg_current_xact_id()
        from (
            select account_id, generation, make_interval(secs => seconds) as time_left
            from unnest($1::bigint[], $2::bigint[], $3::float8[])
                as known (account_id, generation, seconds)
        ) known
        where t.account_id = known.account_id and t.generation = known.generation
            and t.expires_at > clock_timestamp() + known.time_left + interval '5 seconds'
            -- No other times can be subtracted.
            and t.issued_at between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
            and t.expires_at <= timestamptz '9999-12-31 00:00Z'",
        &accounts,
        &generations,
        &left,
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}

/// Notifies the other replicas of new tokens. This is not part of the transaction that stores a token,
/// because NOTIFY holds a lock of the whole database cluster until its commit.
///
/// # Errors
/// When the database cannot be reached. The others load the tokens at their next poll then.
#[instrument(level = "debug", skip_all)]
pub async fn notify(pool: &PgPool) -> Result<(), StoreError> {
    sqlx::query!("-- store::tokens::notify\nselect pg_notify($1, '')", CHANNEL)
        .execute(pool)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;

    #[test]
    fn an_attempt_is_later_if_it_has_another_lease_or_began_after_an_issue_without_one() {
        let at = |second| DateTime::UNIX_EPOCH + TimeDelta::seconds(second);
        let lease = |id, second| Some(LeaseKey { id, started_at: at(second) });
        // The last attempt in the database, the token's lease, when the token was issued.
        for (last, own, issued, later) in [
            (lease(7, 100), lease(7, 100), 101, false),
            (lease(8, 160), lease(7, 100), 101, true),
            (lease(7, 160), lease(7, 100), 101, true),
            // The database's clock was set, in either direction.
            (lease(8, 50), lease(7, 100), 101, true),
            (lease(7, 100), lease(7, 100), 50, false),
            // A failover lost the claim.
            (lease(6, 40), lease(7, 100), 101, true),
            (None, lease(7, 100), 101, true),
            (None, None, 101, false),
            (lease(7, 100), None, 101, false),
            (lease(8, 102), None, 101, true),
        ] {
            assert_eq!(is_later_attempt(last, own, at(issued)), later, "{last:?} {own:?} {issued}");
        }
    }
}
