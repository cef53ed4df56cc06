-- version: 7 (raise it with each change of this file)
--
-- What protects the rows themselves: which intake key is published, what the broker's own login may not do, and
-- whether rows are still as their last recorded change left them.

-- Names are resolved in pg_catalog alone, both now and when a function runs. Our own objects are named with
-- their schema, for which `@schema@` stands. So nobody can put another object in the place of the one that is
-- meant, even if others may create objects in that schema.
set local search_path = pg_catalog, pg_temp;

-- Admins seal secrets to the key in `intake_keys`. Only the owner of the tables may write it (`keys publish`).
create or replace function @schema@.intake_keys_validate() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    if new.key_id is null or new.key_id !~ '^[a-z0-9]{1,32}$' then
        perform @schema@.token_broker_refuse('intake_keys.key_id must match [a-z0-9]{1,32}', 'key_id');
    end if;
    if octet_length(new.public_key) is distinct from 32 then
        perform @schema@.token_broker_refuse('intake_keys.public_key must have 32 bytes', 'public_key');
    end if;
    return new;
end
$$;

create or replace trigger intake_keys_validate before insert or update on @schema@.intake_keys
    for each row execute function @schema@.intake_keys_validate();

-- Returns the key as `keys public` prints it, and whether secrets are sealed to it.
create or replace function @schema@.intake_keys_state(it @schema@.intake_keys) returns text
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select format('key=%L primary=%L', it.key_id || ':'
        || rtrim(translate(encode(it.public_key, 'base64'), '+/', '-_'), '='), it.is_primary)
$$;

create or replace function @schema@.intake_keys_changed() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
begin
    if tg_op = 'DELETE' then
        perform @schema@.token_broker_change('intake_keys', tg_op, 0, old.key_id, '{}');
    elsif tg_op = 'UPDATE' and new is not distinct from old and @schema@.token_broker_is_recorded(
            'intake_keys', 0, new.key_id, @schema@.intake_keys_state(new)) then
        return null;
    else
        perform @schema@.token_broker_change('intake_keys', tg_op, 0, new.key_id,
            jsonb_build_object('state', @schema@.intake_keys_state(new)));
    end if;
    return null;
end
$$;

revoke execute on function @schema@.intake_keys_changed() from public;

create or replace trigger intake_keys_changed after insert or update or delete on @schema@.intake_keys
    for each row execute function @schema@.intake_keys_changed();
create or replace trigger intake_keys_no_truncate before truncate on @schema@.intake_keys
    for each statement execute function @schema@.token_broker_no_truncate();

-- Whether `value` has the form of a sealed one: a format, the length of the key's id, the id, a nonce, at least one byte,
-- and a tag.
create or replace function @schema@.token_broker_is_sealed(value bytea) returns boolean
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select case when octet_length(value) < 32 then false
        else get_byte(value, 0) = 1 and octet_length(value) >= 31 + get_byte(value, 1) end
$$;

-- Whether the user who runs the statement has the rights of the owner of the table. Superusers have.
create or replace function @schema@.token_broker_is_owner(of_table oid) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp as $$
    select pg_has_role(current_user, relowner, 'USAGE') from pg_class where oid = of_table
$$;

-- The sealed columns are written by the sealing alone: when `client_secret` is emptied, and the transaction says to
-- which version it seals (token_broker_sealing). So a program that saves a whole row as it was read earlier, as owner,
-- does not put an old sealed value back. The broker's login neither replaces a sealed secret nor writes one of its own.
-- `keys reseal`, as the owner, replaces sealed values by others of the same secrets (accounts_resealed).
-- This runs before accounts_validate, and with the rights of the user whose statement it is.
create or replace function @schema@.accounts_guard() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
declare
    as_owner boolean := @schema@.token_broker_is_owner(tg_relid);
    manages boolean := as_owner or has_column_privilege(tg_relid, 'client_id', 'UPDATE');
    version bigint := @schema@.token_broker_sealing();
    emptied boolean;
    sealing boolean;
    refused boolean := false;
