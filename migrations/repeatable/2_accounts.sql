-- version: 8 (raise it with each change of this file)
--
-- What happens when a row of `accounts` is written: its values are checked, another secret begins a new
-- credential version, and the change is recorded.
--
-- A secret that is written over a sealed one changes nothing yet: it may be the same one again. The broker compares
-- the two when it seals, and the sealing begins the new credential version. Until then the sealed one is used.

-- Names are resolved in pg_catalog alone, both now and when a function runs. Our own objects are named with
-- their schema, for which `@schema@` stands. So nobody can put another object in the place of the one that is
-- meant, even if others may create objects in that schema.
set local search_path = pg_catalog, pg_temp;

-- Whether a statement of `keys reseal` has written the row: nothing but the sealed values has changed, and each of them
-- is there as before. accounts_guard lets only the owner of the tables do that.
create or replace function @schema@.accounts_resealed(before @schema@.accounts, after @schema@.accounts) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
begin
    if current_setting('token_broker.resealing', true) is distinct from 'on' then
        return false;
    end if;
    return (before.sealed_secret, before.previous_secret) is distinct from (after.sealed_secret, after.previous_secret)
        and (before.sealed_secret is null) = (after.sealed_secret is null)
        and (before.previous_secret is null) = (after.previous_secret is null)
        and to_jsonb(before) - array['sealed_secret', 'previous_secret']
            = to_jsonb(after) - array['sealed_secret', 'previous_secret'];
end
$$;

-- Runs with the rights of the tables' owner: a role that may write accounts need not be able to read tokens and
-- refreshes.
create or replace function @schema@.accounts_validate() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    -- The version to which a value is bound that is being sealed.
    sealing bigint := @schema@.token_broker_sealing();
    purge boolean := coalesce(current_setting('token_broker.purge_old', true) = 'on', false);
    odd text;
    written boolean;
    emptied boolean;
    new_login boolean;
