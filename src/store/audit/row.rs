//! Conversion of rows of the audit tables. Statements return types that the driver can decode whatever the
//! rows hold, and a row that is not a record becomes an [`Unreadable`].

use std::collections::BTreeMap;

use crate::{
    audit::{
        chain::{Digest, StoredEvent},
        unreadable::Unreadable,
    },
    domain::clock::Timestamp,
};

/// A row of the audit log, decoded, or why it cannot be.
pub type Decoded<T> = Result<T, Box<Unreadable>>;

/// A row of `audit_events`. Columns that must not be null are optional here all the same: an owner can drop
/// that constraint.
pub(in crate::store) struct EventRow {
    pub(in crate::store) instance: Option<String>,
    pub(in crate::store) chain: String,
    pub(in crate::store) seq: i64,
    /// Absent if it is not between the years 1970 and 9999.
    pub(in crate::store) at: Option<Timestamp>,
    pub(in crate::store) event: Option<String>,
    pub(in crate::store) caller: Option<String>,
    pub(in crate::store) caller_kind: Option<String>,
    pub(in crate::store) peer: Option<String>,
    pub(in crate::store) account: Option<String>,
    pub(in crate::store) outcome: Option<String>,
    pub(in crate::store) reason: Option<String>,
    pub(in crate::store) generation: Option<i64>,
    pub(in crate::store) token_fingerprint: Option<String>,
    pub(in crate::store) trace_id: Option<String>,
    pub(in crate::store) latency_us: Option<i64>,
    pub(in crate::store) count: Option<i64>,
    /// The JSON as text.
    pub(in crate::store) detail: Option<String>,
    pub(in crate::store) prev_hash: Option<Vec<u8>>,
    pub(in crate::store) hash: Option<Vec<u8>>,
}

impl EventRow {
    /// Returns the record that the row holds.
    pub(in crate::store) fn decode(self) -> Decoded<StoredEvent> {
        let digest = |bytes: &Option<Vec<u8>>| Digest::from_bytes(bytes.as_deref()?);
        let (prev_hash, hash) = (digest(&self.prev_hash), digest(&self.hash));
        let fault = |why: &str| {
            let row = Unreadable::row("audit_events", &self.chain, self.seq, why);
            Box::new(Unreadable { at: self.at, prev_hash, hash, ..*row })
        };
        let not_null = |column: &str| fault(&format!("{column} is null"));
        let detail = self.detail.as_deref().ok_or_else(|| not_null("detail"))?;
        let detail: BTreeMap<String, String> = serde_json::from_str(detail)
            .map_err(|_| fault("detail is not an object of strings"))?;
        Ok(StoredEvent {
            prev_hash: prev_hash.ok_or_else(|| fault("prev_hash is not a SHA-256"))?,
            hash: hash.ok_or_else(|| fault("hash is not a SHA-256"))?,
            at: self.at.ok_or_else(|| fault("at is not between the years 1970 and 9999"))?,
            count: self.count.ok_or_else(|| not_null("count"))?,
            instance: self.instance.clone().ok_or_else(|| not_null("instance"))?,
            event: self.event.clone().ok_or_else(|| not_null("event"))?.into(),
            outcome: self.outcome.clone().ok_or_else(|| not_null("outcome"))?.into(),
            chain: self.chain,
            seq: self.seq,
            caller: self.caller,
            caller_kind: self.caller_kind.map(Into::into),
            peer: self.peer,
            account: self.account,
            reason: self.reason,
            generation: self.generation,
            token_fingerprint: self.token_fingerprint,
            trace_id: self.trace_id,
            latency_us: self.latency_us,
            detail,
        })
    }
}

/// Reads the hash `column` of the row `chain`, `seq` of `table`.
pub(super) fn digest(
    table: &'static str,
    chain: &str,
    seq: i64,
    column: &str,
    bytes: Option<&[u8]>,
) -> Decoded<Digest> {
    bytes
        .and_then(Digest::from_bytes)
        .ok_or_else(|| Unreadable::row(table, chain, seq, format!("{column} is not a SHA-256")))
}
