//! The statements of the command `account`.

use tracing::instrument;

use super::connection::{Admin, ensure_affected, violates};
use crate::{
    domain::{
        account::{AccountName, ClientId},
        caller::AccountPattern,
        clock::Timestamp,
    },
    store::{StoreError, execution::repeat_on_conflict, lenient::LenientTime, mass_changes},
};

/// The values of an account that is to be registered.
#[derive(Clone, Debug)]
pub struct NewAccount<'a> {
    /// The name that callers use to request the account's tokens.
    pub name: &'a AccountName,
    /// The account's login at the upstream.
    pub client_id: &'a ClientId,
    /// The client secret as `account seal` prints it (`sealed:…`), sealed for this `client_id`.
    pub sealed_secret: &'a str,
    /// A description for admins; the broker does not interpret it.
    pub description: &'a str,
}

/// A new client secret for an account, and possibly a new client id.
#[derive(Clone, Debug)]
pub struct Rotation<'a> {
    /// The account's name.
    pub name: &'a AccountName,
    /// The new client id, for which the secret was sealed; the same as before if it does not change.
    pub client_id: &'a ClientId,
    /// The client id that the account had when the secret was sealed. If it was changed since, the
    /// rotation is refused.
    pub from_client_id: &'a str,
    /// The new client secret as `account seal` prints it (`sealed:…`).
    pub sealed_secret: &'a str,
    /// Whether the old secret is dropped at once. Otherwise it is kept until a token was issued with the new
    /// one.
    pub purge_old: bool,
}

/// What is known right after another secret was written for an account.
#[derive(Clone, Copy, Debug)]
pub struct Rotated {
    /// The credential version that the account still has once a broker has sealed the secret, if that is the one that
    /// it had before; otherwise the account gets a later version. `None` if the version cannot tell.
    pub unchanged_version: Option<i64>,
}

/// A selection of enabled accounts: those that meet all conditions that are set.
#[derive(Clone, Debug)]
pub struct Selection {
    /// A pattern that the name must match.
    pub pattern: Option<AccountPattern>,
    /// The required state in the view `account_status`, such as `rejected`.
    pub state: Option<String>,
}

/// One row of the view `account_status`.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the columns of `account_status`")]
pub struct AccountSummary {
    pub name: String,
    pub client_id: String,
    pub state: String,
    pub expires_at: Option<Timestamp>,
    pub time_left_seconds: Option<i64>,
    pub last_issued_at: Option<Timestamp>,
    pub allowed_ip: Option<String>,
    pub generation: Option<i64>,
    pub consecutive_failures: i32,
    pub last_error: Option<String>,
    pub next_attempt_at: Option<Timestamp>,
    pub last_requested_at: Option<Timestamp>,
    pub hint: String,
}

/// The details of an account that may be shown: everything except its secrets and its token.
#[derive(Clone, Debug)]
pub struct AccountDetails {
    /// The account's row in the view `account_status`.
    pub status: AccountSummary,
    /// A description for admins.
    pub description: String,
    /// The version of the current credential, counted from 1.
    pub credential_version: i64,
    /// Whether the secret from before the last rotation is still kept.
    pub keeps_previous_secret: bool,
    /// When an admin last requested a new token. Also `None` if the row holds a time that cannot be read; then
    /// the hint of `status` names it.
    pub reissue_requested_at: Option<Timestamp>,
    /// When the account was registered.
    pub created_at: Timestamp,
    /// When the account's row last changed.
    pub updated_at: Timestamp,
}

/// The outcome so far of the account's credential, with the secret that was written last, and of the last request for a
/// new token, if there is one. `account … --wait` polls it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Whether a token was issued with the current credential since the request.
    pub issued: bool,
    /// Whether an attempt with the current credential failed since the request.
    pub failed: bool,
    /// The version of the current credential.
    pub credential_version: i64,
    /// The account's row in the view `account_status`.
    pub status: AccountSummary,
}

