//! Reads exports, and files of signed checkpoints, line by line.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow};

use crate::audit::{checkpoint::SignedCheckpoint, export::ExportLine};

/// Longest line that is read, in bytes. Records have some hundreds.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// Reads the lines of an export.
pub(super) struct ExportReader {
    file: PathBuf,
    reader: Box<dyn BufRead>,
    line: Vec<u8>,
    /// Number of the last line that was read, from 1.
    line_number: usize,
    /// The first line, which [`ExportReader::open`] read to find errors early.
    first: Option<ExportLine>,
}

/// Reads the signed checkpoints in a file, one per line; `-` for standard input.
pub(super) fn read_checkpoints(file: &Path) -> anyhow::Result<Vec<SignedCheckpoint>> {
    let mut reader = open(file)?;
    let (mut checkpoints, mut line) = (Vec::new(), Vec::new());
    while next_line(&mut reader, &mut line).with_context(|| file.display().to_string())? {
        // Other lines are skipped: the file may be the broker's log.
        checkpoints.extend(serde_json::from_slice::<SignedCheckpoint>(&line));
    }
    Ok(checkpoints)
}

fn open(file: &Path) -> anyhow::Result<Box<dyn BufRead>> {
    if file == Path::new("-") {
        return Ok(Box::new(BufReader::new(io::stdin())));
    }
    let opened = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(Box::new(BufReader::with_capacity(1 << 18, opened)))
}

/// Reads a line with its end; returns `false` at the end of the file.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    let read = reader.take(MAX_LINE_BYTES).read_until(b'\n', line)?;
    if read as u64 == MAX_LINE_BYTES && !line.ends_with(b"\n") {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the line is longer than a record can be",
        ));
    }
    Ok(read > 0)
}

impl ExportReader {
    /// Opens an export, `-` for standard input, and reads its first line. [`ExportReader::next`]
    /// returns that line first.
    pub(super) fn open(file: &Path) -> anyhow::Result<Self> {
        let (reader, file) = (open(file)?, file.to_owned());
        let mut export = Self { file, reader, line: Vec::new(), line_number: 0, first: None };
        export.first = export.next()?;
        Ok(export)
    }

    /// Returns the next line; `None` at the end of the file.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<ExportLine>> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        self.line_number += 1;
        let location = || format!("{}, line {}", self.file.display(), self.line_number);
        if !next_line(&mut self.reader, &mut self.line).with_context(location)? {
            return Ok(None);
        }
        let line = ExportLine::parse(&self.line);
        line.map(Some)
            .map_err(|why| anyhow!("{}, line {}: {why}", self.file.display(), self.line_number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endless_line_is_refused() {
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
