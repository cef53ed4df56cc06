-- version: 4 (raise it with each change of this file)
--
-- The functions of the audit log: its tables are append-only, it has a partition for each UTC day, and only
-- `audit_prune` removes records.

-- Names are resolved in pg_catalog alone, both now and when a function runs. Our own objects are named with
-- their schema, for which `@schema@` stands. So nobody can put another object in the place of the one that is
-- meant, even if others may create objects in that schema.
set local search_path = pg_catalog, pg_temp;

create or replace function @schema@.audit_append_only() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    raise exception using errcode = 'insufficient_privilege',
        message = format('%s is append-only: %s is refused', tg_table_name, lower(tg_op));
end
$$;

create or replace trigger audit_events_append_only before update or delete on @schema@.audit_events
    for each row execute function @schema@.audit_append_only();
create or replace trigger audit_events_no_truncate before truncate on @schema@.audit_events
    for each statement execute function @schema@.audit_append_only();
create or replace trigger audit_heads_append_only before update or delete on @schema@.audit_heads
    for each row execute function @schema@.audit_append_only();
create or replace trigger audit_heads_no_truncate before truncate on @schema@.audit_heads
    for each statement execute function @schema@.audit_append_only();
create or replace trigger audit_pruning_receipts_append_only before update or delete on @schema@.audit_pruning_receipts
    for each row execute function @schema@.audit_append_only();
create or replace trigger audit_pruning_receipts_no_truncate before truncate on @schema@.audit_pruning_receipts
    for each statement execute function @schema@.audit_append_only();
-- A chain's row is never deleted: without it, nobody would notice that the chain's records are missing.
create or replace trigger audit_chains_kept before delete on @schema@.audit_chains
    for each row execute function @schema@.audit_append_only();
create or replace trigger audit_chains_no_truncate before truncate on @schema@.audit_chains
    for each statement execute function @schema@.audit_append_only();
-- Without this row nothing could be removed, and nobody could see which limit applied.
create or replace trigger audit_retention_kept before delete on @schema@.audit_retention
    for each row execute function @schema@.audit_append_only();
create or replace trigger audit_retention_no_truncate before truncate on @schema@.audit_retention
    for each statement execute function @schema@.audit_append_only();

-- Returns the events that are kept for CHANGE_RETENTION. All others are kept for AUDIT_RETENTION. It returns a
-- list instead of testing one event: the planner evaluates it once per query, while a function of the event,
-- which cannot be inlined because it sets its search path, would take 3 µs per record.
create or replace function @schema@.audit_change_events() returns text[]
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select array['account_registered', 'account_changed', 'account_removed', 'caller_changed',
        'grant_changed', 'keys_changed', 'other_changed', 'audit_pruned', 'chain_retired',
        'database_accepted', 'retention_changed']
$$;

-- Returns the name of a day's partition. Dates outside these years are refused: to_char writes the year 2026
-- and the year 2026 BC alike, so one of them would name the other's partition.
create or replace function @schema@.audit_partition(of_day date) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
begin
    if of_day is null or of_day not between date '1970-01-01' and date '9999-12-31' then
        raise exception using errcode = 'insufficient_privilege',
            message = format('no audit record is of %s', of_day);
    end if;
    return 'audit_events_' || to_char(of_day, 'YYYYMMDD');
end
$$;

