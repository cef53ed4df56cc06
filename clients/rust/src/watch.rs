//! Keeps one stream of the broker open for the accounts that the program uses, so that replacements and ends
//! arrive when the broker has them.

use std::{collections::BTreeSet, future::pending, pin::Pin, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until, timeout};
use tonic::{Code, Status};
use tracing::{debug, warn};

use crate::{
    broker::OpenedStream,
    connections::Connections,
    error::{Error, is_local},
    proto::WatchTokensResponse,
    shared::Shared,
    stream::{TokenEvent, event},
    time::Backoff,
};

/// How long additions are collected before a stream with all names is opened.
const ADDITION_DELAY: Duration = Duration::from_millis(100);
/// Streams are opened for additions at most so often.
const ADDITION_INTERVAL: Duration = Duration::from_secs(5);
/// The pauses before a stream is opened again that delivered nothing.
const REOPEN_BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(100), longest: Duration::from_secs(10) };
/// The longest pause that the broker can ask for before a stream is opened again.
const LONGEST_ASKED_PAUSE: Duration = Duration::from_secs(30);
/// A stream that ends earlier than this is not opened again at once, even if it delivered something, so that a
/// broker which ends all streams is not flooded.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// The pause after the broker refused the caller.
const REFUSED_PAUSE: Duration = Duration::from_secs(10);
/// How long the broker may take to accept a stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);

/// Runs the watch of a client.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut connections = shared.broker.connection_changes();
    connections.mark_unchanged();
    Watch {
        shared,
        connections,
        stream: None,
        opening: None,
        open_at: None,
        opened_for_addition: None,
        names: BTreeSet::new(),
        failures: 0,
    }
    .run()
    .await;
}

struct Watch {
    shared: Arc<Shared>,
    connections: tokio::sync::watch::Receiver<Arc<Connections>>,
    /// The stream that delivers.
    stream: Option<Stream>,
    /// Opens the stream that will replace it.
    opening: Option<Opening>,
    /// When to open the next stream.
    open_at: Option<Instant>,
    /// When a stream was last opened because of an addition.
    opened_for_addition: Option<Instant>,
    /// The names of the stream that was opened last, without those that have left the watch since.
    names: BTreeSet<String>,
    /// Streams since the last one that delivered and lived for a while.
    failures: u32,
}

struct Stream {
    opened: OpenedStream,
    names: BTreeSet<String>,
    opened_at: Instant,
    has_delivered: bool,
}

struct Opening {
    names: BTreeSet<String>,
    result: Pin<Box<dyn Future<Output = Result<OpenedStream, Status>> + Send>>,
}

/// What to do after a stream has ended, or could not be opened.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Reaction {
    /// Open it again after a pause; the tokens stay in use.
    Reopen,
    /// Forget all tokens, unless the bearer has changed.
    CheckBearer,
    /// Let the callers ask for each account, because the refusal does not say which one it is about.
    AskForEach,
}

impl Reaction {
    fn to(status: &Status) -> Self {
        match status.code() {
            _ if is_local(status) => Self::Reopen,
            Code::Unauthenticated => Self::CheckBearer,
            Code::PermissionDenied
            | Code::NotFound
            | Code::InvalidArgument
            | Code::FailedPrecondition => Self::AskForEach,
            _ => Self::Reopen,
        }
    }
}

/// Returns how long to wait before a stream is opened again, after `failures` that delivered nothing or ended soon.
/// The broker can ask for a longer pause.
fn reopen_pause(failures: Option<u32>, asked: Option<Duration>, random: f64) -> Duration {
    let own = failures.map(|failures| REOPEN_BACKOFF.pause(failures, random));
    own.unwrap_or_default().max(asked.unwrap_or_default().min(LONGEST_ASKED_PAUSE))
}

/// Returns when to open a stream for an account that was added at `now`.
fn addition_time(now: Instant, opened_for_addition: Option<Instant>) -> Instant {
    let soon = now + ADDITION_DELAY;
    opened_for_addition.map_or(soon, |last| soon.max(last + ADDITION_INTERVAL))
}

