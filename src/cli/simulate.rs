//! The command `simulate`.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use tokio::net::TcpListener;

use super::{global::path_argument, output, time::positive_duration};
use crate::{
    dev::simulator::{Faults, SimulatedAccount, Simulator, SimulatorOptions},
    domain::clock::Clock,
    files::{given_path::shown, text},
    lifecycle::{OnHangup, Signals},
};

/// Runs only the simulated RCS Biz Center, until a signal stops it
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  token-broker simulate --accounts-file accounts.json --token-life 60s
  where accounts.json is [{\"client_id\": \"demo\", \"client_secret\": \"SK.demo\"}]")]
pub(super) struct SimulateArgs {
    /// The address on which it listens
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// The accounts: a JSON list of objects with `client_id` and `client_secret`
    #[arg(long, value_name = "FILE", value_parser = path_argument())]
    accounts_file: Option<PathBuf>,
    /// The lifetime of tokens
    #[arg(long, default_value = "1h", value_parser = positive_duration)]
    token_life: Duration,
    /// How long each token request is delayed before it is handled
    #[arg(long, default_value = "0s", value_parser = humantime::parse_duration)]
    latency: Duration,
    /// An address that may request tokens; without it, all may
    #[arg(long, value_name = "ADDRESS")]
    allow: Vec<IpAddr>,
    /// The fraction of token requests that are answered with a 503, 0 to 1
    #[arg(long, default_value = "0", value_parser = fraction)]
    error_rate: f64,
    /// Whether issuing a token revokes the older ones of its account
    #[arg(long, default_value = "true", action = clap::ArgAction::Set, value_name = "BOOL")]
    new_token_ends_older: bool,
}

fn fraction(text: &str) -> Result<f64, &'static str> {
    text.parse().ok().filter(|fraction| (0.0..=1.0).contains(fraction)).ok_or("must be 0 to 1")
}

pub(super) async fn run(args: SimulateArgs) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::take(OnHangup::Stop)?;
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let options = SimulatorOptions {
        accounts: args.accounts_file.as_deref().map(read_accounts).transpose()?.unwrap_or_default(),
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

fn read_accounts(path: &Path) -> anyhow::Result<Vec<SimulatedAccount>> {
    let text = text::read(path).with_context(|| format!("cannot read {}", shown(path)))?;
    serde_json::from_str(&text).map_err(|error| {
        // The message of `error` may contain a secret from the file.
        anyhow::anyhow!(
            "{}, line {}: not a list of objects with client_id and client_secret",
            shown(path),
            error.line()
        )
    })
}
