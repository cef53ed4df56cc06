//! Paths that people give to the program: in settings, and as arguments.
//!
//! A frequent mistake is to give the content of a file instead of its path, such as a private key in an environment
//! variable. So content is refused, and no error or log line shows a path that may be content.

use std::{
    ffi::OsStr,
    fmt,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// The longest name of a file, in bytes, that Linux takes (`NAME_MAX`).
const MAX_NAME: usize = 255;
/// The longest path, in bytes, that Linux takes (`PATH_MAX`, without its final zero).
const MAX_PATH: usize = 4095;

/// Text that is no path, but looks like the content of a file.
#[derive(Clone, Copy, Debug, Error, Eq, PartialEq)]
#[error("not a path: it looks like the content of the file, which is not shown")]
pub struct NotAPath;

/// Returns the path that `text` is.
///
/// # Errors
/// [`NotAPath`] for text with control characters, such as the line breaks of PEM, and for URLs, JSON, and what is too
/// long. A single word, such as a key, cannot be told from the name of a file: see [`shown`].
pub fn parse(text: impl AsRef<OsStr>) -> Result<PathBuf, NotAPath> {
    let text = text.as_ref();
    let bytes = text.as_bytes();
    let has = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    let is_content = bytes.len() > MAX_PATH
        || bytes.split(|byte| *byte == b'/').any(|name| name.len() > MAX_NAME)
        || bytes.iter().any(u8::is_ascii_control)
        || has(b"-----BEGIN")
        || has(b"://")
        || bytes.trim_ascii_start().starts_with(b"{")
        || bytes.trim_ascii_start().starts_with(b"[");
    if is_content { Err(NotAPath) } else { Ok(text.into()) }
}

/// Returns `path` for an error or a log line: as it is if it exists or begins with something that does, such as `/etc`,
/// and otherwise a text that does not contain it. Looks at the disk.
#[must_use]
pub fn shown(path: &Path) -> Shown<'_> {
    Shown(path)
}

/// Returns whether the path is that of something that exists, or of something below it, the root apart. Neither base64
/// nor another key is. Looks at the disk.
#[must_use]
pub fn begins_with_existing(path: &Path) -> bool {
    path.ancestors().any(|ancestor| {
        !matches!(ancestor.as_os_str().as_bytes(), b"" | b"/")
            && ancestor.symlink_metadata().is_ok()
    })
}

/// Displays a path: see [`shown`].
#[derive(Clone, Copy)]
pub struct Shown<'a>(&'a Path);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(path) = self;
        if parse(path).is_ok() && (begins_with_existing(path) || *path == Path::new("/")) {
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
    fn content_is_not_a_path() {
        let long_name = format!("/etc/{}", "x".repeat(MAX_NAME + 1));
        let long = "x/".repeat(5_000);
        for text in [
            "-----BEGIN PRIVATE KEY-----\nMIIcanary\n-----END PRIVATE KEY-----\n",
            "-----BEGIN PRIVATE KEY----- MIIcanary",
            "database_url = 'x'\nlisten = 'y'",
            "postgresql://u:canary@h/d",
            "{\"canary\": 1}",
            " [{\"client_id\": \"canary\"}]",
            "a\tb",
            "SK.canary\r",
            &long_name,
            &long,
        ] {
            assert_eq!(parse(text), Err(NotAPath), "{text:?}");
            assert!(!NotAPath.to_string().contains("canary"));
        }
    }

    #[test]
    fn paths_with_unusual_characters_are_paths() {
        let long = format!("/{}", "x".repeat(MAX_NAME));
        for text in ["/etc/a b/c", "x", "-", "./{a}", "토큰", "/a:b/=c", "../x[1]", &long] {
            assert_eq!(parse(text), Ok(PathBuf::from(text)));
        }
        let bytes = OsStr::from_bytes(b"/etc/\xff");
        assert_eq!(parse(bytes), Ok(PathBuf::from(bytes)));
    }

    #[test]
    fn a_path_is_shown_only_if_it_begins_with_something_that_exists() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("file"), "").unwrap();
        for path in [
            path("file"),
            path("missing"),
            path("missing/file"),
            path("file/below"),
            "/etc".into(),
            "/".into(),
            "./missing".into(),
        ] {
            assert_eq!(shown(&path).to_string(), path.display().to_string());
        }
        for content in
            ["SK.canary", "tbk_canary", "can/ary", "/canary", "/canary/canary", "canary\n"]
        {
            assert!(!shown(Path::new(content)).to_string().contains("canary"), "{content}");
        }
    }
}