begin
    if tg_op = 'INSERT' then
        -- Nested, since Postgres checks the right to read all columns of an expression, even of a part that need not be
        -- evaluated. Only who may write these columns gets to it, and admins may not read them.
        if (new.sealed_secret, new.previous_secret, new.previous_version) is distinct from (null, null, null) then
            -- A row with the same values exists already: an upsert is going to find it.
            if not exists (select from @schema@.accounts it where it.name = new.name
                    and (it.sealed_secret, it.previous_secret, it.previous_version)
                        is not distinct from (new.sealed_secret, new.previous_secret, new.previous_version)) then
                raise exception using errcode = 'insufficient_privilege',
                    message = format('accounts.%s can only be set by sealing accounts.client_secret',
                        case when new.sealed_secret is not null then 'sealed_secret'
                            when new.previous_secret is not null then 'previous_secret'
                            else 'previous_version' end),
                    hint = 'To restore a dump, restore its schema and its data together into an empty database.';
            end if;
        end if;
        return new;
    end if;
    if new.client_secret is not null and new.client_secret is distinct from old.client_secret and not manages then
        raise exception using errcode = 'insufficient_privilege',
            message = 'only a role that manages accounts may set accounts.client_secret';
    end if;

    -- Nested, so that others need not be able to read the columns.
    if as_owner and current_setting('token_broker.resealing', true) = 'on' then
        if @schema@.accounts_resealed(old, new)
           and coalesce(@schema@.token_broker_is_sealed(new.sealed_secret), true)
           and coalesce(@schema@.token_broker_is_sealed(new.previous_secret), true) then
            return new;
        end if;
    end if;

    emptied := new.client_secret is null and old.client_secret is not null;
    -- Brokers of earlier releases say nothing. They can seal the first secret, and leave others to newer ones.
    sealing := emptied and case when version is null then not as_owner and old.sealed_secret is null
        else version = old.credential_version
            or version = old.credential_version + 1 and old.sealed_secret is not null end;
    -- The failure is what admins see in account_status. Other statements do not wait for a lock of `refreshes`.
    if sealing and new.sealed_secret is null then
        refused := exists (select from @schema@.refreshes where account_id = old.id
            and error_class = 'intake' and error_version = coalesce(version, old.credential_version));
    end if;
    if emptied and not manages and not (sealing and new.sealed_secret is not null) and not refused then
        raise exception using errcode = 'insufficient_privilege',
            message = 'accounts.client_secret can only be emptied by sealing it, or with a recorded failure';
    end if;
    if new.sealed_secret is distinct from old.sealed_secret
       and not (case when new.sealed_secret is null then refused
            else sealing and @schema@.token_broker_is_sealed(new.sealed_secret) end) then
        raise exception using errcode = 'insufficient_privilege',
            message = 'accounts.sealed_secret can only be set by sealing accounts.client_secret';
    end if;
    if (new.previous_secret, new.previous_version) is distinct from (old.previous_secret, old.previous_version) then
        if new.previous_secret is not null or new.previous_version is not null then
            raise exception using errcode = 'insufficient_privilege',
                message = 'accounts.previous_secret and previous_version can only be emptied';
        end if;
        if not exists (select from @schema@.tokens
                where account_id = old.id and credential_version = old.credential_version)
           and not exists (select from @schema@.refreshes
                where account_id = old.id
                    and old.previous_version in (attempt_version, refused_version)) then
            raise exception using errcode = 'insufficient_privilege',
                message = 'accounts.previous_secret is kept until the secret after it has issued a token';
        end if;
    end if;
    return new;
end
$$;

create or replace trigger accounts_guard before insert or update on @schema@.accounts
    for each row execute function @schema@.accounts_guard();

-- Refuses a statement that names sealed columns, and so saves the whole row, if it would empty a secret that was
-- written after the row was read. To empty `client_secret` alone is allowed.
create or replace function @schema@.accounts_guard_saves() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    if new.client_secret is null and old.client_secret is not null and @schema@.token_broker_sealing() is null
       and @schema@.token_broker_is_owner(tg_relid) then
        raise exception using errcode = 'insufficient_privilege',
            message = 'accounts.client_secret waits to be sealed, and this save of the whole row would lose it';
    end if;
    return new;
end
$$;

create or replace trigger accounts_guard_saves
    before update of sealed_secret, previous_secret, previous_version, credential_version on @schema@.accounts
    for each row execute function @schema@.accounts_guard_saves();

