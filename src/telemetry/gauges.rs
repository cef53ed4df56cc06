//! Metrics whose values other parts of the broker hold. They are read at each scrape.

use std::{fmt, sync::Arc};

use chrono::TimeDelta;
use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::domain::{clock::Timestamp, refresh_state::AccountState};

/// The values at one scrape. A count that no source fills in is exported as zero; a time, or the clock
/// skew, is then not exported at all.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// The number of accounts in each state.
    pub accounts: AccountGauges,
    /// The earliest end of a live token.
    pub earliest_token_end: Option<Timestamp>,
    /// How far the upstream's clock was ahead of this machine's clock at the last issue.
    pub upstream_clock_skew: Option<TimeDelta>,
    /// The end of the broker's TLS certificate, in seconds since 1970.
    pub tls_not_after: Option<i64>,
    /// The audit journal and its delivery to Postgres.
    pub journal: JournalGauges,
    /// Lines of the log that were dropped because nobody read them or they could not be written.
    pub log_lines_dropped: u64,
    /// The number of duties that fail: those of the change feed, and the heartbeat.
    pub failing_duties: u64,
    /// The number of rows that cannot be used.
    pub unusable_rows: u64,
    /// 1 if the keyring's file has changed and cannot be used.
    pub keyring_refused: u64,
}

/// The number of accounts in each state. Each account is in exactly one.
#[derive(Clone, Copy, Debug, Default)]
pub struct AccountGauges([u64; AccountState::ALL.len()]);

impl AccountGauges {
    /// Counts one more account in `state`.
    pub fn add(&mut self, state: AccountState) {
        self.0[state as usize] += 1;
    }

    /// Returns each state with its number of accounts.
    fn by_state(self) -> impl Iterator<Item = (AccountState, u64)> {
        AccountState::ALL.into_iter().zip(self.0)
    }
}

/// The audit journal of this process, as counted since its start.
#[derive(Clone, Copy, Debug, Default)]
pub struct JournalGauges {
    /// Records that were appended.
    pub appended: u64,
    /// Records that became as durable as `AUDIT_SYNC` demands.
    pub durable: u64,
    /// Records that could not be written.
    pub failed: u64,
    /// The bytes of the segments on disk.
    pub bytes: u64,
    /// Records that have not reached Postgres yet, also those of earlier starts.
    pub undelivered: u64,
    /// When records were last delivered to Postgres, or none were left to deliver.
    pub last_delivered_at: Option<Timestamp>,
}

/// A function that fills in the values that it knows.
type Source = Box<dyn Fn(&mut Gauges) + Send + Sync>;

/// The functions that fill in the values, in the order of their registration.
#[derive(Clone, Default)]
pub(super) struct Sources(Arc<Mutex<Vec<Source>>>);

impl Sources {
    pub(super) fn add(&self, source: Source) {
        self.0.lock().push(source);
    }

    fn read(&self) -> Gauges {
        let mut gauges = Gauges::default();
        for source in self.0.lock().iter() {
            source(&mut gauges);
        }
        gauges
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sources")
    }
}

impl Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let gauges = self.read();
        encode_tokens(&mut encoder, &gauges)?;
        encode_change_feed(&mut encoder, &gauges)?;
        encode_journal(&mut encoder, gauges.journal)?;
        let help = "Whether the keyring's file has changed and cannot be used (1), so that the previous one is in use";
        gauge(&mut encoder, "keyring_refused", help, gauges.keyring_refused)?;
        let help = "Lines of the log that were dropped";
        counter(&mut encoder, "log_lines_dropped", help, gauges.log_lines_dropped)
    }
}

fn encode_tokens(encoder: &mut DescriptorEncoder, gauges: &Gauges) -> fmt::Result {
    let accounts: u64 = gauges.accounts.by_state().map(|(_, count)| count).sum();
    gauge(encoder, "accounts", "Accounts that the broker knows", accounts)?;
    let help = "Accounts by the state of their token, as in account_status";
    let mut tokens = encoder.encode_descriptor("tokens", help, None, MetricType::Gauge)?;
    for (state, count) in gauges.accounts.by_state() {
        let labels = [("state", state.as_str())];
        ConstGauge::new(count).encode(tokens.encode_family(&labels)?)?;
    }
    if let Some(end) = gauges.earliest_token_end {
        let help = "When the first of the live tokens ends, in seconds since 1970";
        gauge(encoder, "earliest_token_end_timestamp_seconds", help, end.timestamp())?;
    }
    if let Some(skew) = gauges.upstream_clock_skew {
        let help = "How far the upstream's clock was ahead of ours at the last issue";
        gauge(encoder, "upstream_clock_skew_seconds", help, skew.as_seconds_f64())?;
    }
    if let Some(end) = gauges.tls_not_after {
        let help = "When the broker's certificate ends, in seconds since 1970";
        gauge(encoder, "tls_certificate_end_timestamp_seconds", help, end)?;
    }
    Ok(())
}

fn encode_change_feed(encoder: &mut DescriptorEncoder, gauges: &Gauges) -> fmt::Result {
    let help = "Duties of the change feed, and heartbeats, whose last attempt failed";
    gauge(encoder, "failing_duties", help, gauges.failing_duties)?;
    let help = "Rows in the database that are malformed and treated as if they did not exist";
    gauge(encoder, "unusable_rows", help, gauges.unusable_rows)
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
