//! Compares all accounts in the database with those that were loaded, as a safety net: rows that were
//! written while the triggers were disabled are not announced. It also inserts rows that the broker needs and
//! somebody deleted.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::{debug, warn};

use super::{duty::Duty, reload_pause};
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
    /// How long the last comparison took.
    pub(super) took: Duration,
}

impl Duty for Comparison {
    const NAME: &'static str = "comparison";
    const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

    async fn perform(&mut self, session: &mut Session) -> Result<(), StoreError> {
        let began = Instant::now();
        let result = self.compare(session).await;
        self.took = began.elapsed();
        result
    }

    fn pause(&self) -> Duration {
        reload_pause(self.took)
    }
}

impl Comparison {
    async fn compare(&self, session: &mut Session) -> Result<(), StoreError> {
        if within(leases::insert_missing_pace(session.connection()?)).await? {
            warn!("the row of the table `upstream_pace` was deleted; it is inserted again");
        }
        let mut after = i64::MIN;
        loop {
            let page = within(accounts::versions_after(session.connection()?, after)).await?;
            self.insert_missing_refreshes(session, &page).await?;
            let outdated = self.loader.outdated(after, &page);
            if !outdated.is_empty() {
                debug!(accounts = outdated.len(), "accounts differ from what was loaded");
                self.loader.load_over(session.connection()?, &outdated).await?;
                outdated.iter().for_each(|id| self.refresh.wake(AccountId(*id)));
            }
            let Some(last) = page.last() else { return Ok(()) };
            after = last.id;
        }
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
        self.loader.load_over(session.connection()?, &lacking).await?;
        lacking.iter().for_each(|id| self.refresh.wake(AccountId(*id)));
        Ok(())
    }
}
