//! `audit export`: prints the log as JSON lines.

use std::io::{self, BufWriter, Write};

use clap::Args;
use futures_util::TryStreamExt;
use serde::Serialize;

use super::filter_args::FilterArgs;
use crate::{
    audit::export::{ExportHeader, ExportStatement},
    cli::{global::GlobalArgs, output},
    domain::clock::Clock,
    store::audit::{AuditSnapshot, EventFilter},
};

#[derive(Args, Debug)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    filter: FilterArgs,
}

pub(super) async fn run(global: &GlobalArgs, args: ExportArgs) -> anyhow::Result<()> {
    let admin = global.auditor().await?;
    let now = Clock::System.now();
    let filter = args.filter.into_filter(now);
    let mut snapshot = AuditSnapshot::open(admin.pool()).await?;
    let mut writer = LineWriter(BufWriter::with_capacity(1 << 18, io::stdout().lock()));
    let whole = filter == EventFilter::default();
    writer.write(&ExportStatement::AuditExport(ExportHeader::new(now, whole)))?;
    for claim in snapshot.claims().await? {
        writer.write(&ExportStatement::Chain(claim))?;
    }
    for receipt in snapshot.receipts().await? {
        writer.write(&ExportStatement::PruningReceipt(receipt))?;
    }
    for checkpoint in snapshot.checkpoints().await? {
        writer.write(&ExportStatement::Checkpoint(checkpoint))?;
    }
    let mut records = 0;
    let mut events = snapshot.events(&filter);
    while let Some(event) = events.try_next().await? {
        writer.write(&event)?;
        records += 1;
    }
    writer.write(&ExportStatement::End { records })?;
    writer.flush()?;
    output::note(format_args!("{records} records"));
    Ok(())
}

/// Buffered standard output of JSON lines.
struct LineWriter<W: Write>(BufWriter<W>);

impl<W: Write> LineWriter<W> {
    fn write(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        let line = serde_json::to_vec(value)?;
        output::check_written(self.0.write_all(&line).and_then(|()| self.0.write_all(b"\n")))
    }

    fn flush(mut self) -> anyhow::Result<()> {
        output::check_written(self.0.flush())
    }
}
