//! The statements of `keys`: which keys values are sealed with, and sealing them again.

use sqlx::{Postgres, Transaction};
use tracing::instrument;

use super::connection::Admin;
use crate::{
    crypto::{KeyId, KeyKind, Keyring, RowBinding, SealError},
    domain::{
        account::{AccountId, CredentialVersion},
        token::Generation,
    },
    store::{StoreError, begin},
};

/// How many rows one transaction seals again. It holds their locks for some milliseconds.
const BATCH: i64 = 100;

/// How many values of a column name a key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyUse {
    /// The column.
    pub place: String,
    /// The id of the key.
    pub key_id: String,
    /// The number of values, at least 1.
    pub values: i64,
}

/// A table with sealed values.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SealedTable {
    /// Current and previous client secrets.
    Accounts,
    /// Tokens.
    Tokens,
}

/// What one transaction of [`Admin::reseal`] did.
#[derive(Debug, Default)]
pub struct ResealedBatch {
    /// The number of values that were sealed again.
    pub resealed: u64,
    /// The id of the last account, from which the next call goes on; `None` if there is none left.
    pub last: Option<i64>,
    /// The values that do not open, which stay as they are.
    pub unopened: Vec<(RowBinding, SealError)>,
}

impl ResealedBatch {
    /// Returns `sealed`, sealed again with the primary key if that is another one. Counts what was done.
    fn reseal(&mut self, keyring: &Keyring, binding: RowBinding, sealed: Vec<u8>) -> Vec<u8> {
        if keyring.is_sealed_with_primary(&sealed) {
            return sealed;
        }
        match keyring.reseal(&binding, &sealed) {
            Ok(again) => {
                self.resealed += 1;
                again
            }
            Err(error) => {
                self.unopened.push((binding, error));
                sealed
            }
        }
    }
}

