//! Hash chains: the number and hash of each record, and the link from one chain to the next.
//!
//! `docs/audit-format.md` describes the same for other implementations: a change here needs a
//! change there.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use aws_lc_rs::digest;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{
    netstring::{push_integer, push_optional_integer, push_optional_text, push_text},
    timestamp_format,
};
use crate::{audit::record::Record, domain::clock::Timestamp};

/// Prefix of the hashed bytes. It keeps these hashes distinct from any other use of SHA-256.
const HASH_DOMAIN: &[u8] = b"token-broker audit event v1\n";
/// Longest text of a column, in characters. What exceeds it is replaced by `…`.
const MAX_TEXT_CHARS: usize = 4_096;
/// Most pairs that `detail` keeps. A further pair then says how many were omitted.
const MAX_DETAILS: usize = 64;

/// A SHA-256 hash. Written as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// `prev_hash` of the first record of an instance's first chain.
    pub const ZERO: Self = Self([0; 32]);

    /// Returns the hash with these bytes, or `None` unless there are exactly 32.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = [0; 64];
        hex::encode_to_slice(self.0, &mut text).map_err(serde::ser::Error::custom)?;
        serializer.serialize_str(str::from_utf8(&text).map_err(serde::ser::Error::custom)?)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(&*text, &mut bytes).map_err(de::Error::custom)?;
        Ok(Self(bytes))
    }
}

/// The number and hash of a chain's last record. The hash covers every record before it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ChainHead {
    /// The record's `seq`; 0 before the first record.
    pub seq: i64,
    /// The record's hash. Before the first record, the hash that the chain is linked to.
    pub hash: Digest,
}

/// Identity of a chain, and its link to the same instance's previous chain.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ChainLink {
    /// The instance that writes the chain.
    pub instance: String,
    /// The chain's globally unique name: `c`, the start's number in 8 digits, `-`, and 16 random
    /// hexadecimal digits.
    pub chain: String,
    /// When the broker opened the chain, which it does once at each start.
    #[serde(with = "timestamp_format")]
    pub started_at: Timestamp,
    /// The previous chain in the same state directory; `None` for the first one.
    pub linked_chain: Option<String>,
    /// `seq` of the previous chain's last record; 0 if there is no previous chain or it is empty.
    pub linked_seq: i64,
    /// Hash of the previous chain's last record, which is this chain's first `prev_hash`; zeros if
    /// there is no previous chain.
    pub linked_hash: Digest,
}

impl ChainLink {
    /// Returns the chain's head before its first record.
    #[must_use]
    pub fn root(&self) -> ChainHead {
        ChainHead { seq: 0, hash: self.linked_hash }
    }
}

/// A record with its position in a chain: a row of `audit_events`, and a line of the journal and of
/// exports.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[expect(
    missing_docs,
    reason = "`Record` documents these columns, `ChainHead` those of the position"
)]
pub struct StoredEvent {
    pub instance: String,
    pub chain: String,
    pub seq: i64,
    /// In whole microseconds, which is the precision of the hash and of Postgres.
    #[serde(with = "timestamp_format")]
    pub at: Timestamp,
    pub event: Cow<'static, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caller: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caller_kind: Option<Cow<'static, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    pub outcome: Cow<'static, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "decimal_string")]
    pub generation: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_fingerprint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_us: Option<i64>,
    pub count: i64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub detail: BTreeMap<String, String>,
    pub prev_hash: Digest,
    pub hash: Digest,
}

impl StoredEvent {
    /// Converts `record` to the stored form, without a position: [`StoredEvent::link_after`] gives
    /// it one.
    ///
    /// Any record is accepted. `at` is rounded down to microseconds and limited to the years 1970
    /// to 9999, control characters are escaped, and overlong text is truncated.
    #[must_use]
    pub fn from_record(record: Record, link: &ChainLink) -> Self {
        Self {
            instance: link.instance.clone(),
            chain: link.chain.clone(),
            seq: 0,
            at: timestamp_format::limit(record.at),
            event: record.event.as_str().into(),
            caller: record.caller.map(limit_text),
            caller_kind: record.caller_kind.map(Cow::Borrowed),
            peer: record.peer.map(limit_text),
            account: record.account.map(limit_text),
            outcome: record.outcome.into(),
            reason: record.reason.map(limit_text),
            generation: record.generation,
            token_fingerprint: record.token_fingerprint.map(limit_text),
            trace_id: record.trace_id.map(limit_text),
            latency_us: record.latency_us,
            count: record.count,
            detail: limit_detail(record.detail),
            prev_hash: Digest::ZERO,
            hash: Digest::ZERO,
        }
    }

    /// Makes this the record after `head`, and moves `head` to it.
    pub fn link_after(&mut self, head: &mut ChainHead) {
        self.seq = head.seq + 1;
        self.prev_hash = head.hash;
        self.hash = self.computed_hash();
        *head = self.head();
    }

