//! What the integration tests (`tests/it`) and the benchmarks (`benches`) share: starting a broker in
//! this process or as a process of its own, with a database and a simulated upstream. Each of them
//! includes this folder as a module, and none uses all of it.
//!
//! | module | contents |
//! |---|---|
//! | [`broker`] | a database, a simulated upstream and a broker in this process; a client |
//! | [`process`] | the program as a process: its settings, signals, output |
//! | [`database`] | a database for each test, and the server on which the databases are |
//! | [`database_proxy`] | a proxy before the database, to interrupt connections |
//! | [`pgbouncer`] | a connection pooler before the database |
//! | [`certificates`] | a certificate authority, and connections with TLS |
//! | [`http`] | HTTP requests to brokers and simulators |
//! | [`lease_holder`] | a replica that claims leases |
//! | [`own_server`] | a database server for one test alone, which crashes, has standbys, and fails over |
//! | [`raw_grpc`] | single calls with any headers and any body |
//! | [`raw_http2`] | an HTTP/2 client that can violate the protocol |
//! | [`retrying_client`] | a client that retries by itself |
//! | [`rng`] | random numbers that can be repeated |
//! | [`shifted_clock`] | processes whose wall clock is wrong |
//!
//! The database server is the one that `DATABASE_URL` names, or else an embedded one, for which the feature
//! `embedded-postgres` must be enabled.

pub(crate) mod broker;
pub(crate) mod certificates;
pub(crate) mod database;
pub(crate) mod database_proxy;
pub(crate) mod http;
pub(crate) mod lease_holder;
#[cfg(feature = "embedded-postgres")]
pub(crate) mod own_server;
pub(crate) mod pgbouncer;
pub(crate) mod process;
pub(crate) mod raw_grpc;
pub(crate) mod raw_http2;
pub(crate) mod retrying_client;
pub(crate) mod rng;
#[cfg(feature = "embedded-postgres")]
pub(crate) mod shifted_clock;

use std::{
    env,
    io::{self, Write},
    time::{Duration, Instant},
};

/// How long a test waits for something that must happen. It is far more than anything takes, so that no
/// test fails because the machine is slow.
pub(crate) const TEST_TIMEOUT: Duration = Duration::from_mins(1);

/// Calls `probe` every 20 ms until it returns a value, and returns that. The panic message says that the
/// test waited for `what`.
///
/// # Panics
/// After [`TEST_TIMEOUT`].
pub(crate) async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + TEST_TIMEOUT;
    loop {
        if let Some(value) = probe().await {
            return value;
        }
        assert!(Instant::now() < deadline, "timed out waiting for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Says that a part of a test is skipped, and why. libtest hides what the macros print of a test that passes, so this
/// writes to standard error itself.
pub(crate) fn note_skipped(why: &str) {
    let _ = writeln!(io::stderr(), "\nSKIPPED: {why}");
}

/// Returns whether nothing of the clients' tests may be skipped.
pub(crate) fn all_clients_required() -> bool {
    env::var("CI_ALL_CLIENTS").as_deref() == Ok("1")
}

/// Says that a part of a test is skipped since this machine lacks something that the clients' tests need.
///
/// # Panics
/// If nothing of them may be skipped.
pub(crate) fn note_skipped_client_test(why: &str) {
    assert!(!all_clients_required(), "CI_ALL_CLIENTS=1: {why}");
    note_skipped(why);
}
