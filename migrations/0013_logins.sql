-- A token belongs to the login that it was issued with.

-- The version of the first credential of the account's present login. Tokens of earlier versions belong to the login
-- before it, and are not served.
alter table accounts add column login_version bigint not null default 1;