begin
    if new.name is null or new.name !~ '^[a-z0-9][a-z0-9._-]{0,62}$' then
        perform @schema@.token_broker_refuse('accounts.name must match [a-z0-9][a-z0-9._-]{0,62}'
            || @schema@.token_broker_because(new.name), 'name');
    end if;
    if new.provider is null or new.provider <> 'rcs' then
        perform @schema@.token_broker_refuse('accounts.provider must be rcs', 'provider');
    end if;
    if tg_op = 'INSERT' or new.client_id is distinct from old.client_id then
        odd := @schema@.token_broker_odd_character(new.client_id, true);
        if odd is not null then
            perform @schema@.token_broker_refuse(
                'accounts.client_id must have visible ASCII and Hangul only; ' || odd, 'client_id');
        end if;
    end if;
    if @schema@.token_broker_is_printable(new.client_id, 20) is not true then
        perform @schema@.token_broker_refuse(
            'accounts.client_id must have 1 to 20 characters without white space', 'client_id');
    end if;
    if new.enabled is null then
        perform @schema@.token_broker_refuse('accounts.enabled must be true or false', 'enabled');
    end if;
    new.description := coalesce(new.description, '');
    if char_length(new.description) > 1000 then
        perform @schema@.token_broker_refuse(
            'accounts.description must have at most 1000 characters', 'description');
    end if;
    if tg_op = 'INSERT' or new.description is distinct from old.description then
        odd := @schema@.token_broker_odd_character(new.description, false);
        if odd is not null then
            perform @schema@.token_broker_refuse(
                'accounts.description must have no invisible characters; ' || odd, 'description');
        end if;
    end if;
    if not @schema@.token_broker_is_time(new.reissue_requested_at) then
        perform @schema@.token_broker_refuse(
            'accounts.reissue_requested_at must be a time between 1970 and 9999',
            'reissue_requested_at');
    end if;
    -- A time in the future would request a new token after each issue until it has passed.
    if new.reissue_requested_at > now() then
        new.reissue_requested_at := now();
    end if;
    if @schema@.token_broker_is_time(new.created_at) is not true then
        perform @schema@.token_broker_refuse(
            'accounts.created_at must be a time between 1970 and 9999', 'created_at');
    end if;
    if @schema@.token_broker_is_time(new.updated_at) is not true then
        perform @schema@.token_broker_refuse(
            'accounts.updated_at must be a time between 1970 and 9999', 'updated_at');
    end if;
    if new.credential_version is null then
        perform @schema@.token_broker_refuse(
            'accounts.credential_version is not to be set', 'credential_version');
    end if;
    -- Of an upsert, the row that is not inserted passes here with the versions of the one that is there.
    if tg_op = 'INSERT' and new.login_version <= new.credential_version is not true then
        perform @schema@.token_broker_refuse('accounts.login_version is not to be set', 'login_version');
    end if;
    if new.id is null then
        perform @schema@.token_broker_refuse('accounts.id is not to be set', 'id');
    end if;

    -- `echo` and editors add one trailing newline.
    new.client_secret := regexp_replace(new.client_secret, E'\r?\n$', '');
    if new.client_secret like 'sealed:%' then
        if new.client_secret !~ '^sealed:v1:[a-z0-9]{1,32}:[A-Za-z0-9_-]{40,}$'
           or char_length(new.client_secret) > 500 then
            perform @schema@.token_broker_refuse(
                'accounts.client_secret starts with sealed: but is not what account seal prints',
                'client_secret');
        end if;
    elsif (tg_op = 'INSERT' or new.client_secret is distinct from old.client_secret)
        and @schema@.token_broker_odd_character(new.client_secret, true) is not null then
        perform @schema@.token_broker_refuse('accounts.client_secret must have visible ASCII and Hangul only; '
            || @schema@.token_broker_odd_character(new.client_secret, true), 'client_secret');
    elsif not @schema@.token_broker_is_printable(new.client_secret, 18) then
        perform @schema@.token_broker_refuse(
            'accounts.client_secret must have 1 to 18 characters without white space',
            'client_secret');
    end if;

    if tg_op = 'INSERT' then
        -- The row that an upsert would insert passes here too, before Postgres finds that the name exists.
        if new.client_secret is null and new.sealed_secret is null
           and not exists (select from @schema@.accounts where name = new.name) then
            perform @schema@.token_broker_refuse('accounts.client_secret is required', 'client_secret');
        end if;
        return new;
    end if;

    if new.id <> old.id then
        perform @schema@.token_broker_refuse('accounts.id cannot be changed', 'id');
    end if;
    -- Grants name accounts. A new name could bring an account's tokens to callers to whom nobody granted them.
    if new.name <> old.name then
        perform @schema@.token_broker_refuse(
            'accounts.name cannot be changed, since grants name it: add an account of the new name', 'name');
    end if;
    if new.credential_version <> old.credential_version then
        perform @schema@.token_broker_refuse(
            'accounts.credential_version is not to be set', 'credential_version');
    end if;
    if new.login_version is distinct from old.login_version then
        perform @schema@.token_broker_refuse('accounts.login_version is not to be set', 'login_version');
    end if;
    new_login := new.client_id <> old.client_id or new.provider <> old.provider;
    written := new.client_secret is not null and new.client_secret is distinct from old.client_secret;
    emptied := new.client_secret is null and old.client_secret is not null;
    if new_login and not written then
        perform @schema@.token_broker_refuse(
            'accounts.client_id can only be changed together with client_secret', 'client_id');
    end if;
    if written and (new_login or purge) then
        -- The sealed secrets belong to another login, or must not be used any more.
        new.credential_version := old.credential_version + 1;
        new.sealed_secret := null;
        new.previous_secret := null;
        new.previous_version := null;
        if new_login then
            -- The token belongs to the other login too: tokens of earlier versions are not served any more.
            new.login_version := new.credential_version;
        end if;
    elsif written and old.sealed_secret is null then
        -- Nothing is sealed to compare with. What is known of this version is about another secret.
        if exists (select from @schema@.refreshes where account_id = old.id
               and old.credential_version in (attempt_version, error_version))
           or exists (select from @schema@.tokens
               where account_id = old.id and credential_version = old.credential_version) then
            new.credential_version := old.credential_version + 1;
        end if;
    elsif emptied and old.sealed_secret is not null and sealing is distinct from old.credential_version then
        -- What was written is another secret than the sealed one, or was emptied before anybody compared them.
        new.credential_version := old.credential_version + 1;
        if sealing is null then
            new.sealed_secret := null;
        end if;
        -- The secret that last issued a token is kept, unless the upstream refuses it by now. A secret that
        -- never issued one is not kept: the broker would try it once more if the new one cannot be opened, and
        -- the upstream locks a login that fails too often.
        if exists (select from @schema@.tokens
                where account_id = old.id and credential_version = old.credential_version)
            and not exists (select from @schema@.refreshes
                where account_id = old.id and error_version = old.credential_version
                    and error_class in ('rejected', 'intake'))
        then
            new.previous_secret := old.sealed_secret;
            new.previous_version := old.credential_version;
        end if;
    end if;
    -- A row that is saved as it is has not been updated, whatever the program that saves it writes here.
    new.updated_at := old.updated_at;
    if new is distinct from old and not @schema@.accounts_resealed(old, new) then
        new.updated_at := now();
    end if;
    return new;
