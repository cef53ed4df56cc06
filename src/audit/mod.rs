//! The audit log: a record is durable in the journal before the answer leaves, and reaches
//! `audit_events` in Postgres exactly once.
//!
//! [`record`] is what happened; [`chain`] gives it its number and hash; [`journal`] keeps it on disk;
//! [`crate::services::journal_delivery`] delivers it. `docs/audit-format.md` describes files and hashes for others.

pub mod chain;
pub mod checkpoint;
pub mod checkpoint_signer;
pub mod export;
pub mod journal;
pub mod pruning;
pub mod record;
mod timestamp_format;
pub mod verify;
