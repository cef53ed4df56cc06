//! The real binary, as processes: what only shows where there are signals, crashes, an environment
//! and a shell.

#[cfg(feature = "embedded-postgres")]
mod canaries;
mod crashes;
#[cfg(feature = "embedded-postgres")]
mod dev;
mod live_token;
mod shell;
