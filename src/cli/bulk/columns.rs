//! The columns that a file may have, and its rows.

use std::fmt;

use zeroize::Zeroizing;

use super::fault::Fault;

/// What a column holds. In CSV everything is text; in JSON lines the value has a type.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::cli) enum Kind {
    Text,
    Flag,
    /// A whole number, or nothing.
    Number,
    /// Words, separated by white space.
    List,
}

/// A column that a file may have.
#[derive(Debug)]
pub(in crate::cli) struct Column {
    pub(in crate::cli) name: &'static str,
    pub(in crate::cli) kind: Kind,
    /// Other names of the column in CSV, as [`normalised`] returns them.
    pub(in crate::cli) aliases: &'static [&'static str],
}

impl Column {
    /// Returns whether the first line of a CSV file calls this column `name`.
    pub(super) fn is_called(&self, name: &str) -> bool {
        let name = normalised(name);
        self.name == name || self.aliases.contains(&name.as_str())
    }
}

/// Returns a column's name without what people write differently: case, and what is between the words.
fn normalised(name: &str) -> String {
    name.trim().to_lowercase().replace([' ', '-', '\u{a0}'], "_")
}

/// Returns the names of `columns`, for a message.
pub(super) fn names(columns: &[Column]) -> String {
    columns.iter().map(|column| column.name).collect::<Vec<_>>().join(", ")
}

/// A row of a file. Its values are not checked yet, and may be secrets.
pub(in crate::cli) struct Row {
    /// The line on which the row begins, from 1.
    pub(in crate::cli) line: usize,
    /// A value for each column that may exist; `None` if the file does not give it.
    pub(super) cells: Vec<Option<Zeroizing<String>>>,
}

impl Row {
    /// Returns the value of the column with this index, if the file gives it.
    pub(in crate::cli) fn get(&self, column: usize) -> Option<&str> {
        self.cells[column].as_ref().map(|text| text.as_str())
    }
}

impl fmt::Debug for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Row(line {})", self.line)
    }
}

/// The rows of a file that could be read, and the faults of the others.
#[derive(Debug, Default)]
pub(in crate::cli) struct Content {
    pub(in crate::cli) rows: Vec<Row>,
    pub(in crate::cli) faults: Vec<Fault>,
}
