//! Follows what takes access away or gives it: callers, their credentials and grants, and accounts that are
//! disabled or deleted.
//!
//! This comes before everything else, and needs nothing else: no other table than those that it reads. A
//! table that cannot be read, because another transaction has locked it, does not hinder the others. What
//! was read of it last still counts, except for rows of which `changes` says that they were taken away before
//! the table was locked.
//!
//! Before a change takes effect here, the history guard is told of it. So a database that loses the change in a
//! failover is refused, however soon that comes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::timeout;

use super::duty::{Duty, POLL_INTERVAL, keep_first, reload_pause};
use crate::{
    domain::{caller::Caller, clock::Clock},
    services::{
        account_cache::AccountCache, account_loader::AccountLoader,
        caller_directory::CallerDirectory, connectivity::DatabaseConnectivity,
        feed_health::FeedHealth,
    },
    store::{
        Database, Session, StoreError, UnusableRow,
        accounts::{self, WithdrawnAccount},
        callers::{self, CredentialRow, GrantRow},
        changes::{self, Withdrawn},
        history, within,
    },
};

/// The most accounts of which one statement finds out whether they were withdrawn.
const ACCOUNTS_BATCH: usize = 10_000;
/// How long a change waits to take effect until the history guard has been told of it.
const NOTE_TIMEOUT: Duration = Duration::from_secs(1);

/// The three tables of access, in the order in which they are read.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Table {
    Callers,
    Credentials,
    Grants,
}

impl Table {
    const ALL: [Self; 3] = [Self::Callers, Self::Credentials, Self::Grants];

    fn name(self) -> &'static str {
        match self {
            Self::Callers => "callers",
            Self::Credentials => "caller_credentials",
            Self::Grants => "grants",
        }
    }
}

/// The usable rows of the three tables, as they were read last.
#[derive(Debug, Default)]
struct AccessTables {
    callers: Vec<Caller>,
    credentials: Vec<CredentialRow>,
    grants: Vec<GrantRow>,
}

/// The duty that follows access.
pub(super) struct AccessFollower {
    pub(super) database: Database,
    pub(super) directory: Arc<CallerDirectory>,
    pub(super) loader: Arc<AccountLoader>,
    pub(super) cache: Arc<AccountCache>,
    pub(super) connectivity: Arc<DatabaseConnectivity>,
    pub(super) health: Arc<FeedHealth>,
    pub(super) clock: Clock,
    pub(super) state: AccessState,
}

/// What the duty remembers from one call to the next.
#[derive(Default)]
pub(super) struct AccessState {
    tables: AccessTables,
    /// Whether `tables` differ from what callers are admitted by.
    changed: bool,
    /// The snapshot up to which the announced changes were read; `None` at the start of a session.
    announced: Option<String>,
    /// The tables to read, because something in them changed or they could not be read.
    outdated: BTreeSet<Table>,
    /// The accounts that changed, and possibly were disabled or deleted.
    changed_accounts: BTreeSet<i64>,
    /// The accounts among them of which `changes` says that they were disabled or deleted.
    withdrawn_accounts: Vec<WithdrawnAccount>,
    /// The rows of the outdated tables of which `changes` says that they were taken away, or may have been.
    withdrawn_rows: BTreeMap<Table, BTreeSet<i64>>,
    /// The snapshot up to which the history guard was told of changes; `None` at the start of a session.
    noted: Option<String>,
    /// When all tables are read again, though no change was announced.
    next_reload: Option<Instant>,
}

impl Duty for AccessFollower {
    const NAME: &'static str = "access";
    const LOCK_TIMEOUT: Duration = Duration::from_millis(200);

    async fn perform(&mut self, session: &mut Session) -> Result<(), StoreError> {
        let mut outcome = Ok(());
        keep_first(&mut outcome, self.find_changes(session).await)?;
        let began = Instant::now();
        if self.state.next_reload.is_none_or(|at| at <= began) {
            self.state.outdated.extend(Table::ALL);
        }
        let reloads_all = self.state.outdated.len() == Table::ALL.len();
        keep_first(&mut outcome, self.read_outdated_tables(session).await)?;
        if reloads_all {
            self.state.next_reload = Some(Instant::now() + reload_pause(began.elapsed()));
        }
        if self.state.outdated.is_empty() {
            self.directory.confirm(self.clock.now());
        }
        keep_first(&mut outcome, self.withdraw_accounts(session).await)?;
        outcome
    }

    fn forget(&mut self) {
        self.state.announced = None;
        self.state.noted = None;
        // They may have been read just before the session was lost.
        self.loader.withdraw(&self.state.withdrawn_accounts);
    }

