//! The right to issue for one account: claimed by one replica, stamped before the call, fenced
//! afterwards. All times are the database's.

use std::time::Duration;

use sqlx::{PgPool, Postgres, Transaction, postgres::types::PgInterval};

use super::StoreError;
use crate::{
    account::{AccountId, ClientId, CredentialVersion},
    clock::{Timestamp, delta, until_from},
    issue::{Failure, FailureClass},
    token::Generation,
};

/// How often an hour a changed credential may pass the floor between issues.
const FLOOR_PASSES: i32 = 3;
const FLOOR_PASSES_WITHIN: Duration = Duration::from_hours(1);
/// When to ask again while somebody else's transaction holds the account.
const LOCKED: Duration = Duration::from_secs(1);
/// When to ask again while as many attempts are under way as may be.
const FULL: Duration = Duration::from_millis(200);

/// Who asks for the right to issue, and under what limits.
#[derive(Clone, Debug)]
pub struct Claimant {
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
    /// The account.
    pub account: AccountId,
    /// Grows with each lease of the account: what is done under an older one is refused.
    pub id: i64,
    /// When the attempt was stamped.
    pub started_at: Timestamp,
    /// What the new token's generation will be.
    pub generation: Generation,
    /// The login.
    pub client_id: ClientId,
    /// The credential to use.
    pub version: CredentialVersion,
    /// Whether that is the account's current credential, and not the one before a rotation whose
    /// new secret the upstream refuses.
    pub current: bool,
    /// Its sealed secret.
    pub sealed_secret: Vec<u8>,
    /// The attempt before this one never ended: it may have issued.
    pub lost_attempt: bool,
}

/// What decides on a claim; a row of three tables.
#[derive(Clone, Debug)]
struct Row {
    client_id: String,
    enabled: bool,
    credential_version: i64,
    sealed_secret: Option<Vec<u8>>,
    previous_secret: Option<Vec<u8>>,
    previous_version: Option<i64>,
    reissue_requested_at: Option<Timestamp>,
    lease_until: Option<Timestamp>,
    attempt_started_at: Option<Timestamp>,
    attempt_ended_at: Option<Timestamp>,
    attempt_version: Option<i64>,
    floor_passes: i32,
    floor_passes_since: Option<Timestamp>,
    error_class: Option<String>,
    error_version: Option<i64>,
    next_attempt_at: Option<Timestamp>,
    generation: Option<i64>,
    now: Timestamp,
}

/// The pure verdict on a claim.
#[derive(Debug, Eq, PartialEq)]
enum Verdict {
    Go { version: i64, passes_floor: bool },
    Wait(Duration),
    NotNeeded,
}

impl Row {
    /// Decides whether the account may be issued for at `now`. `known` is the generation that the
    /// claimant wants to replace.
    fn verdict(&self, known: Option<Generation>, floor: Duration) -> Verdict {
        if !self.enabled || self.generation.map(Generation) > known {
            return Verdict::NotNeeded;
        }
        if let Some(until) = self.lease_until.filter(|until| *until > self.now) {
            return Verdict::Wait(until_from(self.now, until));
        }
        let failing = self.error_version == Some(self.credential_version);
        let parked = failing
            && self
                .error_class
                .as_deref()
                .is_some_and(|class| class.parse().is_ok_and(FailureClass::parks));
        let asked = self
            .reissue_requested_at
            .is_some_and(|at| self.attempt_started_at.is_none_or(|started| started < at));
        let version = match (&self.sealed_secret, &self.previous_secret, self.previous_version) {
            (Some(_), _, _) if !parked || asked => self.credential_version,
            (_, Some(_), Some(previous)) => previous,
            _ => return Verdict::NotNeeded,
        };
        let untried = self.attempt_version != Some(version);
        if let Some(at) = self.next_attempt_at.filter(|at| *at > self.now)
            && failing
            && !asked
            && !untried
        {
            return Verdict::Wait(until_from(self.now, at));
        }
        let floor_ends = self.attempt_started_at.map(|started| started + delta(floor));
        match floor_ends.filter(|end| *end > self.now) {
            None => Verdict::Go { version, passes_floor: false },
            Some(_) if untried && self.passes_left() => Verdict::Go { version, passes_floor: true },
            Some(end) => Verdict::Wait(until_from(self.now, end)),
        }
    }

    fn passes_left(&self) -> bool {
        self.passes_so_far() < FLOOR_PASSES
    }

    /// The passes of the floor in the hour that runs.
    fn passes_so_far(&self) -> i32 {
        let within =
            self.floor_passes_since.is_some_and(|at| at + delta(FLOOR_PASSES_WITHIN) > self.now);
        if within { self.floor_passes } else { 0 }
    }
}

