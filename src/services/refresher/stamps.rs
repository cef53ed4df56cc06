//! For which accounts tokens were issued that the database may not know: on disk before the call, so
//! that a replica that is killed finds out at its next start which stored tokens may be dead.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};

use crate::domain::account::AccountId;

/// A file of account numbers, one a line.
#[derive(Debug)]
pub(super) struct Stamps {
    path: PathBuf,
    file: Option<File>,
}

impl Stamps {
    /// The stamps that are kept in the file `path`, which need not be there.
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    /// The accounts that were stamped and not cleared. A line without its end was never on disk
    /// whole, so its call was never made.
    ///
    /// # Errors
    /// When the file cannot be read, or holds something else.
    pub(super) fn read(&self) -> io::Result<Vec<AccountId>> {
        let text = match fs::read_to_string(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            text => text?,
        };
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let number = |line: &str| line.parse().map(AccountId).map_err(io::Error::other);
        whole.lines().map(number).collect()
    }

    /// Has `account` on disk.
    ///
    /// # Errors
    /// When it cannot be written; then it may or may not be there.
    pub(super) fn add(&mut self, account: AccountId) -> io::Result<()> {
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.open()?,
        };
        // One write, so that a torn line has no end.
        file.write_all(format!("{account}\n").as_bytes())?;
        file.sync_data()?;
        self.file = Some(file);
        Ok(())
    }

    /// Forgets all of them.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        self.file = None;
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
    fn stamps_are_found_by_the_next_process_until_they_are_cleared() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("stamps");
        let mut stamps = Stamps::at(path.clone());
        assert_eq!(stamps.read().unwrap(), []);
        stamps.add(AccountId(7)).unwrap();
        stamps.add(AccountId(12)).unwrap();
        assert_eq!(Stamps::at(path.clone()).read().unwrap(), [AccountId(7), AccountId(12)]);
        stamps.clear().unwrap();
        assert_eq!(Stamps::at(path).read().unwrap(), []);
        stamps.clear().unwrap();
        stamps.add(AccountId(1)).unwrap();
        assert_eq!(stamps.read().unwrap(), [AccountId(1)]);
    }

    #[test]
    fn a_torn_line_is_no_stamp_and_a_foreign_one_is_an_error() {
        let home = tempfile::tempdir().unwrap();
        let stamps = Stamps::at(home.path().join("stamps"));
        for (text, found) in [("7\n12", vec![AccountId(7)]), ("7", vec![]), ("", vec![])] {
            fs::write(&stamps.path, text).unwrap();
            assert_eq!(stamps.read().unwrap(), found, "{text:?}");
        }
        fs::write(&stamps.path, "acme\n").unwrap();
        assert!(stamps.read().is_err());
    }
}
