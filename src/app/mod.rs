//! Builds a broker from its settings, starts it and stops it, in the same way for `serve`, `dev`, tests
//! and benches.
//!
//! The start, in order ([`App::start`]):
//! 1. lock the state directory and open the audit journal;
//! 2. create the [components], which need no database, and serve `/livez`, `/readyz` and
//!    `/metrics`, so that operators can see that a broker waits for its database;
//! 3. [prepare](mod@prepare): migrate or check the schema, verify the database and watch it from then on, announce
//!    this process to the other replicas, check that the keyring belongs to the database, record the start, and
//!    load accounts and callers;
//! 4. [build](wiring) the gRPC server, start all [tasks](running), and report `SERVING`.
//!
//! The stop, in order ([`App::stop`]):
//! 1. report `NOT_SERVING`, and go on answering calls for the shutdown notice;
//! 2. stop gRPC, which drains the connections, and the refresher;
//! 3. wait until the remaining calls have appended their records;
//! 4. stop the change feed, retention, checkpoints and HTTP;
//! 5. record the stop, close the journal, and deliver what it has while the database answers;
//! 6. stop watching the database.
//!
//! See [readiness] for what an operator sees when the journal's disk is full, [`config`](crate::config) for
//! how to add a setting, and [gauges] for how to add a metric.

mod app_config;
mod components;
mod error;
mod gauges;
mod grpc_health;
mod keyring_check;
mod prepare;
mod readiness;
mod running;
mod supervise;
mod task_group;
mod wiring;

use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use self::{
    app_config::AppConfig,
    error::StartError,
    keyring_check::{UnopenedSecret, WrongKeyring, check_keyring},
};
use self::{
    components::Components, prepare::prepare, running::RunningServices, task_group::StartedTasks,
};
pub use crate::services::history::{DatabaseMismatch, Difference, LostRecords};
use crate::{
    api::ops::{self, Ops},
    audit::journal::Journal,
    files::state_dir::StateDir,
};

/// A running broker.
#[must_use = "dropping it leaves its tasks running: call `stop`"]
pub struct App {
    /// The address on which gRPC is served.
    pub grpc_address: SocketAddr,
    /// The address of the HTTP endpoints for operators.
    pub ops_address: SocketAddr,
    components: Components,
    services: RunningServices,
}

impl App {
    /// Starts a broker that serves gRPC on `grpc` and the HTTP endpoints for operators on `ops`, and
    /// returns once it serves calls. While the database does not answer, the start waits, and `/readyz`
    /// says so. Cancelling `give_up` ends the start.
    ///
    /// Not cancel safe: dropping the future leaves the HTTP server running.
    ///
    /// # Errors
    /// See [`StartError`]; [`StartError::Stopped`] after `give_up` was cancelled. Everything that was
    /// started has been stopped again.
    pub async fn start(
        config: AppConfig,
        grpc: TcpListener,
        ops: TcpListener,
        give_up: &CancellationToken,
    ) -> Result<Self, StartError> {
        let grpc_address = grpc.local_addr().map_err(StartError::Listen)?;
        let ops_address = ops.local_addr().map_err(StartError::Listen)?;
        let state_dir = StateDir::open(&config.settings.state_dir)?;
        let journal = open_journal(&state_dir, &config).await?;
        let components = match Components::new(&config, &state_dir, journal.clone()) {
            Ok(components) => components,
            Err(error) => {
                journal.close().await;
                return Err(error);
            }
        };
        gauges::export(&components);
        let mut tasks = StartedTasks::default();
        let endpoints =
            Ops { readiness: readiness::checks(&components), metrics: components.metrics.clone() };
        let stop = tasks.background.stop_token();
        tasks.background.add(tokio::spawn(ops::serve(ops, endpoints, stop)));

        let prepared = Box::pin(async {
            let prepared = prepare(&components, &config, &state_dir, &mut tasks, give_up).await?;
            let server = components.grpc(&config, prepared.trigger.clone())?;
            Ok((prepared, server))
        });
        let prepared = tokio::select! {
            prepared = prepared => prepared,
            () = components.failed.cancelled() => Err(StartError::TaskEnded),
        };
        let (prepared, server) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                tasks.stop().await;
                journal.close().await;
                return Err(error);
            }
        };
        let services =
            RunningServices::start(&components, &config, &state_dir, prepared, server, grpc, tasks)
                .await;
        info!(grpc = %grpc_address, ops = %ops_address, "ready");
        Ok(Self { grpc_address, ops_address, components, services })
    }

    /// Returns once a task of the broker has ended by itself, which is a bug or, for the history guard and the
    /// change feed, means that the database was replaced. Stop the broker then. Cancel safe.
    pub async fn failed(&self) {
        self.components.failed.cancelled().await;
    }

    /// Reads again, at once, what can change while the broker runs: the TLS files, the keyring and the database's URL. Logs what
    /// comes of it. Cancel safe.
    pub async fn reload(&self) {
        if let Some(tls) = &self.components.tls {
            tls.reload().await;
        }
        if let Some(watch) = &self.components.keyring_watch {
            watch.reload(true).await;
        }
        self.components.database.reload().await;
    }

    /// Stops the broker in the order that the [module](self) documents. Returns whether the audit log is complete: no
    /// record was lost, and those that are not delivered are in files. This takes at most the shutdown
    /// notice and the drain, plus some seconds each for the records of calls, the disk and the delivery.
    ///
    /// Not cancel safe: dropping the future leaves tasks running, and records are delivered only after the
    /// next start.
    pub async fn stop(self) -> bool {
        self.services.stop(self.components).await
    }
}

/// Opens the journal on a thread for blocking work, because all segments are read and checked.
async fn open_journal(state_dir: &StateDir, config: &AppConfig) -> Result<Journal, StartError> {
    let state_dir = state_dir.clone();
    let (settings, clock) = (config.journal(), config.clock.clone());
    let opened =
        tokio::task::spawn_blocking(move || Journal::open(&state_dir, settings, clock)).await;
    match opened {
        Ok(opened) => Ok(opened?),
        Err(bug) => std::panic::resume_unwind(bug.into_panic()),
    }
}
