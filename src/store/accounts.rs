//! Accounts: loading them, and finding those that changed.

use sqlx::{PgExecutor, PgPool};
use tracing::instrument;

use super::{
    StoreError,
    lenient::{Lenient, LenientTime, Readable, UnusableRow},
};
use crate::domain::{
    account::{AccountId, CredentialVersion},
    clock::Timestamp,
    refresh_state::{
        Account, AccountCredential, FailureClass, IntervalExceptions, IssueFailure, RefreshState,
    },
    secret::SealedSecret,
    token::{Generation, SealedToken},
};

/// The most accounts that [`ids_after`] returns.
const PAGE: i64 = 1_000;
/// The most accounts that [`versions_after`] returns.
const VERSIONS_PAGE: i64 = 10_000;
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
    /// The database's time when the account was read. The times in `account` and `refresh` are by this clock;
    /// those of the token are by the clock of the replica that issued it.
    pub now: Timestamp,
}

/// What was read of some accounts.
#[derive(Clone, Debug)]
pub struct LoadedAccounts {
    /// The accounts that can be used.
    pub rows: Vec<LoadedAccount>,
    /// The rows because of which the other accounts cannot be used.
    pub unusable: Vec<UnusableRow>,
    /// The id and the [version](AccountVersion::version) of every account that exists.
    pub versions: Vec<(i64, i64)>,
}

struct Row {
    id: i64,
    name: Lenient<String>,
    client_id: Lenient<String>,
    enabled: bool,
    credential_version: i64,
    sealed_secret: Option<Vec<u8>>,
    previous_secret: Option<Vec<u8>>,
    previous_version: Option<i64>,
    reissue_requested_at: Option<LenientTime>,
    attempt_started_at: Option<LenientTime>,
    attempt_version: Option<i64>,
    attempt_open: Option<bool>,
    lease_until: Option<LenientTime>,
    possibly_revoked: Option<bool>,
    consecutive_failures: Option<i32>,
    error_class: Option<Lenient<String>>,
    error_code: Option<Lenient<String>>,
    error_message: Option<Lenient<String>>,
    error_version: Option<i64>,
    next_attempt_at: Option<LenientTime>,
    interval_exceptions: Option<i32>,
    interval_exceptions_since: Option<LenientTime>,
    sealed_token: Option<Vec<u8>>,
    generation: Option<i64>,
    token_version: Option<i64>,
    issued_at: Option<LenientTime>,
    expires_at: Option<LenientTime>,
    allowed_ip: Option<Lenient<String>>,
    fingerprint: Option<Lenient<String>>,
    now: Timestamp,
    version: i64,
}

/// Returns the ids of up to a thousand accounts after the id `after`, in ascending order.
///
/// # Errors
/// When the database cannot be read.
#[instrument(level = "debug", skip_all)]
pub async fn ids_after(executor: impl PgExecutor<'_>, after: i64) -> Result<Vec<i64>, StoreError> {
    let ids = sqlx::query_scalar!(
        "-- store::accounts::ids_after
        select id from accounts where id > $1 order by id limit $2",
        after,
        PAGE,
    )
    .fetch_all(executor)
    .await?;
    Ok(ids)
}

