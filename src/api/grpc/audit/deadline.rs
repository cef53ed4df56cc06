//! The deadline of a call.

use std::time::Duration;

use tokio::time::Instant;

/// The margin on both sides of a deadline. An RPC must have answered this long before it, so that the answer
/// reaches the client in time. The record may be written until this long after it, so that a call that was
/// answered at the last moment is recorded as answered.
const MARGIN: Duration = Duration::from_millis(200);

/// The moment by which a call must have been answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(pub(super) Instant);

impl Deadline {
    /// Returns once the deadline has passed. Cancel safe.
    pub(super) async fn passes(self) {
        tokio::time::sleep_until(self.0).await;
    }

    /// Whether the deadline has passed.
    pub(super) fn has_passed(self) -> bool {
        self.0 <= Instant::now()
    }

    /// Returns when the RPC must have answered, so that the answer arrives in time: a tenth of the call's
    /// time before the deadline, but at most 200 ms before it.
    pub(super) fn for_rpc(self, arrived: Instant) -> Instant {
        self.0 - (self.0.saturating_duration_since(arrived) / 10).min(MARGIN)
    }

    /// Returns how long writing the record may take from now on: until 200 ms after the deadline, but at
    /// most `limit`.
    pub(super) fn time_for_record(self, limit: Duration) -> Duration {
        limit.min(self.0.saturating_duration_since(Instant::now()) + MARGIN)
    }
}
