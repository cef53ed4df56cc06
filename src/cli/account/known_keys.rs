//! The file that remembers the intake key of each database, as ssh's `known_hosts` remembers the keys of hosts.
//!
//! Each line has a key, as `keys public` prints it, a space, and the location of the tables (host, port, name of the
//! database, and the schemas unless they are `public`), as the settings name it. The location does not come from the database, where an attacker could change it.

use std::{
    env,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};

use crate::{
    crypto::IntakePublicKey,
    files::{atomic, text},
};

/// The result of a comparison with the remembered key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Outcome {
    /// The key is the remembered one.
    Known,
    /// There was none for this database. The key is remembered now.
    FirstUse,
    /// Another key is remembered.
    Changed {
        /// The remembered key.
        remembered: IntakePublicKey,
    },
}

/// The file.
pub(super) struct KnownKeys {
    file: PathBuf,
}

impl KnownKeys {
    /// Returns the keys in `file`, which need not exist.
    pub(super) fn at(file: PathBuf) -> Self {
        Self { file }
    }

    /// Returns the keys in the user's directory for configuration, as the XDG Base Directory Specification
    /// defines it.
    ///
    /// # Errors
    /// When there is no home directory.
    pub(super) fn of_user() -> anyhow::Result<Self> {
        let home =
            env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
        let home = home
            .or_else(|| {
                env::home_dir()
                    .filter(|home| !home.as_os_str().is_empty())
                    .map(|home| home.join(".config"))
            })
            .context("there is no home directory for the file of TOKEN_BROKER_KNOWN_KEYS_FILE")?;
        Ok(Self::at(home.join("token-broker/known-keys")))
    }

    /// The path of the file.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Compares `key` with the one that is remembered for `location`, or else for `earlier_location`, as earlier
    /// releases named it. If there is none for `location`, and no other for the earlier one, remembers `key`, and
    /// returns once it is on disk. Blocks while another process does the same.
    ///
    /// # Errors
    /// When the file cannot be read or written, is malformed, or could be written by others.
    pub(super) fn compare(
        &self,
        location: &str,
        earlier_location: &str,
        key: &IntakePublicKey,
    ) -> anyhow::Result<Outcome> {
        let _lock = self.lock()?;
        let text = self.read()?;
        let (remembered, is_earlier) = match find(&text, location)? {
            Some(remembered) => (Some(remembered), false),
            None => (find(&text, earlier_location)?, true),
        };
        if let Some(remembered) = remembered.clone().filter(|remembered| remembered != key) {
            return Ok(Outcome::Changed { remembered });
        }
        if is_earlier {
            atomic::replace(&self.file, replaced(&text, location, key).as_bytes())?;
        }
        Ok(if remembered.is_some() { Outcome::Known } else { Outcome::FirstUse })
    }

    /// Remembers `key` for `location` in the place of any other.
    ///
    /// # Errors
    /// See [`compare`](Self::compare).
    pub(super) fn remember(&self, location: &str, key: &IntakePublicKey) -> anyhow::Result<()> {
        let _lock = self.lock()?;
        let text = self.read()?;
        if find(&text, location)?.as_ref() != Some(key) {
            atomic::replace(&self.file, replaced(&text, location, key).as_bytes())?;
        }
        Ok(())
    }

    /// Remembers `key` for `location`, if another one of the keys `ours` is remembered for it, or for
    /// `earlier_location`. Returns whether that is so.
    ///
    /// # Errors
    /// See [`compare`](Self::compare).
    pub(super) fn succeed(
        &self,
        location: &str,
        earlier_location: &str,
        ours: &[IntakePublicKey],
        key: &IntakePublicKey,
    ) -> anyhow::Result<bool> {
        let _lock = self.lock()?;
        let text = self.read()?;
        let remembered = match find(&text, location)? {
            Some(remembered) => Some(remembered),
            None => find(&text, earlier_location)?,
        };
        let succeeds = remembered.is_some_and(|it| it != *key && ours.contains(&it));
        if succeeds {
            atomic::replace(&self.file, replaced(&text, location, key).as_bytes())?;
        }
        Ok(succeeds)
    }

    /// Waits for the lock that excludes other processes. The kernel releases it when the file is closed.
    fn lock(&self) -> io::Result<File> {
        if let Some(directory) = self.file.parent().filter(|it| !it.as_os_str().is_empty()) {
            DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        let mut name = self.file.clone().into_os_string();
        name.push(".lock");
        let lock =
            OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).open(name)?;
        lock.lock()?;
        Ok(lock)
    }

    fn read(&self) -> anyhow::Result<String> {
        match fs::metadata(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
            metadata => ensure!(
                metadata?.mode() & 0o022 == 0,
                "others may write it: run chmod 600 {}",
                self.file.display()
            ),
        }
        Ok(text::read(&self.file)?.to_string())
    }
}

/// Returns the key that `text` has for `location`.
fn find(text: &str, location: &str) -> anyhow::Result<Option<IntakePublicKey>> {
    let location = one_line(location);
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        match line.split_once(' ').map(|(key, location)| (key.parse(), location)) {
            Some((Ok(key), of)) if of == location => return Ok(Some(key)),
            Some((Ok(_), _)) => {}
            _ => bail!("line {} is not a key and the location of a database", number + 1),
        }
    }
    Ok(None)
}

