//! Files that outlive the process: the state directory, the atomic replacement of a file, and files for new
//! secrets; and the reading of files that people wrote or named.

pub mod atomic;
pub mod bounded;
pub mod secret_file;
pub mod state_dir;
pub mod text;
