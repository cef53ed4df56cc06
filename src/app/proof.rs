//! Whether the keyring is the one that sealed what is stored.

use std::collections::BTreeMap;

use tracing::error;

use super::StartError;
use crate::{
    crypto::{Keyring, SealError},
    store::accounts::SecretSample,
};

/// Opens `samples`. A key that the keyring lacks, or one that opens none of its samples, means that
/// this is another keyring. A value that does not open where others of its key do is its own account's
/// trouble: that is told here, and shown by the account once it is issued for.
///
/// # Errors
/// [`StartError::WrongKeyring`].
pub fn prove(keyring: &Keyring, samples: &[SecretSample]) -> Result<(), StartError> {
    let wrong = |stored: &SecretSample, error| {
        Err(StartError::WrongKeyring { account: stored.name.clone(), error })
    };
    // Of each key, the first value that it did not open, unless it opened one.
    let mut unproven = BTreeMap::new();
    let mut faults = Vec::new();
    for stored in samples {
        let opened = keyring.open_secret(stored.id, stored.version, &stored.sealed);
        let fault = opened.err();
        faults.extend(fault.clone().map(|fault| (stored, fault)));
        // What names no key proves nothing of one.
        let Ok(key) = Keyring::sealed_with(&stored.sealed) else { continue };
        match fault {
            Some(fault @ SealError::UnknownKey(_)) => return wrong(stored, fault),
            Some(fault @ SealError::Forged) => {
                unproven.entry(key).or_insert(Some((stored, fault)));
            }
            // It opens, even if what it holds is no secret.
            _ => {
                unproven.insert(key, None);
            }
        }
    }
    if let Some((stored, fault)) = unproven.into_values().flatten().next() {
        return wrong(stored, fault);
    }
    for (stored, error) in faults {
        error!(account = %stored.name, %error, "a stored secret does not open: write it anew");
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

    /// The account that the refusal names.
    fn refused(keyring: &Keyring, samples: &[SecretSample]) -> Option<String> {
        match prove(keyring, samples) {
            Ok(()) => None,
            Err(StartError::WrongKeyring { account, .. }) => Some(account),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn one_value_that_does_not_open_beside_others_that_do_is_no_wrong_keyring() {
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
    fn a_key_that_opens_none_of_its_values_is_another_one_of_that_name() {
        let keyring = keyring();
        let values = [stored(&keyring, 1, 2), stored(&keyring, 3, 2), stored(&keyring, 4, 2)];
        assert_eq!(refused(&keyring, &values).as_deref(), Some("acme-1"));
    }

    #[test]
    fn a_key_that_the_keyring_lacks_is_named_whatever_else_opens() {
        let (ours, theirs) = (keyring(), keyring());
        let values = [stored(&ours, 1, 1), stored(&theirs, 2, 2)];
        assert_eq!(refused(&ours, &values).as_deref(), Some("acme-2"));
    }
}