/// Returns `text` with `key` for `location`.
fn replaced(text: &str, location: &str, key: &IntakePublicKey) -> String {
    let location = one_line(location);
    let is_other = |line: &&str| {
        line.starts_with('#') || line.split_once(' ').is_none_or(|(_, of)| of != location)
    };
    let mut lines: Vec<_> = text.lines().filter(is_other).map(ToOwned::to_owned).collect();
    lines.push(format!("{key} {location}"));
    lines.join("\n") + "\n"
}

/// Returns `location` with its control characters escaped.
fn one_line(location: &str) -> String {
    let mut line = String::with_capacity(location.len());
    for c in location.chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    fn key(n: u8) -> IntakePublicKey {
        IntakePublicKey::new(&format!("i{n}"), &[n; 32]).unwrap()
    }

    #[test]
    fn the_first_key_of_each_database_is_remembered_and_another_one_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config/token-broker/known-keys");
        let known = KnownKeys::at(file.clone());
        let compare = |location: &str, n| known.compare(location, location, &key(n)).unwrap();
        assert_eq!(compare("db:5432/one", 1), Outcome::FirstUse);
        assert_eq!(compare("db:5432/two", 2), Outcome::FirstUse);
        assert_eq!(compare("db:5432/one", 1), Outcome::Known);
        let changed = Outcome::Changed { remembered: key(1) };
        assert_eq!(compare("db:5432/one", 2), changed);
        assert_eq!(compare("db:5432/one", 2), changed, "a refused key is not remembered");
        // The same id with other bytes is another key.
        let same_id = IntakePublicKey::new("i1", &[9; 32]).unwrap();
        assert_eq!(known.compare("db:5432/one", "", &same_id).unwrap(), changed);

        known.remember("db:5432/one", &key(2)).unwrap();
        assert_eq!(compare("db:5432/one", 2), Outcome::Known);
        assert_eq!(compare("db:5432/two", 2), Outcome::Known);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_key_succeeds_only_another_one_of_its_keyring() {
        let directory = tempfile::tempdir().unwrap();
        let known = KnownKeys::at(directory.path().join("known-keys"));
        let succeed = |ours: &[u8]| {
            let ours: Vec<_> = ours.iter().copied().map(key).collect();
            known.succeed("db:5432/one", "", &ours, &key(2)).unwrap()
        };
        assert!(!succeed(&[1, 2]), "none is remembered");
        known.remember("db:5432/one", &key(9)).unwrap();
        known.remember("db:5432/two", &key(1)).unwrap();
        assert!(!succeed(&[1, 2]), "somebody else's is remembered");
        known.remember("db:5432/one", &key(1)).unwrap();
        assert!(succeed(&[1, 2]));
        assert!(!succeed(&[1, 2]), "it is remembered already");
        assert_eq!(known.compare("db:5432/one", "", &key(2)).unwrap(), Outcome::Known);
        assert_eq!(known.compare("db:5432/two", "", &key(1)).unwrap(), Outcome::Known);
    }

    #[test]
    fn deployments_in_schemas_of_one_database_have_keys_of_their_own() {
        let directory = tempfile::tempdir().unwrap();
        let known = KnownKeys::at(directory.path().join("known-keys"));
        let database = "db:5432/one";
        let compare = |schema: &str, n| {
            let location = format!("{database}?search_path={schema}");
            known.compare(&location, database, &key(n)).unwrap()
        };
        for _ in 0..2 {
            compare("a", 1);
            compare("b", 2);
            assert_eq!((compare("a", 1), compare("b", 2)), (Outcome::Known, Outcome::Known));
        }
        assert_eq!(compare("a", 2), Outcome::Changed { remembered: key(1) });

        // An earlier release remembered a key without the schema. Another one is not taken for a first one.
        known.remember(database, &key(3)).unwrap();
        assert_eq!(compare("c", 4), Outcome::Changed { remembered: key(3) });
        assert_eq!(compare("c", 3), Outcome::Known);
        known.remember(database, &key(5)).unwrap();
        assert_eq!(compare("c", 3), Outcome::Known);
    }

    #[test]
    fn a_file_that_others_may_write_or_that_is_malformed_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("known-keys");
        let known = KnownKeys::at(file.clone());
        fs::write(&file, format!("# comment\n\n{} db:5432/one\n", key(1))).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(known.compare("db:5432/one", "", &key(1)).unwrap(), Outcome::Known);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o660)).unwrap();
        assert!(known.compare("db:5432/one", "", &key(1)).is_err());
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        for text in ["i1", "i1:AAAA db:5432/one", "db:5432/one"] {
            fs::write(&file, text).unwrap();
            assert!(known.compare("db:5432/one", "", &key(1)).is_err(), "{text}");
            assert_eq!(fs::read_to_string(&file).unwrap(), text, "it stays as it is");
        }
    }

    proptest! {
        #[test]
        fn a_remembered_key_is_found_for_its_location_alone(a in "\\PC{0,20}|[ -~\\n]{0,20}", b in "[a-z/:]{1,9}") {
            prop_assume!(a != b);
            let text = replaced(&replaced("", &a, &key(1)), &b, &key(2));
            prop_assert_eq!(find(&text, &a).unwrap(), Some(key(1)));
            prop_assert_eq!(find(&text, &b).unwrap(), Some(key(2)));
            let text = replaced(&text, &a, &key(3));
            prop_assert_eq!(find(&text, &a).unwrap(), Some(key(3)));
            prop_assert_eq!(text.lines().count(), 2);
        }
    }
}
