//! Files that outlive the process.

pub mod state_dir;
