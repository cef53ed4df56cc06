//! What the broker does: it answers calls from a cache, issues new tokens before the old ones expire, follows
//! the changes that admins and other replicas commit, and delivers the audit journal to Postgres.
//!
//! | module | contents |
//! |---|---|
//! | [`account_cache`], [`account_loader`] | the accounts and their tokens in memory; loading them from the database |
//! | [`account_upkeep`] | dropping previous secrets, storing when accounts were requested |
//! | [`caller_directory`] | the callers by their credentials |
//! | [`caller_rates`], [`gcra`] | the rate limit of each caller, and its algorithm |
//! | [`keyed_semaphore`], [`client_network`] | limits for each caller or client; which addresses count as one client |
//! | [`database_clock`] | the database's clock beside the one of this process |
//! | [`connectivity`] | whether the database answers, and what a replica may do while it does not |
//! | [`history`] | checking that the database is the one that this replica knows, in no older state |
//! | [`refresher`] | issuing and storing tokens |
//! | [`change_feed`] | following committed changes |
//! | [`heartbeat`] | the identity of this replica; telling others that it is alive, and learning of them |
//! | [`feed_health`] | what hinders the change feed: failing duties, unusable rows |
//! | [`token_provider`] | answering calls: checking grants, reading the cache, waiting for a token |
//! | [`keyring_watch`], [`key_usage`] | replacing the keyring when its file changes; which keys this replica has and needs |
//! | [`trust_monitor`] | whether the published intake key and the schema can be trusted |
//! | [`refusal_aggregator`] | one audit record for many equal refusals |
//! | [`journal_delivery`], [`retention`] | delivering the audit journal to Postgres; removing old audit records |

pub mod account_cache;
pub mod account_loader;
pub mod account_upkeep;
pub mod caller_directory;
pub mod caller_rates;
pub mod change_feed;
pub mod client_network;
pub mod connectivity;
pub mod database_clock;
pub mod feed_health;
pub mod gcra;
pub mod heartbeat;
pub mod history;
pub mod journal_delivery;
pub mod key_usage;
pub mod keyed_semaphore;
pub mod keyring_watch;
pub mod refresher;
pub mod refusal_aggregator;
pub mod retention;
pub mod token_provider;
pub mod trust_monitor;
