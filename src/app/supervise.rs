//! Waiting for the database at the start, and watching the tasks of a broker.

use std::{future::Future, pin::Pin, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::error::StartError;

/// The pause between two attempts to reach the database at the start.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Runs `step`, and repeats it as long as it fails because the database cannot be reached or another
/// transaction has locked what is needed. When
/// `give_up` is cancelled, a step in progress is dropped, so it must be cancel safe.
///
/// # Errors
/// Any other error of the step, and [`StartError::Stopped`] once `give_up` is cancelled.
pub(super) async fn until_reachable<T, F: Future<Output = Result<T, StartError>>>(
    give_up: &CancellationToken,
    step: impl Fn() -> F,
) -> Result<T, StartError> {
    let mut warned = false;
    loop {
        let result = tokio::select! {
            () = give_up.cancelled() => return Err(StartError::Stopped),
            result = step() => result,
        };
        match result {
            Err(StartError::Store(why)) if why.is_unavailable() => {
                if !std::mem::replace(&mut warned, true) {
                    if why.is_delayed() {
                        warn!(%why, "another transaction holds up the start; waiting for it");
                    } else {
                        warn!(%why, "the database cannot be reached yet; waiting for it");
                    }
                }
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            result => return result,
        }
    }
}

/// Starts `task`. If it ends or panics before `stop` is cancelled, logs that and cancels `failed`, so that
/// the process ends. `name` is the name of the task in the log.
pub(super) fn supervise(
    name: &'static str,
    task: Pin<Box<dyn Future<Output = ()> + Send>>,
    stop: CancellationToken,
    failed: CancellationToken,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let ended = tokio::spawn(task).await;
        if !stop.is_cancelled() {
            error!(task = name, panicked = ended.is_err(), "a task of the broker has ended");
            failed.cancel();
        }
    })
}
