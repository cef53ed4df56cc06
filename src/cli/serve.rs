//! `serve`.

use std::{net::SocketAddr, process::ExitCode};

use anyhow::Context;
use clap::Args;
use tokio::net::TcpListener;

use super::Global;
use crate::{
    app::{App, AppConfig, StartError},
    config::{Broker, Flags, Settings},
    crypto::Keyring,
    lifecycle::{self, Signals},
    telemetry,
};

/// Runs the broker
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  DATABASE_URL=postgresql://broker@db/broker TOKEN_BROKER_UPSTREAM=production \\
  TOKEN_BROKER_KEYRING_FILE=/etc/token-broker/keyring token-broker serve")]
pub(super) struct ServeArgs {
    /// Applies missing migrations first; without it, too old a schema is refused
    #[arg(long)]
    migrate: bool,
    /// Goes on with a database that was restored, copied, or belongs to another deployment, and says
    /// what went back; without it, such a database is refused
    #[arg(long)]
    accept_restored: bool,
    #[command(flatten)]
    settings: Flags<Broker>,
}

pub(super) async fn run(global: &Global, args: ServeArgs) -> anyhow::Result<ExitCode> {
    let (settings, warnings) = Settings::resolve(&global.sources(args.settings.given)?)?;
    telemetry::init_logs(settings.log_format)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    lifecycle::raise_descriptors();
    let mut signals = Signals::take()?;
    let keyring = Keyring::load(&settings.keyring_file)?;
    let plan = AppConfig::new(&settings, keyring.into(), args.migrate, args.accept_restored)?;
    let grpc = listen(settings.listen).await?;
    let ops = listen(settings.ops_listen).await?;
    let started =
        signals.during(async |give_up| Box::pin(App::start(plan, grpc, ops, &give_up)).await).await;
    match started {
        Ok(app) => Ok(lifecycle::run(app, &mut signals).await),
        // Asked to stop while the database was away: that is no failure.
        Err(StartError::Stopped) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(error.into()),
    }
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}
