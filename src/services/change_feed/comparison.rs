//! Compares all accounts in the database with those that were loaded, as a safety net: rows that were
//! written while the triggers were disabled are not announced. It also inserts rows that the broker needs and
//! somebody deleted.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::{debug, warn};

use super::duty::{Duty, keep_first, reload_pause};
use crate::{
    domain::account::AccountId,
    services::{account_loader::AccountLoader, refresher::RefreshTrigger},
    store::{
        Session, StoreError,
        accounts::{self, AccountVersion},
        leases, within,
    },
};

/// The duty that compares accounts.
pub(super) struct Comparison {
    pub(super) loader: Arc<AccountLoader>,
    pub(super) refresh: RefreshTrigger,
    /// How long the last comparison took, without the time for which it waited for locks in vain.
    pub(super) took: Duration,
    /// How long the last comparison waited for locks in vain.
    pub(super) waited: Duration,
}

impl Duty for Comparison {
    const NAME: &'static str = "comparison";
    const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

    async fn perform(&mut self, session: &mut Session) -> Result<(), StoreError> {
        let began = Instant::now();
        self.waited = Duration::ZERO;
        let result = self.compare(session).await;
        self.took = began.elapsed().saturating_sub(self.waited);
        result
    }

    fn pause(&self) -> Duration {
        reload_pause(self.took)
    }
}

impl Comparison {
    async fn compare(&mut self, session: &mut Session) -> Result<(), StoreError> {
        // The steps that write may lack a privilege or wait for a lock. What was disabled is found all the same.
        let mut outcome = Ok(());
        let began = Instant::now();
        let inserted = self.insert_missing_pace(session).await;
        self.note_wait(began, &inserted);
        keep_first(&mut outcome, inserted)?;
        let mut after = i64::MIN;
        loop {
            let began = Instant::now();
            let page = within(accounts::versions_after(session.connection()?, after)).await;
            self.note_wait(began, &page);
            let page = page?;
            let began = Instant::now();
            let inserted = self.insert_missing_refreshes(session, &page).await;
            self.note_wait(began, &inserted);
            keep_first(&mut outcome, inserted)?;
            let outdated = self.loader.outdated(after, &page);
            if !outdated.is_empty() {
                debug!(accounts = outdated.len(), "accounts differ from what was loaded");
                let began = Instant::now();
                let loaded = self.load(session, outdated).await;
                self.note_wait(began, &loaded);
                keep_first(&mut outcome, loaded)?;
            }
            let Some(last) = page.last() else { return outcome };
            after = last.id;
        }
    }

    /// Notes the time since `began` if the step waited for a lock that it did not get.
    fn note_wait<T>(&mut self, began: Instant, result: &Result<T, StoreError>) {
        if result.as_ref().is_err_and(StoreError::is_delayed) {
            self.waited += began.elapsed();
        }
    }

    async fn load(&self, session: &mut Session, ids: Vec<i64>) -> Result<(), StoreError> {
        self.loader.load_over(session, &ids).await?;
        for id in ids {
            self.refresh.wake(AccountId(id));
        }
        Ok(())
    }

    async fn insert_missing_pace(&self, session: &mut Session) -> Result<(), StoreError> {
        if within(leases::insert_missing_pace(session.connection()?)).await? {
            warn!("the row of the table `upstream_pace` was deleted; it is inserted again");
        }
        Ok(())
    }

    async fn insert_missing_refreshes(
        &self,
        session: &mut Session,
        page: &[AccountVersion],
    ) -> Result<(), StoreError> {
        let lacking = page.iter().filter(|account| account.lacks_refresh_state);
        let lacking: Vec<_> = lacking.map(|account| account.id).collect();
        if lacking.is_empty() {
            return Ok(());
        }
        let inserted =
            within(accounts::insert_missing_refreshes(session.connection()?, &lacking)).await?;
        warn!(accounts = inserted, "accounts without a row in `refreshes` were given one");
        self.load(session, lacking).await
    }
}
