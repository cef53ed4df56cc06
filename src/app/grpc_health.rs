//! Keeps gRPC's health service up to date. It says `SERVING` while the audit journal has room, the database can be
//! trusted, and calls are served, and `NOT_SERVING` once the broker stops.

use std::{sync::Arc, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::{info, warn};

use crate::{
    api::proto::token_service_server::SERVICE_NAME,
    audit::journal::Journal,
    services::{
        connectivity::{Connectivity, DatabaseConnectivity},
        trust_monitor::Trust,
    },
};

/// How often the journal is checked. It is polled because a disk that hangs causes no event: it is noticed
/// only by the time that an operation takes.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Keeps the health service up to date until it is stopped.
pub(super) struct GrpcHealth {
    polling: JoinHandle<()>,
    stop: CancellationToken,
}

impl GrpcHealth {
    /// Reports the present state, and starts a task that reports its changes.
    pub(super) async fn start(
        reporter: HealthReporter,
        journal: Journal,
        trust: Trust,
        connectivity: Arc<DatabaseConnectivity>,
    ) -> Self {
        let is_ready = move || {
            journal.is_ready()
                && trust.fault().is_none()
                && connectivity.current() != Connectivity::Unacknowledged
        };
        let mut serving = is_ready();
        report(&reporter, serving).await;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let polling = tokio::spawn(async move {
            let mut interval = tokio::time::interval(POLL_INTERVAL);
            loop {
                tokio::select! {
                    () = stopped.cancelled() => break,
                    _ = interval.tick() => {}
                }
                let ready = is_ready();
                if std::mem::replace(&mut serving, ready) != ready {
                    report(&reporter, ready).await;
                    if ready {
                        info!("health says SERVING");
                    } else {
                        warn!(
                            "the audit journal cannot be written or is nearly full, or the database \
                             cannot be trusted, or does not answer while another replica may issue that \
                             does not know of this one, as /readyz says: health says NOT_SERVING"
                        );
                    }
                }
            }
            report(&reporter, false).await;
        });
        Self { polling, stop }
    }

    /// Reports `NOT_SERVING`, and returns once the health service says so.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        let _ = self.polling.await;
    }
}

/// Sets the status of `TokenService`, and of the server as a whole, which has the empty name.
async fn report(reporter: &HealthReporter, serving: bool) {
    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    for service in ["", SERVICE_NAME] {
        reporter.set_service_status(service, status).await;
    }
}
