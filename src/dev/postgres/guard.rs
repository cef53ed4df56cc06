//! The guard: a process between the broker and its embedded Postgres that outlives the one and ends
//! the other.

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

use super::cluster::{Cluster, is_temporary, remove_leftovers};

/// What the line begins with that tells the parent of success; the server's process id follows.
pub(super) const READY: &str = "ready ";

/// How long a server may take to accept connections: recovery after a crash included.
const START_LIMIT: Duration = Duration::from_mins(2);

/// How a server is ended: a fast shutdown, one without a checkpoint, and none at all, each after the
/// former had its time.
const ENDINGS: [(Signal, Duration); 3] = [
    (Signal::SIGINT, Duration::from_secs(10)),
    (Signal::SIGQUIT, Duration::from_secs(5)),
    (Signal::SIGKILL, Duration::from_secs(5)),
];

#[derive(Debug, Error)]
enum GuardError {
    #[error("this command is for token-broker's own use")]
    Usage,
    #[error("{0}")]
    System(#[from] io::Error),
    #[error("{} cannot be used: {source}", directory.display())]
    Directory { directory: PathBuf, source: io::Error },
    #[error("{0} failed\n{1}")]
    Failed(&'static str, String),
    #[error("it took longer than {limit} s\n{0}", limit = START_LIMIT.as_secs())]
    TooSlow(String),
}

/// Runs a Postgres until it ends or standard input, a pipe from the parent, does.
///
/// `arguments` are what follows the command: `temporary` or `kept`, the directory of Postgres'
/// programs, the database directory. Writes `ready` and the server's process id to standard
/// output, in one line, when the server accepts connections; or else what went wrong.
#[must_use]
pub fn guard(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let done = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(GuardError::System)
        .and_then(|runtime| runtime.block_on(run(arguments)));
    let Err(error) = done else { return ExitCode::SUCCESS };
    say(&error.to_string());
    ExitCode::FAILURE
}

async fn run(arguments: impl Iterator<Item = OsString>) -> Result<(), GuardError> {
    outlive_signals()?;
    let mut parent = pin!(end_of(parent()?));
    remove_leftovers();
    let [keeping, binaries, directory] =
        <[OsString; 3]>::try_from(arguments.collect::<Vec<_>>()).map_err(|_| GuardError::Usage)?;
    let temporary = is_temporary(&keeping).ok_or(GuardError::Usage)?;
    let directory = PathBuf::from(directory);
    let cluster = Cluster::claim(binaries.into(), directory.clone(), temporary)
        .map_err(|source| GuardError::Directory { directory, source })?;

    // Each of the futures that lose against the parent's end kills what it started.
    tokio::select! {
        () = &mut parent => return Ok(()),
        made = initialise(&cluster) => made?,
    }
    let mut server = Leader::start(cluster.server()?)?;
    tokio::select! {
        () = &mut parent => {}
        ready = wait_until_ready(&cluster, &mut server) => {
            say(&format!("{READY}{}", ready?));
            tokio::select! {
                () = &mut parent => {}
                _ = server.0.wait() => {}
            }
        }
    }
    server.end().await;
    Ok(())
}

/// What would end this process must not: the server is to be ended first, and that begins with the
/// parent's end. Handlers stay once they are there.
fn outlive_signals() -> io::Result<()> {
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        drop(signal(kind)?);
    }
    Ok(())
}

/// The pipe from the parent.
fn parent() -> Result<pipe::Receiver, GuardError> {
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    pipe::Receiver::from_owned_fd(stdin).map_err(|_| GuardError::Usage)
}

async fn end_of(mut pipe: pipe::Receiver) {
    let mut ignored = [0; 64];
    while pipe.read(&mut ignored).await.is_ok_and(|length| length > 0) {}
}

/// Makes the data directory with its database, if there is none.
async fn initialise(cluster: &Cluster) -> Result<(), GuardError> {
    if cluster.is_initialised() {
        return Ok(());
    }
    let failed = |program| move || GuardError::Failed(program, cluster.log_tail());
    let mut initdb = Leader::start(cluster.initdb()?)?;
    succeeded(initdb.0.wait().await?).ok_or_else(failed("initdb"))?;

    let (command, statement) = cluster.single_user()?;
    let mut single = Leader::start(command)?;
    if let Some(mut stdin) = single.0.stdin.take() {
        stdin.write_all(statement.as_bytes()).await?;
    }
    succeeded(single.0.wait().await?).ok_or_else(failed("creating the database"))?;
    Ok(cluster.finish()?)
}

fn succeeded(status: ExitStatus) -> Option<()> {
    status.success().then_some(())
}

/// The server's process id, once it accepts connections.
async fn wait_until_ready(cluster: &Cluster, server: &mut Leader) -> Result<u32, GuardError> {
    let pid = server.0.id().ok_or_else(|| GuardError::Failed("postgres", cluster.log_tail()))?;
    let ready = async {
        while !cluster.is_ready(pid) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        _ = server.0.wait() => Err(GuardError::Failed("postgres", cluster.log_tail())),
        in_time = timeout(START_LIMIT, ready) => match in_time {
            Ok(()) => Ok(pid),
            Err(_) => Err(GuardError::TooSlow(cluster.log_tail())),
        },
    }
}

/// A child that leads a process group, killed as a whole when this is dropped.
struct Leader(Child);

impl Leader {
    fn start(mut command: Command) -> Result<Self, GuardError> {
        let program = PathBuf::from(command.as_std().get_program());
        command.spawn().map(Self).map_err(|error| {
            io::Error::new(error.kind(), format!("{} cannot be run: {error}", program.display()))
                .into()
        })
    }

    fn pid(&self) -> Option<Pid> {
        self.0.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw)
    }

    /// Ends it as gently as time allows.
    async fn end(mut self) {
        for (signal, patience) in ENDINGS {
            let Some(pid) = self.pid() else { return };
            let _ = kill(pid, signal);
            let _ = timeout(patience, self.0.wait()).await;
        }
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            let _ = killpg(pid, Signal::SIGKILL);
        }
    }
}

/// Tells the parent, if there still is one.
fn say(words: &str) {
    let mut stdout = io::stdout();
    let _ = writeln!(stdout, "{words}").and_then(|()| stdout.flush());
}
