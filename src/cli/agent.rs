//! The command `agent`: keeps files with the tokens of accounts, for programs that speak no gRPC.

mod files;
mod notifier;
mod watcher;

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use token_broker_client::{AskOptions, Error, Token, TokenClient, TokenEvent};
use tokio::{
    sync::mpsc,
    task::{JoinSet, spawn_blocking},
    time::sleep,
};
use tracing::{debug, error, info, warn};

use self::{
    files::{Kept, TokenFiles},
    notifier::Notifier,
    watcher::{Watched, watch},
};
use super::{
    client::{CallError, client},
    global::GlobalArgs,
    output,
    time::positive_duration,
};
use crate::{
    config::{AgentFlags, AgentSettings, ClientFlags, ClientSettings, Flags},
    domain::{
        caller::AccountPattern,
        clock::{Clock, Timestamp, delta},
    },
    files::given_path::shown,
    lifecycle::{OnHangup, Request, Signals},
    telemetry,
};

/// A file is removed so long before the end of its token, because a request needs time to reach the API.
const END_MARGIN: Duration = Duration::from_secs(1);
/// How long until a file that could not be written or removed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often the removal of a file is tried when the agent stops.
const TRIES_AT_STOP: usize = 3;
/// How long after the start an account may be without a token before the agent says why.
const LONGEST_SILENCE: Duration = Duration::from_secs(2);
/// How long the agent waits for a token when one has ended without a replacement.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// Keeps the tokens of accounts in files, for programs that speak no gRPC
#[derive(Args, Debug)]
#[command(after_help = "\
For each account, NAME.token holds the token, and NAME.json its end, its generation, the allowed address and
the API's base URL. A file is removed when its token ends, when the account ends for the caller, and when the
agent stops.

The command after -- runs after each replacement, with the account in TOKEN_BROKER_ACCOUNT and the path of
its file in TOKEN_BROKER_TOKEN_FILE. No shell is involved.

Examples:
  token-broker agent --accounts 'acme,shop-*' --token-dir /run/tokens
  token-broker agent --accounts acme --token-dir /run/tokens -- systemctl reload shop
  token-broker agent --accounts acme --token-dir /run/tokens --once --timeout 1m")]
pub(super) struct AgentArgs {
    /// Write the files once, and exit: with code 0 when all of them are there, and otherwise with 1 and the
    /// reason
    #[arg(long)]
    once: bool,
    /// The longest time to wait for the tokens, with --once
    #[arg(long, value_name = "DURATION", default_value = "30s", requires = "once",
          value_parser = positive_duration)]
    timeout: Duration,
    /// The command that runs after each replacement, and its arguments
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "once")]
    command: Vec<String>,
    #[command(flatten)]
    settings: Flags<AgentFlags>,
    #[command(flatten)]
    client: Flags<ClientFlags>,
}

pub(super) async fn run(global: &GlobalArgs, args: AgentArgs) -> anyhow::Result<ExitCode> {
    let mut given = args.settings.given;
    given.extend(args.client.given);
    let sources = global.sources(given)?;
    let (settings, client_settings) = AgentSettings::resolve(&sources)?;
    telemetry::init_logs(settings.log_format)?;
    for warning in sources.warnings() {
        warn!("{warning}");
    }
    let client = client(&client_settings)?;
    let files = TokenFiles::new(settings.token_dir.clone(), settings.access);
    let files = Arc::new(
        files
            .with_context(|| format!("cannot use the directory {}", shown(&settings.token_dir)))?,
    );
    if args.once {
        return write_once(&client, &client_settings, &settings, &files, args.timeout).await;
    }
    let signals = Signals::take(OnHangup::Reload)?;
    let notifier = Notifier::start(args.command, settings.signal.clone());
    let agent = Agent {
        client,
        client_settings,
        files,
        notifier,
        kept: BTreeMap::new(),
        unwritten: BTreeMap::new(),
        unremoved: BTreeSet::new(),
        retry_at: None,
        settings,
    };
    agent.run(signals).await
}