    /// Returns the chain's head when this is the last record.
    #[must_use]
    pub fn head(&self) -> ChainHead {
        ChainHead { seq: self.seq, hash: self.hash }
    }

    /// Computes the hash that the record should have: SHA-256 over the domain prefix, `prev_hash`
    /// and the canonical bytes.
    #[must_use]
    pub fn computed_hash(&self) -> Digest {
        let mut bytes = Vec::with_capacity(640);
        bytes.extend_from_slice(HASH_DOMAIN);
        bytes.extend_from_slice(&self.prev_hash.0);
        self.push_canonical(&mut bytes);
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, &bytes).as_ref());
        Digest(hash)
    }

    /// Checks that this is the unmodified record right after `head`.
    ///
    /// # Errors
    /// Returns what is wrong, in words.
    pub fn follows(&self, head: ChainHead) -> Result<(), &'static str> {
        if self.seq != head.seq + 1 {
            return Err("its seq is not the previous record's plus one");
        }
        if self.prev_hash != head.hash {
            return Err("its prev_hash is not the previous record's hash");
        }
        if self.computed_hash() != self.hash {
            return Err("its hash does not match its content");
        }
        Ok(())
    }

    /// Appends all columns but the two hashes, in a fixed order, each as a netstring.
    fn push_canonical(&self, out: &mut Vec<u8>) {
        push_text(out, &self.instance);
        push_text(out, &self.chain);
        push_integer(out, self.seq);
        push_integer(out, self.at.timestamp_micros());
        push_text(out, &*self.event);
        push_optional_text(out, self.caller.as_deref());
        push_optional_text(out, self.caller_kind.as_deref());
        push_optional_text(out, self.peer.as_deref());
        push_optional_text(out, self.account.as_deref());
        push_text(out, &*self.outcome);
        push_optional_text(out, self.reason.as_deref());
        push_optional_integer(out, self.generation);
        push_optional_text(out, self.token_fingerprint.as_deref());
        push_optional_text(out, self.trace_id.as_deref());
        push_optional_integer(out, self.latency_us);
        push_integer(out, self.count);
        let mut pairs = Vec::new();
        for (key, value) in &self.detail {
            push_text(&mut pairs, key);
            push_text(&mut pairs, value);
        }
        push_text(out, pairs);
    }
}

/// Escapes control characters and truncates overlong text. This protects the log against text that no
/// setter has sanitized; it does not change the output of [`crate::audit::record::sanitize`].
fn limit_text(text: String) -> String {
    let plain = |b: u8| (b' '..=b'~').contains(&b);
    if text.len() <= MAX_TEXT_CHARS && text.bytes().all(plain) {
        return text;
    }
    let mut limited = String::with_capacity(text.len().min(MAX_TEXT_CHARS));
    for (nth, c) in text.chars().enumerate() {
        if nth == MAX_TEXT_CHARS {
            limited.push('…');
            break;
        }
        if c.is_control() {
            limited.extend(c.escape_unicode());
        } else {
            limited.push(c);
        }
    }
    limited
}

fn limit_detail(detail: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let omitted = detail.len().saturating_sub(MAX_DETAILS);
    let mut limited: BTreeMap<_, _> = detail
        .into_iter()
        .take(MAX_DETAILS)
        .map(|(key, value)| (limit_text(key), limit_text(value)))
        .collect();
    if omitted > 0 {
        limited.insert("…".into(), format!("{omitted} left out"));
    }
    limited
}

/// Serializes integers as JSON strings, as protobuf does, since many readers lose digits beyond
/// 2^53. Numbers are accepted when reading: early builds wrote them.
mod decimal_string {
    use serde::{Deserialize, Deserializer, Serializer, de};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum TextOrNumber {
        Text(String),
        Number(i64),
    }