end
$$;

revoke execute on function @schema@.accounts_validate() from public;

create or replace trigger accounts_validate before insert or update on @schema@.accounts
    for each row execute function @schema@.accounts_validate();
create or replace trigger accounts_begin_ids before insert on @schema@.accounts
    for each statement execute function @schema@.token_broker_begin_ids();
create or replace trigger accounts_new_id before insert on @schema@.accounts
    for each row execute function @schema@.token_broker_new_id();

-- Returns the columns that decide who gets which tokens, as text. Each change records it, so that the row can be
-- compared with its last recorded change.
create or replace function @schema@.accounts_state(it @schema@.accounts) returns text
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select format('name=%L client_id=%L enabled=%L credential_version=%L',
        it.name, it.client_id, it.enabled, it.credential_version)
$$;

create or replace function @schema@.accounts_changed() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    what jsonb := '{}';
begin
    if tg_op = 'INSERT' then
        -- There was no account with this number, so what the tables already have of it is what somebody with the
        -- broker's login made up. Rows of `tokens` follow those of `refreshes`. It is a loop because another
        -- session may commit such a row after the delete.
        loop
            delete from @schema@.upstream_calls where account_id = new.id;
            delete from @schema@.refreshes where account_id = new.id;
            insert into @schema@.refreshes (account_id) values (new.id) on conflict do nothing;
            exit when found;
        end loop;
        what := jsonb_build_object('client_id', new.client_id, 'enabled', new.enabled::text,
            'state', @schema@.accounts_state(new));
        perform @schema@.token_broker_change('accounts', tg_op, new.id, new.name, what);
    elsif tg_op = 'UPDATE' then
        -- The same secret is sealed with another key. `keys reseal` records that once for all accounts.
        if @schema@.accounts_resealed(old, new) then
            return null;
        end if;
        if new is not distinct from old and @schema@.token_broker_is_recorded(
                'accounts', new.id, new.name, @schema@.accounts_state(new)) then
            return null;
        end if;
        what := jsonb_build_object('state', @schema@.accounts_state(new))
            || @schema@.token_broker_differs('client_id', old.client_id, new.client_id)
            || @schema@.token_broker_differs('enabled', old.enabled::text, new.enabled::text)
            || @schema@.token_broker_differs('description', old.description, new.description)
            || @schema@.token_broker_differs('credential_version',
                old.credential_version::text, new.credential_version::text);
        if new.reissue_requested_at is distinct from old.reissue_requested_at then
            what := what || '{"reissue": "requested"}';
        end if;
        if new.client_secret is not null and new.client_secret is distinct from old.client_secret then
            what := what || '{"secret": "written"}';
        elsif old.client_secret is not null and new.client_secret is null then
            what := what || jsonb_build_object('secret', case
                when @schema@.token_broker_sealing() = old.credential_version
                    and new.sealed_secret = old.sealed_secret then 'unchanged'
                when new.sealed_secret is not null then 'sealed'
                when @schema@.token_broker_sealing() is not null then 'refused'
                else 'emptied' end);
        end if;
        if old.previous_secret is not null and new.previous_secret is null then
            what := what || '{"previous_secret": "dropped"}';
        end if;
        perform @schema@.token_broker_change('accounts', tg_op, new.id, new.name, what);
    else
        perform @schema@.token_broker_change('accounts', tg_op, old.id, old.name,
            jsonb_build_object('client_id', old.client_id));
    end if;
    return null;
end
$$;

revoke execute on function @schema@.accounts_changed() from public;

-- Deletes what the broker keeps for a deleted account; the rows of `tokens` follow those of `refreshes`. It runs
-- at the commit: until then the rows are not locked, and a token that is issued meanwhile can be stored.
create or replace function @schema@.accounts_deleted() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
begin
    delete from @schema@.refreshes where account_id = old.id;
    return null;
end
$$;

revoke execute on function @schema@.accounts_deleted() from public;

drop trigger if exists accounts_deleted on @schema@.accounts;
create constraint trigger accounts_deleted after delete on @schema@.accounts
    deferrable initially deferred
    for each row execute function @schema@.accounts_deleted();

create or replace trigger accounts_changed after insert or update or delete on @schema@.accounts
    for each row execute function @schema@.accounts_changed();
create or replace trigger accounts_no_truncate before truncate on @schema@.accounts
    for each statement execute function @schema@.token_broker_no_truncate();

comment on column @schema@.accounts.client_secret is
    'intake: write the secret here; the broker seals it and empties this column within a second. In an upsert, write '
    'the value itself (on conflict (name) do update set client_secret = $3): excluded.client_secret needs the right to '
    'read this column, which admins do not have';
