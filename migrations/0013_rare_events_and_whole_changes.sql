-- What auditors look for among millions of calls is rare: starts, gaps, changes, failed issues. Without an
-- index each such question reads every call of its time; with this one, which holds only those records, it
-- reads them alone. It costs a page or two for each day.

create index audit_events_rare on audit_events (event, at)
    where event in ('issue_failed', 'account_registered', 'account_changed', 'account_removed',
        'caller_changed', 'grant_changed', 'keys_changed', 'audit_gap', 'audit_pruned', 'chain_retired',
        'database_accepted', 'handshake_refused', 'started', 'stopped');

-- A new caller's rate and a new credential's end were not told.
create or replace function callers_changed() returns trigger
language plpgsql security definer as $$
declare
    what jsonb := '{}';
begin
    if tg_op = 'INSERT' then
        what := jsonb_strip_nulls(jsonb_build_object('rate_limit', new.rate_limit::text));
    elsif tg_op = 'UPDATE' then
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

create or replace function caller_credentials_changed() returns trigger
language plpgsql security definer as $$
declare
    it caller_credentials := case when tg_op = 'DELETE' then old else new end;
    what jsonb;
begin
    what := jsonb_strip_nulls(jsonb_build_object('credential', it.id::text, 'kind', it.kind,
        'identity', it.identity, 'ends_at', it.ends_at::text));
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

-- To say a function again takes its search path from it.
do $$
declare
    definer text;
begin
    foreach definer in array array['callers_changed()', 'caller_credentials_changed()'] loop
        execute format('alter function %s set search_path = %I, pg_temp', definer, current_schema());
    end loop;
end
$$;
