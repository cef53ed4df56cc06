//! `dev`.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use clap::Args;

use super::output;
use crate::{dev, telemetry};

/// Runs the whole system on this machine, with nothing to set up
///
/// Its own Postgres, a simulated upstream whose tokens live shortly, the accounts demo-master and
/// demo-agency, and the caller demo. Ctrl-C leaves nothing behind.
#[derive(Args, Debug)]
pub(super) struct DevArgs {
    /// Keeps database, keyring and journal there
    #[arg(long, value_name = "DIR")]
    pub(super) state_dir: Option<PathBuf>,
    /// The life of the simulated upstream's tokens
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
    pub(super) token_life: Duration,
    /// Where gRPC listens
    #[arg(long, default_value = "127.0.0.1:50051", value_name = "ADDRESS:PORT")]
    pub(super) listen: SocketAddr,
}

pub(super) async fn run(args: DevArgs) -> anyhow::Result<ExitCode> {
    telemetry::init_logs(None)?;
    let DevArgs { state_dir, token_life, listen } = args;
    dev::run(dev::Options { state_dir, token_life, listen }, output::line).await
}
