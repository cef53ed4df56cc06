//! Accounts: loading them, and sealing what admins write into the intake column.

use sqlx::{PgExecutor, PgPool};
use tracing::{error, instrument};

use super::StoreError;
use crate::domain::{
    account::{AccountId, ClientId, CredentialVersion},
    clock::Timestamp,
    refresh_state::{
        Account, AccountCredential, FailureClass, IntervalExceptions, IssueFailure, RefreshState,
    },
    secret::SealedSecret,
    token::{Generation, SealedToken},
};

/// The most accounts that [`ids_after`] returns.
const PAGE: i64 = 1_000;
/// How many secrets are read for each sealing key, to check that the keyring opens them.
const SAMPLES_PER_KEY: i64 = 3;

/// An account with its refresh state and its token, all read by one statement.
#[derive(Clone, Debug)]
pub struct LoadedAccount {
    /// The account.
    pub account: Account,
    /// Its attempts to issue tokens.
    pub refresh: RefreshState,
    /// Its token, live or ended.
    pub token: Option<SealedToken>,
    /// The database's time when the account was read. All other times are by this clock, except
    /// [`SealedToken::issuer_expires_at`].
    pub now: Timestamp,
}

struct Row {
    id: i64,
    name: String,
    client_id: String,
    enabled: bool,
    credential_version: i64,
    sealed_secret: Option<Vec<u8>>,
    previous_secret: Option<Vec<u8>>,
    previous_version: Option<i64>,
    reissue_requested_at: Option<Timestamp>,
    attempt_started_at: Option<Timestamp>,
    attempt_version: Option<i64>,
    attempt_open: Option<bool>,
    lease_until: Option<Timestamp>,
    possibly_revoked: Option<bool>,
    consecutive_failures: Option<i32>,
    error_class: Option<String>,
    error_code: Option<String>,
    error_message: Option<String>,
    error_version: Option<i64>,
    next_attempt_at: Option<Timestamp>,
    interval_exceptions: Option<i32>,
    interval_exceptions_since: Option<Timestamp>,
    answered_reissue: Option<Timestamp>,
    sealed_token: Option<Vec<u8>>,
    generation: Option<i64>,
    token_version: Option<i64>,
    issued_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    issuer_expires_at: Option<Timestamp>,
    allowed_ip: Option<String>,
    fingerprint: Option<String>,
    now: Timestamp,
}

/// Returns the ids of up to a thousand accounts after the id `after`, in ascending order.
///
/// # Errors
/// When the database cannot be read.
#[instrument(level = "debug", skip_all)]
pub async fn ids_after(pool: &PgPool, after: i64) -> Result<Vec<i64>, StoreError> {
    let ids = sqlx::query_scalar!(
        "-- store::accounts::ids_after
        select id from accounts where id > $1 order by id limit $2",
        after,
        PAGE,
    )
    .fetch_all(pool)
    .await?;
    Ok(ids)
}

/// Loads those of the accounts `ids` that exist, in no particular order. An account whose row is unreadable
/// is logged and left out, so that the others can be used.
///
/// # Errors
/// When the database cannot be read.
#[instrument(level = "debug", skip_all, fields(accounts = ids.len()))]
pub async fn load<'e>(
    executor: impl PgExecutor<'e>,
    ids: &[i64],
) -> Result<Vec<LoadedAccount>, StoreError> {
    let rows = sqlx::query_as!(
        Row,
        r#"-- store::accounts::load
        select a.id as "id!", a.name as "name!", a.client_id as "client_id!",
            a.enabled as "enabled!", a.credential_version as "credential_version!",
            a.sealed_secret as "sealed_secret?", a.previous_secret as "previous_secret?",
            a.previous_version as "previous_version?",
            a.reissue_requested_at as "reissue_requested_at?", r.attempt_started_at as "attempt_started_at?",
            r.attempt_version as "attempt_version?",
            r.attempt_started_at is not null and r.attempt_ended_at is null as "attempt_open?",
            r.lease_until as "lease_until?",
            r.possibly_revoked as "possibly_revoked?", r.consecutive_failures as "consecutive_failures?",
            r.error_class as "error_class?", r.error_code as "error_code?",
            r.error_message as "error_message?", r.error_version as "error_version?",
            r.next_attempt_at as "next_attempt_at?", r.interval_exceptions as "interval_exceptions?",
            r.interval_exceptions_since as "interval_exceptions_since?",
            r.answered_reissue as "answered_reissue?", t.sealed_token as "sealed_token?",
            t.generation as "generation?", t.credential_version as "token_version?",
            t.issued_at as "issued_at?", t.expires_at as "expires_at?",
            t.issuer_expires_at as "issuer_expires_at?",
            t.allowed_ip as "allowed_ip?", t.fingerprint as "fingerprint?",
            clock_timestamp() as "now!"
        from accounts a
        left join refreshes r on r.account_id = a.id
        left join tokens t on t.account_id = a.id
        where a.id = any($1)"#,
        ids,
    )
    .fetch_all(executor)
    .await?;
    let read = |row: Row| row.read().inspect_err(|error| error!(%error, "an account is left out"));
    Ok(rows.into_iter().filter_map(|row| read(row).ok()).collect())
}

