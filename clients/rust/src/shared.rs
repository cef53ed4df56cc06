//! What all clones of a client and its tasks share: its tasks, its end, and how a caller comes to a token.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    account::Decision,
    accounts::Accounts,
    ask::{AskInFlight, SharedAsk, Wanted},
    broker::Broker,
    error::Error,
    token::Token,
    watch,
};

/// How long a caller waits for the replacement of a token that is still usable.
const REPLACEMENT_WAIT: Duration = Duration::from_secs(2);
/// How long closing may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What all clones of a client and its tasks share.
pub(crate) struct Shared {
    pub(crate) broker: Arc<Broker>,
    pub(crate) accounts: Accounts,
    pub(crate) closed: CancellationToken,
    tasks: TaskTracker,
    is_started: AtomicBool,
}

/// What a caller does next.
enum Next {
    Return(Result<Token, Error>),
    Wait {
        ask: SharedAsk,
        /// Whether the caller caused the ask.
        is_owner: bool,
        /// Whether there is a kept token to use if the ask fails or takes long.
        has_usable: bool,
    },
}

impl Shared {
    pub(crate) fn new(broker: Broker) -> Self {
        Self {
            broker: Arc::new(broker),
            accounts: Accounts::default(),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
            is_started: AtomicBool::new(false),
        }
    }

    /// Starts the tasks of the client, the first time that this is called.
    pub(crate) fn start(self: &Arc<Self>) {
        if self.is_started.swap(true, Ordering::Relaxed) {
            return;
        }
        self.spawn(watch::run(Arc::clone(self)));
        self.spawn(Arc::clone(&self.broker).follow_tls_files());
    }

    /// Runs `task` until the client is closed.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let closed = self.closed.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = closed.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Waits for `call`, unless the client is closed before.
    pub(crate) async fn unless_closed<T>(
        &self,
        account: &str,
        call: impl Future<Output = T>,
    ) -> Result<T, Error> {
        tokio::select! {
            biased;
            () = self.closed.cancelled() => Err(Error::closed(account)),
            answer = call => Ok(answer),
        }
    }

    /// Ends the tasks and the connections.
    pub(crate) async fn close(&self) {
        self.closed.cancel();
        self.tasks.close();
        // Tasks end at their next step; one that blocks on a disk may take longer.
        let _ = timeout(CLOSE_TIMEOUT, self.tasks.wait()).await;
        self.broker.close();
    }

    /// Returns a token of a later generation than `newer_than`: the kept one, or else one of the broker.
    pub(crate) async fn token(
        self: &Arc<Self>,
        account: &str,
        newer_than: u64,
        deadline: Instant,
    ) -> Result<Token, Error> {
        loop {
            let (mut ask, is_owner, has_usable) = match self.next(account, newer_than, deadline) {
                Next::Return(result) => return result,
                Next::Wait { ask, is_owner, has_usable } => (ask, is_owner, has_usable),
            };
            let limit =
                if has_usable { deadline.min(ask.started + REPLACEMENT_WAIT) } else { deadline };
            let outcome =
                self.unless_closed(account, timeout_at(limit, ask.outcome(account))).await?;
            let error = match outcome {
                Ok(Ok(token)) => return Ok(token),
                Ok(Err(error)) if !error.is_temporary() => return Err(error),
                Ok(Err(error)) => Some(error),
                Err(_) => None,
            };
            if error.is_none() && has_usable {
                self.accounts.pause_because_slow(account, newer_than);
            }
            // Not the token from before the wait: it may have been replaced or forgotten meanwhile.
            if let Some(token) = self.accounts.usable(account, newer_than) {
                return Ok(token);
            }
            let now = Instant::now();
            if has_usable && now < deadline {
                // Now the caller waits like one that never had a token.
                continue;
            }
            let Some(error) = error else { return Err(ask.error_so_far(account)) };
            match ask.pause_before_another(&error, is_owner, deadline, now) {
                Some(pause) => self.unless_closed(account, sleep(pause)).await?,
                None => return Err(error),
            }
        }
    }

    /// Decides what a caller does that wants a token, and starts an ask if one is needed.
    fn next(self: &Arc<Self>, account: &str, newer_than: u64, deadline: Instant) -> Next {
        if self.closed.is_cancelled() {
            return Next::Return(Err(Error::closed(account)));
        }
        self.accounts.use_account(account, |state, now| {
            let has_usable = match state.decide(newer_than, now) {
                Decision::Use(token) => return Next::Return(Ok(token)),
                Decision::Refuse(error) => return Next::Return(Err(error)),
                Decision::Replace => true,
                Decision::Ask => false,
            };
            if let Some(ask) = state.asks.get(&newer_than).filter(|ask| ask.is_running()) {
                return Next::Wait { ask: ask.shared.clone(), is_owner: false, has_usable };
            }
            let account = account.to_owned();
            let wanted = Wanted { account, newer_than, deadline, retries: !has_usable };
            let ask = AskInFlight::start(self, wanted, now);
            let shared = ask.shared.clone();
            state.asks.insert(newer_than, ask);
            Next::Wait { ask: shared, is_owner: true, has_usable }
        })
    }
}
