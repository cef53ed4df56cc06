//! Keeps one stream of the broker open for the accounts that the program uses, so that replacements and ends
//! arrive when the broker has them.

use std::{future::pending, pin::Pin, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until, timeout};
use tonic::{Code, Status};
use tracing::{debug, warn};

use crate::{
    broker::OpenedStream,
    client::Shared,
    connections::Connections,
    error::{Error, is_local},
    proto::WatchTokensResponse,
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
    /// Attempts since a stream last delivered.
    failures: u32,
}

struct Stream {
    opened: OpenedStream,
    names: Vec<String>,
    opened_at: Instant,
    has_delivered: bool,
}

struct Opening {
    names: Vec<String>,
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
                () = self.shared.watch_grew.notified() => {
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
        let names = self.shared.watched_names();
        if names.is_empty() {
            (self.stream, self.opening) = (None, None);
            return;
        }
        let is_addition = self.stream.is_none()
            || self.stream.as_ref().is_some_and(|stream| stream.names.len() != names.len());
        if is_addition {
            self.opened_for_addition = Some(Instant::now());
        }
        debug!(accounts = names.len(), "opening a stream");
        let broker = Arc::clone(&self.shared.broker);
        let sent = names.clone();
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
                Reaction::Reopen => self.reopen_later(&status),
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
            Reaction::Reopen
                if stream.has_delivered && stream.opened_at.elapsed() >= SHORT_LIFE =>
            {
                debug!(why = status.message(), "the stream ended; it is opened again");
                self.open_no_later_than(Instant::now());
            }
            Reaction::Reopen => self.reopen_later(&status),
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
        self.failures = 0;
        if let Some(stream) = &mut self.stream {
            stream.has_delivered = true;
        }
        match event(message) {
            Ok(Some(TokenEvent::Token(token))) => {
                let account = token.account().to_owned();
                self.shared.offer(&account, token);
            }
            Ok(Some(TokenEvent::Ended { account, reason })) => {
                warn!(account, %reason, "the account ended");
                self.shared.end(&account);
            }
            Ok(None) => {}
            Err(error) => warn!(%error, "the broker pushed something else than a token"),
        }
    }

    fn reopen_later(&mut self, status: &Status) {
        let error = Error::from_status("", status);
        let pause = REOPEN_BACKOFF.pause(self.failures, fastrand::f64());
        let pause = pause.max(error.retry_after().unwrap_or_default());
        self.failures = self.failures.saturating_add(1);
        debug!(%error, ?pause, "there is no stream; it is opened again after a pause");
        self.open_no_later_than(Instant::now() + pause);
    }

    fn forget_all(&mut self, status: &Status) {
        warn!(why = status.message(), "the broker no longer accepts the caller");
        self.stream = None;
        self.shared.forget_all();
        self.open_no_later_than(Instant::now() + REFUSED_PAUSE);
    }

    fn ask_for_each(&mut self, names: &[String], status: &Status) {
        debug!(why = status.message(), "the broker refuses the stream");
        self.shared.leave_watch(names);
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
