//! A histogram of latencies that takes no lock: prometheus-client's takes one at each observation,
//! which all of the broker's threads would share.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use prometheus_client::encoding::{MetricEncoder, NoLabelSet};

/// Upper bounds of the buckets, in microseconds: an answer from the cache takes tens, an issue
/// hundreds of thousands.
const BOUNDS: [u64; 18] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000, 60_000_000,
];

/// Counts latencies by size. Readers may see an observation in part: its bucket but not its sum.
#[derive(Debug, Default)]
pub(super) struct Latencies {
    /// One more than bounds: the last is for what exceeds them all.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    /// Nanoseconds; they last for 584 years of latency.
    sum: AtomicU64,
}

impl Latencies {
    pub(super) fn observe(&self, took: Duration) {
        let bucket = BOUNDS.partition_point(|bound| Duration::from_micros(*bound) < took);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    pub(super) fn encode(&self, mut encoder: MetricEncoder) -> fmt::Result {
        let bounds = BOUNDS.iter().map(|bound| Duration::from_micros(*bound).as_secs_f64());
        let counts = self.buckets.iter().map(|count| count.load(Relaxed));
        let buckets: Vec<(f64, u64)> =
            bounds.chain(std::iter::once(f64::INFINITY)).zip(counts).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = Duration::from_nanos(self.sum.load(Relaxed)).as_secs_f64();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_falls_into_the_first_bucket_that_holds_it() {
        let latencies = Latencies::default();
        for micros in [0, 50, 51, 60_000_000, 60_000_001] {
            latencies.observe(Duration::from_micros(micros));
        }
        let filled: Vec<(usize, u64)> = latencies
            .buckets
            .iter()
            .map(|count| count.load(Relaxed))
            .enumerate()
            .filter(|(_, count)| *count > 0)
            .collect();
        assert_eq!(filled, [(0, 2), (1, 1), (17, 1), (18, 1)]);
        assert_eq!(latencies.sum.load(Relaxed), 120_000_102_000);
    }
}
