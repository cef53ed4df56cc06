-- The least time that audit records are kept, whatever the brokers' settings say. A broker's login may
-- remove what is over, and could remove more with cuts that nobody signed: `audit verify` would tell, but the
-- records would be gone. What says how much may go is therefore out of its reach, and only the owner of the
-- tables changes it:
--
--     update audit_retention set calls_days = 7;

create table audit_retention (
    single                 boolean     primary key default true,
    -- All records but those of changes.
    calls_days             integer     not null default 30,
    changes_days           integer     not null default 30,
    constraint audit_retention_single check (single),
    constraint audit_retention_at_least_a_day check (calls_days >= 1),
    constraint audit_retention_changes_as_long check (changes_days between calls_days and 1000000)
);

insert into audit_retention default values;

create function audit_retention_changed() returns trigger
language plpgsql security definer as $$
begin
    if new is distinct from old then
        perform token_broker_change('audit_retention', 'update', 0, 'audit_retention',
            token_broker_differs('calls_days', old.calls_days::text, new.calls_days::text)
                || token_broker_differs('changes_days', old.changes_days::text,
                    new.changes_days::text));
    end if;
    return null;
end
$$;

create trigger audit_retention_changed after update on audit_retention
    for each row execute function audit_retention_changed();
-- Without its row nothing could be removed; and nobody could see what was allowed.
create trigger audit_retention_kept before delete on audit_retention
    for each row execute function audit_append_only();
create trigger audit_retention_no_truncate before truncate on audit_retention
    for each statement execute function audit_append_only();

create or replace function audit_is_change(event text) returns boolean
language sql immutable as $$
    select event in ('account_registered', 'account_changed', 'account_removed', 'caller_changed',
        'grant_changed', 'keys_changed', 'audit_pruned', 'chain_retired', 'database_accepted',
        'retention_changed')
$$;

-- The table of a day. to_char writes the year 2026 and the year 2026 BC alike: a day that is no record's has
-- none.
create function audit_partition(of_day date) returns text
language plpgsql stable as $$
begin
    if of_day is null or of_day not between date '1970-01-01' and date '9999-12-31' then
        raise exception using errcode = 'insufficient_privilege',
            message = format('no audit record is of %s', of_day);
    end if;
    return 'audit_events_' || to_char(of_day, 'YYYYMMDD');
end
$$;

-- These three as they were, but for that; and for the age in the last one.
create or replace function audit_ensure_partition(day date) returns void
language plpgsql security definer as $$
declare
    partition text := audit_partition(day);
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

create or replace function audit_hold(day date) returns void
language plpgsql security definer as $$
begin
    execute format('lock table %I in share row exclusive mode', audit_partition(day));
end
$$;

create or replace function audit_prune(of_day date, changes_too boolean) returns bigint
language plpgsql security definer as $$
declare
    partition text := audit_partition(of_day);
    kept_days integer;
    removed bigint;
    uncut bigint;
begin
    select case when changes_too then r.changes_days else r.calls_days end into strict kept_days
        from audit_retention r;
    if (clock_timestamp() at time zone 'UTC')::date - (of_day + 1) < kept_days then
        raise exception using errcode = 'insufficient_privilege',
            message = format('audit records of %s are not old enough to be removed', of_day),
            hint = 'The table audit_retention says for how long records are kept at least.';
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

do $$
declare
    definer text;
begin
    foreach definer in array array['audit_retention_changed()', 'audit_ensure_partition(date)',
        'audit_hold(date)', 'audit_prune(date, boolean)']
    loop
        execute format('alter function %s set search_path = %I, pg_temp', definer, current_schema());
        execute format('revoke execute on function %s from public', definer);
    end loop;
end
$$;
