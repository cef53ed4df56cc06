//! A client that retries by itself, as gRFC A6 specifies it.

use std::{net::SocketAddr, time::Duration};

use tokio::time::{Instant, sleep_until, timeout_at};
use tonic::Code;

use super::raw_grpc::RawCall;

/// The number of attempts that no policy may exceed.
const MAX_ATTEMPTS: u32 = 5;

/// A retry policy, as a service config has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RetryPolicy {
    /// The codes of calls that are tried again.
    pub(crate) retryable: &'static [Code],
    /// The pause before the first retry if the server names none. It doubles with each.
    pub(crate) initial_backoff: Duration,
}

/// How a call ended for the program that made it.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Ended {
    /// The code, and the reason if there is one.
    pub(crate) status: String,
    /// How often the call was sent.
    pub(crate) attempts: u32,
}

impl RetryPolicy {
    /// Makes a call, and retries it until it succeeds, the server or the policy forbids a retry, or `limit` is over.
    pub(crate) async fn call(
        self,
        call: &RawCall,
        address: SocketAddr,
        limit: Option<Duration>,
    ) -> Ended {
        let far = Duration::from_hours(24);
        let deadline = Instant::now() + limit.unwrap_or(far);
        let mut backoff = self.initial_backoff;
        for attempt in 1.. {
            let late = Ended { status: "DeadlineExceeded".into(), attempts: attempt };
            let left = deadline.saturating_duration_since(Instant::now());
            let mut timed = call.clone();
            if limit.is_some() {
                timed = timed.header("grpc-timeout", &format!("{}m", left.as_millis()));
            }
            let Ok(answer) = timeout_at(deadline, timed.send(address)).await else { return late };
            let ended = Ended { status: answer.code_and_reason(), attempts: attempt };
            let is_retryable = self.retryable.contains(&answer.status().code());
            if !is_retryable || attempt == MAX_ATTEMPTS {
                return ended;
            }
            let pause = match answer.pushback() {
                None => {
                    backoff *= 2;
                    backoff / 2
                }
                Some(Ok(pause)) if pause >= 0 => {
                    Duration::from_millis(u64::try_from(pause).unwrap())
                }
                // Also a value that is no number forbids it.
                Some(_) => return ended,
            };
            let retry_at = Instant::now() + pause;
            sleep_until(retry_at.min(deadline)).await;
            // The program does not hear why the last attempt failed.
            if retry_at >= deadline {
                return late;
            }
        }
        unreachable!("the last attempt returns")
    }
}
