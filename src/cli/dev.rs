//! `dev`.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::bail;
use clap::Args;

use super::{Global, output, time::lasting};
use crate::{dev, telemetry};

/// Runs the whole system on this machine, with nothing to set up
///
/// Its own Postgres, a simulated upstream whose tokens live shortly, the accounts demo-master and
/// demo-agency, and the caller demo. Ctrl-C leaves nothing behind. With `DATABASE_URL` in the environment it
/// uses that database instead, in which all of it stays.
#[derive(Args, Debug)]
pub(super) struct DevArgs {
    /// Keeps database, keyring and journal there
    #[arg(long, value_name = "DIR")]
    pub(super) state_dir: Option<PathBuf>,
    /// The life of the simulated upstream's tokens
    #[arg(long, default_value = "60s", value_parser = lasting)]
    pub(super) token_life: Duration,
    /// Where gRPC listens; without it, on 127.0.0.1:50051 or another port if that is taken
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
