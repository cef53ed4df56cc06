//! Reads CSV (RFC 4180), as spreadsheets write it: separated by commas, semicolons or tabs, with any line ends.
//!
//! Quotation marks are taken strictly. A reader that repairs them, as the usual ones do, takes all that follows a mark
//! which is never closed for one value: API KEYs of the next rows would become the description of an account, which is
//! stored as plain text.

use zeroize::Zeroizing;

use super::{
    columns::{self, Column, Content, Row},
    fault::{Fault, RowFaults},
};

/// What may separate the values of a row.
const SEPARATORS: [char; 3] = [',', ';', '\t'];
const OPEN: &str =
    "a quotation mark is opened and never closed, so the rows after it cannot be told apart";
const AFTER_LINES: &str = "there is text after a closing quotation mark. The value has several lines, so a mark may be \
    missing, and the rows cannot be told apart";
const AFTER: &str =
    "there is text after the closing quotation mark: write a mark inside of a value twice";
const INSIDE: &str = "there is a quotation mark inside: write the value in quotation marks, and the one inside twice";

/// Reads rows with `columns`, of which the first is required.
///
/// # Errors
/// When the first line does not name the columns, or the rows cannot be told apart.
pub(super) fn read(text: &str, columns: &'static [Column]) -> Result<Content, Fault> {
    let mut records = Records::new(text);
    let mut content = Content::default();
    let header = loop {
        let Some(header) = records.next() else {
            return Err(Fault::of_line(1, first_line(columns)));
        };
        let header = header.map_err(|(line, _, text)| Fault::of_line(line, text))?;
        if !header.is_empty() {
            break header;
        }
    };
    let order = header.order(columns)?;
    while let Some(record) = records.next() {
        let column = |field: usize| order.get(field).map(|column| columns[*column].name);
        let record = record.map_err(|(line, field, text)| Fault {
            line,
            column: column(field),
            text: text.into(),
        })?;
        if record.is_empty() {
            continue;
        }
        if let Some((field, text)) = record.fault {
            let (line, column) = (record.line, column(field));
            content.faults.push(Fault { line, column, text: text.into() });
        } else if record.fields.len() != order.len() {
            content.faults.push(Fault::of_line(
                record.line,
                format!(
                    "it has {} values, and the first line has {}",
                    record.fields.len(),
                    order.len()
                ),
            ));
        } else {
            let mut cells: Vec<_> = columns.iter().map(|_| None).collect();
            for (column, field) in order.iter().zip(record.fields) {
                cells[*column] = Some(field);
            }
            content.rows.push(Row { line: record.line, cells });
        }
    }
    Ok(content)
}

/// Returns what to write into the first line.
fn first_line(columns: &[Column]) -> String {
    format!(
        "the first line must name the columns. There are {}; {} is required",
        columns::names(columns),
        columns[0].name
    )
}

/// The values of a row, and the first fault with its place.
struct Record {
    line: usize,
    fields: Vec<Zeroizing<String>>,
    fault: Option<(usize, &'static str)>,
}

impl Record {
    /// Returns whether it is an empty line, or one that a spreadsheet writes for an empty row.
    fn is_empty(&self) -> bool {
        self.fault.is_none() && self.fields.iter().all(|field| field.is_empty())
    }

    /// Returns which column each field of the first line names.
    fn order(&self, columns: &'static [Column]) -> Result<Vec<usize>, Fault> {
        let mut faults = RowFaults::new(self.line);
        let mut order = Vec::new();
        for (at, name) in self.fields.iter().enumerate() {
            match columns.iter().position(|column| column.is_called(name)) {
                Some(column) if order.contains(&column) => {
                    faults.add(columns[column].name, "it is there twice");
                }
                Some(column) => order.push(column),
                None => {
                    let text = format!(
                        "the name of column {} is unknown: {}",
                        at + 1,
                        first_line(columns)
                    );
                    return Err(Fault::of_line(self.line, text));
                }
            }
        }
        if let Some(fault) = faults.into_faults().pop() {
            return Err(fault);
        }
        if self.fault.is_some() || !order.contains(&0) {
            return Err(Fault::of_line(self.line, first_line(columns)));
        }
        Ok(order)
    }
}

/// Splits a text into records.
struct Records<'a> {
    rest: &'a str,
    /// The line at which `rest` begins.
    line: usize,
    separator: char,
}

