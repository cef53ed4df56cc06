//! The keyring file: who may read it, and how it is created and edited.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    mem,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

use thiserror::Error;
use zeroize::Zeroizing;

use super::{
    key::{KeyId, KeyKind},
    keyring::Keyring,
    keyring_document::{Key, KeyringFault, new_key, parse_keys, render, retire},
};
use crate::{
    domain::clock::Timestamp,
    files::{
        atomic::{self, Replacement},
        bounded::{self, Limits},
        given_path::shown,
        text::{self, NotText},
    },
};

/// The longest file, in bytes, that is read as a keyring.
const MAX_LEN: usize = 1 << 20;

/// A keyring file that was refused or not written, and why. No message holds a key.
#[derive(Debug, Error)]
#[error("keyring (TOKEN_BROKER_KEYRING_FILE) {}: {fault}", shown(path))]
pub struct KeyringError {
    /// The file's path.
    pub path: PathBuf,
    /// Why it was refused or not written.
    pub fault: KeyringFault,
}

impl KeyringError {
    fn at(path: &Path) -> impl FnOnce(KeyringFault) -> Self {
        |fault| Self { path: path.to_owned(), fault }
    }
}

impl Keyring {
    /// Writes a new keyring to `path`, readable by its owner alone. Returns once it is on disk.
    ///
    /// # Errors
    /// [`KeyringFault::Exists`] if there is anything at `path`, [`KeyringFault::Write`] if the file
    /// system refuses.
    pub fn create_file(path: &Path, now: Timestamp) -> Result<(), KeyringError> {
        create(path, &Self::generate(now)).map_err(KeyringError::at(path))
    }

    /// Reads the keyring at `path`.
    ///
    /// # Errors
    /// A [`KeyringFault`] if others than the file's owner may read it (its group may, if root owns
    /// it), or if it is not a complete keyring.
    pub fn load(path: &Path) -> Result<Self, KeyringError> {
        open_guarded(path)
            .and_then(|file| read(&file))
            .and_then(|text| Self::parse(&text))
            .map_err(KeyringError::at(path))
    }

    /// Adds a new key of `kind` to the file at `path`. It is not primary yet, so that every replica
    /// can load it before the first value is made with it. If a key of this kind was added and not promoted yet, adds
    /// none. Returns the id of the key that waits to be promoted, and whether it is new.
    ///
    /// # Errors
    /// The [`KeyringFault`]s of reading and writing the file.
    pub fn add_to_file(
        path: &Path,
        kind: KeyKind,
        now: Timestamp,
    ) -> Result<(KeyId, bool), KeyringError> {
        edit(path, |keys| {
            // New keys are appended, so those behind the primary one were never promoted, or taken back.
            let primary = keys.iter().position(|(key, _)| key.kind == kind && key.primary);
            let waits = |(key, _): &&Key| key.kind == kind && key.retired_at.is_none();
            let waiting = keys.iter().skip(primary.map_or(0, |at| at + 1)).find(waits);
            if let Some((status, _)) = waiting {
                return Ok(Edit::Unchanged((status.id.clone(), false)));
            }
            let key = new_key(kind, false, now);
            let id = key.0.id.clone();
            keys.push(key);
            Ok(Edit::Changed((id, true)))
        })
        .map_err(KeyringError::at(path))
    }

    /// Makes the key `id` the primary of its kind in the file at `path`. Returns whether it was not yet.
    ///
    /// # Errors
    /// [`KeyringFault::NoSuchKey`] if the file has no such key, [`KeyringFault::Retired`], and the faults of reading
    /// and writing.
    pub fn promote_in_file(path: &Path, id: &KeyId) -> Result<bool, KeyringError> {
        edit(path, |keys| {
            let (key, _) = &keys[position(keys, id)?];
            if key.retired_at.is_some() {
                return Err(KeyringFault::Retired(id.clone()));
            }
            if key.primary {
                return Ok(Edit::Unchanged(false));
            }
            let kind = key.kind;
            for (status, _) in keys.iter_mut().filter(|(status, _)| status.kind == kind) {
                status.primary = status.id == *id;
            }
            Ok(Edit::Changed(true))
        })
        .map_err(KeyringError::at(path))
    }

