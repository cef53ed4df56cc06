//! The failures of an attempt to issue a token.

use std::time::Duration;

use thiserror::Error;

use crate::domain::refresh_state::FailureClass;

/// Why an attempt to issue a token failed.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("{message}")]
pub struct IssueError {
    /// What the failure means for the account.
    pub class: FailureClass,
    /// The upstream's error code: 1 to 16 ASCII letters and digits.
    pub code: Option<String>,
    /// What happened, in the broker's own words. It never quotes the upstream.
    pub message: String,
    /// How long the upstream asks to wait before the next call: a second to an hour.
    pub retry_after: Option<Duration>,
    /// Whether the upstream may have issued a token whose answer was lost. Such a token may have ended
    /// the one before it. False only where it is certain that no token was issued.
    pub may_have_issued: bool,
}

impl IssueError {
    /// Returns the error of a request that may have arrived and was not answered.
    pub(super) fn unanswered(message: impl Into<String>) -> Self {
        Self {
            class: FailureClass::Unreachable,
            code: None,
            message: message.into(),
            retry_after: None,
            may_have_issued: true,
        }
    }

    /// Returns the error of a request that was not sent.
    pub(super) fn unsent(message: impl Into<String>) -> Self {
        Self { may_have_issued: false, ..Self::unanswered(message) }
    }

    /// Returns the error of an answer that is neither a token nor a known error. A token may have been
    /// issued with it.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self { class: FailureClass::Malformed, ..Self::unanswered(message) }
    }
}
