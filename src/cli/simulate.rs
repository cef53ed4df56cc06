//! The command `simulate`.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use tokio::net::TcpListener;

use super::{output, time::positive_duration};
use crate::{
    dev::simulator::{Faults, Options, SimulatedAccount, Simulator},
    domain::clock::Clock,
    lifecycle::Signals,
};

/// Runs the simulated RCS Biz Center alone, until it is stopped
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  token-broker simulate --accounts-file accounts.json --token-life 60s
  where accounts.json is [{\"client_id\": \"demo\", \"client_secret\": \"SK.demo\"}]")]
pub(super) struct SimulateArgs {
    /// The address to listen on
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// A JSON file: a list of objects with `client_id` and `client_secret`
    #[arg(long, value_name = "FILE")]
    accounts_file: Option<PathBuf>,
    /// The lifetime of a token
    #[arg(long, default_value = "1h", value_parser = positive_duration)]
    token_life: Duration,
    /// How long each request waits before it is handled
    #[arg(long, default_value = "0s", value_parser = humantime::parse_duration)]
    latency: Duration,
    /// An address that may request tokens; without it, every address may
    #[arg(long, value_name = "ADDRESS")]
    allow: Vec<IpAddr>,
    /// The share of requests that are answered with 503, 0 to 1
    #[arg(long, default_value = "0", value_parser = share)]
    error_rate: f64,
    /// Whether a new token ends the older ones of its account
    #[arg(long, default_value = "true", action = clap::ArgAction::Set, value_name = "BOOL")]
    new_token_ends_older: bool,
}

fn share(text: &str) -> Result<f64, &'static str> {
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or("must be 0 to 1")
}

pub(super) async fn run(args: SimulateArgs) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::take()?;
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let options = Options {
        accounts: args.accounts_file.as_deref().map(accounts).transpose()?.unwrap_or_default(),
        faults: Faults {
            token_life: args.token_life,
            latency: args.latency,
            new_token_ends_older: args.new_token_ends_older,
            allowed_addresses: Some(args.allow).filter(|allowed| !allowed.is_empty()),
            error_rate: args.error_rate,
            ..Faults::default()
        },
        clock: Clock::System,
    };
    let simulator = Simulator::start(listener, options)?;
    output::line(simulator.base_url())?;
    signals.next().await;
    simulator.shutdown().await;
    Ok(ExitCode::SUCCESS)
}

fn accounts(path: &Path) -> anyhow::Result<Vec<SimulatedAccount>> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).map_err(|error| {
        // The message of `error` may quote a secret.
        anyhow::anyhow!(
            "{}, line {}: not a list of objects with client_id and client_secret",
            path.display(),
            error.line()
        )
    })
}
