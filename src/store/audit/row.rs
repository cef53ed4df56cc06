//! Conversion of rows of `audit_events`.

use std::{collections::BTreeMap, fmt::Display};

use sqlx::types::Json;

use crate::{
    audit::chain::{Digest, StoredEvent},
    domain::clock::Timestamp,
    store::StoreError,
};

/// A row of `audit_events`.
pub(in crate::store) struct EventRow {
    pub(in crate::store) instance: String,
    pub(in crate::store) chain: String,
    pub(in crate::store) seq: i64,
    pub(in crate::store) at: Timestamp,
    pub(in crate::store) event: String,
    pub(in crate::store) caller: Option<String>,
    pub(in crate::store) caller_kind: Option<String>,
    pub(in crate::store) peer: Option<String>,
    pub(in crate::store) account: Option<String>,
    pub(in crate::store) outcome: String,
    pub(in crate::store) reason: Option<String>,
    pub(in crate::store) generation: Option<i64>,
    pub(in crate::store) token_fingerprint: Option<String>,
    pub(in crate::store) trace_id: Option<String>,
    pub(in crate::store) latency_us: Option<i64>,
    pub(in crate::store) count: i64,
    pub(in crate::store) detail: Json<BTreeMap<String, String>>,
    pub(in crate::store) prev_hash: Vec<u8>,
    pub(in crate::store) hash: Vec<u8>,
}

impl TryFrom<EventRow> for StoredEvent {
    type Error = StoreError;

    fn try_from(row: EventRow) -> Result<Self, StoreError> {
        let id = format_args!("{} {}", row.chain, row.seq);
        Ok(Self {
            prev_hash: digest("audit_events", id, &row.prev_hash)?,
            hash: digest("audit_events", id, &row.hash)?,
            instance: row.instance,
            chain: row.chain,
            seq: row.seq,
            at: row.at,
            event: row.event.into(),
            caller: row.caller,
            caller_kind: row.caller_kind.map(Into::into),
            peer: row.peer,
            account: row.account,
            outcome: row.outcome.into(),
            reason: row.reason,
            generation: row.generation,
            token_fingerprint: row.token_fingerprint,
            trace_id: row.trace_id,
            latency_us: row.latency_us,
            count: row.count,
            detail: row.detail.0,
        })
    }
}

/// Reads a hash of the row `id` of `table`.
pub(super) fn digest(
    table: &'static str,
    id: impl Display,
    bytes: &[u8],
) -> Result<Digest, StoreError> {
    Digest::from_bytes(bytes)
        .ok_or_else(|| StoreError::unreadable_row(table, id, "a hash is not a SHA-256"))
}
