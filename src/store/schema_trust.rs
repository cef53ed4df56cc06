//! Whether others could put a function or an operator in the place of one that a statement means.
//!
//! Postgres looks names up in the schemas of the session's search path, and prefers the function whose
//! parameters match best, in whichever of them it is. So whoever may create functions in one of these schemas
//! can have them run with the rights of the session. The functions of our triggers do not depend on this: they
//! look names up in `pg_catalog` alone.
//!
//! Relations of others are dangerous too if they have the name of one of ours: a view, or a table with triggers
//! or policies, has code run with the rights of whoever uses it.
//!
//! The owner of a schema can drop what is in it and put something else there, so he is trusted like the owner of
//! the tables, as are roles with the rights of either.

use sqlx::{Connection, PgConnection};

use super::{Database, StoreError};

/// The tables and views that statements name. Partitions of the audit log, which begin with
/// [`PARTITION_PREFIX`], come to them.
const RELATIONS: [&str; 22] = [
    "_sqlx_migrations",
    "account_status",
    "accounts",
    "audit_chains",
    "audit_events",
    "audit_heads",
    "audit_pruning_receipts",
    "audit_retention",
    "caller_credentials",
    "callers",
    "changes",
    "deployment",
    "grants",
    "instances",
    "intake_keys",
    "refreshes",
    "repeatable_migrations",
    "tokens",
    "unaudited_changes",
    "unrecorded_changes",
    "upstream_calls",
    "upstream_pace",
];

const PARTITION_PREFIX: &str = "audit_events_";

impl Database {
    /// Checks that nobody but the owner of the tables can put functions in the place of those that statements
    /// mean.
    ///
    /// # Errors
    /// [`StoreError::UnsafeSchema`] says what has to be changed; otherwise the database's error.
    pub async fn check_schema_trust(&self) -> Result<(), StoreError> {
        let mut connection = self.open().await?;
        let faults = faults(&mut connection).await?;
        connection.close().await?;
        if faults.is_empty() { Ok(()) } else { Err(StoreError::UnsafeSchema(faults)) }
    }
}

/// Whose objects a session may use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Trust {
    /// Those of the owner of the tables, whoever that is.
    OwnerOfTables,
    /// Those of the owner of the tables, whose rights the session must have, as a migration needs. Otherwise
    /// somebody else may have made a table with the name of ours.
    Session,
}

