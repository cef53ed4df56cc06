//! The only module that prints: results to standard output, everything else to standard error.
//!
//! Texts may come from the database, files, the upstream or callers. So [`line()`], [`note`], [`json`] and tables escape
//! what would move a terminal's cursor or begin another line. Only [`block`] and [`bytes()`] print a text as it is.

use std::{
    fmt::{self, Display},
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use rustix::fs::{FileType, RawMode, fstat};
use serde::Serialize;
use thiserror::Error;

use crate::{
    domain::printable::{is_printable, printable, printable_json},
    telemetry,
};

/// The reader of standard output has closed it, as `head` does.
#[derive(Debug, Error)]
#[error("standard output is closed")]
pub(super) struct OutputClosed;

/// Prints one line to standard output. Other characters than printable ones are escaped.
///
/// # Errors
/// [`OutputClosed`] when standard output is a pipe whose reader has closed it.
pub(super) fn line(text: impl Display) -> anyhow::Result<()> {
    block(printable(&text.to_string()))
}

/// Prints lines to standard output as they are: a text of ours.
///
/// # Errors
/// As [`line()`].
pub(super) fn block(text: impl Display) -> anyhow::Result<()> {
    bytes(format!("{text}\n").as_bytes())
}

/// Prints a text of several lines to standard output, as [`note`] does to standard error.
pub(super) fn lines(text: impl Display) -> anyhow::Result<()> {
    block(note_text(&text.to_string()))
}

/// Prints a text with a secret to standard output, as it is. Warns first if that is a file which others may read.
pub(super) fn secret_line(text: impl Display) -> anyhow::Result<()> {
    let mode = fstat(io::stdout()).map_or(0, |stat| stat.st_mode);
    if is_exposed_file(mode) {
        note(format_args!(
            "warning: standard output is a file that others may read (mode {:03o}): use --out FILE, or \
             set umask 077 first",
            mode & 0o777
        ));
    }
    block(text)
}

/// Returns whether `mode` is that of a regular file to which others than its owner have access.
fn is_exposed_file(mode: RawMode) -> bool {
    FileType::from_raw_mode(mode) == FileType::RegularFile && mode & 0o077 != 0
}

/// Prints `bytes` to standard output as they are.
pub(super) fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    check_written(stdout.write_all(bytes).and_then(|()| stdout.flush()))
}

/// Prints a file to standard output: as it is, but to a terminal with all characters escaped that it acts on.
pub(super) fn document(text: &str) -> anyhow::Result<()> {
    if !io::stdout().is_terminal() {
        return bytes(text.as_bytes());
    }
    text.lines().try_for_each(line)
}

/// Returns the result of writing to standard output, with a broken pipe as [`OutputClosed`].
pub(super) fn check_written(written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(OutputClosed.into()),
        written => Ok(written?),
    }
}

/// Prints a value as indented JSON to standard output.
pub(super) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    block(printable_json(&serde_json::to_string_pretty(value)?))
}

/// Prints a value as JSON, in one line, to standard output.
pub(super) fn json_line(value: &impl Serialize) -> anyhow::Result<()> {
    block(printable_json(&serde_json::to_string(value)?))
}

/// Prints a text for the user to standard error. Further lines of it are indented, so that none looks like another
/// message. If printing fails, the error is ignored, because there is no other place to report it.
pub(super) fn note(text: impl Display) {
    telemetry::stderr_line(note_text(&text.to_string()));
}

fn note_text(text: &str) -> String {
    let mut lines = text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line));
    let first = printable(lines.next().unwrap_or_default()).into_owned();
    lines.fold(first, |text, line| {
        let indent = if line.starts_with(' ') || line.is_empty() { "" } else { "  " };
        format!("{text}\n{indent}{}", printable(line))
    })
}

/// A table with aligned columns and no lines, the same on a terminal and in a pipe.
pub(super) struct Table(comfy_table::Table);

impl Table {
    /// Returns an empty table with these column names.
    pub(super) fn new<const N: usize>(header: [&str; N]) -> Self {
        let mut table = Self::without_header();
        table.0.set_header(header);
        table
    }

