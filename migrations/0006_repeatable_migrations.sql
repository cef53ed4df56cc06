-- Which version of each file of migrations/repeatable this database has. `migrate` writes it.

create table repeatable_migrations (
    -- The file's name without its number and ending.
    name                   text        primary key,
    -- From the file's first line. `migrate` never replaces a version by an older one.
    version                integer     not null,
    -- The SHA-384 of the file.
    checksum               bytea       not null,
    applied_at             timestamptz not null default now()
);
