-- version: 8 (raise it with each change of this file)
--
-- What happens when a row of `callers`, `caller_credentials` or `grants` is written: its values are checked and
-- the change is recorded.

-- Names are resolved in pg_catalog alone, both now and when a function runs. Our own objects are named with
-- their schema, for which `@schema@` stands. So nobody can put another object in the place of the one that is
-- meant, even if others may create objects in that schema.
set local search_path = pg_catalog, pg_temp;

-- Lengths are limited where a value is written, and not where an older row keeps it: such a row can be revoked.

create or replace function @schema@.callers_validate() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
declare
    odd text;
begin
    if new.name is null or new.name !~ '^[a-z0-9][a-z0-9._-]{0,62}$' then
        perform @schema@.token_broker_refuse('callers.name must match [a-z0-9][a-z0-9._-]{0,62}'
            || @schema@.token_broker_because(new.name), 'name');
    end if;
    if new.enabled is null then
        perform @schema@.token_broker_refuse('callers.enabled must be true or false', 'enabled');
    end if;
    if new.rate_limit is not null and new.rate_limit not between 1 and 1000000 then
        perform @schema@.token_broker_refuse('callers.rate_limit must be 1 to 1000000', 'rate_limit');
    end if;
    new.description := coalesce(new.description, '');
    if char_length(new.description) > 1000
       and (tg_op = 'INSERT' or new.description is distinct from old.description) then
        perform @schema@.token_broker_refuse(
            'callers.description must have at most 1000 characters', 'description');
    end if;
    odd := @schema@.token_broker_odd_character(new.description, false);
    if odd is not null and (tg_op = 'INSERT' or new.description is distinct from old.description) then
        perform @schema@.token_broker_refuse(
            'callers.description must have no invisible characters; ' || odd, 'description');
    end if;
    if @schema@.token_broker_is_time(new.created_at) is not true then
        perform @schema@.token_broker_refuse(
            'callers.created_at must be a time between 1970 and 9999', 'created_at');
    end if;
    if tg_op = 'UPDATE' then
        -- A row that is saved as it is has not been updated, whatever the program that saves it writes here.
        new.updated_at := old.updated_at;
    end if;
    if tg_op = 'INSERT' or new is distinct from old then
        new.updated_at := now();
    end if;
    if tg_op = 'UPDATE' and new.id <> old.id then
        perform @schema@.token_broker_refuse('callers.id cannot be changed', 'id');
    end if;
    -- Audit records name callers. With a new name, the earlier records would seem to be of another caller.
    if tg_op = 'UPDATE' and new.name <> old.name then
        perform @schema@.token_broker_refuse(
            'callers.name cannot be changed, since audit records name it: add a caller of the new name', 'name');
    end if;
    return new;
end
$$;

create or replace trigger callers_validate before insert or update on @schema@.callers
    for each row execute function @schema@.callers_validate();
create or replace trigger callers_begin_ids before insert on @schema@.callers
    for each statement execute function @schema@.token_broker_begin_ids();
create or replace trigger callers_new_id before insert on @schema@.callers
    for each row execute function @schema@.token_broker_new_id();

-- Returns the columns that decide who gets which tokens, as text: see accounts_state.
create or replace function @schema@.callers_state(it @schema@.callers) returns text
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select format('name=%L enabled=%L rate_limit=%L', it.name, it.enabled, it.rate_limit)
$$;

create or replace function @schema@.callers_changed() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    what jsonb := '{}';
begin
    if tg_op = 'INSERT' then
        what := jsonb_strip_nulls(jsonb_build_object('rate_limit', new.rate_limit::text,
            'state', @schema@.callers_state(new)));
    elsif tg_op = 'UPDATE' then
        if new is not distinct from old and @schema@.token_broker_is_recorded(
                'callers', new.id, new.name, @schema@.callers_state(new)) then
            return null;
        end if;
        what := jsonb_build_object('state', @schema@.callers_state(new))
            || @schema@.token_broker_differs('enabled', old.enabled::text, new.enabled::text)
            || @schema@.token_broker_differs('rate_limit', old.rate_limit::text, new.rate_limit::text)
            || @schema@.token_broker_differs('description', old.description, new.description);
    end if;
    if tg_op = 'DELETE' then
        perform @schema@.token_broker_change('callers', tg_op, old.id, old.name, what);
    else
        perform @schema@.token_broker_change('callers', tg_op, new.id, new.name, what);
    end if;
    return null;
