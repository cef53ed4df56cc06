//! Reads the body of an answer into the fields that matter, whatever was put around them on the way.
//!
//! Servers and proxies compress a document, write it in another encoding, mark its encoding, wrap it into a
//! string or a list, and guard it against scripts. All of that is undone here by what the bytes are, since
//! headers are often wrong about it. What is left is read strictly: one whole JSON object.

use std::{fmt, io::Read};

use flate2::{
    bufread::GzDecoder,
    read::{DeflateDecoder, ZlibDecoder},
};
use http::{HeaderMap, header};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use zeroize::Zeroizing;

use super::number::whole_number;

/// The longest answer that is read, in bytes. The upstream's answers have about 350.
pub const MAX_BODY: usize = 64 * 1024;
/// The longest error code that is kept, in characters. The upstream's codes have five.
const LONGEST_CODE: usize = 16;
/// The most content codings of one answer that are undone.
const MOST_CODINGS: usize = 4;
/// What may be before a document: a UTF-8 mark that was taken for Latin-1 and written again, and what
/// frameworks put there so that a browser does not run the document as a script.
const PREFIXES: [&str; 5] = ["ï»¿", ")]}',", ")]}'", "while(1);", "for(;;);"];

/// The most levels of an error that are searched for its code.
const MOST_LEVELS: usize = 4;
/// What some APIs write into `error` after a success.
const NO_ERROR: [&str; 4] = ["none", "null", "false", "success"];

/// The fields of an answer.
pub(super) struct Answer {
    /// The JSON value of `accessToken`, if it is not `null`.
    pub(super) access_token: Option<Zeroizing<String>>,
    /// The JSON value of `expiresIn`, if it is not `null`.
    pub(super) expires_in: Option<String>,
    /// Whether one of these two is there with two values, so that it is not known which one is meant.
    pub(super) is_ambiguous: bool,
    /// The error that the answer states.
    pub(super) error: Option<StatedError>,
}

/// The error that an answer states.
#[derive(Debug, PartialEq)]
pub(super) struct StatedError {
    /// The error's code, reduced to at most 16 ASCII letters and digits so that it can be shown anywhere.
    pub(super) code: Option<String>,
    /// The `status` beside the error, if it is one of an error.
    pub(super) status: Option<u16>,
}

/// Why the body of an answer is not read. It never quotes the answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Unreadable {
    /// It is not one whole JSON object.
    NotJson,
    /// It is compressed in a way that was not asked for and is not known here.
    Coding(&'static str),
    /// It is compressed, and damaged or longer than [`MAX_BODY`].
    Compressed,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotJson => f.write_str("the upstream's answer is not whole JSON"),
            Self::Coding(coding) => {
                write!(f, "the upstream's answer is compressed ({coding}), which was not asked for")
            }
            Self::Compressed => {
                f.write_str("the upstream's compressed answer is damaged or longer than 64 KiB")
            }
        }
    }
}

/// Reads an answer's body.
///
/// # Errors
/// [`Unreadable`] if it is not one whole JSON object, also after everything around it is undone.
pub(super) fn read(headers: &HeaderMap, body: &[u8]) -> Result<Answer, Unreadable> {
    let (bytes, unknown) = decompress(headers, body)?;
    let text = text(&bytes);
    read_document(&text).ok_or(unknown.map_or(Unreadable::NotJson, Unreadable::Coding))
}

