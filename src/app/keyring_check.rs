//! Checks that the keyring is the one that sealed the stored secrets.

use std::collections::BTreeMap;

use thiserror::Error;
use tracing::error;

use crate::{
    crypto::{Keyring, SealError},
    store::accounts::SecretSample,
};

/// The keyring is not the one that sealed the stored secrets: it lacks a key, or opens nothing that was
/// sealed with one of its keys.
#[derive(Debug, Error)]
#[error("the keyring does not open the secret of account {account}")]
pub struct WrongKeyring {
    /// The name of an account whose secret does not open.
    pub account: String,
    /// Why it does not open.
    #[source]
    pub error: SealError,
}

/// Checks `keyring` by opening `samples`, which are some stored secrets for each key that sealed any.
///
/// If a value does not open although others of the same key do, only its own account is affected: this is
/// logged, and the account's next issue fails.
///
/// # Errors
/// When the keyring lacks the key of a sample, or has a key that opens none of its samples.
pub fn check_keyring(keyring: &Keyring, samples: &[SecretSample]) -> Result<(), WrongKeyring> {
    let wrong =
        |stored: &SecretSample, error| Err(WrongKeyring { account: stored.name.clone(), error });
    // For each key: the first sample that it did not open, or `None` once it has opened one.
    let mut unopened = BTreeMap::new();
    let mut faults = Vec::new();
    for stored in samples {
        let opened = keyring.open_secret(stored.id, stored.version, &stored.sealed);
        let fault = opened.err();
        faults.extend(fault.clone().map(|fault| (stored, fault)));
        // A value that names no key says nothing about any key.
        let Ok(key) = Keyring::sealed_with(&stored.sealed) else { continue };
        match fault {
            Some(fault @ SealError::UnknownKey(_)) => return wrong(stored, fault),
            Some(fault @ SealError::Forged) => {
                unopened.entry(key).or_insert(Some((stored, fault)));
            }
            // The key opens the value. It is the right key even if the content is not a secret.
            _ => {
                unopened.insert(key, None);
            }
        }
    }
    if let Some((stored, fault)) = unopened.into_values().flatten().next() {
        return wrong(stored, fault);
    }
    for (stored, error) in faults {
        error!(account = %stored.name, %error, "a stored secret does not open: set it again");
    }
    Ok(())
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
        SecretSample { id: AccountId(id), name: format!("acme-{id}"), version: VERSION, sealed }
    }

    /// The account that the error names.
    fn refused(keyring: &Keyring, samples: &[SecretSample]) -> Option<String> {
        check_keyring(keyring, samples).err().map(|error| error.account)
    }

    #[test]
    fn a_keyring_that_opens_some_values_of_each_of_its_keys_is_accepted() {
        let keyring = keyring();
        let [good, swapped, garbage] = [stored(&keyring, 1, 1), stored(&keyring, 2, 1), {
            SecretSample { sealed: b"no sealed value".to_vec(), ..stored(&keyring, 3, 3) }
        }];
        let content = keyring.seal(&RowBinding::client_secret(AccountId(4), VERSION), b"two words");
        let no_secret = SecretSample { sealed: content, ..stored(&keyring, 4, 4) };
        assert_eq!(refused(&keyring, &[]), None);
        assert_eq!(refused(&keyring, &[stored(&keyring, 2, 1), good]), None);
        assert_eq!(refused(&keyring, &[stored(&keyring, 1, 1), stored(&keyring, 2, 1)]), None);
        assert_eq!(refused(&keyring, &[garbage]), None);
        assert_eq!(refused(&keyring, &[no_secret, swapped]), None);
    }

    #[test]
    fn a_key_that_opens_none_of_its_values_is_refused() {
        let keyring = keyring();
        let values = [stored(&keyring, 1, 2), stored(&keyring, 3, 2), stored(&keyring, 4, 2)];
        assert_eq!(refused(&keyring, &values).as_deref(), Some("acme-1"));
    }

    #[test]
    fn a_keyring_that_lacks_a_key_is_refused_even_if_other_values_open() {
        let (ours, theirs) = (keyring(), keyring());
        let values = [stored(&ours, 1, 1), stored(&theirs, 2, 2)];
        assert_eq!(refused(&ours, &values).as_deref(), Some("acme-2"));
    }
}
