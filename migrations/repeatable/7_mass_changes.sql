-- version: 1 (raise it with each change of this file)
--
-- Refuses a statement that changes or deletes more than a few rows of `accounts`, `callers`, `caller_credentials` or
-- `grants`, or all of them, unless the session says for how many rows it means it. So a WHERE that was forgotten or is
-- wrong changes nothing.

-- Names are resolved in pg_catalog alone, both now and when a function runs. Our own objects are named with
-- their schema, for which `@schema@` stands. So nobody can put another object in the place of the one that is
-- meant, even if others may create objects in that schema.
set local search_path = pg_catalog, pg_temp;

-- Each statement is counted for itself: a program that changes one row after the other has selected each of them. It runs
-- with the rights of the tables' owner, since whoever may change a table need not be able to read it.
create or replace function @schema@.token_broker_limit_changes() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    -- The most rows that one statement may change if the session has set no limit.
    few constant bigint := 5;
    -- What only the sealing, `keys reseal` and triggers write: brokers seal and reseal many rows.
    of_brokers constant text[] := array['sealed_secret', 'previous_secret', 'previous_version', 'credential_version',
        'login_version', 'updated_at'];
    allowed text := nullif(current_setting('token_broker.max_changed_rows', true), '');
    -- How many rows the statement matched, and how many of these it changed or deleted.
    found_rows bigint;
    changed bigint;
    others boolean;
    reason text;
begin
    select count(*) into found_rows from old_rows;
    if found_rows <= 1 then
        return null;
    end if;
    if tg_op = 'UPDATE' then
        -- A row that is saved as it is is not changed.
        select count(*) into changed from old_rows o join new_rows n using (id)
            where to_jsonb(o) - of_brokers <> to_jsonb(n) - of_brokers;
    elsif tg_table_name in ('caller_credentials', 'grants') then
        -- Those of a caller that was deleted go with it.
        select count(*) into changed from old_rows o
            where exists (select from @schema@.callers where id = o.caller_id);
    else
        changed := found_rows;
    end if;
    if changed <= 1 then
        return null;
    end if;
    if allowed is null then
        reason := format('more than %s', few);
        if changed <= few then
            execute format('select exists (select from %I.%I offset $1)', tg_table_schema, tg_table_name)
                into others using case when tg_op = 'UPDATE' then found_rows else 0 end;
            if others then
                return null;
            end if;
            reason := 'and finds all there are, as without a WHERE';
        end if;
    elsif allowed !~ '^[0-9]{1,18}$' then
        reason := 'and token_broker.max_changed_rows is not a number of rows';
    elsif changed > allowed::bigint then
        reason := format('more than the %s of token_broker.max_changed_rows', allowed);
    else
        return null;
    end if;
    raise exception using errcode = 'cardinality_violation',
        message = format('this statement would %s %s rows of %s, %s: if that is meant, set '
            'token_broker.max_changed_rows to %s in its transaction',
            case when tg_op = 'UPDATE' then 'change' else 'delete' end, changed, tg_table_name, reason, changed),
        hint = format('begin; set local token_broker.max_changed_rows = %s; …; commit', changed);
end
$$;

revoke execute on function @schema@.token_broker_limit_changes() from public;

-- A trigger with transition tables is for one kind of statement each. TRUNCATE is refused altogether.
create or replace trigger accounts_limit_updates after update on @schema@.accounts
    referencing old table as old_rows new table as new_rows
    for each statement execute function @schema@.token_broker_limit_changes();
create or replace trigger accounts_limit_deletes after delete on @schema@.accounts
    referencing old table as old_rows
    for each statement execute function @schema@.token_broker_limit_changes();
create or replace trigger callers_limit_updates after update on @schema@.callers
    referencing old table as old_rows new table as new_rows
    for each statement execute function @schema@.token_broker_limit_changes();
create or replace trigger callers_limit_deletes after delete on @schema@.callers
    referencing old table as old_rows
    for each statement execute function @schema@.token_broker_limit_changes();
create or replace trigger caller_credentials_limit_updates after update on @schema@.caller_credentials
    referencing old table as old_rows new table as new_rows
    for each statement execute function @schema@.token_broker_limit_changes();
create or replace trigger caller_credentials_limit_deletes after delete on @schema@.caller_credentials
    referencing old table as old_rows
    for each statement execute function @schema@.token_broker_limit_changes();
create or replace trigger grants_limit_updates after update on @schema@.grants
    referencing old table as old_rows new table as new_rows
    for each statement execute function @schema@.token_broker_limit_changes();
create or replace trigger grants_limit_deletes after delete on @schema@.grants
    referencing old table as old_rows
    for each statement execute function @schema@.token_broker_limit_changes();
