//! The lines that `audit export` writes and `audit verify --export` reads.
//!
//! `docs/audit-format.md` describes the same for other implementations: a change here needs a
//! change there.

use serde::{Deserialize, Serialize};

use super::{
    chain::StoredEvent,
    checkpoint::{PruningReceipt, SignedCheckpoint},
    json_error, timestamp_format,
    unreadable::Unreadable,
    verify::ChainClaim,
};
use crate::domain::clock::Timestamp;

/// Version of the line format, in an export's first line.
const FORMAT: u32 = 1;

/// One line of an export.
#[derive(Clone, Debug, PartialEq)]
pub enum ExportLine {
    /// A record of the log.
    Record(Box<StoredEvent>),
    /// A line about the records.
    Statement(ExportStatement),
}

/// A line that is not a record: a JSON object with one key, which is the variant's name in snake case. Two
/// variants are renamed, since the format calls them `cut` and `head`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportStatement {
    /// The first line.
    AuditExport(ExportHeader),
    /// What the database claims about a chain.
    Chain(ChainClaim),
    /// A range of records that retention removed.
    #[serde(rename = "cut")]
    PruningReceipt(PruningReceipt),
    /// A signed checkpoint.
    #[serde(rename = "head")]
    Checkpoint(SignedCheckpoint),
    /// A row that could not be decoded, and so is not in the export.
    Unreadable(Unreadable),
    /// The last line. If it is absent, the file is truncated.
    End {
        /// Number of records in the export.
        records: u64,
    },
}

/// The first line of an export: the format's version, and the export's time and extent.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ExportHeader {
    /// The format's version.
    version: u32,
    /// When the export was made.
    #[serde(with = "timestamp_format")]
    pub at: Timestamp,
    /// Whether the export holds every record that the database had at that time.
    pub whole: bool,
}

impl ExportHeader {
    /// Returns the first line of an export made at `at`, in the present format.
    #[must_use]
    pub fn new(at: Timestamp, whole: bool) -> Self {
        Self { version: FORMAT, at, whole }
    }
}

impl ExportLine {
    /// Parses a line, with or without its line end.
    ///
    /// # Errors
    /// Returns what is wrong, without quoting the line.
    pub fn parse(line: &[u8]) -> Result<Self, String> {
        // Nearly all lines are records, so that is tried first.
        let not_a_record = match serde_json::from_slice(line) {
            Ok(event) => return Ok(Self::Record(Box::new(event))),
            Err(error) => error,
        };
        match serde_json::from_slice(line) {
            Ok(ExportStatement::AuditExport(ExportHeader { version, .. })) if version != FORMAT => {
                Err(format!("the format is {version}, not {FORMAT}"))
            }
            Ok(statement) => Ok(Self::Statement(statement)),
            Err(_) => Err(format!(
                "neither a record nor a statement of an export: {}",
                json_error::describe(&not_a_record)
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        audit::{
            chain::{
                ChainHead, Digest,
                tests::{any_record, link},
            },
            checkpoint::PrunedRange,
        },
        crypto::Keyring,
    };

    #[test]
    fn the_lines_have_the_documented_form() {
        let opening = ExportStatement::AuditExport(ExportHeader::new(DateTime::UNIX_EPOCH, true));
        let lines = [
            (
                opening,
                r#"{"audit_export":{"version":1,"at":"1970-01-01T00:00:00.000000Z","whole":true}}"#,
            ),
            (ExportStatement::End { records: 3 }, r#"{"end":{"records":3}}"#),
        ];
        for (statement, text) in lines {
            assert_eq!(serde_json::to_string(&statement).unwrap(), text);
            assert_eq!(ExportLine::parse(text.as_bytes()), Ok(ExportLine::Statement(statement)));
        }
        let claim = ChainClaim::of(&link());
        let text = serde_json::to_string(&ExportStatement::Chain(claim.clone())).unwrap();
        assert!(text.starts_with(r#"{"chain":{"chain":"c00000001-"#), "{text}");
        let read = ExportLine::parse(text.as_bytes());
        assert_eq!(read, Ok(ExportLine::Statement(ExportStatement::Chain(claim))));

        let keyring = Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap();
        let head = ChainHead { seq: 2, hash: Digest([1; 32]) };
        let range = PrunedRange { first_seq: 1, prev_hash: Digest::ZERO, last: head };
        let receipt = PruningReceipt::new(&keyring, "c1", range, DateTime::UNIX_EPOCH);
        let checkpoint = SignedCheckpoint::new(&keyring, "c1", head, DateTime::UNIX_EPOCH);
        for (statement, start) in [
            (ExportStatement::PruningReceipt(receipt), r#"{"cut":{"chain":"c1","first_seq":1,"#),
            (ExportStatement::Checkpoint(checkpoint), r#"{"head":{"chain":"c1","seq":2,"hash":"#),
        ] {
            let text = serde_json::to_string(&statement).unwrap();
            assert!(text.starts_with(start), "{text}");
            assert_eq!(ExportLine::parse(text.as_bytes()), Ok(ExportLine::Statement(statement)));
        }
    }

    #[test]
    fn a_line_that_is_neither_a_record_nor_a_statement_is_refused() {
        for line in ["", "{}", "x", r#"{"end":{}}"#, r#"{"chain":{"chain":"c1"}}"#] {
            assert!(ExportLine::parse(line.as_bytes()).is_err(), "{line}");
        }
        let newer =
            r#"{"audit_export":{"version":2,"at":"1970-01-01T00:00:00.000000Z","whole":true}}"#;
        assert_eq!(ExportLine::parse(newer.as_bytes()), Err("the format is 2, not 1".into()));
    }

    proptest! {
        #[test]
        fn any_record_is_a_line_that_reads_back(record in any_record()) {
            let mut event = StoredEvent::from_record(record, &link());
            event.link_after(&mut link().root());
            let line = serde_json::to_vec(&event).unwrap();
            prop_assert_eq!(ExportLine::parse(&line), Ok(ExportLine::Record(Box::new(event))));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in any::<Vec<u8>>()) {
            let _ = ExportLine::parse(&bytes);
        }
    }
}
