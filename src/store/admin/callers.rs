//! The statements of the command `caller`: callers, their credentials and their grants.

use sqlx::{Postgres, Transaction};
use tracing::instrument;

use super::connection::{Admin, ensure_affected, violates};
use crate::{
    domain::{
        account::AccountName,
        caller::{AccountPattern, CallerKind, Right},
        clock::Timestamp,
    },
    store::{StoreError, lenient::LenientTime},
};

/// The values of a caller that is to be registered. Names of callers follow the same rule as names of
/// accounts, so they share the type.
#[derive(Clone, Debug)]
pub struct NewCaller<'a> {
    /// The caller's name.
    pub name: &'a AccountName,
    /// The limit in calls per second; `None` means the broker's default.
    pub rate_limit: Option<i32>,
    /// A description for admins; the broker does not interpret it.
    pub description: &'a str,
    /// The SHA-256 of the caller's first bearer.
    pub bearer_sha256: Option<[u8; 32]>,
    /// The SPIFFE IDs and DNS names of the caller's certificates.
    pub identities: &'a [(CallerKind, String)],
}

/// A further bearer for a registered caller.
#[derive(Clone, Copy, Debug)]
pub struct NewBearer<'a> {
    /// The SHA-256 of the bearer.
    pub sha256: [u8; 32],
    /// When the bearer stops being accepted; `None` for never.
    pub ends_at: Option<Timestamp>,
    /// A description for admins; the broker does not interpret it.
    pub description: &'a str,
}

/// Rights on accounts that a caller is to be granted.
#[derive(Clone, Debug)]
pub struct NewGrant<'a> {
    /// The patterns of the accounts' names. Each becomes a grant of its own.
    pub patterns: &'a [AccountPattern],
    /// What the caller may do with these accounts.
    pub rights: &'a [Right],
    /// When the grants end; `None` for never.
    pub ends_at: Option<Timestamp>,
}

/// A caller, and how many of its credentials and grants are in force.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the columns of `callers`, and counts")]
pub struct CallerSummary {
    pub name: String,
    pub enabled: bool,
    pub rate_limit: Option<i32>,
    pub description: String,
    pub created_at: Timestamp,
    /// How many credentials are in force.
    pub credentials: i64,
    /// How many grants are in force.
    pub grants: i64,
}

/// The details of a caller that may be shown: everything except the hashes of its bearers.
#[derive(Clone, Debug)]
pub struct CallerDetails {
    /// The caller itself.
    pub summary: CallerSummary,
    /// The credentials, including ended and revoked ones.
    pub credentials: Vec<CredentialDetails>,
    /// The grants, including ended ones.
    pub grants: Vec<GrantDetails>,
}

/// A credential by which a caller is or was recognised.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the columns of `caller_credentials`")]
pub struct CredentialDetails {
    pub id: i64,
    pub kind: String,
    pub identity: Option<String>,
    pub description: String,
    pub created_at: Timestamp,
    pub ends_at: Option<Timestamp>,
    pub revoked_at: Option<Timestamp>,
    /// Whether the credential is accepted now.
    pub in_force: bool,
}

/// Rights of a caller on the accounts that match a pattern.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the columns of `grants`")]
pub struct GrantDetails {
    pub pattern: String,
    pub rights: Vec<String>,
    pub ends_at: Option<Timestamp>,
    pub created_at: Timestamp,
    /// Whether the grant has not ended.
    pub in_force: bool,
}

/// A grant together with its caller.
#[derive(Clone, Debug)]
pub struct GrantSummary {
    /// The name of the caller whose grant it is.
    pub caller: String,
    /// The details of the grant.
    pub grant: GrantDetails,
}

/// A bearer together with its caller.
#[derive(Clone, Debug)]
pub struct BearerSummary {
    /// The name of the caller whose bearer it is.
    pub caller: String,
    /// The details of the bearer, without its hash.
    pub credential: CredentialDetails,
}

/// The rows of a list that can be read, and for each of the others the error that names it.
#[derive(Debug)]
pub struct Listed<T> {
    /// The rows that can be read.
    pub rows: Vec<T>,
    /// The errors of the others: [`StoreError::UnreadableRow`].
    pub unreadable: Vec<StoreError>,
}

