//! How the database differs from the one that this replica used last.

use std::{collections::BTreeMap, fmt};

use thiserror::Error;

use crate::audit::chain::StoredEvent;

/// The most lost records that [`LostRecords::listed`] has.
const MAX_LISTED: usize = 100;

/// One difference between the database and the one that this replica used last.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Difference {
    /// The database belongs to another deployment than the state directory.
    OtherDeployment,
    /// The database is on another server, or has another object id, than when it was last used: it is a
    /// copy, or was restored from a dump.
    Moved,
    /// The database belongs to another upstream.
    OtherUpstream {
        /// The upstream that the database remembers.
        theirs: String,
        /// The upstream of the settings.
        ours: String,
    },
    /// This replica has since used a restored database that was accepted instead of this one.
    Superseded,
    /// The database lacks audit records that this replica delivered to it.
    Older {
        /// How many records it lacks; at least 1.
        records: i64,
    },
    /// The database has other records in audit chains of this replica than this replica delivered.
    OtherRecords {
        /// The names of the chains.
        chains: Vec<String>,
    },
    /// The database lacks changes that this replica has seen in it, or has others under their numbers.
    LostChanges {
        /// The numbers of the changes with what they were, the latest first.
        changes: Vec<String>,
    },
    /// The database has older tokens than this replica has seen in it.
    OlderTokens {
        /// How many accounts this concerns.
        accounts: i64,
    },
    /// The server's write-ahead log is shorter than this replica has seen it on the same timeline.
    ShorterLog {
        /// By how many bytes.
        bytes: i64,
    },
    /// The server is on an older timeline: it was the primary before the last promotion, or is a copy of that.
    OlderTimeline {
        /// Its timeline.
        found: i64,
        /// The timeline on which this replica has used the database.
        known: i64,
    },
}

/// The most changes that a message names.
const MAX_NAMED: usize = 10;

impl Difference {
    /// Whether the difference means that the database is in an older state, and nothing else.
    pub(super) fn is_older_state(&self) -> bool {
        matches!(
            self,
            Self::Older { .. }
                | Self::OtherRecords { .. }
                | Self::LostChanges { .. }
                | Self::OlderTokens { .. }
                | Self::ShorterLog { .. }
                | Self::OlderTimeline { .. }
        )
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherDeployment => {
                f.write_str("it is not the one that the state directory belongs to")
            }
            Self::Moved => f.write_str(
                "it lies elsewhere than when it was used last, so it is a copy, or was restored from a dump",
            ),
            Self::OtherUpstream { theirs, ours } => write!(
                f,
                "it belongs to the upstream {theirs}, and the broker is set to {ours}: its \
                 accounts and tokens are not this upstream's"
            ),
            Self::Superseded => f.write_str("a restored one was accepted in its place"),
            Self::Older { records } => {
                write!(f, "it went back in time, by {records} audit records of this replica's")
            }
            Self::OtherRecords { chains } => write!(
                f,
                "it has other audit records than this replica delivered, in {}",
                chains.join(", ")
            ),
            Self::LostChanges { changes } => {
                let named: Vec<_> = changes.iter().take(MAX_NAMED).map(String::as_str).collect();
                let more = changes.len() - named.len();
                write!(f, "it went back in time, and lacks changes that were seen in it: ")?;
                f.write_str(&named.join(", "))?;
                if more > 0 { write!(f, " and {more} more") } else { Ok(()) }
            }
            Self::OlderTokens { accounts } => {
                write!(f, "it went back in time, to older tokens of {accounts} accounts")
            }
            Self::ShorterLog { bytes } => write!(
                f,
                "its server went back in time, as by a snapshot of a disk: its write-ahead log is {bytes} \
                 bytes shorter than it was"
            ),
            Self::OlderTimeline { found, known } => write!(
                f,
                "its server is not the primary that took over: it is on timeline {found}, and the database \
                 was used on timeline {known}"
            ),
        }
    }
}

/// Why a database is refused: it differs from the one that this replica used last.
#[derive(Debug, Error)]
#[error("the database is not as it was left: {}; {}{lost}", join(differences), self.advice())]
pub struct DatabaseMismatch {
    /// The differences, at least one.
    pub differences: Vec<Difference>,
    /// The records that the database has lost, according to this replica's journal.
    pub lost: LostRecords,
}

impl DatabaseMismatch {
    /// Returns what an operator should do.
    fn advice(&self) -> &'static str {
        if is_old_primary(&self.differences) {
            "let the database's address lead to the primary that took over. Only if that one is lost for good, start \
             once with --accept-restored, which gives up what it has"
        } else {
            "if that is meant, start once with --accept-restored"
        }
    }
}

/// Whether `differences` say that the server was the primary before another one took over.
pub(super) fn is_old_primary(differences: &[Difference]) -> bool {
    differences.iter().any(|it| matches!(it, Difference::OlderTimeline { .. }))
}

/// Joins the texts of `differences` for a message.
pub(super) fn join(differences: &[Difference]) -> String {
    differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// The audit records that this replica delivered and that the database does not have any more.
#[derive(Debug, Default)]
pub struct LostRecords {
    /// The number of records of each event.
    pub counts: BTreeMap<String, i64>,
    /// The first changes and issues among them, one line each; at most 100.
    pub listed: Vec<String>,
    /// Why some of the records could not be read from the journal.
    pub unreadable: Option<String>,
}

impl LostRecords {
    /// Counts `event`, and lists it if it is a change or an issue.
    pub(super) fn add(&mut self, event: &StoredEvent) {
        *self.counts.entry(event.event.clone().into_owned()).or_default() += event.count;
        let is_change = event.detail.contains_key("change_id") || event.event == "token_issued";
        if is_change && self.listed.len() < MAX_LISTED {
            let detail = |key| event.detail.get(key).map(String::as_str);
            let subject = event.account.as_deref().or(detail("caller")).unwrap_or("-");
            let mut line = format!("{} {} {subject}", event.at.to_rfc3339(), event.event);
            for part in [detail("operation"), detail("session_user")].into_iter().flatten() {
                line.push(' ');
                line.push_str(part);
            }
            self.listed.push(line);
        }
    }
}

impl fmt::Display for LostRecords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.counts.is_empty() {
            let counts: Vec<_> =
                self.counts.iter().map(|(event, count)| format!("{count} {event}")).collect();
            write!(
                f,
                "\nwhat this replica recorded and the database does not have any more: {}",
                counts.join(", ")
            )?;
        }
        for line in &self.listed {
            write!(f, "\n  {line}")?;
        }
        if let Some(why) = &self.unreadable {
            write!(f, "\nsome of these records cannot be read from the journal: {why}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_primary_is_not_recommended_for_acceptance() {
        let text = |differences| {
            DatabaseMismatch { differences, lost: LostRecords::default() }.to_string()
        };
        let old = Difference::OlderTimeline { found: 1, known: 2 };
        for differences in [vec![old.clone()], vec![Difference::Older { records: 1 }, old]] {
            let text = text(differences);
            assert!(
                text.contains("let the database's address lead to the primary that took over"),
                "{text}"
            );
            assert!(
                text.contains(
                    "Only if that one is lost for good, start once with --accept-restored"
                )
            );
        }
        let text = text(vec![Difference::Older { records: 1 }]);
        assert!(text.ends_with("; if that is meant, start once with --accept-restored"), "{text}");
    }
}
