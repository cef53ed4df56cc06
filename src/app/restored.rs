//! Whether the database is the one that this replica left, in no older state.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use thiserror::Error;
use tracing::{info, warn};

use super::{AppConfig, StartError};
use crate::{
    audit::{
        chain::{ChainHead, StoredEvent},
        journal::{Journal, LocalChain},
        record::{Event, Record},
    },
    files::state_dir::StateDir,
    store::deployment::{self, DatabaseIdentity, Deployment},
};

/// How many of the events that went back are told one by one.
const MOST_TOLD: usize = 100;

/// A database that this replica goes on with.
pub(super) struct Recognised {
    pub(super) home: DatabaseIdentity,
    /// What is to be recorded, if it is not as it was left and that was accepted.
    pub(super) accepted: Option<Record>,
}

/// What is unlike it was.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Strange {
    /// The state directory belongs to another deployment.
    Foreign,
    /// It lies elsewhere than when it was used last.
    Moved,
    /// It belongs to another upstream.
    Upstream {
        /// The database's.
        theirs: String,
        /// That of the settings.
        ours: String,
    },
    /// A restored one was accepted in its place.
    GivenUp,
    /// It lacks audit records that this replica delivered.
    Older {
        /// How many.
        records: i64,
    },
}

impl fmt::Display for Strange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => f.write_str("it is not the one that the state directory belongs to"),
            Self::Moved => f.write_str(
                "it lies elsewhere than when it was used last, so it is a copy, or was restored from a dump",
            ),
            Self::Upstream { theirs, ours } => write!(
                f,
                "it belongs to the upstream {theirs}, and the broker is set to {ours}: its \
                 accounts and tokens are not this upstream's"
            ),
            Self::GivenUp => f.write_str("a restored one was accepted in its place"),
            Self::Older { records } => {
                write!(f, "it went back in time, by {records} audit records of this replica's")
            }
        }
    }
}

/// A database that is not as this replica left it.
#[derive(Debug, Error)]
#[error(
    "the database is not as it was left: {}; if that is meant, start once with --accept-restored{lost}",
    list(strange)
)]
pub struct Restored {
    /// How it is unlike.
    pub strange: Vec<Strange>,
    /// What is not in it any more, as far as this replica's journal tells.
    pub lost: Lost,
}

fn list(strange: &[Strange]) -> String {
    strange.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// What went back with a database.
#[derive(Debug, Default)]
pub struct Lost {
    /// How many records there are, by event.
    pub counts: BTreeMap<String, i64>,
    /// The first changes and issues, a line each.
    pub told: Vec<String>,
    /// Why not all could be read.
    pub unread: Option<String>,
}

impl Lost {
    fn add(&mut self, event: &StoredEvent) {
        *self.counts.entry(event.event.clone().into_owned()).or_default() += event.count;
        let is_change = event.detail.contains_key("change_id") || event.event == "token_issued";
        if is_change && self.told.len() < MOST_TOLD {
            let detail = |key| event.detail.get(key).map(String::as_str);
            let whose = event.account.as_deref().or(detail("caller")).unwrap_or("-");
            let mut line = format!("{} {} {whose}", event.at.to_rfc3339(), event.event);
            for part in [detail("operation"), detail("session_user")].into_iter().flatten() {
                line.push(' ');
                line.push_str(part);
            }
            self.told.push(line);
        }
    }
}

impl fmt::Display for Lost {
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
        for line in &self.told {
            write!(f, "\n  {line}")?;
        }
        if let Some(why) = &self.unread {
            write!(f, "\nnot all of it can be told: {why}")?;
        }
        Ok(())
    }
}

/// What a replica keeps of its database from start to start.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Memory {
    deployment: String,
    epoch: i64,
}

