//! The flag `--wait`: waits for the outcome of a change.

use std::{iter, process::ExitCode, time::Duration};

use anyhow::bail;
use clap::Args;

use super::super::{output, time::LocalTime};
use crate::{
    domain::{
        account::AccountName,
        clock::{Clock, Timestamp, delta},
        printable::printable,
    },
    store::admin::{Admin, Outcome},
};

/// The pause between two queries for the outcome.
const POLL_INTERVAL: Duration = Duration::from_millis(300);

#[derive(Args, Debug)]
pub(super) struct WaitArgs {
    /// Wait for the outcome and print it; exit code 1 if it is a failure
    #[arg(long)]
    wait: bool,
    /// The longest time to wait
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration, requires = "wait")]
    timeout: Duration,
}

impl WaitArgs {
    /// Whether the user asked to wait.
    pub(super) fn is_requested(&self) -> bool {
        self.wait
    }

    /// With `--wait`, waits for the outcome of each account and prints it.
    ///
    /// # Errors
    /// When an outcome is not known in time.
    pub(super) async fn print_outcomes(
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
                bail!(
                    "no outcome in time: {}; {}",
                    describe(&outcome).replace('\n', "; "),
                    reasons(&outcome)
                );
            };
            all_issued &= issued;
            output::lines(describe(&outcome))?;
        }
        Ok(if all_issued { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Waits for the outcome of the account's change, but not beyond `end`. Also returns whether a token was
/// issued, or `None` if that is not known yet.
pub(in crate::cli) async fn outcome_by(
    end: Timestamp,
    admin: &Admin,
    name: &AccountName,
) -> anyhow::Result<(Option<bool>, Outcome)> {
    loop {
        let outcome = admin.outcome(name).await?;
        let issued = is_issued(&outcome);
        if issued.is_some() || Clock::System.now() >= end {
            return Ok((issued, outcome));
        }
        Clock::System.sleep(POLL_INTERVAL).await;
    }
}

/// Returns whether a token was issued, or `None` while that is not known.
fn is_issued(outcome: &Outcome) -> Option<bool> {
    if outcome.issued {
        return Some(true);
    }
    (outcome.failed || matches!(&*outcome.status.state, "disabled" | "unusable")).then_some(false)
}

/// Describes the outcome in one line, followed by a line with a hint if something must be done.
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

/// Returns why there may be no outcome yet, though nothing failed.
pub(in crate::cli) fn reasons(outcome: &Outcome) -> String {
    let held_back = outcome.status.last_issued_at.map(|at| {
        format!(
            ", or the minimum issue interval since the last token, of {}, is not over",
            LocalTime(at)
        )
    });
    format!("no broker is running{}", held_back.unwrap_or_default())
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
        Outcome { issued, failed, credential_version: 1, status }
    }

    #[test]
    fn an_outcome_is_unknown_until_there_is_a_token_or_a_failure() {
        assert_eq!(is_issued(&outcome("pending", false, false)), None);
        assert_eq!(is_issued(&outcome("fresh", true, false)), Some(true));
        assert_eq!(is_issued(&outcome("rejected", false, true)), Some(false));
        assert_eq!(is_issued(&outcome("disabled", false, false)), Some(false));
    }

    #[test]
    fn a_failure_is_described_with_its_hint() {
        let text = describe(&outcome("rejected", false, true));
        assert_eq!(text, "acme: rejected: 61006 Invalid\\u{a}secret\nhint: set the API KEY");
        assert!(describe(&outcome("fresh", true, false)).starts_with("acme: fresh, token until"));
    }

    #[test]
    fn the_minimum_issue_interval_is_named_where_it_may_be_the_reason() {
        let mut waiting = outcome("fresh", false, false);
        assert_eq!(reasons(&waiting), "no broker is running");
        waiting.status.last_issued_at = Some(DateTime::UNIX_EPOCH);
        assert!(reasons(&waiting).contains("or the minimum issue interval since the last token"));
    }
}
