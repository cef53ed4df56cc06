//! The command line: one file for each group of commands. The exit code is 0 for success, 1 for a
//! failure, and 2 for wrong usage or invalid settings.

mod account;
mod agent;
mod audit;
mod bulk;
mod caller;
mod check;
mod client;
mod dev;
mod global;
mod health;
mod keys;
mod output;
mod privileges;
mod prompt;
mod serve;
mod simulate;
mod sql;
mod time;
mod token;
mod usage;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use self::{
    global::{APPLICATION_NAME, GlobalArgs},
    output::OutputClosed,
    privileges::Needs,
};
use crate::{
    api::proto,
    config::{self, Flags, InvalidSettings, MigrateFlag},
    lifecycle, telemetry,
};

/// Issues, keeps fresh and serves the RCS Biz Center tokens of many accounts over gRPC, and audits
/// every call.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "\
Settings come from flags, then the environment, then the TOML file of --config.
Exit codes: 0 done, 1 failed, 2 wrong usage or settings.

Examples:
  token-broker dev                      everything on this machine, nothing to set up
  token-broker account add acme --client-id myMemberId
  token-broker caller add billing --bearer --out billing.bearer
  token-broker caller grant billing 'acme-*'
  TOKEN=$(token-broker token get acme)"
)]
pub struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Dev(dev::DevArgs),
    Serve(serve::ServeArgs),
    /// Applies the migrations that the database lacks; publishes the keyring's intake key if there is none
    Migrate(Flags<MigrateFlag>),
    Account(account::AccountArgs),
    Caller(caller::CallerArgs),
    Token(token::TokenArgs),
    Agent(agent::AgentArgs),
    Audit(audit::AuditArgs),
    Keys(keys::KeysArgs),
    Simulate(simulate::SimulateArgs),
    Check(check::CheckArgs),
    Health(health::HealthArgs),
    /// Prints a completion script for a shell
    #[command(after_help = "\
Example:
  token-broker completions bash > /etc/bash_completion.d/token-broker")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Prints the .proto that callers compile
    #[command(after_help = "\
Example:
  token-broker proto > token_broker.proto")]
    Proto,
}

impl Command {
    /// Returns whether the command runs a service. Such a process must never wait for the reader of its
    /// standard error; for the others, that is the ordinary thing to do.
    fn serves(&self) -> bool {
        matches!(self, Self::Serve(_) | Self::Dev(_) | Self::Agent(_))
    }
}

impl Command {
    /// Returns what the command has to be allowed to do in the database; `None` if it uses none.
    fn needs(&self) -> Option<Needs> {
        match self {
            Self::Serve(_) | Self::Check(_) => Some(privileges::RUNTIME),
            Self::Migrate(_) => Some(Needs::Owner),
            Self::Account(args) => Some(args.needs()),
            Self::Caller(args) => Some(args.needs()),
            Self::Audit(args) => Some(args.needs()),
            Self::Keys(args) => Some(args.needs()),
            Self::Dev(_)
            | Self::Token(_)
            | Self::Agent(_)
            | Self::Simulate(_)
            | Self::Health(_)
            | Self::Completions { .. }
            | Self::Proto => None,
        }
    }
}

/// Parses the command line. Wrong usage ends the process with the exit code 2.
#[must_use]
pub fn parse() -> Cli {
    Cli::try_parse().unwrap_or_else(|error| usage::without_values(error).exit())
}

/// Says that the process lacks what it needs to run any command, such as threads, and returns the exit code.
#[must_use]
pub fn failed_to_start(error: &std::io::Error) -> ExitCode {
    output::note(format_args!("error: cannot start: {error}"));
    ExitCode::FAILURE
}

