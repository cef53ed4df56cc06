//! Accounts: loading them, and sealing what admins write into the intake column.

use sqlx::PgPool;
use tracing::error;

use super::StoreError;
use crate::domain::{
    account::{AccountId, ClientId, CredentialVersion},
    clock::Timestamp,
    refresh_state::{Account, AccountCredential, FailureClass, IssueFailure, RefreshState},
    secret::SealedSecret,
    token::Generation,
};

/// How many accounts a page has at most.
const BATCH: i64 = 1_000;
/// How many secrets are looked at for each key, to prove that the keyring opens them.
const SAMPLES_A_KEY: i64 = 3;

/// An account with its progress and its sealed token, as one moment of the database has them.
#[derive(Clone, Debug)]
pub struct LoadedAccount {
    /// The account.
    pub account: Account,
    /// Its attempts.
    pub progress: RefreshState,
    /// Its token, if it has one.
    pub token: Option<SealedToken>,
    /// The database's clock at that moment, by which the account's and the attempts' times are.
    pub now: Timestamp,
}

/// A token as it is stored.
#[derive(Clone, Debug)]
pub struct SealedToken {
    /// The sealed JWT, bound to the account and the generation.
    pub sealed: Vec<u8>,
    /// Its place in the series.
    pub generation: Generation,
    /// The credential that issued it.
    pub credential_version: CredentialVersion,
    /// When it was issued.
    pub issued_at: Timestamp,
    /// When it ends.
    pub expires_at: Timestamp,
    /// The one address from which it may work.
    pub allowed_ip: Option<String>,
    /// Its keyed hash.
    pub fingerprint: String,
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
    suspect: Option<bool>,
    consecutive_failures: Option<i32>,
    error_class: Option<String>,
    error_code: Option<String>,
    error_message: Option<String>,
    error_version: Option<i64>,
    next_attempt_at: Option<Timestamp>,
    sealed_token: Option<Vec<u8>>,
    generation: Option<i64>,
    token_version: Option<i64>,
    issued_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    allowed_ip: Option<String>,
    fingerprint: Option<String>,
    now: Timestamp,
}

/// The numbers of the accounts after `after`, in order: a page of them.
///
/// # Errors
/// When the database cannot be read.
pub async fn ids_after(pool: &PgPool, after: i64) -> Result<Vec<i64>, StoreError> {
    let ids = sqlx::query_scalar!(
        "-- store::accounts::ids_after
        select id from accounts where id > $1 order by id limit $2",
        after,
        BATCH,
    )
    .fetch_all(pool)
    .await?;
    Ok(ids)
}

/// Those of the accounts `ids` that exist.
///
/// # Errors
/// When the database cannot be read.
pub async fn load(pool: &PgPool, ids: &[i64]) -> Result<Vec<LoadedAccount>, StoreError> {
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
            r.suspect as "suspect?", r.consecutive_failures as "consecutive_failures?",
            r.error_class as "error_class?", r.error_code as "error_code?",
            r.error_message as "error_message?", r.error_version as "error_version?",
            r.next_attempt_at as "next_attempt_at?", t.sealed_token as "sealed_token?",
            t.generation as "generation?", t.credential_version as "token_version?",
            t.issued_at as "issued_at?", t.expires_at as "expires_at?",
            t.allowed_ip as "allowed_ip?", t.fingerprint as "fingerprint?",
            clock_timestamp() as "now!"
        from accounts a
        left join refreshes r on r.account_id = a.id
        left join tokens t on t.account_id = a.id
        where a.id = any($1)"#,
        ids,
    )
    .fetch_all(pool)
    .await?;
    // One row that somebody wrote past the triggers must not stop all the others.
    let read =
        |row: Row| row.read().inspect_err(|error| error!(%error, "an account is passed over"));
    Ok(rows.into_iter().filter_map(|row| read(row).ok()).collect())
}

