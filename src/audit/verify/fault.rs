//! Faults of a log, with the names and descriptions that `audit verify` prints.

use std::fmt;

use crate::crypto::SignatureError;

/// A fault, and the chain that it is in.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// Name of the chain.
    pub chain: String,
    /// What is wrong there, with the numbers of the records.
    pub fault: Fault,
}

/// What is wrong with a chain. `Display` describes it to a person, [`Fault::name`] names it to a program.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Fault {
    /// A record's hash is not the hash of its content.
    Altered {
        /// The record's number.
        seq: i64,
    },
    /// The next record's `prev_hash` is not the hash of this record, although the next record is intact.
    Replaced {
        /// The record's number; 0 for the root of the chain.
        seq: i64,
    },
    /// A number occurs more than once.
    Duplicate {
        /// The number.
        seq: i64,
    },
    /// No record can have that number.
    InvalidNumber {
        /// The number.
        seq: i64,
    },
    /// A row, a line, or the rest of a journal cannot be read.
    Unreadable {
        /// The record's number; 0 if it is not known.
        seq: i64,
        /// The table or the file.
        place: String,
        /// What is wrong.
        why: String,
    },
    /// A line of a file cannot be read, or the file ends too early.
    UnreadableLine {
        /// Where it is, and what is wrong.
        why: String,
    },
    /// The range of a receipt is not possible.
    InvalidRange {
        /// Its first number.
        first: i64,
        /// Its last number.
        last: i64,
    },
    /// A record is present although a receipt says that retention removed it.
    PresentAfterPruning {
        /// The record's number.
        seq: i64,
    },
    /// A journal's last segment ends in records that do not follow the ones before.
    TornTail {
        /// Where they are, and how many.
        location: String,
        /// The last record before them.
        last: i64,
    },
    /// Records are absent.
    Missing {
        /// The first of them.
        first: i64,
        /// The last of them.
        last: i64,
    },
    /// The chain ends before a record for which there is a checkpoint.
    EndsBeforeCheckpoint {
        /// The last record that is present.
        last: i64,
        /// The record of the checkpoint.
        head: i64,
    },
    /// The chain ends before a record that its instance has reported to have written.
    EndsBeforeReport {
        /// The last record that is present.
        last: i64,
        /// The last record that was reported.
        reported: i64,
        /// The instance.
        instance: String,
    },
    /// A record's hash is not that of its checkpoint.
    CheckpointMismatch {
        /// The record's number.
        seq: i64,
    },
    /// Records are present beyond the delivered position of the chain.
    BeyondDeliveredPosition {
        /// The first of them.
        seq: i64,
    },
    /// The last record's hash is not that of the chain's delivered position.
    DeliveredHashMismatch {
        /// The record's number.
        seq: i64,
    },
    /// No signed head covers the chain, although its records are old enough. Somebody without the keyring may have
    /// made it up.
    Unsigned,
    /// There are records of a chain that has no row in `audit_chains`.
    ChainRowMissing,
    /// There is a checkpoint of a chain that has neither a row nor records.
    ChainAbsent,
    /// The chain begins with the hash of a previous chain and names none.
    PredecessorUnnamed,
    /// A chain that another one is linked to is absent.
    PredecessorMissing {
        /// The chain that is linked to it.
        successor: String,
    },
    /// A chain ends with another record than the one that its successor is linked to.
    PredecessorEndMismatch {
        /// The last record that is present.
        last: i64,
        /// The chain that is linked to it.
        successor: String,
    },
    /// The signature of a checkpoint is not valid.
    InvalidCheckpoint {
        /// The record that the checkpoint names.
        seq: i64,
        /// Why it is not valid.
        error: SignatureError,
    },
    /// The signature of a receipt is not valid. The records that it names count as missing.
    InvalidReceipt {
        /// The first record that it names.
        first: i64,
        /// The last record that it names.
        last: i64,
        /// Why it is not valid.
        error: SignatureError,
    },
}

impl Fault {
    /// Returns the number of the first record concerned; 0 if the fault is in the chain itself.
    #[must_use]
    pub fn seq(&self) -> i64 {
        match self {
            Self::Altered { seq }
            | Self::Replaced { seq }
            | Self::Duplicate { seq }
            | Self::Unreadable { seq, .. }
            | Self::InvalidNumber { seq }
            | Self::PresentAfterPruning { seq }
            | Self::InvalidRange { first: seq, .. }
            | Self::CheckpointMismatch { seq }
            | Self::BeyondDeliveredPosition { seq }
            | Self::DeliveredHashMismatch { seq }
            | Self::InvalidCheckpoint { seq, .. }
            | Self::Missing { first: seq, .. }
            | Self::InvalidReceipt { first: seq, .. } => *seq,
            Self::EndsBeforeCheckpoint { last, .. }
            | Self::EndsBeforeReport { last, .. }
            | Self::PredecessorEndMismatch { last, .. }
            | Self::TornTail { last, .. } => last.saturating_add(1),
            Self::ChainRowMissing
            | Self::Unsigned
            | Self::UnreadableLine { .. }
            | Self::ChainAbsent
            | Self::PredecessorUnnamed
            | Self::PredecessorMissing { .. } => 0,
        }
    }

