//! The keys that a broker holds, each for one purpose alone.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

use aws_lc_rs::{
    aead::{AES_256_GCM, LessSafeKey, UnboundKey},
    hmac,
    signature::{Ed25519KeyPair, KeyPair},
};

use super::intake::IntakeKeyPair;
use crate::domain::{account::Invalid, clock::Timestamp, secret::AccessToken};

/// The length of every key, in bytes: an AES-256 key, an X25519 private key, an HMAC-SHA-256 key,
/// an Ed25519 seed.
pub(super) const KEY_LEN: usize = 32;
/// How much of an HMAC a fingerprint shows, in bytes: enough that no two tokens share one.
const FINGERPRINT_LEN: usize = 16;

/// Bytes from the system's random source.
pub(super) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("aws-lc aborts where there is no randomness");
    bytes
}

/// A key's name: `[a-z0-9]{1,32}`, since it stands between colons in what admins paste. Cheap to
/// clone.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct KeyId(Arc<str>);

impl KeyId {
    /// The rule, as the database's trigger states it too.
    pub const PATTERN: &'static str = "[a-z0-9]{1,32}";
    const MAX: u8 = 32;

    /// A new name: the kind's letter and eight random hexadecimal digits.
    pub(super) fn generate(kind: KeyKind) -> Self {
        Self(format!("{}{}", kind.letter(), hex::encode(random::<4>())).into())
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its length, in the one byte that it takes in a sealed value.
    pub(super) fn len(&self) -> u8 {
        u8::try_from(self.0.len()).unwrap_or(Self::MAX)
    }
}

impl FromStr for KeyId {
    type Err = Invalid;

    fn from_str(id: &str) -> Result<Self, Invalid> {
        if id.is_empty() {
            return Err(Invalid::Empty("key id"));
        }
        if !id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) {
            return Err(Invalid::Malformed("key id", Self::PATTERN));
        }
        if id.len() > usize::from(Self::MAX) {
            return Err(Invalid::TooLong("key id", usize::from(Self::MAX)));
        }
        Ok(Self(id.into()))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for KeyId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// What a key is for. No key serves two purposes.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum KeyKind {
    /// Seals secrets and tokens in the database.
    Sealing,
    /// Opens what admins sealed for the broker.
    Intake,
    /// Makes the names under which the audit log knows tokens.
    Fingerprint,
    /// Signs the heads of audit chains.
    Signing,
}

impl KeyKind {
    /// All of them; a keyring has at least one key of each.
    pub const ALL: [Self; 4] = [Self::Sealing, Self::Intake, Self::Fingerprint, Self::Signing];

    /// The name in the keyring file.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sealing => "sealing",
            Self::Intake => "intake",
            Self::Fingerprint => "fingerprint",
            Self::Signing => "signing",
        }
    }

    /// The kind of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// What its keys' names begin with: `h` for signing, as in head.
    pub(super) fn letter(self) -> char {
        match self {
            Self::Sealing => 's',
            Self::Intake => 'i',
            Self::Fingerprint => 'f',
            Self::Signing => 'h',
        }
    }
}

impl fmt::Display for KeyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What may be told of a key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyStatus {
    /// Its name.
    pub id: KeyId,
    /// Its purpose.
    pub kind: KeyKind,
    /// Whether it makes what is new; the others only open what is old.
    pub primary: bool,
    /// When it was generated.
    pub created_at: Timestamp,
}

/// The keys of one purpose, one of them primary.
pub(super) struct Ring<K> {
    keys: Vec<(KeyId, K)>,
    primary: usize,
}

impl<K> Ring<K> {
    /// A ring whose primary is the one of that index. There is always one: the file is checked.
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

/// The broker's keys. Its `Debug` shows their names alone.
pub struct Keyring {
    pub(super) sealing: Ring<LessSafeKey>,
    pub(super) intake: Ring<IntakeKeyPair>,
    pub(super) fingerprint: Ring<hmac::Key>,
    pub(super) signing: Ring<Ed25519KeyPair>,
    pub(super) status: Vec<KeyStatus>,
}

impl Keyring {
    /// The name under which the audit log knows `token`: a key's id and 32 hexadecimal digits of
    /// the token's HMAC-SHA-256. Without the key nobody can tell whether a token is the one.
    #[must_use]
    pub fn fingerprint(&self, token: &AccessToken) -> String {
        let (id, key) = self.fingerprint.primary();
        fingerprint_with(id, key, token)
    }

    /// The names that `token` has had under each key, for `audit who`.
    #[must_use]
    pub fn fingerprints(&self, token: &AccessToken) -> Vec<String> {
        self.fingerprint.iter().map(|(id, key)| fingerprint_with(id, key, token)).collect()
    }

    /// Signs `message` with the primary signing key, by Ed25519.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> (KeyId, Vec<u8>) {
        let (id, key) = self.signing.primary();
        (id.clone(), key.sign(message).as_ref().to_vec())
    }

    /// The public halves of all signing keys.
    pub(super) fn signing_publics(&self) -> Vec<(KeyId, [u8; KEY_LEN])> {
        let public = |key: &Ed25519KeyPair| {
            key.public_key().as_ref().try_into().expect("an Ed25519 public key is 32 bytes")
        };
        self.signing.iter().map(|(id, key)| (id.clone(), public(key))).collect()
    }

    /// The names of all keys, in the file's order.
    #[must_use]
    pub fn key_ids(&self) -> Vec<KeyId> {
        self.status.iter().map(|key| key.id.clone()).collect()
    }

    /// What may be told of each key, in the file's order.
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

fn fingerprint_with(id: &KeyId, key: &hmac::Key, token: &AccessToken) -> String {
    let tag = hmac::sign(key, token.expose().as_bytes());
    format!("{id}:{}", hex::encode(&tag.as_ref()[..FINGERPRINT_LEN]))
}

/// Makes a key of each kind's own type from its bytes.
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
    fn key_ids_are_what_the_database_takes() {
        for kind in KeyKind::ALL {
            let id = KeyId::generate(kind);
            assert_eq!(id.as_str().parse(), Ok(id.clone()));
            assert_eq!(id.as_str().len(), 9);
        }
        for id in ["", "S1", "s-1", "s:1", "é", &"a".repeat(33)] {
            assert!(id.parse::<KeyId>().is_err(), "{id}");
        }
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
