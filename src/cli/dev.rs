//! The command `dev`.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::bail;
use clap::Args;

use super::{Global, output, time::positive_duration};
use crate::{dev, telemetry};

/// Runs the whole system on this machine, with nothing to set up
///
/// Starts a Postgres, a simulated upstream whose tokens are short-lived, and a broker with the accounts
/// demo-master and demo-agency and the caller demo. Ctrl-C ends and deletes all of it. With
/// `DATABASE_URL` in the environment it uses that database instead, and keeps what it wrote there.
#[derive(Args, Debug)]
pub(super) struct DevArgs {
    /// Keep the database, the keyring and the journal in this directory
    #[arg(long, value_name = "DIR")]
    pub(super) state_dir: Option<PathBuf>,
    /// The lifetime of the simulated upstream's tokens
    #[arg(long, default_value = "60s", value_parser = positive_duration)]
    pub(super) token_life: Duration,
    /// The address of gRPC; without it 127.0.0.1:50051, or another port if that one is in use
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(super) listen: Option<SocketAddr>,
}

pub(super) async fn run(global: &Global, args: DevArgs) -> anyhow::Result<ExitCode> {
    if global.config.is_some() || global.database_url_file.is_some() {
        bail!("dev has no settings: it takes neither --config nor --database-url-file");
    }
    telemetry::init_logs(None)?;
    let DevArgs { state_dir, token_life, listen } = args;
    dev::run(dev::Options { state_dir, token_life, listen }, output::line).await
}
