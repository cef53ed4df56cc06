//! Settings of a journal.

use std::time::Duration;

/// How durable a record must be before the call that it describes is answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SyncMode {
    /// The record was synced to disk: it survives a power failure.
    Fsync,
    /// The record was handed to the kernel: it survives a crash of the process, but not one of the machine.
    Write,
    /// Calls are answered without being recorded. Only for `cargo bench`; no setting selects it.
    #[cfg(feature = "bench")]
    Nothing,
}

/// The settings of a journal.
#[derive(Clone, Copy, Debug)]
pub struct JournalSettings {
    /// How durable a record must be.
    pub sync: SyncMode,
    /// Size in bytes at which the writer starts a new segment.
    pub segment_bytes: u64,
    /// Limit in bytes for all segments together. Delivered segments are deleted to stay below it. When
    /// only undelivered ones are left, the journal becomes unwritable.
    pub max_bytes: u64,
    /// How long delivered segments are retained.
    pub retention: Duration,
    /// Limit in bytes for the undelivered records that are kept in memory too, in case that somebody truncates
    /// their segment.
    pub memory_bytes: usize,
}

impl Default for JournalSettings {
    /// Synced to disk, segments of 64 MiB, 8 GiB in all, delivered segments retained for 7 days, 64 MiB of
    /// undelivered records in memory.
    fn default() -> Self {
        Self {
            sync: SyncMode::Fsync,
            segment_bytes: 64 << 20,
            max_bytes: 8 << 30,
            retention: Duration::from_hours(7 * 24),
            memory_bytes: 64 << 20,
        }
    }
}
