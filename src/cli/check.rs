//! `check`: a doctor.

mod examine;
mod upstream;

use std::{process::ExitCode, time::Duration};

use clap::Args;
use serde::Serialize;

use super::{Global, output};
use crate::{
    config::{Broker, Flags, Settings},
    domain::account::AccountName,
};

/// Examines settings, database, keyring, rates and the way to the upstream; never logs in there,
/// unless --issue asks for it
#[derive(Args, Debug)]
#[command(after_help = "\
Takes the settings that `serve` takes. Exit code 1 if anything fails.

Examples:
  token-broker check
  token-broker check --issue acme    # proves the whole way, at the cost of acme's present token")]
pub(super) struct CheckArgs {
    /// Has the brokers that run issue a new token of this account, and waits for it
    #[arg(long, value_name = "ACCOUNT")]
    issue: Option<AccountName>,
    /// How long to wait for that token at most
    #[arg(long, value_name = "DURATION", default_value = "60s",
          value_parser = humantime::parse_duration, requires = "issue")]
    timeout: Duration,
    /// Prints JSON, once all is known
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Flags<Broker>,
}

/// What came of one examination.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
enum Verdict {
    #[serde(rename = "ok")]
    Good,
    #[serde(rename = "warn")]
    Doubtful,
    #[serde(rename = "fail")]
    Bad,
}

/// One line of the doctor's.
#[derive(Debug, Serialize)]
struct Finding {
    subject: &'static str,
    verdict: Verdict,
    text: String,
}

impl Finding {
    fn good(subject: &'static str, text: impl Into<String>) -> Self {
        Self { subject, verdict: Verdict::Good, text: text.into() }
    }

    fn doubtful(subject: &'static str, text: impl Into<String>) -> Self {
        Self { subject, verdict: Verdict::Doubtful, text: text.into() }
    }

    fn bad(subject: &'static str, text: impl Into<String>) -> Self {
        Self { subject, verdict: Verdict::Bad, text: text.into() }
    }
}

/// Prints findings as they come, or keeps them for the end.
struct Doctor {
    json: bool,
    findings: Vec<Finding>,
}

impl Doctor {
    fn tell(&mut self, finding: Finding) -> anyhow::Result<()> {
        let printed = if self.json { Ok(()) } else { print(&finding) };
        self.findings.push(finding);
        printed
    }

    fn conclude(self) -> anyhow::Result<ExitCode> {
        if self.json {
            output::json(&self.findings)?;
        }
        let failed = self.findings.iter().any(|finding| finding.verdict == Verdict::Bad);
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

fn print(finding: &Finding) -> anyhow::Result<()> {
    let verdict = match finding.verdict {
        Verdict::Good => "ok",
        Verdict::Doubtful => "warn",
        Verdict::Bad => "FAIL",
    };
    output::line(format_args!(
        "{verdict:<4}  {:<10}  {}",
        finding.subject,
        output::printable(&finding.text)
    ))
}

pub(super) async fn run(global: &Global, args: CheckArgs) -> anyhow::Result<ExitCode> {
    let mut doctor = Doctor { json: args.json, findings: vec![] };
    let settings = match global.sources(args.settings.given).and_then(|it| Settings::resolve(&it)) {
        Ok((settings, warnings)) => {
            for warning in warnings {
                doctor.tell(Finding::doubtful("settings", warning))?;
            }
            doctor.tell(Finding::good("settings", "complete"))?;
            settings
        }
        Err(report) => {
            for line in report.0 {
                doctor.tell(Finding::bad("settings", line))?;
            }
            return doctor.conclude();
        }
    };
    let (finding, keyring) = examine::keyring(&settings);
    doctor.tell(finding)?;
    doctor.tell(examine::tls(&settings))?;
    for finding in examine::database(&settings, keyring.as_ref()).await {
        doctor.tell(finding)?;
    }
    for finding in upstream::way(&settings).await {
        doctor.tell(finding)?;
    }
    if let Some(account) = &args.issue {
        doctor.tell(upstream::trial(global, account, args.timeout).await)?;
    }
    doctor.conclude()
}
