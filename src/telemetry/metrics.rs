//! The metrics, in the `OpenMetrics` text format.

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

/// The media type of [`Metrics::encode`]'s text.
pub const METRICS_CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A method of `TokenService`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Method {
    /// `GetToken`.
    GetToken,
    /// `WatchTokens`; its time ends with the first answer.
    WatchTokens,
    /// `ReportRejectedToken`.
    ReportRejectedToken,
    /// `ListAccounts`.
    ListAccounts,
    /// One that the service does not have.
    Unknown,
}

/// The names of [`Method`], in its order: those of the audit log's events.
const METHODS: [&str; 5] =
    ["get_token", "watch_tokens", "report_rejected_token", "list_accounts", "unknown_method"];

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

/// What came of an issue.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IssueResult {
    /// A token.
    Issued,
    /// The upstream refused the credential.
    Rejected,
    /// The upstream refused our address.
    EgressRejected,
    /// The upstream asked for fewer calls.
    RateLimited,
    /// No answer, or one that the upstream's failure explains.
    Unreachable,
    /// An answer that is no token.
    Malformed,
    /// The stored secret does not open.
    Intake,
    /// A token that came after the lease, the credential or the account was gone.
    Fenced,
    /// A token that is served, but that the database stayed away from.
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

/// The names of [`IssueResult`], in its order.
const RESULTS: [&str; 9] = [
    "issued",
    "rejected",
    "egress_rejected",
    "rate_limited",
    "unreachable",
    "malformed",
    "intake",
    "fenced",
    "not_stored",
];

/// The broker's metrics. To count takes neither a lock nor memory; every series is there from the
/// start, so that a first failure is seen as a rise from zero.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    calls: [[Counter; GRPC_CODE_NAMES.len()]; METHODS.len()],
    call_seconds: CallSeconds,
    issues: [Counter; RESULTS.len()],
    sources: Sources,
}

impl Metrics {
    /// New metrics of a broker of that `version`, all of them zero.
    #[must_use]
    pub fn new(version: &'static str) -> Self {
        let mut registry = Registry::with_prefix("token_broker");
        registry.register("build", "The running release", Info::new([("version", version)]));

        let family = Family::<[(&str, &str); 2], Counter>::default();
        let calls = array::from_fn(|method| {
            array::from_fn(|code| {
                let labels = [("method", METHODS[method]), ("code", GRPC_CODE_NAMES[code])];
                family.get_or_create_owned(&labels)
            })
        });
        registry.register("calls", "Calls of TokenService, by how they ended", family);

        let call_seconds = CallSeconds::default();
        let help = "From the arrival of a call's headers to its answer";
        registry.register("call_seconds", help, call_seconds.clone());

        let family = Family::<[(&str, &str); 1], Counter>::default();
        let issues =
            array::from_fn(|result| family.get_or_create_owned(&[("result", RESULTS[result])]));
        registry.register(
            "issues",
            "Calls of the upstream for a token, by what came of them",
            family,
        );

        let sources = Sources::default();
        registry.register_collector(Box::new(sources.clone()));
        Self { registry, calls, call_seconds, issues, sources }
    }

    /// Counts a call that ended with the gRPC status of number `code` after `took`.
    pub fn call(&self, method: Method, code: i32, took: Duration) {
        let code = usize::try_from(code).ok().filter(|code| *code < GRPC_CODE_NAMES.len());
        self.calls[method as usize][code.unwrap_or(UNKNOWN_CODE)].inc();
        self.call_seconds.0[method as usize].observe(took);
    }

    /// Counts an issue.
    pub fn issue(&self, result: IssueResult) {
        self.issues[result as usize].inc();
    }

    /// Lets `read` fill in what it knows at each scrape. It must not block.
    pub fn on_scrape(&self, read: impl Fn(&mut Gauges) + Send + Sync + 'static) {
        self.sources.add(Box::new(read));
    }

    /// All metrics as text of type [`METRICS_CONTENT_TYPE`].
    #[must_use]
    pub fn encode(&self) -> String {
        let mut metrics = String::with_capacity(16 << 10);
        text::encode(&mut metrics, &self.registry).expect("text can be appended to a string");
        metrics
    }
}

/// Latencies by method.
#[derive(Clone, Debug, Default)]
struct CallSeconds(Arc<[Latencies; METHODS.len()]>);

impl EncodeMetric for CallSeconds {
    fn encode(&self, mut encoder: MetricEncoder) -> fmt::Result {
        METHODS.iter().zip(self.0.iter()).try_for_each(|(method, latencies)| {
            latencies.encode(encoder.encode_family(&[("method", *method)])?)
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
    use crate::telemetry::JournalGauges;

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
    fn each_method_and_result_has_its_own_name() {
        for (method, name) in [
            (Method::GetToken, "get_token"),
            (Method::WatchTokens, "watch_tokens"),
            (Method::ReportRejectedToken, "report_rejected_token"),
            (Method::ListAccounts, "list_accounts"),
            (Method::Unknown, "unknown_method"),
        ] {
            assert_eq!(METHODS[method as usize], name);
        }
        for (result, name) in [
            (IssueResult::Issued, "issued"),
            (IssueResult::Rejected, "rejected"),
            (IssueResult::EgressRejected, "egress_rejected"),
            (IssueResult::RateLimited, "rate_limited"),
            (IssueResult::Unreachable, "unreachable"),
            (IssueResult::Malformed, "malformed"),
            (IssueResult::Fenced, "fenced"),
        ] {
            assert_eq!(RESULTS[result as usize], name);
        }
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
    fn figures_are_read_from_all_sources_at_each_scrape() {
        let metrics = Metrics::new("1.2.3");
        let absent = lines(&metrics).iter().any(|line| line.contains("timestamp"));
        assert!(!absent, "a time that nobody knows is not exported");
        metrics.on_scrape(|figures| {
            figures.accounts.fresh = 3;
            figures.accounts.rejected = 1;
            figures.earliest_token_end = DateTime::from_timestamp(1_800_000_000, 0);
            figures.upstream_clock_skew = Some(TimeDelta::milliseconds(-1500));
        });
        metrics.on_scrape(|figures| {
            figures.journal = JournalGauges {
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
                "token_broker_accounts 4",
                "token_broker_tokens{state=\"fresh\"} 3",
                "token_broker_tokens{state=\"rejected\"} 1",
                "token_broker_tokens{state=\"pending\"} 0",
                "token_broker_earliest_token_end_timestamp_seconds 1800000000",
                "token_broker_upstream_clock_skew_seconds -1.5",
                "token_broker_journal_appended_total 5",
                "token_broker_journal_durable_total 4",
                "token_broker_journal_failed_total 1",
                "token_broker_journal_bytes 4096",
                "token_broker_undelivered_records 2",
                "token_broker_audit_last_delivered_timestamp_seconds 1700000000",
                "# EOF",
            ],
        );
    }
}
