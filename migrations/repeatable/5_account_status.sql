-- version: 5 (raise it with each change of this file)
--
-- The view for admins: the state of each account, and a hint at what to do about it. `create or replace view`
-- keeps the grants on it, but can only add columns at the end.
--
-- All times are by the database's clock. A token that was issued later than now tells that this clock was set
-- back: nobody knows how far, so the token is not called fresh.

-- Names are resolved in pg_catalog alone. Our own objects are named with their schema, for which `@schema@`
-- stands. So nobody can put another object in the place of the one that is meant.
set local search_path = pg_catalog, pg_temp;

create or replace view @schema@.account_status as
with moment as (select now() as at),
known as (
    select a.*, r.lease_until, r.attempt_started_at, r.consecutive_failures, r.error_class,
        r.error_code, r.error_message, r.possibly_revoked, t.allowed_ip, t.generation, moment.at,
        -- Clients cannot represent every time that Postgres can, such as `infinity`.
        case when r.next_attempt_at between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
            then r.next_attempt_at end as next_attempt_at,
        case when r.new_secret_retry_at between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
            then r.new_secret_retry_at end as new_secret_retry_at,
        case when r.last_requested_at between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
            then r.last_requested_at end as last_requested_at,
        case when t.expires_at between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
            then t.expires_at end as expires_at,
        case when t.issued_at between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
            then t.issued_at end as issued_at,
        coalesce(t.expires_at > moment.at, false) as live,
        coalesce(t.issued_at > moment.at + interval '5 seconds', false) as issued_in_future,
        coalesce(t.repeated_at >= t.issued_at, false) as repeated,
        coalesce(r.lease_until > moment.at, false) as leased,
        r.error_class is not null and r.error_version = a.credential_version as failing,
        -- What a broker cannot read, since it was written while the triggers were disabled; NULL if nothing.
        case
            when a.name !~ '^[a-z0-9][a-z0-9._-]{0,62}$' then 'accounts.name'
            when char_length(a.client_id) not between 1 and 20
                or a.client_id ~ '[\u0001-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]'
                then 'accounts.client_id'
            when a.reissue_requested_at not between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then 'accounts.reissue_requested_at'
            when r.attempt_started_at not between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then 'refreshes.attempt_started_at'
            when r.lease_until not between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then 'refreshes.lease_until'
            when r.next_attempt_at not between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then 'refreshes.next_attempt_at'
            when r.new_secret_retry_at not between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then 'refreshes.new_secret_retry_at'
            when r.interval_exceptions_since
                not between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then 'refreshes.interval_exceptions_since'
            when r.answered_reissue not between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then 'refreshes.answered_reissue'
            -- Nothing could follow on such a number.
            when r.lease_id not between 0 and 4611686018427387903 then 'refreshes.lease_id'
            when r.consecutive_failures not between 0 and 1073741823 then 'refreshes.consecutive_failures'
            when t.generation not between 0 and 4611686018427387903 then 'tokens.generation'
            when t.issuer_expires_at
                not between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then 'tokens.issuer_expires_at'
            when t.issued_at not between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then 'tokens.issued_at'
            when t.expires_at not between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then 'tokens.expires_at'
            when t.repeated_at not between timestamptz '1970-01-01 00:00Z' and timestamptz '9999-12-31 00:00Z'
                then 'tokens.repeated_at'
        end as unusable
    from moment, @schema@.accounts a
    left join @schema@.refreshes r on r.account_id = a.id
    -- A token of an earlier login is not the account's.
    left join @schema@.tokens t on t.account_id = a.id and t.credential_version >= a.login_version
)
select
    name,
    client_id,
    case
        when not enabled then 'disabled'
        when unusable is not null then 'unusable'
        when failing and error_class in ('rejected', 'intake') then 'rejected'
        when failing and error_class = 'egress_rejected' then 'egress_rejected'
        when leased and live then 'refreshing'
        when failing then 'unreachable'
        when live and (possibly_revoked or issued_in_future or next_attempt_at <= at) then 'refreshing'
        when live then 'fresh'
        when expires_at is not null then 'expired'
        else 'pending'
    end as state,
    expires_at,
    case when live then
        date_trunc('second', least(expires_at - at, expires_at - issued_at))
    end as time_left,
    issued_at as last_issued_at,
    allowed_ip,
    generation,
    coalesce(consecutive_failures, 0) as consecutive_failures,
    case when error_class is not null then
        concat_ws(' ', error_code, error_message)
    end as last_error,
    -- While the previous secret issues as it should, what is still to come is the new one.
    coalesce(next_attempt_at, case when failing and previous_secret is not null then new_secret_retry_at end)
        as next_attempt_at,
    last_requested_at,
    case
        when not enabled then
            'enable it with: update accounts set enabled = true where name = ' || quote_literal(name)
        when unusable is not null then
            'no broker can use this row, which was written while the triggers were disabled: correct ' || unusable
        -- What was written may put right what follows.
        when client_secret is not null then 'waiting for a broker to seal the secret: is one running?'
        when failing and error_class = 'intake' and error_message ~ '^(the value opens, but its )?client secret ' then
            'what was written is not an API KEY (see last_error): set it again'
        when failing and error_class = 'intake' then
            'the sealed secret does not open with the broker''s keyring: seal it again for the current intake key'
                || case when previous_secret is null then '' else '; until then, the one before goes on issuing' end
        when failing and error_class = 'rejected' and previous_secret is not null then
            'the upstream refuses the new client_secret, and the one before goes on issuing: set the API KEY shown in the console'
        when failing and previous_secret is not null and consecutive_failures = 0 then
            'the new client_secret has not issued a token yet (see last_error), and the one before goes on issuing; the new one is tried again: check that it is the API KEY shown in the console'
        when failing and error_code = '61005' then
            'the upstream does not know this client_id: correct it (with its client_secret); nothing is retried until then'
        when failing and error_code = '61006' then
            'the upstream refuses this client_secret: set the API KEY shown in the console; nothing is retried until then'
        when failing and error_class = 'rejected' then
            'the upstream refuses this credential: correct client_id or client_secret; nothing is retried until then'
        when failing and error_class = 'egress_rejected' then
            'the upstream refuses the account or the address we call from: check the console''s registered addresses and whether the account is locked'
        when failing and live then
            'the upstream does not answer as it should; the live token is served and the issue retried'
        when failing then
            'the upstream does not answer as it should; the issue is retried'
        when sealed_secret is null and previous_secret is not null then
            'client_secret was emptied before a broker sealed it, so the one before it goes on issuing: set it again'
        when sealed_secret is null and live then
            'client_secret was emptied before a broker sealed it, so nothing replaces the live token: set it again'
        when sealed_secret is null then
            'client_secret was emptied before a broker sealed it, so no token can be issued: set it again'
        when live and issued_in_future then
            'the database''s clock was set back since the token was issued; the token is being replaced'
        when expires_at is null then 'the first token is on its way'
        when not live then 'the last token ended; a new one is on its way: is a broker running?'
        when repeated then
            'the upstream repeats its token: it gave the same one again instead of a new one, which is asked for when this one ends'
        else ''
    end as hint,
    -- Whether a secret was written that no broker has compared and sealed yet.
    client_secret is not null as secret_waits
from known;
