//! Tests that run the program as a process, because they need signals, crashes, environment variables or a
//! shell.

mod agent;
mod agent_examples;
mod audit_commands;
mod bulk_accounts;
mod bulk_callers;
#[cfg(feature = "embedded-postgres")]
mod canaries;
mod check;
#[cfg(feature = "embedded-postgres")]
mod clocks;
mod compression;
mod connection_hints;
mod crashes;
#[cfg(feature = "embedded-postgres")]
mod database_crashes;
mod database_urls;
mod deadlines;
#[cfg(feature = "embedded-postgres")]
mod dev;
#[cfg(feature = "embedded-postgres")]
mod disruptions;
mod drain;
mod endless_files;
#[cfg(feature = "embedded-postgres")]
mod failovers;
mod floods;
#[cfg(feature = "embedded-postgres")]
mod grpcurl;
mod identities;
mod keyring_changes;
mod live_token;
mod pasted;
mod privileges;
mod quoted_input;
mod removed_files;
mod reviews;
#[cfg(feature = "embedded-postgres")]
mod rotation;
mod secrets;
mod shell;
mod signals;
mod tls_recipe;
mod trust_anchor;
mod twins;
mod unread_log;
