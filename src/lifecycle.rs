//! Signals, drain and the end.

use std::process::ExitCode;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::app::App;

/// Lets the process have as many descriptors as the system allows: each connection takes one, and the
/// usual limit is made for programs that know no better.
pub fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    // What is left is what there was.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// The signals that ask the process to stop.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// One came that nobody has acted on yet.
    pending: bool,
}

impl Signals {
    /// Takes SIGINT and SIGTERM from now on.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn take() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            pending: false,
        })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        if std::mem::take(&mut self.pending) {
            return;
        }
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Does `start` with a token that the next signal cancels. A start that is over all the same, as
    /// when the signal came at its very end, leaves the signal to [`Signals::next`].
    pub async fn during<T>(&mut self, start: impl AsyncFnOnce(CancellationToken) -> T) -> T {
        let give_up = CancellationToken::new();
        let started = start(give_up.clone());
        tokio::pin!(started);
        tokio::select! {
            done = &mut started => return done,
            () = self.next() => give_up.cancel(),
        }
        self.pending = true;
        started.await
    }
}

/// Runs `app` until a signal or a failure, then stops it; a second signal ends at once.
pub async fn run(app: App, signals: &mut Signals) -> ExitCode {
    let failed = tokio::select! {
        () = signals.next() => false,
        () = app.failed() => true,
    };
    info!(failed, "stopping; a second signal ends at once");
    tokio::select! {
        () = app.stop() => {}
        () = signals.next() => {
            warn!("stopped at once: calls were cut, and audit records wait for the next start");
            return ExitCode::FAILURE;
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