/// Claims the right to replace generation `known` of `account`, and stamps the attempt.
///
/// # Errors
/// When the database cannot be reached.
pub async fn claim(
    pool: &PgPool,
    account: AccountId,
    known: Option<Generation>,
    claimant: &Claimant,
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
    let (version, passes_floor) = match row.verdict(known, claimant.floor) {
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
    claimant: &Claimant,
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
    claimant: &Claimant,
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
    Ok(Lease {
        account,
        id: stamped.lease_id,
        started_at: stamped.attempt_started_at,
        generation: Generation::next(
            stamped.attempt_started_at,
            claimant.replica,
            row.generation.map(Generation),
        ),
        client_id: row.client_id.parse().map_err(|_| {
            StoreError::Corrupt(format!("accounts row {account}: malformed client_id"))
        })?,
        version: CredentialVersion(version),
        current: version == row.credential_version,
        sealed_secret: sealed_secret.unwrap_or_default(),
        lost_attempt,
    })
}

/// How a failed attempt is to be remembered.
#[derive(Clone, Debug)]
pub struct FailedAttempt {
    /// What went wrong.
    pub failure: Failure,
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
    if attempt.failure.class.parks() && !lease.current {
        // Neither secret is of use: the older one is not tried for ever.
        sqlx::query!(
            "-- store::leases::fail
            update accounts set previous_secret = null, previous_version = null
            where id = $1 and previous_version = $2",
            lease.account.0,
            lease.version.0,
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
        lease.account.0,
        lease.id,
        attempt.suspect,
        attempt.failure.class.as_str(),
        attempt.failure.code,
        attempt.failure.message,
        attempt.failure.version.0,
        attempt.retry_after.map(interval),
        lease.current,
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
        lease.account.0,
        lease.id,
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

fn interval(duration: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(duration.as_micros()).unwrap_or(i64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;

    const FLOOR: Duration = Duration::from_secs(30);

    fn at(second: i64) -> Timestamp {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(second)
    }

    /// An account at second 1000 whose first credential was tried at 0 and issued generation 1.
    fn row() -> Row {
        Row {
            client_id: "acme".into(),
            enabled: true,
            credential_version: 1,
            sealed_secret: Some(vec![1]),
            previous_secret: None,
            previous_version: None,
            reissue_requested_at: None,
            lease_until: None,
            attempt_started_at: Some(at(0)),
            attempt_ended_at: Some(at(1)),
            attempt_version: Some(1),
            floor_passes: 0,
            floor_passes_since: None,
            error_class: None,
            error_version: None,
            next_attempt_at: None,
            generation: Some(1),
            now: at(1_000),
        }
    }

    fn verdict(row: &Row) -> Verdict {
        row.verdict(Some(Generation(1)), FLOOR)
    }

    const GO: Verdict = Verdict::Go { version: 1, passes_floor: false };

    #[test]
    fn a_known_token_may_be_replaced() {
        assert_eq!(verdict(&row()), GO);
    }

    #[test]
    fn a_token_that_somebody_else_replaced_needs_no_issue() {
        assert_eq!(verdict(&Row { generation: Some(2), ..row() }), Verdict::NotNeeded);
    }

    #[test]
    fn a_disabled_account_is_not_issued_for() {
        assert_eq!(verdict(&Row { enabled: false, ..row() }), Verdict::NotNeeded);
    }

    #[test]
    fn a_held_lease_is_waited_for_until_it_runs_out() {
        let row = Row { lease_until: Some(at(1_005)), ..row() };
        assert_eq!(verdict(&row), Verdict::Wait(Duration::from_secs(5)));
        assert_eq!(verdict(&Row { now: at(1_005), ..row }), GO);
    }

    #[test]
    fn the_floor_between_issues_holds_to_the_second() {
        let row = Row { attempt_started_at: Some(at(990)), ..row() };
        assert_eq!(verdict(&row), Verdict::Wait(Duration::from_secs(20)));
        assert_eq!(verdict(&Row { now: at(1_020), ..row }), GO);
    }

    #[test]
    fn a_changed_credential_passes_the_floor_three_times_an_hour() {
        let changed = Row {
            attempt_started_at: Some(at(990)),
            credential_version: 2,
            floor_passes_since: Some(at(900)),
            ..row()
        };
        let passes = Verdict::Go { version: 2, passes_floor: true };
        assert_eq!(verdict(&Row { floor_passes: 2, ..changed.clone() }), passes);
        let spent = Row { floor_passes: 3, ..changed };
        assert_eq!(verdict(&spent), Verdict::Wait(Duration::from_secs(20)));
        assert_eq!(verdict(&Row { floor_passes_since: Some(at(1_000 - 3_600)), ..spent }), passes);
    }

    #[test]
    fn a_rejected_credential_is_left_alone_until_it_changes_or_an_admin_asks() {
        let parked = Row { error_class: Some("rejected".into()), error_version: Some(1), ..row() };
        assert_eq!(verdict(&parked), Verdict::NotNeeded);
        assert_eq!(
            verdict(&Row { credential_version: 2, ..parked.clone() }),
            Verdict::Go { version: 2, passes_floor: false }
        );
        assert_eq!(verdict(&Row { reissue_requested_at: Some(at(5)), ..parked.clone() }), GO);
        let tried_since =
            Row { reissue_requested_at: Some(at(5)), attempt_started_at: Some(at(6)), ..parked };
        assert_eq!(verdict(&tried_since), Verdict::NotNeeded);
    }

    #[test]
    fn while_a_new_secret_is_refused_the_one_before_it_goes_on() {
        let row = Row {
            credential_version: 2,
            previous_secret: Some(vec![2]),
            previous_version: Some(1),
            error_class: Some("rejected".into()),
            error_version: Some(2),
            attempt_version: Some(2),
            ..row()
        };
        assert_eq!(verdict(&row), GO);
    }

    #[test]
    fn a_failure_that_may_pass_is_waited_out_unless_the_credential_changed() {
        let failing = Row {
            error_class: Some("unreachable".into()),
            error_version: Some(1),
            next_attempt_at: Some(at(1_060)),
            ..row()
        };
        assert_eq!(verdict(&failing), Verdict::Wait(Duration::from_mins(1)));
        assert_eq!(
            verdict(&Row { credential_version: 2, ..failing }),
            Verdict::Go { version: 2, passes_floor: false }
        );
    }
}
