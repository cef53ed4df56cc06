//! Tests that run the program as a process, because they need signals, crashes, environment variables or a
//! shell.

#[cfg(feature = "embedded-postgres")]
mod canaries;
mod check;
mod crashes;
mod deadlines;
#[cfg(feature = "embedded-postgres")]
mod dev;
mod drain;
mod floods;
mod live_token;
mod proof;
mod shell;
mod tls_recipe;
#[cfg(feature = "embedded-postgres")]
mod turns;
