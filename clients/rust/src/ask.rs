//! One ask for a token, which all callers share that want the same.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{oneshot, watch},
    time::{Instant, sleep},
};

use crate::{
    error::{Error, ErrorKind},
    proto::GetTokenRequest,
    shared::Shared,
    time::{Backoff, later},
    token::Token,
};

/// The pauses between repeated asks if the broker names none.
const RETRY_BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(100), longest: Duration::from_secs(1) };
/// A caller whose deadline is later than that of the shared ask by less than this does not ask again, so that
/// many callers with almost the same deadline do not ask one after another.
const WORTHWHILE: Duration = Duration::from_millis(50);

/// What is wanted, and until when.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) account: String,
    pub(crate) newer_than: u64,
    pub(crate) deadline: Instant,
    /// Whether to repeat an ask that failed with a temporary error.
    pub(crate) retries: bool,
}

/// How far an ask has come.
#[derive(Debug)]
enum Progress {
    /// It goes on. The last call failed with this error.
    Asking(Option<Error>),
    Done(Result<Token, Error>),
}

/// The ask, as its callers see it.
#[derive(Clone, Debug)]
pub(crate) struct SharedAsk {
    progress: watch::Receiver<Progress>,
    pub(crate) started: Instant,
    deadline: Instant,
    retries: bool,
}

/// The ask, as its account sees it.
#[derive(Debug)]
pub(crate) struct AskInFlight {
    pub(crate) shared: SharedAsk,
    /// Ends the ask with a token that came in another way; none after that.
    settle: Option<oneshot::Sender<Token>>,
    /// Whether a pause began already because this ask takes long.
    pub(crate) was_slow: bool,
}

impl AskInFlight {
    /// Starts a task that asks. No caller owns it, so it goes on when the caller that caused it gives up.
    pub(crate) fn start(shared: &Arc<Shared>, wanted: Wanted, now: Instant) -> Self {
        let (sender, progress) = watch::channel(Progress::Asking(None));
        let (settle, settled) = oneshot::channel();
        let (deadline, retries) = (wanted.deadline, wanted.retries);
        let task_shared = Arc::clone(shared);
        shared.spawn(async move {
            let accounts = &task_shared.accounts;
            let outcome = tokio::select! {
                biased;
                Ok(token) = settled => {
                    accounts.remove_ask(&wanted);
                    Ok(token)
                }
                outcome = run(&task_shared, &wanted, &sender) => accounts.finish(&wanted, outcome),
            };
            sender.send_replace(Progress::Done(outcome));
        });
        let shared = SharedAsk { progress, started: now, deadline, retries };
        Self { shared, settle: Some(settle), was_slow: false }
    }

    /// Gives `token` to all who wait, and ends the ask.
    pub(crate) fn settle(&mut self, token: &Token) {
        if let Some(settle) = self.settle.take() {
            // The task is gone when the client is closed.
            let _ = settle.send(token.clone());
        }
    }

    /// Whether its task still runs.
    pub(crate) fn is_running(&self) -> bool {
        self.shared.progress.has_changed().is_ok()
    }
}

impl SharedAsk {
    /// Waits for the outcome. Cancel safe.
    pub(crate) async fn outcome(&mut self, account: &str) -> Result<Token, Error> {
        match self.progress.wait_for(|progress| matches!(progress, Progress::Done(_))).await {
            Ok(progress) => match &*progress {
                Progress::Done(outcome) => outcome.clone(),
                Progress::Asking(_) => unreachable!("`wait_for` waits for another value"),
            },
            // The task was ended.
            Err(_) => Err(Error::closed(account)),
        }
    }

    /// Returns why the last call failed, or that there is no answer yet.
    pub(crate) fn error_so_far(&self, account: &str) -> Error {
        match &*self.progress.borrow() {
            Progress::Asking(Some(error)) | Progress::Done(Err(error)) => error.clone(),
            _ => Error::deadline(account),
        }
    }

    /// Returns how long a caller with this `deadline` pauses until it causes another ask, after this one ended
    /// with the temporary `error`; `None` if the error is the caller's too. `is_owner` says whether it caused
    /// this ask.
    pub(crate) fn pause_before_another(
        &self,
        error: &Error,
        is_owner: bool,
        deadline: Instant,
        now: Instant,
    ) -> Option<Duration> {
        if !self.retries {
            return (now < deadline).then_some(Duration::ZERO);
        }
        let has_more_time = !is_owner && deadline > self.deadline + WORTHWHILE;
        let pause = error.retry_after().unwrap_or_default();
        (has_more_time && later(now, pause) < deadline).then_some(pause)
    }
}

