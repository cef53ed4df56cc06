//! Reads the body of an answer into the fields that matter, whatever was put around them on the way.
//!
//! Servers and proxies compress a document, write it in another encoding, mark its encoding, wrap it into a
//! string or a list, and guard it against scripts. All of that is undone here by what the bytes are, since
//! headers are often wrong about it. What is left is read strictly: one whole JSON object.

use std::{fmt, io::Read};

use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use http::{HeaderMap, header};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Value, value::RawValue};
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

/// The fields of an answer.
pub(super) struct Answer {
    /// The JSON value of `accessToken`, if it is not `null`.
    pub(super) access_token: Option<Zeroizing<String>>,
    /// The JSON value of `expiresIn`, if it is not `null`.
    pub(super) expires_in: Option<String>,
    /// Whether one of these two is there more than once, so that it is not known which one is meant.
    pub(super) is_ambiguous: bool,
    /// The error that the answer states.
    pub(super) error: Option<StatedError>,
}

/// The error that an answer states.
#[derive(Debug, PartialEq)]
pub(super) struct StatedError {
    /// `error.code`, reduced to at most 16 ASCII letters and digits so that it can be shown anywhere.
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
            bytes = limited(MultiGzDecoder::new(&bytes[..])).ok_or(Unreadable::Compressed)?;
        }
    }
    Ok((bytes, unknown))
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

/// Reads a document: an object, or a list or a string that holds just one.
fn read_document(text: &str) -> Option<Answer> {
    let text = document(text);
    if text.starts_with('"') {
        let inner = Zeroizing::new(serde_json::from_str::<String>(text).ok()?);
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
    let value = |field: Option<&RawValue>| {
        field.map_or(Value::Null, |it| serde_json::from_str(it.get()).unwrap_or(Value::Null))
    };
    Some(Answer {
        access_token: given(fields.access_token).map(Zeroizing::new),
        expires_in: given(fields.expires_in),
        is_ambiguous: fields.is_ambiguous,
        error: stated_error(&value(fields.error), &value(fields.status)),
    })
}

/// The fields of the object as they are written.
#[derive(Default)]
struct Fields<'a> {
    access_token: Option<&'a RawValue>,
    expires_in: Option<&'a RawValue>,
    error: Option<&'a RawValue>,
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
                "error" => (&mut fields.error, false),
                "status" => (&mut fields.status, false),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            fields.is_ambiguous |= must_be_unique && field.is_some();
            *field = Some(map.next_value()?);
        }
        Ok(fields)
    }
}

/// Returns the error that the fields `error` and `status` state.
fn stated_error(error: &Value, status: &Value) -> Option<StatedError> {
    let status = as_text(status)
        .and_then(|text| whole_number(&text))
        .and_then(|number| u16::try_from(number).ok())
        .filter(|status| (400..600).contains(status));
    if !is_set(error) && status.is_none() {
        return None;
    }
    let code = error.get("code").filter(|code| is_set(code)).and_then(as_text);
    let code = code.map(|code| {
        code.chars().filter(char::is_ascii_alphanumeric).take(LONGEST_CODE).collect::<String>()
    });
    Some(StatedError { code: code.filter(|code| !code.is_empty()), status })
}

/// Returns a string's text, or that of a number, which is whole if the number is.
fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => {
            let text = number.to_string();
            Some(whole_number(&text).map_or(text, |whole| whole.to_string()))
        }
        _ => None,
    }
}

/// Returns whether the value of `error` or `error.code` states an error. Some APIs have these fields in every
/// answer, with `null`, a zero or nothing in them after a success.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Bool(true) => true,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.trim_matches(is_padding).trim_matches('0').is_empty(),
        Value::Array(values) => values.iter().any(is_set),
        Value::Object(fields) => {
            fields.get("code").map_or_else(|| fields.values().any(is_set), is_set)
        }
    }
}

#[cfg(test)]
mod tests;
