//! The command `token`: a client of a broker.

mod client;

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use chrono::DateTime;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use self::client::BrokerClient;
use super::{global::GlobalArgs, output, time::LocalTime};
use crate::{
    api::proto::{
        AccountEnded, GetTokenRequest, GetTokenResponse, WatchTokensRequest, account_ended::Reason,
        watch_tokens_response::Event,
    },
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
    let client = BrokerClient::new(&settings)?;
    if args.watch { watch(client, &args).await } else { get(client, &args).await }
}

async fn get(mut client: BrokerClient, args: &GetArgs) -> anyhow::Result<ExitCode> {
    let Some(account) = args.account.as_name() else {
        bail!("a pattern stands for many accounts: use --watch");
    };
    let min_ttl = args.min_ttl.map(prost_types::Duration::try_from).transpose();
    let request = GetTokenRequest {
        account: account.to_string(),
        min_ttl: min_ttl.context("--min-ttl is too long")?,
        newer_than_generation: 0,
    };
    let token = client.get_token(request, args.timeout).await?;
    if args.json {
        let token = as_json(account.as_str(), &token);
        output::secret_line(printable_json(&serde_json::to_string_pretty(&token)?))?;
    } else {
        output::secret_line(printable(&token.access_token))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn watch(mut client: BrokerClient, args: &GetArgs) -> anyhow::Result<ExitCode> {
    let request = WatchTokensRequest { accounts: vec![args.account.to_string()] };
    let mut stream = client.watch_tokens(request).await?;
    while let Some(message) = client.next(&mut stream).await? {
        let account = &message.account;
        match message.event {
            Some(Event::Token(token)) if args.json => {
                output::secret_line(printable_json(&as_json(account, &token).to_string()))?;
            }
            Some(Event::Token(token)) => output::secret_line(printable(&token.access_token))?,
            Some(Event::Ended(AccountEnded { reason })) => {
                let reason = Reason::try_from(reason).unwrap_or_default().as_str_name();
                let reason = reason.trim_start_matches("REASON_").to_lowercase();
                if args.json {
                    output::json_line(&json!({ "account": account, "ended": reason }))?;
                } else {
                    output::note(format_args!("{account} ended: {reason}"));
                }
            }
            None => {}
        }
    }
    bail!("the broker ended the stream")
}

fn as_json(account: &str, token: &GetTokenResponse) -> Value {
    let time = |at: Option<prost_types::Timestamp>| {
        let at = at?;
        DateTime::from_timestamp(at.seconds, u32::try_from(at.nanos).ok()?).map(LocalTime)
    };
    let seconds = |span: Option<prost_types::Duration>| {
        span.and_then(|span| Duration::try_from(span).ok()).map(|span| span.as_secs_f64())
    };
    json!({
        "account": account,
        "access_token": token.access_token,
        "expires_at": time(token.expires_at),
        "issued_at": time(token.issued_at),
        // A string, as in protobuf's JSON: many parsers round numbers beyond 2^53.
        "generation": token.generation.to_string(),
        "reuse_for_seconds": seconds(token.reuse_for),
        "expires_in_seconds": seconds(token.expires_in),
        "allowed_ip": token.allowed_ip,
        "api_base_url": token.api_base_url,
    })
}
