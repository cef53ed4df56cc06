//! The command `token`: a client of a broker.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::bail;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use token_broker_client::{AskOptions, Error, Token, TokenClient, TokenEvent};
use tokio::time::{Instant, sleep_until};

use super::{
    client::{CallError, client},
    global::GlobalArgs,
    output,
    time::LocalTime,
};
use crate::{
    config::{ClientFlags, ClientSettings, Flags},
    domain::{
        caller::AccountPattern,
        printable::{printable, printable_json},
    },
};

/// Gets tokens from a broker
#[derive(Args, Debug)]
pub(super) struct TokenArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prints an account's token as the only output
    #[command(after_help = "\
The caller's bearer comes from TOKEN_BROKER_BEARER, TOKEN_BROKER_BEARER_FILE or --bearer-file.

Examples:
  TOKEN=$(token-broker token get acme)
  token-broker token get 'acme-*' --watch --json")]
    Get(GetArgs),
}

#[derive(Args, Debug)]
struct GetArgs {
    /// The account's name; with --watch also a pattern such as 'acme-*'
    account: AccountPattern,
    /// The shortest time for which the token must still be valid
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration,
          conflicts_with = "watch")]
    min_ttl: Option<Duration>,
    /// Print all of the broker's answer, as JSON
    #[arg(long)]
    json: bool,
    /// Print each new token as it arrives, one a line
    #[arg(long)]
    watch: bool,
    /// The longest time to wait for the token
    #[arg(long, value_name = "DURATION", default_value = "30s",
          value_parser = humantime::parse_duration, conflicts_with = "watch")]
    timeout: Duration,
    #[command(flatten)]
    settings: Flags<ClientFlags>,
}

pub(super) async fn run(global: &GlobalArgs, args: TokenArgs) -> anyhow::Result<ExitCode> {
    let Command::Get(args) = args.command;
    let settings = ClientSettings::resolve(&global.sources(args.settings.given.clone())?)?;
    let client = client(&settings)?;
    let fail = |error: Error| CallError::new(&error, &settings);
    if args.watch { watch(&client, &args, fail).await } else { get(&client, &args, fail).await }
}

/// Asks once, so that the user hears at once what is wrong.
async fn get(
    client: &TokenClient,
    args: &GetArgs,
    fail: impl Fn(Error) -> CallError,
) -> anyhow::Result<ExitCode> {
    let Some(account) = args.account.as_name() else {
        bail!("a pattern stands for many accounts: use --watch");
    };
    let mut options = AskOptions::default().timeout(args.timeout);
    if let Some(min_ttl) = args.min_ttl {
        options = options.min_ttl(min_ttl);
    }
    let token = client.ask(account.as_str(), options).await.map_err(fail)?;
    if args.json {
        output::secret_line(printable_json(&serde_json::to_string_pretty(&as_json(&token))?))?;
    } else {
        output::secret_line(printable(token.access_token()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// How long a stream may be silent before the user hears why.
const LONGEST_SILENCE: Duration = Duration::from_secs(1);
/// How long it may take to find out why.
const WHY_TIMEOUT: Duration = Duration::from_secs(5);

async fn watch(
    client: &TokenClient,
    args: &GetArgs,
    fail: impl Fn(Error) -> CallError,
) -> anyhow::Result<ExitCode> {
    let mut stream = client.watch([args.account.to_string()]).await.map_err(&fail)?;
    // A token that there is comes at once.
    let silent_until = Instant::now() + LONGEST_SILENCE;
    let mut is_silent = true;
    loop {
        let event = tokio::select! {
            event = stream.next() => event.map_err(&fail)?,
            () = sleep_until(silent_until), if is_silent => {
                is_silent = false;
                explain_silence(client, &args.account, &fail).await;
                continue;
            }
        };
        is_silent = false;
        match event {
            None => bail!("the broker ended the stream"),
            Some(event) => print(event, args.json)?,
        }
    }
}

/// Tells the user why no token comes. The stream goes on, because that may change.
async fn explain_silence(
    client: &TokenClient,
    account: &AccountPattern,
    fail: impl Fn(Error) -> CallError,
) {
    let Some(name) = account.as_name() else {
        return output::note(format_args!(
            "no token yet of an account that {account} matches; waiting"
        ));
    };
    let options = AskOptions::default().timeout(WHY_TIMEOUT);
    // The stream sends the token, if there is one by now.
    if let Err(error) = client.ask(name.as_str(), options).await {
        output::note(format_args!("{account} has no token now; waiting for one: {}", fail(error)));
    }
}

fn print(event: TokenEvent, is_json: bool) -> anyhow::Result<()> {
    match event {
        TokenEvent::Token(token) if is_json => {
            output::secret_line(printable_json(&as_json(&token).to_string()))?;
        }
        TokenEvent::Token(token) => output::secret_line(printable(token.access_token()))?,
        TokenEvent::Ended { account, reason } if is_json => {
            output::json_line(&json!({ "account": account, "ended": reason.to_string() }))?;
        }
        TokenEvent::Ended { account, reason } => {
            output::note(format_args!("{account} ended: {reason}"));
        }
        _ => {}
    }
    Ok(())
}

fn as_json(token: &Token) -> Value {
    let time = |at: Option<SystemTime>| at.map(|at| LocalTime(at.into()));
    json!({
        "account": token.account(),
        "access_token": token.access_token(),
        "expires_at": time(token.expires_at()),
        "issued_at": time(token.issued_at()),
        // A string, as in protobuf's JSON: many parsers round numbers beyond 2^53.
        "generation": token.generation().to_string(),
        "reuse_for_seconds": token.reuse_for().as_secs_f64(),
        "expires_in_seconds": token.expires_in().as_secs_f64(),
        "allowed_ip": token.allowed_ip(),
        "api_base_url": token.api_base_url(),
    })
}