impl<T> FromIterator<Result<T, StoreError>> for Listed<T> {
    fn from_iter<I: IntoIterator<Item = Result<T, StoreError>>>(rows: I) -> Self {
        let mut listed = Self { rows: Vec::new(), unreadable: Vec::new() };
        for row in rows {
            match row {
                Ok(row) => listed.rows.push(row),
                Err(error) => listed.unreadable.push(error),
            }
        }
        listed
    }
}

/// A row of `caller_credentials`, whose times may be malformed.
struct CredentialRow {
    id: i64,
    kind: String,
    identity: Option<String>,
    description: String,
    created_at: LenientTime,
    ends_at: Option<LenientTime>,
    revoked_at: Option<LenientTime>,
    in_force: bool,
}

impl CredentialRow {
    fn decode(self) -> Result<CredentialDetails, StoreError> {
        let time = |at, problem| known("caller_credentials", self.id, at, problem);
        Ok(CredentialDetails {
            id: self.id,
            kind: self.kind,
            identity: self.identity,
            description: self.description,
            created_at: time(self.created_at, "malformed created_at")?,
            ends_at: self.ends_at.map(|at| time(at, "malformed ends_at")).transpose()?,
            revoked_at: self.revoked_at.map(|at| time(at, "malformed revoked_at")).transpose()?,
            in_force: self.in_force,
        })
    }
}

/// Returns the time `at`, or the error that the row `id` of `table` has `problem` if it is malformed.
fn known(
    table: &'static str,
    id: i64,
    at: LenientTime,
    problem: &'static str,
) -> Result<Timestamp, StoreError> {
    at.or(()).map_err(|()| StoreError::unreadable_row(table, id, problem))
}

