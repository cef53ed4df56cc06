//! The statements of `caller import` and `caller export`.

use std::collections::HashMap;

use sqlx::{Postgres, Transaction};
use tracing::instrument;

use super::{
    account_import::ROWS,
    connection::{Admin, ensure_affected, violates},
};
use crate::{
    domain::{
        caller::{CallerKind, Right},
        clock::Timestamp,
    },
    store::{StoreError, execution::repeat_on_conflict, lenient::LenientTime, mass_changes},
};

/// A caller as a file describes it: without its bearers.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the columns of `callers`")]
pub struct CallerSetup {
    pub name: String,
    pub enabled: bool,
    pub rate_limit: Option<i32>,
    pub description: String,
    /// The names in its certificates, also those that have ended or were revoked.
    pub certificate_names: Vec<CertificateName>,
    /// The grants, also those that have ended.
    pub grants: Vec<GrantSetup>,
}

/// A SPIFFE ID or a DNS name in a caller's certificates.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the columns of `caller_credentials`")]
pub struct CertificateName {
    pub kind: String,
    pub identity: String,
    pub ends_at: Option<Timestamp>,
    pub revoked: bool,
}

/// A grant of a caller.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the columns of `grants`")]
pub struct GrantSetup {
    pub pattern: String,
    pub rights: Vec<String>,
    pub ends_at: Option<Timestamp>,
}

/// A caller to register or to change. What is `None` stays as it is.
#[derive(Clone, Debug, Default)]
pub struct CallerUpdate {
    /// The caller's name.
    pub name: String,
    /// Whether it is to be registered.
    pub new: bool,
    /// Whether the caller is enabled.
    pub enabled: Option<bool>,
    /// The limit in calls per second; `Some(None)` means the broker's default.
    pub rate_limit: Option<Option<i32>>,
    /// A description for people.
    pub description: Option<String>,
    /// The names in certificates to add, or whose end changes.
    pub certificate_names: Vec<(CallerKind, String, Option<Timestamp>)>,
    /// The names in certificates to remove.
    pub removed_names: Vec<(CallerKind, String)>,
    /// The grants to add, or that change.
    pub grants: Vec<(String, Vec<Right>, Option<Timestamp>)>,
    /// The patterns of the grants to remove.
    pub removed_grants: Vec<String>,
}

/// Callers to register, to change and to remove, all of them or none.
#[derive(Clone, Debug, Default)]
pub struct CallersImport {
    /// The callers to register and to change.
    pub callers: Vec<CallerUpdate>,
    /// The names of the callers to remove, with their credentials and grants.
    pub removed: Vec<String>,
}

impl Admin {
    /// Returns all callers, ordered by the bytes of their names, with what else a file describes of them.
    ///
    /// # Errors
    /// Returns [`StoreError::UnreadableRow`] when a row holds a time that cannot be read.
    #[instrument(level = "debug", skip_all)]
    pub async fn caller_setups(&self) -> Result<Vec<CallerSetup>, StoreError> {
        // One snapshot, so that no grant appears without its caller.
        let begin = "begin isolation level repeatable read, read only";
        let mut transaction = self.pool.begin_with(begin).await?;
        let callers = sqlx::query!(
            r#"/* store::admin::caller_setups */
             select id, name, enabled, rate_limit, description from callers order by name collate "C""#,
        )
        .fetch_all(&mut *transaction)
        .await?;
        let names = sqlx::query!(
            r#"/* store::admin::caller_setups */
             select id, caller_id, kind, identity as "identity!", ends_at as "ends_at: LenientTime",
                 revoked_at is not null as "revoked!"
             from caller_credentials where kind <> 'bearer' order by identity collate "C""#,
        )
        .fetch_all(&mut *transaction)
        .await?;
        let grants = sqlx::query!(
            r#"/* store::admin::caller_setups */
             select id, caller_id, pattern, rights, ends_at as "ends_at: LenientTime"
             from grants order by pattern collate "C""#,
        )
        .fetch_all(&mut *transaction)
        .await?;
        transaction.commit().await?;

        let time = |table, id, at: Option<LenientTime>| {
            let unreadable = |()| StoreError::unreadable_row(table, id, "malformed ends_at");
            at.map(|at| at.or(()).map_err(unreadable)).transpose()
        };
        let mut names_of: HashMap<i64, Vec<CertificateName>> = HashMap::new();
        for row in names {
            let ends_at = time("caller_credentials", row.id, row.ends_at)?;
            names_of.entry(row.caller_id).or_default().push(CertificateName {
                kind: row.kind,
                identity: row.identity,
                ends_at,
                revoked: row.revoked,
            });
        }
        let mut grants_of: HashMap<i64, Vec<GrantSetup>> = HashMap::new();
        for row in grants {
            let ends_at = time("grants", row.id, row.ends_at)?;
            grants_of.entry(row.caller_id).or_default().push(GrantSetup {
                pattern: row.pattern,
                rights: row.rights,
                ends_at,
            });
        }
        let setups = callers.into_iter().map(|row| CallerSetup {
            name: row.name,
            enabled: row.enabled,
            rate_limit: row.rate_limit,
            description: row.description,
            certificate_names: names_of.remove(&row.id).unwrap_or_default(),
            grants: grants_of.remove(&row.id).unwrap_or_default(),
        });
        Ok(setups.collect())
    }

