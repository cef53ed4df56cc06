//! Writes rows as CSV or JSON lines.

use std::path::Path;

use clap::ValueEnum;
use serde_json::{Value, json};

use crate::domain::printable::printable_json;

/// The form of a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(in crate::cli) enum Format {
    /// Comma-separated values, whose first line names the columns
    Csv,
    /// A JSON object on each line
    Jsonl,
}

impl Format {
    /// Returns the form that the name of `file` tells.
    pub(super) fn of(file: &Path) -> Option<Self> {
        match file.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "csv" | "tsv" | "txt" => Some(Self::Csv),
            "json" | "jsonl" | "ndjson" => Some(Self::Jsonl),
            _ => None,
        }
    }
}

/// A value to write.
#[derive(Clone, Debug)]
pub(in crate::cli) enum Cell {
    Text(String),
    Flag(bool),
    Number(Option<i32>),
    List(Vec<String>),
}

impl Cell {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Flag(flag) => flag.to_string(),
            Self::Number(number) => number.map(|number| number.to_string()).unwrap_or_default(),
            Self::List(words) => words.join(" "),
        }
    }

    fn into_json(self) -> Value {
        match self {
            Self::Text(text) => json!(text),
            Self::Flag(flag) => json!(flag),
            Self::Number(number) => json!(number),
            Self::List(words) => json!(words),
        }
    }
}

/// Returns the rows as a file holds them. Each has a cell for each of `columns`.
pub(in crate::cli) fn write(
    format: Format,
    columns: &[&str],
    rows: impl Iterator<Item = Vec<Cell>>,
) -> String {
    let mut file = String::new();
    if format == Format::Csv {
        file += &record(columns.iter().map(|name| (*name).to_owned()));
    }
    for row in rows {
        match format {
            Format::Csv => file += &record(row.into_iter().map(Cell::into_text)),
            Format::Jsonl => {
                // In the order of the columns, which a map would not keep.
                let members = columns.iter().zip(row);
                let members =
                    members.map(|(name, cell)| format!("{}:{}", json!(name), cell.into_json()));
                let object = format!("{{{}}}", members.collect::<Vec<_>>().join(","));
                file += &printable_json(&object);
                file.push('\n');
            }
        }
    }
    file
}

fn record(fields: impl Iterator<Item = String>) -> String {
    let fields: Vec<_> = fields.map(quoted).collect();
    fields.join(",") + "\n"
}

/// Returns a field of CSV. The separators that other files have are quoted too, so that no tool takes them for one.
fn quoted(field: String) -> String {
    let is_plain = !field.contains(['"', ',', ';', '\t', '\r', '\n']) && field.trim() == field;
    if is_plain { field } else { format!("\"{}\"", field.replace('"', "\"\"")) }
}