end
$$;

revoke execute on function @schema@.callers_changed() from public;

create or replace trigger callers_changed after insert or update or delete on @schema@.callers
    for each row execute function @schema@.callers_changed();
create or replace trigger callers_no_truncate before truncate on @schema@.callers
    for each statement execute function @schema@.token_broker_no_truncate();

create or replace function @schema@.caller_credentials_validate() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
declare
    odd text;
    fixed text;
begin
    -- A program that saves a row as it read it earlier must not put back a bearer, or a name in certificates, that was
    -- replaced meanwhile. So another one is another row.
    if tg_op = 'UPDATE' then
        fixed := case
            when new.id <> old.id then 'id'
            when new.caller_id is distinct from old.caller_id then 'caller_id'
            when new.kind is distinct from old.kind then 'kind'
            when new.bearer_sha256 is distinct from old.bearer_sha256 then 'bearer_sha256'
            when new.identity is distinct from old.identity then 'identity' end;
        if fixed is not null then
            perform @schema@.token_broker_refuse(format(
                'caller_credentials.%s cannot be changed: revoke this credential and add another one', fixed), fixed);
        end if;
    end if;
    new.description := coalesce(new.description, '');
    if char_length(new.description) > 1000
       and (tg_op = 'INSERT' or new.description is distinct from old.description) then
        perform @schema@.token_broker_refuse(
            'caller_credentials.description must have at most 1000 characters', 'description');
    end if;
    odd := @schema@.token_broker_odd_character(new.description, false);
    if odd is not null and (tg_op = 'INSERT' or new.description is distinct from old.description) then
        perform @schema@.token_broker_refuse(
            'caller_credentials.description must have no invisible characters; ' || odd, 'description');
    end if;
    if char_length(new.identity) > 2048
       and (tg_op = 'INSERT' or new.identity is distinct from old.identity) then
        perform @schema@.token_broker_refuse(
            'caller_credentials.identity must have at most 2048 characters', 'identity');
    end if;
    if new.caller_id is null then
        perform @schema@.token_broker_refuse('caller_credentials.caller_id is required', 'caller_id');
    end if;
    if new.kind is null or new.kind not in ('bearer', 'spiffe', 'dns') then
        perform @schema@.token_broker_refuse(
            'caller_credentials.kind must be bearer, spiffe or dns', 'kind');
    end if;
    if new.kind = 'bearer' and octet_length(new.bearer_sha256) is distinct from 32 then
        perform @schema@.token_broker_refuse(
            'caller_credentials.bearer_sha256 must have 32 bytes', 'bearer_sha256');
    end if;
    if new.kind = 'bearer' and new.identity is not null then
        perform @schema@.token_broker_refuse(
            'caller_credentials.identity is for the kinds spiffe and dns', 'identity');
    end if;
    if new.kind <> 'bearer' and new.bearer_sha256 is not null then
        perform @schema@.token_broker_refuse(
            'caller_credentials.bearer_sha256 is for the kind bearer', 'bearer_sha256');
    end if;
    if new.kind = 'spiffe' and (new.identity is null
       or new.identity !~ '^spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)+$') then
        perform @schema@.token_broker_refuse(
            'caller_credentials.identity must be spiffe://trust-domain/path'
                || @schema@.token_broker_because(new.identity), 'identity');
    end if;
    if new.kind = 'dns' and (new.identity is null or char_length(new.identity) > 253
       or new.identity !~ '^[a-z0-9][a-z0-9-]{0,62}(\.[a-z0-9][a-z0-9-]{0,62})*$') then
        perform @schema@.token_broker_refuse(
            'caller_credentials.identity must be a DNS name in lower case'
                || @schema@.token_broker_because(new.identity), 'identity');
    end if;
    if not @schema@.token_broker_is_time(new.ends_at) then
        perform @schema@.token_broker_refuse(
            'caller_credentials.ends_at must be a time between 1970 and 9999', 'ends_at');
    end if;
    if not @schema@.token_broker_is_time(new.revoked_at) then
        perform @schema@.token_broker_refuse(
            'caller_credentials.revoked_at must be a time between 1970 and 9999', 'revoked_at');
    end if;
    if @schema@.token_broker_is_time(new.created_at) is not true then
        perform @schema@.token_broker_refuse(
            'caller_credentials.created_at must be a time between 1970 and 9999', 'created_at');
    end if;
    -- A program that saves a row as it read it earlier must not make a revoked credential valid again.
    if tg_op = 'UPDATE' and old.revoked_at is not null and new.revoked_at is distinct from old.revoked_at then
        perform @schema@.token_broker_refuse('caller_credentials.revoked_at cannot be changed once it is set: '
            'a revoked credential stays so, add another one', 'revoked_at');
    end if;
    return new;
