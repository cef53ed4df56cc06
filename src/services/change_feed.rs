//! Follows what admins and other replicas commit to the database.
//!
//! The feed consists of [duties](duty::Duty) that are independent of each other: each is a task with a session
//! and a pace of its own, and one that fails or waits for a lock does not delay the others. Notifications of
//! the database start their next step at once. Once a session is lost, its duty reads everything anew: what
//! was read before proves nothing about the server that answers then.
//!
//! | duty | what it does |
//! |---|---|
//! | [`access`] | loads callers, credentials and grants, and takes disabled and deleted accounts away; reports to [`DatabaseConnectivity`] whether the database answers |
//! | [`accounts`] | loads the accounts that have changed, and asks the refresher to reschedule them |
//! | [`comparison`] | finds changes that were not announced, and inserts rows that are missing |
//! | [`intake`] | seals client secrets that admins have written |
//! | [`recording`] | writes the changes into the audit journal |
//! | [`identity`] | stops the broker if the database was replaced by another one |

mod access;
mod accounts;
mod comparison;
mod duty;
mod identity;
mod intake;
mod recording;

use std::{sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::{
    access::{AccessFollower, AccessState},
    accounts::AccountFollower,
    comparison::Comparison,
    duty::{Duty, DutyContext, RepeatedDuty},
    identity::IdentityWatch,
    intake::{IntakeSealer, Refused},
    recording::{ChangeRecorder, Reclaim},
};
use crate::{
    audit::journal::Journal,
    crypto::LiveKeyring,
    domain::clock::Clock,
    services::{
        account_cache::AccountCache, account_loader::AccountLoader,
        caller_directory::CallerDirectory, connectivity::DatabaseConnectivity,
        feed_health::FeedHealth, refresher::RefreshTrigger,
    },
    store::{
        Database, StoreError, changes::ChangeListener, deployment::DatabaseIdentity, leases, within,
    },
};

/// The pause before a lost listening connection is opened again.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);
/// The task that follows the database, with its dependencies.
pub struct ChangeFeed {
    /// The id of this instance, which claims changes for its journal.
    pub instance: String,
    /// The options for the sessions of the duties.
    pub database: Database,
    /// The identity that the database must keep.
    pub database_identity: DatabaseIdentity,
    /// The upstream that the database belongs to.
    pub upstream: String,
    /// The pool for the statements of the start.
    pub pool: PgPool,
    /// Opens values that `account seal` has sealed, and seals secrets for their rows.
    pub keyring: Arc<LiveKeyring>,
    /// Loads changed accounts into the cache.
    pub loader: Arc<AccountLoader>,
    /// The accounts that are loaded.
    pub cache: Arc<AccountCache>,
    /// The callers, which the feed replaces.
    pub directory: Arc<CallerDirectory>,
    /// Receives the failing duties and the unusable rows.
    pub health: Arc<FeedHealth>,
    /// Receives whether the database answers.
    pub connectivity: Arc<DatabaseConnectivity>,
    /// Asks the refresher to reschedule a changed account.
    pub refresh: RefreshTrigger,
    /// The audit journal, in which changes are recorded.
    pub journal: Journal,
    /// The clock by which callers are confirmed.
    pub clock: Clock,
}

/// The duties that the start has performed once: those that load what calls are answered from, and the one
/// that seals the secrets without which no token can be issued.
pub struct LoadedDuties {
    access: RepeatedDuty<AccessFollower>,
    intake: RepeatedDuty<IntakeSealer>,
    accounts: RepeatedDuty<AccountFollower>,
}

impl ChangeFeed {
    /// Loads all callers and accounts, in the way in which [`Self::run`] loads them after a lost session. It
    /// must complete before calls are served.
    ///
    /// # Errors
    /// Returns the database's error. [`StoreError::is_unavailable`] says whether to call this again, for
    /// example since a table is locked.
    pub async fn start(&self) -> Result<LoadedDuties, StoreError> {
        let mut access = self.duty(self.access_follower());
        access.perform().await?;
        self.release_leases().await?;
        let mut intake = self.duty(self.intake_sealer());
        // A secret that cannot be sealed yet does not hold up the start.
        if let Err(error) = intake.perform().await
            && error.may_be_outage()
        {
            return Err(error);
        }
        let mut accounts = self.duty(self.account_follower());
        accounts.perform().await?;
        info!(accounts = self.cache.len(), "accounts and callers are loaded");
        Ok(LoadedDuties { access, intake, accounts })
    }

    /// Releases the leases of earlier processes of this instance. Only one process at a time can lock the
    /// state directory that the instance belongs to, so their leases have no holder.
    async fn release_leases(&self) -> Result<(), StoreError> {
        match within(leases::release_all(&self.pool, &self.instance)).await {
            Err(error) if error.is_delayed() => {
                warn!(%error, "the leases of an earlier process are not released, and run out");
                Ok(())
            }
            released => released,
        }
    }

    /// Follows the database until `stop` is cancelled. Returns earlier only if the database was replaced by
    /// another one, or a task panicked; the broker must then stop.
    pub async fn run(self, loaded: LoadedDuties, stop: CancellationToken) {
        let (notified, never) = (watch::Sender::new(()), watch::Sender::new(()));
        let mut duties = JoinSet::new();
        let LoadedDuties { access, intake, accounts } = loaded;
        duties.spawn(access.run(notified.subscribe()));
        duties.spawn(accounts.run(notified.subscribe()));
        duties.spawn(intake.run(notified.subscribe()));
        duties.spawn(self.duty(self.change_recorder()).run(notified.subscribe()));
        // These two find what is not announced.
        duties.spawn(self.duty(self.comparison()).run(never.subscribe()));
        duties.spawn(self.duty(self.identity_watch()).run(never.subscribe()));
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.listen(&notified) => {}
            Some(ended) = duties.join_next() => {
                if let Err(error) = ended {
                    error!(%error, "a duty of the change feed panicked");
                }
            }
        }
        duties.shutdown().await;
    }

    fn duty<D: Duty>(&self, duty: D) -> RepeatedDuty<D> {
        let context = DutyContext {
            database: self.database.clone(),
            identity: self.database_identity.clone(),
            health: self.health.clone(),
        };
        RepeatedDuty::new(duty, context)
    }

    fn access_follower(&self) -> AccessFollower {
        AccessFollower {
            database: self.database.clone(),
            directory: self.directory.clone(),
            loader: self.loader.clone(),
            cache: self.cache.clone(),
            connectivity: self.connectivity.clone(),
            health: self.health.clone(),
            clock: self.clock.clone(),
            state: AccessState::default(),
        }
    }

    fn account_follower(&self) -> AccountFollower {
        AccountFollower {
            cache: self.cache.clone(),
            loader: self.loader.clone(),
            refresh: self.refresh.clone(),
            followed: None,
        }
    }

    fn intake_sealer(&self) -> IntakeSealer {
        IntakeSealer {
            keyring: self.keyring.clone(),
            health: self.health.clone(),
            refused: Refused::default(),
        }
    }

    fn change_recorder(&self) -> ChangeRecorder {
        ChangeRecorder {
            instance: self.instance.clone(),
            journal: self.journal.clone(),
            clock: self.clock.clone(),
            // An earlier process may have claimed changes and ended before it had recorded them.
            reclaim: Reclaim::AfterDelivery(0),
        }
    }

    fn comparison(&self) -> Comparison {
        Comparison {
            loader: self.loader.clone(),
            refresh: self.refresh.clone(),
            took: Duration::ZERO,
            waited: Duration::ZERO,
        }
    }

    fn identity_watch(&self) -> IdentityWatch {
        IdentityWatch {
            identity: self.database_identity.clone(),
            upstream: self.upstream.clone(),
            found: false,
        }
    }

    /// Forwards notifications of the database to `notified`. Never returns.
    async fn listen(&self, notified: &watch::Sender<()>) {
        loop {
            if let Ok(mut listener) = ChangeListener::connect(&self.database).await {
                // Notifications were lost while there was no connection, so poll once.
                notified.send_replace(());
                while listener.wait().await.is_ok() {
                    notified.send_replace(());
                }
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }
}
