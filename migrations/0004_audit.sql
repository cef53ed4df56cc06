-- The audit log, in hash chains. Each start of an instance begins a chain. One writer numbers a chain's
-- records from 1, and each record holds the hash of the one before it. Rows arrive in order and exactly
-- once: they are inserted in the transaction that moves the position (`audit_chains.delivered_seq`). The
-- triggers and functions are in repeatable/4_audit.sql.

create table audit_chains (
    chain                  text        primary key,
    instance               text        not null,
    started_at             timestamptz not null,
    -- The instance's previous chain and the hash of that chain's last record, which is this chain's first
    -- `prev_hash`.
    linked_chain           text,
    linked_hash            bytea       not null,
    delivered_seq          bigint      not null default 0,
    delivered_hash         bytea       not null,
    delivered_at           timestamptz not null default now(),
    -- When and why an admin declared that no more records of this chain will arrive, because the replica's
    -- disk is lost.
    retired_at             timestamptz,
    retired                text
);

create table audit_events (
    instance               text        not null,
    chain                  text        not null,
    seq                    bigint      not null,
    at                     timestamptz not null,
    event                  text        not null,
    caller                 text,
    caller_kind            text,
    peer                   text,
    account                text,
    outcome                text        not null,
    reason                 text,
    generation             bigint,
    token_fingerprint      text,
    trace_id               text,
    latency_us             bigint,
    count                  bigint      not null,
    detail                 jsonb       not null,
    prev_hash              bytea       not null,
    hash                   bytea       not null,
    primary key (at, chain, seq)
) partition by range (at);

create index audit_events_account on audit_events (account, at) where account is not null;
create index audit_events_caller on audit_events (caller, at) where caller is not null;

-- Auditors mostly ask for events that are rare among millions of calls: starts, gaps, changes, failed issues.
-- Without this index each such query reads all calls of its time range. The index costs a page or two per
-- day.
create index audit_events_rare on audit_events (event, at)
    where event in ('issue_failed', 'account_registered', 'account_changed', 'account_removed',
        'caller_changed', 'grant_changed', 'audit_gap', 'audit_pruned', 'chain_retired',
        'database_accepted', 'handshake_refused', 'retention_changed', 'started', 'stopped');

-- Signed checkpoints of chains.
create table audit_heads (
    chain                  text        not null,
    seq                    bigint      not null,
    hash                   bytea       not null,
    at                     timestamptz not null,
    key_id                 text        not null,
    signature              bytea       not null,
    primary key (chain, seq)
);

-- Signed pruning receipts. Retention removes whole UTC days. When changes are kept for longer than calls,
-- a day's calls are removed first and its changes later. Each removed run of records leaves a receipt with
-- its first and last number and the hashes at both ends. With it, `audit verify` continues from the record
-- before the run to the one after it, and distinguishes records removed by retention from records that
-- somebody else deleted.
create table audit_pruning_receipts (
    chain                  text        not null,
    first_seq              bigint      not null,
    -- The hash of the record before the first.
    prev_hash              bytea       not null,
    last_seq               bigint      not null,
    -- The hash of the last record.
    hash                   bytea       not null,
    at                     timestamptz not null,
    key_id                 text        not null,
    signature              bytea       not null,
    -- The transaction that removes the records. It distinguishes its receipts from earlier ones.
    made_in                xid8        not null default pg_current_xact_id(),
    -- Records that were delivered and removed again have a receipt for each removal.
    primary key (chain, first_seq, last_seq, made_in)
);

create index audit_pruning_receipts_made_in on audit_pruning_receipts (made_in);

-- The minimum time for which audit records are kept, whatever the brokers' settings say. A broker's login
-- may remove expired records. Without this limit it could also remove newer ones, with receipts that nobody
-- signed: `audit verify` would report it, but the records would be lost. So no role of deploy/roles.sql may
-- change the limit, only the owner of the tables:
--
--     update audit_retention set calls_days = 7;

create table audit_retention (
    single                 boolean     primary key default true,
    -- All records except those of changes.
    calls_days             integer     not null default 30,
    changes_days           integer     not null default 30,
    constraint audit_retention_single check (single),
    constraint audit_retention_at_least_a_day check (calls_days >= 1),
    constraint audit_retention_changes_as_long check (changes_days between calls_days and 1000000)
);
insert into audit_retention default values;
