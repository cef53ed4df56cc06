//! Checks that the keyring is the one that sealed the stored secrets.

use std::collections::BTreeMap;

use thiserror::Error;
use tracing::error;

use crate::{
    crypto::{Keyring, SealError},
    store::accounts::SecretSample,
};

/// The most secrets that do not open which are named in the log.
const MAX_LOGGED: usize = 20;

/// The keyring is not the one that sealed most of the stored secrets: it lacks their keys, or its keys of these
/// names are others.
#[derive(Debug, Error)]
#[error("the keyring does not open the secret of account {account}, nor those of most others")]
pub struct WrongKeyring {
    /// The name of an account whose secret does not open.
    pub account: String,
    /// Why it does not open.
    #[source]
    pub error: SealError,
}

/// A stored secret that does not open, although the keyring is the right one.
#[derive(Debug)]
pub struct UnopenedSecret<'a> {
    /// The name of its account.
    pub account: &'a str,
    /// Why it does not open.
    pub error: SealError,
}

/// What is known of a key that stored secrets name.
struct SealingKey<'a> {
    /// How many secrets name it.
    secrets: i64,
    /// The first sample that does not open; `None` once one has opened.
    unopened: Option<(&'a SecretSample, SealError)>,
}

/// Checks `keyring` by opening `samples`, which are some stored secrets for each key that sealed any. Returns those
/// that do not open. They affect only their own accounts, whose next issue fails.
///
/// A secret that does not open does not show that the keyring is wrong: the broker's own login can store a value
/// that names any key. So the keyring is wrong only if it opens no secret of the keys of most of them.
///
/// # Errors
/// When more than half of all secrets name keys that the keyring lacks, or keys of which it opens no sample.
pub fn check_keyring<'a>(
    keyring: &Keyring,
    samples: &'a [SecretSample],
) -> Result<Vec<UnopenedSecret<'a>>, WrongKeyring> {
    let mut keys = BTreeMap::<_, SealingKey<'_>>::new();
    let mut faults = Vec::new();
    for stored in samples {
        let fault = keyring.open_secret(stored.id, stored.version, &stored.sealed).err();
        let fault_of = |error| UnopenedSecret { account: &stored.name, error };
        faults.extend(fault.clone().map(fault_of));
        // A value that names no key says nothing about any key.
        let Ok(key) = Keyring::sealed_with(&stored.sealed) else { continue };
        // The key opens the value unless it says otherwise. It is the right key even if the content is not a
        // secret.
        let unopened = fault
            .filter(|fault| matches!(fault, SealError::UnknownKey(_) | SealError::Forged))
            .map(|fault| (stored, fault));
        let known = keys.entry(key).or_insert_with(|| SealingKey {
            secrets: stored.secrets_of_key,
            unopened: unopened.clone(),
        });
        if unopened.is_none() {
            known.unopened = None;
        }
    }
    let all: i64 = keys.values().map(|key| key.secrets).sum();
    let unopened: i64 =
        keys.values().filter(|key| key.unopened.is_some()).map(|key| key.secrets).sum();
    let first = keys.into_values().find_map(|key| key.unopened);
    match first.filter(|_| unopened > all / 2) {
        Some((stored, error)) => Err(WrongKeyring { account: stored.name.clone(), error }),
        None => Ok(faults),
    }
}

/// Logs the secrets that do not open.
pub(super) fn log_unopened(unopened: &[UnopenedSecret<'_>]) {
    for UnopenedSecret { account, error } in unopened.iter().take(MAX_LOGGED) {
        error!(account, %error, "a stored secret does not open: set it again");
    }
    if unopened.len() > MAX_LOGGED {
        error!(more = unopened.len() - MAX_LOGGED, "further stored secrets do not open");
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::{
        crypto::RowBinding,
        domain::{
            account::{AccountId, CredentialVersion},
            secret::ClientSecret,
        },
    };

    const VERSION: CredentialVersion = CredentialVersion(1);

    fn keyring() -> Keyring {
        Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap()
    }

    /// The secret of account `id`, as sealed for account `sealed_for`.
    fn stored(keyring: &Keyring, id: i64, sealed_for: i64) -> SecretSample {
        let secret = ClientSecret::new("SK.1").unwrap();
        let sealed = keyring.seal_secret(AccountId(sealed_for), VERSION, &secret);
        let name = format!("acme-{id}");
        SecretSample { id: AccountId(id), name, version: VERSION, sealed, secrets_of_key: 1 }
    }

    /// As if `count` secrets had been sealed with the key of the sample.
    fn of_many(count: i64, sample: SecretSample) -> SecretSample {
        SecretSample { secrets_of_key: count, ..sample }
    }

    /// How many secrets are reported, or the account that the error names.
    fn checked(keyring: &Keyring, samples: &[SecretSample]) -> Result<usize, String> {
        let checked = check_keyring(keyring, samples);
        checked.map(|unopened| unopened.len()).map_err(|error| error.account)
    }

    #[test]
    fn values_that_do_not_open_affect_only_their_own_accounts() {
        let (ours, theirs) = (keyring(), keyring());
        let good = || of_many(3, stored(&ours, 1, 1));
        let forged = |id| of_many(3, stored(&ours, id, 1));
        let unknown = |id| stored(&theirs, id, id);
        let garbage =
            || SecretSample { sealed: b"no sealed value".to_vec(), ..stored(&ours, 3, 3) };
        let content = ours.seal(&RowBinding::client_secret(AccountId(4), VERSION), b"two words");
        let no_secret = SecretSample { sealed: content, ..stored(&ours, 4, 4) };
        assert_eq!(checked(&ours, &[]), Ok(0));
        assert_eq!(checked(&ours, &[good()]), Ok(0));
        // The order of the samples, by number, means nothing.
        assert_eq!(checked(&ours, &[good(), forged(2)]), Ok(1));
        assert_eq!(checked(&ours, &[forged(2), forged(3), good()]), Ok(2));
        assert_eq!(checked(&ours, &[garbage()]), Ok(1));
        assert_eq!(checked(&ours, &[no_secret, forged(2)]), Ok(2));
        // Values of one key that is not in the keyring, and of several such keys.
        assert_eq!(checked(&ours, &[good(), unknown(2)]), Ok(1));
        assert_eq!(checked(&ours, &[unknown(2), of_many(1, stored(&ours, 1, 1))]), Ok(1));
        assert_eq!(checked(&ours, &[good(), unknown(2), stored(&keyring(), 5, 5)]), Ok(2));
    }

    #[test]
    fn a_keyring_that_opens_nothing_is_refused() {
        let (ours, theirs) = (keyring(), keyring());
        let forged = [stored(&ours, 1, 2), stored(&ours, 3, 2), stored(&ours, 4, 2)];
        assert_eq!(checked(&ours, &forged), Err("acme-1".into()));
        assert_eq!(checked(&theirs, &[stored(&ours, 1, 1)]), Err("acme-1".into()));
        assert_eq!(checked(&keyring(), &[stored(&ours, 1, 1), stored(&theirs, 2, 2)]).ok(), None);
    }

    #[test]
    fn a_keyring_that_lacks_the_key_of_most_secrets_is_refused() {
        let (ours, theirs) = (keyring(), keyring());
        let values = |theirs_count| {
            [of_many(10, stored(&ours, 1, 1)), of_many(theirs_count, stored(&theirs, 2, 2))]
        };
        assert_eq!(checked(&ours, &values(10)), Ok(1));
        assert_eq!(checked(&ours, &values(11)), Err("acme-2".into()));
    }
}
