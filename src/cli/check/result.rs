//! The result of one check, as `check` prints it.

use serde::Serialize;

use super::super::output;

/// How serious a result is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub(super) enum Severity {
    #[serde(rename = "ok")]
    Ok,
    #[serde(rename = "warn")]
    Warning,
    #[serde(rename = "fail")]
    Failure,
}

/// The result of one check: one line of the output.
#[derive(Debug, Serialize)]
pub(super) struct CheckResult {
    pub(super) subject: &'static str,
    #[serde(rename = "verdict")]
    pub(super) severity: Severity,
    pub(super) text: String,
}

impl CheckResult {
    pub(super) fn ok(subject: &'static str, text: impl Into<String>) -> Self {
        Self { subject, severity: Severity::Ok, text: text.into() }
    }

    pub(super) fn warning(subject: &'static str, text: impl Into<String>) -> Self {
        Self { subject, severity: Severity::Warning, text: text.into() }
    }

    pub(super) fn failure(subject: &'static str, text: impl Into<String>) -> Self {
        Self { subject, severity: Severity::Failure, text: text.into() }
    }

    /// Prints the result as one line.
    pub(super) fn print(&self) -> anyhow::Result<()> {
        let severity = match self.severity {
            Severity::Ok => "ok",
            Severity::Warning => "warn",
            Severity::Failure => "FAIL",
        };
        output::line(format_args!("{severity:<4}  {:<10}  {}", self.subject, self.text))
    }
}
