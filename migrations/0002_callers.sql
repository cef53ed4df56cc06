-- Who may ask for tokens: callers, how they are known, and what they may use.

create table callers (
    id                     bigint generated always as identity primary key,
    name                   text        not null unique,
    enabled                boolean     not null default true,
    -- Calls a second; NULL means the broker's default.
    rate_limit             integer,
    description            text        not null default '',
    created_at             timestamptz not null default now(),
    updated_at             timestamptz not null default now()
);

-- Several for each caller, so that one can be replaced while the other still works.
create table caller_credentials (
    id                     bigint generated always as identity primary key,
    caller_id              bigint      not null references callers on delete cascade,
    -- bearer, spiffe or dns.
    kind                   text        not null,
    -- Of a bearer only its SHA-256.
    bearer_sha256          bytea       unique,
    -- A SPIFFE ID or a DNS name of the client's certificate.
    identity               text,
    description            text        not null default '',
    created_at             timestamptz not null default now(),
    ends_at                timestamptz,
    revoked_at             timestamptz,
    unique (kind, identity)
);

create index caller_credentials_caller on caller_credentials (caller_id);

create table grants (
    id                     bigint generated always as identity primary key,
    caller_id              bigint      not null references callers on delete cascade,
    -- An account's name, or a pattern whose one `*` stands for any run of characters.
    pattern                text        not null,
    rights                 text[]      not null default '{get,report,list}',
    ends_at                timestamptz,
    created_at             timestamptz not null default now(),
    unique (caller_id, pattern)
);

create function callers_validate() returns trigger
language plpgsql as $$
begin
    if new.name is null or new.name !~ '^[a-z0-9][a-z0-9._-]{0,62}$' then
        perform token_broker_refuse('callers.name must match [a-z0-9][a-z0-9._-]{0,62}', 'name');
    end if;
    if new.enabled is null then
        perform token_broker_refuse('callers.enabled must be true or false', 'enabled');
    end if;
    if new.rate_limit is not null and new.rate_limit not between 1 and 1000000 then
        perform token_broker_refuse('callers.rate_limit must be 1 to 1000000', 'rate_limit');
    end if;
    new.description := coalesce(new.description, '');
    if token_broker_is_time(new.created_at) is not true then
        perform token_broker_refuse(
            'callers.created_at must be a time between 1970 and 9999', 'created_at');
    end if;
    new.updated_at := now();
    if tg_op = 'UPDATE' and new.id <> old.id then
        perform token_broker_refuse('callers.id cannot be changed', 'id');
    end if;
    return new;
end
$$;

create trigger callers_validate before insert or update on callers
    for each row execute function callers_validate();

create function caller_credentials_validate() returns trigger
language plpgsql as $$
begin
    new.description := coalesce(new.description, '');
    if new.caller_id is null then
        perform token_broker_refuse('caller_credentials.caller_id is required', 'caller_id');
    end if;
    if new.kind is null or new.kind not in ('bearer', 'spiffe', 'dns') then
        perform token_broker_refuse(
            'caller_credentials.kind must be bearer, spiffe or dns', 'kind');
    end if;
    if new.kind = 'bearer' and octet_length(new.bearer_sha256) is distinct from 32 then
        perform token_broker_refuse(
            'caller_credentials.bearer_sha256 must have 32 bytes', 'bearer_sha256');
    end if;
    if new.kind = 'bearer' and new.identity is not null then
        perform token_broker_refuse(
            'caller_credentials.identity is for the kinds spiffe and dns', 'identity');
    end if;
    if new.kind <> 'bearer' and new.bearer_sha256 is not null then
        perform token_broker_refuse(
            'caller_credentials.bearer_sha256 is for the kind bearer', 'bearer_sha256');
    end if;
    if new.kind = 'spiffe' and (new.identity is null
       or new.identity !~ '^spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)+$') then
        perform token_broker_refuse(
            'caller_credentials.identity must be spiffe://trust-domain/path', 'identity');
    end if;
    if new.kind = 'dns' and (new.identity is null or char_length(new.identity) > 253
       or new.identity !~ '^[a-z0-9][a-z0-9-]{0,62}(\.[a-z0-9][a-z0-9-]{0,62})*$') then
        perform token_broker_refuse(
            'caller_credentials.identity must be a DNS name in lower case', 'identity');
    end if;
    if not token_broker_is_time(new.ends_at) then
        perform token_broker_refuse(
            'caller_credentials.ends_at must be a time between 1970 and 9999', 'ends_at');
    end if;
    if not token_broker_is_time(new.revoked_at) then
        perform token_broker_refuse(
            'caller_credentials.revoked_at must be a time between 1970 and 9999', 'revoked_at');
    end if;
    if token_broker_is_time(new.created_at) is not true then
        perform token_broker_refuse(
            'caller_credentials.created_at must be a time between 1970 and 9999', 'created_at');
    end if;
    if tg_op = 'UPDATE' and (new.id, new.caller_id) is distinct from (old.id, old.caller_id) then
        perform token_broker_refuse(
            'caller_credentials.id and caller_id cannot be changed', 'caller_id');
    end if;
    return new;
end
$$;

create trigger caller_credentials_validate before insert or update on caller_credentials
    for each row execute function caller_credentials_validate();

create function grants_validate() returns trigger
language plpgsql as $$
begin
    if new.caller_id is null then
        perform token_broker_refuse('grants.caller_id is required', 'caller_id');
    end if;
    -- An account's name with at most one `*`, or `*` alone.
    if new.pattern is null or char_length(new.pattern) > 63
       or new.pattern !~ '^([a-z0-9][a-z0-9._-]*\*?[a-z0-9._-]*|\*[a-z0-9._-]*)$' then
        perform token_broker_refuse(
            'grants.pattern must be an account name in which one * may stand for any characters',
            'pattern');
    end if;
    -- A plain list: clients need not know Postgres' other shapes of arrays.
    if new.rights is null or cardinality(new.rights) = 0
       or array_ndims(new.rights) <> 1 or array_lower(new.rights, 1) <> 1
       or array_position(new.rights, null) is not null
       or not new.rights <@ array['get', 'report', 'list'] then
        perform token_broker_refuse(
            'grants.rights must be some of get, report, list', 'rights');
    end if;
    if not token_broker_is_time(new.ends_at) then
        perform token_broker_refuse(
            'grants.ends_at must be a time between 1970 and 9999', 'ends_at');
    end if;
    if token_broker_is_time(new.created_at) is not true then
        perform token_broker_refuse(
            'grants.created_at must be a time between 1970 and 9999', 'created_at');
    end if;
    if tg_op = 'UPDATE' and (new.id, new.caller_id) is distinct from (old.id, old.caller_id) then
        perform token_broker_refuse('grants.id and caller_id cannot be changed', 'caller_id');
    end if;
    return new;
end
$$;

create trigger grants_validate before insert or update on grants
    for each row execute function grants_validate();
