//! Errors of the TLS files.

use std::{
    io,
    path::{Path, PathBuf},
};

use rustls::pki_types::pem;
use thiserror::Error;

use crate::files::given_path::shown;

/// Why the TLS files cannot be used. No message quotes a file, which may hold a key.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{setting}: {}: {error}", shown(file))]
    Io {
        /// The setting that names the file.
        setting: &'static str,
        /// The file's path.
        file: PathBuf,
        /// The cause.
        #[source]
        error: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {why}", shown(file))]
    Malformed {
        /// The file's path.
        file: PathBuf,
        /// What it lacks or holds instead, in words that quote nothing of it.
        why: String,
    },
    /// Certificate and key are each valid but do not belong together, or the TLS library refuses them.
    #[error("{} and {} cannot be used: {why}", shown(cert), shown(key))]
    Refused {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// The library's reason.
        why: String,
    },
}

/// Describes why a file is not PEM. The error's own text may quote a line of the file.
pub(super) fn pem_fault(error: &pem::Error) -> &'static str {
    match error {
        pem::Error::MissingSectionEnd { .. } => "a section has no end",
        pem::Error::IllegalSectionStart { .. } => "a section begins with a malformed line",
        pem::Error::Base64Decode(_) => "a section is not base64",
        _ => "it cannot be read",
    }
}

/// Returns the error that `file` does not hold what it should. `why` must not quote it.
pub(super) fn malformed(file: &Path, why: &str) -> TlsError {
    TlsError::Malformed { file: file.to_owned(), why: why.to_owned() }
}
