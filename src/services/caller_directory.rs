//! Who calls: the callers by what they show, swapped whole when anything changes.

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
        caller::Caller,
        clock::{Timestamp, delta},
    },
    store::callers::{CallerCredential, CredentialKey},
};

/// All credentials of all callers, and when they were last known to be true.
#[derive(Debug)]
pub struct CallerDirectory {
    index: ArcSwap<HashMap<CredentialKey, CallerCredential>>,
    changed: watch::Sender<()>,
    confirmed_ms: AtomicI64,
}

/// Why a credential that is known is refused all the same.
#[derive(Clone, Debug)]
pub struct Refused {
    /// Whose it is, for the audit log alone.
    pub caller: Arc<Caller>,
    /// Why, for the audit log alone: callers hear the same as for an unknown one.
    pub why: &'static str,
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
    /// Replaces everything with `credentials`.
    pub fn replace(&self, credentials: Vec<CallerCredential>) {
        let index = credentials
            .into_iter()
            .map(|credential| (credential.proof.clone(), credential))
            .collect::<HashMap<_, _>>();
        self.index.store(Arc::new(index));
        self.changed.send_replace(());
    }

    /// Notes that the database confirmed the present content at `now`.
    pub fn confirm(&self, now: Timestamp) {
        self.confirmed_ms.store(now.timestamp_millis(), Ordering::Relaxed);
    }

    /// Whether the content was confirmed within `staleness` before `now`.
    #[must_use]
    pub fn is_current(&self, now: Timestamp, staleness: Duration) -> bool {
        (now - delta(staleness)).timestamp_millis() <= self.confirmed_ms.load(Ordering::Relaxed)
    }

    /// Wakes whenever the content has changed.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The caller who shows `proof` at `now`.
    ///
    /// The lookup of a bearer is by its hash, and hashes are compared in constant time: what its timing tells
    /// is about hashes, from which no bearer can be made.
    ///
    /// # Errors
    /// `None` for an unknown proof; [`Refused`] for one that has ended or was revoked, or whose caller is
    /// disabled.
    pub fn by_proof(
        &self,
        proof: &CredentialKey,
        now: Timestamp,
    ) -> Result<Arc<Caller>, Option<Refused>> {
        let index = self.index.load();
        admit(index.get(proof).ok_or(None)?, now)
    }
}

fn admit(credential: &CallerCredential, now: Timestamp) -> Result<Arc<Caller>, Option<Refused>> {
    let caller = &credential.caller;
    let refused = |why| Some(Refused { caller: caller.clone(), why });
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
    use crate::domain::caller::CallerId;

    const PROOF: CredentialKey = CredentialKey::BearerSha256([7; 32]);

    fn directory(enabled: bool, ends_at: Option<Timestamp>) -> CallerDirectory {
        let caller = Arc::new(Caller {
            id: CallerId(1),
            name: "demo".into(),
            enabled,
            rate_limit: None,
            grants: vec![],
        });
        let directory = CallerDirectory::default();
        directory.replace(vec![CallerCredential { caller, proof: PROOF, ends_at, revoked: false }]);
        directory
    }

    #[test]
    fn a_bearer_is_known_by_its_hash_until_its_end() {
        let now = DateTime::UNIX_EPOCH;
        let end = now + TimeDelta::seconds(1);
        let directory = directory(true, Some(end));
        assert!(directory.by_proof(&PROOF, now).is_ok());
        assert!(matches!(
            directory.by_proof(&CredentialKey::BearerSha256([8; 32]), now),
            Err(None)
        ));
        assert!(matches!(directory.by_proof(&PROOF, end), Err(Some(_))));
    }

    #[test]
    fn a_revoked_credential_is_refused_and_named_for_the_audit() {
        let directory = directory(true, None);
        let mut revoked = directory.index.load()[&PROOF].clone();
        revoked.revoked = true;
        directory.replace(vec![revoked]);
        let refused = directory.by_proof(&PROOF, DateTime::UNIX_EPOCH).unwrap_err().unwrap();
        assert_eq!((&*refused.caller.name, refused.why), ("demo", "credential revoked"));
    }

    #[test]
    fn a_disabled_caller_is_refused_and_named_for_the_audit() {
        let refused = directory(false, None).by_proof(&PROOF, DateTime::UNIX_EPOCH).unwrap_err();
        assert_eq!(&*refused.unwrap().caller.name, "demo");
    }

    #[test]
    fn what_was_never_confirmed_is_not_current() {
        let (now, day) = (DateTime::UNIX_EPOCH + TimeDelta::days(9), Duration::from_hours(24));
        let directory = directory(true, None);
        assert!(!directory.is_current(now, day));
        directory.confirm(now - TimeDelta::hours(24));
        assert!(directory.is_current(now, day));
        assert!(!directory.is_current(now + TimeDelta::seconds(1), day));
    }
}