/// Says whether the database is ours and in no older state than we left it; accepts another one if
/// `plan` says so.
///
/// # Errors
/// [`StartError::Restored`] when it is not, and that was not accepted.
pub(super) async fn recognise(
    pool: &PgPool,
    plan: &AppConfig,
    state_dir: &StateDir,
    journal: &Journal,
) -> Result<Recognised, StartError> {
    let ours = plan.upstream.target.to_string();
    let file = state_dir.database_file();
    let memory = Memory::read(&file).map_err(StartError::Memory)?;
    let found = deployment::open(pool, &ours).await?;
    let chains = journal.chains();
    let names: Vec<_> = chains.iter().map(|chain| chain.link.chain.clone()).collect();
    let delivered = deployment::delivered(pool, &names).await?;
    let older = went_back(&journal.delivered_positions(), &delivered);
    let mut strange = strange(memory.as_ref(), &found, &ours);
    if older > 0 && !strange.contains(&Strange::Foreign) {
        strange.push(Strange::Older { records: older });
    }
    let elsewhere = accepted_elsewhere(memory.as_ref(), &found.identity);
    let mut recognised = Recognised { home: found.identity, accepted: None };
    if !strange.is_empty() {
        let lost = lost(journal.clone(), chains, delivered.clone()).await;
        let known = elsewhere && strange.iter().all(|it| matches!(it, Strange::Older { .. }));
        if !known {
            if !plan.accept_restored {
                return Err(Restored { strange, lost }.into());
            }
            recognised.home = deployment::accept(pool, &ours, plan.ends_older).await?;
        }
        warn!(
            strange = list(&strange),
            "the database is not as it was left; that was accepted{lost}"
        );
        recognised.accepted = Some(record(plan, &strange, &lost));
        // What was known of its positions is not true any more.
        for name in names {
            journal.delivered(&name, delivered.get(&name).map_or(0, |head| head.seq));
        }
    }
    let now = Memory { deployment: recognised.home.id.clone(), epoch: recognised.home.epoch };
    if memory.as_ref() != Some(&now) {
        now.write(&file).map_err(StartError::Memory)?;
        info!(deployment = now.deployment, epoch = now.epoch, "this is our database");
    }
    Ok(recognised)
}

fn strange(memory: Option<&Memory>, found: &Deployment, ours: &str) -> Vec<Strange> {
    let mut strange = Vec::new();
    if memory.is_some_and(|memory| memory.deployment != found.identity.id) {
        strange.push(Strange::Foreign);
    }
    if memory
        .is_some_and(|it| it.deployment == found.identity.id && it.epoch > found.identity.epoch)
    {
        strange.push(Strange::GivenUp);
    }
    if found.moved {
        strange.push(Strange::Moved);
    }
    if found.upstream != ours {
        strange.push(Strange::Upstream { theirs: found.upstream.clone(), ours: ours.to_owned() });
    }
    strange
}

/// Whether another replica was told since our last start that what it found is meant.
fn accepted_elsewhere(memory: Option<&Memory>, found: &DatabaseIdentity) -> bool {
    memory.is_some_and(|memory| memory.deployment == found.id && memory.epoch < found.epoch)
}

/// How many records that had reached the database it does not have any more.
fn went_back(known: &BTreeMap<String, i64>, found: &BTreeMap<String, ChainHead>) -> i64 {
    let back =
        |(chain, seq): (&String, &i64)| (seq - found.get(chain).map_or(0, |head| head.seq)).max(0);
    known.iter().map(back).sum()
}

fn record(plan: &AppConfig, strange: &[Strange], lost: &Lost) -> Record {
    let mut record =
        Record::new(plan.clock.now(), Event::DatabaseAccepted).with("found", list(strange));
    for (event, count) in &lost.counts {
        record = record.with(&format!("lost_{event}"), count.to_string());
    }
    record
}

