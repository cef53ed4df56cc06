//! Signals of the process, and the run of a broker from its start to its stop.

use std::process::ExitCode;

#[cfg(target_os = "linux")]
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::app::App;

/// Raises the process's soft limit of open files to its hard limit. Each connection takes a
/// descriptor, and the usual limit of 1,024 exists for programs that use `select`.
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    // If the system refuses, the soft limit stays as it is, and fewer connections are accepted.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Keeps the memory of this process, which holds secrets, to itself: a crash leaves no core file, neither
/// on disk nor with the handler that the system pipes it to, and other processes of the same user can
/// neither read the memory nor attach a debugger. Root still can.
pub fn protect_memory() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    // Neither call can fail with these arguments; if a system refuses, the process runs without.
    let _ = setrlimit(Resource::Core, none);
    #[cfg(target_os = "linux")]
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// SIGINT and SIGTERM, which ask the process to stop.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// Whether a signal arrived that [`Signals::next`] has not returned yet.
    pending: bool,
}

impl Signals {
    /// Handles SIGINT and SIGTERM from now on, so that they no longer end the process.
    ///
    /// # Errors
    /// When the system refuses to install a handler.
    pub fn take() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            pending: false,
        })
    }

    /// Waits for the next signal. Cancel safe: no signal is lost.
    pub async fn next(&mut self) {
        if std::mem::take(&mut self.pending) {
            return;
        }
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Runs `start` with a token that the next signal cancels, and returns the result of `start`, which
    /// must end soon after the token is cancelled.
    ///
    /// If a signal came, the next call of [`Signals::next`] returns at once. So the signal is not lost
    /// when `start` succeeds in spite of it.
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

/// Waits until a signal arrives or a task of `app` fails, and then stops `app`. A second signal
/// interrupts the stop: this function returns at once. The exit code is a failure if a task failed, the
/// stop was interrupted, or audit records were lost.
pub async fn run(app: App, signals: &mut Signals) -> ExitCode {
    let failed = tokio::select! {
        () = signals.next() => false,
        () = app.failed() => true,
    };
    info!(failed, "stopping; a second signal ends at once");
    let complete = tokio::select! {
        complete = app.stop() => complete,
        () = signals.next() => {
            warn!("stopped at once: open calls were aborted, and audit records wait for the next start");
            return ExitCode::FAILURE;
        }
    };
    if failed || !complete { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
