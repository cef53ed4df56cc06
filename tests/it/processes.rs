//! The real binary, as processes: what only shows where there are signals, crashes, an environment
//! and a shell.

mod canaries;
mod check;
mod crashes;
mod deadlines;
mod dev;
mod drain;
mod floods;
mod live_token;
mod proof;
mod shell;
mod tls_recipe;
mod turns;