impl<'a> Records<'a> {
    fn new(text: &'a str) -> Self {
        // Excel takes the separator from such a line.
        let first = first_line_of(text);
        let stated = first.strip_prefix("sep=");
        let stated =
            stated.and_then(|rest| SEPARATORS.into_iter().find(|it| rest == it.to_string()));
        if let Some(separator) = stated {
            let mut records = Self { rest: &text[first.len()..], line: 1, separator };
            records.end_line();
            return records;
        }
        // Names of columns have none of these characters, so the one that is there separates them.
        let first = first_line_of(text.trim_start_matches(['\r', '\n']));
        let count = |separator: &char| first.matches(*separator).count();
        // Of equal ones, `max_by_key` returns the last.
        let separator = SEPARATORS.into_iter().rev().max_by_key(count).unwrap_or(',');
        Self { rest: text, line: 1, separator }
    }

    /// Returns the next record, or `None` at the end.
    ///
    /// # Errors
    /// When it cannot be told where the record ends: the line, the index of the field, and the fault.
    fn next(&mut self) -> Option<Result<Record, (usize, usize, &'static str)>> {
        if self.rest.is_empty() {
            return None;
        }
        let mut record = Record { line: self.line, fields: Vec::new(), fault: None };
        loop {
            let field = record.fields.len();
            let (value, fault) = if self.rest.starts_with('"') {
                match self.quoted() {
                    Ok(read) => read,
                    Err(fault) => return Some(Err((record.line, field, fault))),
                }
            } else {
                let value = self.plain();
                (Zeroizing::new(value.to_owned()), value.contains('"').then_some(INSIDE))
            };
            record.fields.push(value);
            record.fault = record.fault.or(fault.map(|fault| (field, fault)));
            let Some(rest) = self.rest.strip_prefix(self.separator) else {
                self.end_line();
                return Some(Ok(record));
            };
            self.rest = rest;
        }
    }

    /// Takes what is before the next separator or line end.
    fn plain(&mut self) -> &'a str {
        let end = self.rest.find([self.separator, '\r', '\n']).unwrap_or(self.rest.len());
        let (value, rest) = self.rest.split_at(end);
        self.rest = rest;
        value
    }

    /// Takes a value in quotation marks, and what follows before the next separator or line end, which is a fault.
    fn quoted(&mut self) -> Result<(Zeroizing<String>, Option<&'static str>), &'static str> {
        let inside = &self.rest[1..];
        let mut end = 0;
        loop {
            end += inside[end..].find('"').ok_or(OPEN)?;
            if !inside[end + 1..].starts_with('"') {
                break;
            }
            end += 2;
        }
        let raw = &inside[..end];
        // Growing would leave copies of a secret behind in memory.
        let mut value = Zeroizing::new(String::with_capacity(raw.len()));
        for (nth, part) in raw.split("\"\"").enumerate() {
            if nth > 0 {
                value.push('"');
            }
            value.push_str(part);
        }
        self.rest = &inside[end + 1..];
        let lines = line_ends(raw);
        self.line += lines;
        let fault = match (self.plain().is_empty(), lines) {
            (true, _) => None,
            (false, 0) => Some(AFTER),
            (false, _) => return Err(AFTER_LINES),
        };
        Ok((value, fault))
    }

    /// Takes the end of the line, which is `\n`, `\r\n` or `\r`, or that of the text.
    fn end_line(&mut self) {
        let rest = self.rest.strip_prefix('\r').unwrap_or(self.rest);
        self.rest = rest.strip_prefix('\n').unwrap_or(rest);
        self.line += 1;
    }
}

fn first_line_of(text: &str) -> &str {
    text.split(['\r', '\n']).next().unwrap_or_default()
}

fn line_ends(text: &str) -> usize {
    text.matches(['\r', '\n']).count() - text.matches("\r\n").count()
}
