//! The integration tests: real Postgres, a real upstream on loopback, the real binary.
#![cfg(test)]

mod harness;

mod accounts;
mod audit;
mod database_errors;
mod documents;
mod fuzzed;
#[cfg(feature = "embedded-postgres")]
mod identity;
mod inputs;
mod migrations;
mod outages;
#[cfg(feature = "embedded-postgres")]
mod postgres;
#[cfg(feature = "embedded-postgres")]
mod processes;
mod promises;
mod refresh;
mod refresh_rules;
mod restored;
mod roles;
mod serving;
mod upstream;