impl Admin {
    /// Returns how many values name each key: sealed ones, and those of the intake column that no broker has sealed
    /// yet.
    ///
    /// # Errors
    /// [`StoreError::MissingPrivilege`] unless the login may read them, as the broker's may.
    #[instrument(level = "debug", skip_all)]
    pub async fn key_uses(&self) -> Result<Vec<KeyUse>, StoreError> {
        // A sealed value begins with a byte for the format, a byte for the key id's length, and the key id.
        Ok(sqlx::query_as!(
            KeyUse,
            r#"/* store::admin::key_uses */
             select place as "place!", key as "key_id!", count(*) as "values!"
             from (
                 select 'accounts.sealed_secret' as place, case when octet_length(sealed_secret) > 2
                     then encode(substring(sealed_secret from 3 for get_byte(sealed_secret, 1)), 'escape') end as key
                 from accounts
                 union all
                 select 'accounts.previous_secret', case when octet_length(previous_secret) > 2
                     then encode(substring(previous_secret from 3 for get_byte(previous_secret, 1)), 'escape') end
                 from accounts
                 union all
                 select 'tokens.sealed_token', case when octet_length(sealed_token) > 2
                     then encode(substring(sealed_token from 3 for get_byte(sealed_token, 1)), 'escape') end
                 from tokens
                 union all
                 select 'accounts.client_secret', split_part(client_secret, ':', 3)
                 from accounts where client_secret like 'sealed:v1:%'
             ) named
             where key is not null group by place, key order by place, key"#,
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Records that `values` values are to be sealed again with `key`, or that this is `done`.
    ///
    /// # Errors
    /// [`StoreError::MissingPrivilege`] unless the login has the rights of the tables' owner.
    #[instrument(level = "debug", skip_all)]
    pub async fn record_reseal(
        &self,
        key: &KeyId,
        values: u64,
        done: bool,
    ) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        sqlx::query!(
            "/* store::admin::record_reseal */
             select token_broker_change('keys', 'reseal', 0, $1,
                 jsonb_build_object('values', $2::text, 'step', $3::text))",
            key.as_str(),
            values.to_string(),
            if done { "done" } else { "begun" },
        )
        .execute(&mut *transaction)
        .await?;
        Ok(transaction.commit().await?)
    }

    /// Seals up to a hundred rows of `table` after the account `after` again with the primary key of `keyring`, in one
    /// transaction. Each value stays bound to its row. Rows that another transaction has locked are skipped; what
    /// waits for the locks of this one sees the new values and replaces them.
    ///
    /// # Errors
    /// [`StoreError::MissingPrivilege`] unless the login has the rights of the tables' owner, [`StoreError::Locked`] if
    /// somebody has locked the table; nothing was sealed then.
    #[instrument(level = "debug", skip_all)]
    pub async fn reseal(
        &self,
        table: SealedTable,
        keyring: &Keyring,
        after: i64,
    ) -> Result<ResealedBatch, StoreError> {
        let mut transaction = begin(&self.pool).await?;
        let batch = match table {
            SealedTable::Accounts => reseal_accounts(&mut transaction, keyring, after).await?,
            SealedTable::Tokens => reseal_tokens(&mut transaction, keyring, after).await?,
        };
        transaction.commit().await?;
        Ok(batch)
    }
}

async fn reseal_accounts(
    transaction: &mut Transaction<'_, Postgres>,
    keyring: &Keyring,
    after: i64,
) -> Result<ResealedBatch, StoreError> {
    let primary = keyring.primary(KeyKind::Sealing);
    let rows = sqlx::query!(
        "/* store::admin::reseal_accounts */
         select id, credential_version, sealed_secret, previous_version, previous_secret
         from accounts
         where id > $1 and (
             case when octet_length(sealed_secret) > 2
                 then substring(sealed_secret from 3 for get_byte(sealed_secret, 1)) <> $2 else false end
             or case when octet_length(previous_secret) > 2
                 then substring(previous_secret from 3 for get_byte(previous_secret, 1)) <> $2 else false end)
         order by id limit $3 for no key update skip locked",
        after,
        primary.as_str().as_bytes(),
        BATCH,
    )
    .fetch_all(&mut **transaction)
    .await?;
    let mut batch = ResealedBatch { last: rows.last().map(|row| row.id), ..Default::default() };
    let (mut ids, mut sealed, mut previous) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let binding =
            |version| RowBinding::client_secret(AccountId(row.id), CredentialVersion(version));
        let before = batch.resealed;
        let secret = row
            .sealed_secret
            .map(|value| batch.reseal(keyring, binding(row.credential_version), value));
        let earlier = match (row.previous_secret, row.previous_version) {
            (Some(value), Some(version)) => Some(batch.reseal(keyring, binding(version), value)),
            (value, _) => value,
        };
        if batch.resealed > before {
            ids.push(row.id);
            sealed.push(secret);
            previous.push(earlier);
        }
    }
    // The triggers take only a statement that says what it does, and is the owner's.
    sqlx::query!(
        "/* store::admin::reseal_accounts */
         with resealing as materialized (select set_config('token_broker.resealing', 'on', true) as value)
         update accounts a set sealed_secret = n.sealed, previous_secret = n.previous
         from unnest($1::bigint[], $2::bytea[], $3::bytea[]) n (id, sealed, previous), resealing
         where a.id = n.id and resealing.value = 'on'",
        &ids,
        &sealed as &[Option<Vec<u8>>],
        &previous as &[Option<Vec<u8>>],
    )
    .execute(&mut **transaction)
    .await?;
    Ok(batch)
}

async fn reseal_tokens(
    transaction: &mut Transaction<'_, Postgres>,
    keyring: &Keyring,
    after: i64,
) -> Result<ResealedBatch, StoreError> {
    let primary = keyring.primary(KeyKind::Sealing);
    let rows = sqlx::query!(
        "/* store::admin::reseal_tokens */
         select account_id, generation, sealed_token from tokens
         where account_id > $1 and case when octet_length(sealed_token) > 2
             then substring(sealed_token from 3 for get_byte(sealed_token, 1)) <> $2 else false end
         order by account_id limit $3 for no key update skip locked",
        after,
        primary.as_str().as_bytes(),
        BATCH,
    )
    .fetch_all(&mut **transaction)
    .await?;
    let mut batch =
        ResealedBatch { last: rows.last().map(|row| row.account_id), ..Default::default() };
    let (mut ids, mut sealed) = (Vec::new(), Vec::new());
    for row in rows {
        let binding = RowBinding::token(AccountId(row.account_id), Generation(row.generation));
        let before = batch.resealed;
        let again = batch.reseal(keyring, binding, row.sealed_token);
        if batch.resealed > before {
            ids.push(row.account_id);
            sealed.push(again);
        }
    }
    sqlx::query!(
        "/* store::admin::reseal_tokens */
         update tokens t set sealed_token = n.sealed
         from unnest($1::bigint[], $2::bytea[]) n (id, sealed) where t.account_id = n.id",
        &ids,
        &sealed,
    )
    .execute(&mut **transaction)
    .await?;
    Ok(batch)
}
