//! Text files that people wrote, also with the tools of Windows: a byte order mark is removed, and UTF-16 is decoded.

use std::{io, mem, path::Path};

use thiserror::Error;
use zeroize::Zeroizing;

use super::bounded;

/// Why bytes are not read as text.
#[derive(Clone, Copy, Debug, Error, Eq, PartialEq)]
pub enum NotText {
    /// The text is UTF-16, and does not begin with the mark that tells its byte order.
    #[error("it is UTF-16 without a byte order mark: save it as UTF-8")]
    UnmarkedUtf16,
    /// The text begins with the byte order mark of UTF-16, and is malformed after it.
    #[error("it is malformed UTF-16: save it as UTF-8")]
    MalformedUtf16,
    /// The text begins with the byte order mark of UTF-32.
    #[error("it is UTF-32: save it as UTF-8")]
    Utf32,
    /// The text is in another encoding, or is no text.
    #[error("it is not UTF-8 from byte {0} on")]
    NotUtf8(usize),
}

impl From<NotText> for io::Error {
    fn from(error: NotText) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// Reads the file at `path` as text. Blocks, within the limits of [`bounded::FILE`].
///
/// # Errors
/// Those of [`bounded::read`], or [`io::ErrorKind::InvalidData`] with a [`NotText`].
pub fn read(path: &Path) -> io::Result<Zeroizing<String>> {
    Ok(decode(mem::take(&mut *bounded::read(path)?))?)
}

/// Returns the text of `bytes`: UTF-8, or UTF-16 with a byte order mark. The mark is removed.
///
/// # Errors
/// [`NotText`], which does not show the bytes.
pub fn decode(bytes: Vec<u8>) -> Result<Zeroizing<String>, NotText> {
    let bytes = to_utf8(bytes)?;
    match str::from_utf8(&bytes) {
        Ok(text) => Ok(Zeroizing::new(text.to_owned())),
        Err(error) => Err(NotText::NotUtf8(error.valid_up_to() + 1)),
    }
}

/// Removes the byte order mark from `bytes`, and turns UTF-16 that begins with one into UTF-8. Does not look at
/// anything else: the result may be no text.
///
/// # Errors
/// [`NotText`], but not [`NotText::NotUtf8`].
pub fn to_utf8(bytes: Vec<u8>) -> Result<Zeroizing<Vec<u8>>, NotText> {
    let bytes = Zeroizing::new(bytes);
    match bytes.as_slice() {
        [0xEF, 0xBB, 0xBF, text @ ..] => Ok(Zeroizing::new(text.to_vec())),
        [0xFF, 0xFE, 0, 0, ..] | [0, 0, 0xFE, 0xFF, ..] => Err(NotText::Utf32),
        [0xFF, 0xFE, text @ ..] => from_utf16(text, u16::from_le_bytes),
        [0xFE, 0xFF, text @ ..] => from_utf16(text, u16::from_be_bytes),
        [first, second, ..] if (*first == 0) != (*second == 0) => Err(NotText::UnmarkedUtf16),
        _ => Ok(bytes),
    }
}

fn from_utf16(text: &[u8], unit: fn([u8; 2]) -> u16) -> Result<Zeroizing<Vec<u8>>, NotText> {
    let (pairs, rest) = text.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(NotText::MalformedUtf16);
    }
    // No character of UTF-16 has more than three bytes for each of its units in UTF-8. Growing would leave copies of
    // a secret behind in memory.
    let mut decoded = Zeroizing::new(String::with_capacity(pairs.len() * 3));
    for character in char::decode_utf16(pairs.iter().map(|pair| unit(*pair))) {
        decoded.push(character.map_err(|_| NotText::MalformedUtf16)?);
    }
    Ok(Zeroizing::new(mem::take(&mut *decoded).into_bytes()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn utf16(text: &str, unit: fn(u16) -> [u8; 2]) -> Vec<u8> {
        "\u{feff}".encode_utf16().chain(text.encode_utf16()).flat_map(unit).collect()
    }

    #[test]
    fn what_is_not_read_is_named() {
        for (bytes, says) in [
            (&b"S\0K\0"[..], NotText::UnmarkedUtf16),
            (b"\0S\0K", NotText::UnmarkedUtf16),
            (b"\xff\xfeS", NotText::MalformedUtf16),
            (b"\xff\xfe\x00\xd8", NotText::MalformedUtf16),
            (b"\xff\xfe\0\0S\0\0\0", NotText::Utf32),
            (b"\0\0\xfe\xff\0\0\0S", NotText::Utf32),
            (b"SK.\xff", NotText::NotUtf8(4)),
        ] {
            assert_eq!(decode(bytes.to_vec()).unwrap_err(), says, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn text_is_the_same_in_every_encoding(text in "[a-z가-힣\r\n😀]{0,20}") {
            let marked = [b"\xef\xbb\xbf", text.as_bytes()].concat();
            for bytes in [
                text.clone().into_bytes(),
                marked,
                utf16(&text, u16::to_le_bytes),
                utf16(&text, u16::to_be_bytes),
            ] {
                prop_assert_eq!(&**decode(bytes).unwrap(), &text);
            }
        }
    }
}