impl Admin {
    /// Registers a caller with its first credentials.
    ///
    /// # Errors
    /// Returns [`StoreError::Conflict`] when the name or an identity is taken.
    #[instrument(level = "debug", skip_all, fields(caller = %caller.name))]
    pub async fn add_caller(&self, caller: &NewCaller<'_>) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        let id = sqlx::query_scalar!(
            "/* store::admin::add_caller */
             insert into callers (name, rate_limit, description) values ($1, $2, $3) returning id",
            caller.name.as_str(),
            caller.rate_limit,
            caller.description,
        )
        .fetch_one(&mut *transaction)
        .await
        .map_err(|error| {
            if violates(&error, "callers_name_key") {
                return StoreError::taken(format!("caller {} already exists", caller.name), error);
            }
            error.into()
        })?;
        if let Some(sha256) = caller.bearer_sha256 {
            let bearer = NewBearer { sha256, ends_at: None, description: "" };
            insert_bearer(&mut transaction, id, bearer).await?;
        }
        for (kind, identity) in caller.identities {
            insert_identity(&mut transaction, id, *kind, identity).await?;
        }
        Ok(transaction.commit().await?)
    }

    /// Returns all callers, ordered by name.
    ///
    /// # Errors
    /// Returns the database's error.
    #[instrument(level = "debug", skip_all)]
    pub async fn callers(&self) -> Result<Listed<CallerSummary>, StoreError> {
        Ok(self.summaries(None).await?.into_iter().collect())
    }

    /// Returns the caller `name`, if there is one, or all callers, ordered by name. A row that holds a time that
    /// cannot be read is an error of its own.
    async fn summaries(
        &self,
        name: Option<&AccountName>,
    ) -> Result<Vec<Result<CallerSummary, StoreError>>, StoreError> {
        let rows = sqlx::query!(
            r#"/* store::admin::summaries */
             select id, name, enabled, rate_limit, description,
                 created_at as "created_at: LenientTime",
                 (select count(*) from caller_credentials where caller_id = callers.id
                     and revoked_at is null and (ends_at is null or ends_at > now()))
                     as "credentials!",
                 (select count(*) from grants where caller_id = callers.id
                     and (ends_at is null or ends_at > now())) as "grants!"
             from callers where $1::text is null or name = $1 order by name"#,
            name.map(AccountName::as_str),
        )
        .fetch_all(&self.pool)
        .await?;
        let decoded = rows.into_iter().map(|row| -> Result<_, StoreError> {
            Ok(CallerSummary {
                name: row.name,
                enabled: row.enabled,
                rate_limit: row.rate_limit,
                description: row.description,
                created_at: known("callers", row.id, row.created_at, "malformed created_at")?,
                credentials: row.credentials,
                grants: row.grants,
            })
        });
        Ok(decoded.collect())
    }

    /// Returns the details of one caller.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such caller, and [`StoreError::UnreadableRow`] when a row
    /// of it holds a time that cannot be read.
    #[instrument(level = "debug", skip_all, fields(caller = %name))]
    pub async fn caller(&self, name: &AccountName) -> Result<CallerDetails, StoreError> {
        let summary = self.summaries(Some(name)).await?.pop().ok_or_else(|| not_found(name))??;
        let credentials = sqlx::query_as!(
            CredentialRow,
            r#"/* store::admin::caller */
             select c.id, c.kind, c.identity, c.description,
                 c.created_at as "created_at: LenientTime", c.ends_at as "ends_at: LenientTime",
                 c.revoked_at as "revoked_at: LenientTime",
                 c.revoked_at is null and (c.ends_at is null or c.ends_at > now()) as "in_force!"
             from caller_credentials c join callers on callers.id = c.caller_id
             where callers.name = $1 order by c.id"#,
            name.as_str(),
        )
        .fetch_all(&self.pool)
        .await?;
        let credentials = credentials.into_iter().map(CredentialRow::decode);
        let credentials = credentials.collect::<Result<Vec<_>, StoreError>>()?;
        let grants = self.decoded_grants(Some(name)).await?.into_iter();
        let grants = grants.map(|it| it.map(|it| it.grant)).collect::<Result<_, StoreError>>()?;
        Ok(CallerDetails { summary, credentials, grants })
    }

    /// Returns the grants of all callers, including ended ones, ordered by caller and pattern.
    ///
    /// # Errors
    /// Returns the database's error.
    #[instrument(level = "debug", skip_all)]
    pub async fn grants(&self) -> Result<Listed<GrantSummary>, StoreError> {
        Ok(self.decoded_grants(None).await?.into_iter().collect())
    }

    /// Returns the grants of the caller `name`, or of all callers. A row that holds a time that cannot be read is an
    /// error of its own.
    async fn decoded_grants(
        &self,
        name: Option<&AccountName>,
    ) -> Result<Vec<Result<GrantSummary, StoreError>>, StoreError> {
        let rows = sqlx::query!(
            r#"/* store::admin::decoded_grants */
             select callers.name as caller, g.id, g.pattern, g.rights, g.ends_at as "ends_at: LenientTime",
                 g.created_at as "created_at: LenientTime",
                 (g.ends_at is null or g.ends_at > now()) as "in_force!"
             from grants g join callers on callers.id = g.caller_id
             where $1::text is null or callers.name = $1 order by callers.name, g.pattern"#,
            name.map(AccountName::as_str),
        )
        .fetch_all(&self.pool)
        .await?;
        let decoded = rows.into_iter().map(|row| -> Result<_, StoreError> {
            let time = |at, problem| known("grants", row.id, at, problem);
            let grant = GrantDetails {
                pattern: row.pattern,
                rights: row.rights,
                ends_at: row.ends_at.map(|at| time(at, "malformed ends_at")).transpose()?,
                created_at: time(row.created_at, "malformed created_at")?,
                in_force: row.in_force,
            };
            Ok(GrantSummary { caller: row.caller, grant })
        });
        Ok(decoded.collect())
    }

    /// Grants rights on accounts. An existing grant of the caller with the same pattern is replaced.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such caller.
    #[instrument(level = "debug", skip_all, fields(caller = %name))]
    pub async fn grant(&self, name: &AccountName, grant: &NewGrant<'_>) -> Result<(), StoreError> {
        let rights: Vec<String> = grant.rights.iter().map(|right| right.as_str().into()).collect();
        let mut transaction = self.begin().await?;
        let caller = caller_id(&mut transaction, name).await?;
        for pattern in grant.patterns {
            sqlx::query!(
                "/* store::admin::grant */
                 insert into grants (caller_id, pattern, rights, ends_at) values ($1, $2, $3, $4)
                 on conflict (caller_id, pattern)
                 do update set rights = excluded.rights, ends_at = excluded.ends_at",
                caller,
                pattern.to_string(),
                &rights,
                grant.ends_at,
            )
            .execute(&mut *transaction)
            .await?;
        }
        Ok(transaction.commit().await?)
    }

    /// Removes the caller's grants on exactly these patterns, or none if one of them is missing.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such caller or grant.
    #[instrument(level = "debug", skip_all, fields(caller = %name))]
    pub async fn ungrant(
        &self,
        name: &AccountName,
        patterns: &[AccountPattern],
    ) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        let caller = caller_id(&mut transaction, name).await?;
        for pattern in patterns {
            let done = sqlx::query!(
                "/* store::admin::ungrant */ delete from grants where caller_id = $1 and pattern = $2",
                caller,
                pattern.to_string(),
            )
            .execute(&mut *transaction)
            .await?;
            ensure_affected(done.rows_affected(), || {
                format!("caller {name} has no grant on {pattern}")
            })?;
        }
        Ok(transaction.commit().await?)
    }

    /// Sets the caller's limit in calls per second; `None` means the broker's default.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such caller.
    #[instrument(level = "debug", skip_all, fields(caller = %name))]
    pub async fn limit_caller(
        &self,
        name: &AccountName,
        rate_limit: Option<i32>,
    ) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        let done = sqlx::query!(
            "/* store::admin::limit_caller */ update callers set rate_limit = $2 where name = $1",
            name.as_str(),
            rate_limit,
        )
        .execute(&mut *transaction)
        .await?;
        ensure_affected(done.rows_affected(), || no_caller(name))?;
        Ok(transaction.commit().await?)
    }

    /// Enables or disables a caller. The calls of a disabled one are refused.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such caller.
    #[instrument(level = "debug", skip_all, fields(caller = %name, enabled))]
    pub async fn enable_caller(&self, name: &AccountName, enabled: bool) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        let done = sqlx::query!(
            "/* store::admin::enable_caller */ update callers set enabled = $2 where name = $1",
            name.as_str(),
            enabled,
        )
        .execute(&mut *transaction)
        .await?;
        ensure_affected(done.rows_affected(), || no_caller(name))?;
        Ok(transaction.commit().await?)
    }

    /// Removes a caller together with its credentials and grants.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such caller.
    #[instrument(level = "debug", skip_all, fields(caller = %name))]
    pub async fn remove_caller(&self, name: &AccountName) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        let done = sqlx::query!(
            "/* store::admin::remove_caller */ delete from callers where name = $1",
            name.as_str(),
        )
        .execute(&mut *transaction)
        .await?;
        ensure_affected(done.rows_affected(), || no_caller(name))?;
        Ok(transaction.commit().await?)
    }

    /// Adds a bearer to a caller, and returns the id with which it can be revoked.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such caller.
    #[instrument(level = "debug", skip_all, fields(caller = %name))]
    pub async fn add_bearer(
        &self,
        name: &AccountName,
        bearer: NewBearer<'_>,
    ) -> Result<i64, StoreError> {
        let mut transaction = self.begin().await?;
        let caller = caller_id(&mut transaction, name).await?;
        let id = insert_bearer(&mut transaction, caller, bearer).await?;
        transaction.commit().await?;
        Ok(id)
    }

    /// Returns the bearers of the caller `name`, or of all callers, ordered by caller and id.
    ///
    /// # Errors
    /// Returns the database's error.
    #[instrument(level = "debug", skip_all)]
    pub async fn bearers(
        &self,
        name: Option<&AccountName>,
    ) -> Result<Listed<BearerSummary>, StoreError> {
        let rows = sqlx::query!(
            r#"/* store::admin::bearers */
             select callers.name as caller, c.id, c.kind, c.identity, c.description,
                 c.created_at as "created_at: LenientTime", c.ends_at as "ends_at: LenientTime",
                 c.revoked_at as "revoked_at: LenientTime",
                 c.revoked_at is null and (c.ends_at is null or c.ends_at > now()) as "in_force!"
             from caller_credentials c join callers on callers.id = c.caller_id
             where c.kind = 'bearer' and ($1::text is null or callers.name = $1)
             order by callers.name, c.id"#,
            name.map(AccountName::as_str),
        )
        .fetch_all(&self.pool)
        .await?;
        let decoded = rows.into_iter().map(|row| -> Result<_, StoreError> {
            let credential = CredentialRow {
                id: row.id,
                kind: row.kind,
                identity: row.identity,
                description: row.description,
                created_at: row.created_at,
                ends_at: row.ends_at,
                revoked_at: row.revoked_at,
                in_force: row.in_force,
            };
            Ok(BearerSummary { caller: row.caller, credential: credential.decode()? })
        });
        Ok(decoded.collect())
    }

    /// Revokes a bearer, and returns the name of its caller.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such bearer, or it is already revoked.
    #[instrument(level = "debug", skip_all, fields(bearer = id))]
    pub async fn revoke_bearer(&self, id: i64) -> Result<String, StoreError> {
        let mut transaction = self.begin().await?;
        let caller = sqlx::query_scalar!(
            "/* store::admin::revoke_bearer */
             update caller_credentials c set revoked_at = now() from callers
             where callers.id = c.caller_id and c.id = $1 and c.kind = 'bearer'
                 and c.revoked_at is null
             returning callers.name",
            id,
        )
        .fetch_optional(&mut *transaction)
        .await?
        .ok_or_else(|| {
            StoreError::NotFound(format!("there is no bearer {id}, or it is revoked already"))
        })?;
        transaction.commit().await?;
        Ok(caller)
    }
}

