//! The text of a keyring file: parses it into keys, and writes keys as text.

use std::io;

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine, engine::general_purpose::STANDARD};
use chrono::SecondsFormat;
use serde::{Deserialize, Deserializer};
use thiserror::Error;
use zeroize::Zeroizing;

use super::{
    intake::IntakeKeyPair,
    key::{KEY_LEN, KeyId, KeyKind, KeyStatus, random},
    keyring::{Keyring, Ring, fingerprint_key, public_half, sealing_key, signing_key},
};
use crate::domain::clock::Timestamp;

/// The version of the file format that this release reads and writes.
const VERSION: i64 = 1;

/// Why a keyring file was refused or not written. No message quotes the file, which would show a key.
#[derive(Debug, Error)]
pub enum KeyringFault {
    /// The file cannot be opened or read.
    #[error("it cannot be read: {0}")]
    Read(#[source] io::Error),
    /// The file cannot be created or written.
    #[error("it cannot be written: {0}")]
    Write(#[source] io::Error),
    /// A keyring is never overwritten: what its keys sealed would be lost.
    #[error("it exists already, and a keyring is never overwritten")]
    Exists,
    /// The path names a directory, a pipe or a device.
    #[error("it is not a regular file")]
    NotAFile,
    /// The file's mode gives others than its owner access. Holds the mode.
    #[error(
        "its mode {0:04o} gives others than its owner access: use mode 600, or 440 if root owns it"
    )]
    Exposed(u32),
    /// The file is longer than any keyring, or is not UTF-8.
    #[error("it is not a keyring file")]
    NotAKeyring,
    /// The text is not TOML, or a field is unknown, missing or of the wrong type. Holds the line, from 1.
    #[error(
        "line {0} is not what a keyring holds: version, and [[key]] entries with id, kind, \
         primary, created_at, retired_at, key and public"
    )]
    Line(usize),
    /// The file has a version of the format that this release does not read.
    #[error("version {0} is not the version {VERSION} that this release reads")]
    Version(i64),
    /// One entry is faulty.
    #[error("key {nth} ({id}): {what}")]
    Entry {
        /// The entry's position in the file, from 1.
        nth: usize,
        /// The entry's id, or `unnamed` if the id is what is faulty.
        id: String,
        /// What is wrong with it, in words that quote nothing of it.
        what: &'static str,
    },
    /// The key to promote or to retire is not in the file.
    #[error("it has no key {0}")]
    NoSuchKey(KeyId),
    /// The key to promote is retired.
    #[error("its key {0} is retired: add a new one")]
    Retired(KeyId),
    /// The key to retire is the one with which new values are made.
    #[error("its key {0} is the primary {1} key: promote another one first")]
    IsPrimary(KeyId, KeyKind),
    /// A kind has no primary key, or more than one.
    #[error("exactly one {0} key must have primary = true")]
    Primary(KeyKind),
}

/// The file's structure in TOML.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: i64,
    #[serde(default, rename = "key")]
    entries: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    id: String,
    kind: String,
    #[serde(default)]
    primary: bool,
    created_at: Timestamp,
    #[serde(default)]
    retired_at: Option<Timestamp>,
    #[serde(default, deserialize_with = "zeroizing")]
    key: Option<Zeroizing<String>>,
    #[serde(default)]
    public: Option<String>,
}

fn zeroizing<'de, D: Deserializer<'de>>(text: D) -> Result<Option<Zeroizing<String>>, D::Error> {
    String::deserialize(text).map(|text| Some(Zeroizing::new(text)))
}

impl Keyring {
    /// Returns the text of a new keyring with one key of each kind, all primary and generated at `now`.
    #[must_use]
    pub fn generate(now: Timestamp) -> Zeroizing<String> {
        render(&KeyKind::ALL.map(|kind| new_key(kind, true, now)))
    }

    /// Reads a keyring from its text.
    ///
    /// # Errors
    /// [`KeyringFault`] with the faulty line or entry.
    pub fn parse(text: &str) -> Result<Self, KeyringFault> {
        let mut keyring = Self::from_keys(&parse_keys(text)?)?;
        keyring.text_hash = sha256(text.as_bytes());
        Ok(keyring)
    }

