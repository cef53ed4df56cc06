//! Reads exports, and files of signed checkpoints, line by line.

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
};

use anyhow::Context;

use crate::{
    audit::{checkpoint::SignedCheckpoint, export::ExportLine},
    files::given_path::shown,
};

/// Longest line that is read, in bytes. The broker's own records have some hundreds, but others may have
/// inserted longer ones.
const MAX_LINE_BYTES: usize = 64 << 20;

/// Reads the lines of an export.
pub(super) struct ExportReader {
    file: PathBuf,
    reader: Box<dyn BufRead>,
    line: Vec<u8>,
    /// Number of the last line that was read, from 1.
    line_number: usize,
}

/// A line that cannot be read: where it is, and why.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct UnreadableLine(pub(super) String);

/// Reads the signed checkpoints in a file, one per line; `-` for standard input.
pub(super) fn read_checkpoints(file: &Path) -> anyhow::Result<Vec<SignedCheckpoint>> {
    let mut reader = open(file)?;
    let (mut checkpoints, mut line) = (Vec::new(), Vec::new());
    while next_line(&mut reader, &mut line).with_context(|| shown(file).to_string())?.is_some() {
        // Other lines are skipped: the file may be the broker's log.
        checkpoints.extend(serde_json::from_slice::<SignedCheckpoint>(&line));
    }
    Ok(checkpoints)
}

fn open(file: &Path) -> anyhow::Result<Box<dyn BufRead>> {
    let mut opened: Box<dyn BufRead> = if file == Path::new("-") {
        Box::new(BufReader::new(io::stdin()))
    } else {
        let opened = File::open(file).with_context(|| format!("cannot read {}", shown(file)))?;
        Box::new(BufReader::with_capacity(1 << 18, opened))
    };
    skip_mark(&mut opened).with_context(|| format!("cannot read {}", shown(file)))?;
    Ok(opened)
}

/// Skips the byte order mark of UTF-8. Refuses UTF-16 and UTF-32, whose lines could not be compared with what was
/// exported.
fn skip_mark(reader: &mut impl BufRead) -> io::Result<()> {
    let start = reader.fill_buf()?;
    match start {
        [0xEF, 0xBB, 0xBF, ..] => reader.consume(3),
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] | [0, ..] | [_, 0, ..] => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is UTF-16 or UTF-32: use the file as it was exported",
            ));
        }
        _ => {}
    }
    Ok(())
}

/// Reads a line with its end, and returns its length; `None` at the end of the file. Of a line that is
/// longer than [`MAX_LINE_BYTES`], `line` holds the beginning, and the rest is skipped.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<Option<u64>> {
    line.clear();
    let mut length = 0;
    loop {
        let available = match reader.fill_buf() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            available => available?,
        };
        let end = available.iter().position(|b| *b == b'\n').map(|at| at + 1);
        let taken = end.unwrap_or(available.len());
        let room = MAX_LINE_BYTES - line.len();
        line.extend_from_slice(&available[..taken.min(room)]);
        reader.consume(taken);
        length += taken as u64;
        if end.is_some() || taken == 0 {
            return Ok(Some(length).filter(|length| *length > 0));
        }
    }
}

impl ExportReader {
    /// Opens an export, `-` for standard input.
    pub(super) fn open(file: &Path) -> anyhow::Result<Self> {
        Ok(Self { reader: open(file)?, file: file.to_owned(), line: Vec::new(), line_number: 0 })
    }

    /// Returns the next line, decoded if it can be; `None` at the end of the file.
    ///
    /// # Errors
    /// When the file cannot be read any further.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<Result<ExportLine, UnreadableLine>>> {
        self.line_number += 1;
        let location = format!("{}, line {}", shown(&self.file), self.line_number);
        let length = next_line(&mut self.reader, &mut self.line);
        let Some(length) = length.with_context(|| location.clone())? else { return Ok(None) };
        if length > MAX_LINE_BYTES as u64 {
            let too_long = format!("{location}: {length} bytes are more than a record can have");
            return Ok(Some(Err(UnreadableLine(too_long))));
        }
        let line = ExportLine::parse(&self.line);
        Ok(Some(line.map_err(|why| UnreadableLine(format!("{location}: {why}")))))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_line_that_is_too_long_is_skipped_and_the_next_one_is_read() {
        let long = MAX_LINE_BYTES as u64 + 5;
        let text = io::repeat(b'x').take(long).chain(&b"\nnext\n"[..]);
        let (mut reader, mut line) = (BufReader::new(text), Vec::new());
        assert_eq!(next_line(&mut reader, &mut line).unwrap(), Some(long + 1));
        assert_eq!(line.len(), MAX_LINE_BYTES);
        assert_eq!(next_line(&mut reader, &mut line).unwrap(), Some(5));
        assert_eq!(line, b"next\n");
        assert_eq!(next_line(&mut reader, &mut line).unwrap(), None);
    }

    #[test]
    fn lines_are_read_with_their_ends() {
        let (mut reader, mut line) = (&b"one\ntwo"[..], Vec::new());
        for expected in [&b"one\n"[..], b"two"] {
            assert!(next_line(&mut reader, &mut line).unwrap().is_some());
            assert_eq!(line, expected);
        }
        assert_eq!(next_line(&mut reader, &mut line).unwrap(), None);
    }
}
