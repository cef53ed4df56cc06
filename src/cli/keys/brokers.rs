//! What the running brokers say about keys.

use std::time::Duration;

use anyhow::bail;
use tokio::time::{Instant, sleep};

use crate::{
    crypto::KeyId,
    store::{
        StoreError,
        admin::{Admin, InstanceSummary},
    },
};

/// How long a command waits for the brokers to load a file that has just changed, and to say so.
const LOADING_TIME: Duration = Duration::from_secs(5);
/// The pause before the brokers' heartbeats are read again.
const PAUSE: Duration = Duration::from_millis(500);

/// What a command needs of every running broker.
pub(super) enum Need<'a> {
    /// It has loaded the key.
    Loaded(&'a KeyId),
    /// It makes values with the key.
    Used(&'a KeyId),
    /// It neither makes values with the key nor holds any that need it.
    NotUsed(&'a KeyId),
}

impl Need<'_> {
    /// # Errors
    /// Returns which of `instances` do not meet the need.
    fn check(&self, instances: &[InstanceSummary]) -> Result<(), String> {
        let has = |ids: &[String], id: &KeyId| ids.iter().any(|it| it == id.as_str());
        let is_met = |it: &InstanceSummary| match self {
            Self::Loaded(id) => has(&it.key_ids, id),
            Self::Used(id) => it.used_key_ids.as_ref().is_some_and(|used| has(used, id)),
            // A broker that does not say what it uses may use any key.
            Self::NotUsed(id) => it.used_key_ids.as_ref().is_some_and(|used| !has(used, id)),
        };
        let others: Vec<&str> =
            instances.iter().filter(|it| !is_met(it)).map(|it| it.id.as_str()).collect();
        if others.is_empty() {
            return Ok(());
        }
        let (count, all, names) = (others.len(), instances.len(), others.join(", "));
        Err(match self {
            Self::Loaded(id) => format!(
                "{count} of {all} running brokers have not loaded {id}, and could not open what is sealed with it \
                 ({names}): give them the keyring first"
            ),
            Self::Used(id) => format!(
                "{count} of {all} running brokers still seal with another key than {id} ({names}): give them the \
                 keyring in which it is primary, and run this again afterwards"
            ),
            Self::NotUsed(id) => format!(
                "{count} of {all} running brokers still use {id} ({names}): give them the keyring in which another \
                 key is primary, and try again after a minute"
            ),
        })
    }
}

/// Waits for a moment until every running broker meets `need`.
///
/// # Errors
/// When one does not, or the database does not answer.
pub(super) async fn until_met(admin: &Admin, need: &Need<'_>) -> anyhow::Result<()> {
    match unmet(admin, need).await? {
        Some(others) => bail!(others),
        None => Ok(()),
    }
}

/// Waits for a moment until every running broker meets `need`. Returns which do not.
async fn unmet(admin: &Admin, need: &Need<'_>) -> Result<Option<String>, StoreError> {
    let until = Instant::now() + LOADING_TIME;
    loop {
        match need.check(&live_instances(admin).await?) {
            Ok(()) => return Ok(None),
            Err(_) if Instant::now() < until => sleep(PAUSE).await,
            Err(others) => return Ok(Some(others)),
        }
    }
}

/// Waits for a moment until every running broker has loaded the key `id`, which `--force` makes unnecessary.
///
/// # Errors
/// As [`until_met`].
pub(super) async fn until_loaded(admin: &Admin, id: &KeyId) -> anyhow::Result<()> {
    match unmet(admin, &Need::Loaded(id)).await? {
        Some(others) => bail!("{others}, or say --force"),
        None => Ok(()),
    }
}

/// Returns the brokers that have sent a heartbeat within the last minute.
pub(super) async fn live_instances(admin: &Admin) -> Result<Vec<InstanceSummary>, StoreError> {
    let mut instances = admin.instances().await?;
    instances.retain(|instance| instance.live);
    Ok(instances)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(id: &str, loaded: &[&str], used: Option<&[&str]>) -> InstanceSummary {
        let owned = |ids: &[&str]| ids.iter().map(|&id| id.to_owned()).collect();
        InstanceSummary {
            id: id.into(),
            version: String::new(),
            key_ids: owned(loaded),
            used_key_ids: used.map(owned),
            live: true,
        }
    }

    #[test]
    fn a_broker_that_lacks_or_uses_a_key_is_named() {
        let id: KeyId = "s2".parse().unwrap();
        let brokers = [
            instance("i-new", &["s1", "s2"], Some(&["s2"])),
            instance("i-old", &["s1"], Some(&["s1"])),
            instance("i-silent", &["s1", "s2"], None),
        ];
        let loaded = Need::Loaded(&id).check(&brokers).unwrap_err();
        assert!(loaded.contains("1 of 3") && loaded.contains("(i-old)"), "{loaded}");
        let used = Need::NotUsed(&id).check(&brokers).unwrap_err();
        assert!(used.contains("2 of 3") && used.contains("(i-new, i-silent)"), "{used}");
        let seals = Need::Used(&id).check(&brokers).unwrap_err();
        assert!(seals.contains("2 of 3") && seals.contains("(i-old, i-silent)"), "{seals}");
        assert_eq!(Need::Loaded(&id).check(&brokers[..1]), Ok(()));
        assert_eq!(Need::NotUsed(&id).check(&brokers[1..2]), Ok(()));
        assert_eq!(Need::Loaded(&id).check(&[]), Ok(()), "no broker runs");
    }
}
