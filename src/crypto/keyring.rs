//! The keys that a broker holds. Each key serves one purpose.

use std::{collections::BTreeSet, fmt};

use aws_lc_rs::{
    aead::{AES_256_GCM, LessSafeKey, UnboundKey},
    hmac,
    signature::{Ed25519KeyPair, KeyPair},
};
use thiserror::Error;

use super::{
    intake::{IntakeError, IntakeKeyPair, IntakePublicKey, SealedIntake},
    key::{KEY_LEN, KeyId, KeyKind, KeyStatus},
};
use crate::domain::{
    account::ClientId,
    secret::{AccessToken, ClientSecret},
};

/// How many bytes of an HMAC a fingerprint shows: enough that no two tokens share a fingerprint.
const FINGERPRINT_LEN: usize = 16;

/// The keys of one purpose. One of them is primary.
pub(super) struct Ring<K> {
    keys: Vec<(KeyId, K)>,
    primary: usize,
}

impl<K> Ring<K> {
    /// Returns a ring whose primary key has the index `primary`.
    ///
    /// # Panics
    /// If there is no key with that index. Readers of keyring files refuse a kind without a primary.
    pub(super) fn new(keys: Vec<(KeyId, K)>, primary: usize) -> Self {
        assert!(primary < keys.len(), "a ring has a primary key");
        Self { keys, primary }
    }

    pub(super) fn primary(&self) -> (&KeyId, &K) {
        let (id, key) = &self.keys[self.primary];
        (id, key)
    }

    pub(super) fn get(&self, id: &KeyId) -> Option<&K> {
        self.keys.iter().find(|(other, _)| other == id).map(|(_, key)| key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&KeyId, &K)> {
        self.keys.iter().map(|(id, key)| (id, key))
    }
}

/// The broker's keys. `Debug` shows only their ids.
pub struct Keyring {
    pub(super) sealing: Ring<LessSafeKey>,
    pub(super) intake: Ring<IntakeKeyPair>,
    pub(super) fingerprint: Ring<hmac::Key>,
    pub(super) signing: Ring<Ed25519KeyPair>,
    /// The public halves of signing keys that are retired.
    pub(super) retired_signing: Vec<(KeyId, [u8; KEY_LEN])>,
    pub(super) status: Vec<KeyStatus>,
    /// The hash of each key that is not gone, to notice that an id has other bytes than before.
    pub(super) key_hashes: Vec<(KeyId, [u8; 32])>,
    /// The hash of the text from which the keyring was read.
    pub(super) text_hash: [u8; 32],
}

/// What differs between a keyring and the one that replaces it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct KeyringChange {
    /// The keys that are new.
    pub added: Vec<KeyId>,
    /// The keys that have become the primary ones of their kinds.
    pub promoted: Vec<KeyId>,
    /// The keys that were retired.
    pub retired: Vec<KeyId>,
    /// The keys whose entries are gone.
    pub removed: Vec<KeyId>,
}

/// A key of another keyring has the id of one of this keyring, and other bytes.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("its key {0} is another key than the one of that id which is in use")]
pub struct AlteredKey(pub KeyId);

impl Keyring {
    /// Returns the fingerprint by which the audit log names `token`: a key's id and 32 hexadecimal
    /// digits of the token's HMAC-SHA-256. Only with the key can a fingerprint be matched to a token.
    #[must_use]
    pub fn fingerprint(&self, token: &AccessToken) -> String {
        let (id, key) = self.fingerprint.primary();
        fingerprint_with(id, key, token)
    }

    /// Returns the fingerprints of `token` under each fingerprint key, for `audit who`.
    #[must_use]
    pub fn fingerprints(&self, token: &AccessToken) -> Vec<String> {
        self.fingerprint.iter().map(|(id, key)| fingerprint_with(id, key, token)).collect()
    }

    /// Returns the ids of the fingerprint keys, with which fingerprints begin.
    #[must_use]
    pub fn fingerprint_keys(&self) -> Vec<String> {
        self.fingerprint.iter().map(|(id, _)| id.to_string()).collect()
    }

