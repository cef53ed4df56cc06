//! `audit export`: prints the log as JSON lines.

use std::{
    io::{self, BufWriter, Write},
    process::ExitCode,
};

use clap::Args;
use futures_util::TryStreamExt;
use serde::Serialize;

use super::filter_args::FilterArgs;
use crate::{
    audit::export::{ExportHeader, ExportStatement},
    cli::{global::GlobalArgs, output},
    domain::{clock::Clock, printable::printable_json},
    store::audit::{AuditSnapshot, Decoded, EventFilter},
};

#[derive(Args, Debug)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    filter: FilterArgs,
}

pub(super) async fn run(global: &GlobalArgs, args: ExportArgs) -> anyhow::Result<ExitCode> {
    let admin = global.auditor().await?;
    let now = Clock::System.wall();
    let filter = args.filter.into_filter(now);
    let mut snapshot = AuditSnapshot::open(admin.pool()).await?;
    let mut writer = LineWriter::new(io::stdout().lock());
    let whole = filter == EventFilter::default();
    writer.write(&ExportStatement::AuditExport(ExportHeader::new(now, whole)))?;
    for claim in snapshot.claims().await? {
        writer.statement(claim.map(ExportStatement::Chain))?;
    }
    for receipt in snapshot.receipts().await? {
        writer.statement(receipt.map(ExportStatement::PruningReceipt))?;
    }
    for checkpoint in snapshot.checkpoints().await? {
        writer.statement(checkpoint.map(ExportStatement::Checkpoint))?;
    }
    let mut records = 0;
    let mut events = snapshot.events(&filter);
    while let Some(event) = events.try_next().await? {
        match event {
            Ok(event) => {
                writer.write(&event)?;
                records += 1;
            }
            Err(unreadable) => writer.statement(Err(unreadable))?,
        }
    }
    writer.write(&ExportStatement::End { records })?;
    let unreadable = writer.flush()?;
    output::note(format_args!("{records} records"));
    if unreadable > 0 {
        output::note(format_args!(
            "{unreadable} rows cannot be read: the export names them, see `audit verify`"
        ));
    }
    Ok(ExitCode::from(u8::from(unreadable > 0)))
}

/// Buffered standard output of JSON lines.
struct LineWriter<W: Write> {
    out: BufWriter<W>,
    /// How many rows could not be read.
    unreadable: u64,
}

impl<W: Write> LineWriter<W> {
    fn new(out: W) -> Self {
        Self { out: BufWriter::with_capacity(1 << 18, out), unreadable: 0 }
    }

    /// Writes a statement, or the one that says which row cannot be read.
    fn statement(&mut self, statement: Decoded<ExportStatement>) -> anyhow::Result<()> {
        self.unreadable += u64::from(statement.is_err());
        self.write(&statement.unwrap_or_else(|row| ExportStatement::Unreadable(*row)))
    }

    fn write(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        let line = serde_json::to_string(value)?;
        let line = printable_json(&line);
        let written = self.out.write_all(line.as_bytes());
        output::check_written(written.and_then(|()| self.out.write_all(b"\n")))
    }

    /// Writes what is buffered, and returns how many rows could not be read.
    fn flush(mut self) -> anyhow::Result<u64> {
        output::check_written(self.out.flush())?;
        Ok(self.unreadable)
    }
}
