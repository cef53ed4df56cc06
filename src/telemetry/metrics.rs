//! The metrics, and their text in the `OpenMetrics` format.

use std::{array, fmt, sync::Arc, time::Duration};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, text},
    metrics::{MetricType, counter::Counter, family::Family, info::Info},
    registry::Registry,
};

use super::{
    gauges::{Gauges, Sources},
    latency::Latencies,
};
use crate::domain::refresh_state::FailureClass;

/// The media type of the text that [`Metrics::encode`] returns.
pub const METRICS_CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A method of `TokenService`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Method {
    /// `GetToken`.
    GetToken,
    /// `WatchTokens`. Its latency is the time until the stream begins.
    WatchTokens,
    /// `ReportRejectedToken`.
    ReportRejectedToken,
    /// `ListAccounts`.
    ListAccounts,
    /// A method that the service does not have.
    Unknown,
}

impl Method {
    /// Every method, in the order of the variants.
    const ALL: [Self; 5] = [
        Self::GetToken,
        Self::WatchTokens,
        Self::ReportRejectedToken,
        Self::ListAccounts,
        Self::Unknown,
    ];

    /// Returns the label's value, which is also the name of the audit log's event.
    fn as_str(self) -> &'static str {
        match self {
            Self::GetToken => "get_token",
            Self::WatchTokens => "watch_tokens",
            Self::ReportRejectedToken => "report_rejected_token",
            Self::ListAccounts => "list_accounts",
            Self::Unknown => "unknown_method",
        }
    }
}

/// The names of gRPC's status codes in lower case, indexed by their number. The labels of metrics and the
/// outcomes in the audit log use them.
pub const GRPC_CODE_NAMES: [&str; 17] = [
    "ok",
    "cancelled",
    "unknown",
    "invalid_argument",
    "deadline_exceeded",
    "not_found",
    "already_exists",
    "permission_denied",
    "resource_exhausted",
    "failed_precondition",
    "aborted",
    "out_of_range",
    "unimplemented",
    "internal",
    "unavailable",
    "data_loss",
    "unauthenticated",
];
const UNKNOWN_CODE: usize = 2;

/// How an attempt to issue a token ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IssueResult {
    /// A token was issued. It is stored, or pending while a sole replica has no database, or it was dropped
    /// because the stored one lives longer.
    Issued,
    /// The upstream gave the account's token again instead of a new one.
    Repeated,
    /// The upstream refused the credential.
    Rejected,
    /// The upstream refused the account or the address of the broker.
    EgressRejected,
    /// The upstream asked for fewer calls.
    RateLimited,
    /// The upstream did not answer, or said that it cannot answer now.
    Unreachable,
    /// The answer was neither a token nor a known error.
    Malformed,
    /// The stored secret does not open with the keyring.
    Intake,
    /// A token was issued after the lease, the credential or the account was gone, and was dropped.
    Fenced,
    /// A token was issued and is served, but could not be stored yet.
    NotStored,
}

impl From<FailureClass> for IssueResult {
    fn from(class: FailureClass) -> Self {
        match class {
            FailureClass::Rejected => Self::Rejected,
            FailureClass::Intake => Self::Intake,
            FailureClass::EgressRejected => Self::EgressRejected,
            FailureClass::RateLimited => Self::RateLimited,
            FailureClass::Unreachable => Self::Unreachable,
            FailureClass::Malformed => Self::Malformed,
        }
    }
}

impl IssueResult {
    /// Every result, in the order of the variants.
    const ALL: [Self; 10] = [
        Self::Issued,
        Self::Repeated,
        Self::Rejected,
        Self::EgressRejected,
        Self::RateLimited,
        Self::Unreachable,
        Self::Malformed,
        Self::Intake,
        Self::Fenced,
        Self::NotStored,
    ];

    /// Returns the label's value.
    fn as_str(self) -> &'static str {
        match self {
            Self::Issued => "issued",
            Self::Repeated => "repeated",
            Self::Rejected => FailureClass::Rejected.as_str(),
            Self::EgressRejected => FailureClass::EgressRejected.as_str(),
            Self::RateLimited => FailureClass::RateLimited.as_str(),
            Self::Unreachable => FailureClass::Unreachable.as_str(),
            Self::Malformed => FailureClass::Malformed.as_str(),
            Self::Intake => FailureClass::Intake.as_str(),
            Self::Fenced => "fenced",
            Self::NotStored => "not_stored",
        }
    }
}

