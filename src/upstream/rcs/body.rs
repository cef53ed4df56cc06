//! Undoes what was put around the JSON text of an answer on the way.
//!
//! Servers and proxies compress a document, write it in another encoding, mark its encoding, and guard it against
//! scripts. All of that is undone by what the bytes are, since headers are often wrong about it.

use std::{fmt, io::Read};

use flate2::{
    bufread::GzDecoder,
    read::{DeflateDecoder, ZlibDecoder},
};
use http::{HeaderMap, header};
use zeroize::Zeroizing;

/// The longest answer that is read, in bytes. The upstream's answers have about 350.
pub const MAX_BODY: usize = 64 * 1024;
/// The most compressions of one answer that are undone.
const MOST_CODINGS: usize = 4;
/// What may be before a document: a UTF-8 mark that was taken for Latin-1 and written again, and what
/// frameworks put there so that a browser does not run the document as a script.
const PREFIXES: [&str; 5] = ["ï»¿", ")]}',", ")]}'", "while(1);", "for(;;);"];

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

/// Returns the text of an answer's body. The second value is the compression that a header names and that is not known
/// here: a proxy that undid it may have left the header behind.
///
/// # Errors
/// [`Unreadable::Compressed`].
pub(super) fn text_of(
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(Zeroizing<String>, Option<&'static str>), Unreadable> {
    let mut bytes = Zeroizing::new(body.to_vec());
    for _ in 0..MOST_CODINGS {
        let Some(inner) = decompress(&bytes)? else { break };
        bytes = inner;
    }
    Ok((text(&bytes), unknown_coding(headers)))
}

/// Returns the content coding that the headers name and that is not undone here.
fn unknown_coding(headers: &HeaderMap) -> Option<&'static str> {
    let named = headers.get_all(header::CONTENT_ENCODING).iter();
    let named: Vec<_> = named.filter_map(|value| value.to_str().ok()).collect();
    let named = named.join(",").to_ascii_lowercase();
    named.split(',').map(str::trim).find_map(|coding| match coding {
        "" | "identity" | "none" | "gzip" | "x-gzip" | "deflate" => None,
        "br" => Some("br"),
        "zstd" => Some("zstd"),
        "compress" | "x-compress" => Some("compress"),
        _ => Some("an unknown coding"),
    })
}

/// Undoes one compression, which is recognised by the bytes; `None` if there is none. `deflate` comes with the
/// header of zlib, or without any.
fn decompress(bytes: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, Unreadable> {
    if bytes.starts_with(&[0x1f, 0x8b]) {
        return gunzip(bytes).map(Some).ok_or(Unreadable::Compressed);
    }
    let starts_document = |bytes: &[u8]| document(&text(bytes)).starts_with(['{', '[', '"']);
    if starts_document(bytes) {
        return Ok(None);
    }
    let has_zlib_header = matches!(bytes, [method, flags, ..]
        if method & 0x0f == 8 && u16::from_be_bytes([*method, *flags]).is_multiple_of(31));
    let inflated = has_zlib_header.then(|| limited(ZlibDecoder::new(bytes))).flatten();
    // Nearly all writers use a window of 32 KiB, which this byte says.
    if has_zlib_header && bytes.starts_with(&[0x78]) && inflated.is_none() {
        return Err(Unreadable::Compressed);
    }
    Ok(inflated.or_else(|| {
        limited(DeflateDecoder::new(bytes)).filter(|inflated| starts_document(inflated))
    }))
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

/// Returns whether `c` says nothing around a document, a token or a code: white space, control characters such as the
/// separator of RFC 7464 or the zero that ends a string in C, invisible characters, and typographic quotation marks.
/// Other signs do: an ellipsis or a bullet says that the text is not whole.
pub(super) fn is_padding(c: char) -> bool {
    c.is_whitespace()
        || c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2018}'..='\u{201f}'
            | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}')
}

/// Returns the text without what is put around a JSON document.
pub(super) fn document(text: &str) -> &str {
    let mut rest = text.trim_matches(is_padding);
    while let Some(inner) = PREFIXES.iter().find_map(|prefix| rest.strip_prefix(*prefix)) {
        rest = inner.trim_start_matches(is_padding);
    }
    rest
}
