//! Sealing what admins write into the intake column of accounts.

use sqlx::{Connection, PgConnection};
use tracing::instrument;

use super::{StoreError, lenient::Lenient};
use crate::domain::{
    account::{AccountId, ClientId, CredentialVersion},
    refresh_state::FailureClass,
    secret::SealedSecret,
};

/// A secret that an admin wrote into the intake column of one account.
pub struct Intake {
    /// The account's id, to which the sealed secret is bound.
    pub id: AccountId,
    /// The account's login, to which a value of `account seal` is bound.
    pub client_id: ClientId,
    /// The account's credential version, to which `sealed` is bound.
    pub version: CredentialVersion,
    /// The account's sealed secret, if it has one.
    pub sealed: Option<SealedSecret>,
    /// The column's text: a plain secret, or `sealed:…` as `account seal` prints it.
    pub value: zeroize::Zeroizing<String>,
}

impl Intake {
    /// Returns the credential version of another secret than the sealed one.
    #[must_use]
    pub fn next_version(&self) -> CredentialVersion {
        next_version(self.version, self.sealed.as_ref())
    }
}

fn next_version(version: CredentialVersion, sealed: Option<&SealedSecret>) -> CredentialVersion {
    if sealed.is_some() { CredentialVersion(version.0 + 1) } else { version }
}

/// A secret that was sealed for the account's row.
pub struct Sealed {
    /// The version that the value is bound to: [`Intake::version`] if the secret is the one that was sealed before,
    /// otherwise [`Intake::next_version`].
    pub version: CredentialVersion,
    /// The sealed value.
    pub value: Vec<u8>,
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
/// transaction. If the sealed value has a new version, a new credential version of the account begins; otherwise
/// nothing is to be tried or issued. Rows that another transaction has locked are skipped, and the accounts `except`.
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
    mut seal: impl FnMut(&Intake) -> Result<Sealed, String>,
) -> Result<SealedBatch, StoreError> {
    let mut transaction = connection.begin().await?;
    let rows = sqlx::query!(
        r#"-- store::intake::seal_intake
        select id, client_id as "client_id: Lenient<String>", credential_version, sealed_secret,
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
        let sealed = row.sealed_secret.map(SealedSecret::from);
        let refused_version = next_version(version, sealed.as_ref());
        let intake = match (row.client_id.or(()), row.client_secret.or(())) {
            (Ok(client_id), Ok(value)) => ClientId::stored(&client_id)
                .map(|client_id| Intake { id, client_id, version, sealed, value: value.into() })
                .map_err(|invalid| invalid.to_string()),
            _ => Err("the login or the secret is not text".to_owned()),
        };
        let sealed = intake.and_then(|intake| seal(&intake));
        match store_sealed(&mut transaction, id, refused_version, sealed).await {
            Ok(()) => {}
            Err(error) if error.may_be_outage() => return Err(error),
            Err(error) => return Ok(SealedBatch::Refused { id: row.id, error }),
        }
    }
    transaction.commit().await?;
    Ok(SealedBatch::Processed(processed))
}

/// Empties the intake column, and stores the sealed secret or the reason why the value was refused, which then is the
/// failure of `refused_version`.
async fn store_sealed(
    connection: &mut PgConnection,
    id: AccountId,
    refused_version: CredentialVersion,
    sealed: Result<Sealed, String>,
) -> Result<(), StoreError> {
    let (version, secret, refusal) = match sealed {
        Ok(sealed) => (sealed.version, Some(sealed.value), None),
        Err(reason) => (refused_version, None, Some(reason)),
    };
    // The failure comes first: without it, the broker's role may not empty the column.
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
        .execute(&mut *connection)
        .await?;
    }
    // The triggers take only a statement for the sealing that says to which version it seals.
    sqlx::query!(
        "-- store::intake::store_sealed
        with sealing as materialized (select set_config('token_broker.sealing', $3::bigint::text, true) as version)
        update accounts set sealed_secret = $2, client_secret = null
        from sealing where id = $1 and sealing.version is not null",
        id.0,
        secret,
        version.0,
    )
    .execute(connection)
    .await?;
    Ok(())
}
