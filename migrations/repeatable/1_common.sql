-- version: 3 (raise it with each change of this file)
--
-- Functions that the triggers of several tables call.

-- Names are resolved in pg_catalog alone, both now and when a function runs. Our own objects are named with
-- their schema, for which `@schema@` stands. So nobody can put another object in the place of the one that is
-- meant, even if others may create objects in that schema.
set local search_path = pg_catalog, pg_temp;

-- Refuses a row with an error that does not contain the row.
create or replace function @schema@.token_broker_refuse(message text, column_name text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    raise exception using errcode = 'check_violation', message = message, column = column_name;
end
$$;

-- Whether `value` has 1 to `longest` characters, none of them white space or control characters. The
-- characters are listed because regular expression classes depend on the database's locale. The broker must
-- be able to read every value that passes here.
create or replace function @schema@.token_broker_is_printable(value text, longest integer) returns boolean
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select char_length(value) between 1 and longest
        and value !~ '[\u0001-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]'
$$;

-- Whether `at` is finite and within the range that every client can represent.
create or replace function @schema@.token_broker_is_time(at timestamptz) returns boolean
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select at between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
$$;

-- Returns `{"<name>": "<a> → <b>"}` when `a` and `b` differ, else `{}`.
create or replace function @schema@.token_broker_differs(name text, a text, b text) returns jsonb
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select case when a is distinct from b
        then jsonb_build_object(name, coalesce(a, 'none') || ' → ' || coalesce(b, 'none'))
        else '{}'::jsonb end
$$;

-- Records a change and wakes the brokers. Only functions that run with the rights of the tables' owner call it:
-- other roles may not insert into `changes`. Values are cut after 1000 characters, since brokers load them: an
-- admin's session can set an actor and a reason of any length. The state is not cut, because it is compared with
-- the row; the limits of the columns bound it.
create or replace function @schema@.token_broker_change(
    table_name text, operation text, row_id bigint, subject text, what jsonb
) returns void
language sql
set search_path = pg_catalog, pg_temp as $$
    insert into @schema@.changes (table_name, operation, row_id, subject, application_name, actor, reason, what)
    values (table_name, lower(operation), row_id, left(subject, 1000),
        left(current_setting('application_name', true), 1000),
        left(nullif(current_setting('token_broker.actor', true), ''), 1000),
        left(nullif(current_setting('token_broker.reason', true), ''), 1000),
        (select coalesce(jsonb_object_agg(each.key,
            case when each.key = 'state' then each.value else left(each.value, 1000) end), '{}')
            from jsonb_each_text(what) each));
    select pg_notify('token_broker_changes', '');
$$;

-- TRUNCATE runs no row triggers, so it would remove rows without recording the change.
create or replace function @schema@.token_broker_no_truncate() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    raise exception using errcode = 'insufficient_privilege',
        message = format('%s cannot be truncated; delete rows instead', tg_table_name);
end
$$;
