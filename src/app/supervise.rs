//! What a start waits for, and what the parts of a broker are watched for.

use std::{future::Future, pin::Pin, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::StartError;

/// The pause between two tries to reach the database at the start.
const REACH_AGAIN: Duration = Duration::from_secs(1);

/// Does `step` again and again while the database cannot be reached.
pub(super) async fn until_reached<T, F: Future<Output = Result<T, StartError>>>(
    give_up: &CancellationToken,
    step: impl Fn() -> F,
) -> Result<T, StartError> {
    let mut told = false;
    loop {
        let done = tokio::select! {
            () = give_up.cancelled() => return Err(StartError::Stopped),
            done = step() => done,
        };
        match done {
            Err(StartError::Store(why)) if why.is_unavailable() => {
                if !std::mem::replace(&mut told, true) {
                    warn!(%why, "the database cannot be reached yet; waiting for it");
                }
                tokio::time::sleep(REACH_AGAIN).await;
            }
            done => return done,
        }
    }
}

/// Runs `task`; if it ends before `stop`, by a panic or by itself, the whole broker has failed.
pub(super) fn watch_over(
    name: &'static str,
    task: Pin<Box<dyn Future<Output = ()> + Send>>,
    stop: CancellationToken,
    failed: CancellationToken,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let ended = tokio::spawn(task).await;
        if !stop.is_cancelled() {
            error!(part = name, panicked = ended.is_err(), "a part of the broker has ended");
            failed.cancel();
        }
    })
}
