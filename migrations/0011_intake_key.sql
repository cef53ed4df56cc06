-- One published intake key is the one that secrets are sealed to: see `keys publish`. Events of keys are added to
-- the index of rare events.

update intake_keys set is_primary = false
where is_primary and key_id <> (
    select key_id from intake_keys where is_primary order by published_at desc, key_id limit 1);

create unique index intake_keys_primary on intake_keys (is_primary) where is_primary;

-- For the comparison of each row with its last recorded change.
create index changes_row on changes (table_name, row_id, id);

drop index audit_events_rare;
create index audit_events_uncommon on audit_events (event, at)
    where event in ('issue_failed', 'account_registered', 'account_changed', 'account_removed',
        'caller_changed', 'grant_changed', 'keys_changed', 'other_changed', 'audit_gap', 'audit_pruned',
        'chain_retired', 'database_accepted', 'handshake_refused', 'retention_changed', 'started', 'stopped');