/// Asks until there is a token, an error that a further ask would not change, or no time left.
async fn run(
    shared: &Shared,
    wanted: &Wanted,
    progress: &watch::Sender<Progress>,
) -> Result<Token, Error> {
    let mut failures = 0;
    let mut last_error: Option<Error> = None;
    loop {
        let request = GetTokenRequest {
            account: wanted.account.clone(),
            min_ttl: None,
            newer_than_generation: wanted.newer_than,
        };
        let error = match shared.broker.get_token(request, wanted.deadline).await {
            Ok(token) => match fault_of(&token, wanted.newer_than, Instant::now()) {
                None => return Ok(token),
                Some(error) => error,
            },
            Err(error) => more_telling(last_error.take(), error),
        };
        let pause = retry_pause(&error, failures, fastrand::f64());
        let Some(pause) =
            pause.filter(|pause| wanted.retries && later(Instant::now(), *pause) < wanted.deadline)
        else {
            return Err(error);
        };
        last_error = Some(error.clone());
        progress.send_replace(Progress::Asking(Some(error)));
        sleep(pause).await;
        failures += 1;
    }
}

/// Returns why a token that the broker sent is of no use to who wants a later generation than `newer_than`.
fn fault_of(token: &Token, newer_than: u64, now: Instant) -> Option<Error> {
    let error = |kind, why: &str| Some(Error::local(kind, token.account(), why));
    if token.generation() <= newer_than {
        error(ErrorKind::Internal, "the broker's answer has no newer token")
    } else if !token.is_usable(now) {
        // Its successor will come soon.
        error(ErrorKind::Unavailable, "the token has just ended")
    } else {
        None
    }
}

/// Returns how long to wait before the call that failed with `error` is repeated; `None` if it is not.
fn retry_pause(error: &Error, failures: u32, random: f64) -> Option<Duration> {
    if !error.is_temporary() || !error.may_retry() {
        return None;
    }
    // A pause of zero would repeat the call without end.
    let told = error.retry_after().filter(|pause| !pause.is_zero());
    Some(told.unwrap_or_else(|| RETRY_BACKOFF.pause(failures, random)))
}

/// Returns the error of the call before, if the last call only ran out of time.
fn more_telling(before: Option<Error>, last: Error) -> Error {
    match before {
        Some(before) if last.kind() == ErrorKind::DeadlineExceeded => before,
        _ => last,
    }
}

#[cfg(test)]
mod tests {
    use tonic::Status;
    use tonic_types::{ErrorDetails, StatusExt};

    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn error(status: &Status) -> Error {
        Error::from_status("acme", status)
    }

    fn overloaded(retry_after: Duration) -> Error {
        let details = ErrorDetails::with_retry_info(Some(retry_after));
        error(&Status::with_error_details(tonic::Code::ResourceExhausted, "busy", details))
    }

    #[test]
    fn the_pause_is_the_brokers_or_doubles_up_to_a_second() {
        assert_eq!(retry_pause(&overloaded(MS(7_000)), 3, 0.5), Some(MS(7_000)));
        assert_eq!(retry_pause(&overloaded(MS(0)), 0, 0.0), Some(MS(100)));
        let away = error(&Status::unavailable("away"));
        assert_eq!(retry_pause(&away, 0, 0.0), Some(MS(100)));
        assert_eq!(retry_pause(&away, 1, 1.0), Some(MS(100)));
        assert_eq!(retry_pause(&away, 9, 0.0), Some(MS(1_000)));
    }

    #[test]
    fn a_refusal_and_a_negative_pushback_are_final() {
        assert_eq!(retry_pause(&error(&Status::permission_denied("no")), 0, 0.0), None);
        let mut status = Status::unavailable("busy");
        status.metadata_mut().insert("grpc-retry-pushback-ms", "-1".parse().unwrap());
        assert_eq!(retry_pause(&error(&status), 0, 0.0), None);
    }

    #[test]
    fn an_error_that_says_why_is_preferred_to_a_missed_deadline() {
        let away = || error(&Status::unavailable("away"));
        let late = || Error::deadline("acme");
        assert_eq!(more_telling(Some(away()), late()).kind(), ErrorKind::Unavailable);
        assert_eq!(more_telling(None, late()).kind(), ErrorKind::DeadlineExceeded);
        assert_eq!(more_telling(Some(late()), away()).kind(), ErrorKind::Unavailable);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_with_more_time_than_the_shared_ask_causes_another() {
        let now = Instant::now();
        let ask = |retries| SharedAsk {
            progress: watch::channel(Progress::Asking(None)).1,
            started: now,
            deadline: now + MS(1_000),
            retries,
        };
        let late = Error::deadline("acme");
        let pause = |is_owner, deadline| {
            ask(true).pause_before_another(&late, is_owner, now + MS(deadline), now + MS(1_000))
        };
        assert_eq!(pause(true, 5_000), None, "the owner has the deadline of the ask");
        assert_eq!(pause(false, 1_040), None, "hardly more time");
        assert_eq!(pause(false, 5_000), Some(Duration::ZERO));

        let pause = |deadline| {
            ask(true).pause_before_another(&overloaded(MS(2_000)), false, now + MS(deadline), now)
        };
        assert_eq!(pause(5_000), Some(MS(2_000)));
        assert_eq!(pause(1_500), None, "the pause is longer than the time left");

        // This ask was not repeated, because there was a usable token when it began.
        let first = ask(false).pause_before_another(&late, true, now + MS(5_000), now);
        assert_eq!(first, Some(Duration::ZERO));
    }
}
