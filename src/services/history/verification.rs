//! The comparison of the database with what is known of it: when the broker starts, and again on each new
//! session.

use std::{
    collections::{BTreeMap, BTreeSet},
    io, mem,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use thiserror::Error;
use tracing::{info, warn};

use super::{
    evidence::{Evidence, Verdict, judge},
    lost::lost_records,
    mismatch::{DatabaseMismatch, Difference, LostRecords, is_old_primary, join},
};
use crate::{
    audit::{
        journal::Journal,
        record::{Event, Record},
    },
    domain::clock::Clock,
    services::account_cache::AccountCache,
    store::{
        Database, Session, StoreError, TrustGate, TrustLock,
        deployment::{self, DatabaseIdentity, Deployment},
        history::{self, DatabaseHistory, Expected},
        within,
    },
};

/// How long a statement of the guard waits for a lock that another transaction holds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a statement of the guard may take before the server cancels it, so that a table that somebody locked
/// does not look like a server that does not answer.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the database is not used.
#[derive(Debug, Error)]
pub enum HistoryError {
    /// The database does not answer, or refused a statement.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The database differs from the one that this replica knows.
    #[error(transparent)]
    Mismatch(#[from] DatabaseMismatch),
    /// Another replica accepted a restored database while this one ran.
    #[error("another replica accepted a restored database; the next start of this one does so too")]
    AcceptedElsewhere,
    /// The file in the state directory that remembers the database cannot be read or written.
    #[error("the file database in the state directory cannot be used")]
    File(#[from] io::Error),
}

/// The settings by which a database is judged.
#[derive(Clone, Debug)]
pub struct HistorySettings {
    /// The upstream to which the database must belong.
    pub upstream: String,
    /// Whether a database that differs is accepted at the start, under a new epoch.
    pub accept_restored: bool,
    /// Whether the upstream ends older tokens when it issues a new one.
    pub new_token_ends_older: bool,
}

/// The parts of the broker that know what the database held.
#[derive(Debug)]
pub struct Witnesses {
    /// The audit journal, which knows what was delivered.
    pub journal: Journal,
    /// The accounts, with the generations of their stored tokens.
    pub cache: Arc<AccountCache>,
}

/// Verifies the database, and lets connections pass to it only while it is verified.
#[derive(Debug)]
pub struct HistoryGuard {
    /// The options for connections that nothing has verified.
    pub(super) database: Database,
    pub(super) gate: TrustGate,
    settings: HistorySettings,
    witnesses: Witnesses,
    /// The file in the state directory that keeps the evidence.
    file: PathBuf,
    clock: Clock,
    /// What was seen of the database in this process.
    evidence: Mutex<Option<Evidence>>,
    /// What `file` holds.
    saved: Mutex<Option<Evidence>>,
    /// The audit chains whose rows were malformed at the last reading.
    malformed_chains: Mutex<BTreeSet<String>>,
}

/// The session over which the database was verified. The trust ends with it.
#[derive(Debug)]
pub struct VerifiedSession {
    pub(super) session: Session,
    /// The snapshot of the last reading; `None` if there was none over this session, since a table was locked.
    pub(super) snapshot: Option<String>,
    /// Whether the server refused the last reading.
    pub(super) refuses: bool,
    /// Whether the tokens were compared with those that were seen before. They may have been locked.
    pub(super) tokens_compared: bool,
}

/// A database that passed the check at the start.
#[derive(Debug)]
pub struct VerifiedDatabase {
    /// The session to which the trust is bound. Pass it to [`HistoryGuard::run`].
    pub session: VerifiedSession,
    /// The database's identity.
    pub identity: DatabaseIdentity,
    /// The audit record to write, if the database differs and the difference was accepted.
    pub acceptance: Option<Record>,
}

/// What was read of the database, and what it must have.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) found: DatabaseHistory,
    /// Up to which record each chain had been delivered before the database was read. The delivery goes on
    /// meanwhile, so the database may have more, but not less.
    delivered: BTreeMap<String, i64>,
}

impl VerifiedSession {
    fn new(session: Session, found: DatabaseHistory) -> Self {
        let tokens_compared = found.older_tokens.is_some();
        Self { session, snapshot: Some(found.snapshot), refuses: false, tokens_compared }
    }
}

impl HistoryGuard {
    /// Returns a guard that opens and closes `gate`. `database` has the options for connections without the
    /// gate, and `file` is the state directory's file for the evidence.
    #[must_use]
    pub fn new(
        database: Database,
        gate: TrustGate,
        settings: HistorySettings,
        witnesses: Witnesses,
        file: PathBuf,
        clock: Clock,
    ) -> Self {
        Self {
            database,
            gate,
            settings,
            witnesses,
            file,
            clock,
            evidence: Mutex::default(),
            saved: Mutex::default(),
            malformed_chains: Mutex::default(),
        }
    }

    /// Verifies the database at the start of the broker, and opens the gate. If the settings say so, a database
    /// that differs is accepted: it becomes the database of the deployment, under a new epoch. A database in an
    /// older state is accepted too if another replica has accepted it since this one last started.
    ///
    /// Cancel safe: a later call continues.
    ///
    /// # Errors
    /// [`HistoryError::Mismatch`] when the database differs and is not accepted. Also errors of the database and
    /// of the state directory.
    pub async fn start(&self) -> Result<VerifiedDatabase, HistoryError> {
        let remembered = Evidence::read(&self.file)?;
        self.saved.lock().clone_from(&remembered);
        self.evidence.lock().clone_from(&remembered);
        let mut session = within(self.database.session()).await?;
        let connection = session.connection()?;
        // A database that is known has an identity. If that was deleted, a new one would be another.
        if self.known_deployment().is_none() {
            within(deployment::assign(connection, &self.settings.upstream)).await?;
        }
        let lock = within(TrustLock::take(connection)).await?;
        let mut reading = self.read(&mut session, None, true).await?;
        let mut acceptance = None;
        match self.judge(&reading) {
            Verdict::Continues => self.restore_identity(&mut session, &reading).await?,
            Verdict::AcceptedElsewhere(differences) if differences.is_empty() => {}
            Verdict::AcceptedElsewhere(differences) => {
                acceptance = Some(self.accept(&reading, &differences).await);
            }
            Verdict::Differs(differences) if self.settings.accept_restored => {
                let HistorySettings { upstream, new_token_ends_older, .. } = &self.settings;
                within(deployment::assign(session.connection()?, upstream)).await?;
                let accepted =
                    deployment::accept(session.connection()?, upstream, *new_token_ends_older);
                reading.found.deployment.identity = within(accepted).await?;
                acceptance = Some(self.accept(&reading, &differences).await);
            }
            Verdict::Differs(differences) => {
                return Err(self.mismatch(differences, &reading).await);
            }
        }
        let found = reading.found;
        let identity = found.deployment.identity.clone();
        if acceptance.is_some() {
            *self.evidence.lock() = None;
        }
        self.remember(&found);
        if remembered.is_none_or(|it| it.deployment != identity.id || it.epoch != identity.epoch) {
            let DatabaseIdentity { id, epoch } = &identity;
            info!(deployment = id, epoch, "the state directory belongs to this database");
        }
        self.save().await?;
        within(session.limit(LOCK_TIMEOUT, STATEMENT_TIMEOUT)).await?;
        self.gate.open(&lock);
        let session = VerifiedSession::new(session, found);
        Ok(VerifiedDatabase { session, identity, acceptance })
    }

    /// Verifies the database again, on a new session, and opens the gate. Cancel safe.
    ///
    /// While somebody has locked a table that it reads, the server itself may prove that nothing was lost: if it
    /// has been running without a break since the database was last seen.
    pub(super) async fn verify_again(&self) -> Result<VerifiedSession, HistoryError> {
        // If the database went back, this process ends, and the next one has to know it too.
        self.remember_seen().await;
        let mut session = within(self.database.session()).await?;
        within(session.limit(LOCK_TIMEOUT, STATEMENT_TIMEOUT)).await?;
        let lock = within(TrustLock::take(session.connection()?)).await?;
        let session = match self.read(&mut session, None, true).await {
            Ok(reading) => {
                let found = self.believe(&mut session, reading).await?;
                VerifiedSession::new(session, found)
            }
            Err(error) if error.is_delayed() && self.is_same_run(&mut session).await? => {
                warn!(%error, "the database cannot tell its history; its server has been running without a break");
                VerifiedSession { session, snapshot: None, refuses: true, tokens_compared: false }
            }
            Err(error) => return Err(error.into()),
        };
        self.gate.open(&lock);
        Ok(session)
    }

    /// Checks what was read over `session`, and remembers it. Returns what was found.
    pub(super) async fn believe(
        &self,
        session: &mut Session,
        reading: Reading,
    ) -> Result<DatabaseHistory, HistoryError> {
        self.check(&reading).await?;
        self.restore_identity(session, &reading).await?;
        self.remember(&reading.found);
        if let Err(error) = self.save().await {
            warn!(%error, "what was seen of the database cannot be saved for the next start");
        }
        Ok(reading.found)
    }

    /// Returns what `question` answers by the evidence; `None` also if there is none yet.
    pub(super) fn seen_by<T>(&self, question: impl FnOnce(&Evidence) -> Option<T>) -> Option<T> {
        self.evidence.lock().as_ref().and_then(question)
    }

    /// Whether the server has been running without a break since the database was last seen in it.
    async fn is_same_run(&self, session: &mut Session) -> Result<bool, StoreError> {
        let found = within(history::server_position(session.connection()?)).await?;
        Ok(self.evidence.lock().as_ref().is_some_and(|evidence| evidence.is_same_run(&found)))
    }

    /// Writes the identity again if its row was deleted and everything else proves that the database is the one
    /// that is known.
    async fn restore_identity(
        &self,
        session: &mut Session,
        Reading { found, .. }: &Reading,
    ) -> Result<(), StoreError> {
        if found.identity_is_missing {
            let Deployment { identity, upstream, .. } = &found.deployment;
            let restored = deployment::restore_identity(session.connection()?, identity, upstream);
            within(restored).await?;
            warn!("the row of the table `deployment` was deleted; it is restored");
        }
        Ok(())
    }

    /// Returns what the table `deployment` must hold, if the database can be recognised also without it.
    fn known_deployment(&self) -> Option<Deployment> {
        let identity = self.evidence.lock().as_ref()?.recognisable_identity()?;
        let upstream = self.settings.upstream.clone();
        Some(Deployment { identity, upstream, moved: false })
    }

    /// Reads what the database says of its history. The accounts' tokens are compared too if `compare_tokens`
    /// says so, as on a new session.
    pub(super) async fn read(
        &self,
        session: &mut Session,
        snapshot: Option<String>,
        compare_tokens: bool,
    ) -> Result<Reading, StoreError> {
        self.remember_noted();
        let delivered = self.delivered();
        let tokens = if compare_tokens { self.seen_tokens() } else { Vec::new() };
        let deployment = self.known_deployment();
        let chains = delivered.keys().cloned();
        let journaled = self.witnesses.journal.chains().into_iter().map(|it| it.link.chain.clone());
        let expected = Expected {
            chains: chains.chain(journaled).collect(),
            changes: self
                .evidence
                .lock()
                .iter()
                .flat_map(|it| it.changes.iter().map(|seen| seen.id))
                .collect(),
            tokens,
            snapshot,
            deployment,
        };
        let found = within(history::read(session.connection()?, &expected)).await?;
        let malformed = &found.malformed_chains;
        if mem::replace(&mut *self.malformed_chains.lock(), malformed.clone()) != *malformed {
            warn!(chains = ?malformed, "rows of audit_chains are malformed, so they prove nothing");
        }
        Ok(Reading { found, delivered })
    }

    /// Returns the accounts whose stored token was seen, in this process or an earlier one, each with the latest
    /// generation.
    fn seen_tokens(&self) -> Vec<(i64, i64)> {
        let mut seen: BTreeMap<_, _> = self.stored_tokens().into_iter().collect();
        for (account, generation) in self.evidence.lock().iter().flat_map(|it| &it.tokens) {
            let known = seen.entry(*account).or_insert(*generation);
            *known = (*generation).max(*known);
        }
        seen.into_iter().collect()
    }

    /// Returns the accounts in the cache, with the generations of their stored tokens.
    fn stored_tokens(&self) -> Vec<(i64, i64)> {
        let accounts = self.witnesses.cache.all();
        let stored = accounts.iter().filter_map(|account| {
            Some((account.id().0, account.snapshot().refresh.stored_generation?.0))
        });
        stored.collect()
    }

    /// Returns up to which record each chain was delivered, by the journal and by what was seen in the
    /// database.
    fn delivered(&self) -> BTreeMap<String, i64> {
        let mut delivered = self.witnesses.journal.delivered_positions();
        for (chain, seen) in self.evidence.lock().iter().flat_map(|it| &it.delivered) {
            let seq = delivered.entry(chain.clone()).or_default();
            *seq = seen.seq.max(*seq);
        }
        delivered
    }

    fn judge(&self, Reading { found, delivered }: &Reading) -> Verdict {
        judge(self.evidence.lock().as_ref(), delivered, found, &self.settings.upstream)
    }

    /// Checks, while the broker runs, that the database continues its history.
    pub(super) async fn check(&self, reading: &Reading) -> Result<(), HistoryError> {
        match self.judge(reading) {
            Verdict::Continues => Ok(()),
            Verdict::AcceptedElsewhere(_) => Err(HistoryError::AcceptedElsewhere),
            // This is checked again and again until it goes away. What it lacks is not lost.
            Verdict::Differs(differences) if is_old_primary(&differences) => {
                Err(DatabaseMismatch { differences, lost: LostRecords::default() }.into())
            }
            Verdict::Differs(differences) => Err(self.mismatch(differences, reading).await),
        }
    }

    async fn mismatch(&self, differences: Vec<Difference>, reading: &Reading) -> HistoryError {
        let lost = self.lost(reading).await;
        DatabaseMismatch { differences, lost }.into()
    }

    async fn lost(&self, Reading { found, delivered }: &Reading) -> LostRecords {
        let journal = self.witnesses.journal.clone();
        let mut delivered = delivered.clone();
        delivered.retain(|chain, _| !found.malformed_chains.contains(chain));
        lost_records(journal, delivered, found.delivered.clone()).await
    }

    /// Takes over a database that differs, and returns the audit record about it.
    async fn accept(&self, reading: &Reading, differences: &[Difference]) -> Record {
        let lost = self.lost(reading).await;
        warn!(
            differences = join(differences),
            "the database is not as it was left; that was accepted{lost}"
        );
        // The positions up to which the journal was delivered are those of the former database. From here on,
        // this database's apply, so that records that it lacks are delivered again.
        let journal = &self.witnesses.journal;
        for chain in journal.chains() {
            let name = &chain.link.chain;
            journal
                .mark_delivered(name, reading.found.delivered.get(name).map_or(0, |head| head.seq));
        }
        let now = self.clock.wall();
        let mut record = Record::new(now, Event::DatabaseAccepted).with("found", join(differences));
        for (event, count) in &lost.counts {
            record = record.with(&format!("lost_{event}"), count.to_string());
        }
        record
    }

    /// Adds the changes to the evidence that have taken effect in this process before they were read here.
    fn remember_noted(&self) {
        let noted = self.gate.take_noted();
        if let Some(evidence) = self.evidence.lock().as_mut() {
            evidence.add_changes(noted);
        }
    }

    /// Adds what was found in a verified database to the evidence.
    pub(super) fn remember(&self, found: &DatabaseHistory) {
        let mut evidence = self.evidence.lock();
        *evidence = Some(Evidence::after(evidence.take(), found));
    }

    /// Adds the stored tokens of the accounts in the cache to the evidence.
    pub(super) fn note_tokens(&self) {
        let tokens = self.stored_tokens();
        if let Some(evidence) = &mut *self.evidence.lock() {
            evidence.note_tokens(tokens);
        }
    }

    /// Adds the changes and tokens to the evidence that this process has seen, and saves it.
    pub(super) async fn remember_seen(&self) {
        self.remember_noted();
        self.note_tokens();
        if let Err(error) = self.save().await {
            warn!(%error, "what was seen of the database cannot be saved for the next start");
        }
    }

    /// Writes the evidence into its file, if the next start would judge differently without that.
    pub(super) async fn save(&self) -> io::Result<()> {
        let Some(evidence) = self.evidence.lock().clone() else { return Ok(()) };
        let is_saved = self.saved.lock().as_ref().is_some_and(|it| !it.differs_from(&evidence));
        // Another program may have removed the file.
        if is_saved && tokio::fs::try_exists(&self.file).await.unwrap_or(false) {
            return Ok(());
        }
        let (file, written) = (self.file.clone(), evidence.clone());
        match tokio::task::spawn_blocking(move || written.write(&file)).await {
            Ok(written) => written?,
            Err(bug) => std::panic::resume_unwind(bug.into_panic()),
        }
        *self.saved.lock() = Some(evidence);
        Ok(())
    }
}
