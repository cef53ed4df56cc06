//! What the broker signs of its audit log: how far a chain goes, and what retention removed of it.
//!
//! `docs/audit-format.md` says the same for a second implementation; change both or neither.

use serde::{Deserialize, Serialize};

use super::{
    chain::{ChainHead, Digest, integer, netstring},
    timestamp_format,
};
use crate::{
    crypto::{Keyring, SignatureError, VerifyingKeys},
    domain::clock::Timestamp,
};

/// What separates the signatures of heads, and those of cuts, from all others of the same key.
const HEAD_DOMAIN: &[u8] = b"token-broker audit head v1\n";
const CUT_DOMAIN: &[u8] = b"token-broker audit cut v1\n";

/// Who vouches for a statement.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Signature {
    /// The signing key's name.
    pub key_id: String,
    /// Ed25519, 64 bytes.
    #[serde(with = "hex")]
    pub signature: Vec<u8>,
}

impl Signature {
    fn new(keyring: &Keyring, message: &[u8]) -> Self {
        let (key_id, signature) = keyring.sign(message);
        Self { key_id: key_id.to_string(), signature }
    }

    fn verify(&self, keys: &VerifyingKeys, message: &[u8]) -> Result<(), SignatureError> {
        keys.verify(&self.key_id, message, &self.signature)
    }
}

/// That a chain had this record at that time. A copy kept elsewhere shows whether the log was cut
/// short since.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SignedCheckpoint {
    /// The chain.
    pub chain: String,
    /// The number of its last record.
    pub seq: i64,
    /// That record's hash.
    pub hash: Digest,
    /// When it was signed, in whole microseconds.
    #[serde(with = "timestamp_format")]
    pub at: Timestamp,
    /// By whom.
    #[serde(flatten)]
    pub signature: Signature,
}

impl SignedCheckpoint {
    /// Signs that `chain` had `head` at `at`, which is cut to microseconds.
    #[must_use]
    pub fn new(keyring: &Keyring, chain: &str, head: ChainHead, at: Timestamp) -> Self {
        let at = timestamp_format::fit(at);
        let signature = Signature::new(keyring, &Self::message(chain, head, at));
        Self { chain: chain.to_owned(), seq: head.seq, hash: head.hash, at, signature }
    }

    /// The place in the chain.
    #[must_use]
    pub fn head(&self) -> ChainHead {
        ChainHead { seq: self.seq, hash: self.hash }
    }

    /// Whether it was signed so.
    ///
    /// # Errors
    /// Says why it proves nothing.
    pub fn verify(&self, keys: &VerifyingKeys) -> Result<(), SignatureError> {
        self.signature.verify(keys, &Self::message(&self.chain, self.head(), self.at))
    }

    /// The bytes that are signed: the domain, and each value in its order as a netstring.
    fn message(chain: &str, head: ChainHead, at: Timestamp) -> Vec<u8> {
        let mut message = HEAD_DOMAIN.to_vec();
        netstring(&mut message, chain);
        integer(&mut message, head.seq);
        netstring(&mut message, head.hash.0);
        integer(&mut message, at.timestamp_micros());
        message
    }
}

/// Records of a chain that follow each other.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PrunedRun {
    /// The number of the first.
    pub first_seq: i64,
    /// The hash of the record before that.
    pub prev_hash: Digest,
    /// The last of them.
    pub last: ChainHead,
}

/// That retention removed these records. By it a proof goes on from the record before to the one
/// after, and tells what the rule removed from what somebody else did.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PruningReceipt {
    /// The chain.
    pub chain: String,
    /// The number of the first record that was removed.
    pub first_seq: i64,
    /// The hash of the record before it.
    pub prev_hash: Digest,
    /// The number of the last record that was removed.
    pub last_seq: i64,
    /// That record's hash.
    pub hash: Digest,
    /// When, in whole microseconds.
    #[serde(with = "timestamp_format")]
    pub at: Timestamp,
    /// By whom.
    #[serde(flatten)]
    pub signature: Signature,
}

impl PruningReceipt {
    /// Signs that `run` of `chain` was removed at `at`, which is cut to microseconds.
    #[must_use]
    pub fn new(keyring: &Keyring, chain: &str, run: PrunedRun, at: Timestamp) -> Self {
        let at = timestamp_format::fit(at);
        let signature = Signature::new(keyring, &Self::message(chain, run, at));
        let PrunedRun { first_seq, prev_hash, last: ChainHead { seq: last_seq, hash } } = run;
        Self { chain: chain.to_owned(), first_seq, prev_hash, last_seq, hash, at, signature }
    }

    /// What was removed.
    #[must_use]
    pub fn run(&self) -> PrunedRun {
        let last = ChainHead { seq: self.last_seq, hash: self.hash };
        PrunedRun { first_seq: self.first_seq, prev_hash: self.prev_hash, last }
    }