impl Watch {
    async fn run(mut self) {
        loop {
            tokio::select! {
                message = next(&mut self.stream) => self.handle(message).await,
                opened = opened(&mut self.opening) => self.replace_stream(opened),
                () = at(self.open_at) => self.open(),
                () = self.shared.accounts.watch_grew() => {
                    let now = Instant::now();
                    self.open_no_later_than(addition_time(now, self.opened_for_addition));
                }
                // The old stream delivers until the new connection has accepted another one.
                Ok(()) = self.connections.changed() => self.open_no_later_than(Instant::now()),
            }
        }
    }

    fn open_no_later_than(&mut self, time: Instant) {
        self.open_at = Some(self.open_at.map_or(time, |planned| planned.min(time)));
    }

    /// Begins to open a stream with all names. An opening in progress is given up, because it has fewer names.
    fn open(&mut self) {
        self.open_at = None;
        let names = self.shared.accounts.watched_names();
        if names.is_empty() {
            (self.stream, self.opening) = (None, None);
            self.names.clear();
            return;
        }
        if !names.is_subset(&self.names) {
            self.opened_for_addition = Some(Instant::now());
        }
        self.names.clone_from(&names);
        debug!(accounts = names.len(), "opening a stream");
        let broker = Arc::clone(&self.shared.broker);
        let sent = names.iter().cloned().collect();
        let result = Box::pin(async move {
            let late = || Status::unavailable("the broker does not accept the stream");
            timeout(OPEN_TIMEOUT, broker.watch(sent)).await.unwrap_or_else(|_| Err(late()))
        });
        self.opening = Some(Opening { names, result });
    }

    fn replace_stream(&mut self, opened: Result<OpenedStream, Status>) {
        let Some(Opening { names, .. }) = self.opening.take() else { return };
        match opened {
            Ok(opened) => {
                let opened_at = Instant::now();
                self.stream = Some(Stream { opened, names, opened_at, has_delivered: false });
            }
            Err(status) => match Reaction::to(&status) {
                Reaction::Reopen => self.reopen(&status, false),
                // The file was read again already.
                Reaction::CheckBearer => self.forget_all(&status),
                Reaction::AskForEach => {
                    self.stream = None;
                    self.ask_for_each(&names, &status);
                }
            },
        }
    }

    /// Takes a message of the stream into account, or its end.
    async fn handle(&mut self, message: Result<Option<WatchTokensResponse>, Status>) {
        let status = match message {
            Ok(Some(message)) => return self.deliver(message),
            Ok(None) => Status::unavailable("the broker ended the stream"),
            Err(status) => status,
        };
        let Some(stream) = self.stream.take() else { return };
        match Reaction::to(&status) {
            // Its successor is being opened already.
            Reaction::Reopen if self.opening.is_some() => {}
            Reaction::Reopen => {
                let has_lived = stream.opened_at.elapsed() >= SHORT_LIFE;
                self.reopen(&status, stream.has_delivered && has_lived);
            }
            Reaction::CheckBearer => {
                if self.shared.broker.has_other_bearer(&stream.opened).await {
                    self.open_no_later_than(Instant::now());
                } else {
                    self.forget_all(&status);
                }
            }
            Reaction::AskForEach => self.ask_for_each(&stream.names, &status),
        }
    }

    fn deliver(&mut self, message: WatchTokensResponse) {
        if let Some(stream) = &mut self.stream {
            stream.has_delivered = true;
        }
        match event(message) {
            Ok(Some(TokenEvent::Token(token))) => self.shared.accounts.offer(&token),
            Ok(Some(TokenEvent::Ended { account, reason })) => {
                warn!(account, %reason, "the account ended");
                self.names.remove(&account);
                self.shared.accounts.end(&account);
            }
            Ok(None) => {}
            Err(error) => warn!(%error, "the broker pushed something else than a token"),
        }
    }

