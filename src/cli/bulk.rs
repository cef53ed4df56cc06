//! Files with many rows: CSV or JSON lines, which `import` reads and `export` writes.
//!
//! A file may hold secrets in any place, also where none belongs, such as a first line that does not name the columns.
//! So a [`Fault`] says where it is and which rule is broken, and never quotes what the file holds: no value, no name
//! of an unknown column, and no text of a parser's error.

mod columns;
mod csv;
mod fault;
mod json_lines;
mod write;

use std::{
    fmt, io, mem,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use zeroize::Zeroizing;

pub(super) use self::{
    columns::{Column, Content, Kind, Row},
    fault::{Fault, RowFaults},
    write::{Cell, Format, write},
};
use super::{global::path_argument, output};
use crate::{
    files::{
        atomic,
        bounded::{self, Limits},
        given_path::shown,
        text,
    },
    store::StoreError,
};

/// The limits of what is read. 100,000 accounts with descriptions need a third of the size. The wait is long because
/// standard input may come from a program that first asks for a password.
const FILE: Limits = Limits { bytes: 64 << 20, wait: Duration::from_mins(5) };
/// How many faults are printed. More of them rarely help, and would hide the first ones.
const MAX_PRINTED: usize = 20;

#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
#[derive(Args, Debug)]
pub(super) struct ImportArgs {
    /// The file, or - for standard input
    #[arg(value_parser = path_argument())]
    file: PathBuf,
    /// The form of the file, if its name does not tell
    #[arg(long)]
    format: Option<Format>,
    /// Change what exists already, instead of refusing its rows
    #[arg(long)]
    update: bool,
    /// Check the file and say what would change, but change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Leave out rows with faults, instead of refusing the file; exit code 1 if there are any
    #[arg(long, requires = "report")]
    skip_bad: bool,
    /// Write all faults into this new file, as CSV: line, column, fault
    #[arg(long, value_name = "FILE", value_parser = path_argument())]
    report: Option<PathBuf>,
    /// Remove what the file lacks, and print how much that is; without --yes, nothing is changed
    // A row that is left out would look like one that the file lacks.
    #[arg(long, requires = "update", conflicts_with = "skip_bad")]
    prune: bool,
    /// Remove what --prune removes
    #[arg(long, requires = "prune")]
    yes: bool,
}

/// What an import does besides registering what is new.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    /// It changes what exists. Otherwise a row of something that exists is a fault.
    pub(super) update: bool,
    /// It removes what the file lacks.
    pub(super) prune: bool,
}

/// Reads the rows of `text`, which may have `columns`; the first of them is required.
///
/// # Errors
/// When the rows cannot be told apart, or the columns are unknown.
pub(super) fn parse(
    format: Format,
    text: &str,
    columns: &'static [Column],
) -> Result<Content, Fault> {
    match format {
        Format::Csv => csv::read(text, columns),
        Format::Jsonl => json_lines::read(text, columns),
    }
}

impl ImportArgs {
    pub(super) fn mode(&self) -> Mode {
        Mode { update: self.update, prune: self.prune }
    }

    /// Reads the file, whose rows may have `columns`; the first of them is required. Blocks.
    ///
    /// # Errors
    /// When the file cannot be read, or its rows cannot be told apart.
    pub(super) fn read(&self, columns: &'static [Column]) -> anyhow::Result<Content> {
        let name = self.name();
        let Some(format) = self.format.or_else(|| Format::of(&self.file)) else {
            bail!("the form of {name} is unknown: say --format csv or --format jsonl");
        };
        let text = self.text().with_context(|| format!("cannot read {name}"))?;
        parse(format, &text, columns)
            .map_err(|fault| anyhow!("{name} cannot be used, so nothing was changed: {fault}"))
    }

    fn text(&self) -> anyhow::Result<Zeroizing<String>> {
        let mut bytes = if self.is_stdin() {
            bounded::read_from(&io::stdin(), FILE)?
        } else {
            bounded::read_from(&bounded::open(&self.file)?, FILE)?
        };
        ensure!(
            !bytes.starts_with(b"PK\x03\x04"),
            "it is a workbook: in Excel, save it as `CSV UTF-8`"
        );
        text::decode(mem::take(&mut *bytes)).map_err(|error| match error {
            text::NotText::NotUtf8(_) => {
                anyhow!("{error}: save it as UTF-8 (in Excel, as `CSV UTF-8`)")
            }
            error => error.into(),
        })
    }

    fn is_stdin(&self) -> bool {
        self.file == Path::new("-")
    }

    /// Returns what to call the file in a message.
    pub(super) fn name(&self) -> String {
        if self.is_stdin() { "standard input".into() } else { shown(&self.file).to_string() }
    }

