//! Whether others could put a function or an operator in the place of one that a statement means.
//!
//! Postgres looks names up in the schemas of the session's search path, and prefers the function whose
//! parameters match best, in whichever of them it is. So whoever may create functions in one of these schemas
//! can have them run with the rights of the session. The functions of our triggers do not depend on this: they
//! look names up in `pg_catalog` alone.

use sqlx::{Connection, PgConnection};

use super::{Database, StoreError};

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
/// it; nothing if only the tables' owner and superusers can create objects in them.
///
/// # Errors
/// Returns the database's error.
pub async fn faults(connection: &mut PgConnection) -> Result<Vec<String>, StoreError> {
    // The transaction is rolled back, which restores the search path.
    let mut transaction = connection.begin().await?;
    let schemas = sqlx::query_scalar!(
        r#"-- store::schema_trust::faults
        select pg_catalog.current_schemas(false)::pg_catalog.text[] as "schemas!""#,
    )
    .fetch_one(&mut *transaction)
    .await?;
    sqlx::query!(
        "-- store::schema_trust::faults
        select pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true)",
    )
    .fetch_one(&mut *transaction)
    .await?;
    let faults = sqlx::query_scalar!(
        r#"-- store::schema_trust::faults
        with path as (
            select n.oid, n.nspname, n.nspowner, n.nspacl, t.relowner as table_owner
            from pg_namespace n
            left join pg_class t
                on t.relnamespace = n.oid and t.relname = 'accounts' and t.relkind = 'r'
            where n.nspname = any($1)
        ), trusted as (
            -- Where our tables are, their owner and the schema's. Elsewhere, and before there are tables, the
            -- session's own role.
            select p.oid as schema, r.oid as role
            from path p, pg_roles r
            where r.rolsuper or r.rolname = 'pg_database_owner'
                or case when p.table_owner is null then r.rolname = current_user
                    else r.oid in (p.table_owner, p.nspowner) end
        ), faults as (
            select 1 as nth, format('schema %I, which role %I owns, is in the search path: set search_path '
                'to the schema of the tables alone', p.nspname, pg_get_userbyid(p.nspowner)) as fault
            from path p
            where (p.oid, p.nspowner) not in (select schema, role from trusted)
            union all
            select 2, format('%s may create objects in schema %I: run `revoke create on schema %2$I from %3$s` '
                'as its owner',
                case when c.grantee = 0 then 'everybody' else 'role ' || quote_ident(pg_get_userbyid(c.grantee)) end,
                p.nspname, case when c.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(c.grantee)) end)
            from path p, aclexplode(coalesce(p.nspacl, acldefault('n', p.nspowner))) c
            where c.privilege_type = 'CREATE' and (p.oid, c.grantee) not in (select schema, role from trusted)
            union all
            select 3, format('function %s belongs to role %I: drop it unless it is known',
                f.oid::regprocedure, pg_get_userbyid(f.proowner))
            from path p join pg_proc f on f.pronamespace = p.oid
            where (p.oid, f.proowner) not in (select schema, role from trusted)
            union all
            select 4, format('operator %s belongs to role %I: drop it unless it is known',
                o.oid::regoperator, pg_get_userbyid(o.oprowner))
            from path p join pg_operator o on o.oprnamespace = p.oid
            where (p.oid, o.oprowner) not in (select schema, role from trusted)
            union all
            select 5, format('trigger %I on table %s runs a function of role %I: drop it unless it is known',
                g.tgname, g.tgrelid::regclass, pg_get_userbyid(f.proowner))
            from path p join pg_class t on t.relnamespace = p.oid and p.table_owner is not null
            join pg_trigger g on g.tgrelid = t.oid and not g.tgisinternal
            join pg_proc f on f.oid = g.tgfoid and f.pronamespace <> p.oid
            where (p.oid, f.proowner) not in (select schema, role from trusted)
        )
        select fault as "fault!" from faults order by nth, fault limit 10"#,
        &schemas,
    )
    .fetch_all(&mut *transaction)
    .await?;
    transaction.rollback().await?;
    Ok(faults)
}
