//! The callers of the service, looked up by the credential that they present.
//!
//! The whole index is replaced whenever a caller, credential or grant changes, so that lookups take no lock.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::{
    domain::{
        caller::{Caller, CallerId},
        clock::{Timestamp, delta},
    },
    store::callers::{CallerCredential, CredentialKey},
};

/// The credentials of all callers, and when the database last confirmed that they are up to date.
#[derive(Debug)]
pub struct CallerDirectory {
    index: ArcSwap<HashMap<CredentialKey, CallerCredential>>,
    changed: watch::Sender<()>,
    /// Milliseconds since the Unix epoch.
    confirmed_ms: AtomicI64,
}

/// A credential that is registered but not accepted. The details are for the audit log only: the caller gets
/// the same answer as for an unknown credential.
#[derive(Clone, Debug)]
pub struct RefusedCredential {
    /// The caller to whom the credential belongs.
    pub caller: Arc<Caller>,
    /// The reason, such as `credential revoked`.
    pub reason: &'static str,
}

impl Default for CallerDirectory {
    fn default() -> Self {
        Self {
            index: ArcSwap::default(),
            changed: watch::Sender::new(()),
            confirmed_ms: AtomicI64::new(i64::MIN),
        }
    }
}

impl CallerDirectory {
    /// Replaces all credentials. If several have the same key, the last one is used.
    ///
    /// A caller that is as it was stays the same [`Arc`], so that each stream sees by its address whether its own
    /// caller has changed.
    pub fn replace(&self, credentials: Vec<CallerCredential>) {
        let before = self.index.load();
        let known: HashMap<CallerId, &Arc<Caller>> =
            before.values().map(|known| (known.caller.id, &known.caller)).collect();
        let index = credentials
            .into_iter()
            .map(|mut credential| {
                let known = known.get(&credential.caller.id);
                if let Some(&unchanged) = known.filter(|known| ***known == credential.caller) {
                    credential.caller = unchanged.clone();
                }
                (credential.key.clone(), credential)
            })
            .collect::<HashMap<_, _>>();
        self.index.store(Arc::new(index));
        self.changed.send_replace(());
    }

    /// Stores that the credentials were up to date at `now`.
    pub fn confirm(&self, now: Timestamp) {
        self.confirmed_ms.store(now.timestamp_millis(), Ordering::Relaxed);
    }

    /// Returns whether the credentials were confirmed within the last `staleness` before `now`.
    #[must_use]
    pub fn is_current(&self, now: Timestamp, staleness: Duration) -> bool {
        (now - delta(staleness)).timestamp_millis() <= self.confirmed_ms.load(Ordering::Relaxed)
    }

    /// Returns a receiver that is notified whenever the credentials are replaced.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Returns the caller to whom the credential `key` belongs, if it is accepted at `now`.
    ///
    /// Bearers are looked up by their SHA-256, and the hashes are compared in constant time. The time of a
    /// lookup may reveal something about stored hashes, but no bearer can be derived from a hash.
    ///
    /// # Errors
    /// Returns `None` for an unknown key, and [`RefusedCredential`] for a credential that has ended or was
    /// revoked, or whose caller is disabled.
    pub fn authenticate(
        &self,
        key: &CredentialKey,
        now: Timestamp,
    ) -> Result<Arc<Caller>, Option<RefusedCredential>> {
        let index = self.index.load();
        accept(index.get(key).ok_or(None)?, now)
    }
}

fn accept(
    credential: &CallerCredential,
    now: Timestamp,
) -> Result<Arc<Caller>, Option<RefusedCredential>> {
    let caller = &credential.caller;
    let refused = |reason| Some(RefusedCredential { caller: caller.clone(), reason });
    if !caller.enabled {
        return Err(refused("caller disabled"));
    }
    if credential.revoked {
        return Err(refused("credential revoked"));
    }
    if credential.ends_at.is_some_and(|end| end <= now) {
        return Err(refused("credential ended"));
    }
    Ok(caller.clone())
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;

    const KEY: CredentialKey = CredentialKey::BearerSha256([7; 32]);

    fn directory(enabled: bool, ends_at: Option<Timestamp>) -> CallerDirectory {
        let caller = Arc::new(Caller {
            id: CallerId(1),
            name: "demo".into(),
            enabled,
            rate_limit: None,
            grants: vec![],
        });
        let directory = CallerDirectory::default();
        directory.replace(vec![CallerCredential { caller, key: KEY, ends_at, revoked: false }]);
        directory
    }

    #[test]
    fn a_bearer_is_accepted_by_its_hash_until_its_end() {
        let now = DateTime::UNIX_EPOCH;
        let end = now + TimeDelta::seconds(1);
        let directory = directory(true, Some(end));
        assert!(directory.authenticate(&KEY, now).is_ok());
        assert!(matches!(
            directory.authenticate(&CredentialKey::BearerSha256([8; 32]), now),
            Err(None)
        ));
        assert!(matches!(directory.authenticate(&KEY, end), Err(Some(_))));
    }

    #[test]
    fn a_revoked_credential_is_refused_and_its_caller_is_named() {
        let directory = directory(true, None);
        let mut revoked = directory.index.load()[&KEY].clone();
        revoked.revoked = true;
        directory.replace(vec![revoked]);
        let refused = directory.authenticate(&KEY, DateTime::UNIX_EPOCH).unwrap_err().unwrap();
        assert_eq!((&*refused.caller.name, refused.reason), ("demo", "credential revoked"));
    }

    #[test]
    fn a_caller_stays_the_same_until_it_changes_itself() {
        let directory = directory(true, None);
        let current = || directory.authenticate(&KEY, DateTime::UNIX_EPOCH).unwrap();
        let before = current();
        let replace = |caller: Caller| {
            let caller = Arc::new(caller);
            let other = Arc::new(Caller { id: CallerId(2), ..(*caller).clone() });
            let credential =
                |caller, key| CallerCredential { caller, key, ends_at: None, revoked: false };
            let other = credential(other, CredentialKey::BearerSha256([8; 32]));
            directory.replace(vec![credential(caller, KEY), other]);
        };
        replace((*before).clone());
        assert!(Arc::ptr_eq(&before, &current()));
        replace(Caller { rate_limit: Some(7), ..(*before).clone() });
        assert!(!Arc::ptr_eq(&before, &current()));
        assert_eq!(current().rate_limit, Some(7));
    }

    #[test]
    fn a_disabled_caller_is_refused_and_named() {
        let refused = directory(false, None).authenticate(&KEY, DateTime::UNIX_EPOCH).unwrap_err();
        assert_eq!(&*refused.unwrap().caller.name, "demo");
    }

    #[test]
    fn credentials_that_were_never_or_long_ago_confirmed_are_not_current() {
        let (now, day) = (DateTime::UNIX_EPOCH + TimeDelta::days(9), Duration::from_hours(24));
        let directory = directory(true, None);
        assert!(!directory.is_current(now, day));
        directory.confirm(now - TimeDelta::hours(24));
        assert!(directory.is_current(now, day));
        assert!(!directory.is_current(now + TimeDelta::seconds(1), day));
    }
}