/// Undoes the content codings. An unknown one is returned, and ignored: a proxy that undid it may have left
/// the header behind.
fn decompress(
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(Zeroizing<Vec<u8>>, Option<&'static str>), Unreadable> {
    let (mut bytes, mut unknown) = (Zeroizing::new(body.to_vec()), None);
    let named = headers.get_all(header::CONTENT_ENCODING).iter();
    let named: Vec<_> = named.filter_map(|value| value.to_str().ok()).collect();
    let named = named.join(",").to_ascii_lowercase();
    // They are listed in the order in which they were applied.
    for coding in named.rsplit(',').map(str::trim).take(MOST_CODINGS) {
        match coding {
            // Gzip is recognised by its first bytes, below.
            "" | "identity" | "none" | "gzip" | "x-gzip" => {}
            "deflate" => bytes = inflate(bytes)?,
            "br" => unknown = Some("br"),
            "zstd" => unknown = Some("zstd"),
            "compress" | "x-compress" => unknown = Some("compress"),
            _ => unknown = Some("an unknown coding"),
        }
        if bytes.starts_with(&[0x1f, 0x8b]) {
            bytes = gunzip(&bytes).ok_or(Unreadable::Compressed)?;
        }
    }
    Ok((bytes, unknown))
}

/// Undoes gzip. Only zeros and white space may follow it.
fn gunzip(mut bytes: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    // The capacity suffices: growing would leave a copy of a token behind in memory.
    let mut text = Zeroizing::new(Vec::with_capacity(MAX_BODY + 64));
    while bytes.starts_with(&[0x1f, 0x8b]) {
        let mut member = GzDecoder::new(bytes);
        text.extend_from_slice(&limited(&mut member)?);
        if text.len() > MAX_BODY {
            return None;
        }
        bytes = member.into_inner();
    }
    bytes.iter().all(|byte| *byte == 0 || byte.is_ascii_whitespace()).then_some(text)
}

/// Undoes `deflate`, which some servers send with zlib's header and some without. Bytes that are not
/// compressed are returned as they are.
fn inflate(bytes: Zeroizing<Vec<u8>>) -> Result<Zeroizing<Vec<u8>>, Unreadable> {
    let has_zlib_header = matches!(bytes[..], [method, flags, ..]
        if method & 0x0f == 8 && u16::from_be_bytes([method, flags]).is_multiple_of(31));
    if has_zlib_header {
        return limited(ZlibDecoder::new(&bytes[..])).ok_or(Unreadable::Compressed);
    }
    let starts_document = |bytes: &[u8]| document(&text(bytes)).starts_with(['{', '[', '"']);
    if starts_document(&bytes) {
        return Ok(bytes);
    }
    let inflated = limited(DeflateDecoder::new(&bytes[..]));
    Ok(inflated.filter(|inflated| starts_document(inflated)).unwrap_or(bytes))
}

/// Reads all of `decoder`, unless it fails or has more than [`MAX_BODY`] bytes.
fn limited(decoder: impl Read) -> Option<Zeroizing<Vec<u8>>> {
    // The capacity suffices: growing would leave a copy of a token behind in memory.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_BODY + 64));
    let limit = u64::try_from(MAX_BODY + 1).unwrap_or(u64::MAX);
    decoder.take(limit).read_to_end(&mut bytes).ok()?;
    Some(bytes).filter(|bytes| bytes.len() <= MAX_BODY)
}

/// Decodes the bytes: UTF-8, UTF-16 or UTF-32, by their mark or by the zeros that ASCII has in them. Of any
/// other encoding only the ASCII characters are kept, and each other byte becomes U+FFFD: all fields that
/// matter are ASCII, and an error's message is not read. A control character becomes a space: JSON permits none
/// in a string, but some writers do not escape them in messages.
fn text(bytes: &[u8]) -> Zeroizing<String> {
    let bytes = without_foreign_newlines(bytes);
    let mut text = Zeroizing::new(String::with_capacity(3 * bytes.len() + 4));
    match bytes {
        [0xff, 0xfe, 0, 0, ..] | [1..=255, 0, 0, 0, ..] => {
            utf32(bytes, u32::from_le_bytes, &mut text);
        }
        [0, 0, 0xfe, 0xff, ..] | [0, 0, 0, 1..=255, ..] => {
            utf32(bytes, u32::from_be_bytes, &mut text);
        }
        [0xff, 0xfe, ..] | [1..=255, 0, ..] => utf16(bytes, u16::from_le_bytes, &mut text),
        [0xfe, 0xff, ..] | [0, 1..=255, ..] => utf16(bytes, u16::from_be_bytes, &mut text),
        _ => {
            for chunk in bytes.utf8_chunks() {
                text.extend(chunk.valid().chars().map(printable));
                if !chunk.invalid().is_empty() {
                    text.push(char::REPLACEMENT_CHARACTER);
                }
            }
        }
    }
    text
}

/// Returns the bytes without newlines that a proxy put around them in ASCII, whatever their encoding is.
fn without_foreign_newlines(bytes: &[u8]) -> &[u8] {
    let is_newline = |byte: &u8| matches!(byte, b'\r' | b'\n');
    let start = bytes.iter().position(|byte| !is_newline(byte)).unwrap_or_default();
    let is_marked = matches!(bytes[start..], [0xff, 0xfe, ..] | [0xfe, 0xff, ..]);
    let bytes = if is_marked { &bytes[start..] } else { bytes };
    let bytes = bytes.strip_suffix(b"\r\n").unwrap_or(bytes);
    // UTF-16 has no odd number of bytes.
    match bytes {
        [rest @ .., b'\n'] if bytes.contains(&0) && rest.len().is_multiple_of(2) => rest,
        _ => bytes,
    }
}

fn utf16(bytes: &[u8], unit: impl Fn([u8; 2]) -> u16, text: &mut String) {
    let (units, rest) = bytes.as_chunks();
    let units = units.iter().map(|bytes| unit(*bytes));
    text.extend(
        char::decode_utf16(units).map(|c| c.map_or(char::REPLACEMENT_CHARACTER, printable)),
    );
    text.extend(rest.iter().map(|_| char::REPLACEMENT_CHARACTER));
}

fn utf32(bytes: &[u8], unit: impl Fn([u8; 4]) -> u32, text: &mut String) {
    let (units, rest) = bytes.as_chunks();
    let units = units.iter().map(|bytes| char::from_u32(unit(*bytes)));
    text.extend(units.map(|c| c.map_or(char::REPLACEMENT_CHARACTER, printable)));
    text.extend(rest.iter().map(|_| char::REPLACEMENT_CHARACTER));
}

fn printable(c: char) -> char {
    if c.is_ascii_control() { ' ' } else { c }
}

/// Returns whether `c` says nothing around a document or a token: white space, marks, and control characters
/// such as the separator of RFC 7464 or the zero that ends a string in C.
pub(super) fn is_padding(c: char) -> bool {
    c.is_whitespace() || c.is_control() || matches!(c, '\u{feff}' | '\u{200b}')
}

/// Returns the text without what is put around a JSON document.
fn document(text: &str) -> &str {
    let mut rest = text.trim_matches(is_padding);
    while let Some(inner) = PREFIXES.iter().find_map(|prefix| rest.strip_prefix(*prefix)) {
        rest = inner.trim_start_matches(is_padding);
    }
    rest
}

/// Replaces each escaped surrogate that is not one of a pair, such as one of a message that was cut within a
/// character, by an escape of the same length that JSON permits.
fn replace_lone_surrogates(text: &mut Zeroizing<String>) {
    let escape = |text: &str, at: usize| {
        let digits = text.get(at..at + 6)?.strip_prefix("\\u")?;
        u16::from_str_radix(digits, 16).ok()
    };
    let mut at = 0;
    while let Some(found) = text.get(at..).and_then(|rest| rest.find('\\')) {
        at += found;
        match (escape(text, at), escape(text, at + 6)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => at += 12,
            (Some(0xd800..=0xdfff), _) => {
                text.replace_range(at..at + 6, "\\ufffd");
                at += 6;
            }
            // The escaped character may be a backslash, or one of several bytes.
            _ => at += 1 + text[at + 1..].chars().next().map_or(0, char::len_utf8),
        }
    }
}

/// Reads a document: an object, or a list or a string that holds just one.
fn read_document(text: &str) -> Option<Answer> {
    let mut text = Zeroizing::new(document(text).to_owned());
    replace_lone_surrogates(&mut text);
    let text = text.as_str();
    if text.starts_with('"') {
        let mut inner = Zeroizing::new(serde_json::from_str::<String>(text).ok()?);
        replace_lone_surrogates(&mut inner);
        return read_object(document(&inner));
    }
    if text.starts_with('[') {
        let [inner]: [&RawValue; 1] = serde_json::from_str(text).ok()?;
        return read_object(inner.get());
    }
    read_object(text)
}

fn read_object(text: &str) -> Option<Answer> {
    let fields: Fields<'_> = serde_json::from_str(text).ok()?;
    let given = |field: Option<&RawValue>| {
        field.map(|value| value.get().to_owned()).filter(|value| value != "null")
    };
    let errors: Vec<_> = fields.errors.into_iter().map(Json::read).collect();
    let status = fields.status.map_or(Json::Null, Json::read);
    let code = fields.code.map_or(Json::Null, Json::read);
    Some(Answer {
        access_token: given(fields.access_token).map(Zeroizing::new),
        expires_in: given(fields.expires_in),
        is_ambiguous: fields.is_ambiguous,
        error: stated_error(&errors, &status, &code),
    })
}

/// A JSON value that is read as far as possible: a number is kept as its text, and a part that cannot be read
/// does not make the whole unreadable.
enum Json {
    Null,
    Bool(bool),
    Number(String),
    Text(String),
    List(Vec<Self>),
    Object(Vec<(String, Self)>),
}

impl Json {
    fn read(json: &RawValue) -> Self {
        Self::read_levels(json.get(), MOST_LEVELS)
    }

    /// Reads `levels` levels. What is below is read as text.
    fn read_levels(json: &str, levels: usize) -> Self {
        let raw = || Self::Text(json.to_owned());
        let read = |json: &RawValue| Self::read_levels(json.get(), levels.saturating_sub(1));
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
            Some(b'"') => serde_json::from_str(json).map_or_else(|_| raw(), Self::Text),
            Some(b'n') => Self::Null,
            Some(b't' | b'f') => Self::Bool(json == "true"),
            _ => Self::Number(json.to_owned()),
        }
    }

    fn member(&self, name: &str) -> Option<&Self> {
        let Self::Object(members) = self else { return None };
        members.iter().rfind(|(member, _)| member == name).map(|(_, value)| value)
    }

    /// Returns a string's text, or that of a number, which is whole if the number is.
    fn as_text(&self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text.clone()),
            Self::Number(text) => {
                Some(whole_number(text).map_or_else(|| text.clone(), |whole| whole.to_string()))
            }
            _ => None,
        }
    }

    /// Returns whether the value of `error` or `error.code` states an error. Some APIs have these fields in every
    /// answer, with `null`, a zero, a status of success or nothing in them after a success.
    fn is_set(&self) -> bool {
        match self {
            Self::Null => false,
            Self::Bool(set) => *set,
            Self::Number(text) => !is_success(text),
            Self::Text(text) => {
                let text = text.trim_matches(is_padding);
                !text.is_empty()
                    && !is_success(text)
                    && !NO_ERROR.iter().any(|none| text.eq_ignore_ascii_case(none))
            }
            Self::List(values) => values.iter().any(Self::is_set),
            Self::Object(members) => self
                .member("code")
                .map_or_else(|| members.iter().any(|(_, value)| value.is_set()), Self::is_set),
        }
    }

    /// Returns the code that this value of `error` states: that of its `code` or `error`, of the only element of a
    /// list, or of the JSON text in a string. A value alone is one if it has the form of the upstream's codes.
    fn code(&self, levels: usize) -> Option<String> {
        let levels = levels.checked_sub(1)?;
        match self {
            Self::Object(_) => match self.member("code") {
                Some(code) => code.code_text(),
                None => self.member("error").or_else(|| self.member("errors"))?.code(levels),
            },
            Self::List(values) => match &values[..] {
                [value] => value.code(levels),
                _ => None,
            },
            Self::Text(text) if text.trim_matches(is_padding).starts_with(['{', '[']) => {
                Self::read_levels(text.trim_matches(is_padding), levels).code(levels)
            }
            _ => self.code_text().filter(|code| is_upstream_code(code)),
        }
    }

    /// Returns the code in the value of `code`, reduced to at most 16 ASCII letters and digits.
    fn code_text(&self) -> Option<String> {
        if let Self::List(values) = self {
            let [value] = &values[..] else { return None };
            return value.code_text();
        }
        let text = self.as_text().filter(|_| self.is_set())?;
        let text = text.trim_matches(is_padding);
        // Some writers take it for a number with a point, or write the message behind it.
        let number = whole_number(text).map(|number| number.to_string());
        let first = text.split(|c: char| !c.is_ascii_alphanumeric()).next().map(str::to_owned);
        let own = [number, first].into_iter().flatten().find(|code| is_upstream_code(code));
        let code = own.unwrap_or_else(|| {
            text.chars().filter(char::is_ascii_alphanumeric).take(LONGEST_CODE).collect()
        });
        Some(code).filter(|code| !code.is_empty())
    }
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

