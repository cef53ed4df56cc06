-- The four roles of the broker's database, each with what its work needs and nothing of another's.
-- None can log in: grant them to those who do.
--
--     psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f deploy/roles.sql
--     create role broker login password '…';  grant token_broker_runtime to broker;
--     grant token_broker_accounts to jane;    grant token_broker_auditor to ada;
--
-- Run it after each migration, as the owner of the tables (the user that migrates); the first time
-- as one that may create roles. It can be repeated, and takes back what an earlier release's script
-- granted and this one's does not.
--
-- Triggers that write into tables their caller may not touch (`changes`, `refreshes`) run as the
-- owner of the schema. No role may TRUNCATE, and none may UPDATE or DELETE audit events.

begin;

do $$
declare
    role_name text;
begin
    foreach role_name in array array['token_broker_runtime', 'token_broker_accounts',
        'token_broker_access', 'token_broker_auditor']
    loop
        begin
            execute format('create role %I nologin', role_name);
        exception when duplicate_object or unique_violation then
            null;
        end;
        execute format('revoke all on all tables in schema public from %I', role_name);
        execute format('grant usage on schema public to %I', role_name);
    end loop;
end
$$;

-- runtime: `serve`, `check`, `keys`, `audit ship` and `audit retire`. It reads accounts and access, and cannot change who may do
-- what; of an account it writes only the secret's columns, and for `check --issue` the wish for a new
-- token. Audit records it appends.
grant select on _sqlx_migrations, account_status to token_broker_runtime;
grant
    select,
    update (client_secret, sealed_secret, previous_secret, previous_version, reissue_requested_at)
    on accounts to token_broker_runtime;
grant select on callers, caller_credentials, grants to token_broker_runtime;
grant select, insert, update on refreshes to token_broker_runtime;
grant select, insert, update, delete on tokens to token_broker_runtime;
grant select, update on upstream_pace to token_broker_runtime;
grant select, insert, update on deployment to token_broker_runtime;
grant select, insert, update, delete on intake_keys, instances to token_broker_runtime;
grant select, update (recorder, audited_at) on changes to token_broker_runtime;
grant select, insert, update on audit_chains to token_broker_runtime;
grant select, insert on audit_events, audit_heads, audit_cuts to token_broker_runtime;
grant select on audit_retention to token_broker_runtime;
grant execute on function audit_ensure_partition(date), audit_hold(date), audit_prune(date, boolean)
    to token_broker_runtime;

-- accounts: `account …`. It writes secrets and can never read one back, sealed or not.
grant select on account_status, intake_keys to token_broker_accounts;
grant select (account_id, attempt_ended_at, error_class, error_version)
    on refreshes to token_broker_accounts;
grant select (account_id, credential_version, generation, issued_at, expires_at)
    on tokens to token_broker_accounts;
grant
    select (id, name, provider, client_id, credential_version, previous_version, enabled, description,
        reissue_requested_at, created_at, updated_at),
    insert (name, provider, client_id, client_secret, enabled, description),
    update (name, provider, client_id, client_secret, enabled, description, reissue_requested_at),
    delete
    on accounts to token_broker_accounts;

-- access: `caller …`. It says who may ask for which account's tokens, and sees no account. What a
-- bearer hashes to can be written and not read.
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

-- auditor: `audit tail`, `verify`, `export` and `who`. It reads what happened and who changed what, and
-- writes nothing.
grant
    select
    on audit_chains, audit_cuts, audit_events, audit_heads, audit_retention, changes, instances
    to token_broker_auditor;

commit;
