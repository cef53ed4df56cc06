-- What proves the audit log, and what lets it grow old.
--
-- Retention removes whole UTC days. A day's partition goes as a whole when its time is over; before
-- that, where calls are kept for a shorter time than changes, all of it but its changes. What goes leaves
-- signed cuts: which records of which chain, and the hashes at both ends. By them `audit verify` goes on
-- from the record before to the one after, and tells what the rule removed from what somebody else did.

create table audit_cuts (
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
    -- Tells the cuts of the removal under way from earlier ones.
    made_in                xid8        not null default pg_current_xact_id(),
    -- What came back and was removed again has a cut for each time.
    primary key (chain, first_seq, last_seq, made_in)
);

create index audit_cuts_made_in on audit_cuts (made_in);

create trigger audit_cuts_append_only before update or delete on audit_cuts
    for each row execute function audit_append_only();
create trigger audit_cuts_no_truncate before truncate on audit_cuts
    for each statement execute function audit_append_only();

-- What is kept for CHANGE_RETENTION; all else is kept for AUDIT_RETENTION.
create function audit_is_change(event text) returns boolean
language sql immutable as $$
    select event in ('account_registered', 'account_changed', 'account_removed', 'caller_changed',
        'grant_changed', 'keys_changed', 'audit_pruned', 'chain_retired', 'database_accepted')
$$;

-- Attached and not made in place: that waits for nobody who reads or writes other days, and nobody waits
-- for it.
create or replace function audit_ensure_partition(day date) returns void
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
    execute format('create table %I (like audit_events including all)', partition);
    perform audit_attach(day, partition);
end
$$;

create function audit_attach(day date, partition text) returns void
language plpgsql as $$
begin
    execute format('alter table audit_events attach partition %I for values from (%L) to (%L)',
        partition, day::text || ' 00:00:00+00', (day + 1)::text || ' 00:00:00+00');
    -- A TRUNCATE trigger does not pass from a parent to its partitions.
    execute format('create trigger %I before truncate on %I for each statement '
        'execute function audit_append_only()', partition || '_no_truncate', partition);
end
$$;

-- Keeps `day` as it is until the transaction ends, so that its cuts stay true.
create function audit_hold(day date) returns void
language plpgsql security definer as $$
begin
    execute format('lock table %I in share row exclusive mode',
        'audit_events_' || to_char(day, 'YYYYMMDD'));
end
$$;

-- Removes the records of `of_day`, all or all but changes, for which this transaction has put as many cuts
-- into `audit_cuts`; how many there were. It keeps a slip from removing what nobody noted. Whether the cuts are
-- genuine it cannot tell, which `audit verify` does. A day that has not been over for a day is not touched,
-- whatever the settings say.
create function audit_prune(of_day date, changes_too boolean) returns bigint
language plpgsql security definer as $$
declare
    partition text := 'audit_events_' || to_char(of_day, 'YYYYMMDD');
    removed bigint;
    uncut bigint;
begin
    if of_day >= (clock_timestamp() at time zone 'UTC')::date - 1 then
        raise exception using errcode = 'insufficient_privilege',
            message = format('audit records of %s are not old enough to be removed', of_day);
    end if;
    execute format('select coalesce(sum(gone.n), 0), count(*) filter (where gone.n <> coalesce(cut.n, 0))
        from (select chain, count(*) as n from %I where $1 or not audit_is_change(event)
            group by chain) gone
        left join (select chain, sum(last_seq - first_seq + 1) as n from audit_cuts
            where made_in = pg_current_xact_id() group by chain) cut using (chain)', partition)
        into removed, uncut using changes_too;
    if uncut > 0 then
        raise exception using errcode = 'insufficient_privilege',
            message = format('audit records of %s have no signed cut', of_day);
    end if;
    if changes_too then
        execute format('drop table %I', partition);
    elsif removed > 0 then
        execute format('create table %I (like audit_events including all)', partition || '_kept');
        execute format('insert into %I select * from %I where audit_is_change(event)',
            partition || '_kept', partition);
        execute format('drop table %I', partition);
        execute format('alter table %I rename to %I', partition || '_kept', partition);
        perform audit_attach(of_day, partition);
    end if;
    if removed > 0 then
        perform token_broker_change('audit_events', 'prune', 0, of_day::text, jsonb_build_object(
            'records', removed::text, 'changes', case when changes_too then 'removed' else 'kept' end));
    end if;
    return removed;
end
$$;

-- A replica whose disk is lost leaves chains that may never end. To retire them says so: who did it, and
-- what may be missing.
alter table audit_chains
    add column retired_at  timestamptz,
    add column retired     text;

create function audit_chain_retired() returns trigger
language plpgsql security definer as $$
begin
    if new.retired is distinct from old.retired then
        perform token_broker_change('audit_chains', 'retire', 0, new.chain, jsonb_build_object(
            'instance', new.instance, 'delivered_seq', new.delivered_seq::text,
            'retired', coalesce(new.retired, 'taken back')));
    end if;
    return null;
end
$$;

create trigger audit_chain_retired after update of retired on audit_chains
    for each row execute function audit_chain_retired();

-- A chain is known for ever: without its row, nobody would miss its records.
create trigger audit_chains_kept before delete on audit_chains
    for each row execute function audit_append_only();
create trigger audit_chains_no_truncate before truncate on audit_chains
    for each statement execute function audit_append_only();

do $$
declare
    definer text;
begin
    foreach definer in array array['audit_ensure_partition(date)', 'audit_attach(date, text)',
        'audit_hold(date)', 'audit_prune(date, boolean)', 'audit_chain_retired()']
    loop
        execute format('alter function %s set search_path = %I, pg_temp', definer, current_schema());
        execute format('revoke execute on function %s from public', definer);
    end loop;
end
$$;
