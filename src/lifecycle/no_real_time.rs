//! The real-time signals of systems that have none, or whose programs get none.

use std::{future::pending, io, ops::RangeInclusive};

/// The signals by their numbers on Linux.
pub(super) const NUMBERS: RangeInclusive<i32> = 34..=64;

/// The signals that arrive: none.
pub(super) struct RealTimeSignals;

/// Does nothing.
#[expect(clippy::unnecessary_wraps, reason = "as on Linux")]
pub(super) fn block() -> io::Result<()> {
    Ok(())
}

impl RealTimeSignals {
    /// Does nothing.
    #[expect(clippy::unnecessary_wraps, reason = "as on Linux")]
    pub(super) fn take() -> io::Result<Self> {
        Ok(Self)
    }

    /// Never returns.
    pub(super) async fn next(&mut self) -> i32 {
        pending().await
    }
}

/// Returns the name of the signal `number`.
pub(super) fn name(number: i32) -> String {
    format!("SIGRTMIN+{}", number - NUMBERS.start())
}
