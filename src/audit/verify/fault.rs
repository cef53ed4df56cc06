//! What can be wrong with a log, in words.

use std::fmt;

use crate::crypto::SignatureError;

/// Something that does not hold.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// The chain.
    pub chain: String,
    /// What.
    pub fault: Fault,
}

/// What is wrong with a chain.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Fault {
    /// A record is not what was hashed.
    Altered {
        /// Which.
        seq: i64,
    },
    /// A record is sound in itself, and not the one that its successor was written after.
    Replaced {
        /// Which; 0 for what the chain begins with.
        seq: i64,
    },
    /// A number is there again.
    Twice {
        /// Which.
        seq: i64,
    },
    /// No record can have that number.
    NoNumber {
        /// Which.
        seq: i64,
    },
    /// A cut that is none: no records can have been removed so.
    NoRun {
        /// The first record that it says was removed.
        first: i64,
        /// The last.
        last: i64,
    },
    /// A record is there that retention says it removed.
    NotRemoved {
        /// Which.
        seq: i64,
    },
    /// A journal's last segment ends in records that do not follow.
    Torn {
        /// Where, and how many.
        place: String,
        /// The last record before them.
        last: i64,
    },
    /// Records are not there.
    Missing {
        /// The first of them.
        first: i64,
        /// The last.
        last: i64,
    },
    /// A head that was signed is of a later record than the last one that is there.
    CutShort {
        /// The last record that is there.
        last: i64,
        /// The record of the head.
        head: i64,
    },
    /// A record is another one than that whose head was signed.
    Contradicted {
        /// Which.
        seq: i64,
    },
    /// There are records behind what the chain's position says is its end.
    BeyondPosition {
        /// The first of them.
        seq: i64,
    },
    /// The last record is another one than the chain's position says.
    NotThePosition {
        /// Which.
        seq: i64,
    },
    /// The chain itself is not known; somebody removed its row.
    Unknown,
    /// A head of a chain was signed, and neither its row nor a record is there.
    NotHere,
    /// The chain says that there was none before it, and begins with the hash of one.
    NoBefore,
    /// A chain that another is linked to is not there at all.
    ChainMissing {
        /// The one that is linked to it.
        successor: String,
    },
    /// A chain ends elsewhere than the one that is linked to it says.
    EndsOtherwise {
        /// The last record that is there.
        last: i64,
        /// The one that is linked to it.
        successor: String,
    },
    /// A signed head is none.
    UnprovenHead {
        /// The record that it names.
        seq: i64,
        /// Why.
        error: SignatureError,
    },
    /// A signed cut is none: what it tells of counts as missing.
    UnprovenCut {
        /// The first record that it says was removed.
        first: i64,
        /// The last.
        last: i64,
        /// Why.
        error: SignatureError,
    },
}

impl Fault {
    /// The first record that it is about; 0 where it is the chain itself.
    #[must_use]
    pub fn seq(&self) -> i64 {
        match self {
            Self::Altered { seq }
            | Self::Replaced { seq }
            | Self::Twice { seq }
            | Self::NoNumber { seq }
            | Self::NotRemoved { seq }
            | Self::NoRun { first: seq, .. }
            | Self::Contradicted { seq }
            | Self::BeyondPosition { seq }
            | Self::NotThePosition { seq }
            | Self::UnprovenHead { seq, .. }
            | Self::Missing { first: seq, .. }
            | Self::UnprovenCut { first: seq, .. } => *seq,
            Self::CutShort { last, .. }
            | Self::EndsOtherwise { last, .. }
            | Self::Torn { last, .. } => last.saturating_add(1),
            Self::Unknown | Self::NotHere | Self::NoBefore | Self::ChainMissing { .. } => 0,
        }
    }

    /// A short name for machines.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Altered { .. } => "altered",
            Self::Replaced { .. } => "replaced",
            Self::Twice { .. } => "twice",
            Self::NoNumber { .. } => "no_number",
            Self::NotRemoved { .. } => "not_removed",
            Self::Torn { .. } => "torn",
            Self::NotHere => "not_here",
            Self::NoRun { .. } => "no_run",
            Self::Missing { .. } => "missing",
            Self::CutShort { .. } => "cut_short",
            Self::Contradicted { .. } => "contradicted",
            Self::BeyondPosition { .. } => "beyond_position",
            Self::NotThePosition { .. } => "not_the_position",
            Self::Unknown => "unknown_chain",
            Self::NoBefore => "no_chain_before",
            Self::ChainMissing { .. } => "chain_missing",
            Self::EndsOtherwise { .. } => "ends_otherwise",
            Self::UnprovenHead { .. } => "unproven_head",
            Self::UnprovenCut { .. } => "unproven_cut",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Altered { seq } => {
                write!(f, "record {seq} was altered: its hash is not that of what it says")
            }
            Self::Replaced { seq: 0 } => {
                f.write_str("record 1 does not follow the hash that the chain begins with")
            }
            Self::Replaced { seq } => write!(
                f,
                "record {seq} is not the one that record {} was written after",
                seq.saturating_add(1)
            ),
            Self::Twice { seq } => write!(f, "record {seq} is there more than once"),
            Self::NotRemoved { seq } => {
                write!(f, "record {seq} is there, and retention says that it removed it")
            }
            Self::Torn { place, last } => write!(
                f,
                "what follows record {last} does not follow it ({place}): a crash tore it before \
                 any call was answered for it, or it was altered"
            ),
            Self::NotHere => f.write_str("a head of it was signed, and nothing of it is here"),
            Self::NoNumber { seq } => write!(f, "no record can have the number {seq}"),
            Self::NoRun { first, last } => {
                write!(f, "no records {first} to {last} can have been removed")
            }
            Self::Missing { first, last } if first == last => {
                write!(f, "record {first} is missing")
            }
            Self::Missing { first, last } => write!(f, "records {first} to {last} are missing"),
            Self::CutShort { last, head } => write!(
                f,
                "it ends with record {last}, and a signed head is of record {head}: the rest was \
                 removed, or is not delivered yet"
            ),
            Self::Contradicted { seq } => {
                write!(f, "record {seq} is not the one whose head was signed")
            }
            Self::BeyondPosition { seq } => {
                write!(f, "record {seq} lies behind the end that audit_chains tells")
            }
            Self::NotThePosition { seq } => {
                write!(f, "record {seq} is not the last one that audit_chains tells")
            }
            Self::Unknown => f.write_str("it is not in audit_chains"),
            Self::NoBefore => {
                f.write_str("it begins with the hash of a chain before it, and names none")
            }
            Self::ChainMissing { successor } => {
                write!(f, "it is missing as a whole; chain {successor} follows it")
            }
            Self::EndsOtherwise { last, successor } => write!(
                f,
                "it ends with record {last}, and chain {successor} follows another one: later \
                 records are missing, or were not delivered"
            ),
            Self::UnprovenHead { seq, error } => {
                write!(f, "the head of record {seq} proves nothing: {error}")
            }
            Self::UnprovenCut { first, last, error } => {
                write!(f, "that retention removed records {first} to {last} is not proven: {error}")
            }
        }
    }
}