/// Loads those of the accounts `ids` that exist, in no particular order. An account cannot be used if its row
/// is malformed, or its row in `refreshes` or `tokens`.
///
/// # Errors
/// When the database cannot be read.
#[instrument(level = "debug", skip_all, fields(accounts = ids.len()))]
pub async fn load<'e>(
    executor: impl PgExecutor<'e>,
    ids: &[i64],
) -> Result<LoadedAccounts, StoreError> {
    let rows = sqlx::query_as!(
        Row,
        r#"-- store::accounts::load
        select a.id as "id!", a.name as "name!: Lenient<String>",
            a.client_id as "client_id!: Lenient<String>",
            a.enabled as "enabled!", a.credential_version as "credential_version!",
            a.sealed_secret as "sealed_secret?", a.previous_secret as "previous_secret?",
            a.previous_version as "previous_version?",
            a.reissue_requested_at as "reissue_requested_at?: LenientTime",
            r.attempt_started_at as "attempt_started_at?: LenientTime",
            r.attempt_version as "attempt_version?",
            r.attempt_started_at is not null and r.attempt_ended_at is null as "attempt_open?",
            r.lease_until as "lease_until?: LenientTime",
            r.possibly_revoked as "possibly_revoked?", r.consecutive_failures as "consecutive_failures?",
            r.error_class as "error_class?: Lenient<String>",
            r.error_code as "error_code?: Lenient<String>",
            r.error_message as "error_message?: Lenient<String>", r.error_version as "error_version?",
            r.next_attempt_at as "next_attempt_at?: LenientTime",
            r.interval_exceptions as "interval_exceptions?",
            r.interval_exceptions_since as "interval_exceptions_since?: LenientTime",
            t.sealed_token as "sealed_token?",
            t.generation as "generation?", t.credential_version as "token_version?",
            t.issued_at as "issued_at?: LenientTime", t.expires_at as "expires_at?: LenientTime",
            t.allowed_ip as "allowed_ip?: Lenient<String>",
            t.fingerprint as "fingerprint?: Lenient<String>",
            clock_timestamp() as "now!",
            hashtextextended(concat(a.xmin, a.ctid, '/', r.account_id, r.changed, '/', t.xmin, t.ctid), 0)
                as "version!"
        from accounts a
        left join refreshes r on r.account_id = a.id
        left join tokens t on t.account_id = a.id
        where a.id = any($1)"#,
        ids,
    )
    .fetch_all(executor)
    .await?;
    let versions = rows.iter().map(|row| (row.id, row.version)).collect();
    let Readable { rows, unusable } = rows.into_iter().map(Row::read).collect();
    Ok(LoadedAccounts { rows, unusable, versions })
}

impl Row {
    fn read(self) -> Result<LoadedAccount, UnusableRow> {
        let id = self.id;
        let account = |problem| UnusableRow::new("accounts", id, problem);
        let refresh = |problem| UnusableRow::new("refreshes", id, problem);
        let token = |problem| UnusableRow::new("tokens", id, problem);
        let refresh_time = |time: Option<LenientTime>, problem| {
            time.map(|time| time.or(refresh(problem))).transpose()
        };
        let refresh_text = |text: Option<Lenient<String>>| {
            text.map(|text| text.or(refresh("malformed error"))).transpose()
        };

        let malformed_name = || account("malformed name");
        let name = self.name.or(malformed_name())?.parse().map_err(|_| malformed_name())?;
        let malformed_login = || account("malformed client_id");
        let client_id =
            self.client_id.or(malformed_login())?.parse().map_err(|_| malformed_login())?;
        let reissue_requested_at = self.reissue_requested_at.map(|time| {
            time.or(account("reissue_requested_at is not a time between 1970 and 9999"))
        });
        let (code, message) = (refresh_text(self.error_code)?, refresh_text(self.error_message)?);
        let failure = match (refresh_text(self.error_class)?, self.error_version) {
            (Some(class), Some(version)) => Some(IssueFailure {
                // A newer release may know more classes. A failure of such a class is retried.
                class: class.parse().unwrap_or(FailureClass::Unreachable),
                code,
                message: message.unwrap_or_default(),
                version: CredentialVersion(version),
            }),
            _ => None,
        };
        let stored_token = match (
            self.sealed_token,
            self.generation,
            self.token_version,
            self.issued_at,
            self.expires_at,
        ) {
            (Some(sealed), Some(generation), Some(version), Some(issued_at), Some(expires_at)) => {
                let text = |text: Lenient<String>| text.or(token("malformed text"));
                Some(SealedToken {
                    sealed,
                    generation: Generation(generation),
                    credential_version: CredentialVersion(version),
                    issued_at: issued_at
                        .or(token("issued_at is not a time between 1970 and 9999"))?,
                    expires_at: expires_at
                        .or(token("expires_at is not a time between 1970 and 9999"))?,
                    allowed_ip: self.allowed_ip.map(text).transpose()?,
                    fingerprint: self.fingerprint.map(text).transpose()?.unwrap_or_default(),
                })
            }
            _ => None,
        };
        Ok(LoadedAccount {
            account: Account {
                id: AccountId(id),
                name,
                client_id,
                enabled: self.enabled,
                credential_version: CredentialVersion(self.credential_version),
                secret: self.sealed_secret.map(SealedSecret::from),
                previous: self.previous_version.zip(self.previous_secret).map(
                    |(version, secret)| AccountCredential {
                        version: CredentialVersion(version),
                        secret: secret.into(),
                    },
                ),
                reissue_requested_at: reissue_requested_at.transpose()?,
            },
            refresh: RefreshState {
                attempt_started_at: refresh_time(
                    self.attempt_started_at,
                    "attempt_started_at is not a time between 1970 and 9999",
                )?,
                attempt_version: self.attempt_version.map(CredentialVersion),
                attempt_open: self.attempt_open.unwrap_or_default(),
                lease_until: refresh_time(
                    self.lease_until,
                    "lease_until is not a time between 1970 and 9999",
                )?,
                possibly_revoked: self.possibly_revoked.unwrap_or_default(),
                stored_generation: self.generation.map(Generation),
                consecutive_failures: self.consecutive_failures.unwrap_or_default().unsigned_abs(),
                failure,
                next_attempt_at: refresh_time(
                    self.next_attempt_at,
                    "next_attempt_at is not a time between 1970 and 9999",
                )?,
                interval_exceptions: IntervalExceptions {
                    used: self.interval_exceptions.unwrap_or_default().unsigned_abs(),
                    since: refresh_time(
                        self.interval_exceptions_since,
                        "interval_exceptions_since is not a time between 1970 and 9999",
                    )?,
                },
            },
            token: stored_token,
            now: self.now,
        })
    }
}

