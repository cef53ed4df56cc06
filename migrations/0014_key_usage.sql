-- Keys are rotated while brokers run: see `docs/keys.md`.

-- The keys that a replica may still make values with, or needs for secrets that it holds; NULL: its release does not
-- say. Another key can be retired as far as this replica is concerned.
alter table instances add column used_key_ids text[];
