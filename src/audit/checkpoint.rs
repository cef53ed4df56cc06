//! Signed statements about the audit log: how far a chain goes, and which records retention
//! removed.
//!
//! `docs/audit-format.md` describes the same for other implementations: a change here needs a
//! change there.

use serde::{Deserialize, Serialize};

use super::{
    chain::{ChainHead, Digest},
    netstring::{push_integer, push_text},
    timestamp_format,
};
use crate::{
    crypto::{Keyring, SignatureError, VerifyingKeys},
    domain::clock::Timestamp,
};

/// Prefixes of the signed bytes. They keep signatures of one kind from being taken for the other.
const CHECKPOINT_DOMAIN: &[u8] = b"token-broker audit head v1\n";
const RECEIPT_DOMAIN: &[u8] = b"token-broker audit cut v1\n";

/// An Ed25519 signature, and the name of the key that made it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Signature {
    /// Name of the signing key in the keyring.
    pub key_id: String,
    /// The 64 bytes of an Ed25519 signature (RFC 8032); hexadecimal in JSON.
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

/// A signed statement that a chain contained a record at a time. A copy of it, stored where those who
/// can change the log have no access, shows whether records were later removed from the chain's end.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SignedCheckpoint {
    /// Name of the chain.
    pub chain: String,
    /// `seq` of the chain's last record at that time.
    pub seq: i64,
    /// That record's hash.
    pub hash: Digest,
    /// When the checkpoint was signed, in whole microseconds.
    #[serde(with = "timestamp_format")]
    pub at: Timestamp,
    /// Signature over all other fields.
    #[serde(flatten)]
    pub signature: Signature,
}

impl SignedCheckpoint {
    /// Signs that `chain` had `head` at `at`, which is rounded down to microseconds.
    #[must_use]
    pub fn new(keyring: &Keyring, chain: &str, head: ChainHead, at: Timestamp) -> Self {
        let at = timestamp_format::limit(at);
        let signature = Signature::new(keyring, &Self::message(chain, head, at));
        Self { chain: chain.to_owned(), seq: head.seq, hash: head.hash, at, signature }
    }

    /// Returns the signed number and hash.
    #[must_use]
    pub fn head(&self) -> ChainHead {
        ChainHead { seq: self.seq, hash: self.hash }
    }

    /// Checks the signature.
    ///
    /// # Errors
    /// Says why the signature is not valid: an unknown key, or other contents than were signed.
    pub fn verify(&self, keys: &VerifyingKeys) -> Result<(), SignatureError> {
        self.signature.verify(keys, &Self::message(&self.chain, self.head(), self.at))
    }

    /// Returns the signed bytes: the prefix, and each value in a fixed order as a netstring.
    fn message(chain: &str, head: ChainHead, at: Timestamp) -> Vec<u8> {
        let mut message = CHECKPOINT_DOMAIN.to_vec();
        push_text(&mut message, chain);
        push_integer(&mut message, head.seq);
        push_text(&mut message, head.hash.0);
        push_integer(&mut message, at.timestamp_micros());
        message
    }
}

/// A contiguous range of a chain's records that retention removes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PrunedRange {
    /// `seq` of the first record in the range.
    pub first_seq: i64,
    /// Hash of the record before the range.
    pub prev_hash: Digest,
    /// `seq` and hash of the last record in the range.
    pub last: ChainHead,
}

/// A signed statement that retention removed a range of records. Verification uses it to continue
/// from the record before the range to the one after it, and to distinguish retention from any
/// other removal.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PruningReceipt {
    /// Name of the chain.
    pub chain: String,
    /// `seq` of the first removed record.
    pub first_seq: i64,
    /// Hash of the record before the range.
    pub prev_hash: Digest,
    /// `seq` of the last removed record.
    pub last_seq: i64,
    /// Hash of the last removed record.
    pub hash: Digest,
    /// When the range was removed, in whole microseconds.
    #[serde(with = "timestamp_format")]
    pub at: Timestamp,
    /// Signature over all other fields.
    #[serde(flatten)]
    pub signature: Signature,
}

impl PruningReceipt {
    /// Signs that `range` of `chain` was removed at `at`, which is rounded down to microseconds.
    #[must_use]
    pub fn new(keyring: &Keyring, chain: &str, range: PrunedRange, at: Timestamp) -> Self {
        let at = timestamp_format::limit(at);
        let signature = Signature::new(keyring, &Self::message(chain, range, at));
        let PrunedRange { first_seq, prev_hash, last: ChainHead { seq: last_seq, hash } } = range;
        Self { chain: chain.to_owned(), first_seq, prev_hash, last_seq, hash, at, signature }
    }