-- A change counts as audited only if its audit record is there. Otherwise it stays as it is, and is recorded.
-- That is also right after the database was restored: the journal may deliver the record of another change that
-- had the same number.
create or replace function @schema@.changes_guard() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    if old.audited_at is null and new.audited_at is not null
       and not exists (select from @schema@.audit_events
            where at = old.at and detail ->> 'change_id' = old.id::text) then
        new.audited_at := null;
    end if;
    if not @schema@.token_broker_is_owner(tg_relid)
       and (old.audited_at is not null and new.audited_at is distinct from old.audited_at
            or old.recorder is not null and new.recorder is distinct from old.recorder) then
        raise exception using errcode = 'insufficient_privilege',
            message = 'changes that were claimed or audited stay so';
    end if;
    return new;
end
$$;

create or replace trigger changes_guard before update on @schema@.changes
    for each row execute function @schema@.changes_guard();
create or replace trigger changes_begin_ids before insert on @schema@.changes
    for each statement execute function @schema@.token_broker_begin_change_ids();
create or replace trigger changes_new_id before insert on @schema@.changes
    for each row execute function @schema@.token_broker_new_id();

-- The owner restores dumps. Rows of a dump that is restored without its schema are refused: see token_broker_new_id.
create or replace function @schema@.refreshes_guard() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    if @schema@.token_broker_is_owner(tg_relid)
       and not exists (select from @schema@.accounts where id = new.account_id) then
        raise exception using errcode = 'check_violation', column = 'account_id',
            message = 'refreshes.account_id must be the number of an account';
    end if;
    return new;
end
$$;

create or replace trigger refreshes_guard before insert on @schema@.refreshes
    for each row execute function @schema@.refreshes_guard();

create or replace function @schema@.audit_chains_guard() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    if new.delivered_seq <> 0 and @schema@.token_broker_is_owner(tg_relid) then
        raise exception using errcode = 'check_violation', column = 'delivered_seq',
            message = 'audit_chains.delivered_seq begins at 0',
            hint = 'To restore a dump, restore its schema and its data together into an empty database.';
    end if;
    return new;
end
$$;

create or replace trigger audit_chains_guard before insert on @schema@.audit_chains
    for each row execute function @schema@.audit_chains_guard();

-- Rows that no trigger sees are gone without a trace after TRUNCATE. The other tables have such triggers in the files
-- of their functions.
create or replace trigger changes_no_truncate before truncate on @schema@.changes
    for each statement execute function @schema@.audit_append_only();
create or replace trigger deployment_no_truncate before truncate on @schema@.deployment
    for each statement execute function @schema@.token_broker_no_truncate();
create or replace trigger instances_no_truncate before truncate on @schema@.instances
    for each statement execute function @schema@.token_broker_no_truncate();
create or replace trigger refreshes_no_truncate before truncate on @schema@.refreshes
    for each statement execute function @schema@.token_broker_no_truncate();
create or replace trigger tokens_no_truncate before truncate on @schema@.tokens
    for each statement execute function @schema@.token_broker_no_truncate();
create or replace trigger upstream_calls_no_truncate before truncate on @schema@.upstream_calls
    for each statement execute function @schema@.token_broker_no_truncate();
create or replace trigger upstream_pace_no_truncate before truncate on @schema@.upstream_pace
    for each statement execute function @schema@.token_broker_no_truncate();
create or replace trigger repeatable_migrations_no_truncate before truncate on @schema@.repeatable_migrations
    for each statement execute function @schema@.token_broker_no_truncate();

-- The broker's login accepts a restored database by raising the epoch by one, so that the epoch never ends, and
-- says with it where the database is now and which upstream it belongs to. A new row is filled in after it was
-- inserted. So this login cannot make the database pass for another one unnoticed.
create or replace function @schema@.deployment_guard() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    if tg_op = 'INSERT' and new.database_oid <> (select oid::bigint from pg_database where datname = current_database())
    then
        raise exception using errcode = 'check_violation', column = 'database_oid',
            message = 'deployment.database_oid is of another database',
            hint = 'To restore a dump, restore its schema and its data together into an empty database.';
    end if;
    if @schema@.token_broker_is_owner(tg_relid) then
        return new;
    end if;
    if tg_op = 'INSERT' then
        if new.epoch between 1 and 1000000000000 is not true then
            raise exception using errcode = 'insufficient_privilege',
                message = 'deployment.epoch must be 1 to 1000000000000';
        end if;
        return new;
    end if;
    if new.id is distinct from old.id or new.created_at is distinct from old.created_at
       or new.epoch in (old.epoch, old.epoch + 1) is not true then
        raise exception using errcode = 'insufficient_privilege',
            message = 'deployment.id and created_at cannot be changed, and epoch only be raised by one';
    end if;
    if new.epoch = old.epoch and (new.upstream is distinct from old.upstream
       or old.system_identifier is not null and new.system_identifier is distinct from old.system_identifier
       or old.database_oid is not null and new.database_oid is distinct from old.database_oid) then
        raise exception using errcode = 'insufficient_privilege',
            message = 'deployment.upstream, system_identifier and database_oid only change when epoch is raised';
    end if;
    return new;
