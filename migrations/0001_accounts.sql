-- Accounts, and what the broker knows of each one's upstream credential, attempts and token.
--
-- An admin works with plain SQL on `accounts` alone. The secret is written into the intake column
-- `client_secret`; within a second the broker seals it into `sealed_secret` and empties the intake
-- column, in one transaction.
--
-- Values are checked by triggers, never by CHECK or NOT NULL alone: Postgres shows the whole row in
-- the error of a failed CHECK, secret included, to the client and in its log. A trigger's error
-- says only what the trigger says.

create table accounts (
    id                     bigint generated always as identity primary key,
    name                   text        not null unique,
    provider               text        not null default 'rcs',
    client_id              text        not null,
    -- Intake: plain text, or `sealed:…` as `token-broker account seal` prints. NULL at rest.
    client_secret          text,
    -- Sealed values are bound to the table, the column name, `id` and the version beside them.
    sealed_secret          bytea,
    -- Counts the credentials this account has had. Only the trigger changes it.
    credential_version     bigint      not null default 1,
    -- The secret before the last rotation, kept until the new one has issued a token.
    previous_secret        bytea,
    previous_version       bigint,
    enabled                boolean     not null default true,
    -- Set to now() by `account reissue`: a token issued before this moment is to be replaced.
    reissue_requested_at   timestamptz,
    description            text        not null default '',
    created_at             timestamptz not null default now(),
    updated_at             timestamptz not null default now(),
    -- One issuer for each login: two rows would end one another's tokens.
    unique (provider, client_id)
);

create index accounts_intake on accounts (id) where client_secret is not null;

comment on column accounts.client_secret is
    'intake: write the secret here; the broker seals it and empties this column within a second';

create function token_broker_refuse(message text, column_name text) returns void
language plpgsql as $$
begin
    raise exception using errcode = 'check_violation', message = message, column = column_name;
end
$$;

-- Whether `value` has 1 to `longest` characters, none of them white space or control characters:
-- Unicode's, whatever the database's locale. What passes here must be readable to the broker.
create function token_broker_is_printable(value text, longest integer) returns boolean
language sql immutable as $$
    select char_length(value) between 1 and longest
        and value !~ '[\u0001-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]'
$$;

-- Whether `at` is a time that every client can hold: neither infinity nor some distant age is.
create function token_broker_is_time(at timestamptz) returns boolean
language sql immutable as $$
    select at between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
$$;

create function accounts_validate() returns trigger
language plpgsql as $$
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
        -- The secret that last issued a token is kept; one never used, or another login's, is not.
        if new_login or current_setting('token_broker.purge_old', true) = 'on' then
            new.previous_secret := null;
            new.previous_version := null;
        elsif old.previous_secret is null and old.sealed_secret is not null then
            new.previous_secret := old.sealed_secret;
            new.previous_version := old.credential_version;
        end if;
        new.sealed_secret := null;
    end if;
    new.updated_at := now();
    return new;
end
$$;

create trigger accounts_validate before insert or update on accounts
    for each row execute function accounts_validate();

-- What the broker knows of an account's attempts to issue. Times are the database's.
create table refreshes (
    account_id             bigint      primary key references accounts on delete cascade,
    -- The replica that issues for this account just now, and until when it may.
    lease_owner            text,
    lease_id               bigint      not null default 0,
    lease_until            timestamptz,
    -- Stamped before the call. A started attempt without an end may have issued a token.
    attempt_started_at     timestamptz,
    attempt_ended_at       timestamptz,
    attempt_version        bigint,
    -- The stored token may have been ended by an issue whose answer was lost.
    suspect                boolean     not null default false,
    -- How often a changed credential passed the floor between issues, and since when that counts.
    floor_passes           integer     not null default 0,
    floor_passes_since     timestamptz,
    consecutive_failures   integer     not null default 0,
    -- rejected, intake, egress_rejected, rate_limited, unreachable, malformed; NULL after a success.
    error_class            text,
    error_code             text,
    error_message          text,
    error_version          bigint,
    next_attempt_at        timestamptz,
    last_requested_at      timestamptz,
    -- The transaction that last changed the row: replicas follow it by snapshots.
    changed                xid8        not null default pg_current_xact_id()
);

create index refreshes_changed on refreshes (changed);
create index refreshes_leased on refreshes (lease_until) where lease_until is not null;

create table tokens (
    account_id             bigint      primary key references accounts on delete cascade,
    credential_version     bigint      not null,
    generation             bigint      not null,
    sealed_token           bytea       not null,
    issued_at              timestamptz not null,
    expires_at             timestamptz not null,
    allowed_ip             text,
    fingerprint            text        not null,
    changed                xid8        not null default pg_current_xact_id()
);

create index tokens_changed on tokens (changed);

-- The upstream's rate, for all replicas together: the moment of the next call.
create table upstream_pace (
    single                 boolean     primary key default true check (single),
    next_slot              timestamptz not null default now()
);
insert into upstream_pace default values;

-- What this database belongs to. `serve` refuses another upstream.
create table deployment (
    single                 boolean     primary key default true check (single),
    upstream               text        not null,
    created_at             timestamptz not null default now()
);

-- The public halves of the intake keys, for `account add` and `account seal`.
create table intake_keys (
    key_id                 text        primary key,
    public_key             bytea       not null,
    is_primary             boolean     not null,
    published_at           timestamptz not null default now()
);

create table instances (
    id                     text        primary key,
    replica                integer     not null,
    version                text        not null,
    key_ids                text[]      not null,
    started_at             timestamptz not null,
    heartbeat_at           timestamptz not null,
    stopped_at             timestamptz,
    journal_chain          text,
    journal_seq            bigint
);
