//! The guard process: it runs the server, and stops it when the process that started the guard ends.

use std::{
    ffi::OsString,
    io::{self, Write},
    os::fd::AsFd,
    path::PathBuf,
    pin::pin,
    process::{ExitCode, ExitStatus},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use thiserror::Error;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    process::{Child, Command},
    runtime,
    signal::unix::{SignalKind, signal},
    time::{sleep, timeout},
};

use super::cluster::{Cluster, parse_lifetime, remove_abandoned};

/// The hidden command of the `token-broker` program that runs [`guard()`].
pub const GUARD_COMMAND: &str = "postgres-guard";

/// Prefix of the line with which the guard reports success; the server's process id follows.
pub(super) const READY_PREFIX: &str = "ready ";

/// How long a server may take until it accepts connections, including recovery after a crash.
const START_LIMIT: Duration = Duration::from_mins(2);

/// How the server is stopped: the signals to send, and how long to wait after each before the next
/// is sent. They request a fast shutdown, an immediate shutdown without a checkpoint, and a kill.
const STOP_SIGNALS: [(Signal, Duration); 3] = [
    (Signal::SIGINT, Duration::from_secs(10)),
    (Signal::SIGQUIT, Duration::from_secs(5)),
    (Signal::SIGKILL, Duration::from_secs(5)),
];

/// Why the guard failed. The message is written to standard output, for the parent.
#[derive(Debug, Error)]
enum GuardError {
    #[error("this command is for token-broker's own use")]
    Usage,
    #[error(transparent)]
    System(#[from] io::Error),
    #[error("{} cannot be used: {source}", directory.display())]
    Directory { directory: PathBuf, source: io::Error },
    #[error("{} cannot be run: {source}", program.display())]
    Program { program: PathBuf, source: io::Error },
    /// A program failed; the second field is the end of the log.
    #[error("{0} failed\n{1}")]
    Failed(&'static str, String),
    /// The server did not become ready; the field is the end of the log.
    #[error("it took longer than {limit} s\n{0}", limit = START_LIMIT.as_secs())]
    TooSlow(String),
}

/// Runs a server until it ends or until standard input, which must be a pipe from the parent
/// process, is closed. Blocks until the server has stopped.
///
/// `arguments` are those after [`GUARD_COMMAND`]: `temporary` or `persistent`, the directory of
/// Postgres' programs, and the server's directory. Writes one line to standard output: `ready`
/// and the server's process id once the server accepts connections, or else an error message.
#[must_use]
pub fn guard(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let result = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(GuardError::System)
        .and_then(|runtime| runtime.block_on(run(arguments)));
    let Err(error) = result else { return ExitCode::SUCCESS };
    report(&error.to_string());
    ExitCode::FAILURE
}

async fn run(arguments: impl Iterator<Item = OsString>) -> Result<(), GuardError> {
    ignore_termination_signals()?;
    let mut parent_ended = pin!(end_of_input(parent_pipe()?));
    remove_abandoned();
    let [lifetime, programs, directory] =
        <[OsString; 3]>::try_from(arguments.collect::<Vec<_>>()).map_err(|_| GuardError::Usage)?;
    let temporary = parse_lifetime(&lifetime).ok_or(GuardError::Usage)?;
    let directory = PathBuf::from(directory);
    let cluster = Cluster::open(programs.into(), directory.clone(), temporary)
        .map_err(|source| GuardError::Directory { directory, source })?;

    // If the parent ends first, the dropped future kills the processes that it started.
    tokio::select! {
        () = &mut parent_ended => return Ok(()),
        result = initialise(&cluster) => result?,
    }
    let mut server = ProcessGroup::start(cluster.server()?)?;
    tokio::select! {
        () = &mut parent_ended => {}
        ready = wait_until_ready(&cluster, &mut server) => {
            report(&format!("{READY_PREFIX}{}", ready?));
            tokio::select! {
                () = &mut parent_ended => {}
                _ = server.leader.wait() => {}
            }
        }
    }
    server.stop().await;
    Ok(())
}

/// Keeps SIGINT, SIGTERM and SIGHUP from ending this process. The server must be stopped first, and
/// that begins when the parent ends. Tokio's handlers stay installed after the streams are dropped.
fn ignore_termination_signals() -> io::Result<()> {
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        drop(signal(kind)?);
    }
    Ok(())
}

/// Returns standard input as the pipe that the parent holds open as long as it runs.
fn parent_pipe() -> Result<pipe::Receiver, GuardError> {
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    pipe::Receiver::from_owned_fd(stdin).map_err(|_| GuardError::Usage)
}

/// Returns when the other end of the pipe is closed.
async fn end_of_input(mut pipe: pipe::Receiver) {
    let mut ignored = [0; 64];
    while pipe.read(&mut ignored).await.is_ok_and(|length| length > 0) {}
}

/// Creates the data directory with its database, unless an earlier run did.
async fn initialise(cluster: &Cluster) -> Result<(), GuardError> {
    if cluster.is_initialised() {
        return Ok(());
    }
    let failed = |program| move || GuardError::Failed(program, cluster.log_tail());
    let mut initdb = ProcessGroup::start(cluster.initdb()?)?;
    success(initdb.leader.wait().await?).ok_or_else(failed("initdb"))?;

    let (command, statement) = cluster.create_database()?;
    let mut single_user = ProcessGroup::start(command)?;
    if let Some(mut stdin) = single_user.leader.stdin.take() {
        stdin.write_all(statement.as_bytes()).await?;
    }
    success(single_user.leader.wait().await?).ok_or_else(failed("creating the database"))?;
    Ok(cluster.finish_initialisation()?)
}

fn success(status: ExitStatus) -> Option<()> {
    status.success().then_some(())
}

/// Returns the server's process id once the server accepts connections.
async fn wait_until_ready(cluster: &Cluster, server: &mut ProcessGroup) -> Result<u32, GuardError> {
    let failed = || GuardError::Failed("postgres", cluster.log_tail());
    let pid = server.leader.id().ok_or_else(failed)?;
    let ready = async {
        while !cluster.is_ready(pid) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        _ = server.leader.wait() => Err(failed()),
        result = timeout(START_LIMIT, ready) => match result {
            Ok(()) => Ok(pid),
            Err(_) => Err(GuardError::TooSlow(cluster.log_tail())),
        },
    }
}

/// A child process that leads a process group. Dropping it kills the whole group, unless the child
/// has already been waited for.
struct ProcessGroup {
    leader: Child,
}

impl ProcessGroup {
    /// Runs `command`, which must put the process into a group of its own.
    fn start(mut command: Command) -> Result<Self, GuardError> {
        let program = PathBuf::from(command.as_std().get_program());
        match command.spawn() {
            Ok(leader) => Ok(Self { leader }),
            Err(source) => Err(GuardError::Program { program, source }),
        }
    }

    fn pid(&self) -> Option<Pid> {
        self.leader.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw)
    }

    /// Stops the server that leads the group, as [`STOP_SIGNALS`] says.
    async fn stop(mut self) {
        for (signal, time_limit) in STOP_SIGNALS {
            let Some(pid) = self.pid() else { return };
            let _ = kill(pid, signal);
            let _ = timeout(time_limit, self.leader.wait()).await;
        }
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            let _ = killpg(pid, Signal::SIGKILL);
        }
    }
}

/// Writes a line for the parent, which may have ended.
fn report(line: &str) {
    let mut stdout = io::stdout();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}
