//! How the caller identifies itself: by a bearer, or by the certificate of its connections. Both come from files
//! that are replaced while the program runs.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::{fs, time::Instant};
use tonic::{
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, ClientTlsConfig, Identity},
};
use tracing::warn;

use crate::{
    error::Error,
    files::{self, shown},
};

/// How long the content of a file counts without being read again.
pub(crate) const FILE_AGE: Duration = Duration::from_secs(1);

/// What editors on Windows put before the text.
const BYTE_ORDER_MARK: &str = "\u{feff}";

/// The value of the metadata `authorization`. Its text forms do not contain the bearer.
type Authorization = MetadataValue<Ascii>;

/// The bearer of the caller.
pub(crate) struct Bearer {
    /// The file that has the bearer; none if the program gave the bearer itself.
    file: Option<PathBuf>,
    state: Mutex<State>,
}

struct State {
    authorization: Authorization,
    read_at: Instant,
    /// Whether the last attempt to read the file failed, so that this is logged once.
    is_unreadable: bool,
}

impl Bearer {
    /// Returns a bearer that never changes.
    pub(crate) fn fixed(bearer: &str) -> Result<Self, Error> {
        let authorization = authorization(bearer.into()).map_err(Error::settings)?;
        Ok(Self::new(None, authorization))
    }

    /// Reads the bearer from `file`. Blocks on disk.
    pub(crate) fn from_file(file: PathBuf) -> Result<Self, Error> {
        let read = files::read(&file).map_err(|error| format!("it {}", unreadable(&error)));
        let authorization = read
            .and_then(authorization)
            .map_err(|why| Error::settings(format!("the bearer, {}: {why}", shown(&file))))?;
        Ok(Self::new(Some(file), authorization))
    }

    fn new(file: Option<PathBuf>, authorization: Authorization) -> Self {
        let state = State { authorization, read_at: Instant::now(), is_unreadable: false };
        Self { file, state: Mutex::new(state) }
    }

    /// Returns the bearer for a call. Reads the file again if that was long ago.
    pub(crate) async fn current(&self) -> Authorization {
        if self.state().read_at.elapsed() > FILE_AGE {
            self.read_again().await;
        }
        self.state().authorization.clone()
    }

    /// Reads the file again. Returns whether the bearer is now another one than `used`. What cannot be read is
    /// logged once, and leaves the bearer as it is.
    pub(crate) async fn has_changed_from(&self, used: &Authorization) -> bool {
        self.read_again().await;
        self.state().authorization != *used
    }

    async fn read_again(&self) {
        let Some(file) = &self.file else { return };
        let read = fs::read(file).await.and_then(files::to_utf8);
        let read = read.map_err(|error| unreadable(&error)).and_then(authorization);
        let mut state = self.state();
        state.read_at = Instant::now();
        match read {
            Ok(authorization) => {
                state.authorization = authorization;
                state.is_unreadable = false;
            }
            Err(why) => {
                if !std::mem::replace(&mut state.is_unreadable, true) {
                    warn!(file = %shown(file), why, "the bearer cannot be read again; the previous one is used");
                }
            }
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bearer").field("file", &self.file).finish_non_exhaustive()
    }
}

/// Returns the metadata for `bearer`, marked so that HTTP libraries do not print it.
fn authorization(bearer: Vec<u8>) -> Result<Authorization, String> {
    let bearer = String::from_utf8(bearer).map_err(|_| "it is not UTF-8".to_owned())?;
    let bearer = bearer.trim_start_matches(BYTE_ORDER_MARK).trim();
    if bearer.is_empty() {
        return Err("it holds no bearer".into());
    }
    // The error must not quote the value.
    let mut value = Authorization::try_from(format!("Bearer {bearer}"))
        .map_err(|_| "it holds something else than a bearer".to_owned())?;
    value.set_sensitive(true);
    Ok(value)
}

/// The PEM files for TLS.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct TlsFiles {
    /// The CAs of the broker's certificate; without this file, the system's.
    pub(crate) ca: Option<PathBuf>,
    /// The caller's certificate chain, and its key.
    pub(crate) identity: Option<(PathBuf, PathBuf)>,
}