/// The broker's metrics. Counting takes no lock and allocates nothing. Every series exists from the start,
/// so that a first failure shows as a rise from zero.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    calls: [[Counter; GRPC_CODE_NAMES.len()]; Method::ALL.len()],
    call_seconds: CallSeconds,
    issues: [Counter; IssueResult::ALL.len()],
    sources: Sources,
}

impl Metrics {
    /// Returns the metrics of a broker of this `version`, all of them zero.
    #[must_use]
    pub fn new(version: &'static str) -> Self {
        let mut registry = Registry::with_prefix("token_broker");
        registry.register("build", "The running release", Info::new([("version", version)]));

        let family = Family::<[(&str, &str); 2], Counter>::default();
        let calls = array::from_fn(|method| {
            array::from_fn(|code| {
                let labels =
                    [("method", Method::ALL[method].as_str()), ("code", GRPC_CODE_NAMES[code])];
                family.get_or_create_owned(&labels)
            })
        });
        registry.register("calls", "Calls of TokenService, by how they ended", family);

        let call_seconds = CallSeconds::default();
        let help = "From the arrival of a call's headers to its answer";
        registry.register("call_seconds", help, call_seconds.clone());

        let family = Family::<[(&str, &str); 1], Counter>::default();
        let issues = IssueResult::ALL
            .map(|result| family.get_or_create_owned(&[("result", result.as_str())]));
        registry.register("issues", "Attempts to issue a token, by result", family);

        let sources = Sources::default();
        registry.register_collector(Box::new(sources.clone()));
        Self { registry, calls, call_seconds, issues, sources }
    }

    /// Counts a call that took `took` and ended with the gRPC status number `code`. A number that gRPC does
    /// not define counts as `unknown`.
    pub fn call(&self, method: Method, code: i32, took: Duration) {
        let code = usize::try_from(code).ok().filter(|code| *code < GRPC_CODE_NAMES.len());
        self.calls[method as usize][code.unwrap_or(UNKNOWN_CODE)].inc();
        self.call_seconds.0[method as usize].observe(took);
    }

    /// Counts the end of an attempt to issue a token.
    pub fn issue(&self, result: IssueResult) {
        self.issues[result as usize].inc();
    }

    /// Registers `read`, which fills in the values that it knows at each scrape. It must not block.
    pub fn on_scrape(&self, read: impl Fn(&mut Gauges) + Send + Sync + 'static) {
        self.sources.add(Box::new(read));
    }

    /// Returns all metrics as text of the type [`METRICS_CONTENT_TYPE`].
    #[must_use]
    pub fn encode(&self) -> String {
        let mut metrics = String::with_capacity(16 << 10);
        text::encode(&mut metrics, &self.registry).expect("text can be appended to a string");
        metrics
    }
}

/// The latencies of each method, in the order of [`Method::ALL`].
#[derive(Clone, Debug, Default)]
struct CallSeconds(Arc<[Latencies; Method::ALL.len()]>);