end
$$;

create or replace trigger deployment_guard before insert or update on @schema@.deployment
    for each row execute function @schema@.deployment_guard();

-- The rows that are not as their last recorded change left them. Triggers record each change, so such a row was
-- written by somebody who can disable them: the owner of the tables or a superuser.
create or replace view @schema@.unrecorded_changes as
with recorded as (
    select distinct on (table_name, row_key) table_name, row_key, id, operation, subject,
        case when operation <> 'delete' then what ->> 'state' end as state
    from (
        select *, case when table_name = 'intake_keys' then subject else row_id::text end as row_key
        from @schema@.changes
        where table_name in ('accounts', 'callers', 'caller_credentials', 'grants', 'intake_keys')
    ) numbered
    order by table_name, row_key, id desc
), found as (
    select 'accounts' as table_name, id::text as row_key, name as subject, @schema@.accounts_state(a) as state
        from @schema@.accounts a
    union all select 'callers', id::text, name, @schema@.callers_state(c) from @schema@.callers c
    union all select 'caller_credentials', c.id::text, coalesce(caller.name, '#' || c.caller_id),
        @schema@.caller_credentials_state(c)
        from @schema@.caller_credentials c left join @schema@.callers caller on caller.id = c.caller_id
    union all select 'grants', g.id::text, coalesce(caller.name, '#' || g.caller_id), @schema@.grants_state(g)
        from @schema@.grants g left join @schema@.callers caller on caller.id = g.caller_id
    union all select 'intake_keys', key_id, key_id, @schema@.intake_keys_state(k) from @schema@.intake_keys k
)
select table_name, row_key, coalesce(found.subject, recorded.subject) as subject, recorded.id as change_id,
    recorded.state as recorded, found.state as found
from recorded full join found using (table_name, row_key)
where recorded.state is distinct from found.state;

-- The changes that the audit log does not have, or has otherwise. Records that retention removed are not missed.
create or replace view @schema@.unaudited_changes as
select * from (
    select c.id, c.at, c.table_name, c.operation, c.subject, case
        -- A broker that ran ten minutes later should have recorded it. Without a broker, nobody does.
        when c.audited_at is null and exists (
            select from @schema@.instances i
            where i.heartbeat_at > c.at + interval '10 minutes'
                and i.started_at < i.heartbeat_at - interval '1 minute') then
            'waits for its audit record'
        when c.audited_at is null
            or to_regclass('@schema@.audit_events_' || to_char(c.at at time zone 'UTC', 'YYYYMMDD')) is null then
            null
        when e.detail is null then 'counts as audited, but has no audit record'
        when e.detail ->> 'table' is distinct from c.table_name
            or e.detail ->> 'operation' is distinct from c.operation
            -- An audit record shortens and escapes what is long or unusual.
            or char_length(c.what ->> 'state') <= 256 and c.what ->> 'state' !~ '[\\[:cntrl:]]'
                and c.what ->> 'state' is distinct from e.detail ->> 'state' then
            'differs from its audit record'
        end as problem
    from @schema@.changes c
    left join lateral (
        select detail from @schema@.audit_events
        where at = c.at and detail ->> 'change_id' = c.id::text limit 1
    ) e on true
) each_change
where problem is not null;

-- Records the state of rows whose last change was recorded before changes had a state. A row without any recorded
-- change stays unrecorded.
insert into @schema@.changes (table_name, operation, row_id, subject, what)
select now.table_name, 'baseline', case when now.table_name = 'intake_keys' then 0 else now.row_key::bigint end,
    now.subject, jsonb_build_object('state', now.found)
from @schema@.unrecorded_changes now
left join @schema@.changes last on last.id = now.change_id
where now.found is not null and now.recorded is null and case when now.table_name = 'intake_keys'
    then not exists (select from @schema@.changes where table_name = 'intake_keys')
    else last.operation <> 'delete' end;