/// Writes the file of each account, and returns when all are there or one cannot be had.
async fn write_once(
    client: &TokenClient,
    client_settings: &ClientSettings,
    settings: &AgentSettings,
    files: &Arc<TokenFiles>,
    timeout: Duration,
) -> anyhow::Result<ExitCode> {
    let names: Option<Vec<_>> = settings.accounts.iter().map(AccountPattern::as_name).collect();
    let Some(names) = names else {
        bail!("with --once, each account must be named: a pattern never has all of its accounts");
    };
    let mut tokens = JoinSet::new();
    for name in names {
        let client = client.clone();
        tokens.spawn(async move { client.token_within(name.as_str(), timeout).await });
    }
    let mut failures = 0;
    for token in tokens.join_all().await {
        match token {
            Ok(token) => {
                let files = Arc::clone(files);
                spawn_blocking(move || files.write(&token)).await??;
            }
            Err(error) => {
                failures += 1;
                let reason = CallError::new(&error, client_settings);
                output::note(format_args!("error: {}: {reason}", error.account()));
            }
        }
    }
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Agent {
    client: TokenClient,
    client_settings: ClientSettings,
    settings: AgentSettings,
    files: Arc<TokenFiles>,
    notifier: Notifier,
    /// The files that exist, or may exist, by account.
    kept: BTreeMap<String, Held>,
    /// Tokens whose files could not be written.
    unwritten: BTreeMap<String, Received>,
    /// Accounts whose files could not be removed.
    unremoved: BTreeSet<String>,
    /// When to try that again.
    retry_at: Option<Timestamp>,
}

/// A token, and when its file is removed. That is fixed when the token arrives, by a clock that goes on while the
/// machine is suspended; the client's does not.
struct Received {
    token: Token,
    removed_at: Timestamp,
}

impl Received {
    fn new(token: Token) -> Self {
        let left = token.expires_in().saturating_sub(END_MARGIN);
        Self { token, removed_at: after(left) }
    }
}

/// A file with a token.
struct Held {
    /// 0 if the file could not be written.
    generation: u64,
    /// When the file is removed.
    removed_at: Timestamp,
}

impl Agent {
    async fn run(mut self, mut signals: Signals) -> anyhow::Result<ExitCode> {
        self.take_over().await?;
        let (sender, mut events) = mpsc::channel(64);
        let mut watchers = self.watch(&sender);
        let mut silent_until = Some(after(LONGEST_SILENCE));
        loop {
            let due = self.kept.values().map(|held| held.removed_at).min();
            tokio::select! {
                event = events.recv() => match event {
                    Some(Watched::Event(TokenEvent::Token(token))) => {
                        self.keep(Received::new(token)).await;
                    }
                    Some(Watched::Event(TokenEvent::Ended { account, reason })) => {
                        warn!(account, %reason, "the account ended");
                        self.remove(&account).await;
                    }
                    Some(Watched::Event(_)) | None => {}
                    Some(Watched::Refused { target, error }) => {
                        let reason = CallError::new(&error, &self.client_settings);
                        error!(accounts = %target, %reason, "the broker refuses the tokens");
                        let refused = self.kept.keys().filter(|name| target.matches(name));
                        for account in refused.cloned().collect::<Vec<_>>() {
                            self.remove(&account).await;
                        }
                    }
                },
                () = at(due) => self.remove_ended(&sender).await,
                () = at(silent_until) => {
                    silent_until = None;
                    self.ask_for_missing(&sender);
                }
                () = at(self.retry_at) => {
                    self.retry_at = None;
                    // First, because a file that is written below stays.
                    self.retry_removals().await;
                    for received in std::mem::take(&mut self.unwritten).into_values() {
                        self.keep(received).await;
                    }
                }
                request = signals.request() => match request {
                    Request::Stop => break,
                    Request::Reload => {
                        info!("SIGHUP: getting all tokens again");
                        watchers = self.watch(&sender);
                    }
                },
            }
        }
        info!("stopping; the files are removed");
        watchers.abort_all();
        for account in self.kept.keys().cloned().collect::<Vec<_>>() {
            self.remove(&account).await;
        }
        for _ in 1..TRIES_AT_STOP {
            if self.unremoved.is_empty() {
                break;
            }
            sleep(RETRY).await;
            self.retry_removals().await;
        }
        self.client.close().await;
        if !self.unremoved.is_empty() {
            let accounts: Vec<_> = self.unremoved.into_iter().collect();
            error!(
                accounts = accounts.join(", "),
                "the files of these accounts stay, with their tokens"
            );
            return Ok(ExitCode::FAILURE);
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Takes over the files that an earlier agent left, and removes those whose tokens have ended.
    async fn take_over(&mut self) -> anyhow::Result<()> {
        let (files, patterns) = (Arc::clone(&self.files), self.settings.accounts.clone());
        let now = Clock::System.wall();
        let kept = spawn_blocking(move || files.take_over(&patterns, now)).await??;
        for Kept { account, generation, expires_in } in kept {
            let removed_at = after(expires_in.saturating_sub(END_MARGIN));
            self.kept.insert(account, Held { generation, removed_at });
        }
        Ok(())
    }

    /// Starts a watcher for each name and pattern. The watchers end when the returned value is dropped.
    fn watch(&self, sender: &mpsc::Sender<Watched>) -> JoinSet<()> {
        let mut watchers = JoinSet::new();
        for target in &self.settings.accounts {
            watchers.spawn(watch(self.client.clone(), target.clone(), sender.clone()));
        }
        watchers
    }

    /// Writes the file of a token, unless a newer one is there.
    async fn keep(&mut self, received: Received) {
        let Received { token, removed_at } = received;
        let (account, generation) = (token.account().to_owned(), token.generation());
        let held = self.kept.get(&account);
        let has_ended = removed_at <= Clock::System.now();
        if held.is_some_and(|held| held.generation > generation) || has_ended {
            return;
        }
        let is_replacement = held.is_none_or(|held| held.generation != generation);
        let (files, written) = (Arc::clone(&self.files), token.clone());
        let result = spawn_blocking(move || files.write(&written)).await;
        match result.map_err(std::io::Error::other).flatten() {
            Ok(()) => {
                debug!(account, generation, "the token's file was written");
                self.unwritten.remove(&account);
                self.unremoved.remove(&account);
                if is_replacement {
                    info!(account, generation, "a new token is in its file");
                    self.notifier.notify(&account, self.files.token_path(&account));
                }
                self.kept.insert(account, Held { generation, removed_at });
            }
            Err(error) => {
                error!(account, %error, "the token's file cannot be written; it is tried again");
                // Perhaps only the description is missing, so there is something to remove.
                let held = Held { generation: 0, removed_at };
                self.kept.entry(account.clone()).or_insert(held);
                self.unwritten.insert(account, Received { token, removed_at });
                self.retry_at = Some(after(RETRY));
            }
        }
    }

    /// Removes the files of an account; what cannot be removed is tried again.
    async fn remove(&mut self, account: &str) {
        self.kept.remove(account);
        self.unwritten.remove(account);
        match self.try_to_remove(account).await {
            Ok(()) => {
                self.unremoved.remove(account);
            }
            Err(error) => {
                error!(account, %error, "the token's file cannot be removed; it is tried again");
                self.unremoved.insert(account.to_owned());
                self.retry_at = Some(after(RETRY));
            }
        }
    }

    async fn try_to_remove(&self, account: &str) -> std::io::Result<()> {
        let (files, account) = (Arc::clone(&self.files), account.to_owned());
        let removed = spawn_blocking(move || files.remove(&account)).await;
        removed.map_err(std::io::Error::other).flatten()
    }

    /// Tries the removals that have failed again. A failure was logged already.
    async fn retry_removals(&mut self) {
        for account in self.unremoved.clone() {
            if self.try_to_remove(&account).await.is_ok() {
                info!(account, "the token's file is removed now");
                self.unremoved.remove(&account);
            }
        }
        if !self.unremoved.is_empty() {
            self.retry_at = Some(after(RETRY));
        }
    }

    /// Removes the files whose tokens have ended, and asks why they were not replaced.
    async fn remove_ended(&mut self, sender: &mpsc::Sender<Watched>) {
        let now = Clock::System.now();
        let ended = self.kept.iter().filter(|(_, held)| held.removed_at <= now);
        for account in ended.map(|(account, _)| account.clone()).collect::<Vec<_>>() {
            self.remove(&account).await;
            self.ask(account, sender, |account, error| {
                error!(account, %error, "the token ended, and there is no other one; its file was removed");
            });
        }
    }

    /// Asks why named accounts have no token: a stream says nothing about one that is disabled, for example.
    fn ask_for_missing(&self, sender: &mpsc::Sender<Watched>) {
        let named = self.settings.accounts.iter().filter_map(AccountPattern::as_name);
        for account in named.map(|name| name.as_str().to_owned()) {
            if !self.kept.contains_key(&account) && !self.unwritten.contains_key(&account) {
                self.ask(account, sender, |account, error| {
                    error!(account, %error, "there is no token yet; its file is written when there is one");
                });
            }
        }
    }

    /// Asks for a token in the background. It is handled like one of a stream; without one, `report` logs why.
    fn ask(&self, account: String, sender: &mpsc::Sender<Watched>, report: fn(&str, &Error)) {
        let (client, sender) = (self.client.clone(), sender.clone());
        tokio::spawn(async move {
            let options = AskOptions::default().timeout(ASK_TIMEOUT);
            match client.ask(&account, options).await {
                Ok(token) => {
                    // The agent is gone if nobody receives it.
                    let _ = sender.send(Watched::Event(TokenEvent::Token(token))).await;
                }
                Err(error) => report(&account, &error),
            }
        });
    }
}

/// Waits until `time`; for ever if there is none.
async fn at(time: Option<Timestamp>) {
    match time {
        Some(time) => Clock::System.sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Returns the time `span` from now, on the clock that goes on while the machine is suspended.
fn after(span: Duration) -> Timestamp {
    Clock::System.now() + delta(span)
}
