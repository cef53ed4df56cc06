//! What every test stands on.

pub(crate) mod broker;
#[cfg(feature = "embedded-postgres")]
pub(crate) mod certificates;
pub(crate) mod database;
pub(crate) mod http;
#[cfg(feature = "embedded-postgres")]
pub(crate) mod process;
pub(crate) mod proxy;
#[cfg(feature = "embedded-postgres")]
pub(crate) mod raw;
#[cfg(feature = "embedded-postgres")]
pub(crate) mod seed;

use std::time::{Duration, Instant};

/// How long a test waits for what must come: far longer than it ever takes, so that a slow machine
/// fails nothing.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// Asks again and again until `probe` has an answer.
///
/// # Panics
/// After [`PATIENCE`], naming what never came.
pub(crate) async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = probe().await {
            return answer;
        }
        assert!(Instant::now() < until, "never came: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
