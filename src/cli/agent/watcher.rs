//! Follows the accounts of one name or pattern.

use std::time::Duration;

use token_broker_client::{Error, TokenClient, TokenEvent};
use tokio::{sync::mpsc, time::sleep};
use tracing::{debug, warn};

use crate::domain::caller::AccountPattern;

/// The longest pause before a stream is opened again.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// The pause before a stream is opened again that ended, doubled by each failure that follows.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// What a watcher has seen.
pub(super) enum Watched {
    Event(TokenEvent),
    /// The broker refuses the accounts, and not only for a while.
    Refused {
        target: AccountPattern,
        error: Error,
    },
}

/// Sends what happens to the accounts of `target`, until nobody receives it. Opens the stream again when it ends.
pub(super) async fn watch(
    client: TokenClient,
    target: AccountPattern,
    sender: mpsc::Sender<Watched>,
) {
    let mut failures = 0;
    loop {
        let error = match client.watch([target.to_string()]).await {
            Ok(mut stream) => loop {
                match stream.next().await {
                    Ok(Some(event)) => {
                        failures = 0;
                        if sender.send(Watched::Event(event)).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => break None,
                    Err(error) => break Some(error),
                }
            },
            Err(error) => Some(error),
        };
        let pause = pause(error.as_ref(), failures, fastrand::f64());
        match error {
            Some(error) if !error.is_temporary() => {
                let refused = Watched::Refused { target: target.clone(), error };
                if sender.send(refused).await.is_err() {
                    return;
                }
            }
            // Once, not at each attempt of a long outage.
            Some(error) if failures == 1 => {
                warn!(%error, "the broker cannot be watched; the files stay until their tokens end");
            }
            error => debug!(accounts = %target, ?error, "the stream ended"),
        }
        failures = failures.saturating_add(1);
        sleep(pause).await;
    }
}

/// Returns how long to wait before the stream is opened again. `random`, from 0 to 1, shortens the pause by up to
/// half, so that agents that lost the same broker do not return together.
fn pause(error: Option<&Error>, failures: u32, random: f64) -> Duration {
    let asked = error.and_then(Error::retry_after).unwrap_or_default();
    let doubled = match error {
        Some(error) if !error.is_temporary() => LONGEST_PAUSE,
        _ => FIRST_PAUSE.saturating_mul(1 << failures.min(16)).min(LONGEST_PAUSE),
    };
    doubled.mul_f64(1.0 - random / 2.0).max(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_ten_seconds() {
        let pauses = |random| [0, 1, 5, u32::MAX].map(|n| pause(None, n, random).as_millis());
        assert_eq!(pauses(0.0), [100, 200, 3_200, 10_000]);
        assert_eq!(pauses(1.0), [50, 100, 1_600, 5_000]);
    }
}
