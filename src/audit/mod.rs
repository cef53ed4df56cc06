//! The audit log: a record of each call, issue and change, chained by hashes so that later edits show.
//!
//! A record is durable in the local journal before the call that it describes is answered. Delivery then
//! copies it to the table `audit_events` in Postgres, exactly once and in order.
//!
//! | module | does |
//! |---|---|
//! | [`record`] | describes one event before it has a position in a chain |
//! | [`chain`] | numbers and hashes records; [`StoredEvent`](chain::StoredEvent) is the result |
//! | [`journal`] | makes records durable on the local disk |
//! | [`lost`] | names records that another program removed before they were delivered |
//! | [`checkpoint`] | defines signed checkpoints of a chain, and signed receipts of removed records |
//! | [`checkpoint_signer`] | signs a checkpoint of this start's chain at an interval |
//! | [`pruning`] | finds the contiguous ranges of records that retention is about to remove |
//! | [`verify`] | checks a log, from whichever source its records come |
//! | [`export`] | defines the line format of `audit export` |
//! | [`unreadable`] | describes a row that cannot be decoded |
//!
//! [`crate::services::journal_delivery`] delivers the journal and [`crate::store::audit`] holds the SQL.
//! `docs/audit-format.md` describes files, hashes and signatures for other implementations.

pub mod chain;
pub mod checkpoint;
pub mod checkpoint_signer;
pub mod export;
pub mod journal;
mod json_error;
pub mod lost;
mod netstring;
pub mod pruning;
pub mod record;
mod timestamp_format;
pub mod unreadable;
pub mod verify;
