//! The files of the agent: for each account `NAME.token` with the token alone, and `NAME.json` with what is known
//! about it.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use token_broker_client::Token;
use tracing::info;

use crate::{
    domain::{account::AccountName, caller::AccountPattern, clock::Timestamp},
    files::{
        atomic::{self, Access, temporary_path},
        given_path::begins_with_existing,
    },
};

/// The directory of the files, and who may read them.
pub(super) struct TokenFiles {
    directory: PathBuf,
    access: Access,
}

/// The content of `NAME.json`. It contains no secret.
#[derive(Deserialize, Serialize)]
struct Description {
    account: String,
    /// A text, because many parsers round numbers beyond 2^53.
    generation: String,
    expires_at: Option<String>,
    issued_at: Option<String>,
    allowed_ip: String,
    api_base_url: String,
}

/// A file of an earlier agent whose token is still live.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Kept {
    pub(super) account: String,
    pub(super) generation: u64,
    pub(super) expires_in: Duration,
}

impl TokenFiles {
    /// Makes the directory if it is not there, as `install -d` does: for the owner alone, and for the group too if
    /// that may read the files.
    ///
    /// # Errors
    /// When the directory is none, or cannot be made.
    pub(super) fn new(directory: PathBuf, access: Access) -> io::Result<Self> {
        match fs::metadata(&directory) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(io::ErrorKind::NotADirectory.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => make(&directory, access)?,
            Err(error) => return Err(error),
        }
        Ok(Self { directory, access })
    }

    /// Returns the path of the account's token.
    pub(super) fn token_path(&self, account: &str) -> PathBuf {
        self.directory.join(format!("{account}.token"))
    }

    fn description_path(&self, account: &str) -> PathBuf {
        self.directory.join(format!("{account}.json"))
    }

    /// Writes the token, and then its description, so that the description is never of a later token. Blocks.
    pub(super) fn write(&self, token: &Token) -> io::Result<()> {
        let account = token.account();
        // The name becomes a part of a path, and it comes from the broker.
        if account.parse::<AccountName>().is_err() {
            return Err(io::ErrorKind::InvalidFilename.into());
        }
        let description = Description {
            account: account.to_owned(),
            generation: token.generation().to_string(),
            expires_at: token.expires_at().map(rfc3339),
            issued_at: token.issued_at().map(rfc3339),
            allowed_ip: token.allowed_ip().to_owned(),
            api_base_url: token.api_base_url().to_owned(),
        };
        let description = format!("{}\n", serde_json::to_string_pretty(&description)?);
        let secret = token.access_token().as_bytes();
        atomic::replace_with_access(&self.token_path(account), secret, self.access)?;
        let path = self.description_path(account);
        atomic::replace_with_access(&path, description.as_bytes(), self.access)
    }

    /// Removes both files, and what an interrupted replacement left: each that can be removed, even if another
    /// cannot. Blocks.
    pub(super) fn remove(&self, account: &str) -> io::Result<()> {
        let paths = [self.token_path(account), self.description_path(account)];
        let paths = paths.iter().flat_map(|path| [path.clone(), temporary_path(path)]);
        paths.map(|path| remove_if_there(&path)).fold(Ok(()), io::Result::and)
    }

    /// Returns the live tokens of an earlier agent that `patterns` match, and removes its other files. Files that
    /// no agent wrote are left alone. Blocks.
    pub(super) fn take_over(
        &self,
        patterns: &[AccountPattern],
        now: Timestamp,
    ) -> io::Result<Vec<Kept>> {
        let mut kept = vec![];
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let Some(account) = name.to_str().and_then(account_of) else { continue };
            let is_wanted = patterns.iter().any(|pattern| pattern.matches(account.as_str()));
            match self.description(account.as_str()) {
                Some((generation, end))
                    if is_wanted && self.token_path(account.as_str()).exists() =>
                {
                    if let Ok(expires_in) = (end - now).to_std() {
                        let account = account.to_string();
                        kept.push(Kept { account, generation, expires_in });
                        continue;
                    }
                }
                // Perhaps somebody else's file.
                None if !is_wanted => continue,
                _ => {}
            }
            info!(%account, "removing the file of an earlier agent");
            self.remove(account.as_str())?;
        }
        kept.sort_by(|a, b| a.account.cmp(&b.account));
        kept.dedup();
        Ok(kept)
    }

    /// Returns the generation and the end in the account's description, if an agent wrote it.
    fn description(&self, account: &str) -> Option<(u64, Timestamp)> {
        let text = fs::read(self.description_path(account)).ok()?;
        let description: Description = serde_json::from_slice(&text).ok()?;
        let end = DateTime::parse_from_rfc3339(description.expires_at.as_deref()?).ok()?;
        let is_ours = description.account == account;
        is_ours.then(|| Some((description.generation.parse().ok()?, end.to_utc()))).flatten()
    }
}

