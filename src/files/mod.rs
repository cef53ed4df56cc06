//! Files that outlive the process: the state directory, and the atomic replacement of a file.

pub mod atomic;
pub mod state_dir;
