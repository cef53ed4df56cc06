//! Checks that the database is still the one that the broker started with.

use std::time::Duration;

use tracing::warn;

use super::{
    POLL_INTERVAL,
    duty::{Duty, REPLACED},
};
use crate::store::{
    Session, StoreError,
    deployment::{self, DatabaseIdentity, IdentityCheck},
    within,
};

/// The duty that checks the database's identity. The broker stops if it is another one.
pub(super) struct IdentityWatch {
    pub(super) identity: DatabaseIdentity,
    /// The upstream that the database belongs to.
    pub(super) upstream: String,
    /// Whether the identity was found over this session.
    pub(super) found: bool,
}

impl Duty for IdentityWatch {
    const NAME: &'static str = "identity";
    const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

    async fn perform(&mut self, session: &mut Session) -> Result<(), StoreError> {
        match within(deployment::check(session.connection()?, &self.identity)).await? {
            IdentityCheck::Same => {
                self.found = true;
                Ok(())
            }
            // A session leads to one database all its life, and this is still the same session.
            IdentityCheck::Missing if self.found => {
                let connection = session.connection()?;
                within(deployment::restore_identity(connection, &self.identity, &self.upstream))
                    .await?;
                warn!("the row of the table `deployment` was deleted; it is restored");
                Ok(())
            }
            IdentityCheck::Missing | IdentityCheck::Different => Err(REPLACED),
        }
    }

    fn forget(&mut self) {
        self.found = false;
    }

    fn pause(&self) -> Duration {
        POLL_INTERVAL
    }
}