impl Admin {
    /// Adds names in certificates to a caller, or none of them. Names that were revoked are free again.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such caller, and [`StoreError::Conflict`] when a name belongs to
    /// a caller already.
    #[instrument(level = "debug", skip_all, fields(caller = %name))]
    pub async fn add_identities(
        &self,
        name: &AccountName,
        identities: &[(CallerKind, String)],
    ) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        let caller = caller_id(&mut transaction, name).await?;
        for (kind, identity) in identities {
            sqlx::query!(
                "/* store::admin::add_identities */
                 delete from caller_credentials
                 where kind = $1 and identity = $2 and revoked_at is not null",
                kind.as_str(),
                identity,
            )
            .execute(&mut *transaction)
            .await?;
            insert_identity(&mut transaction, caller, *kind, identity).await?;
        }
        Ok(transaction.commit().await?)
    }

    /// Revokes a name in certificates, and returns the name of its caller, and the revoked one.
    ///
    /// # Errors
    /// Returns [`StoreError::NotFound`] when there is no such name, or it is already revoked.
    #[instrument(level = "debug", skip_all, fields(credential = id))]
    pub async fn revoke_identity(&self, id: i64) -> Result<(String, String), StoreError> {
        let mut transaction = self.begin().await?;
        let revoked = sqlx::query!(
            r#"/* store::admin::revoke_identity */
             update caller_credentials c set revoked_at = now() from callers
             where callers.id = c.caller_id and c.id = $1 and c.kind <> 'bearer'
                 and c.revoked_at is null
             returning callers.name, c.identity as "identity!""#,
            id,
        )
        .fetch_optional(&mut *transaction)
        .await?
        .ok_or_else(|| {
            StoreError::NotFound(format!(
                "there is no name in certificates with the number {id}, or it is revoked already"
            ))
        })?;
        transaction.commit().await?;
        Ok((revoked.name, revoked.identity))
    }
}