    /// Reports to `connectivity` whether the database answers.
    ///
    /// The database counts as lost only if the server does not answer at all, since a replica may then issue
    /// without leases. A refused statement, for example because of a missing privilege or a lock, proves that
    /// the server answers. A lost session or a statement that took too long proves nothing, so the server is
    /// probed. The probe tells why no connection can be opened, for example because of the password.
    async fn ended(&mut self, result: &Result<(), StoreError>) {
        let error = match result {
            Ok(()) => return self.connectivity.mark_connected(),
            Err(error) if error.primary_answers() => {
                return self.connectivity.mark_failing(&error.to_string());
            }
            Err(error) => error,
        };
        match self.database.probe().await {
            Ok(()) => self.connectivity.mark_failing(&error.to_string()),
            Err(why) if why.primary_answers() => self.connectivity.mark_failing(&why.to_string()),
            Err(why) => self.connectivity.mark_lost(&why.to_string()),
        }
    }

    fn pause(&self) -> Duration {
        POLL_INTERVAL
    }
}

impl AccessFollower {
    /// Adds to the state what may have changed since the last call. At the start of a session, that is
    /// everything.
    ///
    /// # Errors
    /// Returns the database's error. If only the announcements cannot be read, everything counts as changed.
    async fn find_changes(&mut self, session: &mut Session) -> Result<(), StoreError> {
        let state = &mut self.state;
        let Some(announced) = &mut state.announced else {
            let snapshot = within(changes::snapshot(session.connection()?)).await?;
            state.outdated.extend(Table::ALL);
            state.changed_accounts = self.cache.all().iter().map(|it| it.id().0).collect();
            state.announced = Some(snapshot);
            return Ok(());
        };
        match within(changes::announced(session.connection()?, announced)).await {
            Ok(since) => {
                *announced = since.snapshot;
                if since.access || !since.accounts.is_empty() {
                    self.database.note_change();
                }
                state.changed_accounts.extend(since.accounts);
                if since.access {
                    state.outdated.extend(Table::ALL);
                }
                state.add_withdrawn(since.withdrawn);
                Ok(())
            }
            Err(error) => {
                state.outdated.extend(Table::ALL);
                state.changed_accounts = self.cache.all().iter().map(|it| it.id().0).collect();
                Err(error)
            }
        }
    }

    /// Reads the outdated tables, and uses what they hold: all from one snapshot if possible, else each for
    /// itself.
    ///
    /// # Errors
    /// Returns the database's error. The tables that could not be read remain outdated.
    async fn read_outdated_tables(&mut self, session: &mut Session) -> Result<(), StoreError> {
        if self.state.outdated.is_empty() {
            return Ok(());
        }
        let mut outcome = self.read_each_outdated_table(session).await;
        self.state.withhold();
        // Also after an error: the next session compares with what was read, and would find no difference.
        if std::mem::take(&mut self.state.changed) {
            let noted = self.note_changes(session).await;
            let AccessTables { callers, credentials, grants } = &self.state.tables;
            self.directory.replace(callers::assemble(callers, credentials, grants));
            if outcome.is_ok() {
                outcome = noted;
            }
        }
        outcome
    }

    /// Tells the history guard of the changes that are about to take effect here. What cannot be read, since
    /// `changes` is locked, the guard finds later.
    ///
    /// # Errors
    /// When the session is lost.
    async fn note_changes(&mut self, session: &mut Session) -> Result<(), StoreError> {
        let noted = self.state.noted.as_deref();
        let reading = history::new_changes(session.connection()?, noted);
        let late = StoreError::TimedOut { reason: "no answer within 1 s" };
        match timeout(NOTE_TIMEOUT, reading).await.unwrap_or(Err(late)) {
            Ok((changes, snapshot)) => {
                // They are evidence only if they were read in the verified database.
                session.connection()?;
                self.database.note_changes(changes);
                self.state.noted = Some(snapshot);
                Ok(())
            }
            Err(error) if error.may_be_outage() => Err(error),
            Err(_) => Ok(()),
        }
    }

    async fn read_each_outdated_table(&mut self, session: &mut Session) -> Result<(), StoreError> {
        let mut outcome = Ok(());
        if self.state.outdated.len() == Table::ALL.len() {
            match within(callers::load(session.connection()?)).await {
                Ok(access) => {
                    self.report(Table::Callers, &access.callers.unusable);
                    self.report(Table::Credentials, &access.credentials.unusable);
                    self.report(Table::Grants, &access.grants.unusable);
                    let AccessState { tables, changed, .. } = &mut self.state;
                    *changed |= replace(&mut tables.callers, access.callers.rows);
                    *changed |= replace(&mut tables.credentials, access.credentials.rows);
                    *changed |= replace(&mut tables.grants, access.grants.rows);
                    self.state.outdated.clear();
                    self.state.withdrawn_rows.clear();
                }
                Err(error) => keep_first(&mut outcome, Err(error))?,
            }
        }
        for table in self.state.outdated.clone() {
            match self.read_table(session, table).await {
                Ok(differs) => {
                    self.state.changed |= differs;
                    self.state.outdated.remove(&table);
                    self.state.withdrawn_rows.remove(&table);
                }
                Err(error) => keep_first(&mut outcome, Err(error))?,
            }
        }
        outcome
    }

