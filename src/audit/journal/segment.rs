//! A segment's name, its header line, and its record lines.

use std::io::Write;

use serde::{Deserialize, Serialize};

use crate::audit::chain::{ChainHead, ChainLink, Digest, StoredEvent};

/// The version of the files' format.
const FORMAT: u32 = 1;

/// The first line of each segment.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Header {
    /// The format's version; also what tells a header from a record.
    journal: u32,
    #[serde(flatten)]
    pub(super) link: ChainLink,
    /// The number of the segment's first record.
    pub(super) first_seq: i64,
    /// The hash of the record before that one, wherever it is.
    pub(super) prev_hash: Digest,
}

impl Header {
    pub(super) fn new(link: &ChainLink, head: ChainHead) -> Self {
        Self { journal: FORMAT, link: link.clone(), first_seq: head.seq + 1, prev_hash: head.hash }
    }

    /// The chain's head before the segment's first record.
    pub(super) fn head(&self) -> ChainHead {
        ChainHead { seq: self.first_seq - 1, hash: self.prev_hash }
    }

    pub(super) fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("a Vec takes every byte");
        line.push(b'\n');
        line
    }

    /// Reads the header of the segment `name`.
    pub(super) fn parse(name: &str, line: &[u8]) -> Result<Self, String> {
        let header: Self = serde_json::from_slice(line).map_err(|error| error.to_string())?;
        if header.journal != FORMAT {
            return Err(format!("the format is {}, not {FORMAT}", header.journal));
        }
        if name_of(&header.link.chain, header.first_seq) != name {
            return Err("the header belongs to another file".into());
        }
        Ok(header)
    }
}

/// The file's name: `<chain>-<number of its first record, 20 digits>.jsonl`. Names sort as the
/// segments follow each other.
pub(super) fn name_of(chain: &str, first_seq: i64) -> String {
    format!("{chain}-{first_seq:020}.jsonl")
}

/// The number of the start that opened `chain`.
pub(super) fn start_number(chain: &str) -> Option<u32> {
    chain.strip_prefix('c')?.split_once('-')?.0.parse().ok()
}

/// The chain and first number in a segment's file name; `None` for any other file.
pub(super) fn parse_name(name: &str) -> Option<(&str, i64)> {
    let (chain, first_seq) = name.strip_suffix(".jsonl")?.rsplit_once('-')?;
    start_number(chain)?;
    (first_seq.len() == 20).then_some((chain, first_seq.parse().ok()?))
}

/// Appends the line of `event`. `synced` is the last number of the chain that is known to be on
/// disk: it lets a start tell a torn tail, which nobody was answered for, from damage.
pub(super) fn encode(event: &StoredEvent, synced: i64, out: &mut Vec<u8>) {
    serde_json::to_writer(&mut *out, event).expect("a Vec takes every byte");
    // In the place of the closing brace; no column, not hashed.
    out.pop();
    writeln!(out, ",\"synced\":{synced}}}").expect("a Vec takes every byte");
}

/// Reads a record's line and checks that it follows `head` in `chain`.
pub(super) fn decode(line: &[u8], chain: &str, head: ChainHead) -> Result<StoredEvent, String> {
    let event: StoredEvent = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if event.chain != chain {
        return Err("the record belongs to another chain".into());
    }
    event.follows(head)?;
    Ok(event)
}

/// What a line of `chain` says was on disk when it was written.
pub(super) fn synced(line: &[u8], chain: &str) -> Option<i64> {
    #[derive(Deserialize)]
    struct Mark {
        chain: String,
        synced: i64,
    }
    serde_json::from_slice::<Mark>(line).ok().filter(|mark| mark.chain == chain).map(|m| m.synced)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::audit::chain::tests::{any_record, link};

    #[test]
    fn names_sort_as_segments_follow_each_other_and_read_back() {
        let name = name_of(&link().chain, 12);
        assert_eq!(name, "c00000001-0123456789abcdef-00000000000000000012.jsonl");
        assert_eq!(parse_name(&name), Some((&*link().chain, 12)));
        assert!(name < name_of(&link().chain, 101));
        assert_eq!(start_number(&link().chain), Some(1));
        for other in ["delivered.json", "x.jsonl", &format!("{name}.torn"), "c1-a-1.jsonl"] {
            assert_eq!(parse_name(other), None, "{other}");
        }
    }

    #[test]
    fn a_header_is_refused_under_another_name() {
        let header = Header::new(&link(), ChainHead { seq: 11, hash: Digest([7; 32]) });
        let name = name_of(&link().chain, 12);
        let read = Header::parse(&name, &header.line()).unwrap();
        assert_eq!((read.head(), &read.link), (header.head(), &link()));
        assert!(Header::parse(&name_of(&link().chain, 13), &header.line()).is_err());
    }

    proptest! {
        #[test]
        fn any_record_is_one_line_that_reads_back(record in any_record(), synced_to in 0_i64..) {
            let mut event = StoredEvent::unplaced(record, &link());
            event.place(&mut link().root());
            let mut line = Vec::new();
            encode(&event, synced_to, &mut line);
            prop_assert_eq!(line.iter().position(|b| *b == b'\n'), Some(line.len() - 1));
            let read = decode(&line, &link().chain, link().root());
            prop_assert_eq!(read, Ok(event));
            prop_assert_eq!(synced(&line, &link().chain), Some(synced_to));
        }
    }
}