impl Row {
    fn read(self) -> Result<LoadedAccount, StoreError> {
        let id = self.id;
        let corrupt = |problem| StoreError::unreadable_row("accounts", id, problem);
        let failure = match (&self.error_class, self.error_version) {
            (Some(class), Some(version)) => Some(IssueFailure {
                // A newer release may know more classes. A failure of such a class is retried.
                class: class.parse().unwrap_or(FailureClass::Unreachable),
                code: self.error_code,
                message: self.error_message.unwrap_or_default(),
                version: CredentialVersion(version),
            }),
            _ => None,
        };
        let token = match (
            self.sealed_token,
            self.generation,
            self.token_version,
            self.issued_at,
            self.expires_at,
        ) {
            (Some(sealed), Some(generation), Some(version), Some(issued_at), Some(expires_at)) => {
                Some(SealedToken {
                    sealed,
                    generation: Generation(generation),
                    credential_version: CredentialVersion(version),
                    issued_at,
                    expires_at,
                    issuer_expires_at: self.issuer_expires_at,
                    allowed_ip: self.allowed_ip,
                    fingerprint: self.fingerprint.unwrap_or_default(),
                })
            }
            _ => None,
        };
        Ok(LoadedAccount {
            account: Account {
                id: AccountId(id),
                name: self.name.parse().map_err(|_| corrupt("malformed name"))?,
                client_id: self.client_id.parse().map_err(|_| corrupt("malformed client_id"))?,
                enabled: self.enabled,
                credential_version: CredentialVersion(self.credential_version),
                secret: self.sealed_secret.map(SealedSecret::from),
                previous: self.previous_version.zip(self.previous_secret).map(
                    |(version, secret)| AccountCredential {
                        version: CredentialVersion(version),
                        secret: secret.into(),
                    },
                ),
                reissue_requested_at: self.reissue_requested_at,
            },
            refresh: RefreshState {
                attempt_started_at: self.attempt_started_at,
                attempt_version: self.attempt_version.map(CredentialVersion),
                attempt_open: self.attempt_open.unwrap_or_default(),
                lease_until: self.lease_until,
                possibly_revoked: self.possibly_revoked.unwrap_or_default(),
                stored_generation: self.generation.map(Generation),
                consecutive_failures: self.consecutive_failures.unwrap_or_default().unsigned_abs(),
                failure,
                next_attempt_at: self.next_attempt_at,
                interval_exceptions: IntervalExceptions {
                    used: self.interval_exceptions.unwrap_or_default().unsigned_abs(),
                    since: self.interval_exceptions_since,
                },
                answered_reissue: self.answered_reissue,
            },
            token,
            now: self.now,
        })
    }
}

/// A secret that an admin wrote into the intake column of one account.
pub struct Intake {
    /// The account's id, to which the sealed secret is bound.
    pub id: AccountId,
    /// The account's login, to which a value of `account seal` is bound.
    pub client_id: ClientId,
    /// The credential version, to which the sealed secret is bound.
    pub version: CredentialVersion,
    /// The column's text: a plain secret, or `sealed:…` as `account seal` prints it.
    pub value: zeroize::Zeroizing<String>,
}

