//! Accounts, as an admin sees and changes them.

use super::{Admin, StoreError, ensure_affected, violates};
use crate::domain::{
    account::{AccountName, ClientId},
    caller::AccountPattern,
    clock::Timestamp,
};

/// An account to be registered.
#[derive(Clone, Debug)]
pub struct NewAccount<'a> {
    /// Its name.
    pub name: &'a AccountName,
    /// Its login at the upstream.
    pub client_id: &'a ClientId,
    /// Its secret, sealed to the intake key for this login: `sealed:…`.
    pub sealed_secret: &'a str,
    /// For people.
    pub description: &'a str,
}

/// A new secret for an account.
#[derive(Clone, Debug)]
pub struct Rotation<'a> {
    /// Whose.
    pub name: &'a AccountName,
    /// The login that the secret was sealed for.
    pub client_id: &'a ClientId,
    /// The login that it had when the secret was sealed; another one would not open it.
    pub from_client_id: &'a str,
    /// `sealed:…`.
    pub sealed_secret: &'a str,
    /// Drops the old secret at once, instead of when the new one has issued.
    pub purge_old: bool,
}

/// Which accounts are meant; every enabled one that fits all that is set.
#[derive(Clone, Debug)]
pub struct Selection {
    /// By name.
    pub pattern: Option<AccountPattern>,
    /// By a state of `account_status`.
    pub state: Option<String>,
}

/// An account in a list.
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

/// All that may be told of an account.
#[derive(Clone, Debug)]
pub struct AccountDetails {
    /// Where it stands.
    pub status: AccountSummary,
    /// For people.
    pub description: String,
    /// How many credentials it has had.
    pub credential_version: i64,
    /// Whether the secret before the last rotation is kept still.
    pub keeps_previous_secret: bool,
    /// When a new token was last asked for by hand.
    pub reissue_requested_at: Option<Timestamp>,
    /// When it was registered.
    pub created_at: Timestamp,
    /// When its row last changed.
    pub updated_at: Timestamp,
}

/// What has come of an account's present credential and of the last request for a new token.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// A token was issued.
    pub issued: bool,
    /// An attempt failed.
    pub failed: bool,
    /// Where the account stands.
    pub status: AccountSummary,
}

impl Admin {
    /// Registers an account.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when the name or the login is taken, with the account that has it.
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
                Err(self.name_the_rival(error, account.name, account.client_id).await)
            }
        }
    }

    /// Replaces an account's secret, and its login if another one is given.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is no such account, or its login was changed meanwhile.
    pub async fn rotate(&self, rotation: &Rotation<'_>) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        if rotation.purge_old {
            sqlx::query!(
                "/* store::admin::rotate */
                 select set_config('token_broker.purge_old', 'on', true)"
            )
            .fetch_one(&mut *transaction)
            .await?;
        }
        let updated = sqlx::query!(
            "/* store::admin::rotate */
             update accounts set client_secret = $3, client_id = $2
             where name = $1 and client_id = $4",
            rotation.name.as_str(),
            rotation.client_id.as_str(),
            rotation.sealed_secret,
            rotation.from_client_id,
        )
        .execute(&mut *transaction)
        .await;
        match updated {
            Ok(done) => {
                ensure_affected(done.rows_affected(), || {
                    format!("account {} is gone or has another client id now", rotation.name)
                })?;
                Ok(transaction.commit().await?)
            }
            Err(error) => {
                transaction.rollback().await?;
                Err(self.name_the_rival(error, rotation.name, rotation.client_id).await)
            }
        }
    }

    /// Says which account is in the way, where `error` is that one is.
    async fn name_the_rival(
        &self,
        error: sqlx::Error,
        name: &AccountName,
        client_id: &ClientId,
    ) -> StoreError {
        if violates(&error, "accounts_name_key") {
            return StoreError::Refused(format!("account {name} already exists"));
        }
        if !violates(&error, "accounts_provider_client_id_key") {
            return error.into();
        }
        let owner = sqlx::query_scalar!(
            "/* store::admin::name_the_rival */
             select name from accounts where provider = 'rcs' and client_id = $1",
            client_id.as_str(),
        )
        .fetch_optional(&self.pool)
        .await;
        StoreError::Refused(match owner {
            Ok(Some(owner)) => format!("client id {client_id} already belongs to account {owner}"),
            _ => format!("client id {client_id} already belongs to another account"),
        })
    }

    /// All accounts, by name.
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
        .ok_or_else(|| no_such(name))
    }

    /// One account.
    pub async fn account(&self, name: &AccountName) -> Result<AccountDetails, StoreError> {
        let status = self.account_status(name).await?;
        let row = sqlx::query!(
            r#"/* store::admin::account */
             select description, credential_version,
                 previous_version is not null as "keeps_previous_secret!", reissue_requested_at,
                 created_at, updated_at
             from accounts where name = $1"#,
            name.as_str(),
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| no_such(name))?;
        Ok(AccountDetails {
            status,
            description: row.description,
            credential_version: row.credential_version,
            keeps_previous_secret: row.keeps_previous_secret,
            reissue_requested_at: row.reissue_requested_at,
            created_at: row.created_at,
            updated_at: row.updated_at,
        })
    }

    /// The login of an account.
    pub async fn client_id(&self, name: &AccountName) -> Result<String, StoreError> {
        sqlx::query_scalar!(
            "/* store::admin::client_id */ select client_id from accounts where name = $1",
            name.as_str(),
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| no_such(name))
    }

    /// Asks for new tokens now. Returns whose, by name.
    pub async fn reissue(&self, selection: &Selection) -> Result<Vec<String>, StoreError> {
        let like = selection.pattern.as_ref().map(like);
        let mut transaction = self.begin().await?;
        let mut names = sqlx::query_scalar!(
            "/* store::admin::reissue */
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

    /// Enables or disables an account.
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

    /// Removes an account with its token.
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

    /// What has come of the account's present credential, and of a request for a new token, so far.
    pub async fn outcome(&self, name: &AccountName) -> Result<Outcome, StoreError> {
        let row = sqlx::query!(
            r#"/* store::admin::outcome */
             select
                 coalesce(t.credential_version = a.credential_version
                     and t.issued_at >= coalesce(a.reissue_requested_at, t.issued_at),
                     false) as "issued!",
                 coalesce(r.error_version = a.credential_version and (r.error_class = 'intake'
                     or r.error_class is not null
                     and r.attempt_ended_at >= coalesce(a.reissue_requested_at, r.attempt_ended_at)),
                     false) as "failed!"
             from accounts a
             left join refreshes r on r.account_id = a.id
             left join tokens t on t.account_id = a.id
             where a.name = $1"#,
            name.as_str(),
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| no_such(name))?;
        let status = self.account_status(name).await?;
        Ok(Outcome { issued: row.issued, failed: row.failed, status })
    }
}

fn no_account(name: &AccountName) -> String {
    format!("there is no account {name}")
}

fn no_such(name: &AccountName) -> StoreError {
    StoreError::NotFound(no_account(name))
}

/// The pattern for SQL's `like`, with its own wildcards escaped.
fn like(pattern: &AccountPattern) -> String {
    pattern.to_string().replace('_', "\\_").replace('*', "%")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_underscore_in_a_pattern_is_no_wildcard_of_sql() {
        assert_eq!(like(&"a_b-*".parse().unwrap()), "a\\_b-%");
        assert_eq!(like(&"acme".parse().unwrap()), "acme");
    }
}
