//! Token Broker: issues, keeps fresh and serves the RCS Biz Center tokens of many accounts.
//!
//! The table lists the layers of the crate, from the top. A module imports only from lower layers, and
//! from modules of its own layer without a cycle. `ARCHITECTURE.md` explains the layers.
//!
//! | layer | modules | what they hold |
//! |---|---|---|
//! | application | [`app`], [`cli`], [`config`], [`dev`], [`lifecycle`] | building, starting and stopping a broker; commands; settings; the environment of `dev`; signals |
//! | API | [`api`] | the interfaces for callers and operators: gRPC, and HTTP for operations |
//! | services | [`services`] | what the broker does: serve tokens, issue new ones in time, follow changes, deliver the audit log |
//! | infrastructure | [`audit`], [`crypto`], [`files`], [`store`], [`telemetry`], [`tls`], [`upstream`] | the access to files, Postgres, the upstream, TLS, logs and cryptography |
//! | domain | [`domain`] | accounts, callers, tokens and secrets, and decisions about them as pure functions |

pub mod api;
pub mod app;
pub mod audit;
pub mod cli;
pub mod config;
pub mod crypto;
pub mod dev;
pub mod domain;
pub mod files;
pub mod lifecycle;
pub mod services;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod upstream;
