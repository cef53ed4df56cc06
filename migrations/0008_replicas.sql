-- Replicas announce themselves and acknowledge each other, calls to the upstream are counted where no admin's
-- transaction has a lock, and the rows that the broker keeps for an account are deleted when the account's
-- deletion is committed.

-- A random number of the process that the row is about. A process that finds another number in the row of its
-- instance knows that a copy of its state directory is in use. NULL: a release that does not announce itself.
alter table instances add column start_nonce text;
-- When the process stored its first heartbeat.
alter table instances add column announced_at timestamptz;
-- The numbers of the other processes of which this one knew before it stored the heartbeat.
alter table instances add column seen text[] not null default '{}';

-- The last credential that the upstream refused. If it is an account's previous one, it is not used again,
-- and dropped as soon as the account's row can be locked.
alter table refreshes add column refused_version bigint;

create index accounts_previous on accounts (id) where previous_secret is not null;

-- The calls to the upstream that are under way, which count towards the limit of concurrent calls. The table
-- refers to no other one: only brokers lock its rows, so a call can be removed whatever else is locked.
create table upstream_calls (
    account_id             bigint      primary key,
    lease_id               bigint      not null,
    -- The end of the lease. A call whose replica was killed counts until then.
    until                  timestamptz not null
);

-- A cascading delete would lock the rows of `refreshes` and `tokens` until an admin's transaction ends: a token
-- that is issued meanwhile could not be stored. A deferred trigger (repeatable/2_accounts.sql) deletes them at the
-- commit.
alter table refreshes drop constraint refreshes_account_id_fkey;
alter table tokens drop constraint tokens_account_id_fkey;
alter table tokens add foreign key (account_id) references refreshes on delete cascade;
