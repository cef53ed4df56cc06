//! Checks that the database is the one that this replica used last, and that it is not in an older state,
//! as after the restore of a backup.
//!
//! The state directory remembers the database's deployment id and its epoch, which is incremented each
//! time that an operator accepts a restored database. The journal knows which of its records were
//! delivered to the database.

use std::{collections::BTreeMap, fs, io, path::Path};

use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use tracing::{info, warn};

use super::{
    app_config::AppConfig,
    database_mismatch::{DatabaseMismatch, Difference, LostRecords, join},
    error::StartError,
};
use crate::{
    audit::{
        chain::ChainHead,
        journal::{Journal, LocalChain, ReadError, with_causes},
        record::{Event, Record},
    },
    files::{atomic, state_dir::StateDir},
    store::deployment::{self, DatabaseIdentity, Deployment},
};

/// A database that passed the check.
pub(super) struct VerifiedDatabase {
    pub(super) identity: DatabaseIdentity,
    /// The audit record to write, if the database differs and the difference was accepted.
    pub(super) acceptance: Option<Record>,
}

/// What the state directory remembers of the database that this replica used last.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct RememberedDatabase {
    deployment: String,
    epoch: i64,
}

/// Checks the database behind `pool`. With `--accept-restored`, a database that differs is accepted: it
/// becomes the database of the deployment, under a new epoch. A database with fewer records is accepted
/// too if another replica has accepted it since this one last started.
///
/// # Errors
/// [`StartError::DatabaseMismatch`] when the database differs and was not accepted. Also errors of the
/// database and of the state directory.
pub(super) async fn verify(
    pool: &PgPool,
    config: &AppConfig,
    state_dir: &StateDir,
    journal: &Journal,
) -> Result<VerifiedDatabase, StartError> {
    let ours = config.settings.upstream.to_string();
    let file = state_dir.database_file();
    let remembered = RememberedDatabase::read(&file).map_err(StartError::DatabaseFile)?;
    let found = deployment::open(pool, &ours).await?;
    let chains = journal.chains();
    let names: Vec<_> = chains.iter().map(|chain| chain.link.chain.clone()).collect();
    let stored = deployment::delivered(pool, &names).await?;
    let missing = missing_records(&journal.delivered_positions(), &stored);
    let mut differences = differences(remembered.as_ref(), &found, &ours);
    if missing > 0 && !differences.contains(&Difference::OtherDeployment) {
        differences.push(Difference::Older { records: missing });
    }
    let accepted_elsewhere = accepted_elsewhere(remembered.as_ref(), &found.identity)
        && differences.iter().all(|it| matches!(it, Difference::Older { .. }));
    let mut verified = VerifiedDatabase { identity: found.identity, acceptance: None };
    if !differences.is_empty() {
        let lost = lost_records(journal.clone(), chains, stored.clone()).await;
        if !accepted_elsewhere {
            if !config.accept_restored {
                return Err(DatabaseMismatch { differences, lost }.into());
            }
            let ends_older = config.settings.new_token_ends_older;
            verified.identity = deployment::accept(pool, &ours, ends_older).await?;
        }
        warn!(
            differences = join(&differences),
            "the database is not as it was left; that was accepted{lost}"
        );
        verified.acceptance = Some(acceptance_record(config, &differences, &lost));
        // The positions up to which the journal was delivered are those of the former database. From
        // here on, this database's apply, so that records that it lacks are delivered again.
        for name in names {
            journal.mark_delivered(&name, stored.get(&name).map_or(0, |head| head.seq));
        }
    }
    let now = RememberedDatabase {
        deployment: verified.identity.id.clone(),
        epoch: verified.identity.epoch,
    };
    if remembered.as_ref() != Some(&now) {
        now.write(&file).map_err(StartError::DatabaseFile)?;
        info!(
            deployment = now.deployment,
            epoch = now.epoch,
            "the state directory belongs to this database"
        );
    }
    Ok(verified)
}

/// Returns how the database `found` differs from the remembered one. Missing records are not considered.
fn differences(
    remembered: Option<&RememberedDatabase>,
    found: &Deployment,
    ours: &str,
) -> Vec<Difference> {
    let mut differences = Vec::new();
    if remembered.is_some_and(|it| it.deployment != found.identity.id) {
        differences.push(Difference::OtherDeployment);
    }
    if remembered
        .is_some_and(|it| it.deployment == found.identity.id && it.epoch > found.identity.epoch)
    {
        differences.push(Difference::Superseded);
    }
    if found.moved {
        differences.push(Difference::Moved);
    }
    if found.upstream != ours {
        let (theirs, ours) = (found.upstream.clone(), ours.to_owned());
        differences.push(Difference::OtherUpstream { theirs, ours });
    }
    differences
}

/// Whether another replica accepted a restored database since this one last started.
fn accepted_elsewhere(remembered: Option<&RememberedDatabase>, found: &DatabaseIdentity) -> bool {
    remembered.is_some_and(|it| it.deployment == found.id && it.epoch < found.epoch)
}

