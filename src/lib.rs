//! Token Broker: issues, keeps fresh and serves the RCS Biz Center tokens of many accounts.
//!
//! A map of the crate. A file imports only from lower floors; `ARCHITECTURE.md` says why, and draws
//! the flows.
//!
//! | floor | where | duty |
//! |---|---|---|
//! | 4 whole | [`config`], [`lifecycle`], [`app`], [`cli`] | settings, signals, composition, commands |
//! | 3 faces | [`grpc`], [`ops`] | what callers and probes touch |
//! | 2 work | [`broker`], [`refresh`], [`follow`], [`load`] | answering, issuing ahead, following changes |
//! | 1 means | [`seal`], [`bearer`], [`cache`], [`directory`], [`limit`], [`reach`], [`upstream`], [`state_dir`], [`audit`], [`store`], [`telemetry`] | each outside thing, known by one of them |
//! | 0 words | [`clock`], [`account`], [`caller`], [`secret`], [`token`], [`issue`], [`schedule`], [`proto`] | what is spoken of; pure decisions |
//! | aside | [`dev`] | the embedded world of `dev` and `simulate` |

pub mod account;
pub mod app;
pub mod audit;
pub mod bearer;
pub mod broker;
pub mod cache;
pub mod caller;
pub mod cli;
pub mod clock;
pub mod config;
pub mod dev;
pub mod directory;
pub mod follow;
pub mod grpc;
pub mod issue;
pub mod lifecycle;
pub mod limit;
pub mod load;
pub mod ops;
pub mod proto;
pub mod reach;
pub mod refresh;
pub mod retention;
pub mod schedule;
pub mod seal;
pub mod secret;
pub mod state_dir;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod token;
pub mod upstream;