    /// Returns the keyring of `keys`.
    pub(super) fn from_keys(keys: &[Key]) -> Result<Self, KeyringFault> {
        Ok(Self {
            sealing: ring(keys, KeyKind::Sealing, sealing_key)?,
            intake: ring(keys, KeyKind::Intake, IntakeKeyPair::new)?,
            fingerprint: ring(keys, KeyKind::Fingerprint, fingerprint_key)?,
            signing: ring(keys, KeyKind::Signing, signing_key)?,
            retired_signing: keys
                .iter()
                .filter_map(|(status, material)| match material {
                    Material::Public(public) => Some((status.id.clone(), *public)),
                    Material::Key(_) | Material::Gone => None,
                })
                .collect(),
            status: keys.iter().map(|(status, _)| status.clone()).collect(),
            key_hashes: keys.iter().filter_map(key_hash).collect(),
            text_hash: [0; 32],
        })
    }
}

/// Returns a new random key.
pub(super) fn new_key(kind: KeyKind, primary: bool, now: Timestamp) -> Key {
    let id = KeyId::generate(kind);
    let status = KeyStatus { id, kind, primary, created_at: now, retired_at: None };
    (status, Material::Key(Zeroizing::new(random())))
}

/// Retires a key at `now`: what is left of it only checks older records.
pub(super) fn retire(key: &mut Key, now: Timestamp) {
    let (status, material) = key;
    status.retired_at = Some(now);
    *material = match (status.kind, &*material) {
        // Fingerprints are computed with the key itself, also those of older records.
        (KeyKind::Fingerprint, Material::Key(bytes)) => Material::Key(bytes.clone()),
        (KeyKind::Signing, Material::Key(bytes)) => {
            Material::Public(public_half(&signing_key(bytes)))
        }
        _ => Material::Gone,
    };
}

/// Reads the keys in `text`. Each is complete, and no two have the same id.
pub(super) fn parse_keys(text: &str) -> Result<Vec<Key>, KeyringFault> {
    let document: Document = toml::from_str(text).map_err(|error| {
        // The error's own message quotes the line, and with it a key.
        let start = error.span().map_or(0, |span| span.start);
        let before = text.get(..start).unwrap_or_default();
        KeyringFault::Line(1 + before.matches('\n').count())
    })?;
    if document.version != VERSION {
        return Err(KeyringFault::Version(document.version));
    }
    check_entries(document.entries)
}

/// Returns the text of a keyring file with `keys`.
pub(super) fn render(keys: &[Key]) -> Zeroizing<String> {
    const HEAD: &str = "\
        # The keyring of a token broker. Whoever reads it can open every sealed secret; without\n\
        # it nobody can. Keep a copy apart from the database's backups: docs/keys.md.\n\
        version = 1\n";
    // The capacity suffices for all keys: growing would leave a copy of them behind in memory.
    let mut text = Zeroizing::new(String::with_capacity(HEAD.len() + 256 * keys.len()));
    text.push_str(HEAD);
    for (status, material) in keys {
        let (name, value) = match material {
            Material::Key(key) => ("key", STANDARD.encode(key.as_slice())),
            Material::Public(public) => ("public", STANDARD.encode(public)),
            Material::Gone => ("", String::new()),
        };
        let value = Zeroizing::new(value);
        let time = |at: Timestamp| at.to_rfc3339_opts(SecondsFormat::Secs, true);
        for part in [
            "\n[[key]]\nid = \"",
            status.id.as_str(),
            "\"\nkind = \"",
            status.kind.as_str(),
            "\"\nprimary = ",
            if status.primary { "true" } else { "false" },
            "\ncreated_at = \"",
            &time(status.created_at),
            "\"\n",
        ] {
            text.push_str(part);
        }
        if let Some(at) = status.retired_at {
            text.extend(["retired_at = \"", &time(at), "\"\n"]);
        }
        if !name.is_empty() {
            text.extend([name, " = \"", &value, "\"\n"]);
        }
    }
    text
}

/// What the file has of a key.
#[derive(Clone, Eq, PartialEq)]
pub(super) enum Material {
    /// The key's bytes.
    Key(Zeroizing<[u8; KEY_LEN]>),
    /// The public half of a signing key that is retired.
    Public([u8; KEY_LEN]),
    /// Nothing: the key is retired.
    Gone,
}

/// An entry of the file: the public facts of a key, and its bytes.
pub(super) type Key = (KeyStatus, Material);

