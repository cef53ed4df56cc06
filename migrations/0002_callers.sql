-- Callers, their credentials, and the accounts whose tokens they may get. The triggers are in
-- repeatable/3_callers.sql.

create table callers (
    id                     bigint generated always as identity primary key,
    name                   text        not null unique,
    enabled                boolean     not null default true,
    -- Calls per second; NULL means the broker's default.
    rate_limit             integer,
    description            text        not null default '',
    created_at             timestamptz not null default now(),
    updated_at             timestamptz not null default now()
);

-- A caller can have several, so that one can be replaced while the other still works.
create table caller_credentials (
    id                     bigint generated always as identity primary key,
    caller_id              bigint      not null references callers on delete cascade,
    -- bearer, spiffe or dns.
    kind                   text        not null,
    -- The SHA-256 of a bearer. The bearer itself is not stored.
    bearer_sha256          bytea       unique,
    -- A SPIFFE ID or a DNS name in the client's certificate.
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
    -- An account's name, or a pattern in which one `*` stands for any characters.
    pattern                text        not null,
    rights                 text[]      not null default '{get,report,list}',
    ends_at                timestamptz,
    created_at             timestamptz not null default now(),
    unique (caller_id, pattern)
);
