//! The statements by which the commands `check`, `keys` and `account` read facts about the deployment.

use std::fmt;

use tracing::instrument;

use super::connection::Admin;
use crate::{
    crypto::IntakePublicKey,
    domain::clock::Timestamp,
    store::{StoreError, intake_keys},
};

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
    /// The ids of the keys that it may still make values with, or needs for secrets that it holds; `None` if its
    /// release does not say.
    pub used_key_ids: Option<Vec<String>>,
    /// Whether it sent a heartbeat within the last minute.
    pub live: bool,
}

/// A row of accounts, callers, credentials, grants or intake keys that is not as its last recorded change left
/// it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UnrecordedChange {
    /// The table.
    pub table: String,
    /// The row's primary key.
    pub row: String,
    /// The name of the account or caller, or the id of the key.
    pub subject: String,
    /// What the last change recorded; `None` if it was a removal, or if there was no change.
    pub recorded: Option<String>,
    /// What the row holds now; `None` if there is no such row.
    pub found: Option<String>,
}

impl fmt::Display for UnrecordedChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, row, subject, recorded, found } = self;
        write!(
            f,
            "{table} row {row} ({subject}) was changed without a record: recorded is {}, found is {}",
            recorded.as_deref().unwrap_or("no row"),
            found.as_deref().unwrap_or("no row"),
        )
    }
}

/// A change that the audit log does not have, or has otherwise.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UnauditedChange {
    /// The number of the row in `changes`.
    pub id: i64,
    /// When it was made; `None` if that is not a time between 1970 and 9999.
    pub at: Option<Timestamp>,
    /// The table that was changed.
    pub table: String,
    /// What was done.
    pub operation: String,
    /// What was changed.
    pub subject: String,
    /// What is wrong.
    pub problem: String,
}

impl fmt::Display for UnauditedChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, at, table, operation, subject, problem } = self;
        write!(f, "change {id} ({operation} on {table}, {subject}, at ")?;
        match at {
            Some(at) => write!(f, "{at}")?,
            None => f.write_str("an unknown time")?,
        }
        write!(f, ") {problem}")
    }
}

/// Who a session acts as, and what it has of the role that a command needs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Login {
    /// The login of the session.
    pub login: String,
    /// The role as which it acts: the login itself, unless a setting says otherwise.
    pub current: String,
    /// Whether the needed role exists.
    pub role_exists: bool,
    /// Whether the session has the privileges of the needed role.
    pub has_role: bool,
}

impl Admin {
    /// Returns who this session is, with regard to `role`.
    #[instrument(level = "debug", skip_all)]
    pub async fn login(&self, role: &str) -> Result<Login, StoreError> {
        let row = sqlx::query!(
            r#"/* store::admin::login */
             select session_user::text as "login!", current_user::text as "current!",
                 exists (select from pg_roles where rolname = $1) as "role_exists!",
                 coalesce((select pg_has_role(current_user, oid, 'usage') from pg_roles where rolname = $1), false)
                     as "has_role!""#,
            role,
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(Login {
            login: row.login,
            current: row.current,
            role_exists: row.role_exists,
            has_role: row.has_role,
        })
    }

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

    /// Returns whether other logins can take all of the server's connections, so that none is left for this one: there
    /// is a login without a connection limit, and this one may not use reserved connections.
    #[instrument(level = "debug", skip_all)]
    pub async fn can_be_crowded_out(&self) -> Result<bool, StoreError> {
        // The setting and the role for reserved connections exist since Postgres 16.
        Ok(sqlx::query_scalar!(
            r#"/* store::admin::can_be_crowded_out */
             select not (
                 (select rolsuper from pg_roles where rolname = current_user)
                 or coalesce(current_setting('reserved_connections', true)::int, 0) > 0
                     and exists (select from pg_roles where rolname = 'pg_use_reserved_connections'
                         and pg_has_role(current_user, oid, 'usage'))
             ) and exists (select from pg_roles where rolcanlogin and not rolsuper and rolconnlimit = -1
                 and rolname <> current_user) as "crowded!""#
        )
        .fetch_one(&self.pool)
        .await?)
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
                     filter (where t.issued_at >= timestamptz '1970-01-01 00:00Z'
                         and t.expires_at <= timestamptz '9999-12-31 00:00Z'
                         and t.issued_at <= t.expires_at)::double precision
                     as mean_life_seconds
             from accounts a left join tokens t on t.account_id = a.id
             where a.enabled"#,
        )
        .fetch_one(&self.pool)
        .await?)
    }

    /// Returns the last issue whose token is stored; `None` if there is none. A token whose time of issue cannot be
    /// read is passed over: its account is named as unusable.
    #[instrument(level = "debug", skip_all)]
    pub async fn last_issue(&self) -> Result<Option<LastIssue>, StoreError> {
        Ok(sqlx::query_as!(
            LastIssue,
            "/* store::admin::last_issue */
             select a.name as account, t.issued_at, t.allowed_ip
             from tokens t join accounts a on a.id = t.account_id
             where t.issued_at between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
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
             select id, version, array(select key from unnest(key_ids) key where key is not null) as "key_ids!",
                 case when used_key_ids is not null
                     then array(select key from unnest(used_key_ids) key where key is not null) end
                     as "used_key_ids?",
                 heartbeat_at > now() - interval '1 minute'
                     and heartbeat_at <= timestamptz '9999-12-31 00:00Z' as "live!"
             from instances where stopped_at is null order by id"#,
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Publishes `key` as the one to which admins seal client secrets. Returns whether that changed anything.
    ///
    /// # Errors
    /// Returns [`StoreError::MissingPrivilege`] unless the login has the rights of the tables' owner.
    #[instrument(level = "debug", skip_all)]
    pub async fn publish_intake_key(&self, key: &IntakePublicKey) -> Result<bool, StoreError> {
        let mut transaction = self.begin().await?;
        let changed = intake_keys::publish(&mut transaction, key).await?;
        transaction.commit().await?;
        Ok(changed)
    }

    /// Returns the rows that are not as their last recorded change left them, at most `limit`, ordered by table
    /// and row.
    #[instrument(level = "debug", skip_all)]
    pub async fn unrecorded_changes(
        &self,
        limit: i64,
    ) -> Result<Vec<UnrecordedChange>, StoreError> {
        Ok(sqlx::query_as!(
            UnrecordedChange,
            r#"/* store::admin::unrecorded_changes */
             select table_name as "table!", row_key as "row!", subject as "subject!", recorded, found
             from unrecorded_changes order by table_name, row_key limit $1"#,
            limit,
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Returns the changes that the audit log does not have, or has otherwise, at most `limit`, in order.
    #[instrument(level = "debug", skip_all)]
    pub async fn unaudited_changes(&self, limit: i64) -> Result<Vec<UnauditedChange>, StoreError> {
        Ok(sqlx::query_as!(
            UnauditedChange,
            r#"/* store::admin::unaudited_changes */
             select id as "id!",
                 case when at between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                     then at end as at,
                 table_name as "table!", operation as "operation!",
                 subject as "subject!", problem as "problem!"
             from unaudited_changes order by id limit $1"#,
            limit,
        )
        .fetch_all(&self.pool)
        .await?)
    }
}