/// Takes the right to create objects in the session's first schema from everybody, which Postgres before 15
/// grants by default and an upgrade keeps. Does nothing if the schema belongs to a role whose rights this
/// session does not have: [`faults`] reports it then.
pub(super) async fn close_schema(connection: &mut PgConnection) -> Result<(), StoreError> {
    sqlx::raw_sql(
        "-- store::schema_trust::close_schema
        do $$
        declare
            first_schema name := pg_catalog.current_schema();
            path text := pg_catalog.current_setting('search_path');
        begin
            perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
            if exists (
                select from pg_namespace, aclexplode(coalesce(nspacl, acldefault('n', nspowner)))
                where nspname = first_schema and grantee = 0 and privilege_type = 'CREATE'
                    and pg_has_role(current_user, nspowner, 'USAGE')
            ) then
                execute format('revoke create on schema %I from public', first_schema);
            end if;
            perform set_config('search_path', path, true);
        end
        $$",
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Returns what is unsafe about the schemas of the session's search path, each with the statement that mends
/// it; nothing if only the tables' owner, roles with that role's rights and superusers can create objects in them,
/// or have done so.
///
/// # Errors
/// Returns the database's error.
pub async fn faults(connection: &mut PgConnection) -> Result<Vec<String>, StoreError> {
    find(connection, Trust::OwnerOfTables).await
}

/// Returns what [`faults`] returns, for the session of a migration: also tables of others that have the names of
/// ours.
///
/// # Errors
/// Returns the database's error.
pub(super) async fn faults_before_migration(
    connection: &mut PgConnection,
) -> Result<Vec<String>, StoreError> {
    find(connection, Trust::Session).await
}

/// Restricts the search path of the transaction to `pg_catalog`, and returns the schemas that it had.
async fn leave_search_path(connection: &mut PgConnection) -> Result<Vec<String>, StoreError> {
    let schemas = sqlx::query_scalar!(
        r#"-- store::schema_trust::leave_search_path
        select pg_catalog.current_schemas(false)::pg_catalog.text[] as "schemas!""#,
    )
    .fetch_one(&mut *connection)
    .await?;
    sqlx::query!(
        "-- store::schema_trust::leave_search_path
        select pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true)",
    )
    .fetch_one(connection)
    .await?;
    Ok(schemas)
}

async fn find(connection: &mut PgConnection, trust: Trust) -> Result<Vec<String>, StoreError> {
    // The transaction is rolled back, which restores the search path.
    let mut transaction = connection.begin().await?;
    let schemas = leave_search_path(&mut transaction).await?;
    let faults = sqlx::query_scalar!(
        r#"-- store::schema_trust::faults
        with path as (
            select n.oid, n.nspname, n.nspowner, n.nspacl, t.relowner as found_owner,
                -- The owner of our tables must be able to create partitions.
                case when has_schema_privilege(t.relowner, n.oid, 'CREATE')
                    and (not $2::boolean or pg_has_role(current_user, t.relowner, 'USAGE'))
                    then t.relowner end as table_owner
            from pg_namespace n
            left join pg_class t on t.relnamespace = n.oid and t.relname = 'accounts' and t.relkind = 'r'
            where n.nspname = any($1::text[])
        ), trusted as (
            -- Where our tables are: the owners of tables and schema, and who has their rights (he can replace our
            -- functions anyway). Elsewhere, and before there are tables, the session's own role, and the
            -- database's owner in a schema that belongs to him.
            select p.oid as schema, r.oid as role
            from path p, pg_roles r
            where r.rolsuper or r.rolname = 'pg_database_owner'
                or case when p.table_owner is not null
                    then pg_has_role(r.oid, p.nspowner, 'USAGE') or pg_has_role(r.oid, p.table_owner, 'USAGE')
                    else r.rolname = current_user or pg_get_userbyid(p.nspowner) = 'pg_database_owner'
                        and pg_has_role(r.oid, p.nspowner, 'USAGE') end
        ), faults as (
            select 0 as nth, case when has_schema_privilege(p.found_owner, p.oid, 'CREATE')
                then format('the tables of schema %I belong to role %I: migrate as that role, or drop them if '
                    'they are not the broker''s', p.nspname, pg_get_userbyid(p.found_owner))
                else format('role %2$I, which owns the tables of schema %1$I, may not create objects there: run '
                    '`grant create on schema %1$I to %2$I`', p.nspname, pg_get_userbyid(p.found_owner))
                end as fault
            from path p
            where p.found_owner is not null and p.table_owner is null
            union all
            select 1, format('schema %I, which role %I owns, is in the search path: set search_path to the '
                'schema of the tables alone, or run `alter schema %1$I owner to %3$I` if the tables shall be '
                'there', p.nspname, pg_get_userbyid(p.nspowner), current_user)
            from path p
            where (p.oid, p.nspowner) not in (select schema, role from trusted)
                and (p.found_owner is null or p.table_owner is not null)
            union all
            select 2, format('%s may create objects in schema %I: run `revoke create on schema %2$I from %3$s` '
                'as its owner',
                case when c.grantee = 0 then 'everybody' else 'role ' || quote_ident(pg_get_userbyid(c.grantee)) end,
                p.nspname, case when c.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(c.grantee)) end)
            from path p, aclexplode(coalesce(p.nspacl, acldefault('n', p.nspowner))) c
            where c.privilege_type = 'CREATE' and (p.oid, c.grantee) not in (select schema, role from trusted)
                and (p.found_owner is null or p.table_owner is not null)
            union all
            select 3, format('function %s belongs to role %I: drop it unless it is known',
                f.oid::regprocedure, pg_get_userbyid(f.proowner))
            from path p join pg_proc f on f.pronamespace = p.oid
            where (p.oid, f.proowner) not in (select schema, role from trusted)
                and (p.found_owner is null or p.table_owner is not null)
            union all
            select 4, format('operator %s belongs to role %I: drop it unless it is known',
                o.oid::regoperator, pg_get_userbyid(o.oprowner))
            from path p join pg_operator o on o.oprnamespace = p.oid
            where (p.oid, o.oprowner) not in (select schema, role from trusted)
                and (p.found_owner is null or p.table_owner is not null)
            union all
            select 5, format('trigger %I on table %s runs a function of role %I: drop it unless it is known',
                g.tgname, g.tgrelid::regclass, pg_get_userbyid(f.proowner))
            from path p join pg_class t on t.relnamespace = p.oid and p.table_owner is not null
                and (t.relname = any($3::text[]) or starts_with(t.relname, $4::text))
            join pg_trigger g on g.tgrelid = t.oid and not g.tgisinternal
            join pg_proc f on f.oid = g.tgfoid and f.pronamespace <> p.oid
            where (p.oid, f.proowner) not in (select schema, role from trusted)
            union all
            select 0, format('%s %s, which belongs to role %I, has a name that the broker uses: use another '
                'schema, or drop it if nobody needs it',
                case t.relkind when 'v' then 'view' when 'm' then 'materialized view'
                    when 'f' then 'foreign table' else 'table' end,
                t.oid::regclass, pg_get_userbyid(t.relowner))
            from path p join pg_class t on t.relnamespace = p.oid and t.relkind in ('r', 'p', 'v', 'm', 'f')
                and (t.relname = any($3::text[]) or starts_with(t.relname, $4::text))
            where p.nspname = ($1::text[])[1] and (p.oid, t.relowner) not in (select schema, role from trusted)
                and (p.found_owner is null or p.table_owner is not null)
        )
        select fault as "fault!" from faults order by nth, fault limit 10"#,
        &schemas,
        trust == Trust::Session,
        &RELATIONS.map(str::to_owned),
        PARTITION_PREFIX,
    )
    .fetch_all(&mut *transaction)
    .await?;
    transaction.rollback().await?;
    Ok(faults)
}