impl Row {
    fn read(self) -> Result<LoadedAccount, StoreError> {
        let id = self.id;
        let corrupt = |problem| StoreError::unreadable_row("accounts", id, problem);
        let failure = match (&self.error_class, self.error_version) {
            (Some(class), Some(version)) => Some(IssueFailure {
                // A newer release may know more classes; all that may pass by itself is retried.
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
            progress: RefreshState {
                attempt_started_at: self.attempt_started_at,
                attempt_version: self.attempt_version.map(CredentialVersion),
                attempt_open: self.attempt_open.unwrap_or_default(),
                lease_until: self.lease_until,
                suspect: self.suspect.unwrap_or_default(),
                stored_generation: self.generation.map(Generation),
                failures: self.consecutive_failures.unwrap_or_default().unsigned_abs(),
                failure,
                next_attempt_at: self.next_attempt_at,
            },
            token,
            now: self.now,
        })
    }
}

/// What an admin wrote into the intake column of one account.
pub struct Intake {
    /// The account.
    pub id: AccountId,
    /// Its login.
    pub client_id: ClientId,
    /// The version that the sealed secret is bound to.
    pub version: CredentialVersion,
    /// The text: a secret, or `sealed:…`.
    pub value: zeroize::Zeroizing<String>,
}

/// Seals up to a hundred waiting intake values with `seal` and empties the intake column, in one
/// transaction. Rows that another replica is sealing are passed over. Returns how many were sealed:
/// none when there are no more.
///
/// A value that `seal` refuses is emptied too: the account then shows the failure until an admin
/// writes another.
///
/// # Errors
/// When the database cannot be reached.
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
        let (secret, refused) = match sealed_value {
            Ok(secret) => (Some(secret), None),
            Err(refused) => (None, Some(refused)),
        };
        sqlx::query!(
            "-- store::accounts::seal_intake
            update accounts set sealed_secret = $2, client_secret = null where id = $1",
            row.id,
            secret,
        )
        .execute(&mut *transaction)
        .await?;
        if let Some(refused) = refused {
            sqlx::query!(
                "-- store::accounts::seal_intake
                update refreshes set error_class = $2, error_code = null, error_message = $3,
                    error_version = $4, consecutive_failures = consecutive_failures + 1,
                    next_attempt_at = null, changed = pg_current_xact_id()
                where account_id = $1",
                row.id,
                FailureClass::Intake.as_str(),
                refused,
                row.credential_version,
            )
            .execute(&mut *transaction)
            .await?;
        }
    }
    transaction.commit().await?;
    Ok(sealed)
}

/// A sealed value with its place, to prove at start that the keyring opens what is stored.
pub struct Stored {
    /// The account.
    pub id: AccountId,
    /// Its name.
    pub name: String,
    /// The version that the value is bound to.
    pub version: CredentialVersion,
    /// The sealed secret.
    pub sealed: Vec<u8>,
}

/// The sealed secrets of a few accounts for each sealing key that is in use: the newest ones', and more
/// than one, since a single value may be the only one at fault.
///
/// # Errors
/// When the database cannot be read.
pub async fn sealed_samples(pool: &PgPool) -> Result<Vec<Stored>, StoreError> {
    // A sealed value starts with one byte of version, one of the key id's length, and the key id.
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
        SAMPLES_A_KEY,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Stored {
            id: AccountId(row.id),
            name: row.name,
            version: CredentialVersion(row.credential_version),
            sealed: row.sealed_secret,
        })
        .collect())
}

/// Notes when accounts were last asked for: pairs of number and moment. A note within a minute of
/// the one before is not worth a write, and a row that somebody holds is left for the next time.
///
/// # Errors
/// When the database cannot be written.
pub async fn note_requests(
    pool: &PgPool,
    ids: &[i64],
    moments: &[Timestamp],
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
        moments,
    )
    .execute(pool)
    .await?;
    Ok(())
}
