//! Selection of audit events.

use chrono::DateTime;

use crate::domain::clock::Timestamp;

/// Which events to read. An absent condition does not limit the selection.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct EventFilter {
    /// Name of the account.
    pub account: Option<String>,
    /// Name of the caller.
    pub caller: Option<String>,
    /// The kinds of events, such as `get_token`.
    pub events: Option<Vec<String>>,
    /// The outcome, such as `ok`.
    pub outcome: Option<String>,
    /// Events before this time are excluded.
    pub since: Option<Timestamp>,
    /// Events at or after this time are excluded.
    pub until: Option<Timestamp>,
    /// The fingerprint of the event's token is one of these. Only
    /// [`AuditSnapshot::events`](super::AuditSnapshot::events) applies this condition.
    pub fingerprints: Option<Vec<String>>,
}

impl EventFilter {
    /// Returns the time bounds, `since` inclusive and the other exclusive. They are always present,
    /// so that the planner can exclude partitions; the default ones include every event.
    pub(super) fn times(&self, after: Option<Timestamp>) -> (Timestamp, Timestamp) {
        const YEAR_10000: i64 = 253_402_300_800;
        let since = self.since.unwrap_or_default().max(after.unwrap_or_default());
        let end = || DateTime::from_timestamp_secs(YEAR_10000).unwrap_or(Timestamp::MAX_UTC);
        (since, self.until.unwrap_or_else(end))
    }
}
