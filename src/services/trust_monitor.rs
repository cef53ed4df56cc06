//! Watches what a broker must be able to trust in its database: the published intake key, to which admins seal
//! client secrets, must be one of its own, and nobody but the owner of the tables may create functions in the
//! schema.
//!
//! The start refuses a database that fails this. While the broker runs, a failure is logged and makes it not
//! ready: it may be that somebody collects the secrets that admins enter.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use sqlx::PgPool;
use thiserror::Error;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::{
    crypto::{Keyring, LiveKeyring},
    store::{
        StoreError,
        intake_keys::{self, PublishedKey},
        schema_trust, within,
    },
};

/// The pause between two checks.
const INTERVAL: Duration = Duration::from_secs(2);

/// Why secrets that admins seal to the published key would not be for this broker. No message holds more than the
/// ids of keys.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum IntakeKeyFault {
    /// No key is published, so that the command line cannot seal secrets.
    #[error(
        "no intake key is published: run `token-broker keys publish` as the owner of the tables"
    )]
    NonePublished,
    /// The keyring does not have a published key.
    #[error(
        "the published intake key {0} is not in the keyring, so secrets would be sealed for somebody else: if \
         this keyring is the right one, run `token-broker keys publish` as the owner of the tables"
    )]
    NotInKeyring(String),
    /// The keyring has another key of the published id.
    #[error(
        "the published intake key {0} differs from the keyring's key of that id, so secrets would be sealed for \
         somebody else: if this keyring is the right one, run `token-broker keys publish` as the owner of the \
         tables"
    )]
    Altered(String),
}

/// Checks that each key of the table `intake_keys` is in `keyring`, and that one of them is the primary.
///
/// During a rotation the replicas' keyrings may differ in which key is primary, so any key of the keyring is
/// accepted.
///
/// # Errors
/// Returns the first fault.
pub fn check_published(
    keyring: &Keyring,
    published: &[PublishedKey],
) -> Result<(), IntakeKeyFault> {
    let ours = keyring.intake_publics();
    for key in published {
        match ours.iter().find(|our| our.key_id().as_str() == key.key_id) {
            None => return Err(IntakeKeyFault::NotInKeyring(key.key_id.clone())),
            Some(our) if our.bytes() != key.public_key => {
                return Err(IntakeKeyFault::Altered(key.key_id.clone()));
            }
            Some(_) => {}
        }
    }
    if published.iter().any(|key| key.is_primary) {
        Ok(())
    } else {
        Err(IntakeKeyFault::NonePublished)
    }
}

/// What the last check found. Cheap to clone; all clones share it.
#[derive(Clone, Debug, Default)]
pub struct Trust(Arc<Mutex<Found>>);

#[derive(Debug, Default)]
struct Found {
    fault: Option<String>,
    published: Vec<PublishedKey>,
}

impl Trust {
    /// Returns what is wrong; `None` if nothing is, or nothing was checked yet.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        self.0.lock().fault.clone()
    }

    /// Returns the published intake keys, as they were read last.
    #[must_use]
    pub fn published(&self) -> Vec<PublishedKey> {
        self.0.lock().published.clone()
    }

    /// Stores the result of a check, and logs it if it changed.
    fn set(&self, fault: Option<String>) {
        let last = &mut self.0.lock().fault;
        if *last == fault {
            return;
        }
        if let Some(fault) = &fault {
            error!(%fault, "the database cannot be trusted; this broker is not ready");
        } else {
            info!("the database can be trusted again");
        }
        *last = fault;
    }
}

/// The task that repeats the check.
pub struct TrustMonitor {
    /// The pool for its statements.
    pub pool: PgPool,
    /// The keyring with the intake keys of this broker.
    pub keyring: Arc<LiveKeyring>,
    /// Receives the result.
    pub trust: Trust,
}

impl TrustMonitor {
    /// Checks every two seconds until `stop` is cancelled. While the database does not answer, refuses the
    /// login, or another transaction has locked a table, the last result stands: nobody has changed what is
    /// published then, as far as is known. If only the checks are refused, somebody may hide a change.
    pub async fn run(self, stop: CancellationToken) {
        loop {
            match within(self.check()).await {
                Ok(fault) => self.trust.set(fault),
                Err(
                    error @ (StoreError::MissingPrivilege(_)
                    | StoreError::UndefinedTable(_)
                    | StoreError::UnreadableRow { .. }
                    | StoreError::UnreadableColumn { .. }),
                ) => self.trust.set(Some(format!("it cannot be checked: {error}"))),
                Err(_) => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(INTERVAL) => {}
            }
        }
    }

    async fn check(&self) -> Result<Option<String>, StoreError> {
        let published = intake_keys::published(&self.pool).await?;
        self.trust.0.lock().published.clone_from(&published);
        if let Err(fault) = check_published(&self.keyring.current(), &published) {
            return Ok(Some(fault.to_string()));
        }
        let mut connection = self.pool.acquire().await?;
        let faults = schema_trust::faults(&mut connection).await?;
        Ok((!faults.is_empty()).then(|| StoreError::UnsafeSchema(faults).to_string()))
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn keyring() -> Keyring {
        Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap()
    }

    fn published(keyring: &Keyring, is_primary: bool) -> PublishedKey {
        let key = keyring.intake_public();
        PublishedKey {
            key_id: key.key_id().to_string(),
            public_key: key.bytes().to_vec(),
            is_primary,
        }
    }

    #[test]
    fn only_keys_of_the_keyring_may_be_published_and_one_must_be_primary() {
        let (ours, theirs) = (keyring(), keyring());
        let (our, their) = (published(&ours, true), published(&theirs, true));
        let id = |key: &PublishedKey| key.key_id.clone();
        let check = |keys: &[PublishedKey]| check_published(&ours, keys);
        assert_eq!(check(std::slice::from_ref(&our)), Ok(()));
        assert_eq!(check(&[]), Err(IntakeKeyFault::NonePublished));
        assert_eq!(check(&[published(&ours, false)]), Err(IntakeKeyFault::NonePublished));
        let foreign = Err(IntakeKeyFault::NotInKeyring(id(&their)));
        assert_eq!(check(std::slice::from_ref(&their)), foreign);
        assert_eq!(check(&[our.clone(), their.clone()]), foreign);
        assert_eq!(check(&[our.clone(), published(&theirs, false)]), foreign);
        for bytes in [their.public_key, vec![], our.public_key[..31].to_vec()] {
            let altered = PublishedKey { public_key: bytes, ..our.clone() };
            assert_eq!(check(&[altered]), Err(IntakeKeyFault::Altered(id(&our))));
        }
    }
}
