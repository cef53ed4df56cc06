//! What is counted elsewhere and read when somebody scrapes.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use chrono::TimeDelta;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::domain::clock::Timestamp;

/// What the broker's parts tell at a scrape. What nobody fills in is exported as zero, or, of
/// times and the skew, not at all.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// The accounts, by the state that `account_status` shows.
    pub accounts: AccountGauges,
    /// When the first of the live tokens ends.
    pub earliest_token_end: Option<Timestamp>,
    /// How far the upstream's clock was ahead of ours at the last issue.
    pub upstream_clock_skew: Option<TimeDelta>,
    /// When our certificate ends, in seconds since 1970.
    pub tls_not_after: Option<i64>,
    /// The audit journal and its delivery.
    pub journal: JournalGauges,
}

/// Accounts by state; each account is in one.
#[derive(Clone, Copy, Debug, Default)]
pub struct AccountGauges {
    /// With a live token that is not due yet.
    pub fresh: u64,
    /// With a live token that is being replaced.
    pub refreshing: u64,
    /// With a token that has ended, and no reason known.
    pub expired: u64,
    /// Whose credential the upstream refuses.
    pub rejected: u64,
    /// For which the upstream refuses our address.
    pub egress_rejected: u64,
    /// For which the upstream fails to answer.
    pub unreachable: u64,
    /// Switched off.
    pub disabled: u64,
    /// Never issued yet.
    pub pending: u64,
}

impl AccountGauges {
    /// Each state's name in `account_status`, and how many accounts are in it.
    fn by_state(self) -> [(&'static str, u64); 8] {
        [
            ("fresh", self.fresh),
            ("refreshing", self.refreshing),
            ("expired", self.expired),
            ("rejected", self.rejected),
            ("egress_rejected", self.egress_rejected),
            ("unreachable", self.unreachable),
            ("disabled", self.disabled),
            ("pending", self.pending),
        ]
    }
}

/// The audit journal of this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct JournalGauges {
    /// Records handed to the journal since the start.
    pub appended: u64,
    /// Records that are as durable as `AUDIT_SYNC` asks, since the start.
    pub durable: u64,
    /// Records that could not be written, since the start.
    pub failed: u64,
    /// Bytes of the segments on disk.
    pub bytes: u64,
    /// Records that have not reached Postgres yet.
    pub undelivered: u64,
    /// When records were last delivered, or found to be all delivered.
    pub last_delivered_at: Option<Timestamp>,
}

/// Fills in the figures that it knows.
type Source = Box<dyn Fn(&mut Gauges) + Send + Sync>;

/// All who know figures.
#[derive(Clone, Default)]
pub(super) struct Sources(Arc<Mutex<Vec<Source>>>);

impl Sources {
    pub(super) fn add(&self, source: Source) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(source);
    }

    fn read(&self) -> Gauges {
        let mut figures = Gauges::default();
        for source in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            source(&mut figures);
        }
        figures
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sources")
    }
}

impl Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let figures = self.read();
        encode_tokens(&mut encoder, &figures)?;
        encode_journal(&mut encoder, figures.journal)
    }
}

fn encode_tokens(encoder: &mut DescriptorEncoder, figures: &Gauges) -> fmt::Result {
    let states = figures.accounts.by_state();
    let accounts: u64 = states.iter().map(|(_, count)| count).sum();
    gauge(encoder, "accounts", "Accounts that the broker knows", accounts)?;
    let help = "Accounts by the state of their token, as in account_status";
    let mut tokens = encoder.encode_descriptor("tokens", help, None, MetricType::Gauge)?;
    for (state, count) in states {
        let labels = [("state", state)];
        ConstGauge::new(count).encode(tokens.encode_family(&labels)?)?;
    }
    if let Some(end) = figures.earliest_token_end {
        let help = "When the first of the live tokens ends, in seconds since 1970";
        gauge(encoder, "earliest_token_end_timestamp_seconds", help, end.timestamp())?;
    }
    if let Some(skew) = figures.upstream_clock_skew {
        let help = "How far the upstream's clock was ahead of ours at the last issue";
        gauge(encoder, "upstream_clock_skew_seconds", help, skew.as_seconds_f64())?;
    }
    if let Some(end) = figures.tls_not_after {
        let help = "When the broker's certificate ends, in seconds since 1970";
        gauge(encoder, "tls_certificate_end_timestamp_seconds", help, end)?;
    }
    Ok(())
}

fn encode_journal(encoder: &mut DescriptorEncoder, journal: JournalGauges) -> fmt::Result {
    counter(encoder, "journal_appended", "Audit records handed to the journal", journal.appended)?;
    counter(encoder, "journal_durable", "Audit records made durable", journal.durable)?;
    counter(encoder, "journal_failed", "Audit records that could not be written", journal.failed)?;
    gauge(encoder, "journal_bytes", "Bytes of the journal's segments on disk", journal.bytes)?;
    let help = "Audit records that have not reached Postgres yet";
    gauge(encoder, "undelivered_records", help, journal.undelivered)?;
    if let Some(at) = journal.last_delivered_at {
        let help = "When audit records last reached Postgres, in seconds since 1970";
        gauge(encoder, "audit_last_delivered_timestamp_seconds", help, at.timestamp())?;
    }
    Ok(())
}

fn gauge<N: EncodeGaugeValue + Copy>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    value: N,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    metric.encode_gauge(&value)
}

fn counter(encoder: &mut DescriptorEncoder, name: &str, help: &str, value: u64) -> fmt::Result {
    let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    ConstCounter::new(value).encode(metric)
}