async fn caller_id(
    transaction: &mut Transaction<'_, Postgres>,
    name: &AccountName,
) -> Result<i64, StoreError> {
    sqlx::query_scalar!(
        "/* store::admin::caller_id */ select id from callers where name = $1",
        name.as_str()
    )
    .fetch_optional(&mut **transaction)
    .await?
    .ok_or_else(|| not_found(name))
}

async fn insert_bearer(
    transaction: &mut Transaction<'_, Postgres>,
    caller: i64,
    bearer: NewBearer<'_>,
) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        "/* store::admin::insert_bearer */
         insert into caller_credentials (caller_id, kind, bearer_sha256, ends_at, description)
         values ($1, 'bearer', $2, $3, $4) returning id",
        caller,
        bearer.sha256.as_slice(),
        bearer.ends_at,
        bearer.description,
    )
    .fetch_one(&mut **transaction)
    .await?)
}

async fn insert_identity(
    transaction: &mut Transaction<'_, Postgres>,
    caller: i64,
    kind: CallerKind,
    identity: &str,
) -> Result<(), StoreError> {
    sqlx::query!(
        "/* store::admin::insert_identity */
         insert into caller_credentials (caller_id, kind, identity) values ($1, $2, $3)",
        caller,
        kind.as_str(),
        identity,
    )
    .execute(&mut **transaction)
    .await
    .map_err(|error| {
        if violates(&error, "caller_credentials_kind_identity_key") {
            return StoreError::taken(format!("{identity} already belongs to a caller"), error);
        }
        error.into()
    })?;
    Ok(())
}

fn no_caller(name: &AccountName) -> String {
    format!("there is no caller {name}")
}

fn not_found(name: &AccountName) -> StoreError {
    StoreError::NotFound(no_caller(name))
}
