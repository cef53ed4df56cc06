//! The tasks of a running broker: how they are started, and in which order they are stopped.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use super::{
    app_config::AppConfig,
    components::Components,
    error::StartError,
    grpc_health::GrpcHealth,
    prepare::Prepared,
    supervise::{Task, supervise, until_reachable},
};
use crate::{
    api::grpc::{
        self,
        server::{ConnectionLimiter, Workers},
    },
    audit::{
        checkpoint_signer::CheckpointSigner,
        record::{Event, Record},
    },
    files::state_dir::StateDir,
    services::{refresher::Refresher, refusal_aggregator::RefusalAggregator},
};

/// How long the journal may take to reach Postgres once everything else has ended.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long calls whose connections are gone may take to append their records.
const CALLS_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a step of the stop may take that writes to the state directory's disk.
const DISK_TIMEOUT: Duration = Duration::from_secs(10);

/// The tasks of a running broker, in three groups that are stopped one after another.
pub(super) struct RunningServices {
    health: GrpcHealth,
    limiter: Arc<ConnectionLimiter>,
    /// The threads that serve connections. They must outlive every call that has begun.
    workers: Arc<Workers>,
    signer: Arc<CheckpointSigner>,
    /// The calls that have not appended their records yet.
    calls: TaskTracker,
    shutdown_notice: Duration,
    /// The first group: gRPC with its streams, and the refresher.
    serving: Group,
    /// The second group: the change feed, retention, checkpoints, TLS, and HTTP for operations.
    background: Group,
    /// The third group: the delivery of the journal, which ends when the journal is closed.
    delivery: Group,
    /// Cancelled when a task has ended by itself.
    failed: CancellationToken,
}

/// Tasks that one token stops.
#[derive(Default)]
pub(super) struct Group {
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Group {
    /// Returns the token that stops the tasks.
    pub(super) fn stop_token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Adds a task that runs already. Its end is not watched.
    pub(super) fn adopt(&mut self, task: JoinHandle<()>) {
        self.tasks.push(task);
    }

    /// Starts a task that must not end before the group is stopped.
    fn start(&mut self, name: &'static str, failed: &CancellationToken, task: Task) {
        self.tasks.push(supervise(name, task, self.stop_token(), failed.clone()));
    }

    /// Stops the tasks and waits until they have ended.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        for task in self.tasks {
            let _ = task.await;
        }
    }

    /// Stops the tasks and waits for each of them no longer than `limit`.
    async fn stop_within(self, limit: Duration) {
        self.stop.cancel();
        for task in self.tasks {
            let _ = timeout(limit, task).await;
        }
    }
}

impl RunningServices {
    /// Loads accounts and callers, starts all tasks, and returns once calls are served. `background`
    /// has the tasks that run already.
    ///
    /// # Errors
    /// When the threads or gRPC's services cannot be started, or the database refuses a statement.
    /// No task was started then, and `background` keeps what it had.
    pub(super) async fn start(
        components: &Components,
        config: &AppConfig,
        state_dir: &StateDir,
        prepared: Prepared,
        listener: TcpListener,
        background: &mut Group,
        give_up: &CancellationToken,
    ) -> Result<Self, StartError> {
        let Prepared { home, pending } = prepared;
        let (refresher, trigger) = Refresher::new(components.issuing(config, state_dir, pending));
        let feed = components.change_feed(config, state_dir, home, trigger.clone());
        let loaded = until_reachable(give_up, || async { Ok(feed.start().await?) }).await?;

        let calls = TaskTracker::new();
        let refusals = RefusalAggregator::new(components.journal.clone(), calls.clone());
        let (routes, reporter) =
            components.routes(config, trigger, calls.clone(), refusals.clone())?;
        let failed = CancellationToken::new();
        let limiter = Arc::new(ConnectionLimiter::default());
        let workers =
            Arc::new(Workers::start(config.workers, &failed).map_err(StartError::Workers)?);
        let server = components.connection_server(
            config,
            routes,
            limiter.clone(),
            workers.clone(),
            refusals,
        );
        let signer = components.checkpoint_signer(config, state_dir);
        let delivering = components.journal_delivery(signer.clone(), DELIVERY_TIMEOUT);

        let mut serving = Group::default();
        let stop = serving.stop_token();
        serving.start("refresher", &failed, Box::pin(refresher.run(stop.clone())));
        let drain = config.settings.drain;
        serving.start(
            "grpc",
            &failed,
            Box::pin(grpc::server::serve(listener, server, stop, drain)),
        );

        let mut background = std::mem::take(background);
        let stop = background.stop_token();
        background.start("change feed", &failed, Box::pin(feed.run(loaded, stop.clone())));
        let retention = components.retention(config);
        background.start("retention", &failed, Box::pin(retention.run(stop.clone())));
        background.start("checkpoints", &failed, Box::pin(signer.clone().run(stop.clone())));
        if let Some(tls) = components.tls.clone() {
            background.start("tls", &failed, Box::pin(tls.follow(stop)));
        }

        let mut delivery = Group::default();
        let stop = delivery.stop_token();
        delivery.start("delivery", &failed, Box::pin(delivering.run(stop)));

        let health = GrpcHealth::start(reporter, components.journal.clone()).await;
        components.serving.store(true, Ordering::Relaxed);
        Ok(Self {
            health,
            limiter,
            workers,
            signer,
            calls,
            shutdown_notice: config.shutdown_notice,
            serving,
            background,
            delivery,
            failed,
        })
    }

    /// Returns once a task has ended by itself.
    pub(super) async fn failed(&self) {
        self.failed.cancelled().await;
    }

    /// Stops the tasks. `App::stop` documents the order.
    pub(super) async fn stop(self, components: Components) {
        let Components { journal, clock, serving, .. } = components;
        serving.store(false, Ordering::Relaxed);
        self.health.stop().await;
        // Load balancers notice the health only at their next check. Until then they send calls, which
        // are still answered.
        let _ = timeout(self.shutdown_notice, self.limiter.gone()).await;
        self.serving.stop().await;
        // Calls whose connections were closed still append their records.
        self.calls.close();
        if timeout(CALLS_TIMEOUT, self.calls.wait()).await.is_err() {
            warn!("some calls did not end in time");
        }
        self.workers.end().await;
        // The signer's task writes to the disk, which may hang.
        self.background.stop_within(DISK_TIMEOUT).await;
        let stopped = Record::new(clock.now(), Event::Stopped);
        if journal.append(stopped).durable(DELIVERY_TIMEOUT).await.is_err() {
            warn!("the stop could not be recorded");
        }
        if timeout(DISK_TIMEOUT, journal.close()).await.is_err() {
            warn!("the journal did not close in time");
        }
        if timeout(DISK_TIMEOUT, self.signer.end()).await.is_err() {
            warn!("the last checkpoint of the audit log was not written in time");
        }
        self.delivery.stop().await;
        let _ = tokio::task::spawn_blocking(move || journal.keep_positions()).await;
        info!("stopped");
    }
}