    /// Writes the report. Then names the faults, and returns whether there are any.
    ///
    /// # Errors
    /// Unless rows with faults are left out, the error that names the faults.
    pub(super) fn report_faults(&self, mut faults: Vec<Fault>) -> anyhow::Result<bool> {
        // Faults of one row stay in the order of its columns.
        faults.sort_by_key(|fault| fault.line);
        if let Some(report) = &self.report {
            write_report(report, &faults)
                .context("cannot write the report, so nothing was changed")?;
        }
        if faults.is_empty() {
            return Ok(false);
        }
        let printed = faults.iter().take(MAX_PRINTED).map(|fault| format!("\n  {fault}"));
        let more = faults.len().saturating_sub(MAX_PRINTED);
        let more = (more > 0).then(|| format!("\n  and {more} more, which --report FILE lists"));
        let text: String = printed.chain(more).collect();
        let count = faults.len();
        let count = if count == 1 { "1 fault".into() } else { format!("{count} faults") };
        let name = self.name();
        if self.skip_bad {
            output::note(format_args!(
                "warning: {name} has {count}; their rows are left out{text}"
            ));
            return Ok(true);
        }
        bail!("{name} has {count}, so nothing was changed{text}");
    }

    /// With `--prune`, says that `lacking` is removed: all that the file lacks, if that is anything. `rows` is the
    /// number of rows that the file has.
    ///
    /// # Errors
    /// When that needs `--yes`, or the file has no rows.
    pub(super) fn confirm_prune(
        &self,
        lacking: Option<impl fmt::Display>,
        rows: usize,
    ) -> anyhow::Result<()> {
        let Some(lacking) = lacking.filter(|_| self.prune) else { return Ok(()) };
        output::note(format_args!("--prune removes {lacking}"));
        // A file that was not written to its end should not remove everything.
        ensure!(rows > 0, "nothing was changed: {} has no rows", self.name());
        ensure!(self.yes || self.dry_run, "nothing was changed: say --yes");
        Ok(())
    }
}

/// The number of rows that an import registers, changes, removes and leaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) registered: usize,
    pub(super) changed: usize,
    pub(super) removed: usize,
    pub(super) unchanged: usize,
    pub(super) dry_run: bool,
}

pub(super) fn summary(counts: Counts) -> String {
    let Counts { registered, changed, removed, unchanged, dry_run } = counts;
    let prefix = if dry_run { "nothing was changed; without --dry-run: " } else { "" };
    let removed = if removed > 0 { format!("{removed} removed, ") } else { String::new() };
    format!("{prefix}{registered} registered, {changed} changed, {removed}{unchanged} as they were")
}

/// Returns the error of a transaction that imports a file.
pub(super) fn not_imported(error: StoreError) -> anyhow::Error {
    let uncertain = error.is_outcome_uncertain();
    let error = anyhow::Error::from(error);
    if uncertain {
        return error
            .context("all of the file was imported, or nothing of it (--update --dry-run tells)");
    }
    error
}

/// Writes the faults as CSV.
fn write_report(path: &Path, faults: &[Fault]) -> anyhow::Result<()> {
    let columns = ["line", "column", "fault"];
    let rows = faults.iter().map(|fault| {
        let column = fault.column.unwrap_or_default();
        Vec::from([fault.line.to_string(), column.into(), fault.text.clone()].map(Cell::Text))
    });
    write_file(path, &write(Format::Csv, &columns, rows), false)
}

/// Writes a file, as a whole or not at all. One of that name is overwritten only if `replace` says so, since it may be
/// the only one that holds API KEYs.
fn write_file(path: &Path, text: &str, replace: bool) -> anyhow::Result<()> {
    ensure!(replace || path.symlink_metadata().is_err(), "{} exists already", shown(path));
    atomic::replace(path, text.as_bytes()).with_context(|| format!("cannot write {}", shown(path)))
}

#[derive(Args, Debug)]
pub(super) struct ExportArgs {
    /// Write into this new file, instead of standard output
    #[arg(long, value_name = "FILE", value_parser = path_argument())]
    out: Option<PathBuf>,
    /// Replace the file, if there is one
    #[arg(long, requires = "out")]
    replace: bool,
    /// The form, if the file's name does not tell; CSV on standard output
    #[arg(long)]
    format: Option<Format>,
}

impl ExportArgs {
    /// Writes the rows. Blocks.
    pub(super) fn write(
        &self,
        columns: &[&str],
        rows: impl Iterator<Item = Vec<Cell>>,
    ) -> anyhow::Result<()> {
        let by_name = self.out.as_deref().map_or(Some(Format::Csv), Format::of);
        let Some(format) = self.format.or(by_name) else {
            bail!("the form of the file is unknown: say --format csv or --format jsonl");
        };
        let text = write(format, columns, rows);
        match &self.out {
            None => output::document(&text),
            Some(path) => write_file(path, &text, self.replace).context("nothing was exported"),
        }
    }
}

#[cfg(test)]
mod tests;
