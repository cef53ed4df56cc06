//! The statements by which the commands `check`, `keys` and `account` read facts about the deployment.

use tracing::instrument;

use super::connection::Admin;
use crate::{crypto::IntakePublicKey, domain::clock::Timestamp, store::StoreError};

/// The numbers that determine the rate of issues.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// How many accounts are enabled.
    pub accounts: i64,
    /// The mean life of the stored tokens, in seconds; `None` when there is none.
    pub mean_life_seconds: Option<f64>,
}

/// The newest stored token, without the token itself.
#[derive(Clone, Debug)]
pub struct LastIssue {
    /// The name of the account for which it was issued.
    pub account: String,
    /// When it was issued.
    pub issued_at: Timestamp,
    /// The address from which the token may be used, if its claims contain one.
    pub allowed_ip: Option<String>,
}

/// A replica that has not reported that it stopped.
#[derive(Clone, Debug)]
pub struct InstanceSummary {
    /// The id of the instance.
    pub id: String,
    /// The release that it runs.
    pub version: String,
    /// The ids of the keys that it has loaded.
    pub key_ids: Vec<String>,
    /// Whether it sent a heartbeat within the last minute.
    pub live: bool,
}

/// An intake key whose public half the brokers have published.
#[derive(Clone, Debug)]
pub struct PublishedKey {
    /// The key's id.
    pub key_id: String,
    /// Whether new secrets are sealed to it.
    pub is_primary: bool,
}

impl Admin {
    /// Returns the version of the Postgres server.
    #[instrument(level = "debug", skip_all)]
    pub async fn server_version(&self) -> Result<String, StoreError> {
        Ok(sqlx::query_scalar!(
            r#"/* store::admin::server_version */ select current_setting('server_version') as "version!""#
        )
        .fetch_one(&self.pool)
        .await?)
    }

    /// Returns those of `roles` that do not exist, and whether this session is a superuser's.
    #[instrument(level = "debug", skip_all)]
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

    /// Returns the upstream that the database belongs to; `None` before the first start of a broker.
    #[instrument(level = "debug", skip_all)]
    pub async fn upstream(&self) -> Result<Option<String>, StoreError> {
        Ok(sqlx::query_scalar!("/* store::admin::upstream */ select upstream from deployment")
            .fetch_optional(&self.pool)
            .await?)
    }

    /// Returns the numbers that determine the rate of issues.
    #[instrument(level = "debug", skip_all)]
    pub async fn load(&self) -> Result<Load, StoreError> {
        Ok(sqlx::query_as!(
            Load,
            r#"/* store::admin::load */
             select count(*) as "accounts!",
                 avg(extract(epoch from t.expires_at - t.issued_at))
                     filter (where isfinite(t.expires_at) and isfinite(t.issued_at))::double precision
                     as mean_life_seconds
             from accounts a left join tokens t on t.account_id = a.id
             where a.enabled"#,
        )
        .fetch_one(&self.pool)
        .await?)
    }

    /// Returns the last issue whose token is stored; `None` if there is none.
    #[instrument(level = "debug", skip_all)]
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

    /// Returns the replicas that have not reported that they stopped, ordered by id.
    #[instrument(level = "debug", skip_all)]
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

    /// Returns the intake keys that brokers have published, ordered by id.
    #[instrument(level = "debug", skip_all)]
    pub async fn published_keys(&self) -> Result<Vec<PublishedKey>, StoreError> {
        Ok(sqlx::query_as!(
            PublishedKey,
            "/* store::admin::published_keys */ select key_id, is_primary from intake_keys order by key_id",
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Returns the public key to which new client secrets are to be sealed.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] before a broker has published one.
    #[instrument(level = "debug", skip_all)]
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
        IntakePublicKey::new(&row.key_id, &row.public_key).map_err(|_| {
            StoreError::unreadable_row("intake_keys", &row.key_id, "the public key is malformed")
        })
    }
}
