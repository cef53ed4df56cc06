//! What the doctor and `keys` ask of the database.

use super::{Admin, StoreError};
use crate::{crypto::IntakePublicKey, domain::clock::Timestamp};

/// How many tokens have to be issued.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Enabled accounts.
    pub accounts: i64,
    /// The mean life of the tokens that are there, in seconds.
    pub mean_life_seconds: Option<f64>,
}

/// The newest token, as far as it may be told.
#[derive(Clone, Debug)]
pub struct LastIssue {
    /// Whose it is.
    pub account: String,
    /// When it was issued.
    pub issued_at: Timestamp,
    /// The address that the upstream saw.
    pub allowed_ip: Option<String>,
}

/// A broker's process.
#[derive(Clone, Debug)]
pub struct InstanceSummary {
    /// Its id.
    pub id: String,
    /// Its release.
    pub version: String,
    /// The keys that it has loaded.
    pub key_ids: Vec<String>,
    /// Whether it was heard of in the last minute and has not stopped.
    pub live: bool,
}

/// A public intake key that brokers published.
#[derive(Clone, Debug)]
pub struct PublishedKey {
    /// Its name.
    pub key_id: String,
    /// Whether new secrets are sealed to it.
    pub is_primary: bool,
}

impl Admin {
    /// The server's version.
    pub async fn server_version(&self) -> Result<String, StoreError> {
        Ok(sqlx::query_scalar!(
            r#"/* store::admin::server_version */ select current_setting('server_version') as "version!""#
        )
        .fetch_one(&self.pool)
        .await?)
    }

    /// Which of `roles` do not exist, and whether this session is a superuser's.
    pub async fn missing_roles(&self, roles: &[String]) -> Result<(Vec<String>, bool), StoreError> {
        let row = sqlx::query!(
            r#"/* store::admin::missing_roles */
             select array(select role from unnest($1::text[]) role
                     where role not in (select rolname from pg_roles)) as "missing!",
                 (select rolsuper from pg_roles where rolname = current_user) as "superuser!""#,
            roles,
        )
        .fetch_one(&self.pool)
        .await?;
        Ok((row.missing, row.superuser))
    }

    /// The upstream that the database belongs to, once a broker has served from it.
    pub async fn upstream(&self) -> Result<Option<String>, StoreError> {
        Ok(sqlx::query_scalar!("/* store::admin::upstream */ select upstream from deployment")
            .fetch_optional(&self.pool)
            .await?)
    }

    /// How much there is to issue.
    pub async fn load(&self) -> Result<Load, StoreError> {
        Ok(sqlx::query_as!(
            Load,
            r#"/* store::admin::load */
             select count(*) as "accounts!",
                 avg(extract(epoch from t.expires_at - t.issued_at))::double precision
                     as mean_life_seconds
             from accounts a left join tokens t on t.account_id = a.id
             where a.enabled"#,
        )
        .fetch_one(&self.pool)
        .await?)
    }

    /// The newest token.
    pub async fn last_issue(&self) -> Result<Option<LastIssue>, StoreError> {
        Ok(sqlx::query_as!(
            LastIssue,
            "/* store::admin::last_issue */
             select a.name as account, t.issued_at, t.allowed_ip
             from tokens t join accounts a on a.id = t.account_id
             order by t.issued_at desc limit 1",
        )
        .fetch_optional(&self.pool)
        .await?)
    }

    /// The brokers' processes that have not said that they stopped.
    pub async fn instances(&self) -> Result<Vec<InstanceSummary>, StoreError> {
        Ok(sqlx::query_as!(
            InstanceSummary,
            r#"/* store::admin::instances */
             select id, version, key_ids,
                 heartbeat_at > now() - interval '1 minute' as "live!"
             from instances where stopped_at is null order by id"#,
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// The intake keys that brokers published.
    pub async fn published_keys(&self) -> Result<Vec<PublishedKey>, StoreError> {
        Ok(sqlx::query_as!(
            PublishedKey,
            "/* store::admin::published_keys */ select key_id, is_primary from intake_keys order by key_id",
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// The key that new secrets are to be sealed to.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] before a broker has published one.
    pub async fn intake_key(&self) -> Result<IntakePublicKey, StoreError> {
        let row = sqlx::query!(
            "/* store::admin::intake_key */
             select key_id, public_key from intake_keys where is_primary
             order by published_at desc limit 1",
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| {
            StoreError::NotFound(
                "the database has no intake key yet: start a broker once, or give \
                 --intake-key as `keys public` prints it"
                    .into(),
            )
        })?;
        IntakePublicKey::new(&row.key_id, &row.public_key)
            .map_err(|error| StoreError::Corrupt(error.to_string()))
    }
}
