//! JSON that is read as far as possible.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use zeroize::Zeroizing;

use super::number::whole_number;

/// A JSON value that is read as far as possible: a number is kept as its text, and a part that cannot be read
/// does not make the whole unreadable.
pub(super) enum Json {
    Null,
    Bool(bool),
    Number(String),
    /// It may be a token, wherever it stands.
    Text(Zeroizing<String>),
    List(Vec<Self>),
    Object(Vec<(String, Self)>),
}

impl Json {
    /// Reads `levels` levels. What is below is read as text.
    pub(super) fn read(json: &str, levels: usize) -> Self {
        let text = |text: String| Self::Text(Zeroizing::new(text));
        let raw = || text(json.to_owned());
        let read = |json: &RawValue| Self::read(json.get(), levels.saturating_sub(1));
        match json.as_bytes().first() {
            Some(b'{' | b'[') if levels == 0 => raw(),
            Some(b'{') => serde_json::from_str(json).map_or_else(
                |_| raw(),
                |Members(members)| {
                    Self::Object(
                        members.into_iter().map(|(name, value)| (name, read(value))).collect(),
                    )
                },
            ),
            Some(b'[') => serde_json::from_str::<Vec<&RawValue>>(json).map_or_else(
                |_| raw(),
                |values| Self::List(values.into_iter().map(read).collect()),
            ),
            Some(b'"') => serde_json::from_str(json).map_or_else(|_| raw(), text),
            Some(b'n') => Self::Null,
            Some(b't' | b'f') => Self::Bool(json == "true"),
            _ => Self::Number(json.to_owned()),
        }
    }

    /// Returns a string's text, or that of a number, which is whole if the number is.
    pub(super) fn as_text(&self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text.to_string()),
            Self::Number(text) => {
                Some(whole_number(text).map_or_else(|| text.clone(), |whole| whole.to_string()))
            }
            _ => None,
        }
    }
}

/// Returns whether a value says nothing: `null`, or an empty string, list or object.
pub(super) fn is_blank(json: &RawValue) -> bool {
    let json = json.get();
    let inner = json.strip_prefix(['"', '[', '{']).and_then(|json| json.get(..json.len() - 1));
    json == "null" || inner.is_some_and(|inner| inner.trim().is_empty())
}

/// The members of an object, in their order.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
        let mut members = vec![];
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(Members(members))
    }
}

/// Replaces what JSON does not permit after a backslash: an escaped surrogate that is not one of a pair, such as one of a
/// message that was cut within a character, and the backslash of an escape that JSON does not have, such as `\'`. Both
/// become U+FFFD, which no token has, since it is not known what was meant.
pub(super) fn repair_escapes(text: &str) -> Zeroizing<String> {
    let escaped_unit = |text: &str| {
        let digits = text.get(..6)?.strip_prefix("\\u")?;
        let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hex.then(|| u16::from_str_radix(digits, 16).ok()).flatten()
    };
    // The capacity suffices: growing would leave a copy of a token behind in memory.
    let mut repaired = Zeroizing::new(String::with_capacity(3 * text.len()));
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        repaired.push_str(before);
        let second = || escape.get(6..).and_then(escaped_unit);
        let (permitted, replaced) = match (escaped_unit(escape), escape[1..].chars().next()) {
            (Some(0xd800..=0xdbff), _) if matches!(second(), Some(0xdc00..=0xdfff)) => (12, 0),
            (Some(0xd800..=0xdfff), _) => (0, 6),
            (Some(_), _) => (6, 0),
            (None, Some('"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't')) => (2, 0),
            (None, _) => (0, 1),
        };
        repaired.push_str(&escape[..permitted]);
        if replaced > 0 {
            repaired.push(char::REPLACEMENT_CHARACTER);
        }
        rest = &escape[permitted + replaced..];
    }
    repaired.push_str(rest);
    repaired
}
