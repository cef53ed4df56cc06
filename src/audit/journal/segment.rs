//! The format of a segment: its file name, its header line, and its record lines.

use std::io::Write;

use serde::{Deserialize, Serialize};

use crate::audit::{
    chain::{ChainHead, ChainLink, Digest, StoredEvent},
    json_error,
};

/// Version of the format.
const FORMAT: u32 = 1;

/// The first line of a segment.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Header {
    /// Version of the format. Records have no such key, so that it distinguishes headers from them.
    journal: u32,
    #[serde(flatten)]
    pub(super) link: ChainLink,
    /// `seq` of the segment's first record.
    pub(super) first_seq: i64,
    /// Hash of the record before the first one, which is in another segment; zeros if there is none.
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
        let mut line = serde_json::to_vec(self).expect("writing to a Vec cannot fail");
        line.push(b'\n');
        line
    }

    /// Parses the header of the segment `name`.
    pub(super) fn parse(name: &str, line: &[u8]) -> Result<Self, String> {
        let header: Self =
            serde_json::from_slice(line).map_err(|error| json_error::describe(&error))?;
        if header.journal != FORMAT {
            return Err(format!("the format is {}, not {FORMAT}", header.journal));
        }
        if name_of(&header.link.chain, header.first_seq) != name {
            return Err("the header belongs to another file".into());
        }
        Ok(header)
    }
}

/// Returns a segment's file name: `<chain>-<number of its first record, 20 digits>.jsonl`. Names
/// sort in the order of the segments.
pub(super) fn name_of(chain: &str, first_seq: i64) -> String {
    format!("{chain}-{first_seq:020}.jsonl")
}

/// Returns the number of the start that opened `chain`; `None` if that is not a chain's name.
pub(super) fn start_number(chain: &str) -> Option<u32> {
    chain.strip_prefix('c')?.split_once('-')?.0.parse().ok()
}

/// Returns the chain and the first number in a segment's file name; `None` for any other file.
pub(super) fn parse_name(name: &str) -> Option<(&str, i64)> {
    let (chain, first_seq) = name.strip_suffix(".jsonl")?.rsplit_once('-')?;
    start_number(chain)?;
    (first_seq.len() == 20).then_some((chain, first_seq.parse().ok()?))
}

/// Appends the line of `event`. `synced` is the last `seq` of the chain that is known to be synced:
/// with it, a later start distinguishes damage from a torn tail, for whose records no call was
/// answered.
pub(super) fn encode(event: &StoredEvent, synced: i64, out: &mut Vec<u8>) {
    serde_json::to_writer(&mut *out, event).expect("writing to a Vec cannot fail");
    // Replaces the closing brace. `synced` is not a column, and the hash does not cover it.
    out.pop();
    writeln!(out, ",\"synced\":{synced}}}").expect("writing to a Vec cannot fail");
}

/// Parses a record's line and checks that the record follows `head` in `chain`.
pub(super) fn decode(line: &[u8], chain: &str, head: ChainHead) -> Result<StoredEvent, String> {
    let event: StoredEvent =
        serde_json::from_slice(line).map_err(|error| json_error::describe(&error))?;
    if event.chain != chain {
        return Err("the record belongs to another chain".into());
    }
    event.follows(head)?;
    Ok(event)
}

/// Returns the value of `synced` in a line of `chain`; `None` if the line cannot be parsed or is of another
/// chain.
pub(super) fn synced_seq(line: &[u8], chain: &str) -> Option<i64> {
    #[derive(Deserialize)]
    struct SyncedField {
        chain: String,
        synced: i64,
    }
    serde_json::from_slice::<SyncedField>(line)
        .ok()
        .filter(|field| field.chain == chain)
        .map(|field| field.synced)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::audit::chain::tests::{any_record, link};

    #[test]
    fn names_sort_in_the_order_of_segments_and_parse_back() {
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
        fn any_record_is_one_line_that_parses_back(record in any_record(), synced_to in 0_i64..) {
            let mut event = StoredEvent::from_record(record, &link());
            event.link_after(&mut link().root());
            let mut line = Vec::new();
            encode(&event, synced_to, &mut line);
            prop_assert_eq!(line.iter().position(|b| *b == b'\n'), Some(line.len() - 1));
            let read = decode(&line, &link().chain, link().root());
            prop_assert_eq!(read, Ok(event));
            prop_assert_eq!(synced_seq(&line, &link().chain), Some(synced_to));
        }
    }
}
