//! The real-time signals of Linux.
//!
//! Each of them ends a process that does not handle it. tokio cannot handle the last one, 64, and none is handled before
//! the runtime starts. So they are blocked in all threads, and a thread reads them from a `signalfd`. The C library keeps
//! 32 and 33 for itself: it lets no program block or handle them, and they end any process.

use std::{future::pending, io, ops::RangeInclusive, thread};

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};
use tokio::sync::mpsc;

/// The signals that Linux leaves to programs, by the numbers of the C library.
pub(super) const NUMBERS: RangeInclusive<i32> = 34..=64;

/// The signals that arrive.
pub(super) struct RealTimeSignals(mpsc::Receiver<i32>);

/// Blocks the signals in this thread and those that it starts. Call it before there are others.
pub(super) fn block() -> io::Result<()> {
    Ok(set().thread_block()?)
}

fn set() -> SigSet {
    let mut set = SigSet::all();
    Signal::iterator().for_each(|named| set.remove(named));
    set
}

impl RealTimeSignals {
    /// Reads the signals, also those that arrived since they were blocked.
    pub(super) fn take() -> io::Result<Self> {
        let file = SignalFd::with_flags(&set(), SfdFlags::SFD_CLOEXEC)?;
        // Further ones wait in the kernel.
        let (sender, receiver) = mpsc::channel(8);
        thread::Builder::new().name("signals".into()).spawn(move || {
            loop {
                let number = match file.read_signal() {
                    Ok(Some(signal)) => i32::try_from(signal.ssi_signo).unwrap_or_default(),
                    Ok(None) | Err(Errno::EINTR) => continue,
                    Err(_) => return,
                };
                if sender.blocking_send(number).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self(receiver))
    }

    /// Waits for the next signal, and returns its number. Cancel safe. Never returns if they cannot be read.
    pub(super) async fn next(&mut self) -> i32 {
        match self.0.recv().await {
            Some(number) => number,
            None => pending().await,
        }
    }
}

/// Returns the name of the signal `number`.
pub(super) fn name(number: i32) -> String {
    format!("SIGRTMIN+{}", number - NUMBERS.start())
}
