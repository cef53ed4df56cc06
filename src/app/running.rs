//! Starts the tasks of a broker, and stops them in order.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{net::TcpListener, time::timeout};
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::{
    app_config::AppConfig,
    components::Components,
    grpc_health::GrpcHealth,
    prepare::Prepared,
    task_group::{StartedTasks, TaskGroup},
    wiring::GrpcServer,
};
use crate::{
    api::grpc::server::{ConnectionLimiter, WorkerThreads, serve},
    audit::{
        checkpoint_signer::CheckpointSigner,
        record::{Event, Record},
    },
    files::state_dir::StateDir,
};

/// How long the last delivery of the journal to Postgres may take, and also how long the record of the
/// stop may take to become durable.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long calls may take to append their records after their connections were closed.
const CALLS_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a step of the stop may take that writes to the state directory's disk.
const DISK_TIMEOUT: Duration = Duration::from_secs(10);

/// The tasks of a running broker, in four groups that are stopped one after another.
pub(super) struct RunningServices {
    health: GrpcHealth,
    limiter: Arc<ConnectionLimiter>,
    /// The threads that serve connections. They are shut down after the calls have ended, or after
    /// [`CALLS_TIMEOUT`].
    workers: Arc<WorkerThreads>,
    signer: Arc<CheckpointSigner>,
    /// The calls that have not appended their records yet.
    calls: TaskTracker,
    shutdown_notice: Duration,
    /// The first group: gRPC with its streams, and the refresher.
    serving: TaskGroup,
    /// The second group: the change feed, the heartbeat, the upkeep of accounts, retention, checks of
    /// trust, checkpoints, the reload of the keyring and of TLS files, and the HTTP endpoints for operators.
    background: TaskGroup,
    /// The third group: the delivery of the journal, which is stopped after the journal is closed.
    delivery: TaskGroup,
    /// The fourth group: the history guard, without which the delivery could open no connection.
    history: TaskGroup,
}

impl RunningServices {
    /// Starts all tasks but those of `started`, and returns once calls are served.
    pub(super) async fn start(
        components: &Components,
        config: &AppConfig,
        state_dir: &StateDir,
        prepared: Prepared,
        grpc: GrpcServer,
        listener: TcpListener,
        started: StartedTasks,
    ) -> Self {
        let StartedTasks { mut background, history } = started;
        let GrpcServer { server, health, limiter, workers, calls } = grpc;
        let signer = components.checkpoint_signer(state_dir);

        let failed = &components.failed;

        let mut serving = TaskGroup::default();
        let stop = serving.stop_token();
        serving.start("refresher", failed, prepared.refresher.run(stop.clone()));
        serving.start("grpc", failed, serve(listener, server, stop, config.settings.drain));

        let stop = background.stop_token();
        let feed = prepared.change_feed.run(prepared.loaded, stop.clone());
        background.start("change feed", failed, feed);
        background.start("upkeep", failed, components.account_upkeep().run(stop.clone()));
        let watch = components.database_clock_watch();
        let watch_stop = background.stop_token();
        background.start("database clock", failed, async move {
            let _ = watch_stop.run_until_cancelled(watch.run()).await;
        });
        background.start("retention", failed, components.retention(config).run(stop.clone()));
        background.start("trust", failed, components.trust_monitor().run(stop.clone()));
        background.start("checkpoints", failed, signer.clone().run(stop.clone()));
        if let Some(watch) = components.keyring_watch.clone() {
            background.start("keyring", failed, watch.run(stop.clone()));
        }
        if let Some(tls) = components.tls.clone() {
            background.start("tls", failed, tls.reload_on_change(stop));
        }

        let mut delivery = TaskGroup::default();
        let stop = delivery.stop_token();
        let deliver = components.journal_delivery(signer.clone(), DELIVERY_TIMEOUT);
        delivery.start("delivery", failed, deliver.run(stop));

        let health = GrpcHealth::start(
            health,
            components.journal.clone(),
            components.trust.clone(),
            components.connectivity.clone(),
        )
        .await;
        components.serving.store(true, Ordering::Relaxed);
        Self {
            health,
            limiter,
            workers,
            signer,
            calls,
            shutdown_notice: config.shutdown_notice,
            serving,
            background,
            delivery,
            history,
        }
    }

    /// Stops the tasks in the order that the documentation of [`app`](super) lists. Returns whether the audit log is
    /// complete: no record was lost, and those that are not delivered are in files.
    pub(super) async fn stop(self, components: Components) -> bool {
        let Components { journal, clock, serving, .. } = components;
        serving.store(false, Ordering::Relaxed);
        self.health.stop().await;
        // Load balancers notice the health only at their next check. Until then they send calls, which
        // are still answered.
        let _ = timeout(self.shutdown_notice, self.limiter.until_none()).await;
        self.serving.stop().await;
        // Calls whose connections were closed still append their records.
        self.calls.close();
        if timeout(CALLS_TIMEOUT, self.calls.wait()).await.is_err() {
            warn!("some calls did not end in time");
        }
        self.workers.shut_down().await;
        // One of these tasks signs checkpoints, and writes to the disk, which may hang.
        self.background.stop_within(DISK_TIMEOUT).await;
        let stopped = Record::new(clock.wall(), Event::Stopped);
        if journal.append(stopped).durable(DELIVERY_TIMEOUT).await.is_err() {
            warn!("the stop could not be recorded");
        }
        if timeout(DISK_TIMEOUT, journal.close()).await.is_err() {
            warn!("the journal did not close in time");
        }
        if timeout(DISK_TIMEOUT, self.signer.sign_last()).await.is_err() {
            warn!("the last checkpoint of the audit log was not written in time");
        }
        self.delivery.stop().await;
        self.history.stop_within(DISK_TIMEOUT).await;
        let stats = journal.stats();
        let unreadable = journal.unreadable();
        let complete = stats.lost == 0
            && unreadable.is_empty()
            && (stats.undelivered == 0 || journal.problem().is_none());
        if !complete {
            error!(
                lost = stats.lost,
                undelivered = stats.undelivered,
                ?unreadable,
                "audit records are lost, or could not be written to the state directory or read from it"
            );
        }
        let _ = tokio::task::spawn_blocking(move || journal.save_positions()).await;
        info!("stopped");
        complete
    }
}
