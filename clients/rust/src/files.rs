//! Reads text files in the encodings that the tools of Windows write, and decides whether a path may be printed.

use std::{fmt, io, os::unix::ffi::OsStrExt, path::Path};

/// Returns the content of `file`, as UTF-8 if it is UTF-16 with a byte order mark, and without such a mark. Blocks.
///
/// # Errors
/// Why it cannot be read; the text does not quote the file.
pub(crate) fn read(file: &Path) -> io::Result<Vec<u8>> {
    to_utf8(std::fs::read(file)?)
}

/// Removes the byte order mark from `bytes`, and turns UTF-16 that begins with one into UTF-8.
pub(crate) fn to_utf8(bytes: Vec<u8>) -> io::Result<Vec<u8>> {
    let refused = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidData, why));
    match bytes.as_slice() {
        [0xEF, 0xBB, 0xBF, text @ ..] => Ok(text.to_vec()),
        [0xFF, 0xFE, 0, 0, ..] | [0, 0, 0xFE, 0xFF, ..] => {
            refused("it is UTF-32: save it as UTF-8")
        }
        [0xFF, 0xFE, text @ ..] => from_utf16(text, u16::from_le_bytes),
        [0xFE, 0xFF, text @ ..] => from_utf16(text, u16::from_be_bytes),
        [first, second, ..] if (*first == 0) != (*second == 0) => {
            refused("it is UTF-16 without a byte order mark: save it as UTF-8")
        }
        _ => Ok(bytes),
    }
}

fn from_utf16(text: &[u8], unit: fn([u8; 2]) -> u16) -> io::Result<Vec<u8>> {
    let malformed =
        || io::Error::new(io::ErrorKind::InvalidData, "it is malformed UTF-16: save it as UTF-8");
    let (pairs, rest) = text.as_chunks::<2>();
    let units: Vec<_> = pairs.iter().map(|pair| unit(*pair)).collect();
    let text = String::from_utf16(&units).ok().filter(|_| rest.is_empty()).ok_or_else(malformed)?;
    Ok(text.into_bytes())
}

/// Returns `path` for an error or a log line: as it is if it exists or if its directory does, and otherwise a text that
/// does not contain it. A frequent mistake is to give the content of a file, such as a private key, instead of its path.
pub(crate) fn shown(path: &Path) -> Shown<'_> {
    Shown(path)
}

/// Displays a path: see [`shown`].
pub(crate) struct Shown<'a>(&'a Path);

impl fmt::Debug for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(path) = self;
        let is_content = {
            let bytes = path.as_os_str().as_bytes();
            bytes.iter().any(u8::is_ascii_control) || bytes.windows(3).any(|it| it == b"://")
        };
        // Neither base64 nor another key names a directory that exists, except the root and the current one.
        let is_in_directory = path.parent().is_some_and(|directory| {
            !matches!(directory.as_os_str().as_bytes(), b"" | b"/") && directory.is_dir()
        });
        if !is_content && (path.symlink_metadata().is_ok() || is_in_directory) {
            write!(f, "{}", path.display())
        } else {
            f.write_str("(path not shown: nothing is there)")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_the_same_in_every_encoding_with_a_mark_and_others_are_named() {
        let utf16 = |unit: fn(u16) -> [u8; 2]| -> Vec<u8> {
            "\u{feff}tbk_é\r\n".encode_utf16().flat_map(unit).collect()
        };
        let text = "tbk_é\r\n".as_bytes();
        for bytes in [
            text.to_vec(),
            [b"\xef\xbb\xbf", text].concat(),
            utf16(u16::to_le_bytes),
            utf16(u16::to_be_bytes),
        ] {
            assert_eq!(to_utf8(bytes).unwrap(), text);
        }
        for (bytes, says) in [
            (&b"t\0b\0"[..], "UTF-16 without a byte order mark"),
            (b"\0t\0b", "UTF-16 without a byte order mark"),
            (b"\xff\xfet", "malformed UTF-16"),
            (b"\xff\xfe\x00\xd8", "malformed UTF-16"),
            (b"\xff\xfe\0\0t\0\0\0", "UTF-32"),
        ] {
            let error = to_utf8(bytes.to_vec()).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_path_that_leads_nowhere_is_not_shown() {
        let directory = tempfile::tempdir().unwrap();
        for path in [directory.path().join("missing"), directory.path().to_owned()] {
            assert_eq!(shown(&path).to_string(), path.display().to_string());
        }
        for content in [
            "tbk_canary",
            "can/ary",
            "/canary",
            "-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----",
            "/etc/canary\n",
            "/etc://canary",
        ] {
            assert!(!shown(Path::new(content)).to_string().contains("canary"), "{content}");
        }
    }
}
