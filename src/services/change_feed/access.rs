//! Follows what takes access away or gives it: callers, their credentials and grants, and accounts that are
//! disabled or deleted.
//!
//! This comes before everything else, and needs nothing else: no other table than those that it reads. A
//! table that cannot be read, because another transaction has locked it, does not hinder the others. What
//! was read of it last still counts, and nobody else can have changed it meanwhile.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use super::duty::{Duty, POLL_INTERVAL, keep_first, reload_pause};
use crate::{
    domain::{caller::Caller, clock::Clock},
    services::{
        account_cache::AccountCache, account_loader::AccountLoader,
        caller_directory::CallerDirectory, connectivity::DatabaseConnectivity,
        feed_health::FeedHealth,
    },
    store::{
        Database, Session, StoreError, UnusableRow, accounts,
        callers::{self, CredentialRow, GrantRow},
        changes, within,
    },
};

/// The most accounts of which one statement finds out whether they were withdrawn.
const ACCOUNTS_BATCH: usize = 10_000;

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
        let read = self.read_each_outdated_table(session).await;
        // Also after an error: the next session compares with what was read, and would find no difference.
        if std::mem::take(&mut self.state.changed) {
            let AccessTables { callers, credentials, grants } = &self.state.tables;
            self.directory.replace(callers::assemble(callers, credentials, grants));
        }
        read
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
                }
                Err(error) => keep_first(&mut outcome, Err(error))?,
            }
        }
        for table in self.state.outdated.clone() {
            match self.read_table(session, table).await {
                Ok(differs) => {
                    self.state.changed |= differs;
                    self.state.outdated.remove(&table);
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

    /// Takes accounts away from their callers that were disabled or deleted.
    ///
    /// # Errors
    /// Returns the database's error; the rest of the accounts is looked at in the next call.
    async fn withdraw_accounts(&mut self, session: &mut Session) -> Result<(), StoreError> {
        let changed = &mut self.state.changed_accounts;
        while !changed.is_empty() {
            let batch: Vec<_> = changed.iter().copied().take(ACCOUNTS_BATCH).collect();
            let withdrawn = within(accounts::withdrawn(session.connection()?, &batch)).await?;
            self.loader.withdraw(&withdrawn);
            for id in batch {
                changed.remove(&id);
            }
        }
        Ok(())
    }
}

/// Replaces `known` by `read`. Returns whether they differ.
fn replace<T: PartialEq>(known: &mut Vec<T>, read: Vec<T>) -> bool {
    let differs = *known != read;
    *known = read;
    differs
}
