//! Accounts: loading them, and finding those that changed.

use sqlx::{PgExecutor, PgPool};
use tracing::instrument;

use super::{
    StoreError, begin,
    lenient::{Lenient, LenientTime, Readable, UnusableRow},
};
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
/// The most accounts that [`versions_after`] returns.
const VERSIONS_PAGE: i64 = 10_000;
/// How many of the newest and of the oldest secrets are read for each sealing key, to check that the keyring opens
/// them.
const SAMPLES_PER_KEY: i64 = 3;
/// The numbers of leases and tokens are less than this, which leaves room for those that follow. A generation of the
/// year 4000 is less.
const NUMBERS_END: i64 = 1 << 62;
/// The failures in a row are fewer than this.
const FAILURES_END: i32 = 1 << 30;

/// An account with its refresh state and its token, all read by one statement.
#[derive(Clone, Debug)]
pub struct LoadedAccount {
    /// The account.
    pub account: Account,
    /// Its attempts to issue tokens.
    pub refresh: RefreshState,
    /// Its token, live or ended, if it is of the present login.
    pub token: Option<SealedToken>,
    /// The database's time when the account was read. All other times are by this clock, except
    /// [`SealedToken::issuer_expires_at`].
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
    login_version: i64,
    sealed_secret: Option<Vec<u8>>,
    previous_secret: Option<Vec<u8>>,
    previous_version: Option<i64>,
    reissue_requested_at: Option<LenientTime>,
    attempt_started_at: Option<LenientTime>,
    attempt_version: Option<i64>,
    attempt_open: Option<bool>,
    lease_id: Option<i64>,
    lease_until: Option<LenientTime>,
    possibly_revoked: Option<bool>,
    consecutive_failures: Option<i32>,
    error_class: Option<Lenient<String>>,
    error_code: Option<Lenient<String>>,
    error_message: Option<Lenient<String>>,
    error_version: Option<i64>,
    next_attempt_at: Option<LenientTime>,
    new_secret_failures: Option<i32>,
    new_secret_retry_at: Option<LenientTime>,
    interval_exceptions: Option<i32>,
    interval_exceptions_since: Option<LenientTime>,
    answered_reissue: Option<LenientTime>,
    refused_version: Option<i64>,
    sealed_token: Option<Vec<u8>>,
    generation: Option<i64>,
    token_version: Option<i64>,
    issued_at: Option<LenientTime>,
    expires_at: Option<LenientTime>,
    issuer_expires_at: Option<LenientTime>,
    allowed_ip: Option<Lenient<String>>,
    fingerprint: Option<Lenient<String>>,
    repeated_at: Option<LenientTime>,
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
            a.login_version as "login_version!", a.sealed_secret as "sealed_secret?", a.previous_secret as "previous_secret?",
            a.previous_version as "previous_version?",
            a.reissue_requested_at as "reissue_requested_at?: LenientTime",
            r.attempt_started_at as "attempt_started_at?: LenientTime",
            r.attempt_version as "attempt_version?",
            r.attempt_started_at is not null and r.attempt_ended_at is null as "attempt_open?",
            r.lease_id as "lease_id?", r.lease_until as "lease_until?: LenientTime",
            r.possibly_revoked as "possibly_revoked?", r.consecutive_failures as "consecutive_failures?",
            r.error_class as "error_class?: Lenient<String>",
            r.error_code as "error_code?: Lenient<String>",
            r.error_message as "error_message?: Lenient<String>", r.error_version as "error_version?",
            r.next_attempt_at as "next_attempt_at?: LenientTime",
            r.new_secret_failures as "new_secret_failures?",
            r.new_secret_retry_at as "new_secret_retry_at?: LenientTime",
            r.interval_exceptions as "interval_exceptions?",
            r.interval_exceptions_since as "interval_exceptions_since?: LenientTime",
            r.answered_reissue as "answered_reissue?: LenientTime",
            r.refused_version as "refused_version?", t.sealed_token as "sealed_token?",
            t.generation as "generation?", t.credential_version as "token_version?",
            t.issued_at as "issued_at?: LenientTime", t.expires_at as "expires_at?: LenientTime",
            t.issuer_expires_at as "issuer_expires_at?: LenientTime",
            t.allowed_ip as "allowed_ip?: Lenient<String>",
            t.fingerprint as "fingerprint?: Lenient<String>",
            t.repeated_at as "repeated_at?: LenientTime",
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
    fn read(mut self) -> Result<LoadedAccount, UnusableRow> {
        let refresh = self.read_refresh()?;
        let token = self.read_token()?;
        let now = self.now;
        let account = self.read_account()?;
        let token = token.filter(|token| account.has_login_of(token.credential_version));
        Ok(LoadedAccount { account, refresh, token, now })
    }