-- Refuses a relation that has the name of a partition and is none, or is not of the owner of the audit log. Somebody
-- may have created it while others could create objects in the schema: a view, or a table with a policy, has code
-- run with the rights of whoever uses it, and the functions below run with those of the owner. Does nothing if
-- there is no relation of that name.
create or replace function @schema@.audit_check_partition(partition text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
declare
    it record;
begin
    select c.oid::regclass as name, pg_get_userbyid(c.relowner) as owner,
            c.relkind = 'r' and c.relowner = log.relowner and exists (
                select from pg_inherits where inhrelid = c.oid and inhparent = log.oid) as ours
        into it
        from pg_class c, pg_class log
        where c.relname = partition and c.relnamespace = log.relnamespace
            and log.oid = '@schema@.audit_events'::regclass;
    if not it.ours then
        raise exception using errcode = 'wrong_object_type',
            message = format('relation %s of role %I has the name of a partition of audit_events, and is none of '
                'its owner: drop it', it.name, it.owner),
            hint = 'If you know that it has audit records, attach it again or correct its owner instead.';
    end if;
end
$$;

revoke execute on function @schema@.audit_check_partition(text) from public;

-- Attaches a filled or empty table as the partition of `day`.
create or replace function @schema@.audit_attach(day date, partition text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    execute format('alter table @schema@.audit_events attach partition @schema@.%I for values from (%L) to (%L)',
        partition, day::text || ' 00:00:00+00', (day + 1)::text || ' 00:00:00+00');
    -- A TRUNCATE trigger does not pass from a parent to its partitions.
    execute format('create trigger %I before truncate on @schema@.%I for each statement '
        'execute function @schema@.audit_append_only()', partition || '_no_truncate', partition);
end
$$;

revoke execute on function @schema@.audit_attach(date, text) from public;

-- Creates the partition of the UTC day `day` unless it exists. Several replicas may call it at once: they wait for
-- each other by the row of `audit_retention`, which no other login can lock. The table is created first and attached
-- then, which blocks no session that reads or writes other days.
create or replace function @schema@.audit_ensure_partition(day date) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    partition text := @schema@.audit_partition(day);
begin
    perform @schema@.audit_check_partition(partition);
    if to_regclass('@schema@.' || partition) is not null then
        return;
    end if;
    perform from @schema@.audit_retention for update;
    perform @schema@.audit_check_partition(partition);
    -- Not by to_regclass, which remembers in this transaction that the table did not exist.
    if exists (select from pg_class
            where relname = partition and relnamespace = '@schema@'::regnamespace) then
        return;
    end if;
    execute format('create table @schema@.%I (like @schema@.audit_events including all)', partition);
    perform @schema@.audit_attach(day, partition);
end
$$;

revoke execute on function @schema@.audit_ensure_partition(date) from public;

-- Locks the partition of `day` against writes until the transaction ends, so that the receipts cover exactly
-- the records that are removed.
create or replace function @schema@.audit_lock_day(day date) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    partition text := @schema@.audit_partition(day);
begin
    perform @schema@.audit_check_partition(partition);
    execute format('lock table @schema@.%I in share row exclusive mode', partition);
end
$$;

revoke execute on function @schema@.audit_lock_day(date) from public;

-- Removes the records of `of_day`, either all of them or all but those of changes, and returns how many it
-- removed. It refuses if the day is not as old as `audit_retention` requires, or if this transaction has not
-- inserted receipts into `audit_pruning_receipts` for as many records. This guards against mistakes of the
-- broker. It cannot check the receipts' signatures; `audit verify` does.
create or replace function @schema@.audit_prune(of_day date, changes_too boolean) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    partition text := @schema@.audit_partition(of_day);
    kept_days integer;
    removed bigint;
    uncut bigint;
begin
    select case when changes_too then r.changes_days else r.calls_days end into strict kept_days
        from @schema@.audit_retention r;
    if (clock_timestamp() at time zone 'UTC')::date - (of_day + 1) < kept_days then
        raise exception using errcode = 'insufficient_privilege',
            message = format('audit records of %s are not old enough to be removed', of_day),
            hint = 'The table audit_retention says for how long records are kept at least.';
    end if;
    perform @schema@.audit_check_partition(partition);
    execute format('select coalesce(sum(gone.n), 0), count(*) filter (where gone.n <> coalesce(cut.n, 0))
        from (select chain, count(*) as n from @schema@.%I where $1 or event <> all (@schema@.audit_change_events())
            group by chain) gone
        left join (select chain, sum(last_seq - first_seq + 1) as n from @schema@.audit_pruning_receipts
            where made_in = pg_current_xact_id() group by chain) cut using (chain)', partition)
        into removed, uncut using changes_too;
    if uncut > 0 then
        raise exception using errcode = 'insufficient_privilege',
            message = format('audit records of %s have no signed pruning receipt', of_day);
    end if;
    if changes_too then
        execute format('drop table @schema@.%I', partition);
    elsif removed > 0 then
        -- No table of ours has this name when a transaction begins, so this refuses any relation.
        perform @schema@.audit_check_partition(partition || '_kept');
        execute format('create table @schema@.%I (like @schema@.audit_events including all)', partition || '_kept');
        execute format('insert into @schema@.%I select * from @schema@.%I where event = any (@schema@.audit_change_events())',
            partition || '_kept', partition);
        execute format('drop table @schema@.%I', partition);
        execute format('alter table @schema@.%I rename to %I', partition || '_kept', partition);
        perform @schema@.audit_attach(of_day, partition);
    end if;
    if removed > 0 then
        perform @schema@.token_broker_change('audit_events', 'prune', 0, of_day::text, jsonb_build_object(
            'records', removed::text, 'changes', case when changes_too then 'removed' else 'kept' end));
    end if;
    return removed;
end
$$;

revoke execute on function @schema@.audit_prune(date, boolean) from public;

-- Names of chains and instances are printed for auditors, and recorded as the subject of changes. So they are visible
-- characters, as brokers choose them.
create or replace function @schema@.audit_chains_validate() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    if (new.chain ~ '^[!-~]{1,200}$' and new.instance ~ '^[!-~]{1,200}$'
        and coalesce(new.linked_chain, 'none') ~ '^[!-~]{1,200}$') is not true then
        raise exception using errcode = 'check_violation',
            message = 'audit_chains.chain, instance and linked_chain must be 1 to 200 visible ASCII characters';
    end if;
    return new;
end
$$;

create or replace trigger audit_chains_validate before insert or update of chain, instance, linked_chain
    on @schema@.audit_chains for each row execute function @schema@.audit_chains_validate();

-- Records who retired a chain, and after which record others may be missing.
create or replace function @schema@.audit_chain_retired() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
begin
    if new.retired is distinct from old.retired then
        perform @schema@.token_broker_change('audit_chains', 'retire', 0, new.chain, jsonb_build_object(
            'instance', new.instance, 'delivered_seq', new.delivered_seq::text,
            'retired', coalesce(new.retired, 'taken back')));
    end if;
    return null;
end
$$;

revoke execute on function @schema@.audit_chain_retired() from public;

create or replace trigger audit_chain_retired after update of retired on @schema@.audit_chains
    for each row execute function @schema@.audit_chain_retired();

create or replace function @schema@.audit_retention_changed() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
begin
    if new is distinct from old then
        perform @schema@.token_broker_change('audit_retention', 'update', 0, 'audit_retention',
            @schema@.token_broker_differs('calls_days', old.calls_days::text, new.calls_days::text)
                || @schema@.token_broker_differs('changes_days', old.changes_days::text,
                    new.changes_days::text));
    end if;
    return null;
end
$$;

revoke execute on function @schema@.audit_retention_changed() from public;

create or replace trigger audit_retention_changed after update on @schema@.audit_retention
    for each row execute function @schema@.audit_retention_changed();