impl EncodeMetric for CallSeconds {
    fn encode(&self, mut encoder: MetricEncoder) -> fmt::Result {
        Method::ALL.iter().zip(self.0.iter()).try_for_each(|(method, latencies)| {
            latencies.encode(encoder.encode_family(&[("method", method.as_str())])?)
        })
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;
    use crate::{domain::refresh_state::AccountState, telemetry::JournalGauges};

    fn lines(metrics: &Metrics) -> Vec<String> {
        metrics.encode().lines().map(str::to_owned).collect()
    }

    fn assert_has(metrics: &Metrics, expected: &[&str]) {
        let lines = lines(metrics);
        for line in expected {
            assert!(lines.iter().any(|other| other == line), "no {line} in {lines:#?}");
        }
    }

    #[test]
    fn calls_are_counted_by_method_and_code() {
        let metrics = Metrics::new("1.2.3");
        metrics.call(Method::GetToken, 0, Duration::from_micros(40));
        metrics.call(Method::GetToken, 0, Duration::from_micros(60));
        metrics.call(Method::Unknown, 12, Duration::from_millis(1));
        metrics.call(Method::ListAccounts, -1, Duration::ZERO);
        metrics.call(Method::ListAccounts, 17, Duration::ZERO);
        assert_has(
            &metrics,
            &[
                "token_broker_build_info{version=\"1.2.3\"} 1",
                "token_broker_calls_total{method=\"get_token\",code=\"ok\"} 2",
                "token_broker_calls_total{method=\"unknown_method\",code=\"unimplemented\"} 1",
                "token_broker_calls_total{method=\"list_accounts\",code=\"unknown\"} 2",
                "token_broker_calls_total{method=\"watch_tokens\",code=\"ok\"} 0",
                "token_broker_call_seconds_sum{method=\"get_token\"} 0.0001",
                "token_broker_call_seconds_count{method=\"get_token\"} 2",
                "token_broker_call_seconds_bucket{le=\"0.00005\",method=\"get_token\"} 1",
                "token_broker_call_seconds_bucket{le=\"+Inf\",method=\"get_token\"} 2",
            ],
        );
    }

    #[test]
    fn methods_and_results_index_their_counters() {
        for (index, method) in Method::ALL.into_iter().enumerate() {
            assert_eq!(method as usize, index);
        }
        for (index, result) in IssueResult::ALL.into_iter().enumerate() {
            assert_eq!(result as usize, index);
        }
        for class in FailureClass::ALL {
            assert_eq!(IssueResult::from(class).as_str(), class.as_str());
        }
    }

    #[test]
    fn accounts_are_counted_by_state() {
        let metrics = Metrics::new("1.2.3");
        metrics.on_scrape(|gauges| {
            for (count, state) in (1..).zip(AccountState::ALL) {
                (0..count).for_each(|_| gauges.accounts.add(state));
            }
        });
        for (count, state) in (1..).zip(AccountState::ALL) {
            let line = format!("token_broker_tokens{{state=\"{state}\"}} {count}");
            assert_has(&metrics, &[&line]);
        }
        assert_has(&metrics, &["token_broker_accounts 36"]);
    }

    #[test]
    fn issues_are_counted_by_result() {
        let metrics = Metrics::new("1.2.3");
        metrics.issue(IssueResult::Fenced);
        assert_has(
            &metrics,
            &[
                "token_broker_issues_total{result=\"fenced\"} 1",
                "token_broker_issues_total{result=\"issued\"} 0",
            ],
        );
    }

    #[test]
    fn gauges_are_read_from_all_sources_at_each_scrape() {
        let metrics = Metrics::new("1.2.3");
        let absent = lines(&metrics).iter().any(|line| line.contains("timestamp"));
        assert!(!absent, "a time that no source fills in is not exported");
        metrics.on_scrape(|gauges| {
            gauges.earliest_token_end = DateTime::from_timestamp(1_800_000_000, 0);
            gauges.upstream_clock_skew = Some(TimeDelta::milliseconds(-1500));
            gauges.log_lines_dropped = 3;
        });
        metrics.on_scrape(|gauges| {
            gauges.journal = JournalGauges {
                appended: 5,
                durable: 4,
                failed: 1,
                bytes: 4096,
                undelivered: 2,
                last_delivered_at: DateTime::from_timestamp(1_700_000_000, 0),
            };
        });
        assert_has(
            &metrics,
            &[
                "token_broker_accounts 0",
                "token_broker_tokens{state=\"pending\"} 0",
                "token_broker_earliest_token_end_timestamp_seconds 1800000000",
                "token_broker_upstream_clock_skew_seconds -1.5",
                "token_broker_journal_appended_total 5",
                "token_broker_journal_durable_total 4",
                "token_broker_journal_failed_total 1",
                "token_broker_journal_bytes 4096",
                "token_broker_undelivered_records 2",
                "token_broker_audit_last_delivered_timestamp_seconds 1700000000",
                "token_broker_log_lines_dropped_total 3",
                "# EOF",
            ],
        );
    }
}
