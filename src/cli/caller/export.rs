//! `caller export`: writes the callers into a file, without their bearers.

use std::process::ExitCode;

use super::setup::{COLUMNS, cells};
use crate::{
    cli::{bulk::ExportArgs, output},
    domain::clock::Clock,
    store::admin::Admin,
};

pub(super) async fn run(admin: &Admin, output: &ExportArgs) -> anyhow::Result<ExitCode> {
    let callers = admin.caller_setups().await?;
    let columns: Vec<_> = COLUMNS.iter().map(|column| column.name).collect();
    let now = Clock::System.wall();
    output.write(&columns, callers.iter().map(|caller| cells(caller, now)))?;
    output::note(format_args!("{} callers", callers.len()));
    Ok(ExitCode::SUCCESS)
}
