//! A record's place in its chain, and the hash that proves it.
//!
//! `docs/audit-format.md` says the same for a second implementation; change both or neither.

use std::{borrow::Cow, collections::BTreeMap, fmt, io::Write};

use aws_lc_rs::digest;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::timestamp_format;
use crate::{audit::record::Record, domain::clock::Timestamp};

/// What separates these hashes from all others that are made with SHA-256.
const DOMAIN: &[u8] = b"token-broker audit event v1\n";
/// The longest text in a column, in characters.
const LONGEST_TEXT: usize = 4_096;
/// The most pairs in `detail`.
const MOST_DETAILS: usize = 64;

/// A SHA-256.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// What comes before everything.
    pub const ZERO: Self = Self([0; 32]);

    /// Takes 32 bytes; `None` if there are more or fewer.
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

/// The last record of a chain: everything before it is proven by its hash.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ChainHead {
    /// Its number; 0 before the first record.
    pub seq: i64,
    /// Its hash; before the first record, the hash that the chain is linked to.
    pub hash: Digest,
}

/// Whose chain it is, and how it is linked to the instance's chain before it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ChainLink {
    /// Whose.
    pub instance: String,
    /// Its name, unique in the world: `c`, the number of the start, `-`, 16 random hexadecimal
    /// digits.
    pub chain: String,
    /// When it was opened.
    #[serde(with = "timestamp_format")]
    pub started_at: Timestamp,
    /// The chain before it in the same state directory.
    pub linked_chain: Option<String>,
    /// That chain's last number; 0 if there was no chain or it was empty.
    pub linked_seq: i64,
    /// That chain's last hash, which is this chain's first `prev_hash`; zeros if there was none.
    pub linked_hash: Digest,
}

impl ChainLink {
    /// The chain's head before its first record.
    #[must_use]
    pub fn root(&self) -> ChainHead {
        ChainHead { seq: 0, hash: self.linked_hash }
    }
}

/// A record in its place: the columns of `audit_events`, and a line of the journal.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[expect(missing_docs, reason = "`Record` documents what happened, `ChainHead` the place")]
pub struct StoredEvent {
    pub instance: String,
    pub chain: String,
    pub seq: i64,
    /// In whole microseconds.
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
    #[serde(default, skip_serializing_if = "Option::is_none", with = "exact")]
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
    /// Makes `record` fit for the log, whatever it holds: `at` is cut to microseconds and kept in
    /// the years 1970 to 9999, control characters are escaped, overlong text is cut. It has no place
    /// yet: see [`StoredEvent::place`].
    #[must_use]
    pub fn unplaced(record: Record, link: &ChainLink) -> Self {
        Self {
            instance: link.instance.clone(),
            chain: link.chain.clone(),
            seq: 0,
            at: timestamp_format::fit(record.at),
            event: record.event.as_str().into(),
            caller: record.caller.map(fit),
            caller_kind: record.caller_kind.map(Cow::Borrowed),
            peer: record.peer.map(fit),
            account: record.account.map(fit),
            outcome: record.outcome.into(),
            reason: record.reason.map(fit),
            generation: record.generation,
            token_fingerprint: record.token_fingerprint.map(fit),
            trace_id: record.trace_id.map(fit),
            latency_us: record.latency_us,
            count: record.count,
            detail: fit_detail(record.detail),
            prev_hash: Digest::ZERO,
            hash: Digest::ZERO,
        }
    }

    /// Puts it right after `head`, whose successor it becomes.
    pub fn place(&mut self, head: &mut ChainHead) {
        self.seq = head.seq + 1;
        self.prev_hash = head.hash;
        self.hash = self.computed_hash();
        *head = self.head();
    }

    /// The chain's head once this is its last record.
    #[must_use]
    pub fn head(&self) -> ChainHead {
        ChainHead { seq: self.seq, hash: self.hash }
    }

    /// The hash that it should have: SHA-256 over the domain, `prev_hash` and the canonical bytes.
    #[must_use]
    pub fn computed_hash(&self) -> Digest {
        let mut bytes = Vec::with_capacity(640);
        bytes.extend_from_slice(DOMAIN);
        bytes.extend_from_slice(&self.prev_hash.0);
        self.canonical(&mut bytes);
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, &bytes).as_ref());
        Digest(hash)
    }

    /// Whether it is the successor of `head`, unchanged.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn follows(&self, head: ChainHead) -> Result<(), &'static str> {
        if self.seq != head.seq + 1 {
            return Err("the number does not follow the one before");
        }
        if self.prev_hash != head.hash {
            return Err("prev_hash is not the hash of the record before");
        }
        if self.computed_hash() != self.hash {
            return Err("the hash does not match the record");
        }
        Ok(())
    }

    /// The columns in their order, each a netstring, an absent one `-`.
    fn canonical(&self, out: &mut Vec<u8>) {
        netstring(out, &self.instance);
        netstring(out, &self.chain);
        integer(out, self.seq);
        integer(out, self.at.timestamp_micros());
        netstring(out, &*self.event);
        optional(out, self.caller.as_deref());
        optional(out, self.caller_kind.as_deref());
        optional(out, self.peer.as_deref());
        optional(out, self.account.as_deref());
        netstring(out, &*self.outcome);
        optional(out, self.reason.as_deref());
        optional_integer(out, self.generation);
        optional(out, self.token_fingerprint.as_deref());
        optional(out, self.trace_id.as_deref());
        optional_integer(out, self.latency_us);
        integer(out, self.count);
        let mut pairs = Vec::new();
        for (key, value) in &self.detail {
            netstring(&mut pairs, key);
            netstring(&mut pairs, value);
        }
        netstring(out, pairs);
    }
}