    /// Writes the import in one transaction.
    ///
    /// # Errors
    /// Returns [`StoreError::Conflict`] or [`StoreError::NotFound`] when a name was taken or a caller was removed
    /// meanwhile. Nothing was changed then.
    #[instrument(level = "debug", skip_all)]
    pub async fn import_callers(&self, import: &CallersImport) -> Result<(), StoreError> {
        repeat_on_conflict(|| self.try_import_callers(import)).await
    }

    async fn try_import_callers(&self, import: &CallersImport) -> Result<(), StoreError> {
        let mut transaction = self.begin().await?;
        mass_changes::allow(&mut transaction, None).await?;
        // First what is removed: another caller may get its names.
        for names in import.removed.chunks(ROWS) {
            sqlx::query!(
                "/* store::admin::try_import_callers */ delete from callers where name = any($1)",
                names,
            )
            .execute(&mut *transaction)
            .await?;
        }
        for caller in import.callers.iter().filter(|caller| !caller.removed_names.is_empty()) {
            remove_names(&mut transaction, caller).await?;
        }
        for caller in &import.callers {
            write(&mut transaction, caller).await?;
        }
        Ok(transaction.commit().await?)
    }
}

async fn remove_names(
    transaction: &mut Transaction<'_, Postgres>,
    caller: &CallerUpdate,
) -> Result<(), StoreError> {
    for (kind, identity) in &caller.removed_names {
        sqlx::query!(
            "/* store::admin::caller_import */
             delete from caller_credentials c using callers
             where callers.id = c.caller_id and callers.name = $1 and c.kind = $2 and c.identity = $3",
            caller.name,
            kind.as_str(),
            identity,
        )
        .execute(&mut **transaction)
        .await?;
    }
    Ok(())
}

async fn write(
    transaction: &mut Transaction<'_, Postgres>,
    caller: &CallerUpdate,
) -> Result<(), StoreError> {
    let id = if caller.new {
        insert(transaction, caller).await?
    } else {
        update(transaction, caller).await?
    };
    for (kind, identity, ends_at) in &caller.certificate_names {
        let done = sqlx::query!(
            "/* store::admin::caller_import */
             insert into caller_credentials (caller_id, kind, identity, ends_at) values ($1, $2, $3, $4)
             on conflict (kind, identity) do update set ends_at = excluded.ends_at
                 where caller_credentials.caller_id = excluded.caller_id
                     and caller_credentials.revoked_at is null",
            id,
            kind.as_str(),
            identity,
            *ends_at,
        )
        .execute(&mut **transaction)
        .await?;
        ensure_affected(done.rows_affected(), || meanwhile(&caller.name))?;
    }
    for (pattern, rights, ends_at) in &caller.grants {
        let rights: Vec<String> = rights.iter().map(|right| right.as_str().into()).collect();
        sqlx::query!(
            "/* store::admin::caller_import */
             insert into grants (caller_id, pattern, rights, ends_at) values ($1, $2, $3, $4)
             on conflict (caller_id, pattern)
             do update set rights = excluded.rights, ends_at = excluded.ends_at",
            id,
            pattern,
            &rights,
            *ends_at,
        )
        .execute(&mut **transaction)
        .await?;
    }
    if !caller.removed_grants.is_empty() {
        sqlx::query!(
            "/* store::admin::caller_import */ delete from grants where caller_id = $1 and pattern = any($2)",
            id,
            &caller.removed_grants,
        )
        .execute(&mut **transaction)
        .await?;
    }
    Ok(())
}

async fn insert(
    transaction: &mut Transaction<'_, Postgres>,
    caller: &CallerUpdate,
) -> Result<i64, StoreError> {
    sqlx::query_scalar!(
        "/* store::admin::caller_import */
         insert into callers (name, enabled, rate_limit, description) values ($1, $2, $3, $4) returning id",
        caller.name,
        caller.enabled.unwrap_or(true),
        caller.rate_limit.flatten(),
        caller.description.as_deref().unwrap_or_default(),
    )
    .fetch_one(&mut **transaction)
    .await
    .map_err(|error| {
        if violates(&error, "callers_name_key") {
            return StoreError::taken(meanwhile(&caller.name), error);
        }
        error.into()
    })
}

/// Changes the columns that are given, and returns the caller's id.
async fn update(
    transaction: &mut Transaction<'_, Postgres>,
    caller: &CallerUpdate,
) -> Result<i64, StoreError> {
    let id = sqlx::query_scalar!(
        "/* store::admin::caller_import */ select id from callers where name = $1",
        caller.name,
    )
    .fetch_optional(&mut **transaction)
    .await?
    .ok_or_else(|| StoreError::NotFound(meanwhile(&caller.name)))?;
    // An update that changes nothing would be recorded as a change.
    if caller.enabled.is_some() || caller.rate_limit.is_some() || caller.description.is_some() {
        sqlx::query!(
            "/* store::admin::caller_import */
             update callers set enabled = coalesce($2, enabled),
                 rate_limit = case when $3 then $4 else rate_limit end, description = coalesce($5, description)
             where id = $1",
            id,
            caller.enabled,
            caller.rate_limit.is_some(),
            caller.rate_limit.flatten(),
            caller.description.as_deref(),
        )
        .execute(&mut **transaction)
        .await?;
    }
    Ok(id)
}

fn meanwhile(name: &str) -> String {
    format!(
        "caller {name} was changed meanwhile, so nothing was changed: import the file once more"
    )
}
