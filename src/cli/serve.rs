//! The command `serve`.

use std::{net::SocketAddr, process::ExitCode};

use anyhow::Context;
use clap::Args;
use tokio::net::TcpListener;

use super::global::GlobalArgs;
use crate::{
    app::{App, AppConfig, StartError},
    config::{BrokerFlags, Flags, Settings},
    crypto::Keyring,
    lifecycle::{self, OnHangup, Signals},
    telemetry,
};

/// Runs the broker
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  DATABASE_URL=postgresql://broker@db/broker TOKEN_BROKER_UPSTREAM=production \\
  TOKEN_BROKER_KEYRING_FILE=/etc/token-broker/keyring token-broker serve")]
pub(super) struct ServeArgs {
    /// Apply missing migrations and publish the intake key first; without it, a schema that is too old
    /// is refused
    #[arg(long)]
    migrate: bool,
    /// Accept a database that was restored, copied, or belongs to another deployment, and log what it
    /// has lost; without it, such a database is refused
    #[arg(long)]
    accept_restored: bool,
    #[command(flatten)]
    settings: Flags<BrokerFlags>,
}

pub(super) async fn run(global: &GlobalArgs, args: ServeArgs) -> anyhow::Result<ExitCode> {
    let sources = global.sources(args.settings.given)?;
    let (settings, warnings) = Settings::resolve(&sources)?;
    telemetry::init_logs(settings.log_format)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    lifecycle::raise_descriptor_limit();
    let mut signals = Signals::take(OnHangup::Reload)?;
    let keyring = Keyring::load(&settings.keyring_file)?;
    let grpc = listen(settings.listen).await?;
    let ops = listen(settings.ops_listen).await?;
    let config = AppConfig {
        migrate: args.migrate,
        accept_restored: args.accept_restored,
        ..AppConfig::new(settings, keyring.into())
    };
    let started = signals
        .during(async |give_up| Box::pin(App::start(config, grpc, ops, &give_up)).await)
        .await;
    match started {
        Ok(app) => Ok(lifecycle::run(app, &mut signals, Some(&sources)).await),
        // A signal came during the start, for example while the database did not answer. That is not a
        // failure.
        Err(StartError::Stopped) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(error.into()),
    }
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}