    fn read_account(self) -> Result<Account, UnusableRow> {
        let unusable = |problem| UnusableRow::new("accounts", self.id, problem);
        let malformed_name = || unusable("malformed name");
        let malformed_login = || unusable("malformed client_id");
        let not_a_time = unusable("reissue_requested_at is not a time between 1970 and 9999");
        Ok(Account {
            id: AccountId(self.id),
            name: self.name.or(malformed_name())?.parse().map_err(|_| malformed_name())?,
            client_id: ClientId::stored(&self.client_id.or(malformed_login())?)
                .map_err(|_| malformed_login())?,
            enabled: self.enabled,
            credential_version: CredentialVersion(self.credential_version),
            login_version: CredentialVersion(self.login_version),
            secret: self.sealed_secret.map(SealedSecret::from),
            // One that the upstream refused is about to be dropped.
            previous: self
                .previous_version
                .filter(|version| self.refused_version != Some(*version))
                .zip(self.previous_secret)
                .map(|(version, secret)| AccountCredential {
                    version: CredentialVersion(version),
                    secret: secret.into(),
                }),
            reissue_requested_at: self
                .reissue_requested_at
                .map(|time| time.or(not_a_time))
                .transpose()?,
        })
    }

    fn read_refresh(&mut self) -> Result<RefreshState, UnusableRow> {
        let id = self.id;
        let unusable = |problem| UnusableRow::new("refreshes", id, problem);
        let time = |time: &mut Option<LenientTime>, problem| {
            time.take().map(|time| time.or(unusable(problem))).transpose()
        };
        // The next one could not be stored, so every claim, failure or token would be refused.
        if self.lease_id.is_some_and(|number| !(0..NUMBERS_END).contains(&number)) {
            return Err(unusable("lease_id is not a number that a lease can have"));
        }
        if self.consecutive_failures.is_some_and(|number| !(0..FAILURES_END).contains(&number)) {
            return Err(unusable("consecutive_failures is not a number of failures"));
        }
        Ok(RefreshState {
            attempt_started_at: time(
                &mut self.attempt_started_at,
                "attempt_started_at is not a time between 1970 and 9999",
            )?,
            attempt_version: self.attempt_version.map(CredentialVersion),
            attempt_open: self.attempt_open.unwrap_or_default(),
            lease_until: time(
                &mut self.lease_until,
                "lease_until is not a time between 1970 and 9999",
            )?,
            possibly_revoked: self.possibly_revoked.unwrap_or_default(),
            stored_generation: self.generation.map(Generation),
            consecutive_failures: self.consecutive_failures.unwrap_or_default().unsigned_abs(),
            next_attempt_at: time(
                &mut self.next_attempt_at,
                "next_attempt_at is not a time between 1970 and 9999",
            )?,
            new_secret_failures: self.new_secret_failures.unwrap_or_default().unsigned_abs(),
            new_secret_retry_at: time(
                &mut self.new_secret_retry_at,
                "new_secret_retry_at is not a time between 1970 and 9999",
            )?,
            interval_exceptions: IntervalExceptions {
                used: self.interval_exceptions.unwrap_or_default().unsigned_abs(),
                since: time(
                    &mut self.interval_exceptions_since,
                    "interval_exceptions_since is not a time between 1970 and 9999",
                )?,
            },
            answered_reissue: time(
                &mut self.answered_reissue,
                "answered_reissue is not a time between 1970 and 9999",
            )?,
            failure: self.read_failure()?,
        })
    }

    fn read_failure(&mut self) -> Result<Option<IssueFailure>, UnusableRow> {
        let id = self.id;
        let text = |text: &mut Option<Lenient<String>>| {
            let malformed = UnusableRow::new("refreshes", id, "malformed error");
            text.take().map(|text| text.or(malformed)).transpose()
        };
        let (code, message) = (text(&mut self.error_code)?, text(&mut self.error_message)?);
        let (Some(class), Some(version)) = (text(&mut self.error_class)?, self.error_version)
        else {
            return Ok(None);
        };
        Ok(Some(IssueFailure {
            // A newer release may know more classes. A failure of such a class is retried.
            class: class.parse().unwrap_or(FailureClass::Unreachable),
            code,
            message: message.unwrap_or_default(),
            version: CredentialVersion(version),
        }))
    }

