//! Files that outlive the process: the state directory, the atomic replacement of a file, and files for new
//! secrets; the paths that people give, and the reading of files that they wrote or named.

pub mod atomic;
pub mod bounded;
pub mod given_path;
pub mod secret_file;
pub mod state_dir;
pub mod text;
