//! `account export`: writes the accounts into a file, without their secrets.

use std::process::ExitCode;

use super::columns::EXPORTED;
use crate::{
    cli::{
        bulk::{Cell, ExportArgs},
        output,
    },
    store::admin::{Admin, StoredAccount},
};

pub(super) async fn run(admin: &Admin, output: &ExportArgs) -> anyhow::Result<ExitCode> {
    let accounts = admin.stored_accounts().await?;
    output.write(&EXPORTED, accounts.iter().map(cells))?;
    output::note(format_args!("{} accounts", accounts.len()));
    Ok(ExitCode::SUCCESS)
}

/// Returns the values of [`EXPORTED`].
pub(super) fn cells(account: &StoredAccount) -> Vec<Cell> {
    vec![
        Cell::Text(account.name.clone()),
        Cell::Text(account.client_id.clone()),
        Cell::Flag(account.enabled),
        Cell::Text(account.description.clone()),
    ]
}