/// Runs the command. Prints its error, if any, on standard error, and returns the exit code.
pub async fn run(cli: Cli) -> ExitCode {
    lifecycle::protect_memory();
    // Dropped last, so that what follows, also a panic, is written before the process ends.
    let _stderr = match cli.command.serves().then(telemetry::detach_stderr).transpose() {
        Ok(stderr) => stderr,
        Err(error) => {
            output::note(format_args!("error: cannot write a log: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let Cli { global, command } = cli;
    let needs = command.needs();
    match dispatch(&global, command).await {
        Ok(code) => code,
        // The reader of the output, such as `head`, has closed it because it needs no more.
        Err(error) if error.is::<OutputClosed>() => ExitCode::SUCCESS,
        Err(error) => {
            output::note(format_args!("error: {}", chain(&error)));
            if let Some(hint) = privileges::hint(&global, needs, &error).await {
                output::note(format_args!("hint: {hint}"));
            }
            ExitCode::from(if error.is::<InvalidSettings>() { 2 } else { 1 })
        }
    }
}

/// Returns the messages of `error` and of its causes, joined. A message that is contained in those before
/// it is left out, because some errors, such as those of the database, include their cause's message.
fn chain(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |texts, cause| match cause.to_string() {
        text if texts.contains(&text) => texts,
        text if texts.is_empty() => text,
        text => format!("{texts}: {text}"),
    })
}

async fn dispatch(global: &GlobalArgs, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Dev(args) => dev::run(global, args).await,
        Command::Serve(args) => serve::run(global, args).await,
        Command::Migrate(flags) => migrate(global, flags).await,
        Command::Account(args) => account::run(global, args).await,
        Command::Caller(args) => caller::run(global, args).await,
        Command::Token(args) => token::run(global, args).await,
        Command::Agent(args) => agent::run(global, args).await,
        Command::Audit(args) => audit::run(global, args).await,
        Command::Keys(args) => keys::run(global, args).await,
        Command::Simulate(args) => simulate::run(args).await,
        Command::Check(args) => check::run(global, args).await,
        Command::Health(args) => health::run(global, args).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "token-broker", &mut script);
            output::bytes(&script)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Proto => {
            output::bytes(proto::SOURCE.as_bytes())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn migrate(global: &GlobalArgs, flags: Flags<MigrateFlag>) -> anyhow::Result<ExitCode> {
    let sources = global.sources(flags.given)?;
    let database = config::migrate_database_url(&sources)?.database(APPLICATION_NAME)?;
    database.migrate().await?;
    output::note("the schema is up to date");
    keys::publish_first(&sources, &database).await?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn serve_has_a_flag_for_each_setting_but_not_for_the_value_of_a_secret() {
        let mut command = Cli::command();
        command.build();
        let serve = command.find_subcommand("serve").unwrap();
        let flags: Vec<_> = serve.get_arguments().filter_map(|arg| arg.get_long()).collect();
        for setting in config::table::DATABASE.iter().chain(config::table::BROKER) {
            assert!(flags.contains(&setting.flag().as_str()), "{}", setting.key);
        }
        assert!(!flags.contains(&"database-url") && !flags.contains(&"upstream-proxy"));
        let help = command.find_subcommand_mut("serve").unwrap().render_long_help().to_string();
        assert!(help.contains("[env: TOKEN_BROKER_LISTEN] [default: 127.0.0.1:50051]"), "{help}");
    }

    #[test]
    fn no_argument_that_is_a_path_takes_or_quotes_content() {
        fn check(command: &clap::Command, path: &[&str], checked: &mut Vec<String>) {
            let is_path = |arg: &&clap::Arg| {
                arg.get_value_parser().type_id() == std::any::TypeId::of::<std::path::PathBuf>()
            };
            for arg in command.get_arguments().filter(is_path) {
                let flag = arg.get_long().map(|flag| format!("--{flag}"));
                let name = format!("{path:?} {}", arg.get_id());
                for content in [
                    "-----BEGIN PRIVATE KEY-----\ncanary",
                    "key = \"canary\"\nother = 1",
                    "postgresql://u:canary@h/d",
                    "{\"canary\": 1}",
                    &"canary ".repeat(1_500),
                ] {
                    // `--` keeps PEM from being taken for a flag, as a user would have to do.
                    let given = match &flag {
                        Some(flag) => vec![format!("{flag}={content}")],
                        None => vec!["--".into(), content.into()],
                    };
                    let line = path.iter().map(ToString::to_string).chain(given);
                    let error = Cli::command().try_get_matches_from(line).unwrap_err();
                    let printed = usage::without_values(error).render().to_string();
                    let is_named = printed.contains("looks like the content");
                    assert!(is_named && !printed.contains("canary"), "{name}: {printed}");
                }
                checked.push(name);
            }
            for command in command.get_subcommands() {
                check(command, &[path, &[command.get_name()]].concat(), checked);
            }
        }
        let mut checked = Vec::new();
        check(&Cli::command(), &["token-broker"], &mut checked);
        // config, secret-file of three commands, out of five, file and report of two, journal, export and keys of verify,
        // ship, state-dir, accounts-file.
        assert_eq!(checked.len(), 19, "{checked:?}");
    }

    #[test]
    fn documented_command_lines_are_accepted_and_malformed_ones_are_refused() {
        let accepted = |line: &str| Cli::try_parse_from(line.split(' ')).is_ok();
        for line in [
            "token-broker serve --migrate --plaintext --listen 0.0.0.0:50051 --new-token-ends-older false",
            "token-broker account add acme --client-id id --wait --reason T-1 --config /c",
            "token-broker account rotate acme --purge-old",
            "token-broker account reissue acme-* --state rejected",
            "token-broker account list --json",
            "token-broker account history acme --since 7d --json",
            "token-broker account import accounts.csv --update --dry-run --reason T-1",
            "token-broker account import - --format jsonl --skip-bad --report faults.csv",
            "token-broker account export --out accounts.jsonl --replace",
            "token-broker account import accounts.csv --update --prune --yes",
            "token-broker caller add billing --bearer --dns billing.example.com --rate-limit 10",
            "token-broker caller add billing --bearer --out billing.bearer",
            "token-broker caller bearer add billing --out next.bearer",
            "token-broker caller grant billing acme-* demo --rights get,list --until 90d",
            "token-broker caller bearer add billing --expires 2027-01-01T00:00:00+09:00",
            "token-broker caller bearer revoke 3",
            "token-broker caller review --unused 30d --ending 1w --json",
            "token-broker caller identity add billing --dns b.example.com --spiffe-id spiffe://a/b",
            "token-broker caller identity revoke 3",
            "token-broker caller import callers.csv --update --prune --yes",
            "token-broker caller export --format jsonl",
            "token-broker token get acme --min-ttl 60s --json",
            "token-broker token get acme-* --watch",
            "token-broker agent --accounts acme,shop-* --token-dir /run/tokens -- systemctl reload shop",
            "token-broker agent --once --timeout 1m",
            "token-broker audit tail -n 5 --follow --account acme --since 1h",
            "token-broker keys generate --out /keyring",
            "token-broker keys add --kind fingerprint --keyring-file /keyring",
            "token-broker keys promote s1 --force",
            "token-broker keys reseal --reason T-1",
            "token-broker keys retire s1",
            "token-broker dev --state-dir /d --token-life 60s",
            "token-broker simulate --token-life 60s --allow 127.0.0.1 --error-rate 0.1",
            "token-broker check --upstream staging --json",
            "token-broker check --issue acme --timeout 5s",
            "token-broker completions zsh",
        ] {
            assert!(accepted(line), "{line}");
        }
        for line in [
            "token-broker",
            "token-broker account add Acme --client-id id",
            "token-broker account add acme --client-id 123456789012345678901",
            "token-broker account add acme --client-id id --client-secret SK.x",
            "token-broker account reissue",
            "token-broker account import",
            "token-broker account import accounts.csv --skip-bad",
            "token-broker account import accounts.csv --format xlsx",
            "token-broker account import accounts.csv --prune --yes",
            "token-broker account export --replace",
            "token-broker caller grant billing",
            "token-broker caller add billing --out billing.bearer",
            "token-broker caller grant billing acme --rights write",
            "token-broker caller limit billing",
            "token-broker caller review --unused 0s",
            "token-broker caller identity add billing",
            "token-broker caller import callers.csv --prune --yes",
            "token-broker caller import callers.csv --update --yes",
            "token-broker caller import callers.csv --update --prune --skip-bad --report faults.csv",
            "token-broker token get acme --bearer tbk_x",
            "token-broker agent acme",
            "token-broker agent --timeout 1m",
            "token-broker agent --once -- true",
            "token-broker keys add",
            "token-broker keys add --kind bearer",
            "token-broker keys promote S1",
            "token-broker keys retire",
            "token-broker simulate --error-rate 2",
            "token-broker simulate --token-life 0s",
            "token-broker dev --token-life 0s",
            "token-broker check --issue acme-*",
            "token-broker check --timeout 5s",
        ] {
            assert!(!accepted(line), "{line}");
        }
    }
}
