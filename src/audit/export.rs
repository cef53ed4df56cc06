//! The lines of an export: what `audit export` writes and `audit verify --export` reads.
//!
//! `docs/audit-format.md` says the same for a second implementation; change both or neither.

use serde::{Deserialize, Serialize};

use super::{
    chain::StoredEvent,
    checkpoint::{PruningReceipt, SignedCheckpoint},
    timestamp_format,
    verify::Claim,
};
use crate::domain::clock::Timestamp;

/// The version of the format.
const FORMAT: u32 = 1;

/// A line.
#[derive(Clone, Debug, PartialEq)]
pub enum Line {
    /// A record.
    Record(Box<StoredEvent>),
    /// What is said of the records.
    Statement(Statement),
}

/// A line that is no record: one object with one key, which names it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Statement {
    /// The first line.
    AuditExport(Opening),
    /// What the database says of a chain.
    Chain(Claim),
    /// What retention removed.
    PruningReceipt(PruningReceipt),
    /// A signed head.
    ChainHead(SignedCheckpoint),
    /// The last line: without it, the file was cut short.
    End {
        /// How many records there are.
        records: u64,
    },
}

/// What an export holds.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Opening {
    /// The format's version.
    version: u32,
    /// When it was made.
    #[serde(with = "timestamp_format")]
    pub at: Timestamp,
    /// Whether it holds every record that there was.
    pub whole: bool,
}

impl Opening {
    /// The opening of an export that is made at `at`.
    #[must_use]
    pub fn new(at: Timestamp, whole: bool) -> Self {
        Self { version: FORMAT, at, whole }
    }
}

impl Line {
    /// Reads a line, with or without its end.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(line: &[u8]) -> Result<Self, String> {
        // Nearly all lines are records.
        let no_record = match serde_json::from_slice(line) {
            Ok(event) => return Ok(Self::Record(Box::new(event))),
            Err(error) => error,
        };
        match serde_json::from_slice(line) {
            Ok(Statement::AuditExport(Opening { version, .. })) if version != FORMAT => {
                Err(format!("the format is {version}, not {FORMAT}"))
            }
            Ok(statement) => Ok(Self::Statement(statement)),
            Err(_) => Err(format!("neither a record nor a statement of an export: {no_record}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;
    use crate::audit::chain::tests::{any_record, link};

    #[test]
    fn the_lines_have_the_documented_form() {
        let opening = Statement::AuditExport(Opening::new(DateTime::UNIX_EPOCH, true));
        let lines = [
            (
                opening,
                r#"{"audit_export":{"version":1,"at":"1970-01-01T00:00:00.000000Z","whole":true}}"#,
            ),
            (Statement::End { records: 3 }, r#"{"end":{"records":3}}"#),
        ];
        for (statement, text) in lines {
            assert_eq!(serde_json::to_string(&statement).unwrap(), text);
            assert_eq!(Line::parse(text.as_bytes()), Ok(Line::Statement(statement)));
        }
        let claim = Claim::of(&link());
        let text = serde_json::to_string(&Statement::Chain(claim.clone())).unwrap();
        assert!(text.starts_with(r#"{"chain":{"chain":"c00000001-"#), "{text}");
        let read = Line::parse(text.as_bytes());
        assert_eq!(read, Ok(Line::Statement(Statement::Chain(claim))));
    }

    #[test]
    fn a_line_that_is_neither_is_refused() {
        for line in ["", "{}", "x", r#"{"end":{}}"#, r#"{"chain":{"chain":"c1"}}"#] {
            assert!(Line::parse(line.as_bytes()).is_err(), "{line}");
        }
        let newer =
            r#"{"audit_export":{"version":2,"at":"1970-01-01T00:00:00.000000Z","whole":true}}"#;
        assert_eq!(Line::parse(newer.as_bytes()), Err("the format is 2, not 1".into()));
    }

    proptest! {
        #[test]
        fn any_record_is_a_line_that_reads_back(record in any_record()) {
            let mut event = StoredEvent::unplaced(record, &link());
            event.place(&mut link().root());
            let line = serde_json::to_vec(&event).unwrap();
            prop_assert_eq!(Line::parse(&line), Ok(Line::Record(Box::new(event))));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in any::<Vec<u8>>()) {
            let _ = Line::parse(&bytes);
        }
    }
}