    /// Reads one table. Returns whether it differs from what was read before.
    async fn read_table(
        &mut self,
        session: &mut Session,
        table: Table,
    ) -> Result<bool, StoreError> {
        let connection = session.connection()?;
        match table {
            Table::Callers => {
                let read = within(callers::load_callers(connection)).await?;
                self.report(table, &read.unusable);
                Ok(replace(&mut self.state.tables.callers, read.rows))
            }
            Table::Credentials => {
                let read = within(callers::load_credentials(connection)).await?;
                self.report(table, &read.unusable);
                Ok(replace(&mut self.state.tables.credentials, read.rows))
            }
            Table::Grants => {
                let read = within(callers::load_grants(connection)).await?;
                self.report(table, &read.unusable);
                Ok(replace(&mut self.state.tables.grants, read.rows))
            }
        }
    }

    fn report(&self, table: Table, unusable: &[UnusableRow]) {
        self.health.replace_unusable(&[table.name()], unusable);
    }

    /// Takes accounts away from their callers that were disabled or deleted. If the table cannot be read, those
    /// are taken away of which `changes` says it.
    ///
    /// # Errors
    /// Returns the database's error; the rest of the accounts is looked at in the next call.
    async fn withdraw_accounts(&mut self, session: &mut Session) -> Result<(), StoreError> {
        let read = self.withdraw_changed_accounts(session).await;
        if read.is_ok() {
            self.state.withdrawn_accounts.clear();
        } else {
            self.loader.withdraw(&self.state.withdrawn_accounts);
        }
        read
    }

    async fn withdraw_changed_accounts(&mut self, session: &mut Session) -> Result<(), StoreError> {
        // Before the accounts are read: between that and taking them away, nothing may be waited for.
        if !self.state.changed_accounts.is_empty() {
            self.note_changes(session).await?;
        }
        while !self.state.changed_accounts.is_empty() {
            let batch: Vec<_> =
                self.state.changed_accounts.iter().copied().take(ACCOUNTS_BATCH).collect();
            let withdrawn = within(accounts::withdrawn(session.connection()?, &batch)).await?;
            self.loader.withdraw(&withdrawn);
            for id in batch {
                self.state.changed_accounts.remove(&id);
            }
        }
        Ok(())
    }
}

impl AccessState {
    /// Remembers what `changes` says was taken away, until the tables themselves were read.
    fn add_withdrawn(&mut self, withdrawn: Withdrawn) {
        let Withdrawn { disabled_accounts, deleted_accounts, callers, credentials, grants } =
            withdrawn;
        let account = |deleted| move |id| WithdrawnAccount { id, deleted };
        self.withdrawn_accounts.extend(disabled_accounts.into_iter().map(account(false)));
        self.withdrawn_accounts.extend(deleted_accounts.into_iter().map(account(true)));
        for (table, rows) in
            [(Table::Callers, callers), (Table::Credentials, credentials), (Table::Grants, grants)]
        {
            if !rows.is_empty() {
                self.withdrawn_rows.entry(table).or_default().extend(rows);
            }
        }
    }

    /// Leaves out the rows of tables that could not be read of which `changes` says that they were taken away.
    /// If such a row still gives access, for example because only the end of a grant was moved, it counts again
    /// once its table was read.
    fn withhold(&mut self) {
        let AccessTables { callers, credentials, grants } = &mut self.tables;
        for (table, rows) in &self.withdrawn_rows {
            self.changed |= match table {
                Table::Callers => remove(callers, |it| rows.contains(&it.id.0)),
                Table::Credentials => remove(credentials, |it| rows.contains(&it.id())),
                Table::Grants => remove(grants, |it| rows.contains(&it.id())),
            };
        }
    }
}

/// Removes the rows that `is_withdrawn` selects. Returns whether there were any.
fn remove<T>(known: &mut Vec<T>, is_withdrawn: impl Fn(&T) -> bool) -> bool {
    let before = known.len();
    known.retain(|row| !is_withdrawn(row));
    known.len() < before
}

/// Replaces `known` by `read`. Returns whether they differ.
fn replace<T: PartialEq>(known: &mut Vec<T>, read: Vec<T>) -> bool {
    let differs = *known != read;
    *known = read;
    differs
}