    /// Signs `message` by Ed25519 with the primary signing key. Returns that key's id and the signature.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> (KeyId, Vec<u8>) {
        let (id, key) = self.signing.primary();
        (id.clone(), key.sign(message).as_ref().to_vec())
    }

    /// Returns the public halves of all signing keys, also of those that are retired.
    pub(super) fn signing_publics(&self) -> Vec<(KeyId, [u8; KEY_LEN])> {
        let held = self.signing.iter().map(|(id, key)| (id.clone(), public_half(key)));
        held.chain(self.retired_signing.iter().cloned()).collect()
    }

    /// Returns the public half of the primary intake key. New secrets are sealed to it.
    #[must_use]
    pub fn intake_public(&self) -> IntakePublicKey {
        let (id, pair) = self.intake.primary();
        pair.public_key(id)
    }

    /// Returns the public halves of all intake keys.
    #[must_use]
    pub fn intake_publics(&self) -> Vec<IntakePublicKey> {
        self.intake.iter().map(|(id, pair)| pair.public_key(id)).collect()
    }

    /// Opens a secret that [`IntakePublicKey::seal`] sealed for the login `client_id`.
    pub fn open_intake(
        &self,
        client_id: &ClientId,
        sealed: &str,
    ) -> Result<ClientSecret, IntakeError> {
        let sealed = SealedIntake::parse(sealed).ok_or(IntakeError::Malformed)?;
        match self.intake.get(&sealed.key_id) {
            Some(pair) => pair.open(client_id, &sealed),
            None => Err(IntakeError::UnknownKey(sealed.key_id)),
        }
    }

    /// Returns the ids of all keys that are not retired, in the file's order.
    #[must_use]
    pub fn key_ids(&self) -> Vec<KeyId> {
        self.status
            .iter()
            .filter(|key| key.retired_at.is_none())
            .map(|key| key.id.clone())
            .collect()
    }

    /// Returns the ids of the primary keys, with which new values are made.
    #[must_use]
    pub fn primaries(&self) -> BTreeSet<KeyId> {
        self.status.iter().filter(|key| key.primary).map(|key| key.id.clone()).collect()
    }

    /// Returns the id of the primary key of `kind`.
    #[must_use]
    pub fn primary(&self, kind: KeyKind) -> &KeyId {
        let primary = self.status.iter().find(|key| key.kind == kind && key.primary);
        &primary.expect("every kind has a primary key").id
    }

    /// Returns whether values that are sealed with the key `id` open.
    #[must_use]
    pub fn has_sealing_key(&self, id: &KeyId) -> bool {
        self.sealing.get(id).is_some()
    }

    /// Returns whether there is only one sealing key.
    #[must_use]
    pub fn has_one_sealing_key(&self) -> bool {
        self.sealing.iter().count() == 1
    }

    /// Returns the hash of the text from which the keyring was read.
    #[must_use]
    pub fn text_hash(&self) -> [u8; 32] {
        self.text_hash
    }

    /// Returns what changes when `next` replaces this keyring.
    ///
    /// # Errors
    /// [`AlteredKey`] when `next` has another key under the id of one of this keyring.
    pub fn change_to(&self, next: &Self) -> Result<KeyringChange, AlteredKey> {
        let find =
            |keyring: &Self, id: &KeyId| keyring.status.iter().find(|key| key.id == *id).cloned();
        let hash = |keyring: &Self, id: &KeyId| {
            keyring.key_hashes.iter().find(|(of, _)| of == id).map(|(_, hash)| *hash)
        };
        let mut change = KeyringChange::default();
        for key in &next.status {
            let before = find(self, &key.id);
            let is_another = |before: &KeyStatus| {
                let (old, new) = (hash(self, &key.id), hash(next, &key.id));
                before.kind != key.kind || new.is_some() && old.is_some() && new != old
            };
            if before.as_ref().is_some_and(is_another) {
                return Err(AlteredKey(key.id.clone()));
            }
            // A retired key that is put back by hand comes into use again.
            let comes_back =
                |before: &KeyStatus| before.retired_at.is_some() && key.retired_at.is_none();
            if before.as_ref().is_none_or(comes_back) {
                change.added.push(key.id.clone());
            }
            if key.primary && !before.as_ref().is_some_and(|before| before.primary) {
                change.promoted.push(key.id.clone());
            }
            if key.retired_at.is_some() && before.is_none_or(|before| before.retired_at.is_none()) {
                change.retired.push(key.id.clone());
            }
        }
        let removed = self.status.iter().filter(|key| find(next, &key.id).is_none());
        change.removed = removed.map(|key| key.id.clone()).collect();
        Ok(change)
    }

    /// Returns the public facts of each key, in the file's order.
    #[must_use]
    pub fn status(&self) -> &[KeyStatus] {
        &self.status
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keyring").field(&self.key_ids()).finish()
    }
}

