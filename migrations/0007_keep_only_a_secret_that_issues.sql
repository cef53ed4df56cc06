-- A rotation keeps the secret before it only if that one issues. One that never issued, or that the
-- upstream refuses by now, was kept too: until the new one was sealed it was tried once more, and a
-- login that fails too often is locked.
--
-- The function must be said again as a whole; what differs from 0001 is the condition under which
-- `previous_secret` is set, and that it runs with the rights of the tables' owner: who may write
-- accounts need not be able to read tokens and refreshes.

create or replace function accounts_validate() returns trigger
language plpgsql security definer as $$
declare
    new_secret boolean;
    new_login boolean;
begin
    if new.name is null or new.name !~ '^[a-z0-9][a-z0-9._-]{0,62}$' then
        perform token_broker_refuse('accounts.name must match [a-z0-9][a-z0-9._-]{0,62}', 'name');
    end if;
    if new.provider is null or new.provider <> 'rcs' then
        perform token_broker_refuse('accounts.provider must be rcs', 'provider');
    end if;
    if token_broker_is_printable(new.client_id, 20) is not true then
        perform token_broker_refuse(
            'accounts.client_id must have 1 to 20 characters without white space', 'client_id');
    end if;
    if new.enabled is null then
        perform token_broker_refuse('accounts.enabled must be true or false', 'enabled');
    end if;
    new.description := coalesce(new.description, '');
    if char_length(new.description) > 1000 then
        perform token_broker_refuse(
            'accounts.description must have at most 1000 characters', 'description');
    end if;
    if not token_broker_is_time(new.reissue_requested_at) then
        perform token_broker_refuse(
            'accounts.reissue_requested_at must be a time between 1970 and 9999',
            'reissue_requested_at');
    end if;
    -- A moment to come would ask again and again until it has.
    if new.reissue_requested_at > now() then
        new.reissue_requested_at := now();
    end if;
    if token_broker_is_time(new.created_at) is not true then
        perform token_broker_refuse(
            'accounts.created_at must be a time between 1970 and 9999', 'created_at');
    end if;
    if token_broker_is_time(new.updated_at) is not true then
        perform token_broker_refuse(
            'accounts.updated_at must be a time between 1970 and 9999', 'updated_at');
    end if;
    if new.credential_version is null then
        perform token_broker_refuse(
            'accounts.credential_version is not to be set', 'credential_version');
    end if;
    if new.id is null then
        perform token_broker_refuse('accounts.id is not to be set', 'id');
    end if;

    -- One trailing newline is what `echo` and editors leave behind.
    new.client_secret := regexp_replace(new.client_secret, E'\r?\n$', '');
    if new.client_secret like 'sealed:%' then
        if new.client_secret !~ '^sealed:v1:[a-z0-9]{1,32}:[A-Za-z0-9_-]{40,}$'
           or char_length(new.client_secret) > 500 then
            perform token_broker_refuse(
                'accounts.client_secret starts with sealed: but is not what account seal prints',
                'client_secret');
        end if;
    elsif not token_broker_is_printable(new.client_secret, 18) then
        perform token_broker_refuse(
            'accounts.client_secret must have 1 to 18 characters without white space',
            'client_secret');
    end if;

    if tg_op = 'INSERT' then
        if new.client_secret is null and new.sealed_secret is null then
            perform token_broker_refuse('accounts.client_secret is required', 'client_secret');
        end if;
        return new;
    end if;

    if new.id <> old.id then
        perform token_broker_refuse('accounts.id cannot be changed', 'id');
    end if;
    new_secret := new.client_secret is not null
        and new.client_secret is distinct from old.client_secret;
    new_login := new.client_id <> old.client_id or new.provider <> old.provider;
    if new_login and not new_secret then
        perform token_broker_refuse(
            'accounts.client_id can only be changed together with client_secret', 'client_id');
    end if;
    new.credential_version := old.credential_version;
    if new_secret then
        new.credential_version := old.credential_version + 1;
        -- The secret that last issued a token is kept, unless it is refused by now; one never used,
        -- or another login's, is not.
        if new_login or current_setting('token_broker.purge_old', true) = 'on' then
            new.previous_secret := null;
            new.previous_version := null;
        elsif old.previous_secret is null and old.sealed_secret is not null
            and exists (select from tokens
                where account_id = old.id and credential_version = old.credential_version)
            and not exists (select from refreshes
                where account_id = old.id and error_version = old.credential_version
                    and error_class in ('rejected', 'intake'))
        then
            new.previous_secret := old.sealed_secret;
            new.previous_version := old.credential_version;
        end if;
        new.sealed_secret := null;
    end if;
    new.updated_at := now();
    return new;
end
$$;

do $$
begin
    execute format('alter function accounts_validate() set search_path = %I, pg_temp',
        current_schema());
    revoke execute on function accounts_validate() from public;
end
$$;