/// Makes a directory for files with this access, and those above it. A path that begins with nothing that exists may be
/// something else, such as a token in the wrong variable, so no directory gets its name.
fn make(directory: &Path, access: Access) -> io::Result<()> {
    if !begins_with_existing(directory) {
        let why = "it is made only if its path begins with something that exists: write ./tokens, not tokens";
        return Err(io::Error::new(io::ErrorKind::NotFound, why));
    }
    let is_shared = access.mode & 0o040 != 0;
    // A group that may read the files may list them and open them, whatever the process's umask is.
    let mode = if is_shared { 0o750 } else { 0o700 };
    if let Some(parent) = directory.parent() {
        fs::create_dir_all(parent)?;
    }
    DirBuilder::new().mode(0o700).create(directory)?;
    if let Some(group) = access.group {
        chown(directory, None, Some(group))?;
    }
    fs::set_permissions(directory, Permissions::from_mode(mode))?;
    info!(directory = %directory.display(), "the directory was made");
    Ok(())
}

/// Returns the account to which a file of an agent with this name belongs.
fn account_of(name: &str) -> Option<AccountName> {
    let whole = name.strip_prefix('.').and_then(|rest| rest.strip_suffix(".new")).unwrap_or(name);
    let account = whole.strip_suffix(".token").or_else(|| whole.strip_suffix(".json"))?;
    account.parse().ok()
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn rfc3339(time: SystemTime) -> String {
    DateTime::<Utc>::from(time).to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;
    use crate::domain::clock::Clock;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn an_agent_takes_over_live_files_and_removes_what_else_agents_left() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        let now = Clock::System.wall();
        let describe = |account: &str, end: TimeDelta| {
            let end = (now + end).to_rfc3339();
            let text = serde_json::json!({
                "account": account, "generation": "7", "expires_at": end, "issued_at": null,
                "allowed_ip": "", "api_base_url": "",
            });
            write(&format!("{account}.json"), &text.to_string());
            write(&format!("{account}.token"), "secret");
        };
        describe("live", TimeDelta::seconds(60));
        describe("ended", TimeDelta::seconds(-1));
        describe("unwanted", TimeDelta::seconds(60));
        write("live-undescribed.token", "secret");
        write(".live-half.token.new", "sec");
        write("other.token", "nobody's");
        write("notes.txt", "nobody's");

        let access = Access { mode: 0o600, group: None };
        let files = TokenFiles::new(directory.path().to_owned(), access).unwrap();
        let patterns = ["live*", "ended"].map(|it| it.parse().unwrap());
        let kept = files.take_over(&patterns, now).unwrap();

        let expires_in = Duration::from_mins(1);
        assert_eq!(kept, [Kept { account: "live".into(), generation: 7, expires_in }]);
        assert_eq!(
            names(directory.path()),
            ["live.json", "live.token", "notes.txt", "other.token"]
        );
        files.remove("live").unwrap();
        files.remove("live").unwrap();
        assert_eq!(names(directory.path()), ["notes.txt", "other.token"]);
    }

    #[test]
    fn a_file_that_cannot_be_removed_keeps_none_of_the_others() {
        let directory = tempfile::tempdir().unwrap();
        let access = Access { mode: 0o600, group: None };
        let files = TokenFiles::new(directory.path().to_owned(), access).unwrap();
        fs::create_dir(directory.path().join("acme.token")).unwrap();
        fs::write(directory.path().join(".acme.token.new"), "secret").unwrap();
        fs::write(directory.path().join("acme.json"), "").unwrap();
        assert!(files.remove("acme").is_err());
        assert_eq!(names(directory.path()), ["acme.token"]);
    }

    #[test]
    fn a_directory_that_is_not_there_is_made_for_those_who_may_read_the_files() {
        let parent = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        for (name, file_mode, directory_mode) in
            [("own", 0o600, 0o700), ("shared/tokens", 0o640, 0o750)]
        {
            let path = parent.path().join(name);
            let access = Access { mode: file_mode, group: None };
            TokenFiles::new(path.clone(), access).unwrap();
            assert_eq!(mode(&path), directory_mode, "{name}");
            // One that is there stays as it is.
            fs::set_permissions(&path, Permissions::from_mode(0o711)).unwrap();
            TokenFiles::new(path.clone(), access).unwrap();
            assert_eq!(mode(&path), 0o711, "{name}");
        }
        let file = parent.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [file.clone(), file.join("below")] {
            let access = Access { mode: 0o600, group: None };
            assert!(TokenFiles::new(path, access).is_err());
        }
    }

    #[test]
    fn files_are_those_of_accounts() {
        for (name, account) in [
            ("acme.token", Some("acme")),
            ("a.b.json", Some("a.b")),
            (".acme.token.new", Some("acme")),
            (".acme.new", None),
            ("Acme.token", None),
            (".token", None),
        ] {
            let found = account_of(name);
            assert_eq!(found.as_ref().map(AccountName::as_str), account, "{name}");
        }
    }
}
