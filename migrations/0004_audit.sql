-- The audit log: what happened, in hash chains. One chain for each start of each instance; its
-- records are numbered from 1 by one writer, and each holds the hash of the one before it.
-- Rows arrive in order, exactly once: position (`audit_chains.delivered_seq`) and rows move in one
-- transaction.

create table audit_chains (
    chain                  text        primary key,
    instance               text        not null,
    started_at             timestamptz not null,
    -- The head of the instance's chain before this one: this chain's first `prev_hash`.
    linked_chain           text,
    linked_hash            bytea       not null,
    delivered_seq          bigint      not null default 0,
    delivered_hash         bytea       not null,
    delivered_at           timestamptz not null default now()
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

create table audit_heads (
    chain                  text        not null,
    seq                    bigint      not null,
    hash                   bytea       not null,
    at                     timestamptz not null,
    key_id                 text        not null,
    signature              bytea       not null,
    primary key (chain, seq)
);

create function audit_append_only() returns trigger
language plpgsql as $$
begin
    raise exception using errcode = 'insufficient_privilege',
        message = format('%s is append-only: %s is refused', tg_table_name, lower(tg_op));
end
$$;

create trigger audit_events_append_only before update or delete on audit_events
    for each row execute function audit_append_only();
create trigger audit_events_no_truncate before truncate on audit_events
    for each statement execute function audit_append_only();
create trigger audit_heads_append_only before update or delete on audit_heads
    for each row execute function audit_append_only();
create trigger audit_heads_no_truncate before truncate on audit_heads
    for each statement execute function audit_append_only();

-- Makes the partition of the UTC day `day` if it is not there. Any number of replicas may ask at
-- once. A TRUNCATE trigger does not pass from a parent to its partitions, so each gets its own.
create function audit_ensure_partition(day date) returns void
language plpgsql security definer as $$
declare
    partition text := 'audit_events_' || to_char(day, 'YYYYMMDD');
begin
    if to_regclass(partition) is not null then
        return;
    end if;
    perform pg_advisory_xact_lock(hashtext('token_broker.audit_ensure_partition'));
    if to_regclass(partition) is not null then
        return;
    end if;
    execute format('create table %I partition of audit_events for values from (%L) to (%L)',
        partition, day::text || ' 00:00:00+00', (day + 1)::text || ' 00:00:00+00');
    execute format('create trigger %I before truncate on %I for each statement '
        'execute function audit_append_only()', partition || '_no_truncate', partition);
end
$$;

-- Whoever may write to a table runs its triggers with the rights of the tables' owner: they must not
-- be led to tables or functions of the writer's own making, which a temporary schema searched first
-- would do.
do $$
declare
    definer regprocedure;
begin
    for definer in
        select oid from pg_proc where prosecdef and pronamespace = current_schema()::regnamespace
    loop
        execute format('alter function %s set search_path = %I, pg_temp', definer, current_schema());
        execute format('revoke execute on function %s from public', definer);
    end loop;
end
$$;
