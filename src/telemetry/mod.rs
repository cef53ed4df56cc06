//! Logs and metrics.
//!
//! **Never logged**: client secrets, tokens, bearers, keys, bodies of the upstream, values of headers,
//! parameters of SQL statements, URLs with a password. Their types cannot be printed, and the crates that
//! see them on the wire log nothing below `info`, unless `RUST_LOG` names a module of theirs. Even such a
//! filter shows no secret; `tests/it/processes/canaries.rs` checks that.
//!
//! **Never waited for**: whoever reads the log. See [`detach_stderr`].

mod gauges;
mod latency;
mod log_writer;
mod metrics;
mod printable_lines;

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    env,
    fmt::Display,
    fs::File,
    io::{self, IsTerminal, Write},
    os::fd::AsFd,
    panic::{self, PanicHookInfo},
    sync::OnceLock,
    thread,
};

use thiserror::Error;
use tracing::{Level, Metadata, error};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{ParseError, filter_fn},
    fmt::writer::BoxMakeWriter,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use self::{log_writer::LogWriter, printable_lines::PrintableLines};
use crate::domain::clock::{Clock, Timestamp};

pub use self::{
    gauges::{AccountGauges, Gauges, JournalGauges},
    metrics::{GRPC_CODE_NAMES, IssueResult, METRICS_CONTENT_TYPE, Method, Metrics},
    printable_lines::LogFormat,
};

/// The filter if `RUST_LOG` is not set. At `info`, sqlx would log each notice of the server.
const DEFAULT_FILTER: &str = "info,sqlx=warn";
/// Directives that replace any for a whole crate in `RUST_LOG`: below `info`, these crates log headers,
/// which may hold bearers and tokens.
const WIRE_CRATES: [&str; 5] =
    ["h2=info", "hyper=info", "hyper_util=info", "reqwest=info", "tonic=info"];

/// The writer to standard error after [`detach_stderr`].
static DETACHED: OnceLock<LogWriter> = OnceLock::new();
/// The format that [`init_logs`] has chosen.
static FORMAT: OnceLock<LogFormat> = OnceLock::new();

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
    let writer = match DETACHED.get() {
        Some(writer) => BoxMakeWriter::new(writer.clone()),
        None => BoxMakeWriter::new(io::stderr),
    };
    let _ = FORMAT.set(format);
    let writer = PrintableLines { inner: writer, format };
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines = match format {
        LogFormat::Pretty => lines.with_ansi(on_terminal).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).boxed(),
    };
    let lines = lines.with_filter(filter_fn(|event| !quotes_password(event)));
    tracing_subscriber::registry().with(filter).with(lines).try_init().map_err(|_| LogsError::SetUp)
}

/// From now on, nothing in this process waits until standard error takes a line: neither the log, nor
/// [`stderr_line`], nor the message of a panic. Lines that standard error does not take in time are dropped,
/// counted by [`dropped_log_lines`], and reported in the log once it flows again. For processes that serve:
/// a log that nobody reads must stop nothing.
///
/// Dropping the returned guard at the end of the process waits until the last lines are written, 5 s at
/// most, and 1 s if they are not taken at all.
///
/// # Errors
/// When the system refuses a descriptor or a thread.
pub fn detach_stderr() -> io::Result<DetachedStderr> {
    // A descriptor of its own: the lock of `io::stderr()` is held during a write that does not end.
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let writer = LogWriter::start(stderr, dropped_report)?;
    let writer = DETACHED.get_or_init(|| writer).clone();
    panic::set_hook(Box::new(log_panic));
    Ok(DetachedStderr(writer))
}

/// Ensures that the last lines are written. See [`detach_stderr`].
#[derive(Debug)]
#[must_use = "dropping it at the end of the process writes the last lines"]
pub struct DetachedStderr(LogWriter);

impl Drop for DetachedStderr {
    fn drop(&mut self) {
        self.0.flush();
    }
}

/// Writes a line for people to standard error. Errors are ignored, because there is no other place to
/// report them. Blocks until the line is taken, unless standard error is [detached](detach_stderr).
pub fn stderr_line(text: impl Display) {
    match DETACHED.get() {
        Some(writer) => writer.line(format!("{text}\n").as_bytes()),
        None => {
            let _ = writeln!(io::stderr().lock(), "{text}");
        }
    }
}

/// Returns how many lines of the log were dropped since the start of the process.
#[must_use]
pub fn dropped_log_lines() -> u64 {
    DETACHED.get().map_or(0, LogWriter::dropped)
}

/// Logs a panic. The standard hook would write to standard error itself, and wait for its reader.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then_some(backtrace);
    let message = panic.payload_as_str().unwrap_or("without a message");
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    let thread = thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    if tracing::enabled!(Level::ERROR) {
        let backtrace = backtrace.map(|backtrace| backtrace.to_string());
        error!(panic = message, location, thread, backtrace, "a thread panicked");
    } else {
        stderr_line(format_args!("thread '{thread}' panicked at {location}: {message}"));
    }
}

/// Returns the log line that stands for `lines` dropped ones. It does not depend on `RUST_LOG`.
fn dropped_report(lines: u64) -> String {
    report_line(lines, Clock::System.wall(), FORMAT.get().copied().unwrap_or(LogFormat::Pretty))
}

fn report_line(lines: u64, now: Timestamp, format: LogFormat) -> String {
    let now = now.format("%Y-%m-%dT%H:%M:%S%.6fZ");
    let target = module_path!();
    let message = format!("{lines} log lines were dropped: nobody read the log, or it was full");
    match format {
        LogFormat::Pretty => format!("{now}  WARN {target}: {message} dropped={lines}\n"),
        LogFormat::Json => format!(
            "{{\"timestamp\":\"{now}\",\"level\":\"WARN\",\"message\":\"{message}\",\
             \"dropped\":{lines},\"target\":\"{target}\"}}\n"
        ),
    }
}

/// Whether an event of the driver quotes a line of the password file of libpq. The broker says by itself which line
/// is malformed.
fn quotes_password(event: &Metadata<'_>) -> bool {
    event.target().starts_with("sqlx_postgres::options") && event.fields().field("line").is_some()
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
    fn the_report_of_dropped_lines_is_a_line_of_the_log() {
        let json = report_line(12, Timestamp::UNIX_EPOCH, LogFormat::Json);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["timestamp"], "1970-01-01T00:00:00.000000Z");
        assert_eq!(json["dropped"], 12);
        let pretty = report_line(12, Timestamp::UNIX_EPOCH, LogFormat::Pretty);
        assert!(pretty.contains("WARN token_broker::telemetry: 12 log lines were dropped"));
    }

    #[test]
    fn a_malformed_filter_is_refused() {
        assert!(filter(Some("token_broker=loud")).is_err());
    }
}
