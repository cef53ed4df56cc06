//! The command `dev`.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::bail;
use clap::Args;

use super::{
    global::{GlobalArgs, path_argument},
    output,
    time::positive_duration,
};
use crate::{dev, telemetry};

/// Runs the whole system on this machine, with nothing to set up
///
/// It starts an embedded Postgres, a simulated upstream with short-lived tokens, and the broker with the
/// accounts demo-master and demo-agency and the caller demo. Ctrl-C ends it and leaves nothing behind. If
/// `DATABASE_URL` is set in the environment, it uses that database instead; what it writes there stays.
#[derive(Args, Debug)]
pub(super) struct DevArgs {
    /// Keeps database, keyring and journal in this directory
    #[arg(long, value_name = "DIR", value_parser = path_argument())]
    state_dir: Option<PathBuf>,
    /// The lifetime of the simulated upstream's tokens
    #[arg(long, default_value = "60s", value_parser = positive_duration)]
    token_life: Duration,
    /// The address for gRPC; without it, 127.0.0.1:50051, or another port if that is taken
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
}

pub(super) async fn run(global: &GlobalArgs, args: DevArgs) -> anyhow::Result<ExitCode> {
    if global.config.is_some() || global.database_url_file.is_some() {
        bail!("dev has no settings: it takes neither --config nor --database-url-file");
    }
    telemetry::init_logs(None)?;
    let DevArgs { state_dir, token_life, listen } = args;
    dev::run(dev::DevOptions { state_dir, token_life, listen }, output::block).await
}