/// What the journal has and the database has not any more.
async fn lost(
    journal: Journal,
    chains: Vec<LocalChain>,
    delivered: BTreeMap<String, ChainHead>,
) -> Lost {
    let read = move || {
        let known = journal.delivered_positions();
        let mut lost = Lost::default();
        for chain in chains {
            let name = &chain.link.chain;
            let from = delivered.get(name).copied().unwrap_or_else(|| chain.link.root());
            let until = known.get(name).copied().unwrap_or(0);
            if let Err(error) = read(&journal, &chain, from, until, &mut lost) {
                lost.unread = Some(error.to_string());
            }
        }
        lost
    };
    match tokio::task::spawn_blocking(read).await {
        Ok(lost) => lost,
        Err(bug) => std::panic::resume_unwind(bug.into_panic()),
    }
}

fn read(
    journal: &Journal,
    chain: &LocalChain,
    from: ChainHead,
    until: i64,
    lost: &mut Lost,
) -> Result<(), crate::audit::journal::ReadError> {
    if from.seq >= until {
        return Ok(());
    }
    let mut reader = journal.reader(chain.link.clone(), from);
    loop {
        let events = reader.read()?;
        if events.is_empty() {
            return Ok(());
        }
        for event in &events {
            if event.seq > until {
                return Ok(());
            }
            lost.add(event);
        }
    }
}

impl Memory {
    fn read(path: &Path) -> io::Result<Option<Self>> {
        match fs::read(path) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let draft = path.with_extension("new");
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::chain::Digest;

    fn memory(deployment: &str, epoch: i64) -> Memory {
        Memory { deployment: deployment.into(), epoch }
    }

    fn found(epoch: i64, moved: bool) -> Deployment {
        let identity = DatabaseIdentity { id: "ours".into(), epoch };
        Deployment { identity, upstream: "staging".into(), moved }
    }

    #[test]
    fn a_database_is_ours_by_its_id_its_epoch_its_place_and_its_upstream() {
        let strange = |memory: Option<Memory>, found: Deployment, ours| {
            strange(memory.as_ref(), &found, ours)
        };
        assert_eq!(strange(None, found(1, false), "staging"), []);
        assert_eq!(strange(Some(memory("ours", 1)), found(1, false), "staging"), []);
        assert_eq!(strange(Some(memory("ours", 1)), found(2, false), "staging"), []);
        let given_up = strange(Some(memory("ours", 2)), found(1, false), "staging");
        assert_eq!(given_up, [Strange::GivenUp]);
        let foreign = strange(Some(memory("theirs", 2)), found(1, true), "production");
        let upstream = Strange::Upstream { theirs: "staging".into(), ours: "production".into() };
        assert_eq!(foreign, [Strange::Foreign, Strange::Moved, upstream]);
    }

    #[test]
    fn what_another_replica_accepted_since_is_accepted() {
        let home = found(2, false).identity;
        assert!(accepted_elsewhere(Some(&memory("ours", 1)), &home));
        assert!(!accepted_elsewhere(Some(&memory("ours", 2)), &home));
        assert!(!accepted_elsewhere(Some(&memory("theirs", 1)), &home));
        assert!(!accepted_elsewhere(None, &home));
    }

    #[test]
    fn records_that_are_gone_are_counted_over_all_chains() {
        let known = [("a", 10), ("b", 20), ("c", 5)].map(|(chain, seq)| (chain.to_owned(), seq));
        let head = |seq| ChainHead { seq, hash: Digest::ZERO };
        let found = [("a", head(7)), ("b", head(25))].map(|(chain, it)| (chain.to_owned(), it));
        assert_eq!(went_back(&known.into(), &found.into()), 3 + 5);
    }

    #[test]
    fn a_memory_reads_back_and_a_missing_one_is_none() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("database");
        assert_eq!(Memory::read(&path).unwrap(), None);
        memory("ours", 3).write(&path).unwrap();
        assert_eq!(Memory::read(&path).unwrap(), Some(memory("ours", 3)));
        fs::write(&path, "{").unwrap();
        assert!(Memory::read(&path).is_err());
    }
}
