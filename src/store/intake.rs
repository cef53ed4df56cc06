//! Sealing what admins write into the intake column of accounts.

use sqlx::{Connection, PgConnection};
use tracing::instrument;

use super::{StoreError, lenient::Lenient};
use crate::domain::{
    account::{AccountId, ClientId, CredentialVersion},
    refresh_state::FailureClass,
};

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

/// What [`seal_intake`] did.
#[derive(Debug)]
pub enum SealedBatch {
    /// So many values were processed: 0 if none is left.
    Processed(usize),
    /// Nothing was processed, since the database refuses to write the row of this account. Repeat the call
    /// without it.
    Refused {
        /// The account's id.
        id: i64,
        /// Why the row cannot be written.
        error: StoreError,
    },
}

/// Seals up to a hundred intake values with `seal` and empties their intake columns, in one
/// transaction. Rows that another transaction has locked are skipped, and the accounts `except`.
///
/// If `seal` refuses a value, the column is emptied too, and the returned reason is stored as the account's
/// failure until an admin writes another secret.
///
/// # Errors
/// When the database cannot be reached, or the accounts cannot be read; then no value was sealed.
#[instrument(level = "debug", skip_all)]
pub async fn seal_intake(
    connection: &mut PgConnection,
    except: &[i64],
    mut seal: impl FnMut(&Intake) -> Result<Vec<u8>, String>,
) -> Result<SealedBatch, StoreError> {
    let mut transaction = connection.begin().await?;
    let rows = sqlx::query!(
        r#"-- store::intake::seal_intake
        select id, client_id as "client_id: Lenient<String>", credential_version,
            client_secret as "client_secret!: Lenient<String>"
        from accounts where client_secret is not null and id <> all($1)
        order by id limit 100 for update skip locked"#,
        except,
    )
    .fetch_all(&mut *transaction)
    .await?;
    let processed = rows.len();
    for row in rows {
        let id = AccountId(row.id);
        let version = CredentialVersion(row.credential_version);
        let intake = match (row.client_id.or(()), row.client_secret.or(())) {
            (Ok(client_id), Ok(value)) => client_id
                .parse()
                .map(|client_id| Intake { id, client_id, version, value: value.into() })
                .map_err(|invalid| invalid.to_string()),
            _ => Err("the login or the secret is not text".to_owned()),
        };
        let sealed = intake.and_then(|intake| seal(&intake));
        match store_sealed(&mut transaction, id, version, sealed).await {
            Ok(()) => {}
            Err(error) if error.may_be_outage() => return Err(error),
            Err(error) => return Ok(SealedBatch::Refused { id: row.id, error }),
        }
    }
    transaction.commit().await?;
    Ok(SealedBatch::Processed(processed))
}

/// Empties the intake column, and stores the sealed secret or the reason why the value was refused.
async fn store_sealed(
    connection: &mut PgConnection,
    id: AccountId,
    version: CredentialVersion,
    sealed: Result<Vec<u8>, String>,
) -> Result<(), StoreError> {
    let (secret, refusal) = match sealed {
        Ok(secret) => (Some(secret), None),
        Err(reason) => (None, Some(reason)),
    };
    sqlx::query!(
        "-- store::intake::store_sealed
        update accounts set sealed_secret = $2, client_secret = null where id = $1",
        id.0,
        secret,
    )
    .execute(&mut *connection)
    .await?;
    if let Some(reason) = refusal {
        sqlx::query!(
            "-- store::intake::store_sealed
            update refreshes set error_class = $2, error_code = null, error_message = $3,
                error_version = $4, consecutive_failures = consecutive_failures + 1,
                next_attempt_at = null, changed = pg_current_xact_id()
            where account_id = $1",
            id.0,
            FailureClass::Intake.as_str(),
            reason,
            version.0,
        )
        .execute(connection)
        .await?;
    }
    Ok(())
}
