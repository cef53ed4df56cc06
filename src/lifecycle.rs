//! Signals of the process, and the run of a broker from its start to its stop.

#[cfg_attr(not(target_os = "linux"), path = "lifecycle/no_real_time.rs")]
mod real_time;

use std::{future::poll_fn, io, process::ExitCode, task::Poll};

#[cfg(target_os = "linux")]
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::process::{Resource, Rlimit, Signal as Named, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{app::App, config::Sources};

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

/// What a process does at SIGHUP.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OnHangup {
    /// It reads again what can change while it runs, as services do.
    Reload,
    /// It stops, since its terminal was closed. It goes on if it was started with `nohup`.
    Stop,
}

/// Signals that end a process which does not handle them, though nobody sends them to stop it, with their names.
const STRAY: &[(&str, Named)] = &[
    ("SIGUSR1", Named::USR1),
    ("SIGUSR2", Named::USR2),
    ("SIGALRM", Named::ALARM),
    ("SIGIO", Named::IO),
    ("SIGXFSZ", Named::XFSZ),
    ("SIGXCPU", Named::XCPU),
    ("SIGVTALRM", Named::VTALARM),
    ("SIGPROF", Named::PROF),
    #[cfg(target_os = "linux")]
    ("SIGSTKFLT", Named::STKFLT),
];

/// SIGPWR, with which a host's manager asks for a stop.
#[cfg(target_os = "linux")]
const HALT: [i32; 1] = [Named::POWER.as_raw()];
#[cfg(not(target_os = "linux"))]
const HALT: [i32; 0] = [];
/// SIGRTMIN+3, with which systemd asks a container to halt.
const REAL_TIME_HALT: i32 = *real_time::NUMBERS.start() + 3;

/// Blocks the real-time signals, which would end the process. Commands that take [`Signals`] read them; in others they
/// stay pending. Call it before there is a second thread.
pub fn block_real_time_signals() {
    // If the system refuses, they end the process as usual.
    let _ = real_time::block();
}

/// The signals to this process.
///
/// | signal | effect |
/// |---|---|
/// | SIGTERM, SIGINT, SIGQUIT, SIGPWR, SIGRTMIN+3 | stop |
/// | SIGHUP | see [`OnHangup`] |
/// | those of [`STRAY`], other real-time signals | a line in the log; they would end the process without a drain |
/// | 32 and 33 | they end the process: the C library keeps them for itself |
/// | SIGPIPE | none: the write fails, since Rust's runtime ignores the signal |
/// | others | as usual for a process |
pub struct Signals {
    /// Signals that ask for a stop.
    stop: Vec<Signal>,
    hangup: Signal,
    /// What SIGHUP means; `None` if it is ignored.
    on_hangup: Option<OnHangup>,
    /// Signals without an effect, with their names.
    stray: Vec<(&'static str, Signal)>,
    real_time: real_time::RealTimeSignals,
    /// Whether a signal arrived that [`Signals::next`] has not returned yet.
    pending: bool,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Request {
    /// The process stops.
    Stop,
    /// The process reads again what can change while it runs.
    Reload,
}

impl Signals {
    /// Handles the signals from now on, so that they no longer end the process.
    ///
    /// # Errors
    /// When the system refuses to install a handler.
    pub fn take(on_hangup: OnHangup) -> io::Result<Self> {
        // The handler replaces the setting of `nohup`, so that is read first.
        let is_ignored = on_hangup == OnHangup::Stop && ignores_hangup();
        let stop = [Named::TERM, Named::INT, Named::QUIT].map(Named::as_raw);
        Ok(Self {
            stop: stop.into_iter().chain(HALT).map(handled).collect::<io::Result<_>>()?,
            hangup: signal(SignalKind::hangup())?,
            on_hangup: (!is_ignored).then_some(on_hangup),
            stray: STRAY
                .iter()
                .map(|(name, named)| Ok((*name, handled(named.as_raw())?)))
                .collect::<io::Result<_>>()?,
            real_time: real_time::RealTimeSignals::take()?,
            pending: false,
        })
    }

    /// Waits for the next signal to stop. Cancel safe: no such signal is lost.
    pub async fn next(&mut self) {
        if std::mem::take(&mut self.pending) {
            return;
        }
        while let Request::Reload = self.request().await {
            info!("SIGHUP has no effect while the process starts or stops");
        }
    }

    /// Waits for the next signal that asks for something. Cancel safe.
    pub async fn request(&mut self) -> Request {
        loop {
            tokio::select! {
                () = any_of(&mut self.stop) => return Request::Stop,
                _ = self.hangup.recv() => match self.on_hangup {
                    Some(OnHangup::Reload) => return Request::Reload,
                    Some(OnHangup::Stop) => return Request::Stop,
                    None => {}
                },
                name = next_of(&mut self.stray) => info!(signal = name, "the signal has no effect"),
                number = self.real_time.next() => {
                    if number == REAL_TIME_HALT {
                        return Request::Stop;
                    }
                    info!(signal = real_time::name(number), "the signal has no effect");
                }
            }
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

/// Handles the signal `number` from now on.
fn handled(number: i32) -> io::Result<Signal> {
    signal(SignalKind::from_raw(number))
}

/// Waits for any of `signals`. Cancel safe.
async fn any_of(signals: &mut [Signal]) {
    poll_fn(|context| {
        let is_ready = |signal: &mut Signal| signal.poll_recv(context).is_ready();
        if signals.iter_mut().any(is_ready) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Waits for the next of `signals`, and returns its name. Cancel safe.
async fn next_of(signals: &mut [(&'static str, Signal)]) -> &'static str {
    poll_fn(|context| {
        for (name, signal) in &mut *signals {
            if signal.poll_recv(context).is_ready() {
                return Poll::Ready(*name);
            }
        }
        Poll::Pending
    })
    .await
}

/// Whether this process was started with SIGHUP ignored, as `nohup` does. Only Linux tells.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    ignored
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 != 0)
}

/// Reads again what can change while `app` runs, and says which of `sources` cannot.
async fn reload(app: &App, sources: Option<&Sources>) {
    info!(
        "SIGHUP: reading the TLS files, the keyring and the database's URL again; all other settings are read at the \
         start"
    );
    app.reload().await;
    match sources.map(Sources::changed_in_file).transpose() {
        Ok(None) => {}
        Ok(Some(changed)) if changed.is_empty() => {}
        Ok(Some(changed)) => warn!(
            settings = changed.join(", "),
            "settings have changed in their file; they take effect at the next start"
        ),
        Err(error) => {
            error!(%error, "the file of settings cannot be read: the next start will fail");
        }
    }
}

/// Waits until a signal to stop arrives or a task of `app` fails, and then stops `app`. At SIGHUP, reads again what
/// can change. `sources` are those of the settings, if they can change. A second signal
/// interrupts the stop: this function returns at once. The exit code is a failure if a task failed, the
/// stop was interrupted, or audit records were lost.
pub async fn run(app: App, signals: &mut Signals, sources: Option<&Sources>) -> ExitCode {
    let failed = loop {
        if std::mem::take(&mut signals.pending) {
            break false;
        }
        tokio::select! {
            request = signals.request() => match request {
                Request::Stop => break false,
                Request::Reload => tokio::select! {
                    () = reload(&app, sources) => {}
                    // A file that never answers must not keep the process from stopping.
                    () = signals.next() => break false,
                    () = app.failed() => break true,
                },
            },
            () = app.failed() => break true,
        }
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