    /// Returns the name in the output of `audit verify --json`. These names are public and do not change.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Altered { .. } => "altered",
            Self::Replaced { .. } => "replaced",
            Self::Duplicate { .. } => "twice",
            Self::InvalidNumber { .. } => "no_number",
            Self::Unreadable { .. } | Self::UnreadableLine { .. } => "unreadable",
            Self::PresentAfterPruning { .. } => "not_removed",
            Self::TornTail { .. } => "torn",
            Self::ChainAbsent => "not_here",
            Self::InvalidRange { .. } => "no_run",
            Self::Missing { .. } => "missing",
            Self::EndsBeforeCheckpoint { .. } => "cut_short",
            Self::EndsBeforeReport { .. } => "not_delivered",
            Self::CheckpointMismatch { .. } => "contradicted",
            Self::BeyondDeliveredPosition { .. } => "beyond_position",
            Self::DeliveredHashMismatch { .. } => "not_the_position",
            Self::ChainRowMissing => "unknown_chain",
            Self::Unsigned => "unsigned",
            Self::PredecessorUnnamed => "no_chain_before",
            Self::PredecessorMissing { .. } => "chain_missing",
            Self::PredecessorEndMismatch { .. } => "ends_otherwise",
            Self::InvalidCheckpoint { .. } => "unproven_head",
            Self::InvalidReceipt { .. } => "unproven_cut",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Altered { seq } => {
                write!(f, "record {seq} was altered: its hash does not match its content")
            }
            Self::Replaced { seq: 0 } => {
                f.write_str("record 1 does not follow the hash that the chain is linked to")
            }
            Self::Replaced { seq } => write!(
                f,
                "record {seq} was replaced: record {} was written after another one",
                seq.saturating_add(1)
            ),
            Self::Duplicate { seq } => write!(f, "record {seq} occurs more than once"),
            Self::PresentAfterPruning { seq } => {
                write!(
                    f,
                    "record {seq} is present, although a receipt says that retention removed it"
                )
            }
            Self::TornTail { location, last } => write!(
                f,
                "the records after record {last} do not follow it ({location}): a crash interrupted \
                 their writing before any call was answered, or they were altered"
            ),
            Self::ChainAbsent => f.write_str("there is a signed head of it, and nothing else"),
            Self::Unreadable { seq: 0, place, why } => {
                write!(f, "its row in {place} cannot be read: {why}")
            }
            Self::UnreadableLine { why } => f.write_str(why),
            Self::Unreadable { seq, place, why } => {
                write!(f, "record {seq} cannot be read ({place}): {why}")
            }
            Self::InvalidNumber { seq } => write!(f, "no record can have the number {seq}"),
            Self::InvalidRange { first, last } => {
                write!(f, "a receipt names records {first} to {last}, which is no possible range")
            }
            Self::Missing { first, last } if first == last => {
                write!(f, "record {first} is missing")
            }
            Self::Missing { first, last } => write!(f, "records {first} to {last} are missing"),
            Self::EndsBeforeCheckpoint { last, head } => write!(
                f,
                "it ends with record {last}, and a signed head is of record {head}: the rest was \
                 removed, or is not delivered yet"
            ),
            Self::EndsBeforeReport { last, reported, instance } => write!(
                f,
                "records {} to {reported} are missing: replica {instance} wrote them, and they were not delivered. \
                 If its state directory still has them, start it again, or use `audit ship`",
                last.saturating_add(1)
            ),
            Self::CheckpointMismatch { seq } => {
                write!(f, "record {seq} is not the one of its signed head")
            }
            Self::BeyondDeliveredPosition { seq } => {
                write!(f, "record {seq} is beyond the last one according to audit_chains")
            }
            Self::DeliveredHashMismatch { seq } => {
                write!(f, "record {seq} is not the last one according to audit_chains")
            }
            Self::ChainRowMissing => f.write_str("it has no row in audit_chains"),
            Self::Unsigned => f.write_str(
                "no signed head covers it: it may be made up, or its broker was killed within seconds of its start",
            ),
            Self::PredecessorUnnamed => {
                f.write_str("it begins with the hash of a previous chain, and names none")
            }
            Self::PredecessorMissing { successor } => {
                write!(f, "it is missing as a whole; chain {successor} follows it")
            }
            Self::PredecessorEndMismatch { last, successor } => write!(
                f,
                "it ends with record {last}, and chain {successor} is linked to another one: later \
                 records are missing, or were not delivered"
            ),
            Self::InvalidCheckpoint { seq, error } => {
                write!(f, "the signed head of record {seq} is not valid: {error}")
            }
            Self::InvalidReceipt { first, last, error } => {
                write!(f, "the receipt for records {first} to {last} is not valid: {error}")
            }
        }
    }
}
