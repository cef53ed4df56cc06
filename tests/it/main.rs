//! The integration tests: the broker in this process or the real program, with a real Postgres and a
//! simulated upstream.
//!
//! Without `DATABASE_URL` they use an embedded Postgres. Without the feature `embedded-postgres` they
//! need `DATABASE_URL`, and the tests that stop or kill their server are skipped (see `skipped`).
#![cfg(test)]

#[allow(
    dead_code,
    reason = "the benchmarks, or tests with the feature embedded-postgres, use the rest"
)]
#[path = "../harness/mod.rs"]
mod harness;

mod accounts;
mod audit;
mod client_certificates;
mod database_errors;
mod documents;
mod duties;
mod fuzzed;
mod guarantees;
mod identity;
mod inputs;
mod issuing;
mod late_results;
mod locks;
mod mass_changes;
mod migrations;
mod outages;
#[cfg(feature = "embedded-postgres")]
mod postgres;
mod processes;
mod refresh;
mod refresh_rules;
mod replicas;
mod restored;
mod retries;
mod rights;
mod roles;
mod saves;
mod scenarios;
mod serving;
mod sessions;
mod spreading;
mod unread_streams;
mod upstream;

/// Names the tests that are not compiled without the feature `embedded-postgres`, so that
/// `cargo test --no-default-features` lists them as ignored.
#[cfg(not(feature = "embedded-postgres"))]
mod skipped {
    macro_rules! skipped {
        ($($test:ident)*) => {$(
            #[test]
            #[ignore = "needs the feature embedded-postgres"]
            fn $test() {}
        )*};
    }

    skipped! {
        inputs_server_log
        postgres
        processes_canaries
        processes_clocks
        processes_crashes_paused_postgres
        processes_database_crashes
        processes_dev
        processes_disruptions
        processes_failovers
        processes_grpcurl
        processes_rotation
    }
}
