//! `check`: a doctor.

mod examine;

use std::process::ExitCode;

use clap::Args;

use super::{Global, output};
use crate::config::{Broker, Flags, Settings};

/// Examines settings, database, keyring, rates and the way to the upstream; never logs in there
#[derive(Args, Debug)]
#[command(after_help = "\
Takes the settings that `serve` takes. Exit code 1 if anything fails.")]
pub(super) struct CheckArgs {
    #[command(flatten)]
    settings: Flags<Broker>,
}

/// What came of one examination.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Good,
    Doubtful,
    Bad,
}

/// One line of the doctor's.
#[derive(Debug)]
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

/// Prints findings as they come.
#[derive(Default)]
struct Doctor {
    failed: bool,
}

impl Doctor {
    fn tell(&mut self, finding: &Finding) -> anyhow::Result<()> {
        let verdict = match finding.verdict {
            Verdict::Good => "ok",
            Verdict::Doubtful => "warn",
            Verdict::Bad => {
                self.failed = true;
                "FAIL"
            }
        };
        output::line(format_args!(
            "{verdict:<4}  {:<10}  {}",
            finding.subject,
            output::printable(&finding.text)
        ))
    }
}

pub(super) async fn run(global: &Global, args: CheckArgs) -> anyhow::Result<ExitCode> {
    let mut doctor = Doctor::default();
    let settings = match global.sources(args.settings.given).and_then(|it| Settings::resolve(&it)) {
        Ok((settings, warnings)) => {
            for warning in warnings {
                doctor.tell(&Finding::doubtful("settings", warning))?;
            }
            doctor.tell(&Finding::good("settings", "complete"))?;
            settings
        }
        Err(report) => {
            for line in report.0 {
                doctor.tell(&Finding::bad("settings", line))?;
            }
            return Ok(ExitCode::FAILURE);
        }
    };
    let (finding, keyring) = examine::keyring(&settings);
    doctor.tell(&finding)?;
    for finding in examine::database(&settings, keyring.as_ref()).await {
        doctor.tell(&finding)?;
    }
    doctor.tell(&examine::way_to_upstream(&settings).await)?;
    Ok(if doctor.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