/// Returns the public half of a signing key.
pub(super) fn public_half(key: &Ed25519KeyPair) -> [u8; KEY_LEN] {
    key.public_key().as_ref().try_into().expect("an Ed25519 public key is 32 bytes")
}

fn fingerprint_with(id: &KeyId, key: &hmac::Key, token: &AccessToken) -> String {
    let tag = hmac::sign(key, token.expose().as_bytes());
    format!("{id}:{}", hex::encode(&tag.as_ref()[..FINGERPRINT_LEN]))
}

pub(super) fn sealing_key(bytes: &[u8; KEY_LEN]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, bytes).expect("any 32 bytes are an AES-256 key"))
}

pub(super) fn fingerprint_key(bytes: &[u8; KEY_LEN]) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, bytes)
}

pub(super) fn signing_key(bytes: &[u8; KEY_LEN]) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(bytes).expect("any 32 bytes are an Ed25519 seed")
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn keyring() -> Keyring {
        Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap()
    }

    #[test]
    fn a_fingerprint_is_stable_and_tells_tokens_and_keyrings_apart() {
        let keyring_a = keyring();
        let token = AccessToken::new("eyJ.a.b").unwrap();
        let print = keyring_a.fingerprint(&token);
        assert_eq!(print, keyring_a.fingerprint(&token));
        assert_eq!(keyring_a.fingerprints(&token), std::slice::from_ref(&print));
        assert_eq!(print.len(), "f12345678:".len() + 32);
        assert_ne!(print, keyring_a.fingerprint(&AccessToken::new("eyJ.a.c").unwrap()));
        let digits = |print: &str| print.split_once(':').unwrap().1.to_owned();
        assert_ne!(digits(&print), digits(&keyring().fingerprint(&token)));
    }

    #[test]
    fn a_fingerprint_is_the_hmac_that_the_docs_name() {
        // RFC 4231, test case 2, with the key as it would be padded to 32 bytes: HMAC pads with
        // zeros to its block, so that the tag is the same.
        let mut key = [0; KEY_LEN];
        key[..4].copy_from_slice(b"Jefe");
        let tag = hmac::sign(&fingerprint_key(&key), b"what do ya want for nothing?");
        assert!(hex::encode(tag.as_ref()).starts_with("5bdcc146bf60754e6a042426089575c7"));
    }

    #[test]
    fn a_signing_key_is_the_seed_of_rfc_8032() {
        let seed = hex::decode("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60");
        let key = signing_key(&seed.unwrap().try_into().unwrap());
        assert_eq!(
            hex::encode(key.public_key().as_ref()),
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
        );
    }

    #[test]
    fn printing_a_keyring_shows_names_and_no_key() {
        let text = Keyring::generate(DateTime::UNIX_EPOCH);
        let keyring = Keyring::parse(&text).unwrap();
        let printed = format!(
            "{keyring:?} {keyring:#?} {:?} {:?} {:?}",
            keyring.status(),
            keyring.intake_public(),
            keyring.intake_publics(),
        );
        assert!(printed.contains(keyring.key_ids()[0].as_str()));
        let keys: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("key = ")).collect();
        assert_eq!(keys.len(), 4);
        for key in keys {
            assert!(!printed.contains(key.trim_matches('"')), "{printed}");
        }
    }
}
