//! The composition of the whole: what `serve` and `dev` run, and what the tests run in process.

mod app_config;
mod gauges;
mod health;
mod proof;
mod restored;
mod supervise;
mod world;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

pub use app_config::AppConfig;
use health::Health;
pub use proof::prove;
pub use restored::{Lost, Restored, Strange};
use thiserror::Error;
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};
use world::World;

use crate::{
    api::{
        grpc::server::{ConnectionLimiter, WorkerThreads},
        ops,
    },
    audit::{
        checkpoint_signer::CheckpointSigner,
        journal::{Journal, JournalError, JournalSettings},
        record::{Event, Record},
    },
    crypto::SealError,
    domain::clock::Clock,
    files::state_dir::{StateDir, StateDirError},
    store::StoreError,
    tls::TlsError,
    upstream::SetUpError,
};

/// How long the audit log may take to be delivered once everything else has ended.
const DELIVER_WITHIN: Duration = Duration::from_secs(5);
/// How long calls whose connections are gone may take to write their records.
const CALLS_WITHIN: Duration = Duration::from_secs(5);
/// How long the record of the start may take to become durable.
const RECORD_WITHIN: Duration = Duration::from_secs(10);

/// Why a broker cannot start. Each names what to put right.
#[derive(Debug, Error)]
pub enum StartError {
    /// The state directory.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The record of the start was not written.
    #[error(
        "the start cannot be recorded in the audit journal: is the state directory's disk full?"
    )]
    NotRecorded,
    /// What an earlier process noted of the tokens that it issued without the database.
    #[error(
        "issued-alone in the state directory, which tells for which accounts tokens were \
        issued without the database, cannot be used: {0}"
    )]
    IssuedAlone(std::io::Error),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The upstream's client.
    #[error(transparent)]
    Upstream(#[from] SetUpError),
    /// The keyring is not the one that sealed what is stored: it lacks a key, or opens nothing of
    /// what was sealed with one.
    #[error("the keyring does not open the secret of account {account}: {error}")]
    WrongKeyring {
        /// An account whose secret does not open.
        account: String,
        /// What is wrong with it.
        error: SealError,
    },
    /// The database is not as this replica left it.
    #[error(transparent)]
    Restored(#[from] Restored),
    /// The state directory does not tell which database it belongs to.
    #[error("the file database in the state directory cannot be used: {0}")]
    Memory(std::io::Error),
    /// TLS.
    #[error("TLS cannot be served: {0}")]
    Tls(#[from] TlsError),
    /// The threads that serve.
    #[error("no threads to serve with: {0}")]
    Workers(std::io::Error),
    /// A listener.
    #[error("cannot listen: {0}")]
    Listen(#[from] std::io::Error),
    /// The build.
    #[error("the service cannot be described: {0}")]
    Descriptors(#[from] tonic_reflection::server::Error),
    /// A signal came before the start was over.
    #[error("stopped before the start was over")]
    Stopped,
}

/// A broker that runs.
pub struct App {
    /// Where gRPC is served.
    pub grpc_address: SocketAddr,
    /// Where operators look.
    pub ops_address: SocketAddr,
    journal: Journal,
    clock: Clock,
    health: Health,
    connection_limiter: Arc<ConnectionLimiter>,
    /// Outlive every call that was taken up.
    workers: Arc<WorkerThreads>,
    /// How long a stop lets callers find out.
    grace: Duration,
    ready: Arc<AtomicBool>,
    /// Ends the front door, the streams and the refresher.
    stop: CancellationToken,
    /// Ends following and the operators' face, once nobody is served any more.
    stop_following: CancellationToken,
    /// Ends delivery, once the journal is closed.
    stop_delivery: CancellationToken,
    serving: Vec<JoinHandle<()>>,
    following: Vec<JoinHandle<()>>,
    delivery: JoinHandle<()>,
    notary: Arc<CheckpointSigner>,
    calls: TaskTracker,
    failed: CancellationToken,
}

impl App {
    /// Starts a broker that serves gRPC on `grpc` and operators on `ops`. Returns once it is ready;
    /// a database that cannot be reached yet is waited for, with `/readyz` telling so, until
    /// `give_up`.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is left running then.
    pub async fn start(
        plan: AppConfig,
        grpc: TcpListener,
        ops: TcpListener,
        give_up: &CancellationToken,
    ) -> Result<Self, StartError> {
        let (grpc_address, ops_address) = (grpc.local_addr()?, ops.local_addr()?);
        let state_dir = StateDir::open(&plan.state_dir)?;
        let journal = open_journal(&state_dir, plan.journal, plan.clock.clone()).await?;
        let world = match World::new(&plan, &state_dir, journal.clone()) {
            Ok(world) => world,
            Err(error) => {
                journal.close().await;
                return Err(error);
            }
        };

        let stop_following = CancellationToken::new();
        let ops = tokio::spawn(ops::serve(ops, world.ops(), stop_following.clone()));
        let grace = plan.grace;
        let started = Box::pin(world.start(plan, &state_dir, grpc, &stop_following, give_up)).await;
        match started {
            Ok(started) => {
                info!(grpc = %grpc_address, operators = %ops_address, "ready");
                Ok(Self {
                    grpc_address,
                    ops_address,
                    journal,
                    clock: world.clock,
                    health: started.health,
                    connection_limiter: started.connection_limiter,
                    workers: started.workers,
                    grace,
                    ready: world.ready,
                    stop: started.stop,
                    stop_following,
                    stop_delivery: started.stop_delivery,
                    serving: started.serving,
                    following: started.following.into_iter().chain([ops]).collect(),
                    delivery: started.delivery,
                    notary: started.notary,
                    calls: started.calls,
                    failed: started.failed,
                })
            }
            Err(error) => {
                stop_following.cancel();
                let _ = ops.await;
                journal.close().await;
                Err(error)
            }
        }
    }

    /// Returns when a part of the broker has ended by itself, which is a bug: stop the process.
    pub async fn failed(&self) {
        self.failed.cancelled().await;
    }

    /// Stops in order: health tells it, connections and attempts end, the stop is recorded, and the
    /// journal is delivered as far as the database is there.
    pub async fn stop(self) {
        self.ready.store(false, Ordering::Relaxed);
        self.health.stop().await;
        // Balancers look at health now and then: until they have, calls keep coming, and are answered.
        let _ = timeout(self.grace, self.connection_limiter.until_none()).await;
        self.stop.cancel();
        for task in self.serving {
            let _ = task.await;
        }
        // Calls whose connection was cut write their records still.
        self.calls.close();
        if timeout(CALLS_WITHIN, self.calls.wait()).await.is_err() {
            warn!("some calls did not end");
        }
        self.workers.shut_down().await;
        self.stop_following.cancel();
        for task in self.following {
            // The disk may hang, and a head's write with it.
            let _ = timeout(RECORD_WITHIN, task).await;
        }
        let stopped = Record::new(self.clock.now(), Event::Stopped);
        if self.journal.append(stopped).durable(DELIVER_WITHIN).await.is_err() {
            warn!("the stop could not be recorded");
        }
        if timeout(RECORD_WITHIN, self.journal.close()).await.is_err() {
            warn!("the journal did not close in time");
        }
        if timeout(RECORD_WITHIN, self.notary.end()).await.is_err() {
            warn!("the last head of the audit log was not kept in time");
        }
        self.stop_delivery.cancel();
        let _ = self.delivery.await;
        let _ = tokio::task::spawn_blocking(move || self.journal.keep_positions()).await;
        info!("stopped");
    }
}

async fn open_journal(
    state_dir: &StateDir,
    settings: JournalSettings,
    clock: Clock,
) -> Result<Journal, StartError> {
    let state_dir = state_dir.clone();
    let opened =
        tokio::task::spawn_blocking(move || Journal::open(&state_dir, settings, clock)).await;
    match opened {
        Ok(opened) => Ok(opened?),
        Err(bug) => std::panic::resume_unwind(bug.into_panic()),
    }
}
