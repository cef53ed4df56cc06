//! The lines of exports and of files with heads, read one by one.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow};

use crate::audit::{checkpoint::SignedCheckpoint, export::Line};

/// The longest line that is read, in bytes; records are some hundreds.
const LONGEST_LINE: u64 = 1 << 20;

/// The lines of a file.
pub(super) struct Lines {
    file: PathBuf,
    reader: Box<dyn BufRead>,
    line: Vec<u8>,
    read: usize,
    again: Option<Line>,
}

pub(super) fn heads_in(file: &Path) -> anyhow::Result<Vec<SignedCheckpoint>> {
    let mut reader = open(file)?;
    let (mut heads, mut line) = (Vec::new(), Vec::new());
    while next_line(&mut reader, &mut line).with_context(|| file.display().to_string())? {
        // A log says other things too.
        heads.extend(serde_json::from_slice::<SignedCheckpoint>(&line));
    }
    Ok(heads)
}

fn open(file: &Path) -> anyhow::Result<Box<dyn BufRead>> {
    if file == Path::new("-") {
        return Ok(Box::new(BufReader::new(io::stdin())));
    }
    let opened = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(Box::new(BufReader::with_capacity(1 << 18, opened)))
}

/// Reads a line; `false` at the end.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    let read = reader.take(LONGEST_LINE).read_until(b'\n', line)?;
    if read as u64 == LONGEST_LINE && !line.ends_with(b"\n") {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "longer than a record can be"));
    }
    Ok(read > 0)
}

impl Lines {
    /// Opens a file; its first line is read twice.
    pub(super) fn open(file: &Path) -> anyhow::Result<Self> {
        let (reader, file) = (open(file)?, file.to_owned());
        let mut lines = Self { file, reader, line: Vec::new(), read: 0, again: None };
        lines.again = lines.next()?;
        Ok(lines)
    }

    pub(super) fn next(&mut self) -> anyhow::Result<Option<Line>> {
        if let Some(first) = self.again.take() {
            return Ok(Some(first));
        }
        self.read += 1;
        let place = || format!("{}, line {}", self.file.display(), self.read);
        if !next_line(&mut self.reader, &mut self.line).with_context(place)? {
            return Ok(None);
        }
        let line = Line::parse(&self.line);
        let place = |why| anyhow!("{}, line {}: {why}", self.file.display(), self.read);
        line.map(Some).map_err(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_without_an_end_is_not_read_into_memory() {
        let mut line = Vec::new();
        let mut endless = BufReader::new(io::repeat(b'x'));
        assert!(next_line(&mut endless, &mut line).is_err());
        let mut short = &b"one\ntwo"[..];
        for expected in [&b"one\n"[..], b"two"] {
            assert!(next_line(&mut short, &mut line).unwrap());
            assert_eq!(line, expected);
        }
        assert!(!next_line(&mut short, &mut line).unwrap());
    }
}
