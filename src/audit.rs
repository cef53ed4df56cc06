//! The audit log: a record is durable in the journal before the answer leaves, and reaches
//! `audit_events` in Postgres exactly once.
//!
//! [`record`] is what happened, [`fold`] one record for many refusals; [`chain`] gives it its number and hash; [`journal`] keeps it on
//! disk; [`ship`] delivers it. `docs/audit-format.md` describes files and hashes for others.

pub mod chain;
pub mod export;
pub mod fold;
pub mod journal;
mod moment;
pub mod notary;
pub mod record;
pub mod runs;
pub mod ship;
pub mod signed;
pub mod verify;
