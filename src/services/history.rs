//! Checks that the database is the one that this replica knows, and in no older state: when the broker starts,
//! after each lost session, and as long as it runs.
//!
//! A backup may be restored, a standby that lagged may take over, an old primary may come back, a copy may be
//! taken for the original. Then revoked bearers would be valid again, and tokens that the upstream has ended
//! would be served.
//!
//! | file | contents |
//! |---|---|
//! | `evidence.rs` | what a replica has seen of its database, and the judgement of what it finds |
//! | `mismatch.rs` | the differences, and the error that lists them |
//! | `lost.rs` | what the journal tells about the records that a database lost |
//! | `verification.rs` | comparing the database with the evidence, at the start and later |
//! | `guard.rs` | the task that watches, and opens and closes the [`TrustGate`](crate::store::TrustGate) |

mod evidence;
mod guard;
mod lost;
mod mismatch;
mod verification;

pub use self::{
    mismatch::{DatabaseMismatch, Difference, LostRecords},
    verification::{
        HistoryError, HistoryGuard, HistorySettings, VerifiedDatabase, VerifiedSession, Witnesses,
    },
};
