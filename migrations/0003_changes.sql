-- The log of changes: what was changed, and by which login. Triggers write a row in the transaction of the
-- change itself, so that there is no change without its row and no row without its change. Replicas follow this
-- table to update their caches, and each row becomes one audit record. The functions are in
-- repeatable/1_common.sql.
--
-- A session can say who acts and why:
--     set token_broker.actor = 'jane@example.com'; set token_broker.reason = 'TICKET-1';

create table changes (
    id                     bigint generated always as identity primary key,
    -- The transaction, so that a reader can select what was committed since its last snapshot. A
    -- watermark by time or by id would miss a transaction that commits late.
    changed                xid8        not null default pg_current_xact_id(),
    at                     timestamptz not null default clock_timestamp(),
    table_name             text        not null,
    operation              text        not null,
    -- The changed row, and its name.
    row_id                 bigint      not null,
    subject                text        not null,
    session_user_name      text        not null default session_user,
    client_address         text                 default host(inet_client_addr()),
    application_name       text                 default current_setting('application_name', true),
    actor                  text                 default nullif(current_setting('token_broker.actor', true), ''),
    reason                 text                 default nullif(current_setting('token_broker.reason', true), ''),
    -- An object whose values are strings; never a secret.
    what                   jsonb       not null default '{}',
    -- The instance that writes the audit record, and when the record had reached `audit_events`.
    recorder               text,
    audited_at             timestamptz
);

create index changes_changed on changes (changed);
create index changes_unaudited on changes (id) where audited_at is null;
