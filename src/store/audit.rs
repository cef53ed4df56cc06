//! The audit log in Postgres: delivery of records, queries, and consistent snapshots.
//!
//! The tables are `audit_chains` (one row per chain, with its delivered position), `audit_events` (the
//! records, partitioned by day), `audit_heads` (signed checkpoints) and `audit_pruning_receipts` (signed
//! receipts of removed records).

mod delivery;
mod events;
mod filter;
mod row;
mod snapshot;
mod usage;

pub(super) use self::row::EventRow;
pub use self::{
    delivery::{deliver, ensure_partition, register_chain, store_checkpoint},
    events::{events_after, latest_events},
    filter::EventFilter,
    row::Decoded,
    snapshot::AuditSnapshot,
    usage::{AccountUse, CallerUse},
};
pub use crate::audit::chain::StoredEvent;
