//! Tells other programs that a token was replaced: by a command, or by a signal.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{process::Command, sync::watch, time::timeout};
use tracing::{info, warn};

use crate::{
    config::table::ENV_PREFIX,
    files::{given_path::shown, text},
};

/// A command that runs longer is killed.
const COMMAND_TIMEOUT: Duration = Duration::from_mins(1);

/// Accounts whose tokens were replaced, with their files.
type Replaced = BTreeMap<String, PathBuf>;

/// Runs the command and sends the signal, in a task of its own, so that a slow command delays no file. What is
/// replaced meanwhile is told once it has ended; an account that is replaced twice then is told once.
pub(super) struct Notifier {
    replaced: watch::Sender<Replaced>,
}

impl Notifier {
    /// Starts the task. `command` may be empty.
    pub(super) fn start(command: Vec<String>, signal: Option<(PathBuf, Signal)>) -> Self {
        let (replaced, mut receiver) = watch::channel(Replaced::new());
        let sender = replaced.clone();
        tokio::spawn(async move {
            while receiver.wait_for(|replaced| !replaced.is_empty()).await.is_ok() {
                let mut taken = Replaced::new();
                sender.send_modify(|replaced| taken = std::mem::take(replaced));
                for (account, file) in &taken {
                    if let Some((program, arguments)) = command.split_first() {
                        run(program, arguments, account, file).await;
                    }
                }
                if let Some((pid_file, signal)) = &signal
                    && let Err(error) = send(pid_file, *signal).await
                {
                    let pid_file = shown(pid_file);
                    warn!(%pid_file, error = format!("{error:#}"), "the signal cannot be sent");
                }
            }
        });
        Self { replaced }
    }

    /// Tells that the token of `account` in `file` was replaced.
    pub(super) fn notify(&self, account: &str, file: PathBuf) {
        self.replaced.send_modify(|replaced| {
            replaced.insert(account.to_owned(), file);
        });
    }
}

/// Runs the command to its end. Its output goes to the agent's standard error.
async fn run(program: &str, arguments: &[String], account: &str, file: &Path) {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env(format!("{ENV_PREFIX}ACCOUNT"), account)
        .env(format!("{ENV_PREFIX}TOKEN_FILE"), file)
        // The agent's own secret.
        .env_remove(format!("{ENV_PREFIX}BEARER"))
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .kill_on_drop(true);
    match timeout(COMMAND_TIMEOUT, command.status()).await {
        Ok(Ok(status)) if status.success() => info!(account, "the command ran"),
        Ok(Ok(status)) => warn!(account, %status, "the command failed"),
        Ok(Err(error)) => warn!(account, %error, "the command cannot be run"),
        Err(_) => {
            warn!(account, timeout = ?COMMAND_TIMEOUT, "the command took too long; it was killed");
        }
    }
}

/// Sends the signal to the process whose number is in the file.
async fn send(pid_file: &Path, signal: Signal) -> anyhow::Result<()> {
    let path = pid_file.to_path_buf();
    let text = tokio::task::spawn_blocking(move || text::read(&path)).await??;
    // 0, 1 and negative numbers would mean something else than a program that uses tokens.
    let pid = text.trim().parse().ok().filter(|pid| *pid > 1).and_then(Pid::from_raw);
    let Some(pid) = pid else { bail!("the file does not have the number of a process") };
    kill_process(pid, signal).context("the process cannot be reached")
}