impl Admin {
    /// Registers an account.
    ///
    /// # Errors
    /// Returns [`StoreError::Conflict`] when the name or the client id is taken, naming the account
    /// that has it.
    #[instrument(level = "debug", skip_all, fields(account = %account.name))]
    pub async fn add_account(&self, account: &NewAccount<'_>) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        let inserted = sqlx::query!(
            "/* store::admin::add_account */
             insert into accounts (name, client_id, client_secret, description)
             values ($1, $2, $3, $4)",
            account.name.as_str(),
            account.client_id.as_str(),
            account.sealed_secret,
            account.description,
        )
        .execute(&mut *transaction)
        .await;
        match inserted {
            Ok(_) => Ok(transaction.commit().await?),
            Err(error) => {
                transaction.rollback().await?;
                Err(self.name_conflict(error, account.name, account.client_id).await)
            }
        }
    }

    /// Replaces an account's client secret, and its client id if another one is given. A broker finds out whether it is
    /// another secret when it seals it.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such account, or its client id was changed
    /// meanwhile, and [`StoreError::Conflict`] when another account has the new client id.
    #[instrument(level = "debug", skip_all, fields(account = %rotation.name))]
    pub async fn rotate(&self, rotation: &Rotation<'_>) -> Result<Rotated, StoreError> {
        let mut transaction = self.begin().await?;
        if rotation.purge_old {
            sqlx::query!(
                "/* store::admin::rotate */
                 select set_config('token_broker.purge_old', 'on', true)"
            )
            .fetch_one(&mut *transaction)
            .await?;
        }
        // If something is known of the version and no secret is sealed, the trigger begins another version. So a version
        // of which something is known has a sealed secret, with which brokers compare.
        let updated = sqlx::query_scalar!(
            "/* store::admin::rotate */
             update accounts a set client_secret = $3, client_id = $2
             where a.name = $1 and a.client_id = $4
             returning case
                 when exists (select from tokens t
                     where t.account_id = a.id and t.credential_version = a.credential_version)
                 or exists (select from refreshes r
                     where r.account_id = a.id and r.error_version = a.credential_version)
                 then a.credential_version end",
            rotation.name.as_str(),
            rotation.client_id.as_str(),
            rotation.sealed_secret,
            rotation.from_client_id,
        )
        .fetch_optional(&mut *transaction)
        .await;
        match updated {
            Ok(Some(unchanged_version)) => {
                transaction.commit().await?;
                Ok(Rotated { unchanged_version })
            }
            Ok(None) => Err(StoreError::NotFound(format!(
                "account {} is gone or has another client id now",
                rotation.name
            ))),
            Err(error) => {
                transaction.rollback().await?;
                Err(self.name_conflict(error, rotation.name, rotation.client_id).await)
            }
        }
    }

    /// Converts an error of a statement that writes an account. If the name or the client id is taken, the
    /// message says which account has it.
    async fn name_conflict(
        &self,
        error: sqlx::Error,
        name: &AccountName,
        client_id: &ClientId,
    ) -> StoreError {
        if violates(&error, "accounts_name_key") {
            return StoreError::taken(format!("account {name} already exists"), error);
        }
        if !violates(&error, "accounts_provider_client_id_key") {
            return error.into();
        }
        let owner = sqlx::query_scalar!(
            "/* store::admin::name_conflict */
             select name from accounts where provider = 'rcs' and client_id = $1",
            client_id.as_str(),
        )
        .fetch_optional(&self.pool)
        .await;
        let message = match owner {
            Ok(Some(owner)) => format!("client id {client_id} already belongs to account {owner}"),
            _ => format!("client id {client_id} already belongs to another account"),
        };
        StoreError::taken(message, error)
    }

    /// Returns all accounts, ordered by name.
    #[instrument(level = "debug", skip_all)]
    pub async fn accounts(&self) -> Result<Vec<AccountSummary>, StoreError> {
        Ok(sqlx::query_as!(
            AccountSummary,
            r#"/* store::admin::accounts */
             select name as "name!", client_id as "client_id!", state as "state!", expires_at,
                 extract(epoch from time_left)::bigint as time_left_seconds, last_issued_at,
                 allowed_ip, generation, consecutive_failures as "consecutive_failures!",
                 last_error, next_attempt_at, last_requested_at, hint as "hint!"
             from account_status order by name"#,
        )
        .fetch_all(&self.pool)
        .await?)
    }

    #[instrument(level = "debug", skip_all, fields(account = %name))]
    async fn account_status(&self, name: &AccountName) -> Result<AccountSummary, StoreError> {
        sqlx::query_as!(
            AccountSummary,
            r#"/* store::admin::account_status */
             select name as "name!", client_id as "client_id!", state as "state!", expires_at,
                 extract(epoch from time_left)::bigint as time_left_seconds, last_issued_at,
                 allowed_ip, generation, consecutive_failures as "consecutive_failures!",
                 last_error, next_attempt_at, last_requested_at, hint as "hint!"
             from account_status where name = $1"#,
            name.as_str(),
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| not_found(name))
    }

    /// Returns the details of one account.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such account, and [`StoreError::UnreadableRow`] when its
    /// row holds a time that cannot be read.
    #[instrument(level = "debug", skip_all, fields(account = %name))]
    pub async fn account(&self, name: &AccountName) -> Result<AccountDetails, StoreError> {
        let status = self.account_status(name).await?;
        let row = sqlx::query!(
            r#"/* store::admin::account */
             select id, description, credential_version,
                 previous_version is not null as "keeps_previous_secret!",
                 reissue_requested_at as "reissue_requested_at: LenientTime",
                 created_at as "created_at: LenientTime", updated_at as "updated_at: LenientTime"
             from accounts where name = $1"#,
            name.as_str(),
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| not_found(name))?;
        let unreadable = |problem| StoreError::unreadable_row("accounts", row.id, problem);
        Ok(AccountDetails {
            status,
            description: row.description,
            credential_version: row.credential_version,
            keeps_previous_secret: row.keeps_previous_secret,
            reissue_requested_at: row.reissue_requested_at.and_then(|at| at.or(()).ok()),
            created_at: row.created_at.or(unreadable("malformed created_at"))?,
            updated_at: row.updated_at.or(unreadable("malformed updated_at"))?,
        })
    }

    /// Returns an account's login at the upstream.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such account.
    #[instrument(level = "debug", skip_all, fields(account = %name))]
    pub async fn client_id(&self, name: &AccountName) -> Result<String, StoreError> {
        sqlx::query_scalar!(
            "/* store::admin::client_id */ select client_id from accounts where name = $1",
            name.as_str(),
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| not_found(name))
    }

    /// Requests new tokens for the selected accounts, and returns the accounts' names, sorted. Does not wait
    /// until a broker has issued the tokens.
    #[instrument(level = "debug", skip_all)]
    pub async fn reissue(&self, selection: &Selection) -> Result<Vec<String>, StoreError> {
        // Brokers lock the same rows in another order, which can cause a deadlock.
        repeat_on_conflict(|| self.try_reissue(selection)).await
    }

    async fn try_reissue(&self, selection: &Selection) -> Result<Vec<String>, StoreError> {
        let like = selection.pattern.as_ref().map(like);
        let mut transaction = self.begin().await?;
        mass_changes::allow(&mut transaction, None).await?;
        let mut names = sqlx::query_scalar!(
            "/* store::admin::try_reissue */
             update accounts a set reissue_requested_at = now()
             from account_status s
             where s.name = a.name and a.enabled
                 and ($1::text is null or a.name like $1)
                 and ($2::text is null or s.state = $2)
             returning a.name",
            like,
            selection.state,
        )
        .fetch_all(&mut *transaction)
        .await?;
        transaction.commit().await?;
        names.sort_unstable();
        Ok(names)
    }

    /// Enables or disables an account. Brokers keep a disabled account's token. After the account is enabled
    /// again, they serve the token until it ends.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such account.
    #[instrument(level = "debug", skip_all, fields(account = %name, enabled))]
    pub async fn enable_account(
        &self,
        name: &AccountName,
        enabled: bool,
    ) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        let done = sqlx::query!(
            "/* store::admin::enable_account */ update accounts set enabled = $2 where name = $1",
            name.as_str(),
            enabled,
        )
        .execute(&mut *transaction)
        .await?;
        ensure_affected(done.rows_affected(), || no_account(name))?;
        Ok(transaction.commit().await?)
    }

    /// Removes an account together with its token.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such account.
    #[instrument(level = "debug", skip_all, fields(account = %name))]
    pub async fn remove_account(&self, name: &AccountName) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        let done = sqlx::query!(
            "/* store::admin::remove_account */ delete from accounts where name = $1",
            name.as_str(),
        )
        .execute(&mut *transaction)
        .await?;
        ensure_affected(done.rows_affected(), || no_account(name))?;
        Ok(transaction.commit().await?)
    }

    /// Returns whether the account's current credential and the last request for a new token have led to a
    /// token or to a failure so far.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such account.
    #[instrument(level = "debug", skip_all, fields(account = %name))]
    pub async fn outcome(&self, name: &AccountName) -> Result<Outcome, StoreError> {
        let row = sqlx::query!(
            r#"/* store::admin::outcome */
             select a.credential_version,
                 coalesce(not s.secret_waits and t.credential_version = a.credential_version
                     and greatest(t.issued_at, t.repeated_at)
                         >= coalesce(a.reissue_requested_at, t.issued_at),
                     false) as "issued!",
                 coalesce(not s.secret_waits and r.error_version = a.credential_version
                     and (r.error_class = 'intake' or r.error_class is not null
                     and r.attempt_ended_at >= coalesce(a.reissue_requested_at, r.attempt_ended_at)),
                     false) as "failed!"
             from accounts a
             join account_status s on s.name = a.name
             left join refreshes r on r.account_id = a.id
             left join tokens t on t.account_id = a.id
             where a.name = $1"#,
            name.as_str(),
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| not_found(name))?;
        let status = self.account_status(name).await?;
        let credential_version = row.credential_version;
        Ok(Outcome { issued: row.issued, failed: row.failed, credential_version, status })
    }
}

fn no_account(name: &AccountName) -> String {
    format!("there is no account {name}")
}

fn not_found(name: &AccountName) -> StoreError {
    StoreError::NotFound(no_account(name))
}

/// Converts a pattern to a pattern of SQL's `like`. Names may contain `_`, which is a wildcard in `like`, so
/// it is escaped.
fn like(pattern: &AccountPattern) -> String {
    pattern.to_string().replace('_', "\\_").replace('*', "%")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_underscore_in_a_pattern_matches_only_itself_in_sql() {
        assert_eq!(like(&"a_b-*".parse().unwrap()), "a\\_b-%");
        assert_eq!(like(&"acme".parse().unwrap()), "acme");
    }
}
