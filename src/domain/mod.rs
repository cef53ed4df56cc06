//! What the broker speaks of, and the decisions about it: accounts, callers, tokens, secrets, and when
//! to issue. Nothing here does I/O; `now` is an argument, or comes from [`clock`].

pub mod account;
pub mod caller;
pub mod clock;
mod named_enum;
pub mod refresh_policy;
pub mod refresh_state;
pub mod secret;
pub mod token;
