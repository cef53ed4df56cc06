//! Logs and metrics.
//!
//! **Never logged**: client secrets, tokens, bearers, keys, bodies of the upstream, values of headers,
//! parameters of SQL statements, URLs with a password. Their types cannot be printed, and the crates that
//! see them on the wire log nothing below `info`, unless `RUST_LOG` names a module of theirs. Even such a
//! filter shows no secret; `tests/it/processes/canaries.rs` checks that.

mod gauges;
mod latency;
mod metrics;

use std::{
    env,
    io::{self, IsTerminal},
};

use thiserror::Error;
use tracing_subscriber::{
    EnvFilter, Layer, filter::ParseError, layer::SubscriberExt, util::SubscriberInitExt,
};

pub use self::{
    gauges::{AccountGauges, Gauges, JournalGauges},
    metrics::{GRPC_CODE_NAMES, IssueResult, METRICS_CONTENT_TYPE, Method, Metrics},
};

/// The filter if `RUST_LOG` is not set. At `info`, sqlx would log each notice of the server.
const DEFAULT_FILTER: &str = "info,sqlx=warn";
/// Directives that replace any for a whole crate in `RUST_LOG`: below `info`, these crates log headers,
/// which may hold bearers and tokens.
const WIRE_CRATES: [&str; 5] =
    ["h2=info", "hyper=info", "hyper_util=info", "reqwest=info", "tonic=info"];

/// The format of log lines.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LogFormat {
    /// Text for people.
    Pretty,
    /// One JSON object on each line.
    Json,
}

/// Why logging cannot be set up.
#[derive(Debug, Error)]
pub enum LogsError {
    /// `RUST_LOG` is not a list of directives.
    #[error("RUST_LOG is malformed: {0}")]
    Filter(#[from] ParseError),
    /// This process has set up logging already.
    #[error("logging is set up already")]
    SetUp,
}

/// Begins to log to standard error, filtered by `RUST_LOG`. Without a given format, lines are pretty on a
/// terminal and JSON elsewhere.
///
/// # Errors
/// [`LogsError`] if `RUST_LOG` is malformed, or logging is set up already.
pub fn init_logs(format: Option<LogFormat>) -> Result<(), LogsError> {
    let filter = filter(env::var("RUST_LOG").ok().as_deref())?;
    let on_terminal = io::stderr().is_terminal();
    let format = format.unwrap_or(if on_terminal { LogFormat::Pretty } else { LogFormat::Json });
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines = match format {
        LogFormat::Pretty => lines.with_ansi(on_terminal).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).try_init().map_err(|_| LogsError::SetUp)
}

/// Returns the filter of `directives`, or of the default if there are none, restricted by
/// [`WIRE_CRATES`].
fn filter(directives: Option<&str>) -> Result<EnvFilter, ParseError> {
    let directives = directives.filter(|given| !given.is_empty()).unwrap_or(DEFAULT_FILTER);
    WIRE_CRATES.iter().try_fold(EnvFilter::builder().parse(directives)?, |filter, directive| {
        Ok(filter.add_directive(directive.parse()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_names_whole_crates_leaves_the_wire_crates_at_info() {
        for asked in ["trace", "h2=trace,hyper=debug", "debug"] {
            let filter = filter(Some(asked)).unwrap().to_string();
            assert!(filter.contains("h2=info") && filter.contains("hyper=info"), "{filter}");
            assert!(!filter.contains("h2=trace") && !filter.contains("hyper=debug"), "{filter}");
        }
    }

    #[test]
    fn without_rust_log_the_default_filter_applies() {
        for unset in [None, Some("")] {
            assert!(filter(unset).unwrap().to_string().contains("sqlx=warn"));
        }
    }

    #[test]
    fn a_malformed_filter_is_refused() {
        assert!(filter(Some("token_broker=loud")).is_err());
    }
}
