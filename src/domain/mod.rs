//! The domain types (accounts, callers, tokens, secrets) and the rules about them, such as when a token
//! may be issued. Nothing here does I/O. The present time is an argument, or comes from [`clock`].

pub mod account;
pub mod account_pattern;
pub mod attempt_priority;
pub mod caller;
pub mod clock;
pub mod loopback;
mod named_enum;
pub mod odd_character;
pub mod pattern_set;
pub mod plausible_time;
pub mod printable;
pub mod refresh_policy;
pub mod refresh_state;
pub mod secret;
pub mod token;
