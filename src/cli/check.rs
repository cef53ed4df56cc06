//! The command `check`: checks an installation before or while it runs.

mod installation;
mod result;
mod upstream;

use std::{process::ExitCode, time::Duration};

use clap::Args;

use self::result::{CheckResult, Severity};
use super::{global::GlobalArgs, output};
use crate::{
    config::{BrokerFlags, Flags, Settings},
    domain::account::AccountName,
};

/// Checks settings, database, keyring, rates and the connection to the upstream; requests no token from
/// the upstream, except with --issue
#[derive(Args, Debug)]
#[command(after_help = "\
Takes the settings that `serve` takes. Exit code 1 if anything fails.

Examples:
  token-broker check
  token-broker check --issue acme    # tests all of it, and may end acme's present token")]
pub(super) struct CheckArgs {
    /// Make the running brokers issue a new token for this account, and wait for it
    #[arg(long, value_name = "ACCOUNT")]
    issue: Option<AccountName>,
    /// The longest time to wait for that token
    #[arg(long, value_name = "DURATION", default_value = "60s",
          value_parser = humantime::parse_duration, requires = "issue")]
    timeout: Duration,
    /// Print JSON, once all checks are done
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Flags<BrokerFlags>,
}

/// Prints each result when it is added, or with `--json` all of them at the end.
struct Printer {
    json: bool,
    results: Vec<CheckResult>,
}

impl Printer {
    fn add(&mut self, result: CheckResult) -> anyhow::Result<()> {
        let printed = if self.json { Ok(()) } else { result.print() };
        self.results.push(result);
        printed
    }

    /// Prints the results if `--json` was given. Returns the exit code, which is a failure if any check
    /// failed.
    fn finish(self) -> anyhow::Result<ExitCode> {
        if self.json {
            output::json(&self.results)?;
        }
        let failed = self.results.iter().any(|result| result.severity == Severity::Failure);
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

pub(super) async fn run(global: &GlobalArgs, args: CheckArgs) -> anyhow::Result<ExitCode> {
    let mut printer = Printer { json: args.json, results: vec![] };
    let settings = match global.sources(args.settings.given).and_then(|it| Settings::resolve(&it)) {
        Ok((settings, warnings)) => {
            for warning in warnings {
                printer.add(CheckResult::warning("settings", warning))?;
            }
            printer.add(CheckResult::ok("settings", "complete"))?;
            settings
        }
        Err(invalid) => {
            for line in invalid.0 {
                printer.add(CheckResult::failure("settings", line))?;
            }
            return printer.finish();
        }
    };
    let (result, keyring) = installation::keyring(&settings);
    printer.add(result)?;
    printer.add(installation::tls(&settings))?;
    for result in installation::database(&settings, keyring.as_ref()).await {
        printer.add(result)?;
    }
    for result in upstream::connection(&settings).await {
        printer.add(result)?;
    }
    if let Some(account) = &args.issue {
        printer.add(upstream::issue(global, &settings, account, args.timeout).await)?;
    }
    printer.finish()
}
