//! `--wait`: what becomes of a change.

use std::{iter, process::ExitCode, time::Duration};

use anyhow::bail;
use clap::Args;

use super::super::{
    output::{self, printable},
    time::LocalTime,
};
use crate::{
    domain::{
        account::AccountName,
        clock::{Clock, Timestamp, delta},
    },
    store::admin::{Admin, Outcome},
};

/// How often the database is asked.
const PAUSE: Duration = Duration::from_millis(300);

#[derive(Args, Debug)]
pub(super) struct WaitArgs {
    /// Waits for the outcome and shows it; exit code 1 if it is a failure
    #[arg(long)]
    wait: bool,
    /// How long to wait at most
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration, requires = "wait")]
    timeout: Duration,
}

impl WaitArgs {
    /// Waits, if told to, until it is known what became of each account.
    pub(super) async fn until_known(
        &self,
        admin: &Admin,
        names: &[String],
    ) -> anyhow::Result<ExitCode> {
        if !self.wait {
            return Ok(ExitCode::SUCCESS);
        }
        let mut all_issued = true;
        let end = Clock::System.now() + delta(self.timeout);
        for name in names {
            let (issued, outcome) = outcome_by(end, admin, &name.parse()?).await?;
            let Some(issued) = issued else {
                bail!("nothing became of it in time: {}", describe(&outcome));
            };
            all_issued &= issued;
            output::line(describe(&outcome))?;
        }
        Ok(if all_issued { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Waits until it is known what became of the account, but not beyond `end`. With the outcome, whether
/// a token was issued; `None` if that is open still.
pub(in crate::cli) async fn outcome_by(
    end: Timestamp,
    admin: &Admin,
    name: &AccountName,
) -> anyhow::Result<(Option<bool>, Outcome)> {
    loop {
        let outcome = admin.outcome(name).await?;
        let issued = verdict(&outcome);
        if issued.is_some() || Clock::System.now() >= end {
            return Ok((issued, outcome));
        }
        Clock::System.sleep(PAUSE).await;
    }
}

/// Whether a token was issued; `None` while that is open.
fn verdict(outcome: &Outcome) -> Option<bool> {
    if outcome.issued {
        return Some(true);
    }
    (outcome.failed || outcome.status.state == "disabled").then_some(false)
}

/// What became of it: a line, and another one with what to do if something is to be done.
pub(in crate::cli) fn describe(outcome: &Outcome) -> String {
    let status = &outcome.status;
    let state = format!("{}: {}", status.name, status.state);
    if let (true, Some(end)) = (outcome.issued, status.expires_at) {
        return format!("{state}, token until {}", LocalTime(end));
    }
    let error = status.last_error.iter().map(|error| format!(": {}", printable(error)));
    let hint = (!status.hint.is_empty()).then(|| format!("\nhint: {}", status.hint));
    iter::once(state).chain(error).chain(hint).collect()
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::store::admin::AccountSummary;

    fn outcome(state: &str, issued: bool, failed: bool) -> Outcome {
        let status = AccountSummary {
            name: "acme".into(),
            client_id: "id".into(),
            state: state.into(),
            expires_at: Some(DateTime::UNIX_EPOCH),
            time_left_seconds: None,
            last_issued_at: None,
            allowed_ip: None,
            generation: None,
            consecutive_failures: 0,
            last_error: Some("61006 Invalid\nsecret".into()),
            next_attempt_at: None,
            last_requested_at: None,
            hint: "set the API KEY".into(),
        };
        Outcome { issued, failed, status }
    }

    #[test]
    fn an_outcome_is_open_until_a_token_or_a_failure() {
        assert_eq!(verdict(&outcome("pending", false, false)), None);
        assert_eq!(verdict(&outcome("fresh", true, false)), Some(true));
        assert_eq!(verdict(&outcome("rejected", false, true)), Some(false));
        assert_eq!(verdict(&outcome("disabled", false, false)), Some(false));
    }

    #[test]
    fn a_failure_is_told_with_what_to_do() {
        let told = describe(&outcome("rejected", false, true));
        assert_eq!(told, "acme: rejected: 61006 Invalid\\u{a}secret\nhint: set the API KEY");
        assert!(describe(&outcome("fresh", true, false)).starts_with("acme: fresh, token until"));
    }
}
