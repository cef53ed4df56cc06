-- Which database this is, so that a copy of it, or an older state of it, is not taken for it: its
-- accounts would be issued for twice, revoked bearers would be taken again, and a rotated secret would
-- be the one before. `serve --accept-restored` is how an admin says that this is meant.

alter table deployment
    -- Told apart from other deployments: each replica keeps it in its state directory.
    add column id                   text        not null default gen_random_uuid()::text,
    -- How often a restored database was accepted.
    add column epoch                bigint      not null default 1,
    -- Where it was when it was used last. A dump that is restored elsewhere, or a copy, tells
    -- another place than its own. A replica of the server that takes over is the same place.
    add column system_identifier    bigint,
    add column database_oid         bigint;
