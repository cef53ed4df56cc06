-- The deployment that this database belongs to, its replicas, and the intake keys that they publish.

-- `serve` compares this row with its settings and its state directory. It refuses to start when the database
-- belongs to another upstream or deployment, or is a copy or an older state of the database that it used
-- last: tokens could be issued twice, revoked bearers would be accepted again, and a rotated secret would be
-- the previous one. `serve --accept-restored` accepts such a database.
create table deployment (
    single                 boolean     primary key default true check (single),
    upstream               text        not null,
    created_at             timestamptz not null default now(),
    -- Identifies the deployment. Each replica keeps a copy in its state directory.
    id                     text        not null default gen_random_uuid()::text,
    -- How often a restored database was accepted.
    epoch                  bigint      not null default 1,
    -- The server and the database in which this row was used last. They differ from the present ones in a
    -- restored dump or a copy, but not in a physical replica that was promoted.
    system_identifier      bigint,
    database_oid           bigint
);

-- The public halves of the intake keys, for `account add` and `account seal`.
create table intake_keys (
    key_id                 text        primary key,
    public_key             bytea       not null,
    is_primary             boolean     not null,
    published_at           timestamptz not null default now()
);

-- The replicas, with their heartbeats and the position of their audit journals.
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