/// What is needed to find out whether an account must be loaded again.
#[derive(Clone, Copy, Debug)]
pub struct AccountVersion {
    /// The account's id.
    pub id: i64,
    /// Changes with each write to the account's row or its token, also one that fires no trigger, and with
    /// each announced write to its refresh state.
    pub version: i64,
    /// Whether the account has no row in `refreshes`.
    pub lacks_refresh_state: bool,
}

/// Returns the versions of up to ten thousand accounts after the id `after`, in ascending order.
///
/// # Errors
/// When the database cannot be read.
#[instrument(level = "debug", skip_all)]
pub async fn versions_after(
    executor: impl PgExecutor<'_>,
    after: i64,
) -> Result<Vec<AccountVersion>, StoreError> {
    let versions = sqlx::query_as!(
        AccountVersion,
        r#"-- store::accounts::versions_after
        select a.id as "id!", r.account_id is null as "lacks_refresh_state!",
            hashtextextended(concat(a.xmin, a.ctid, '/', r.account_id, r.changed, '/', t.xmin, t.ctid), 0)
                as "version!"
        from (select xmin, ctid, id from accounts where id > $1 order by id limit $2) a
        left join refreshes r on r.account_id = a.id
        left join tokens t on t.account_id = a.id
        order by a.id"#,
        after,
        VERSIONS_PAGE,
    )
    .fetch_all(executor)
    .await?;
    Ok(versions)
}

/// Inserts the missing rows of the accounts `ids` into `refreshes`. Without its row, no token can be issued
/// for an account. Returns how many were inserted.
///
/// # Errors
/// When the database cannot be reached or refuses the statement.
#[instrument(level = "debug", skip_all, fields(accounts = ids.len()))]
pub async fn insert_missing_refreshes(
    executor: impl PgExecutor<'_>,
    ids: &[i64],
) -> Result<u64, StoreError> {
    let inserted = sqlx::query!(
        "-- store::accounts::insert_missing_refreshes
        insert into refreshes (account_id)
        select id from accounts where id = any($1)
        on conflict (account_id) do nothing",
        ids,
    )
    .execute(executor)
    .await?;
    Ok(inserted.rows_affected())
}

/// An account that was taken away from its callers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct WithdrawnAccount {
    /// The account's id.
    pub id: i64,
    /// Whether the account was deleted, and not only disabled.
    pub deleted: bool,
}

/// Returns those of the accounts `ids` that are disabled or do not exist.
///
/// # Errors
/// When the database cannot be read.
#[instrument(level = "debug", skip_all, fields(accounts = ids.len()))]
pub async fn withdrawn(
    executor: impl PgExecutor<'_>,
    ids: &[i64],
) -> Result<Vec<WithdrawnAccount>, StoreError> {
    let withdrawn = sqlx::query_as!(
        WithdrawnAccount,
        r#"-- store::accounts::withdrawn
        select given.id as "id!", a.id is null as "deleted!"
        from unnest($1::bigint[]) given (id)
        left join accounts a on a.id = given.id
        where a.id is null or not a.enabled"#,
        ids,
    )
    .fetch_all(executor)
    .await?;
    Ok(withdrawn)
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
            select * from unnest($1::bigint[], $2::timestamptz[]) as asked (id, at)
        ), free as (
            select r.account_id, asked.at
            from refreshes r join asked on asked.id = r.account_id
            where r.last_requested_at is null
                or r.last_requested_at < asked.at - interval '1 minute'
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
