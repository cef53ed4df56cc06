//! The statements of `account import` and `account export`.

use std::cell::RefCell;

use tracing::instrument;

use super::connection::{Admin, violates};
use crate::store::{StoreError, execution::repeat_on_conflict, mass_changes};

/// How many rows a statement writes. Each statement stays well below any limit of its time, and the triggers that run
/// once for a statement still cost little.
pub(super) const ROWS: usize = 500;

/// The columns of an account that may be read and that its admins set.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the columns of `accounts`")]
pub struct StoredAccount {
    pub name: String,
    pub client_id: String,
    pub enabled: bool,
    pub description: String,
    pub credential_version: i64,
}

/// An account to register.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the columns of `accounts`")]
pub struct WholeAccount {
    pub name: String,
    pub client_id: String,
    /// The client secret as `account seal` prints it (`sealed:…`), sealed for this `client_id`.
    pub sealed_secret: String,
    pub enabled: bool,
    pub description: String,
}

/// A change of a known account. What is `None` stays as it is.
#[derive(Clone, Debug)]
pub struct AccountUpdate {
    /// The account's name.
    pub name: String,
    /// The client id that the account had when it was read. If it was changed since, nothing is imported.
    pub from_client_id: String,
    /// The new client id; the same as before if it does not change.
    pub client_id: String,
    /// A client secret, sealed for `client_id`. A broker compares it with the one that the account has, so the same
    /// one again changes nothing.
    pub sealed_secret: Option<String>,
    /// Whether the account is enabled.
    pub enabled: Option<bool>,
    /// A description for people.
    pub description: Option<String>,
}

/// Accounts to remove, to register and to change, all of them or none.
#[derive(Clone, Debug, Default)]
pub struct AccountsImport {
    /// The names of the accounts to remove, before the others are written: they may get their client ids.
    pub removed: Vec<String>,
    /// The accounts to register.
    pub inserts: Vec<WholeAccount>,
    /// The changes of known accounts.
    pub updates: Vec<AccountUpdate>,
}

impl AccountsImport {
    /// Returns how many rows are written.
    #[must_use]
    pub fn len(&self) -> usize {
        self.removed.len() + self.inserts.len() + self.updates.len()
    }

