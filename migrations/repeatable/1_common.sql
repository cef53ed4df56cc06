-- version: 7 (raise it with each change of this file)
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

-- Describes the first character of `value` that people do not see, or may take for another one: such as
-- `character 5 is a zero width space (U+200B)`. NULL if there is none. Characters are counted from 1. `in_words`
-- is for a value such as an API KEY, which has visible ASCII and Hangul syllables only; otherwise `value` is text for
-- people, in which white space and emoji are ordinary. `src/domain/odd_character.rs` has the same table.
create or replace function @schema@.token_broker_odd_character(value text, in_words boolean) returns text
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select format('character %s is %s', it.nth, case
        when ascii(it.character) & 65534 = 65534 then 'a character that does not exist'
        else coalesce(odd.kind, 'neither ASCII nor a Hangul syllable') end)
    from unnest(string_to_array(left(value, 3000), null)) with ordinality it (character, nth)
    left join (values
        (0, 8, true, 'a control character'),
        (9, 9, false, 'a tab'),
        (10, 10, false, 'a line feed'),
        (11, 12, true, 'a control character'),
        (13, 13, false, 'a carriage return'),
        (14, 31, true, 'a control character'),
        (32, 32, false, 'a space'),
        (127, 159, true, 'a control character'),
        (160, 160, false, 'a no-break space (U+00A0)'),
        (173, 173, true, 'a soft hyphen (U+00AD)'),
        (768, 846, false, 'a combining mark'),
        (847, 847, true, 'an invisible character'),
        (848, 879, false, 'a combining mark'),
        (1536, 1541, false, 'an invisible character'),
        (1564, 1564, true, 'a mark of the writing direction'),
        (1757, 1757, false, 'an invisible character'),
        (1807, 1807, false, 'an invisible character'),
        (2192, 2193, false, 'an invisible character'),
        (2274, 2274, false, 'an invisible character'),
        (4352, 4446, false, 'a part of a Hangul syllable: compose it (Unicode''s form NFC)'),
        (4447, 4448, true, 'an invisible character'),
        (4449, 4607, false, 'a part of a Hangul syllable: compose it (Unicode''s form NFC)'),
        (5760, 5760, false, 'an unusual space'),
        (6068, 6069, true, 'an invisible character'),
        (6155, 6159, true, 'an invisible character'),
        (6832, 6911, false, 'a combining mark'),
        (7616, 7679, false, 'a combining mark'),
        (8192, 8202, false, 'an unusual space'),
        (8203, 8203, true, 'a zero width space (U+200B)'),
        (8204, 8205, false, 'a zero width joiner or non-joiner'),
        (8206, 8207, true, 'a mark of the writing direction'),
        (8208, 8231, false, 'typographic punctuation'),
        (8232, 8233, true, 'a line or paragraph separator'),
        (8234, 8238, true, 'a mark of the writing direction'),
        (8239, 8239, false, 'an unusual space'),
        (8240, 8286, false, 'typographic punctuation'),
        (8287, 8287, false, 'an unusual space'),
        (8288, 8293, true, 'an invisible character'),
        (8294, 8297, true, 'a mark of the writing direction'),
        (8298, 8303, true, 'an invisible character'),
        (8400, 8447, false, 'a combining mark'),
        (8448, 8527, false, 'a letter-like symbol'),
        (8722, 8722, false, 'typographic punctuation'),
        (10240, 10240, true, 'an invisible character'),
        (12288, 12288, false, 'an ideographic space (U+3000)'),
        (12289, 12351, false, 'typographic punctuation'),
        (12644, 12644, true, 'an invisible character'),
        (55216, 55291, false, 'a part of a Hangul syllable: compose it (Unicode''s form NFC)'),
        (57344, 63743, false, 'a character for private use'),
        (64256, 64262, false, 'a ligature'),
        (64976, 65007, true, 'a character that does not exist'),
        (65024, 65039, false, 'a variation selector'),
        (65056, 65071, false, 'a combining mark'),
        (65104, 65135, false, 'typographic punctuation'),
        (65279, 65279, true, 'a byte order mark (U+FEFF)'),
        (65280, 65439, false, 'a full-width or half-width form'),
        (65440, 65440, true, 'an invisible character'),
        (65441, 65519, false, 'a full-width or half-width form'),
        (65520, 65531, true, 'an invisible character'),
        (65532, 65533, true, 'a replacement for a character that was lost'),
        (69821, 69821, false, 'an invisible character'),
        (69837, 69837, false, 'an invisible character'),
        (78896, 78943, false, 'an invisible character'),
        (94180, 94180, true, 'an invisible character'),
        (113824, 113827, true, 'an invisible character'),
        (119129, 119129, true, 'an invisible character'),
        (119155, 119162, true, 'an invisible character'),
        (119808, 120831, false, 'a mathematical letter'),
        (917504, 921599, true, 'an invisible character'),
        (983040, 1114111, false, 'a character for private use')
    ) odd (first, last, in_text, kind) on ascii(it.character) between odd.first and odd.last
    where (odd.in_text or ascii(it.character) & 65534 = 65534
            or in_words and it.character !~ '[\u0021-\u007e\uac00-\ud7a3]')
        -- Most values are plain ASCII, for which the table need not be searched.
        and value !~ '^[\u0021-\u007e]*$'
    order by it.nth
    limit 1