    /// Returns the removed range.
    #[must_use]
    pub fn range(&self) -> PrunedRange {
        let last = ChainHead { seq: self.last_seq, hash: self.hash };
        PrunedRange { first_seq: self.first_seq, prev_hash: self.prev_hash, last }
    }

    /// Checks the signature.
    ///
    /// # Errors
    /// Says why the signature is not valid: an unknown key, or other contents than were signed.
    pub fn verify(&self, keys: &VerifyingKeys) -> Result<(), SignatureError> {
        self.signature.verify(keys, &Self::message(&self.chain, self.range(), self.at))
    }

    /// Returns the signed bytes: the prefix, and each value in a fixed order as a netstring.
    fn message(chain: &str, range: PrunedRange, at: Timestamp) -> Vec<u8> {
        let mut message = RECEIPT_DOMAIN.to_vec();
        push_text(&mut message, chain);
        push_integer(&mut message, range.first_seq);
        push_text(&mut message, range.prev_hash.0);
        push_integer(&mut message, range.last.seq);
        push_text(&mut message, range.last.hash.0);
        push_integer(&mut message, at.timestamp_micros());
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
        let range = PrunedRange { first_seq: 3, prev_hash: Digest([b'p'; 32]), last: head };
        assert_eq!(
            String::from_utf8(PruningReceipt::message(CHAIN, range, at())).unwrap(),
            "token-broker audit cut v1\n26:c00000001-0123456789abcdef,1:3,\
             32:pppppppppppppppppppppppppppppppp,2:12,32:hhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhh,\
             16:1717138601944000,"
        );
    }

    #[test]
    fn a_signature_covers_every_field_of_a_checkpoint_and_of_a_receipt() {
        let keyring = keyring();
        let keys = VerifyingKeys::from(&keyring);
        let head = ChainHead { seq: 12, hash: Digest([1; 32]) };
        let checkpoint = SignedCheckpoint::new(&keyring, CHAIN, head, at());
        assert_eq!(checkpoint.verify(&keys), Ok(()));
        let edits: [fn(&mut SignedCheckpoint); 4] = [
            |it| it.chain.push('x'),
            |it| it.seq += 1,
            |it| it.hash.0[0] ^= 1,
            |it| it.at += chrono::TimeDelta::microseconds(1),
        ];
        for edit in edits {
            let mut edited = checkpoint.clone();
            edit(&mut edited);
            assert!(edited.verify(&keys).is_err(), "{edited:?}");
        }
        let range = PrunedRange { first_seq: 3, prev_hash: Digest([2; 32]), last: head };
        let receipt = PruningReceipt::new(&keyring, CHAIN, range, at());
        assert_eq!((receipt.verify(&keys), receipt.range()), (Ok(()), range));
        let edits: [fn(&mut PruningReceipt); 6] = [
            |it| it.chain.push('x'),
            |it| it.first_seq += 1,
            |it| it.prev_hash.0[0] ^= 1,
            |it| it.last_seq += 1,
            |it| it.hash.0[0] ^= 1,
            |it| it.at += chrono::TimeDelta::microseconds(1),
        ];
        for edit in edits {
            let mut edited = receipt.clone();
            edit(&mut edited);
            assert!(edited.verify(&keys).is_err(), "{edited:?}");
        }
    }

    #[test]
    fn checkpoints_and_receipts_read_back_from_json_with_microsecond_times() {
        let keyring = keyring();
        let nanos = at() + chrono::TimeDelta::nanoseconds(999);
        let head = ChainHead { seq: 1, hash: Digest([1; 32]) };
        let checkpoint = SignedCheckpoint::new(&keyring, CHAIN, head, nanos);
        let text = serde_json::to_string(&checkpoint).unwrap();
        assert!(text.starts_with("{\"chain\":\"c00000001-0123456789abcdef\",\"seq\":1,\"hash\":"));
        let read: SignedCheckpoint = serde_json::from_str(&text).unwrap();
        assert_eq!(read, checkpoint);
        let range = PrunedRange { first_seq: 1, prev_hash: Digest::ZERO, last: head };
        let receipt = PruningReceipt::new(&keyring, CHAIN, range, nanos);
        let read: PruningReceipt =
            serde_json::from_str(&serde_json::to_string(&receipt).unwrap()).unwrap();
        assert_eq!(read, receipt);
        assert_eq!(read.verify(&VerifyingKeys::from(&keyring)), Ok(()));
    }
}