    /// Returns whether nothing is written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Returns a column of rows, as a statement takes it.
fn column<'a, R, V>(rows: &'a [R], value: impl Fn(&'a R) -> V) -> Vec<V> {
    rows.iter().map(value).collect()
}

impl Admin {
    /// Returns all accounts, ordered by the bytes of their names, whatever the database's collation is.
    #[instrument(level = "debug", skip_all)]
    pub async fn stored_accounts(&self) -> Result<Vec<StoredAccount>, StoreError> {
        Ok(sqlx::query_as!(
            StoredAccount,
            r#"/* store::admin::stored_accounts */
             select name, client_id, enabled, description, credential_version
             from accounts order by name collate "C""#,
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Writes the import in one transaction. Calls `progress` with the number of rows that were written so far.
    ///
    /// # Errors
    /// Returns [`StoreError::Conflict`] when a name or a client id was taken meanwhile, and [`StoreError::NotFound`]
    /// when an account was removed or got another client id meanwhile. Nothing was changed then.
    #[instrument(level = "debug", skip_all)]
    pub async fn import_accounts(
        &self,
        import: &AccountsImport,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(), StoreError> {
        let progress = &RefCell::new(progress);
        // Brokers lock the same rows in another order, which can cause a deadlock.
        repeat_on_conflict(|| self.try_import(import, move |done| (*progress.borrow_mut())(done)))
            .await
    }

    async fn try_import(
        &self,
        import: &AccountsImport,
        mut progress: impl FnMut(usize),
    ) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        mass_changes::allow(&mut transaction, None).await?;
        let mut done = 0;
        for names in import.removed.chunks(ROWS) {
            sqlx::query!(
                "/* store::admin::try_import */ delete from accounts where name = any($1)",
                names,
            )
            .execute(&mut *transaction)
            .await?;
            done += names.len();
            progress(done);
        }
        for rows in import.inserts.chunks(ROWS) {
            sqlx::query!(
                "/* store::admin::try_import */
                 insert into accounts (name, client_id, client_secret, enabled, description)
                 select * from unnest($1::text[], $2::text[], $3::text[], $4::boolean[], $5::text[])",
                &column(rows, |row| row.name.as_str()) as &[&str],
                &column(rows, |row| row.client_id.as_str()) as &[&str],
                &column(rows, |row| row.sealed_secret.as_str()) as &[&str],
                &column(rows, |row| row.enabled),
                &column(rows, |row| row.description.as_str()) as &[&str],
            )
            .execute(&mut *transaction)
            .await
            .map_err(taken_meanwhile)?;
            done += rows.len();
            progress(done);
        }
        for rows in import.updates.chunks(ROWS) {
            // The role of admins cannot read the secret, so a statement either writes it or leaves it out.
            let (secrets, others): (Vec<_>, Vec<_>) =
                rows.iter().partition(|row| row.sealed_secret.is_some());
            let mut updated = sqlx::query!(
                "/* store::admin::try_import */
                 update accounts a set client_id = given.client_id, client_secret = given.client_secret,
                     enabled = coalesce(given.enabled, a.enabled),
                     description = coalesce(given.description, a.description)
                 from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::boolean[], $6::text[])
                     as given (name, from_client_id, client_id, client_secret, enabled, description)
                 where a.name = given.name and a.client_id = given.from_client_id",
                &column(&secrets, |row| row.name.as_str()) as &[&str],
                &column(&secrets, |row| row.from_client_id.as_str()) as &[&str],
                &column(&secrets, |row| row.client_id.as_str()) as &[&str],
                &column(&secrets, |row| row.sealed_secret.as_deref()) as &[Option<&str>],
                &column(&secrets, |row| row.enabled) as &[Option<bool>],
                &column(&secrets, |row| row.description.as_deref()) as &[Option<&str>],
            )
            .execute(&mut *transaction)
            .await
            .map_err(taken_meanwhile)?
            .rows_affected();
            updated += sqlx::query!(
                "/* store::admin::try_import */
                 update accounts a set enabled = coalesce(given.enabled, a.enabled),
                     description = coalesce(given.description, a.description)
                 from unnest($1::text[], $2::text[], $3::boolean[], $4::text[])
                     as given (name, from_client_id, enabled, description)
                 where a.name = given.name and a.client_id = given.from_client_id",
                &column(&others, |row| row.name.as_str()) as &[&str],
                &column(&others, |row| row.from_client_id.as_str()) as &[&str],
                &column(&others, |row| row.enabled) as &[Option<bool>],
                &column(&others, |row| row.description.as_deref()) as &[Option<&str>],
            )
            .execute(&mut *transaction)
            .await?
            .rows_affected();
            if updated != rows.len() as u64 {
                transaction.rollback().await?;
                return Err(StoreError::NotFound(
                    "an account of the file was removed or got another client id meanwhile, so nothing was changed: \
                     import the file once more"
                        .into(),
                ));
            }
            done += rows.len();
            progress(done);
        }
        Ok(transaction.commit().await?)
    }

    /// Returns how many of the accounts have an API KEY that no broker has sealed yet.
    #[instrument(level = "debug", skip_all)]
    pub async fn unsealed(&self, names: &[String]) -> Result<i64, StoreError> {
        Ok(sqlx::query_scalar!(
            r#"/* store::admin::unsealed */
             select count(*) as "count!" from account_status where secret_waits and name = any($1)"#,
            names,
        )
        .fetch_one(&self.pool)
        .await?)
    }
}

/// Returns the error of a statement that writes accounts, in words if a name or a client id is taken.
fn taken_meanwhile(error: sqlx::Error) -> StoreError {
    let taken = ["accounts_name_key", "accounts_provider_client_id_key"];
    if taken.iter().any(|constraint| violates(&error, constraint)) {
        let message = "a name or a client id of the file was taken meanwhile, so nothing was changed: import the file \
            once more";
        return StoreError::taken(message.into(), error);
    }
    error.into()
}
