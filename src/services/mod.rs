//! What the broker does: it answers calls from a cache, issues tokens ahead of their end, follows what
//! admins and other replicas commit, and delivers the audit journal to Postgres.
//!
//! | module | does |
//! |---|---|
//! | [`account_cache`], [`account_loader`] | hold each account as it is known now; fill that from the database |
//! | [`caller_directory`], [`caller_rates`], [`keyed_semaphore`] | know callers by their credentials; bound what each may use |
//! | [`gcra`], [`client_network`] | the rate limit algorithm; which addresses count as one client |
//! | [`connectivity`] | knows whether the database answers, and what a replica may do while it does not |
//! | [`refresher`] | issues tokens and stores them |
//! | [`change_feed`] | follows committed changes |
//! | [`token_provider`] | answers calls: permission, cache, wait |
//! | [`refusal_aggregator`] | writes one audit record for many equal refusals |
//! | [`journal_delivery`], [`retention`] | bring the audit journal to Postgres; remove old audit records |

pub mod account_cache;
pub mod account_loader;
pub mod caller_directory;
pub mod caller_rates;
pub mod change_feed;
pub mod client_network;
pub mod connectivity;
pub mod gcra;
pub mod journal_delivery;
pub mod keyed_semaphore;
pub mod refresher;
pub mod refusal_aggregator;
pub mod retention;
pub mod token_provider;