    /// Retires the key `id` in the file at `path`: of a signing key its public half stays, a fingerprint key stays for
    /// `audit who`, and of other keys only the entry. Returns whether it was not retired yet.
    ///
    /// # Errors
    /// [`KeyringFault::NoSuchKey`] if the file has no such key, [`KeyringFault::IsPrimary`], and the faults of reading
    /// and writing.
    pub fn retire_in_file(path: &Path, id: &KeyId, now: Timestamp) -> Result<bool, KeyringError> {
        edit(path, |keys| {
            let at = position(keys, id)?;
            let key = &mut keys[at];
            if key.0.primary {
                return Err(KeyringFault::IsPrimary(id.clone(), key.0.kind));
            }
            if key.0.retired_at.is_some() {
                return Ok(Edit::Unchanged(false));
            }
            retire(key, now);
            Ok(Edit::Changed(true))
        })
        .map_err(KeyringError::at(path))
    }
}

/// Returns the index of the key `id`.
fn position(keys: &[Key], id: &KeyId) -> Result<usize, KeyringFault> {
    let found = keys.iter().position(|(status, _)| status.id == *id);
    found.ok_or_else(|| KeyringFault::NoSuchKey(id.clone()))
}

/// The outcome of an edit.
enum Edit<T> {
    /// The keys have changed, so the file is to be replaced.
    Changed(T),
    /// The file stays as it is.
    Unchanged(T),
}

fn create(path: &Path, text: &str) -> Result<(), KeyringFault> {
    let mut options = OpenOptions::new();
    let mut file =
        options.write(true).create_new(true).mode(0o600).open(path).map_err(|error| match error
            .kind()
        {
            io::ErrorKind::AlreadyExists => KeyringFault::Exists,
            _ => KeyringFault::Write(error),
        })?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| atomic::sync_parent(path))
        .map_err(KeyringFault::Write)
}

/// Edits the keys of the file at `path` with `change`. A reader sees the old file or the new one; the
/// new one keeps the owner and the mode.
fn edit<T>(
    path: &Path,
    change: impl FnOnce(&mut Vec<Key>) -> Result<Edit<T>, KeyringFault>,
) -> Result<T, KeyringFault> {
    // Symbolic links are resolved, so that the file is replaced and not the link.
    let path = fs::canonicalize(path).map_err(KeyringFault::Read)?;
    // The temporary file of this edit excludes other edits until it is done.
    let mut replacement = Replacement::exclusive(&path).map_err(KeyringFault::Write)?;
    match write_edited(&path, replacement.file(), change)? {
        Edit::Changed(outcome) => {
            replacement.commit().map_err(KeyringFault::Write)?;
            Ok(outcome)
        }
        Edit::Unchanged(outcome) => Ok(outcome),
    }
}

/// Writes the edited keys of the file at `path` into `new`.
fn write_edited<T>(
    path: &Path,
    new: &mut File,
    change: impl FnOnce(&mut Vec<Key>) -> Result<Edit<T>, KeyringFault>,
) -> Result<Edit<T>, KeyringFault> {
    let old = open_guarded(path)?;
    let metadata = old.metadata().map_err(KeyringFault::Read)?;
    let mut keys = parse_keys(&read(&old)?)?;
    let outcome = change(&mut keys)?;
    if matches!(outcome, Edit::Unchanged(_)) {
        return Ok(outcome);
    }
    let text = render(&keys);
    Keyring::parse(&text)?;
    fchown(&*new, Some(metadata.uid()), Some(metadata.gid()))
        .and_then(|()| new.set_permissions(Permissions::from_mode(metadata.mode() & 0o777)))
        .and_then(|()| new.write_all(text.as_bytes()))
        .map_err(KeyringFault::Write)?;
    Ok(outcome)
}

/// Opens the file at `path` for reading, unless its mode lets others than its owner read it.
fn open_guarded(path: &Path) -> Result<File, KeyringFault> {
    let file = bounded::open(path).map_err(KeyringFault::Read)?;
    // The metadata is that of the open file: the path may name another file by now.
    let metadata = file.metadata().map_err(KeyringFault::Read)?;
    if !metadata.is_file() {
        return Err(KeyringFault::NotAFile);
    }
    let mode = metadata.mode() & 0o7777;
    if is_exposed(mode, metadata.uid()) {
        return Err(KeyringFault::Exposed(mode));
    }
    Ok(file)
}

fn read(file: &File) -> Result<Zeroizing<String>, KeyringFault> {
    let limits = Limits { bytes: MAX_LEN, ..bounded::FILE };
    let mut bytes = bounded::read_from(file, limits).map_err(|error| match error.kind() {
        io::ErrorKind::FileTooLarge => KeyringFault::NotAKeyring,
        _ => KeyringFault::Read(error),
    })?;
    text::decode(mem::take(&mut *bytes)).map_err(|error| match error {
        NotText::NotUtf8(_) => KeyringFault::NotAKeyring,
        error => KeyringFault::Read(error.into()),
    })
}