/// Returns whether a code is a zero in any notation, or the status of a success.
fn is_success(code: &str) -> bool {
    code.trim_matches('0').is_empty()
        || whole_number(code).is_some_and(|code| code == 0 || (200..300).contains(&code))
}

/// Returns whether a code has the form of the upstream's own: five digits, the first of which is a six.
fn is_upstream_code(code: &str) -> bool {
    code.len() == 5 && code.starts_with('6') && code.bytes().all(|b| b.is_ascii_digit())
}

/// The fields of the object as they are written.
#[derive(Default)]
struct Fields<'a> {
    access_token: Option<&'a RawValue>,
    expires_in: Option<&'a RawValue>,
    /// Each `error` and `errors`: an empty one must not hide one that states a code.
    errors: Vec<&'a RawValue>,
    code: Option<&'a RawValue>,
    status: Option<&'a RawValue>,
    is_ambiguous: bool,
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
        let mut fields = Fields::default();
        while let Some(name) = map.next_key::<String>()? {
            let (field, must_be_unique) = match name.as_str() {
                "accessToken" => (&mut fields.access_token, true),
                "expiresIn" => (&mut fields.expires_in, true),
                "error" | "errors" => {
                    fields.errors.push(map.next_value()?);
                    continue;
                }
                "code" => (&mut fields.code, false),
                "status" => (&mut fields.status, false),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            let value: &RawValue = map.next_value()?;
            let differs = field.is_some_and(|before| before.get() != value.get());
            fields.is_ambiguous |= must_be_unique && differs;
            *field = Some(value);
        }
        Ok(fields)
    }
}

/// Returns the error that the fields `error`, `status` and `code` state. A `code` beside the other fields is one only if
/// it is the upstream's own, since many APIs have such a field in every answer.
fn stated_error(errors: &[Json], status: &Json, code: &Json) -> Option<StatedError> {
    let status = (status.as_text())
        .and_then(|text| whole_number(&text))
        .and_then(|number| u16::try_from(number).ok())
        .filter(|status| (400..600).contains(status));
    let beside = code.code_text().filter(|code| is_upstream_code(code));
    if !errors.iter().any(Json::is_set) && status.is_none() && beside.is_none() {
        return None;
    }
    let code = errors.iter().find_map(|error| error.code(MOST_LEVELS)).or(beside);
    Some(StatedError { code, status })
}

#[cfg(test)]
mod tests;