/// The content of the PEM files.
#[derive(Clone, Eq, PartialEq)]
pub(crate) struct TlsContents {
    ca: Option<Vec<u8>>,
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl TlsFiles {
    /// Whether there is anything to read.
    pub(crate) fn is_empty(&self) -> bool {
        self.ca.is_none() && self.identity.is_none()
    }

    /// Reads the files. Blocks on disk.
    ///
    /// # Errors
    /// A text that names the file.
    pub(crate) fn read(&self) -> Result<TlsContents, String> {
        let certificates = |file: &Path| read_pem(file, "CERTIFICATE-----", "certificate");
        Ok(TlsContents {
            ca: self.ca.as_deref().map(certificates).transpose()?,
            identity: match &self.identity {
                Some((cert, key)) => {
                    Some((certificates(cert)?, read_pem(key, "PRIVATE KEY-----", "private key")?))
                }
                None => None,
            },
        })
    }
}

impl TlsContents {
    /// Returns the TLS settings that the contents stand for.
    pub(crate) fn config(&self) -> ClientTlsConfig {
        let config = match &self.ca {
            Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        match &self.identity {
            Some((cert, key)) => config.identity(Identity::from_pem(cert, key)),
            None => config,
        }
    }
}

/// Reads a PEM file that must have a section whose label ends in `label`. tonic ignores what is no PEM, and would
/// then trust no CA, or have no certificate.
fn read_pem(file: &Path, label: &str, what: &str) -> Result<Vec<u8>, String> {
    let content = files::read(file)
        .map_err(|error| format!("the {what}, {}: it {}", shown(file), unreadable(&error)))?;
    let is_section = |line: &[u8]| {
        let line = line.trim_ascii();
        let line = line.strip_prefix(BYTE_ORDER_MARK.as_bytes()).unwrap_or(line);
        line.starts_with(b"-----BEGIN ") && line.ends_with(label.as_bytes())
    };
    if !content.split(|byte| *byte == b'\n').any(is_section) {
        return Err(format!("{}: it holds no {what} in PEM", shown(file)));
    }
    Ok(content)
}

fn unreadable(error: &io::Error) -> String {
    format!("cannot be read: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_replaced_bearer_is_read_after_a_second_and_without_its_white_space() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("bearer");
        std::fs::write(&file, "  tbk_first\r\n").unwrap();
        let bearer = Bearer::from_file(file.clone()).unwrap();
        std::fs::write(&file, "tbk_second\n").unwrap();
        assert_eq!(bearer.current().await, "Bearer tbk_first");
        tokio::time::advance(FILE_AGE + Duration::from_millis(1)).await;
        assert_eq!(bearer.current().await, "Bearer tbk_second");
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_bearer_is_read_again_at_once_and_a_lost_file_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("bearer");
        std::fs::write(&file, "tbk_first").unwrap();
        let bearer = Bearer::from_file(file.clone()).unwrap();
        let used = bearer.current().await;
        assert!(!bearer.has_changed_from(&used).await);
        std::fs::remove_file(&file).unwrap();
        assert!(!bearer.has_changed_from(&used).await);
        std::fs::write(&file, "").unwrap();
        assert!(!bearer.has_changed_from(&used).await);
        std::fs::write(&file, "tbk_second").unwrap();
        assert!(bearer.has_changed_from(&used).await);
    }

    #[test]
    fn files_in_utf_16_are_read_and_content_given_as_a_path_is_not_quoted() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        let write = |text: &str| {
            let units = "\u{feff}".encode_utf16().chain(text.encode_utf16());
            std::fs::write(&file, units.flat_map(u16::to_le_bytes).collect::<Vec<_>>()).unwrap();
        };
        write("tbk_first\r\n");
        let bearer = Bearer::from_file(file.clone()).unwrap();
        assert_eq!(bearer.state().authorization, "Bearer tbk_first");
        let pem = "-----BEGIN CERTIFICATE-----\r\nAA==\r\n-----END CERTIFICATE-----\r\n";
        write(pem);
        let files = TlsFiles { ca: Some(file.clone()), identity: None };
        assert_eq!(files.read().unwrap().ca.as_deref(), Some(pem.as_bytes()));
        for content in ["tbk_canary", "-----BEGIN PRIVATE KEY-----\ncanary"] {
            let path = PathBuf::from(content);
            let bearer = Bearer::from_file(path.clone()).unwrap_err().to_string();
            let ca = TlsFiles { ca: Some(path.clone()), identity: None }.read().err().unwrap();
            assert!(!format!("{bearer}{ca}").contains("canary"), "{bearer} {ca}");
        }
    }

    #[test]
    fn no_text_form_and_no_error_contains_the_bearer() {
        let bearer = Bearer::fixed("tbk_canary").unwrap();
        let text = format!("{bearer:?} {:?}", bearer.state().authorization);
        assert!(!text.contains("canary"), "{text}");
        let error = Bearer::fixed("tbk_canary\nx").unwrap_err();
        assert!(!error.to_string().contains("canary"), "{error}");
    }
}
