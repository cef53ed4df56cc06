-- Accounts, and what the broker stores for each of them: the sealed credential, the attempts to issue a
-- token, and the token. The triggers are in repeatable/2_accounts.sql.
--
-- An admin works with plain SQL on `accounts` alone. The secret is written into the intake column
-- `client_secret`. Within a second the broker seals it into `sealed_secret` and empties the intake
-- column, in one transaction.
--
-- Triggers check the values, not CHECK or NOT NULL alone: the error of a failed CHECK shows the whole
-- row, secret included, to the client and in the server's log. A trigger's error says only what the
-- trigger says.

create table accounts (
    id                     bigint generated always as identity primary key,
    name                   text        not null unique,
    provider               text        not null default 'rcs',
    client_id              text        not null,
    -- Intake: plain text, or `sealed:…` as `token-broker account seal` prints it. NULL at rest.
    client_secret          text,
    -- Sealed values are bound to the table, the column name, `id` and the version beside them.
    sealed_secret          bytea,
    -- Counts the credentials that this account has had. Only the trigger changes it.
    credential_version     bigint      not null default 1,
    -- The secret before the last rotation, kept until the new one has issued a token.
    previous_secret        bytea,
    previous_version       bigint,
    enabled                boolean     not null default true,
    -- `account reissue` sets it to now(): a token that was issued before this time is replaced.
    reissue_requested_at   timestamptz,
    description            text        not null default '',
    created_at             timestamptz not null default now(),
    updated_at             timestamptz not null default now(),
    -- Two rows with the same login would each end the other's tokens.
    unique (provider, client_id)
);

create index accounts_intake on accounts (id) where client_secret is not null;

comment on column accounts.client_secret is
    'intake: write the secret here; the broker seals it and empties this column within a second';

-- What is known about the attempts to issue a token for an account. Times are by the database's clock.
create table refreshes (
    account_id             bigint      primary key references accounts on delete cascade,
    -- The replica that holds the lease, and so may issue for this account, and until when it holds it.
    lease_holder           text,
    lease_id               bigint      not null default 0,
    lease_until            timestamptz,
    -- Written before the call to the upstream. An attempt that started and has no end may have issued a
    -- token.
    attempt_started_at     timestamptz,
    attempt_ended_at       timestamptz,
    attempt_version        bigint,
    -- The stored token is possibly revoked: an attempt whose answer was lost may have issued another one.
    possibly_revoked       boolean     not null default false,
    -- How often a changed credential was allowed to skip the minimum issue interval, and since when this is
    -- counted.
    interval_exceptions    integer     not null default 0,
    interval_exceptions_since timestamptz,
    consecutive_failures   integer     not null default 0,
    -- rejected, intake, egress_rejected, rate_limited, unreachable or malformed; NULL after a success.
    error_class            text,
    error_code             text,
    error_message          text,
    -- The credential version that the error is about.
    error_version          bigint,
    next_attempt_at        timestamptz,
    last_requested_at      timestamptz,
    -- The transaction that last changed the row. Replicas compare it with their last snapshot.
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

-- Limits the rate of calls to the upstream for all replicas together: the earliest time of the next call.
create table upstream_pace (
    single                 boolean     primary key default true check (single),
    next_slot              timestamptz not null default now()
);
insert into upstream_pace default values;
