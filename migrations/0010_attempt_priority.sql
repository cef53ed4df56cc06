-- The priority class of an account's last attempt, so that all replicas together leave places for accounts
-- that did not fail. NULL in the rows that an earlier release wrote.
alter table refreshes add column attempt_priority text;
