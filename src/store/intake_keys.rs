//! The published intake key: the public key to which admins seal client secrets.
//!
//! Only the owner of the tables may write the table. The table alone proves nothing, since a superuser can write
//! it too: brokers compare it with their keyring, and the command line with the key that it remembers.

use sqlx::{PgConnection, PgPool};
use tracing::instrument;

use super::StoreError;
use crate::crypto::{IntakeError, IntakePublicKey};

/// A row of the table `intake_keys`, not checked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PublishedKey {
    /// The key's id.
    pub key_id: String,
    /// The key's bytes: 32, if the row is well-formed.
    pub public_key: Vec<u8>,
    /// Whether new secrets are sealed to it.
    pub is_primary: bool,
}

impl TryFrom<&PublishedKey> for IntakePublicKey {
    type Error = IntakeError;

    fn try_from(published: &PublishedKey) -> Result<Self, IntakeError> {
        Self::new(&published.key_id, &published.public_key)
    }
}

/// Returns all rows, ordered by id. Earlier releases also published the keys that are not primary.
///
/// # Errors
/// Returns the database's error.
#[instrument(level = "debug", skip_all)]
pub async fn published(pool: &PgPool) -> Result<Vec<PublishedKey>, StoreError> {
    Ok(sqlx::query_as!(
        PublishedKey,
        "-- store::intake_keys::published
        select key_id, public_key, is_primary from intake_keys order by key_id",
    )
    .fetch_all(pool)
    .await?)
}

/// Returns the key to which new client secrets are to be sealed, according to the table; `None` if none is
/// published.
///
/// # Errors
/// Returns [`StoreError::UnreadableRow`] when the key is malformed, and the database's error.
pub async fn primary(pool: &PgPool) -> Result<Option<IntakePublicKey>, StoreError> {
    let published = published(pool).await?;
    let primary = published.iter().find(|key| key.is_primary);
    primary
        .map(|key| {
            IntakePublicKey::try_from(key).map_err(|_| {
                StoreError::unreadable_row(
                    "intake_keys",
                    &key.key_id,
                    "the public key is malformed",
                )
            })
        })
        .transpose()
}

/// Publishes `key` in the place of all others. Returns whether that changed anything. Run it in a transaction.
///
/// # Errors
/// [`StoreError::MissingPrivilege`] unless the login has the rights of the tables' owner; otherwise the
/// database's error.
#[instrument(level = "debug", skip_all)]
pub async fn publish(
    transaction: &mut PgConnection,
    key: &IntakePublicKey,
) -> Result<bool, StoreError> {
    let removed = sqlx::query!(
        "-- store::intake_keys::publish
        delete from intake_keys where key_id <> $1",
        key.key_id().as_str(),
    )
    .execute(&mut *transaction)
    .await?;
    let written = sqlx::query!(
        "-- store::intake_keys::publish
        insert into intake_keys (key_id, public_key, is_primary) values ($1, $2, true)
        on conflict (key_id) do update
        set public_key = excluded.public_key, is_primary = true, published_at = now()
        where intake_keys.public_key <> excluded.public_key or not intake_keys.is_primary",
        key.key_id().as_str(),
        key.bytes(),
    )
    .execute(&mut *transaction)
    .await?;
    Ok(removed.rows_affected() + written.rows_affected() > 0)
}