/// Whether the mode of a file of user `owner` gives access to others. Group access is accepted if
/// root owns the file: Kubernetes gives a secret's files to root, with group read for the pod's
/// `fsGroup`.
fn is_exposed(mode: u32, owner: u32) -> bool {
    const ROOT: u32 = 0;
    let allowed = if owner == ROOT { 0o740 } else { 0o700 };
    mode & 0o777 & !allowed != 0
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use tempfile::TempDir;

    use super::*;

    /// Creates a keyring in a directory of its own.
    fn keyring_file() -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyring.toml");
        Keyring::create_file(&path, DateTime::UNIX_EPOCH).unwrap();
        (directory, path)
    }

    fn primary_of(path: &Path, kind: KeyKind) -> KeyId {
        let keyring = Keyring::load(path).unwrap();
        let primary = keyring.status().iter().find(|key| key.kind == kind && key.primary);
        primary.unwrap().id.clone()
    }

    #[test]
    fn a_new_file_is_private_loads_and_is_never_overwritten() {
        let (_directory, path) = keyring_file();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let ids = Keyring::load(&path).unwrap().key_ids();
        let again = Keyring::create_file(&path, DateTime::UNIX_EPOCH).unwrap_err();
        assert!(matches!(again.fault, KeyringFault::Exists));
        assert_eq!(Keyring::load(&path).unwrap().key_ids(), ids);
    }

    #[test]
    fn a_file_that_others_may_read_is_refused_by_name() {
        let (_directory, path) = keyring_file();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let error = Keyring::load(&path).unwrap_err().to_string();
        assert!(error.contains("keyring.toml: its mode 0644"), "{error}");
    }

    #[test]
    fn the_group_may_read_only_what_root_owns() {
        for (mode, owner, exposed) in [
            (0o600, 1000, false),
            (0o400, 0, false),
            (0o440, 0, false),
            (0o640, 0, false),
            (0o440, 1000, true),
            (0o660, 0, true),
            (0o444, 0, true),
            (0o602, 1000, true),
        ] {
            assert_eq!(is_exposed(mode, owner), exposed, "{mode:o} of {owner}");
        }
    }

    #[test]
    fn a_missing_file_or_a_directory_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("none.toml");
        let error = Keyring::load(&missing).unwrap_err().to_string();
        assert!(error.contains("none.toml: it cannot be read"), "{error}");
        let error = Keyring::load(directory.path()).unwrap_err();
        assert!(matches!(error.fault, KeyringFault::NotAFile));
    }

    #[test]
    fn an_added_key_is_not_primary_until_it_is_promoted() {
        let (_directory, path) = keyring_file();
        let old = primary_of(&path, KeyKind::Sealing);
        let add = || Keyring::add_to_file(&path, KeyKind::Sealing, DateTime::UNIX_EPOCH).unwrap();
        let (new, is_new) = add();
        assert!(is_new);
        assert_eq!(primary_of(&path, KeyKind::Sealing), old);
        assert_eq!(add(), (new.clone(), false), "one key of a kind waits at a time");
        let others = primary_of(&path, KeyKind::Intake);
        assert!(Keyring::promote_in_file(&path, &new).unwrap());
        assert!(!Keyring::promote_in_file(&path, &new).unwrap());
        assert_eq!(primary_of(&path, KeyKind::Sealing), new);
        assert_eq!(primary_of(&path, KeyKind::Intake), others);
        assert!(Keyring::load(&path).unwrap().key_ids().contains(&old));
    }

    #[test]
    fn an_edit_keeps_every_key_and_the_mode_and_leaves_nothing_behind() {
        let (directory, path) = keyring_file();
        fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
        let before = parse_keys(&fs::read_to_string(&path).unwrap()).unwrap();
        Keyring::add_to_file(&path, KeyKind::Signing, DateTime::UNIX_EPOCH).unwrap();
        let after = parse_keys(&fs::read_to_string(&path).unwrap()).unwrap();
        assert!(before == after[..4], "the keys that were there are unchanged");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o400);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_edit_behind_a_link_replaces_the_file_and_keeps_the_link() {
        let (directory, path) = keyring_file();
        let link = directory.path().join("link.toml");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let (id, _) = Keyring::add_to_file(&link, KeyKind::Intake, DateTime::UNIX_EPOCH).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(Keyring::load(&path).unwrap().key_ids().contains(&id));
    }

    #[test]
    fn a_refused_edit_changes_nothing() {
        let (directory, path) = keyring_file();
        let before = fs::read_to_string(&path).unwrap();
        let error = Keyring::promote_in_file(&path, &"s0".parse().unwrap()).unwrap_err();
        assert!(error.to_string().ends_with("keyring.toml: it has no key s0"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), before);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn edits_at_once_take_turns_whatever_a_killed_one_left_behind() {
        let (directory, path) = keyring_file();
        fs::write(atomic::temporary_path(&path), "half").unwrap();
        std::thread::scope(|scope| {
            for kind in KeyKind::ALL {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..5 {
                        let (id, _) =
                            Keyring::add_to_file(path, kind, DateTime::UNIX_EPOCH).unwrap();
                        Keyring::promote_in_file(path, &id).unwrap();
                    }
                });
            }
        });
        assert_eq!(Keyring::load(&path).unwrap().status().len(), 4 * 6);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_retired_key_leaves_what_checks_older_records_and_nothing_else() {
        let (_directory, path) = keyring_file();
        let before = Keyring::load(&path).unwrap();
        let text_before = fs::read_to_string(&path).unwrap();
        let token = crate::domain::secret::AccessToken::new("eyJ.a.b").unwrap();
        let (signing, signature) = before.sign(b"head");
        for kind in KeyKind::ALL {
            let old = primary_of(&path, kind);
            let retire = || Keyring::retire_in_file(&path, &old, DateTime::UNIX_EPOCH);
            let refused = retire().unwrap_err();
            assert!(matches!(refused.fault, KeyringFault::IsPrimary(..)), "{refused}");
            let (new, _) = Keyring::add_to_file(&path, kind, DateTime::UNIX_EPOCH).unwrap();
            Keyring::promote_in_file(&path, &new).unwrap();
            assert!(retire().unwrap());
            assert!(!retire().unwrap(), "a second time changes nothing");
            let refused = Keyring::promote_in_file(&path, &old).unwrap_err();
            assert!(matches!(refused.fault, KeyringFault::Retired(_)), "{refused}");
        }
        let after = Keyring::load(&path).unwrap();
        assert!(after.fingerprints(&token).contains(&before.fingerprint(&token)));
        let verifying = crate::crypto::VerifyingKeys::from(&after);
        assert_eq!(verifying.verify(signing.as_str(), b"head", &signature), Ok(()));
        assert_eq!(after.key_ids().len(), 4, "retired keys are not among those in use");
        assert!(!after.has_sealing_key(&primary_in(&before, KeyKind::Sealing)));
        assert_eq!(after.intake_publics().len(), 1);
        // Of the old keys, the file has the fingerprint key alone.
        let text = fs::read_to_string(&path).unwrap();
        let keys = text_before.lines().filter(|line| line.starts_with("key = "));
        assert_eq!(keys.filter(|key| text.contains(*key)).count(), 1);
        let change = before.change_to(&after).unwrap();
        assert_eq!((change.added.len(), change.promoted.len()), (4, 4));
        assert_eq!((change.retired, change.removed.len()), (before.key_ids(), 0));
        // An earlier file that somebody puts back has keys again that were retired.
        let put_back = after.change_to(&before).unwrap();
        assert_eq!(put_back.added, before.key_ids());
    }

    fn primary_in(keyring: &Keyring, kind: KeyKind) -> KeyId {
        keyring.primary(kind).clone()
    }

    #[test]
    fn another_key_under_the_same_id_is_noticed() {
        let (_directory, path) = keyring_file();
        let text = fs::read_to_string(&path).unwrap();
        let ours = Keyring::parse(&text).unwrap();
        let other = Keyring::generate(DateTime::UNIX_EPOCH).to_string();
        let key_of = |text: &str, nth: usize| {
            text.lines().filter(|line| line.starts_with("key = ")).nth(nth).unwrap().to_owned()
        };
        for (nth, id) in ours.key_ids().into_iter().enumerate() {
            let altered = text.replace(&key_of(&text, nth), &key_of(&other, nth));
            let altered = Keyring::parse(&altered).unwrap();
            assert_eq!(ours.change_to(&altered).unwrap_err().0, id);
        }
        assert_eq!(ours.change_to(&ours), Ok(crate::crypto::KeyringChange::default()));
    }
}
