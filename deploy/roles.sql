-- Creates the four roles of the broker's database and grants each one the privileges that its commands need.
-- None of them can log in: grant them to the roles of people and programs.
--
--     psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f deploy/roles.sql
--     create role broker login;  grant token_broker_runtime to broker;  \password broker
--     grant token_broker_accounts to jane;    grant token_broker_auditor to ada;
--
-- Run it after each migration, as the owner of the tables (the role that runs `migrate`). The first time, that
-- role must be allowed to create roles (CREATEROLE), or somebody who is creates the four roles before. The script can
-- be repeated. It revokes privileges that an earlier
-- release's script granted and this one does not grant. It also takes the right to create objects in the schema
-- from everybody but its owner, and fails if it cannot.
--
-- Triggers write into tables that the writing role may not write to (`changes`, `refreshes`): they run with the
-- rights of the tables' owner. No role may TRUNCATE a table, and none may UPDATE or DELETE audit records.

begin;

do $$
declare
    tables_schema name := pg_catalog.current_schema();
    path text := pg_catalog.current_setting('search_path');
    role_name text;
    others text;
begin
    -- Somebody may have created functions in the schema that match the calls below better than Postgres's own.
    perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    foreach role_name in array array['token_broker_runtime', 'token_broker_accounts',
        'token_broker_access', 'token_broker_auditor']
    loop
        -- Who may not create roles can run this again once they exist.
        if not exists (select from pg_roles where rolname = role_name) then
            begin
                execute format('create role %I nologin', role_name);
            exception
                when duplicate_object or unique_violation then
                    null;
                when insufficient_privilege then
                    raise exception using errcode = 'insufficient_privilege',
                        message = format('role %I may not create role %I', current_user, role_name),
                        hint = 'A role that may: create role token_broker_runtime; create role '
                            'token_broker_accounts; create role token_broker_access; create role '
                            'token_broker_auditor; then run this script again as the owner of the tables.';
            end;
        end if;
        execute format('revoke all on all tables in schema %I from %I', tables_schema, role_name);
        execute format('revoke create on schema %I from %I', tables_schema, role_name);
        execute format('grant usage on schema %I to %I', tables_schema, role_name);
    end loop;

    -- Whoever may create objects in the schema could create a function or operator that a statement of the broker
    -- or of an admin takes for one of Postgres. Before Postgres 15 everybody may, and an upgrade keeps that.
    execute format('revoke create on schema %I from public', tables_schema);
    select string_agg(case when c.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(c.grantee)) end, ', ')
        into others
        from pg_namespace n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) c
        where n.nspname = tables_schema and c.privilege_type = 'CREATE' and c.grantee <> n.nspowner
            and c.grantee not in (select oid from pg_roles where rolsuper or rolname = 'pg_database_owner')
            and c.grantee not in (
                select relowner from pg_class where relnamespace = n.oid and relname = 'accounts');
    if others is not null then
        raise exception using errcode = 'insufficient_privilege',
            message = format('others than the owner may create objects in schema %I: %s', tables_schema, others),
            hint = format('As the owner of the schema: revoke create on schema %I from %s', tables_schema, others);
    end if;
    perform set_config('search_path', path, true);
end
$$;

-- runtime: for `serve`, `check`, `keys status`, `keys promote`, `keys retire`, `audit ship` and `audit retire`. It reads accounts, callers and grants,
-- and cannot change who may use what. In `accounts` it writes only the columns of the secret and, for
-- `check --issue`, the request for a new token. It can insert audit records, but not change them.
grant select on _sqlx_migrations, repeatable_migrations, account_status to token_broker_runtime;
grant
    select,
    update (client_secret, sealed_secret, previous_secret, previous_version, reissue_requested_at)
    on accounts to token_broker_runtime;
grant select on callers, caller_credentials, grants to token_broker_runtime;
grant select, insert, update on refreshes to token_broker_runtime;
grant select, insert, update, delete on tokens to token_broker_runtime;
grant select, insert, update on upstream_pace to token_broker_runtime;
grant select, insert, update, delete on upstream_calls to token_broker_runtime;
grant select, insert, update on deployment to token_broker_runtime;
grant select, insert, update on instances to token_broker_runtime;
-- Only the owner of the tables publishes an intake key, to which admins seal secrets: `keys publish`.
grant select on intake_keys, unrecorded_changes, unaudited_changes to token_broker_runtime;
grant select, update (recorder, audited_at) on changes to token_broker_runtime;
grant select, insert, update (delivered_seq, delivered_hash, delivered_at, retired, retired_at)
    on audit_chains to token_broker_runtime;
grant select, insert on audit_events, audit_heads, audit_pruning_receipts to token_broker_runtime;
grant select on audit_retention to token_broker_runtime;
grant execute on function audit_ensure_partition(date), audit_lock_day(date), audit_prune(date, boolean)
    to token_broker_runtime;

-- accounts: for `account …`. It writes secrets and cannot read them, neither plain nor sealed.
grant select on account_status, intake_keys to token_broker_accounts;
grant select (account_id, attempt_ended_at, error_class, error_version)
    on refreshes to token_broker_accounts;
grant select (account_id, credential_version, generation, issued_at, expires_at, repeated_at)
    on tokens to token_broker_accounts;
grant
    select (id, name, provider, client_id, credential_version, previous_version, enabled, description,
        reissue_requested_at, created_at, updated_at),
    insert (name, provider, client_id, client_secret, enabled, description),
    update (name, provider, client_id, client_secret, enabled, description, reissue_requested_at),
    delete
    on accounts to token_broker_accounts;

-- access: for `caller …`. It decides which caller may use which accounts, and cannot read accounts. It writes
-- the hashes of bearers and cannot read them. Triggers let it save bearers, identities and patterns only as they are: it
-- may name them in an update so that the error names the column.
grant
    select,
    insert (name, enabled, rate_limit, description),
    update (name, enabled, rate_limit, description),
    delete
    on callers to token_broker_access;
grant
    select (id, caller_id, kind, identity, description, created_at, ends_at, revoked_at),
    insert (caller_id, kind, bearer_sha256, identity, description, ends_at),
    update (bearer_sha256, identity, description, ends_at, revoked_at),
    delete
    on caller_credentials to token_broker_access;
grant
    select,
    insert (caller_id, pattern, rights, ends_at),
    update (pattern, rights, ends_at),
    delete
    on grants to token_broker_access;

-- auditor: for `audit tail`, `audit verify`, `audit export` and `audit who`. It reads the audit log and the
-- changes, and writes nothing.
grant
    select
    on audit_chains, audit_pruning_receipts, audit_events, audit_heads, audit_retention, changes, instances,
        unrecorded_changes, unaudited_changes
    to token_broker_auditor;

commit;
