//! A client of Token Broker.
//!
//! [`TokenClient`] keeps the tokens of the accounts that a program uses, and is told of replacements and
//! revocations when the broker has them. So [`TokenClient::token`] mostly returns without a call:
//!
//! ```no_run
//! # async fn example() -> Result<(), token_broker_client::Error> {
//! let client = token_broker_client::TokenClient::from_env()?;
//! let token = client.token("acme").await?;
//! println!("{} {}", token.api_base_url(), token.generation());
//! # Ok(())
//! # }
//! ```
//!
//! Two optional parts put tokens on HTTP requests, and replace a token that the API refuses:
//!
//! - the feature `tower`: `AuthorizationLayer`, for any HTTP client that is a tower service;
//! - the feature `reqwest`: `AuthorizedClient`.
//!
//! While the broker is away, a kept token is used to its end. No text form, log line or error of this crate
//! contains a token or a bearer. The logs of the libraries beneath it, such as `h2`, are not under its control.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod account;
mod accounts;
mod ask;
mod broker;
mod client;
mod connections;
mod credentials;
mod error;
mod files;
mod proto;
mod settings;
mod shared;
mod stream;
mod time;
mod token;
mod watch;

#[cfg(feature = "_adapters")]
mod authorizer;
#[cfg(feature = "_adapters")]
mod peeked;
#[cfg(feature = "_adapters")]
mod replacement;
#[cfg(feature = "reqwest")]
mod reqwest;
#[cfg(feature = "tower")]
mod tower;

#[cfg(test)]
mod testing;

#[cfg(all(test, feature = "reqwest"))]
mod readme;

/// Compiles the example in the README.
#[cfg(all(doctest, feature = "reqwest"))]
#[doc = include_str!("../README.md")]
struct Readme;

pub use self::{
    client::{AskOptions, ReportOutcome, TokenClient},
    error::{Error, ErrorKind},
    settings::TokenClientBuilder,
    stream::{EndReason, TokenEvent, TokenStream},
    token::Token,
};

#[cfg(feature = "reqwest")]
pub use self::reqwest::AuthorizedClient;
#[cfg(feature = "tower")]
pub use self::tower::{Authorization, AuthorizationLayer, TryCloneBody};
#[cfg(feature = "_adapters")]
pub use self::{authorizer::SendError, peeked::PeekedBody};