/// Returns the key's id and a hash of its bytes; for a signing key of its public half, which stays.
fn key_hash((status, material): &Key) -> Option<(KeyId, [u8; 32])> {
    let hash = match (material, status.kind) {
        (Material::Key(bytes), KeyKind::Signing) => sha256(&public_half(&signing_key(bytes))),
        (Material::Key(bytes), _) => sha256(bytes.as_slice()),
        (Material::Public(public), _) => sha256(public),
        (Material::Gone, _) => return None,
    };
    Some((status.id.clone(), hash))
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

fn check_entries(entries: Vec<Entry>) -> Result<Vec<Key>, KeyringFault> {
    let mut keys: Vec<Key> = Vec::with_capacity(entries.len());
    for (index, entry) in entries.into_iter().enumerate() {
        let nth = index + 1;
        let (status, key) = check_entry(nth, &entry)?;
        if keys.iter().any(|(other, _)| other.id == status.id) {
            let what = "another key has this id";
            return Err(KeyringFault::Entry { nth, id: entry.id, what });
        }
        keys.push((status, key));
    }
    Ok(keys)
}

fn check_entry(nth: usize, entry: &Entry) -> Result<Key, KeyringFault> {
    let id: KeyId = entry.id.parse().map_err(|_| KeyringFault::Entry {
        nth,
        // A faulty id is not shown: it may be a key that was pasted into the wrong line.
        id: "unnamed".to_owned(),
        what: "id must match [a-z0-9]{1,32}",
    })?;
    let refuse = |what| KeyringFault::Entry { nth, id: id.to_string(), what };
    let kind = KeyKind::from_name(&entry.kind)
        .ok_or_else(|| refuse("kind must be sealing, intake, fingerprint or signing"))?;
    let Entry { primary, created_at, retired_at, .. } = *entry;
    if primary && retired_at.is_some() {
        return Err(refuse("a retired key must not be primary"));
    }
    let key = || entry.key.as_ref().and_then(|key| decode(key)).map(Material::Key);
    let public =
        || entry.public.as_ref().and_then(|key| decode(key)).map(|key| Material::Public(*key));
    let material = match (kind, retired_at.is_some()) {
        (KeyKind::Signing, true) if entry.key.is_none() => {
            public().ok_or_else(|| refuse("public must be 32 bytes in base64"))?
        }
        (KeyKind::Sealing | KeyKind::Intake, true)
            if entry.key.is_none() && entry.public.is_none() =>
        {
            Material::Gone
        }
        (KeyKind::Sealing | KeyKind::Intake | KeyKind::Signing, true) => {
            return Err(refuse("a retired key of this kind must not have its key any more"));
        }
        _ if entry.public.is_some() => {
            return Err(refuse("only a retired signing key has a public half here"));
        }
        _ => key().ok_or_else(|| refuse("key must be 32 bytes in base64"))?,
    };
    let status = KeyStatus { id: id.clone(), kind, primary, created_at, retired_at };
    Ok((status, material))
}

fn decode(key: &str) -> Option<Zeroizing<[u8; KEY_LEN]>> {
    let bytes = Zeroizing::new(STANDARD.decode(key).ok()?);
    let mut array = Zeroizing::new([0; KEY_LEN]);
    (bytes.len() == KEY_LEN).then(|| array.copy_from_slice(&bytes))?;
    Some(array)
}

/// Returns the ring of the keys of `kind`. `make` turns the bytes of a key into its own type.
fn ring<K>(
    keys: &[Key],
    kind: KeyKind,
    make: impl Fn(&[u8; KEY_LEN]) -> K,
) -> Result<Ring<K>, KeyringFault> {
    let held = |(status, material): &'_ Key| match material {
        Material::Key(key) if status.kind == kind => Some((status.clone(), make(key))),
        _ => None,
    };
    let of_kind: Vec<(KeyStatus, K)> = keys.iter().filter_map(held).collect();
    let mut primaries = of_kind.iter().enumerate().filter(|(_, (status, _))| status.primary);
    let (Some((primary, _)), None) = (primaries.next(), primaries.next()) else {
        return Err(KeyringFault::Primary(kind));
    };
    let keys = of_kind.into_iter().map(|(status, key)| (status.id, key)).collect();
    Ok(Ring::new(keys, primary))
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;

    fn text() -> String {
        Keyring::generate(DateTime::UNIX_EPOCH).to_string()
    }

    fn refusal(text: &str) -> String {
        Keyring::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_new_keyring_has_one_primary_key_of_each_kind() {
        let keyring = Keyring::parse(&text()).unwrap();
        let kinds: Vec<KeyKind> = keyring.status().iter().map(|key| key.kind).collect();
        assert_eq!(kinds, KeyKind::ALL);
        assert!(keyring.status().iter().all(|key| key.primary));
        assert!(keyring.status().iter().all(|key| key.created_at == DateTime::UNIX_EPOCH));
    }

    #[test]
    fn a_fault_is_named_with_its_entry_and_without_the_key() {
        let good = text();
        let id = Keyring::parse(&good).unwrap().key_ids()[1].to_string();
        let key_line = good.lines().rfind(|line| line.starts_with("key = ")).unwrap();
        let key = key_line.trim_start_matches("key = ").trim_matches('"');
        for (bad, fault) in [
            (good.replace("\"intake\"", "\"intak\""), format!("key 2 ({id}): kind must be")),
            (good.replace(key, &key[4..]), "key must be 32 bytes in base64".to_owned()),
            (good.replace(key, "====????"), "key must be 32 bytes in base64".to_owned()),
            (good.replace(&id, "I-1"), "key 2 (unnamed): id must match".to_owned()),
            (good.replace("version = 1", "version = 2"), "version 2 is not".to_owned()),
            (format!("{good}\n{}", entry_of(&good, 2)), "another key has this id".to_owned()),
            (
                good.replace("kind = \"signing\"", "kind = \"sealing\""),
                "one sealing key".to_owned(),
            ),
            (without_entries(&good), "one sealing key must have primary = true".to_owned()),
            (good.replace(key_line, &format!("secret = \"{key}\"")), "line ".to_owned()),
            (good.replace(key_line, &format!("key = {key}")), "line ".to_owned()),
            (good.replace("primary = true", &format!("primary = \"{key}\"")), "line ".to_owned()),
            (String::new(), "line 1 ".to_owned()),
        ] {
            let refusal = refusal(&bad);
            assert!(refusal.contains(&fault), "{refusal} does not say: {fault}");
            assert!(!refusal.contains(&key[4..]), "{refusal}");
        }
    }

    #[test]
    fn a_retired_entry_has_what_is_left_of_its_kind_and_no_more() {
        let good = text();
        let retired = "retired_at = \"2026-01-01T00:00:00Z\"\n";
        let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
        let entry = |kind: &str, rest: &str| {
            format!(
                "{good}\n[[key]]\nid = \"x1\"\nkind = \"{kind}\"\ncreated_at = \"2026-01-01T00:00:00Z\"\n{rest}"
            )
        };
        let (secret, public) = (format!("key = \"{key}\"\n"), format!("public = \"{key}\"\n"));
        for (kind, left) in
            [("sealing", ""), ("intake", ""), ("fingerprint", &*secret), ("signing", &*public)]
        {
            for rest in ["", &secret, &public] {
                let parsed = Keyring::parse(&entry(kind, &format!("{retired}{rest}")));
                assert_eq!(parsed.is_ok(), rest == left, "{kind} {rest}");
            }
            assert!(Keyring::parse(&entry(kind, &secret)).is_ok(), "{kind} in use");
            for rest in ["", &public, &format!("{secret}{public}")] {
                assert!(Keyring::parse(&entry(kind, rest)).is_err(), "{kind} in use, {rest}");
            }
            let primary = format!("primary = true\n{retired}{left}");
            assert!(refusal(&entry(kind, &primary)).contains("must not be primary"));
        }
    }

    #[test]
    fn a_line_at_fault_is_counted_from_one() {
        let bad = text().replacen("primary = true", "primary = maybe", 1);
        let line = bad.lines().position(|line| line == "primary = maybe").unwrap() + 1;
        assert!(refusal(&bad).starts_with(&format!("line {line} ")));
    }

    /// The `nth` entry of `text`, from 1.
    fn entry_of(text: &str, nth: usize) -> String {
        format!("[[key]]{}", text.split("[[key]]").nth(nth).unwrap())
    }

    fn without_entries(text: &str) -> String {
        text.split("[[key]]").next().unwrap().to_owned()
    }

    proptest! {
        #[test]
        fn any_text_is_refused_without_panic(text in "(version = 1\n)?\\PC{0,200}") {
            prop_assert!(Keyring::parse(&text).is_err());
        }
    }
}
