//! Errors of the journal.

use std::{error::Error, fmt::Write, io, path::PathBuf, time::Duration};

use thiserror::Error;

/// Why a journal cannot be opened.
#[derive(Debug, Error)]
pub enum JournalError {
    /// A durable record is not what was written: somebody changed the file, or the disk damaged it. The
    /// broker refuses to start, so that the file stays as evidence.
    #[error(
        "the audit journal is damaged: {file}, line {line}: {why}; keep the state directory as \
         evidence and start with another"
    )]
    Damaged {
        /// Name of the segment.
        file: String,
        /// The line, counted from 1; the header is the first line.
        line: usize,
        /// What is wrong with the line.
        why: String,
    },
    /// A file or directory cannot be read or written.
    #[error("the audit journal cannot be opened: {}", file.display())]
    Io {
        /// The file or directory.
        file: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
}

impl JournalError {
    pub(super) fn io(file: &str) -> impl FnOnce(io::Error) -> Self {
        let file = PathBuf::from(file);
        move |source| Self::Io { file, source }
    }

    pub(super) fn damaged(file: &str, line: usize, why: String) -> Self {
        tracing::error!(file, line, why, "the audit journal is damaged");
        Self::Damaged { file: file.to_owned(), line, why }
    }
}

/// Why a chain cannot be read any further.
#[derive(Debug, Error)]
pub enum ReadError {
    /// A segment cannot be read.
    #[error("{file} cannot be read")]
    Io {
        /// Name of the segment.
        file: String,
        /// The error of the file system.
        source: io::Error,
    },
    /// A record is not what was written.
    #[error("{file}, line {line}: {why}")]
    Damaged {
        /// Name of the segment.
        file: String,
        /// The line, counted from 1; the header is the first line.
        line: usize,
        /// What is wrong with the line.
        why: String,
    },
    /// The segment with the next record was deleted.
    #[error("the journal has no segment with record {seq} of chain {chain}")]
    Missing {
        /// Name of the chain.
        chain: String,
        /// Number of the record.
        seq: i64,
    },
}

/// Why a record is not known to be durable.
///
/// The call must be refused, although its record may still be written later.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum AuditUnavailable {
    /// The journal cannot be written.
    #[error("the audit journal cannot be written")]
    Unwritable,
    /// The record was not durable within this time.
    #[error("the audit record was not durable within {0:?}")]
    TooSlow(Duration),
}

/// Returns the text of `error` and of its causes, separated by `: `.
#[must_use]
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