    /// Plans the next stream after the end of one. `was_good` says that it delivered, and lived for a while.
    fn reopen(&mut self, status: &Status, was_good: bool) {
        let error = Error::from_status("", status);
        if was_good {
            self.failures = 0;
        }
        let failures = (!was_good).then_some(self.failures);
        let pause = reopen_pause(failures, error.retry_after(), fastrand::f64());
        if !was_good {
            self.failures = self.failures.saturating_add(1);
        }
        debug!(%error, ?pause, "the stream ended; it is opened again after a pause");
        self.open_no_later_than(Instant::now() + pause);
    }

    fn forget_all(&mut self, status: &Status) {
        warn!(why = status.message(), "the broker no longer accepts the caller");
        self.stream = None;
        self.shared.accounts.forget_all();
        self.open_no_later_than(Instant::now() + REFUSED_PAUSE);
    }

    fn ask_for_each(&mut self, names: &BTreeSet<String>, status: &Status) {
        debug!(why = status.message(), "the broker refuses the stream");
        self.names.retain(|name| !names.contains(name));
        self.shared.accounts.leave_watch(names);
    }
}

/// Waits for the next message of the stream; for ever if there is none. Cancel safe.
async fn next(stream: &mut Option<Stream>) -> Result<Option<WatchTokensResponse>, Status> {
    match stream {
        Some(stream) => stream.opened.messages.message().await,
        None => pending().await,
    }
}

/// Waits until the stream is open; for ever if none is being opened. Cancel safe.
async fn opened(opening: &mut Option<Opening>) -> Result<OpenedStream, Status> {
    match opening {
        Some(opening) => opening.result.as_mut().await,
        None => pending().await,
    }
}

/// Waits until `time`; for ever if there is none.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_without_a_status_of_the_broker_is_no_refusal() {
        let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        assert_eq!(Reaction::to(&Status::from_error(Box::new(broken))), Reaction::Reopen);
    }

    #[test]
    fn each_status_of_a_stream_leads_to_its_reaction() {
        for (status, reaction) in [
            (Status::unavailable(""), Reaction::Reopen),
            (Status::resource_exhausted(""), Reaction::Reopen),
            (Status::internal(""), Reaction::Reopen),
            (Status::unauthenticated(""), Reaction::CheckBearer),
            (Status::permission_denied(""), Reaction::AskForEach),
            (Status::not_found(""), Reaction::AskForEach),
            (Status::invalid_argument(""), Reaction::AskForEach),
            (Status::failed_precondition(""), Reaction::AskForEach),
        ] {
            assert_eq!(Reaction::to(&status), reaction, "{status}");
        }
    }

    #[test]
    fn a_stream_is_opened_again_at_once_unless_it_failed_or_the_broker_asks_for_a_pause() {
        let (ms, s) = (Duration::from_millis, Duration::from_secs);
        assert_eq!(reopen_pause(None, None, 0.0), Duration::ZERO);
        assert_eq!(reopen_pause(Some(0), None, 0.0), ms(100));
        assert_eq!(reopen_pause(Some(20), None, 0.0), s(10));
        assert_eq!(reopen_pause(None, Some(s(7)), 0.0), s(7));
        assert_eq!(reopen_pause(Some(20), Some(s(7)), 0.0), s(10));
        assert_eq!(reopen_pause(Some(0), Some(s(3600)), 0.0), s(30));
    }

    #[tokio::test(start_paused = true)]
    async fn additions_are_collected_for_100_ms_and_lead_to_a_stream_at_most_every_5_s() {
        let now = Instant::now();
        assert_eq!(addition_time(now, None), now + ADDITION_DELAY);
        assert_eq!(
            addition_time(now + ADDITION_INTERVAL, Some(now)),
            now + ADDITION_INTERVAL + ADDITION_DELAY
        );
        assert_eq!(addition_time(now + Duration::from_secs(1), Some(now)), now + ADDITION_INTERVAL);
    }
}
