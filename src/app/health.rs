//! What gRPC's health service says: serving as long as calls can be recorded, and for a while yet.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::{info, warn};

use crate::{api::proto::token_service_server::SERVICE_NAME, audit::journal::Journal};

/// How often the journal is looked at. A disk that hangs shows by the time that passes, so there is
/// no moment at which it could tell.
const LOOK: Duration = Duration::from_millis(250);

/// Keeps the health service true until it is stopped.
pub(super) struct Health {
    following: JoinHandle<()>,
    stop: CancellationToken,
}

impl Health {
    /// Says that the broker serves, and from now on whether the journal can be written.
    pub(super) async fn follow(reporter: HealthReporter, journal: Journal) -> Self {
        let mut serving = journal.is_ready();
        tell(&reporter, serving).await;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let following = tokio::spawn(async move {
            let mut looks = tokio::time::interval(LOOK);
            loop {
                tokio::select! {
                    () = stopped.cancelled() => break,
                    _ = looks.tick() => {}
                }
                let ready = journal.is_ready();
                if std::mem::replace(&mut serving, ready) != ready {
                    tell(&reporter, ready).await;
                    if ready {
                        info!("the audit journal can be written: serving");
                    } else {
                        warn!("the audit journal cannot be written, or not for long: not serving");
                    }
                }
            }
            tell(&reporter, false).await;
        });
        Self { following, stop }
    }

    /// Says that the broker does not serve any more, and returns once it is said.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        let _ = self.following.await;
    }
}

async fn tell(reporter: &HealthReporter, serving: bool) {
    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    for service in ["", SERVICE_NAME] {
        reporter.set_service_status(service, status).await;
    }
}
