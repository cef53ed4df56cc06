//! Ids and kinds of keys.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

use crate::domain::{account::InvalidValue, clock::Timestamp};

/// The length of every key, in bytes: an AES-256 key, an X25519 private key, an HMAC-SHA-256 key,
/// an Ed25519 seed.
pub(super) const KEY_LEN: usize = 32;

/// Returns `N` bytes from the system's random source.
pub(super) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("aws-lc aborts where there is no randomness");
    bytes
}

/// A key's id: `[a-z0-9]{1,32}`. Values that admins paste hold it between colons. Cheap to clone.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct KeyId(Arc<str>);

impl KeyId {
    /// The form of an id as a regular expression. A trigger of the database checks it too.
    pub const PATTERN: &'static str = "[a-z0-9]{1,32}";
    const MAX: u8 = 32;

    /// Returns a new id: the kind's letter and eight random hexadecimal digits.
    pub(super) fn generate(kind: KeyKind) -> Self {
        Self(format!("{}{}", kind.letter(), hex::encode(random::<4>())).into())
    }

    /// Returns the id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the id's length in bytes, as the one byte that precedes it in a sealed value.
    pub(super) fn len(&self) -> u8 {
        u8::try_from(self.0.len()).unwrap_or(Self::MAX)
    }
}

impl FromStr for KeyId {
    type Err = InvalidValue;

    fn from_str(id: &str) -> Result<Self, InvalidValue> {
        if id.is_empty() {
            return Err(InvalidValue::Empty("key id"));
        }
        if !id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) {
            return Err(InvalidValue::Malformed("key id", Self::PATTERN));
        }
        if id.len() > usize::from(Self::MAX) {
            return Err(InvalidValue::TooLong("key id", usize::from(Self::MAX)));
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
    /// Opens secrets that admins sealed to the broker's public intake key.
    Intake,
    /// Computes the fingerprints by which the audit log names tokens.
    Fingerprint,
    /// Signs the checkpoints of audit chains.
    Signing,
}

impl KeyKind {
    /// Every kind. A keyring has at least one key of each.
    pub const ALL: [Self; 4] = [Self::Sealing, Self::Intake, Self::Fingerprint, Self::Signing];

    /// Returns the kind's name in the keyring file.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sealing => "sealing",
            Self::Intake => "intake",
            Self::Fingerprint => "fingerprint",
            Self::Signing => "signing",
        }
    }

    /// Returns the kind with that name, if there is one.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// Returns the letter that ids of generated keys of this kind begin with.
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

/// What may be shown of a key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyStatus {
    /// The key's id.
    pub id: KeyId,
    /// The key's purpose.
    pub kind: KeyKind,
    /// Whether new values are made with this key. The other keys only open older values.
    pub primary: bool,
    /// When the key was generated.
    pub created_at: Timestamp,
    /// When the key was retired; `None` while it may be used. What is left of it, if anything, only checks older
    /// records.
    pub retired_at: Option<Timestamp>,
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
