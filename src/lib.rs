//! Token Broker: issues, keeps fresh and serves the RCS Biz Center tokens of many accounts.
//!
//! The layers of the crate, from the top. A module imports only from lower layers, and from modules of
//! its own layer without a cycle; `tests/architecture.rs` checks it. `ARCHITECTURE.md` explains it.
//!
//! | layer | modules | what they hold |
//! |---|---|---|
//! | application | [`app`], [`cli`], [`config`], [`dev`], [`lifecycle`] | composition, start and stop; commands; settings; the embedded environment of `dev`; signals |
//! | API | [`api`] | what callers and operators touch: gRPC, and HTTP for operations |
//! | services | [`services`] | what the broker does: answering, issuing ahead, following changes, delivering the audit log |
//! | infrastructure | [`audit`], [`crypto`], [`files`], [`store`], [`telemetry`], [`tls`], [`upstream`] | one outside thing each |
//! | domain | [`domain`] | accounts, callers, tokens, secrets, and pure decisions about them |

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
