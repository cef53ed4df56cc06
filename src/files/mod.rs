//! Files that outlive the process: the state directory, the atomic replacement of a file, and files for new
//! secrets; and the text of files that people wrote.

pub mod atomic;
pub mod secret_file;
pub mod state_dir;
pub mod text;