    /// How many records were removed.
    #[must_use]
    pub fn records(&self) -> i64 {
        self.last_seq.saturating_sub(self.first_seq).saturating_add(1)
    }

    /// Whether it was signed so.
    ///
    /// # Errors
    /// Says why it proves nothing.
    pub fn verify(&self, keys: &VerifyingKeys) -> Result<(), SignatureError> {
        self.signature.verify(keys, &Self::message(&self.chain, self.run(), self.at))
    }

    /// The bytes that are signed: the domain, and each value in its order as a netstring.
    fn message(chain: &str, run: PrunedRun, at: Timestamp) -> Vec<u8> {
        let mut message = CUT_DOMAIN.to_vec();
        netstring(&mut message, chain);
        integer(&mut message, run.first_seq);
        netstring(&mut message, run.prev_hash.0);
        integer(&mut message, run.last.seq);
        netstring(&mut message, run.last.hash.0);
        integer(&mut message, at.timestamp_micros());
        message
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    const CHAIN: &str = "c00000001-0123456789abcdef";

    fn at() -> Timestamp {
        DateTime::from_timestamp_micros(1_717_138_601_944_000).unwrap()
    }

    fn keyring() -> Keyring {
        Keyring::parse(&Keyring::generate(DateTime::UNIX_EPOCH)).unwrap()
    }

    #[test]
    fn the_signed_bytes_are_the_documented_ones() {
        let head = ChainHead { seq: 12, hash: Digest([b'h'; 32]) };
        assert_eq!(
            String::from_utf8(SignedCheckpoint::message(CHAIN, head, at())).unwrap(),
            "token-broker audit head v1\n26:c00000001-0123456789abcdef,2:12,\
             32:hhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhh,16:1717138601944000,"
        );
        let run = PrunedRun { first_seq: 3, prev_hash: Digest([b'p'; 32]), last: head };
        assert_eq!(
            String::from_utf8(PruningReceipt::message(CHAIN, run, at())).unwrap(),
            "token-broker audit cut v1\n26:c00000001-0123456789abcdef,1:3,\
             32:pppppppppppppppppppppppppppppppp,2:12,32:hhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhh,\
             16:1717138601944000,"
        );
    }

    #[test]
    fn every_value_of_a_head_and_of_a_cut_is_under_its_signature() {
        let keyring = keyring();
        let keys = VerifyingKeys::from(&keyring);
        let head = SignedCheckpoint::new(
            &keyring,
            CHAIN,
            ChainHead { seq: 12, hash: Digest([1; 32]) },
            at(),
        );
        assert_eq!(head.verify(&keys), Ok(()));
        let edits: [fn(&mut SignedCheckpoint); 4] = [
            |it| it.chain.push('x'),
            |it| it.seq += 1,
            |it| it.hash.0[0] ^= 1,
            |it| it.at += chrono::TimeDelta::microseconds(1),
        ];
        for edit in edits {
            let mut edited = head.clone();
            edit(&mut edited);
            assert!(edited.verify(&keys).is_err(), "{edited:?}");
        }
        let run = PrunedRun { first_seq: 3, prev_hash: Digest([2; 32]), last: head.head() };
        let cut = PruningReceipt::new(&keyring, CHAIN, run, at());
        assert_eq!((cut.verify(&keys), cut.records(), cut.run()), (Ok(()), 10, run));
        let edits: [fn(&mut PruningReceipt); 6] = [
            |it| it.chain.push('x'),
            |it| it.first_seq += 1,
            |it| it.prev_hash.0[0] ^= 1,
            |it| it.last_seq += 1,
            |it| it.hash.0[0] ^= 1,
            |it| it.at += chrono::TimeDelta::microseconds(1),
        ];
        for edit in edits {
            let mut edited = cut.clone();
            edit(&mut edited);
            assert!(edited.verify(&keys).is_err(), "{edited:?}");
        }
    }

    #[test]
    fn statements_read_back_from_json_and_are_signed_to_the_microsecond() {
        let keyring = keyring();
        let nanos = at() + chrono::TimeDelta::nanoseconds(999);
        let head = SignedCheckpoint::new(
            &keyring,
            CHAIN,
            ChainHead { seq: 1, hash: Digest([1; 32]) },
            nanos,
        );
        let text = serde_json::to_string(&head).unwrap();
        assert!(text.starts_with("{\"chain\":\"c00000001-0123456789abcdef\",\"seq\":1,\"hash\":"));
        let read: SignedCheckpoint = serde_json::from_str(&text).unwrap();
        assert_eq!(read, head);
        let run = PrunedRun { first_seq: 1, prev_hash: Digest::ZERO, last: head.head() };
        let cut = PruningReceipt::new(&keyring, CHAIN, run, nanos);
        let read: PruningReceipt =
            serde_json::from_str(&serde_json::to_string(&cut).unwrap()).unwrap();
        assert_eq!(read, cut);
        assert_eq!(read.verify(&VerifyingKeys::from(&keyring)), Ok(()));
    }
}
