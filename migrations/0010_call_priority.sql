-- The priority class of a call to the upstream, so that all replicas together leave places for accounts that did
-- not fail.
alter table upstream_calls add column priority text not null;