pub(super) fn netstring(out: &mut Vec<u8>, value: impl AsRef<[u8]>) {
    let value = value.as_ref();
    decimal(out, value.len());
    out.push(b':');
    out.extend_from_slice(value);
    out.push(b',');
}

fn decimal(out: &mut Vec<u8>, number: impl fmt::Display) {
    write!(out, "{number}").expect("a Vec takes every byte");
}

pub(super) fn integer(out: &mut Vec<u8>, number: i64) {
    // The longest is i64::MIN, of 20 characters.
    let mut text = Vec::with_capacity(20);
    decimal(&mut text, number);
    netstring(out, text);
}

fn optional(out: &mut Vec<u8>, value: Option<&str>) {
    match value {
        Some(value) => netstring(out, value),
        None => out.push(b'-'),
    }
}

fn optional_integer(out: &mut Vec<u8>, value: Option<i64>) {
    match value {
        Some(value) => integer(out, value),
        None => out.push(b'-'),
    }
}

/// What [`crate::audit::record::clean`] makes passes unchanged; this is for text that came past it.
fn fit(text: String) -> String {
    let plain = |b: u8| (b' '..=b'~').contains(&b);
    if text.len() <= LONGEST_TEXT && text.bytes().all(plain) {
        return text;
    }
    let mut fit = String::with_capacity(text.len().min(LONGEST_TEXT));
    for (nth, c) in text.chars().enumerate() {
        if nth == LONGEST_TEXT {
            fit.push('…');
            break;
        }
        if c.is_control() {
            fit.extend(c.escape_unicode());
        } else {
            fit.push(c);
        }
    }
    fit
}

fn fit_detail(detail: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let left_out = detail.len().saturating_sub(MOST_DETAILS);
    let mut fitting: BTreeMap<_, _> =
        detail.into_iter().take(MOST_DETAILS).map(|(key, value)| (fit(key), fit(value))).collect();
    if left_out > 0 {
        fitting.insert("…".into(), format!("{left_out} left out"));
    }
    fitting
}

/// Integers that JSON is to carry as text, as protobuf's does: many readers cut a number beyond 2^53.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
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
            Some(Written::Text(text)) => text.parse().map(Some).map_err(de::Error::custom),
            Some(Written::Number(number)) => Ok(Some(number)),
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

    /// Any record at all, also one that no producer should make.
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

    /// `docs/audit-format.md` has this record and this hash too.
    #[test]
    fn the_documented_example_has_the_documented_hash() {
        let at = DateTime::from_timestamp_micros(1_717_138_601_944_000).unwrap();
        let mut record = Record::new(at, Event::GetToken).with("region", "서울").with("a", "1");
        record.caller = Some("billing".into());
        record.caller_kind = Some("bearer");
        record.account = Some("acme-prod".into());
        record.generation = Some(7);
        let mut event = StoredEvent::unplaced(record, &link());
        event.place(&mut link().root());
        let mut canonical = Vec::new();
        event.canonical(&mut canonical);
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
    fn a_generation_is_text_in_json_and_read_as_a_number_too() {
        let mut record = Record::new(DateTime::UNIX_EPOCH, Event::GetToken);
        record.generation = Some(i64::MAX);
        let event = StoredEvent::unplaced(record, &link());
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
            StoredEvent::unplaced(Record::new(DateTime::UNIX_EPOCH, Event::GetToken), &link());
        event.place(&mut link().root());
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
            let mut event = StoredEvent::unplaced(record, &link());
            event.place(&mut link().root());
            let line = serde_json::to_string(&event).unwrap();
            prop_assert!(!line.chars().any(char::is_control));
            let read: StoredEvent = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(read.computed_hash(), event.hash);
            prop_assert_eq!(read.follows(link().root()), Ok(()));
            prop_assert_eq!(read, event);
        }

        #[test]
        fn cleaned_text_passes_unchanged(text in any::<String>()) {
            let clean = crate::audit::record::clean(&text);
            prop_assert_eq!(fit(clean.clone()), clean);
        }
    }
}
