//! Fills the gauges at each scrape of `/metrics`.
//!
//! To add a counter or a histogram, add it to `telemetry::Metrics`. To add a gauge, add a field to
//! `telemetry::Gauges`, export it there, and fill it here. In either case add a row to the table in
//! `docs/operations.md`: a test compares the table with what is exported.

use std::sync::atomic::Ordering;

use chrono::TimeDelta;

use super::components::{Components, UNKNOWN_SKEW};
use crate::telemetry::{self, JournalGauges};

/// Registers a function that reads the gauges from `components` at each scrape.
pub(super) fn export(components: &Components) {
    let (cache, journal) = (components.cache.clone(), components.journal.clone());
    let (skew, tls) = (components.upstream_skew_ms.clone(), components.tls.clone());
    let (clock, health) = (components.clock.clone(), components.feed_health.clone());
    let (database_clock, keyring) =
        (components.database_clock.clone(), components.keyring_health.clone());
    components.metrics.on_scrape(move |gauges| {
        let now = clock.now();
        for entry in cache.all() {
            let account = entry.snapshot();
            gauges.accounts.add(account.state(now));
            let end = account.live_token(now).map(|token| database_clock.to_utc(token.expires_at));
            gauges.earliest_token_end =
                [gauges.earliest_token_end, end].into_iter().flatten().min();
        }
        let skew = Some(skew.load(Ordering::Relaxed)).filter(|skew| *skew != UNKNOWN_SKEW);
        gauges.upstream_clock_skew = skew.map(TimeDelta::milliseconds);
        gauges.tls_not_after = tls.as_ref().map(|tls| tls.not_after());
        gauges.log_lines_dropped = telemetry::dropped_log_lines();
        gauges.failing_duties = health.failing().len().try_into().unwrap_or(u64::MAX);
        gauges.unusable_rows = health.unusable().len().try_into().unwrap_or(u64::MAX);
        gauges.keyring_refused = u64::from(keyring.fault().is_some());
        let stats = journal.stats();
        gauges.journal = JournalGauges {
            appended: stats.appended,
            durable: stats.durable,
            failed: stats.failed,
            bytes: stats.segments_bytes,
            undelivered: stats.undelivered,
            last_delivered_at: stats.last_delivered_at,
        };
    });
}
