-- Who changed what: written by triggers in the transaction of the change itself, so that there is
-- no change without its row and no row without its change. Replicas follow this table, and each row
-- becomes one audit event.
--
-- A session may say more of itself:
--     set token_broker.actor = 'jane@example.com'; set token_broker.reason = 'TICKET-1';

create table changes (
    id                     bigint generated always as identity primary key,
    -- The transaction, so that a reader can ask for what was committed since its last snapshot: a
    -- watermark by time or by id would miss a transaction that commits late.
    changed                xid8        not null default pg_current_xact_id(),
    at                     timestamptz not null default clock_timestamp(),
    table_name             text        not null,
    operation              text        not null,
    -- The changed row, and the name that people know it by.
    row_id                 bigint      not null,
    subject                text        not null,
    session_user_name      text        not null default session_user,
    client_address         text                 default host(inet_client_addr()),
    application_name       text                 default current_setting('application_name', true),
    actor                  text                 default nullif(current_setting('token_broker.actor', true), ''),
    reason                 text                 default nullif(current_setting('token_broker.reason', true), ''),
    -- Flat strings; never a secret.
    what                   jsonb       not null default '{}',
    -- The instance that writes the audit event, and when the event had reached `audit_events`.
    recorder               text,
    audited_at             timestamptz
);

create index changes_changed on changes (changed);
create index changes_unaudited on changes (id) where audited_at is null;

-- `a` and `b` when they differ, as `{"<name>": "a → b"}`.
create function token_broker_differs(name text, a text, b text) returns jsonb
language sql immutable as $$
    select case when a is distinct from b
        then jsonb_build_object(name, coalesce(a, 'none') || ' → ' || coalesce(b, 'none'))
        else '{}'::jsonb end
$$;

create function token_broker_change(
    table_name text, operation text, row_id bigint, subject text, what jsonb
) returns void
language sql as $$
    insert into changes (table_name, operation, row_id, subject, what)
    values (table_name, lower(operation), row_id, subject, what);
    select pg_notify('token_broker_changes', '');
$$;

create function accounts_changed() returns trigger
language plpgsql security definer as $$
declare
    what jsonb := '{}';
begin
    if tg_op = 'INSERT' then
        insert into refreshes (account_id) values (new.id);
        what := jsonb_build_object('client_id', new.client_id, 'enabled', new.enabled::text);
        perform token_broker_change('accounts', tg_op, new.id, new.name, what);
    elsif tg_op = 'UPDATE' then
        what := token_broker_differs('name', old.name, new.name)
            || token_broker_differs('client_id', old.client_id, new.client_id)
            || token_broker_differs('enabled', old.enabled::text, new.enabled::text)
            || token_broker_differs('description', old.description, new.description)
            || token_broker_differs('credential_version',
                old.credential_version::text, new.credential_version::text);
        if new.reissue_requested_at is distinct from old.reissue_requested_at then
            what := what || '{"reissue": "requested"}';
        end if;
        if old.client_secret is not null and new.client_secret is null
           and new.sealed_secret is not null then
            what := what || '{"secret": "sealed"}';
        end if;
        if old.previous_secret is not null and new.previous_secret is null then
            what := what || '{"previous_secret": "dropped"}';
        end if;
        perform token_broker_change('accounts', tg_op, new.id, new.name, what);
    else
        perform token_broker_change('accounts', tg_op, old.id, old.name,
            jsonb_build_object('client_id', old.client_id));
    end if;
    return null;
end
$$;

create trigger accounts_changed after insert or update or delete on accounts
    for each row execute function accounts_changed();

create function callers_changed() returns trigger
language plpgsql security definer as $$
declare
    what jsonb := '{}';
begin
    if tg_op = 'UPDATE' then
        what := token_broker_differs('name', old.name, new.name)
            || token_broker_differs('enabled', old.enabled::text, new.enabled::text)
            || token_broker_differs('rate_limit', old.rate_limit::text, new.rate_limit::text)
            || token_broker_differs('description', old.description, new.description);
    end if;
    if tg_op = 'DELETE' then
        perform token_broker_change('callers', tg_op, old.id, old.name, what);
    else
        perform token_broker_change('callers', tg_op, new.id, new.name, what);
    end if;
    return null;
end
$$;

create trigger callers_changed after insert or update or delete on callers
    for each row execute function callers_changed();

-- The name of a caller; its number once it is gone (a cascade removes it first).
create function token_broker_caller_name(caller bigint) returns text
language sql stable as $$
    select coalesce((select name from callers where id = caller), '#' || caller)
$$;

create function caller_credentials_changed() returns trigger
language plpgsql security definer as $$
declare
    it caller_credentials := case when tg_op = 'DELETE' then old else new end;
    what jsonb;
begin
    what := jsonb_strip_nulls(jsonb_build_object(
        'credential', it.id::text, 'kind', it.kind, 'identity', it.identity));
    if tg_op = 'UPDATE' then
        what := what
            || token_broker_differs('identity', old.identity, new.identity)
            || token_broker_differs('ends_at', old.ends_at::text, new.ends_at::text)
            || token_broker_differs('revoked_at', old.revoked_at::text, new.revoked_at::text);
        if new.bearer_sha256 is distinct from old.bearer_sha256 then
            what := what || '{"bearer": "replaced"}';
        end if;
    end if;
    perform token_broker_change('caller_credentials', tg_op, it.id,
        token_broker_caller_name(it.caller_id), what);
    return null;
end
$$;

create trigger caller_credentials_changed after insert or update or delete on caller_credentials
    for each row execute function caller_credentials_changed();

create function grants_changed() returns trigger
language plpgsql security definer as $$
declare
    it grants := case when tg_op = 'DELETE' then old else new end;
    what jsonb;
begin
    what := jsonb_strip_nulls(jsonb_build_object('grant', it.id::text, 'pattern', it.pattern,
        'rights', array_to_string(it.rights, ','), 'ends_at', it.ends_at::text));
    if tg_op = 'UPDATE' then
        what := what
            || token_broker_differs('pattern', old.pattern, new.pattern)
            || token_broker_differs('rights',
                array_to_string(old.rights, ','), array_to_string(new.rights, ','))
            || token_broker_differs('ends_at', old.ends_at::text, new.ends_at::text);
    end if;
    perform token_broker_change('grants', tg_op, it.id,
        token_broker_caller_name(it.caller_id), what);
    return null;
end
$$;

create trigger grants_changed after insert or update or delete on grants
    for each row execute function grants_changed();

-- TRUNCATE would end rows without a trace.
create function token_broker_no_truncate() returns trigger
language plpgsql as $$
begin
    raise exception using errcode = 'insufficient_privilege',
        message = format('%s cannot be truncated; delete rows instead', tg_table_name);
end
$$;

create trigger accounts_no_truncate before truncate on accounts
    for each statement execute function token_broker_no_truncate();
create trigger callers_no_truncate before truncate on callers
    for each statement execute function token_broker_no_truncate();
create trigger caller_credentials_no_truncate before truncate on caller_credentials
    for each statement execute function token_broker_no_truncate();
create trigger grants_no_truncate before truncate on grants
    for each statement execute function token_broker_no_truncate();