    #[expect(clippy::ref_option, reason = "serde's signature")]
    pub(super) fn serialize<S: Serializer>(
        number: &Option<i64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match number {
            Some(number) => serializer.collect_str(number),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<i64>, D::Error> {
        match Option::deserialize(deserializer)? {
            Some(TextOrNumber::Text(text)) => text.parse().map(Some).map_err(de::Error::custom),
            Some(TextOrNumber::Number(number)) => Ok(Some(number)),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;
    use crate::audit::record::Event;

    /// Generates any record, including ones that no producer should make.
    pub(crate) fn any_record() -> impl Strategy<Value = Record> {
        let text = || proptest::option::of(any::<String>());
        let number = || proptest::option::of(any::<i64>());
        let event = prop_oneof![Just(Event::GetToken), Just(Event::TokenIssued)];
        let detail = proptest::collection::btree_map(any::<String>(), any::<String>(), 0..4);
        (
            (any::<i64>(), event, text(), text(), text(), text()),
            (number(), text(), text(), number(), any::<i64>(), detail),
        )
            .prop_map(|((at, event, caller, peer, account, reason), rest)| {
                let (generation, token_fingerprint, trace_id, latency_us, count, detail) = rest;
                let at = DateTime::from_timestamp_nanos(at);
                Record {
                    caller,
                    caller_kind: Some("bearer"),
                    peer,
                    account,
                    reason,
                    generation,
                    token_fingerprint,
                    trace_id,
                    latency_us,
                    count,
                    detail,
                    ..Record::new(at, event)
                }
            })
    }

    pub(crate) fn link() -> ChainLink {
        ChainLink {
            instance: "i-0123456789abcdef".into(),
            chain: "c00000001-0123456789abcdef".into(),
            started_at: DateTime::UNIX_EPOCH,
            linked_chain: None,
            linked_seq: 0,
            linked_hash: Digest::ZERO,
        }
    }

    /// `docs/audit-format.md` contains this record and this hash.
    #[test]
    fn the_documented_example_has_the_documented_hash() {
        let at = DateTime::from_timestamp_micros(1_717_138_601_944_000).unwrap();
        let mut record = Record::new(at, Event::GetToken).with("region", "서울").with("a", "1");
        record.caller = Some("billing".into());
        record.caller_kind = Some("bearer");
        record.account = Some("acme-prod".into());
        record.generation = Some(7);
        let mut event = StoredEvent::from_record(record, &link());
        event.link_after(&mut link().root());
        let mut canonical = Vec::new();
        event.push_canonical(&mut canonical);
        assert_eq!(
            String::from_utf8(canonical).unwrap(),
            "18:i-0123456789abcdef,26:c00000001-0123456789abcdef,1:1,16:1717138601944000,\
             9:get_token,7:billing,6:bearer,-9:acme-prod,2:ok,-1:7,---1:1,\
             26:1:a,1:1,6:region,6:서울,,"
        );
        assert_eq!(
            event.hash.to_string(),
            "5125a2c7a20c5ea2cda786c0ece83918d6316c673ef183f58a09915c1ef41768"
        );
    }

    #[test]
    fn a_generation_is_written_as_a_json_string_and_read_from_a_string_or_a_number() {
        let mut record = Record::new(DateTime::UNIX_EPOCH, Event::GetToken);
        record.generation = Some(i64::MAX);
        let event = StoredEvent::from_record(record, &link());
        let line = serde_json::to_string(&event).unwrap();
        let (text, number) = ("\"9223372036854775807\"", "9223372036854775807");
        assert!(line.contains(&format!("\"generation\":{text},")), "{line}");
        let earlier: StoredEvent = serde_json::from_str(&line.replace(text, number)).unwrap();
        assert_eq!(earlier, event);
        for wrong in ["\"\"", "\"1.5\"", "1.5", "true", "\"9223372036854775808\""] {
            assert!(serde_json::from_str::<StoredEvent>(&line.replace(text, wrong)).is_err());
        }
    }

    #[test]
    fn every_column_changes_the_hash() {
        let mut event =
            StoredEvent::from_record(Record::new(DateTime::UNIX_EPOCH, Event::GetToken), &link());
        event.link_after(&mut link().root());
        let edits: [fn(&mut StoredEvent); 18] = [
            |e| e.instance.push('x'),
            |e| e.chain.push('x'),
            |e| e.seq += 1,
            |e| e.at += chrono::TimeDelta::microseconds(1),
            |e| e.event = "x".into(),
            |e| e.caller = Some(String::new()),
            |e| e.caller_kind = Some("".into()),
            |e| e.peer = Some(String::new()),
            |e| e.account = Some(String::new()),
            |e| e.outcome = "x".into(),
            |e| e.reason = Some(String::new()),
            |e| e.generation = Some(0),
            |e| e.token_fingerprint = Some(String::new()),
            |e| e.trace_id = Some(String::new()),
            |e| e.latency_us = Some(0),
            |e| e.count += 1,
            |e| drop(e.detail.insert(String::new(), String::new())),
            |e| e.prev_hash.0[31] ^= 1,
        ];
        let mut hashes = vec![event.hash];
        for edit in edits {
            let mut edited = event.clone();
            edit(&mut edited);
            hashes.push(edited.computed_hash());
        }
        let distinct: std::collections::HashSet<_> = hashes.iter().collect();
        assert_eq!(distinct.len(), hashes.len());
    }

    proptest! {
        #[test]
        fn any_record_reads_back_from_its_line_with_the_same_hash(record in any_record()) {
            let mut event = StoredEvent::from_record(record, &link());
            event.link_after(&mut link().root());
            let line = serde_json::to_string(&event).unwrap();
            prop_assert!(!line.chars().any(char::is_control));
            let read: StoredEvent = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(read.computed_hash(), event.hash);
            prop_assert_eq!(read.follows(link().root()), Ok(()));
            prop_assert_eq!(read, event);
        }

        #[test]
        fn sanitized_text_passes_unchanged(text in any::<String>()) {
            let clean = crate::audit::record::sanitize(&text);
            prop_assert_eq!(limit_text(clean.clone()), clean);
        }
    }
}
