//! Settings from flags, the environment and a TOML file, in this order of precedence.
//!
//! [`table`] lists the settings, [`Sources`] holds the values as they were given, and
//! [`Settings::resolve`] returns either all settings or one [`InvalidSettings`] that lists everything
//! that is wrong.
//!
//! To add a setting of `serve`:
//! 1. add a constant to [`table`] and list it in [`table::BROKER`]: this creates the flag, the
//!    environment variable, the key of the file and the help text;
//! 2. add a field to [`Settings`] and read it in `Settings::read`, with a function of `parse.rs`;
//! 3. use the field where the broker is built, in `app/`;
//! 4. add a row to the table in `docs/operations.md` (a test compares the two tables), and a malformed
//!    value to the test `every_bad_setting_gets_its_one_line`.

mod characters;
mod commands;
mod flags;
mod parse;
mod reader;
mod settings;
mod sources;
pub mod table;
mod urls;

pub use self::{
    commands::{
        AgentSettings, ClientSettings, HealthEndpoint, database_url, health_endpoint, intake_key,
        keyring_file, known_keyring_file, known_keys_file, migrate_database_url,
    },
    flags::{
        AgentFlags, BrokerFlags, ClientFlags, FlagGroup, Flags, IntakeKeyFlag, KeyringFlag,
        KnownKeyFlags, ListenFlag, MigrateFlag,
    },
    settings::Settings,
    sources::{InvalidSettings, Sources},
    urls::{DatabaseUrl, ProxyUrl},
};

#[cfg(test)]
mod tests;
