//! The count of what could not be written: nothing is dropped uncounted.

use std::sync::atomic::{AtomicI64, Ordering};

use crate::{
    audit::record::{Event, Record},
    domain::clock::Timestamp,
};

/// What was dropped since the last gap record.
#[derive(Debug, Default)]
pub(super) struct Lost {
    calls: AtomicI64,
    others: AtomicI64,
}

/// One reading of [`Lost`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Counted {
    calls: i64,
    others: i64,
}

impl Lost {
    pub(super) fn add(&self, is_call: bool, count: i64) {
        let counter = if is_call { &self.calls } else { &self.others };
        counter.fetch_add(count.max(1), Ordering::Relaxed);
    }

    pub(super) fn counted(&self) -> Counted {
        Counted {
            calls: self.calls.load(Ordering::Relaxed),
            others: self.others.load(Ordering::Relaxed),
        }
    }

    /// Takes off what a durable record tells now.
    pub(super) fn told(&self, counted: Counted) {
        self.calls.fetch_sub(counted.calls, Ordering::Relaxed);
        self.others.fetch_sub(counted.others, Ordering::Relaxed);
    }
}

impl Counted {
    pub(super) fn any(self) -> bool {
        self.calls != 0 || self.others != 0
    }

    /// The record that tells; `None` if there is nothing to tell.
    pub(super) fn record(self, at: Timestamp) -> Option<Record> {
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
