//! Writes the changes that triggers recorded into the audit journal.

use std::time::Duration;

use tokio::time::Instant;

use super::duty::{Duty, POLL_INTERVAL};
use crate::{
    audit::{
        journal::Journal,
        record::{Event, Record},
    },
    domain::clock::{Clock, Timestamp},
    store::{
        Session, StoreError,
        changes::{self, Change},
        within,
    },
};

/// The most changes that are claimed for the audit journal at once.
const CHANGES_BATCH: i64 = 500;
/// How long the records of one such batch may take to become durable.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether this instance has claimed changes in the database that may be missing in its journal, so that
/// it must claim them again to record them.
///
/// Audit records in Postgres contain the ids of their changes. So once all records of the journal have been
/// delivered, a claimed change without an audit record is known to be missing in the journal. Until then, no
/// changes are claimed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reclaim {
    /// Every claimed change is in the journal.
    NotNeeded,
    /// Recording was interrupted, and it is not known which changes were claimed.
    Needed,
    /// Changes are claimed again once Postgres has all records of earlier processes, and this many of the
    /// present one.
    AfterDelivery(u64),
}

/// The duty that records changes.
pub(super) struct ChangeRecorder {
    /// The id of this instance, in whose name changes are claimed.
    pub(super) instance: String,
    pub(super) journal: Journal,
    pub(super) clock: Clock,
    pub(super) reclaim: Reclaim,
}

impl Duty for ChangeRecorder {
    const NAME: &'static str = "recording";
    const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

    async fn perform(&mut self, session: &mut Session) -> Result<(), StoreError> {
        let again = match self.reclaim {
            Reclaim::NotNeeded => {
                if !within(changes::any_unclaimed(session.connection()?)).await? {
                    return Ok(());
                }
                false
            }
            Reclaim::Needed => {
                self.reclaim = Reclaim::AfterDelivery(self.journal.stats().appended);
                return Ok(());
            }
            Reclaim::AfterDelivery(count) if !self.has_delivered(count) => return Ok(()),
            Reclaim::AfterDelivery(_) => true,
        };
        // This remains set if recording fails or is cancelled.
        self.reclaim = Reclaim::Needed;
        self.record(session, again).await?;
        self.reclaim = Reclaim::NotNeeded;
        Ok(())
    }

    fn pause(&self) -> Duration {
        POLL_INTERVAL
    }
}

impl ChangeRecorder {
    /// Returns whether the first `count` records of this process, and all of earlier ones, are in Postgres.
    fn has_delivered(&self, count: u64) -> bool {
        let stats = self.journal.stats();
        let delivered = stats.durable.saturating_sub(stats.undelivered);
        self.journal.earlier_chains_delivered() && delivered + stats.failed >= count
    }

    /// Claims changes and appends their records to the journal until none are left. With `reclaim`, claims
    /// only one batch, which includes the changes that this instance has claimed before.
    async fn record(&self, session: &mut Session, reclaim: bool) -> Result<(), StoreError> {
        loop {
            let connection = session.connection()?;
            let claimed = changes::claim(connection, &self.instance, reclaim, CHANGES_BATCH);
            let claimed = within(claimed).await?;
            let more = claimed.len() >= usize::try_from(CHANGES_BATCH).unwrap_or(usize::MAX);
            let now = self.clock.wall();
            let records: Vec<_> = claimed
                .into_iter()
                .map(|change| self.journal.append(audit_record(&change, now)))
                .collect();
            let until = Instant::now() + RECORD_TIMEOUT;
            for appended in records {
                // After a timeout the journal still writes the record later: only records of calls may be
                // dropped.
                let _ = appended.durable(until.saturating_duration_since(Instant::now())).await;
            }
            // Claiming again would return the same full batch. The rest is recorded after the next start.
            if !more || reclaim {
                return Ok(());
            }
        }
    }
}

/// Returns the audit record of a change. `now` stands for the change's time if that is malformed.
fn audit_record(change: &Change, now: Timestamp) -> Record {
    let event = match (change.table.as_str(), change.operation.as_str()) {
        ("accounts", "insert") => Event::AccountRegistered,
        ("accounts", "delete") => Event::AccountRemoved,
        ("accounts", _) => Event::AccountChanged,
        ("grants", _) => Event::GrantChanged,
        ("audit_events", _) => Event::AuditPruned,
        ("audit_chains", _) => Event::ChainRetired,
        ("audit_retention", _) => Event::RetentionChanged,
        ("intake_keys" | "keys", _) => Event::KeysChanged,
        ("callers" | "caller_credentials", _) => Event::CallerChanged,
        _ => Event::OtherChanged,
    };
    let mut record = Record::new(change.at.unwrap_or(now), event)
        .with("change_id", change.id.to_string())
        .with("table", &change.table)
        .with("operation", &change.operation);
    record = match change.table.as_str() {
        "accounts" => record.requested_account(&change.subject),
        "audit_events" => record.with("day", &change.subject),
        "audit_chains" => record.with("chain", &change.subject),
        "audit_retention" => record,
        "intake_keys" | "keys" => record.with("key_id", &change.subject),
        "callers" | "caller_credentials" | "grants" => record.with("caller", &change.subject),
        _ => record.with("subject", &change.subject),
    };
    for (key, value) in &change.detail {
        record = record.with(key, value);
    }
    record
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chrono::DateTime;

    use super::*;

    fn change(table: &str, operation: &str) -> Change {
        Change {
            id: 7,
            at: Some(DateTime::UNIX_EPOCH),
            table: table.into(),
            operation: operation.into(),
            subject: "acme".into(),
            detail: BTreeMap::from([("session_user".into(), "jane".into())]),
        }
    }

    #[test]
    fn a_change_is_recorded_as_the_event_of_its_table_with_the_login_that_made_it() {
        for (table, operation, event) in [
            ("accounts", "insert", "account_registered"),
            ("accounts", "update", "account_changed"),
            ("accounts", "delete", "account_removed"),
            ("callers", "insert", "caller_changed"),
            ("caller_credentials", "delete", "caller_changed"),
            ("grants", "update", "grant_changed"),
            ("audit_events", "prune", "audit_pruned"),
            ("audit_chains", "retire", "chain_retired"),
            ("audit_retention", "update", "retention_changed"),
            ("intake_keys", "delete", "keys_changed"),
            ("keys", "reseal", "keys_changed"),
            ("table_of_a_newer_release", "update", "other_changed"),
        ] {
            let record = audit_record(&change(table, operation), DateTime::UNIX_EPOCH);
            assert_eq!(record.event.as_str(), event);
            assert_eq!(record.detail["session_user"], "jane");
            assert_eq!(record.detail["change_id"], "7");
        }
    }
}