end
$$;

create or replace trigger caller_credentials_validate before insert or update on @schema@.caller_credentials
    for each row execute function @schema@.caller_credentials_validate();
create or replace trigger caller_credentials_begin_ids before insert on @schema@.caller_credentials
    for each statement execute function @schema@.token_broker_begin_ids();
create or replace trigger caller_credentials_new_id before insert on @schema@.caller_credentials
    for each row execute function @schema@.token_broker_new_id();

-- Returns a caller's name, or its number when the caller is gone: a cascading delete removes it before its
-- credentials and grants.
create or replace function @schema@.token_broker_caller_name(caller bigint) returns text
language sql stable
set search_path = pg_catalog, pg_temp as $$
    select coalesce((select name from @schema@.callers where id = caller), '#' || caller)
$$;

-- Returns a time as text that does not depend on the session's settings.
create or replace function @schema@.token_broker_time(at timestamptz) returns text
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select to_char(at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')
$$;

-- Returns the columns that decide who gets which tokens, as text: see accounts_state. The hash of a bearer is
-- hashed again, so that whoever reads changes does not learn it.
create or replace function @schema@.caller_credentials_state(it @schema@.caller_credentials) returns text
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select format('caller=%L kind=%L identity=%L bearer=%L ends_at=%L revoked_at=%L',
        it.caller_id, it.kind, it.identity, left(encode(sha256(it.bearer_sha256), 'hex'), 32),
        @schema@.token_broker_time(it.ends_at), @schema@.token_broker_time(it.revoked_at))
$$;

create or replace function @schema@.caller_credentials_changed() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    it @schema@.caller_credentials := case when tg_op = 'DELETE' then old else new end;
    caller text := @schema@.token_broker_caller_name(it.caller_id);
    what jsonb;
begin
    if tg_op = 'UPDATE' and new is not distinct from old then
        if @schema@.token_broker_is_recorded('caller_credentials', it.id, caller,
                @schema@.caller_credentials_state(it)) then
            return null;
        end if;
    end if;
    what := jsonb_strip_nulls(jsonb_build_object('credential', it.id::text, 'kind', it.kind,
        'identity', it.identity, 'ends_at', it.ends_at::text));
    if tg_op = 'UPDATE' then
        what := what
            || @schema@.token_broker_differs('ends_at', old.ends_at::text, new.ends_at::text)
            || @schema@.token_broker_differs('revoked_at', old.revoked_at::text, new.revoked_at::text);
    end if;
    if tg_op <> 'DELETE' then
        what := what || jsonb_build_object('state', @schema@.caller_credentials_state(it));
    end if;
    perform @schema@.token_broker_change('caller_credentials', tg_op, it.id, caller, what);
    return null;
end
$$;

revoke execute on function @schema@.caller_credentials_changed() from public;

create or replace trigger caller_credentials_changed after insert or update or delete on @schema@.caller_credentials
    for each row execute function @schema@.caller_credentials_changed();
create or replace trigger caller_credentials_no_truncate before truncate on @schema@.caller_credentials
    for each statement execute function @schema@.token_broker_no_truncate();

create or replace function @schema@.grants_validate() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
declare
    fixed text;
begin
    -- As in caller_credentials: a stale save must not move a grant back to other accounts.
    if tg_op = 'UPDATE' then
        fixed := case
            when new.id <> old.id then 'id'
            when new.caller_id is distinct from old.caller_id then 'caller_id'
            when new.pattern is distinct from old.pattern then 'pattern' end;
        if fixed is not null then
            perform @schema@.token_broker_refuse(format(
                'grants.%s cannot be changed: delete this grant and add another one', fixed), fixed);
        end if;
    end if;
    if new.caller_id is null then
        perform @schema@.token_broker_refuse('grants.caller_id is required', 'caller_id');
    end if;
    -- An account's name with at most one `*` in it, or `*` alone.
    if new.pattern is null or char_length(new.pattern) > 63
       or new.pattern !~ '^([a-z0-9][a-z0-9._-]*\*?[a-z0-9._-]*|\*[a-z0-9._-]*)$' then
        perform @schema@.token_broker_refuse(
            'grants.pattern must be an account name in which one * may stand for any characters'
                || @schema@.token_broker_because(new.pattern),
            'pattern');
    end if;
    -- One dimension, numbered from 1: clients need not handle other arrays of Postgres.
    if new.rights is null or cardinality(new.rights) = 0
       or array_ndims(new.rights) <> 1 or array_lower(new.rights, 1) <> 1
       or array_position(new.rights, null) is not null
       or not new.rights <@ array['get', 'report', 'list'] then
        perform @schema@.token_broker_refuse(
            'grants.rights must be some of get, report, list', 'rights');
    end if;
    if (tg_op = 'INSERT' or new.rights is distinct from old.rights) and (cardinality(new.rights) > 3
       or cardinality(new.rights) > (select count(distinct r.r) from unnest(new.rights) r)) then
        perform @schema@.token_broker_refuse(
            'grants.rights must be some of get, report, list, each once', 'rights');
    end if;
    if not @schema@.token_broker_is_time(new.ends_at) then
        perform @schema@.token_broker_refuse(
            'grants.ends_at must be a time between 1970 and 9999', 'ends_at');
    end if;
    if @schema@.token_broker_is_time(new.created_at) is not true then
        perform @schema@.token_broker_refuse(
            'grants.created_at must be a time between 1970 and 9999', 'created_at');
    end if;
    return new;
end
$$;

create or replace trigger grants_validate before insert or update on @schema@.grants
    for each row execute function @schema@.grants_validate();
create or replace trigger grants_begin_ids before insert on @schema@.grants
    for each statement execute function @schema@.token_broker_begin_ids();
create or replace trigger grants_new_id before insert on @schema@.grants
    for each row execute function @schema@.token_broker_new_id();

-- Returns the columns that decide who gets which tokens, as text: see accounts_state.
create or replace function @schema@.grants_state(it @schema@.grants) returns text
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select format('caller=%L pattern=%L rights=%L ends_at=%L', it.caller_id, it.pattern,
        array_to_string(it.rights, ','), @schema@.token_broker_time(it.ends_at))
$$;

create or replace function @schema@.grants_changed() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    it @schema@.grants := case when tg_op = 'DELETE' then old else new end;
    caller text := @schema@.token_broker_caller_name(it.caller_id);
    what jsonb;
begin
    if tg_op = 'UPDATE' and new is not distinct from old then
        if @schema@.token_broker_is_recorded('grants', it.id, caller, @schema@.grants_state(it)) then
            return null;
        end if;
    end if;
    what := jsonb_strip_nulls(jsonb_build_object('grant', it.id::text, 'pattern', it.pattern,
        'rights', array_to_string(it.rights, ','), 'ends_at', it.ends_at::text));
    if tg_op = 'UPDATE' then
        what := what
            || @schema@.token_broker_differs('rights',
                array_to_string(old.rights, ','), array_to_string(new.rights, ','))
            || @schema@.token_broker_differs('ends_at', old.ends_at::text, new.ends_at::text);
    end if;
    if tg_op <> 'DELETE' then
        what := what || jsonb_build_object('state', @schema@.grants_state(it));
    end if;
    perform @schema@.token_broker_change('grants', tg_op, it.id, caller, what);
    return null;
end
$$;

revoke execute on function @schema@.grants_changed() from public;

create or replace trigger grants_changed after insert or update or delete on @schema@.grants
    for each row execute function @schema@.grants_changed();
create or replace trigger grants_no_truncate before truncate on @schema@.grants
    for each statement execute function @schema@.token_broker_no_truncate();
