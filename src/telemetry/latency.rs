//! A lock-free histogram of latencies. The one of prometheus-client takes a lock for each observation,
//! for which all worker threads would compete.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use prometheus_client::encoding::{MetricEncoder, NoLabelSet};

/// Upper bounds of the buckets, in microseconds. An answer from the cache takes tens of microseconds, one
/// that waits for a new token hundreds of thousands.
const BOUNDS: [u64; 18] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000, 60_000_000,
];

/// A histogram of latencies. A reader may see an observation in its bucket and not yet in the sum.
#[derive(Debug, Default)]
pub(super) struct Latencies {
    /// One bucket more than bounds: the last one is for latencies above them all.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    /// The sum of all latencies in nanoseconds, which overflows after 584 years.
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
    fn a_latency_is_counted_in_the_first_bucket_whose_bound_it_does_not_exceed() {
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