/// Seals up to a hundred intake values with `seal` and empties their intake columns, in one
/// transaction. Rows that another transaction has locked are skipped. Returns how many values were
/// processed: 0 when none is left.
///
/// If `seal` refuses a value, the column is emptied too, and the returned reason is stored as the account's
/// failure until an admin writes another secret.
///
/// # Errors
/// When the database cannot be reached or refuses a statement; then no value was sealed.
#[instrument(level = "debug", skip_all)]
pub async fn seal_intake(
    pool: &PgPool,
    mut seal: impl FnMut(&Intake) -> Result<Vec<u8>, String>,
) -> Result<usize, StoreError> {
    let mut transaction = pool.begin().await?;
    let rows = sqlx::query!(
        r#"-- store::accounts::seal_intake
        select id, client_id, credential_version, client_secret as "client_secret!"
        from accounts where client_secret is not null
        order by id limit 100 for update skip locked"#
    )
    .fetch_all(&mut *transaction)
    .await?;
    let sealed = rows.len();
    for row in rows {
        let value = row.client_secret.into();
        let version = CredentialVersion(row.credential_version);
        let sealed_value = match row.client_id.parse() {
            Ok(client_id) => seal(&Intake { id: AccountId(row.id), client_id, version, value }),
            Err(invalid) => Err(invalid.to_string()),
        };
        let (secret, refusal) = match sealed_value {
            Ok(secret) => (Some(secret), None),
            Err(reason) => (None, Some(reason)),
        };
        sqlx::query!(
            "-- store::accounts::seal_intake
            update accounts set sealed_secret = $2, client_secret = null where id = $1",
            row.id,
            secret,
        )
        .execute(&mut *transaction)
        .await?;
        if let Some(reason) = refusal {
            sqlx::query!(
                "-- store::accounts::seal_intake
                update refreshes set error_class = $2, error_code = null, error_message = $3,
                    error_version = $4, consecutive_failures = consecutive_failures + 1,
                    next_attempt_at = null, changed = pg_current_xact_id()
                where account_id = $1",
                row.id,
                FailureClass::Intake.as_str(),
                reason,
                row.credential_version,
            )
            .execute(&mut *transaction)
            .await?;
        }
    }
    transaction.commit().await?;
    Ok(sealed)
}

/// A sealed secret with the values that it is bound to. At the start, samples are opened to check the
/// keyring.
pub struct SecretSample {
    /// The account's id, to which the value is bound.
    pub id: AccountId,
    /// The account's name, for the error message.
    pub name: String,
    /// The credential version, to which the value is bound.
    pub version: CredentialVersion,
    /// The sealed secret.
    pub sealed: Vec<u8>,
}

/// Returns the sealed secrets of the newest accounts for each sealing key in use: up to three for each,
/// since a single one may be damaged.
///
/// # Errors
/// When the database cannot be read.
#[instrument(level = "debug", skip_all)]
pub async fn sealed_samples(pool: &PgPool) -> Result<Vec<SecretSample>, StoreError> {
    // A sealed value begins with a byte for the format, a byte for the key id's length, and the key id.
    let rows = sqlx::query!(
        r#"-- store::accounts::sealed_samples
        select id as "id!", name as "name!", credential_version as "credential_version!",
            sealed_secret as "sealed_secret!"
        from (
            select id, name, credential_version, sealed_secret, row_number() over (
                partition by substring(sealed_secret from 3 for get_byte(sealed_secret, 1))
                order by id desc) as nth
            from accounts where octet_length(sealed_secret) > 2
        ) numbered
        where nth <= $1
        order by id"#,
        SAMPLES_PER_KEY,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| SecretSample {
            id: AccountId(row.id),
            name: row.name,
            version: CredentialVersion(row.credential_version),
            sealed: row.sealed_secret,
        })
        .collect())
}

/// Stores when accounts were last requested; `times` has the time for each of `ids`. To save writes, a time
/// less than a minute after the stored one is not written. A row that another transaction has locked is
/// skipped.
///
/// # Errors
/// When the database cannot be reached or refuses the statement.
#[instrument(level = "debug", skip_all, fields(accounts = ids.len()))]
pub async fn note_requests(
    pool: &PgPool,
    ids: &[i64],
    times: &[Timestamp],
) -> Result<(), StoreError> {
    sqlx::query!(
        "-- store::accounts::note_requests
        with asked as (
            select id, least(at, clock_timestamp()) as at
            from unnest($1::bigint[], $2::timestamptz[]) as asked (id, at)
        ), free as (
            select r.account_id, asked.at
            from refreshes r join asked on asked.id = r.account_id
            where r.last_requested_at is null
                or r.last_requested_at < asked.at - interval '1 minute'
                or r.last_requested_at > clock_timestamp()
            for update of r skip locked
        )
        update refreshes r set last_requested_at = free.at
        from free where r.account_id = free.account_id",
        ids,
        times,
    )
    .execute(pool)
    .await?;
    Ok(())
}