$$;

-- Returns `; character 5 is a …` for the end of a message about a value that does not match its rule, or nothing.
create or replace function @schema@.token_broker_because(value text) returns text
language sql immutable
set search_path = pg_catalog, pg_temp as $$
    select coalesce('; ' || @schema@.token_broker_odd_character(value, true), '')
$$;

-- Returns the credential version that the value is bound to which this transaction seals. Brokers set it for each
-- row when they seal, so that no other statement passes for the sealing by mistake. NULL outside of the sealing.
create or replace function @schema@.token_broker_sealing() returns bigint
language sql stable
set search_path = pg_catalog, pg_temp as $$
    select case when current_setting('token_broker.sealing', true) ~ '^[0-9]{1,18}$'
        then current_setting('token_broker.sealing', true)::bigint end
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

-- Whether the last recorded change of a row left `state`. An update that changes no value of such a row is not
-- recorded: programs save whole rows, and declarative tools write the same values again and again. Of another row, which
-- was written past the triggers, it is: that accepts the present state.
create or replace function @schema@.token_broker_is_recorded(
    of_table text, of_row bigint, of_subject text, state text
) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp as $$
    select coalesce((
        select case when operation <> 'delete' then what ->> 'state' end from @schema@.changes
        where table_name = of_table and row_id = of_row and subject = of_subject
        order by id desc limit 1) = state, false)
$$;

-- Remembers, before a statement inserts rows, the last number that was taken for rows of the table: those of the
-- statement follow it. If the sequence was set back, as each dump of data does at its end, it first goes on behind the
-- last number that exists or was recorded, so that no row gets the number of another one.
create or replace function @schema@.token_broker_begin_ids() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    ids text := pg_get_serial_sequence(format('%I.%I', tg_table_schema, tg_table_name), 'id');
    of_sequence text := format('select case when is_called then last_value else last_value - 1 end from %s', ids);
    of_rows text := format('select greatest((select max(id) from %I.%I),
        (select max(row_id) from @schema@.changes where table_name = $1))', tg_table_schema, tg_table_name);
    taken bigint;
    known bigint;
begin
    execute of_sequence into taken;
    -- Without the cast, its type is `name`, whose collation keeps the index of `changes` from being used.
    execute of_rows into known using tg_table_name::text;
    if taken < known then
        -- Of several sessions, one corrects the sequence, and the others wait for its rows.
        perform pg_advisory_xact_lock(hashtextextended(ids, 0));
        execute of_sequence into taken;
        execute of_rows into known using tg_table_name::text;
        if taken < known then
            taken := setval(ids, known);
        end if;
    end if;
    perform set_config('token_broker.taken_' || tg_table_name, taken::text, true);
    return null;
end
$$;

revoke execute on function @schema@.token_broker_begin_ids() from public;

-- Does the same for `changes`, into which each changed row of another table inserts one, so that statements which need
-- no planning matter.
create or replace function @schema@.token_broker_begin_change_ids() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    taken bigint;
    known bigint;
begin
    select case when is_called then last_value else last_value - 1 end into taken from @schema@.changes_id_seq;
    select max(id) into known from @schema@.changes;
    if taken < known then
        perform pg_advisory_xact_lock(hashtextextended('changes_id_seq', 0));
        select case when is_called then last_value else last_value - 1 end into taken from @schema@.changes_id_seq;
        select max(id) into known from @schema@.changes;
        if taken < known then
            taken := setval('@schema@.changes_id_seq', known);
        end if;
    end if;
    perform set_config('token_broker.taken_changes', taken::text, true);
    return null;
end
$$;

revoke execute on function @schema@.token_broker_begin_change_ids() from public;

-- Refuses a row whose number this statement did not take from the sequence (token_broker_begin_ids): it comes from a
-- dump. Triggers record each row as a change of their own, so the rows of a dump and its `changes` would contradict each
-- other. A number that exists passes, for Postgres to find the conflict.
create or replace function @schema@.token_broker_new_id() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
    before bigint := nullif(current_setting('token_broker.taken_' || tg_table_name, true), '')::bigint;
    taken bigint;
    is_known boolean;
begin
    begin
        taken := currval(pg_get_serial_sequence(format('%I.%I', tg_table_schema, tg_table_name), 'id'));
    exception when object_not_in_prerequisite_state then
        null;
    end;
    -- Whoever sets the sequence takes no number: the last one of this session is not later than the last one of all.
    if new.id > before and new.id <= taken then
        return new;
    end if;
    execute format('select exists (select from %I.%I where id = $1)', tg_table_schema, tg_table_name)
        into is_known using new.id;
    if not is_known then
        raise exception using errcode = 'check_violation', column = 'id',
            message = format('%s.id is not to be set', tg_table_name),
            hint = 'To restore a dump, restore its schema and its data together into an empty database.';
    end if;
    return new;
end
$$;

revoke execute on function @schema@.token_broker_new_id() from public;

-- TRUNCATE runs no row triggers, so it would remove rows without recording the change.
create or replace function @schema@.token_broker_no_truncate() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp as $$
begin
    raise exception using errcode = 'insufficient_privilege',
        message = format('%s cannot be truncated; delete rows instead', tg_table_name);
end
$$;