/// Returns how many delivered records the database lacks. `delivered` has the last sequence number that
/// the journal delivered of each chain, and `found` the last record of each chain in the database.
fn missing_records(delivered: &BTreeMap<String, i64>, found: &BTreeMap<String, ChainHead>) -> i64 {
    let missing =
        |(chain, seq): (&String, &i64)| (seq - found.get(chain).map_or(0, |head| head.seq)).max(0);
    delivered.iter().map(missing).sum()
}

fn acceptance_record(config: &AppConfig, differences: &[Difference], lost: &LostRecords) -> Record {
    let mut record =
        Record::new(config.clock.wall(), Event::DatabaseAccepted).with("found", join(differences));
    for (event, count) in &lost.counts {
        record = record.with(&format!("lost_{event}"), count.to_string());
    }
    record
}

/// Reads from the journal the delivered records that the database lacks. `found` has the last record of
/// each chain in the database. Reads the files on a thread for blocking work.
async fn lost_records(
    journal: Journal,
    chains: Vec<LocalChain>,
    found: BTreeMap<String, ChainHead>,
) -> LostRecords {
    let read = move || {
        let delivered = journal.delivered_positions();
        let mut lost = LostRecords::default();
        for chain in chains {
            let name = &chain.link.chain;
            let from = found.get(name).copied().unwrap_or_else(|| chain.link.root());
            let until = delivered.get(name).copied().unwrap_or(0);
            if let Err(error) = read_lost(&journal, &chain, from, until, &mut lost) {
                lost.unreadable = Some(with_causes(&error));
            }
        }
        lost
    };
    match tokio::task::spawn_blocking(read).await {
        Ok(lost) => lost,
        Err(bug) => std::panic::resume_unwind(bug.into_panic()),
    }
}

/// Adds to `lost` the records of `chain` after `from`, up to the sequence number `until`.
fn read_lost(
    journal: &Journal,
    chain: &LocalChain,
    from: ChainHead,
    until: i64,
    lost: &mut LostRecords,
) -> Result<(), ReadError> {
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

impl RememberedDatabase {
    /// Reads the file at `path`; returns `None` if there is none.
    fn read(path: &Path) -> io::Result<Option<Self>> {
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
                // The message of `error` may quote the file.
                let position = format!("line {}, column {}", error.line(), error.column());
                io::Error::new(io::ErrorKind::InvalidData, format!("malformed at {position}"))
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Replaces the file at `path` as a whole, so that a crash leaves the old or the new content.
    fn write(&self, path: &Path) -> io::Result<()> {
        atomic::replace(path, &serde_json::to_vec(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::chain::Digest;

    fn remembered(deployment: &str, epoch: i64) -> RememberedDatabase {
        RememberedDatabase { deployment: deployment.into(), epoch }
    }

    fn found(epoch: i64, moved: bool) -> Deployment {
        let identity = DatabaseIdentity { id: "ours".into(), epoch };
        Deployment { identity, upstream: "staging".into(), moved }
    }

    #[test]
    fn a_database_is_recognised_by_its_id_its_epoch_its_location_and_its_upstream() {
        let differences = |remembered: Option<RememberedDatabase>, found: Deployment, ours| {
            differences(remembered.as_ref(), &found, ours)
        };
        assert_eq!(differences(None, found(1, false), "staging"), []);
        assert_eq!(differences(Some(remembered("ours", 1)), found(1, false), "staging"), []);
        assert_eq!(differences(Some(remembered("ours", 1)), found(2, false), "staging"), []);
        let superseded = differences(Some(remembered("ours", 2)), found(1, false), "staging");
        assert_eq!(superseded, [Difference::Superseded]);
        let foreign = differences(Some(remembered("theirs", 2)), found(1, true), "production");
        let upstream =
            Difference::OtherUpstream { theirs: "staging".into(), ours: "production".into() };
        assert_eq!(foreign, [Difference::OtherDeployment, Difference::Moved, upstream]);
    }

    #[test]
    fn a_database_that_another_replica_accepted_since_is_accepted() {
        let identity = found(2, false).identity;
        assert!(accepted_elsewhere(Some(&remembered("ours", 1)), &identity));
        assert!(!accepted_elsewhere(Some(&remembered("ours", 2)), &identity));
        assert!(!accepted_elsewhere(Some(&remembered("theirs", 1)), &identity));
        assert!(!accepted_elsewhere(None, &identity));
    }

    #[test]
    fn missing_records_are_summed_over_all_chains() {
        let delivered =
            [("a", 10), ("b", 20), ("c", 5)].map(|(chain, seq)| (chain.to_owned(), seq));
        let head = |seq| ChainHead { seq, hash: Digest::ZERO };
        let found = [("a", head(7)), ("b", head(25))].map(|(chain, it)| (chain.to_owned(), it));
        assert_eq!(missing_records(&delivered.into(), &found.into()), 3 + 5);
    }

    #[test]
    fn the_remembered_database_is_read_back_and_none_without_a_file() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("database");
        assert_eq!(RememberedDatabase::read(&path).unwrap(), None);
        remembered("ours", 3).write(&path).unwrap();
        assert_eq!(RememberedDatabase::read(&path).unwrap(), Some(remembered("ours", 3)));
        fs::write(&path, "{").unwrap();
        assert!(RememberedDatabase::read(&path).is_err());
    }
}
