//! The log of issues without the database. The account is written to disk before the upstream is called.
//! After a replica was killed, its next start reads from the log which stored tokens are possibly revoked.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::PathBuf,
};

use crate::domain::account::AccountId;

/// A file of account ids, one a line. All its functions block on the disk.
#[derive(Debug)]
pub(super) struct IntentLog {
    path: PathBuf,
    /// Open after the first append, until the log is cleared.
    file: Option<File>,
    /// The lines that this process has appended since the log was cleared last.
    appended: String,
}

impl IntentLog {
    /// Returns the log in the file `path`, which is created by the first append.
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, file: None, appended: String::new() }
    }

    /// Returns the accounts that were appended since the log was last cleared. A last line without its
    /// newline is ignored: it was not written completely, so the upstream was not called.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is not an account's id.
    pub(super) fn read(&self) -> io::Result<Vec<AccountId>> {
        let text = match fs::read_to_string(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            text => text?,
        };
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let account = |line: &str| line.parse().map(AccountId).map_err(io::Error::other);
        whole.lines().map(account).collect()
    }

    /// Appends the account and waits until it is on disk.
    ///
    /// # Errors
    /// When the file cannot be written; the account may be in the file or not.
    pub(super) fn append(&mut self, account: AccountId) -> io::Result<()> {
        let line = format!("{account}\n");
        // One write, so that an incomplete line lacks its newline.
        let file = if let Some(mut file) = self.file.take().filter(|file| self.leads_to(file)) {
            file.write_all(line.as_bytes())?;
            file
        } else {
            // Also if another program removed, moved or truncated the file.
            let mut file = self.open()?;
            file.write_all(format!("{}{line}", self.appended).as_bytes())?;
            file
        };
        file.sync_data()?;
        self.file = Some(file);
        self.appended.push_str(&line);
        Ok(())
    }

    /// Returns whether the path still leads to `file`, with all that was appended.
    fn leads_to(&self, file: &File) -> bool {
        let (Ok(own), Ok(found)) = (file.metadata(), fs::metadata(&self.path)) else {
            return false;
        };
        let identity = |it: &fs::Metadata| (it.dev(), it.ino());
        identity(&own) == identity(&found) && found.len() >= self.appended.len() as u64
    }

    /// Removes the file.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        self.file = None;
        self.appended.clear();
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.and_then(|()| self.sync_directory()),
        }
    }

    fn open(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        let file = options.create(true).append(true).mode(0o600).open(&self.path)?;
        self.sync_directory()?;
        Ok(file)
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_by_the_next_process_until_the_log_is_cleared() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("log");
        let mut log = IntentLog::new(path.clone());
        assert_eq!(log.read().unwrap(), []);
        log.append(AccountId(7)).unwrap();
        log.append(AccountId(12)).unwrap();
        assert_eq!(IntentLog::new(path.clone()).read().unwrap(), [AccountId(7), AccountId(12)]);
        log.clear().unwrap();
        assert_eq!(IntentLog::new(path).read().unwrap(), []);
        log.clear().unwrap();
        log.append(AccountId(1)).unwrap();
        assert_eq!(log.read().unwrap(), [AccountId(1)]);
    }

    #[test]
    fn what_another_program_removed_from_the_log_is_written_again_with_the_next_account() {
        let home = tempfile::tempdir().unwrap();
        let (path, moved) = (home.path().join("log"), home.path().join("moved"));
        let removals: [&dyn Fn(); 3] =
            [&|| fs::remove_file(&path).unwrap(), &|| fs::rename(&path, &moved).unwrap(), &|| {
                fs::write(&path, "").unwrap();
            }];
        for remove in removals {
            let mut log = IntentLog::new(path.clone());
            log.append(AccountId(7)).unwrap();
            remove();
            log.append(AccountId(12)).unwrap();
            log.append(AccountId(13)).unwrap();
            let found = IntentLog::new(path.clone()).read().unwrap();
            assert_eq!(found, [AccountId(7), AccountId(12), AccountId(13)]);
            log.clear().unwrap();
        }
    }

    #[test]
    fn an_incomplete_line_is_ignored_and_a_malformed_one_is_an_error() {
        let home = tempfile::tempdir().unwrap();
        let log = IntentLog::new(home.path().join("log"));
        for (text, found) in [("7\n12", vec![AccountId(7)]), ("7", vec![]), ("", vec![])] {
            fs::write(&log.path, text).unwrap();
            assert_eq!(log.read().unwrap(), found, "{text:?}");
        }
        fs::write(&log.path, "acme\n").unwrap();
        assert!(log.read().is_err());
    }
}
