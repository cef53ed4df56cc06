//! The replacement of a token that the API refused, for the adapters.

use std::time::Duration;

use tokio::{
    sync::OnceCell,
    time::{Instant, sleep_until},
};
use tracing::warn;

use crate::{
    client::{ReportOutcome, TokenClient},
    time::later,
    token::Token,
};

/// The shortest pause before a report that came too soon is made again, whatever the broker says.
const SHORTEST_REPORT_PAUSE: Duration = Duration::from_millis(100);
/// How long callers share a report of the same generation after it was answered.
const REPORT_MEMORY: Duration = Duration::from_secs(5);

/// A report that the API refused a token.
#[derive(Debug)]
pub(crate) struct Report {
    generation: u64,
    /// What the broker answered, and when; `None` after an error.
    outcome: OnceCell<(Option<ReportOutcome>, Instant)>,
}

impl Report {
    pub(crate) fn new(generation: u64) -> Self {
        Self { generation, outcome: OnceCell::new() }
    }

    /// Whether a caller that holds a token of `generation` needs no report of its own.
    pub(crate) fn is_shared(&self, generation: u64, now: Instant) -> bool {
        let is_fresh = match self.outcome.get() {
            None => true,
            Some((None, _)) => false,
            Some((Some(ReportOutcome::TooSoon { retry_after }), at)) => {
                now < later(*at, *retry_after)
            }
            Some((Some(_), at)) => now < *at + REPORT_MEMORY,
        };
        self.generation == generation && is_fresh
    }
}

impl TokenClient {
    /// Returns a token to use instead of the one of generation `refused`, which the API refused with
    /// `upstream_code`, after a report. `None` if there is none before `deadline`.
    pub(crate) async fn replace_refused(
        &self,
        account: &str,
        refused: u64,
        upstream_code: &str,
        deadline: Instant,
    ) -> Option<Token> {
        let shared = &self.shared;
        loop {
            if let Some(token) = shared.accounts.usable(account, refused) {
                return Some(token);
            }
            let report = shared.accounts.report_of(account, refused);
            let timeout = deadline.saturating_duration_since(Instant::now());
            // If the caller that reports gives up, the next one of those that wait reports.
            let reported = report.outcome.get_or_init(async || {
                let outcome = self.report_within(account, refused, upstream_code, timeout).await;
                if let Err(error) = &outcome {
                    warn!(account, generation = refused, %error, "a refused token could not be reported");
                }
                (outcome.ok(), Instant::now())
            });
            match *reported.await {
                (Some(ReportOutcome::Reissuing | ReportOutcome::AlreadyReplaced), _) => break,
                // The broker does not keep such a report, so it is made again.
                (Some(ReportOutcome::TooSoon { retry_after }), at) => {
                    let until = later(at, retry_after.max(SHORTEST_REPORT_PAUSE));
                    if until >= deadline {
                        return None;
                    }
                    shared.unless_closed(account, sleep_until(until)).await.ok()?;
                }
                (Some(ReportOutcome::NotATokenFault) | None, _) => return None,
            }
        }
        let token = shared.token(account, refused, deadline).await;
        token.inspect_err(|error| warn!(account, %error, "a refused token was not replaced")).ok()
    }
}
