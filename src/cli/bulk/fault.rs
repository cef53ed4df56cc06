//! What is wrong with a row.

use std::fmt;

/// What is wrong with a row, and where. It never holds what the file holds.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(in crate::cli) struct Fault {
    /// The line on which the row begins, from 1.
    pub(in crate::cli) line: usize,
    /// The name of the column, if the fault is in one.
    pub(in crate::cli) column: Option<&'static str>,
    /// The rule that is broken.
    pub(in crate::cli) text: String,
}

impl Fault {
    pub(super) fn of_line(line: usize, text: impl Into<String>) -> Self {
        Self { line, column: None, text: text.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}", self.line)?;
        if let Some(column) = self.column {
            write!(f, ", column {column}")?;
        }
        write!(f, ": {}", self.text)
    }
}

/// Collects the faults of one row.
#[derive(Debug)]
pub(in crate::cli) struct RowFaults {
    line: usize,
    faults: Vec<Fault>,
}

impl RowFaults {
    pub(in crate::cli) fn new(line: usize) -> Self {
        Self { line, faults: Vec::new() }
    }

    /// Adds a fault. `text` must not hold a value of the row.
    pub(in crate::cli) fn add(&mut self, column: &'static str, text: impl Into<String>) {
        self.faults.push(Fault { line: self.line, column: Some(column), text: text.into() });
    }

    /// Returns the value of `checked`, or adds its error, whose text must not hold a value of the row.
    pub(in crate::cli) fn check<T, E: fmt::Display>(
        &mut self,
        column: &'static str,
        checked: Result<T, E>,
    ) -> Option<T> {
        checked.map_err(|error| self.add(column, error.to_string())).ok()
    }

    /// Returns the line on which the row begins.
    pub(in crate::cli) fn line(&self) -> usize {
        self.line
    }

    /// Returns whether the row has a fault.
    pub(in crate::cli) fn any(&self) -> bool {
        !self.faults.is_empty()
    }

    pub(in crate::cli) fn into_faults(self) -> Vec<Fault> {
        self.faults
    }
}
