//! Counts of records that could not be written, for the `audit_gap` record that reports them.

use std::sync::atomic::{AtomicI64, Ordering};

use crate::{
    audit::record::{Event, Record},
    domain::clock::Timestamp,
};

/// Counts of the records that were dropped since the last durable `audit_gap` record. Any thread may
/// add to them.
#[derive(Debug, Default)]
pub(super) struct DroppedRecords {
    calls: AtomicI64,
    others: AtomicI64,
}

/// A snapshot of [`DroppedRecords`].
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(super) struct DroppedCounts {
    calls: i64,
    others: i64,
}

impl DroppedRecords {
    /// Counts a dropped record that stands for `count` calls or other events.
    pub(super) fn add(&self, is_call: bool, count: i64) {
        let counter = if is_call { &self.calls } else { &self.others };
        counter.fetch_add(count.max(1), Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> DroppedCounts {
        DroppedCounts {
            calls: self.calls.load(Ordering::Relaxed),
            others: self.others.load(Ordering::Relaxed),
        }
    }

    /// Subtracts what a durable `audit_gap` record reports.
    pub(super) fn subtract(&self, reported: DroppedCounts) {
        self.calls.fetch_sub(reported.calls, Ordering::Relaxed);
        self.others.fetch_sub(reported.others, Ordering::Relaxed);
    }
}

impl DroppedCounts {
    pub(super) fn any(self) -> bool {
        self.calls != 0 || self.others != 0
    }

    /// Returns the `audit_gap` record that reports these counts; `None` if nothing was dropped.
    pub(super) fn gap_record(self, at: Timestamp) -> Option<Record> {
        if !self.any() {
            return None;
        }
        let mut record =
            Record::new(at, Event::AuditGap).outcome("unavailable", "AUDIT_UNAVAILABLE");
        record.count = self.calls;
        if self.others > 0 {
            record = record.with("other_records", self.others.to_string());
        }
        Some(record)
    }
}