    fn read_token(&mut self) -> Result<Option<SealedToken>, UnusableRow> {
        let id = self.id;
        let unusable = |problem| UnusableRow::new("tokens", id, problem);
        let (Some(sealed), Some(generation), Some(version)) =
            (self.sealed_token.take(), self.generation, self.token_version)
        else {
            return Ok(None);
        };
        if !(0..NUMBERS_END).contains(&generation) {
            return Err(unusable("generation is not a number that a token can have"));
        }
        let (Some(issued_at), Some(expires_at)) = (self.issued_at.take(), self.expires_at.take())
        else {
            return Ok(None);
        };
        let text = |text: &mut Option<Lenient<String>>| {
            text.take().map(|text| text.or(unusable("malformed text"))).transpose()
        };
        let issuer_expires_at = self
            .issuer_expires_at
            .take()
            .map(|time| time.or(unusable("issuer_expires_at is not a time between 1970 and 9999")));
        let repeated_at = self
            .repeated_at
            .take()
            .map(|time| time.or(unusable("repeated_at is not a time between 1970 and 9999")));
        let issued_at = issued_at.or(unusable("issued_at is not a time between 1970 and 9999"))?;
        Ok(Some(SealedToken {
            sealed,
            generation: Generation(generation),
            credential_version: CredentialVersion(version),
            issued_at,
            expires_at: expires_at
                .or(unusable("expires_at is not a time between 1970 and 9999"))?,
            issuer_expires_at: issuer_expires_at.transpose()?,
            allowed_ip: text(&mut self.allowed_ip)?,
            fingerprint: text(&mut self.fingerprint)?.unwrap_or_default(),
            // An older release leaves the time of an earlier token behind.
            repeated_at: repeated_at.transpose()?.filter(|at| *at >= issued_at),
        }))
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
    /// How many secrets name the same sealing key as this one.
    pub secrets_of_key: i64,
}

/// Returns sealed secrets for each sealing key in use: those of the three newest and of the three oldest accounts,
/// since some may be damaged.
///
/// # Errors
/// When the database cannot be read.
#[instrument(level = "debug", skip_all)]
pub async fn sealed_samples(pool: &PgPool) -> Result<Vec<SecretSample>, StoreError> {
    // A sealed value begins with a byte for the format, a byte for the key id's length, and the key id.
    let rows = sqlx::query!(
        r#"-- store::accounts::sealed_samples
        select id as "id!", name as "name!", credential_version as "credential_version!",
            sealed_secret as "sealed_secret!", secrets as "secrets!"
        from (
            select id, name, credential_version, sealed_secret, count(*) over (partition by key) as secrets,
                row_number() over (partition by key order by id desc) as newest,
                row_number() over (partition by key order by id) as oldest
            from accounts, substring(sealed_secret from 3 for get_byte(sealed_secret, 1)) as key
            where octet_length(sealed_secret) > 2
        ) numbered
        where newest <= $1 or oldest <= $1
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
            secrets_of_key: row.secrets,
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
    let mut transaction = begin(pool).await?;
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
    .execute(&mut *transaction)
    .await?;
    Ok(transaction.commit().await?)
}

/// Drops previous credentials that are not needed any more: the current credential has issued the account's
/// token, or the upstream refused the previous one. With `only`, just this account's. A row that another
/// transaction has locked is skipped. Returns how many were dropped.
///
/// This is not part of storing a token or a failure, which must not wait for the account's row.
///
/// # Errors
/// When the database cannot be reached or refuses the statement.
#[instrument(level = "debug", skip_all)]
pub async fn drop_replaced_credentials(
    pool: &PgPool,
    only: Option<AccountId>,
) -> Result<u64, StoreError> {
    let mut transaction = begin(pool).await?;
    let dropped = sqlx::query!(
        "-- store::accounts::drop_replaced_credentials
        with free as (
            select a.id
            from accounts a
            left join refreshes r on r.account_id = a.id
            left join tokens t on t.account_id = a.id
            where a.previous_secret is not null and ($1::bigint is null or a.id = $1)
                and (t.credential_version = a.credential_version
                    or r.refused_version = a.previous_version)
            for no key update of a skip locked
        )
        update accounts a set previous_secret = null, previous_version = null
        from free where a.id = free.id",
        only.map(|account| account.0),
    )
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(dropped.rows_affected())
}

/// Returns accounts whose previous credentials [`drop_replaced_credentials`] drops, at most a hundred; those in `last`
/// come last.
///
/// # Errors
/// When the database cannot be read.
#[instrument(level = "debug", skip_all)]
pub async fn with_replaced_credential(
    pool: &PgPool,
    last: &[i64],
) -> Result<Vec<AccountId>, StoreError> {
    let ids = sqlx::query_scalar!(
        "-- store::accounts::with_replaced_credential
        select a.id
        from accounts a
        left join refreshes r on r.account_id = a.id
        left join tokens t on t.account_id = a.id
        where a.previous_secret is not null
            and (t.credential_version = a.credential_version or r.refused_version = a.previous_version)
        order by a.id = any($1), a.id limit 100",
        last,
    )
    .fetch_all(pool)
    .await?;
    Ok(ids.into_iter().map(AccountId).collect())
}