    /// Returns an empty table without column names, for pairs of a name and a value.
    pub(super) fn without_header() -> Self {
        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::NOTHING);
        Self(table)
    }

    /// Adds a row. Control characters in the cells are escaped.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.0.add_row(cells.map(|cell| printable(&cell).into_owned()));
    }

    /// Prints the table, or `empty` to standard error if it has no rows.
    pub(super) fn print(&self, empty: &str) -> anyhow::Result<()> {
        if self.0.is_empty() {
            note(empty);
            return Ok(());
        }
        block(self)
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `comfy_table` pads each line at both ends.
        let bare = |line: String| line.strip_prefix(' ').unwrap_or(&line).trim_end().to_owned();
        f.write_str(&self.0.lines().map(bare).collect::<Vec<_>>().join("\n"))
    }
}

/// Says on standard error how far a command is: a bar on a terminal, else a line at each tenth.
pub(super) struct Progress {
    what: &'static str,
    total: u64,
    on_terminal: bool,
    /// The tenths that were reported, or on a terminal when the bar was drawn last.
    tenths: u64,
    drawn: Option<Instant>,
}

impl Progress {
    /// How often the bar is drawn.
    const REDRAW: Duration = Duration::from_millis(100);
    /// The length of the bar, in characters.
    const BAR: u64 = 30;

    /// Returns the progress of `what` things of which there are `total`, a positive number.
    pub(super) fn new(what: &'static str, total: u64) -> Self {
        let on_terminal = io::stderr().is_terminal();
        Self { what, total: total.max(1), on_terminal, tenths: 0, drawn: None }
    }

    /// Says that `done` things are done, if that is worth it.
    pub(super) fn show(&mut self, done: u64) {
        let done = done.min(self.total);
        if self.on_terminal {
            if done == self.total || self.drawn.is_none_or(|at| at.elapsed() >= Self::REDRAW) {
                self.drawn = Some(Instant::now());
                let _ = write!(io::stderr().lock(), "\r{}", bar(self.what, done, self.total));
            }
        } else if done * 10 / self.total > self.tenths {
            self.tenths = done * 10 / self.total;
            note(format_args!("{done} of {} {}", self.total, self.what));
        }
    }

    /// Ends the line of the bar.
    pub(super) fn finish(self) {
        if self.drawn.is_some() {
            let _ = writeln!(io::stderr().lock());
        }
    }
}

fn bar(what: &str, done: u64, total: u64) -> String {
    let filled = usize::try_from(Progress::BAR * done / total).unwrap_or_default();
    let rest = usize::try_from(Progress::BAR).unwrap_or_default() - filled;
    format!("[{}{}] {done} of {total} {what}", "#".repeat(filled), ".".repeat(rest))
}

/// Quotes `value` unless it is one unambiguous word.
pub(super) fn word(value: &str) -> String {
    let plain = |c: char| is_printable(c) && !c.is_whitespace() && !matches!(c, '"' | '=');
    if !value.is_empty() && value.chars().all(plain) {
        return value.to_owned();
    }
    format!("{value:?}")
}

/// Returns the text of `value`, or `-` if there is none.
pub(super) fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_aligned_columns_and_no_lines() {
        let mut table = Table::new(["NAME", "STATE", "NOTE"]);
        table.row(["acme".into(), "fresh".into(), String::new()]);
        table.row([String::new(), "rejected".into(), "61006\u{1b}[2J".into()]);
        let expected = "\
NAME  STATE     NOTE
acme  fresh
      rejected  61006\\u{1b}[2J";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn a_bar_fills_with_what_is_done() {
        assert_eq!(bar("values", 0, 3), format!("[{}] 0 of 3 values", ".".repeat(30)));
        assert_eq!(bar("values", 1, 3), "[##########....................] 1 of 3 values");
        assert_eq!(bar("values", 3, 3), format!("[{}] 3 of 3 values", "#".repeat(30)));
    }

    #[test]
    fn only_a_regular_file_that_others_may_use_is_exposed() {
        for (mode, exposed) in [
            (0o100_644, true),
            (0o100_640, true),
            (0o100_602, true),
            (0o100_600, false),
            (0o010_644, false),
            (0o020_666, false),
            (0, false),
        ] {
            assert_eq!(is_exposed_file(mode), exposed, "{mode:o}");
        }
    }

    #[test]
    fn further_lines_of_a_note_look_like_no_other_message() {
        assert_eq!(
            note_text("settings:\n  A: missing\n\n  B: missing"),
            "settings:\n  A: missing\n\n  B: missing"
        );
        assert_eq!(
            note_text("error: x\nall of it holds\r\n\u{1b}[2J"),
            "error: x\n  all of it holds\n  \\u{1b}[2J"
        );
    }
}
