//! `audit export`.

use std::io::{self, BufWriter, Write};

use clap::Args;
use futures_util::TryStreamExt;
use serde::Serialize;

use super::FilterArgs;
use crate::{
    audit::export::{Opening, Statement},
    cli::{Global, output},
    domain::clock::Clock,
    store::audit::{EventFilter, Ledger},
};

#[derive(Args, Debug)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    filter: FilterArgs,
}

pub(super) async fn run(global: &Global, args: ExportArgs) -> anyhow::Result<()> {
    let admin = global.admin(None).await?;
    let now = Clock::System.now();
    let filter = args.filter.filter(now);
    let mut ledger = Ledger::open(admin.pool()).await?;
    let mut lines = Lines(BufWriter::with_capacity(1 << 18, io::stdout().lock()));
    let whole = filter == EventFilter::default();
    lines.line(&Statement::AuditExport(Opening::new(now, whole)))?;
    for claim in ledger.claims().await? {
        lines.line(&Statement::Chain(claim))?;
    }
    for cut in ledger.cuts().await? {
        lines.line(&Statement::PruningReceipt(cut))?;
    }
    for head in ledger.heads().await? {
        lines.line(&Statement::ChainHead(head))?;
    }
    let mut records = 0;
    let mut events = ledger.events(&filter);
    while let Some(event) = events.try_next().await? {
        lines.line(&event)?;
        records += 1;
    }
    lines.line(&Statement::End { records })?;
    lines.end()?;
    output::note(format_args!("{records} records"));
    Ok(())
}

/// Standard output, line by line, and in large pieces.
struct Lines<W: Write>(BufWriter<W>);

impl<W: Write> Lines<W> {
    fn line(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        let line = serde_json::to_vec(value)?;
        output::check_written(self.0.write_all(&line).and_then(|()| self.0.write_all(b"\n")))
    }

    fn end(mut self) -> anyhow::Result<()> {
        output::check_written(self.0.flush())
    }
}
