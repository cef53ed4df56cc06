//! The client: what programs call.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tracing::{debug, warn};

#[cfg(feature = "_adapters")]
use crate::account::Report;
use crate::{
    account::{Account, Decision},
    ask::{SharedAsk, Wanted},
    broker::Broker,
    error::Error,
    proto::{GetTokenRequest, ReportRejectedTokenRequest, report_rejected_token_response as wire},
    settings::TokenClientBuilder,
    stream::TokenStream,
    time::later,
    token::Token,
    watch,
};

/// How long a caller waits for the replacement of a token that is still usable.
const REPLACEMENT_WAIT: Duration = Duration::from_secs(2);
/// How many accounts one watch may have.
const LONGEST_WATCH: usize = 1_000;
/// An account for which the program has not asked for so long leaves the watch.
const UNUSED: Duration = Duration::from_secs(60 * 60);
/// How long closing may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// The shortest pause before a report that came too soon is made again, whatever the broker says.
#[cfg(feature = "_adapters")]
const SHORTEST_REPORT_PAUSE: Duration = Duration::from_millis(100);

/// A client for one caller of one deployment of the broker. Make one in a program, and clone it.
///
/// It needs a tokio runtime with timers and networking. The last clone that is dropped closes it.
#[derive(Clone)]
pub struct TokenClient {
    shared: Arc<Shared>,
    /// Ends the tasks when the last clone of the client is dropped. The tasks have `shared` too.
    _end: Arc<DropGuard>,
}

/// What a report of a refused token led to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum ReportOutcome {
    /// A new token is being issued.
    Reissuing,
    /// A later generation exists already.
    AlreadyReplaced,
    /// The last token was issued too recently. Wait for so long.
    TooSoon {
        /// How long to wait before asking for a newer generation.
        retry_after: Duration,
    },
    /// The code is not about the token: check the request.
    NotATokenFault,
}

/// What to ask for with [`TokenClient::ask`].
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct AskOptions {
    /// How long to wait; the client's timeout if this is `None`.
    pub timeout: Option<Duration>,
    /// A token with less time left is replaced first.
    pub min_ttl: Option<Duration>,
}

impl AskOptions {
    /// Sets how long to wait.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Sets the least time that the token must have left.
    #[must_use]
    pub fn min_ttl(mut self, min_ttl: Duration) -> Self {
        self.min_ttl = Some(min_ttl);
        self
    }
}

impl TokenClient {
    /// Returns settings to fill in.
    #[must_use]
    pub fn builder() -> TokenClientBuilder {
        TokenClientBuilder::default()
    }

    /// Returns a client with the settings of the environment: see [`TokenClientBuilder::from_env`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) when the settings cannot be used.
    pub fn from_env() -> Result<Self, Error> {
        TokenClientBuilder::from_env().build()
    }

    pub(crate) fn new(broker: Broker) -> Self {
        let shared = Shared {
            broker: Arc::new(broker),
            accounts: Mutex::default(),
            watch_grew: Notify::new(),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
            is_started: AtomicBool::new(false),
        };
        let end = shared.closed.clone().drop_guard();
        Self { shared: Arc::new(shared), _end: Arc::new(end) }
    }

    /// Returns the account's token: the kept one while it may be used, and otherwise a new one from the broker.
    /// Waits for it for at most the client's timeout.
    ///
    /// Drop the future to give up. Other callers that wait for the same token get it all the same.
    ///
    /// # Errors
    /// [`Error::kind`] says why there is no token.
    pub async fn token(&self, account: &str) -> Result<Token, Error> {
        self.token_within(account, self.default_timeout()).await
    }

    /// Like [`token`](Self::token), but waits for at most `timeout`.
    pub async fn token_within(&self, account: &str, timeout: Duration) -> Result<Token, Error> {
        self.token_newer_than(account, 0, timeout).await
    }

    /// Like [`token_within`](Self::token_within), but returns only a token of a later generation than
    /// `generation`. Call it after a [`report`](Self::report).
    pub async fn token_newer_than(
        &self,
        account: &str,
        generation: u64,
        timeout: Duration,
    ) -> Result<Token, Error> {
        self.shared.start();
        self.shared.token(account, generation, later(Instant::now(), timeout)).await
    }

    /// Tells the broker that the API refused the account's token of `generation` with `upstream_code`, such as
    /// `61003`. Waits for at most the client's timeout. The adapters for HTTP clients do this by themselves.
    pub async fn report(
        &self,
        account: &str,
        generation: u64,
        upstream_code: &str,
    ) -> Result<ReportOutcome, Error> {
        self.report_within(account, generation, upstream_code, self.default_timeout()).await
    }

    /// Like [`report`](Self::report), but waits for at most `timeout`.
    pub async fn report_within(
        &self,
        account: &str,
        generation: u64,
        upstream_code: &str,
        timeout: Duration,
    ) -> Result<ReportOutcome, Error> {
        self.shared.start();
        let request = ReportRejectedTokenRequest {
            account: account.to_owned(),
            generation,
            upstream_code: upstream_code.to_owned(),
        };
        let call = self.shared.broker.report(request, later(Instant::now(), timeout));
        let answer = self.shared.unless_closed(account, call).await??;
        let outcome = match wire::Outcome::try_from(answer.outcome) {
            Ok(wire::Outcome::Reissuing) => ReportOutcome::Reissuing,
            Ok(wire::Outcome::AlreadyReplaced) => ReportOutcome::AlreadyReplaced,
            Ok(wire::Outcome::TooSoon) => ReportOutcome::TooSoon {
                retry_after: answer
                    .retry_after
                    .and_then(|span| Duration::try_from(span).ok())
                    .unwrap_or_default(),
            },
            // An outcome that this version does not know asks for nothing that it could do.
            _ => ReportOutcome::NotATokenFault,
        };
        debug!(account, generation, upstream_code, ?outcome, "a refused token was reported");
        Ok(outcome)
    }

    /// Asks the broker once. Keeps nothing and repeats nothing, so the first error is returned at once. This is
    /// for commands that end after one token; services call [`token`](Self::token).
    pub async fn ask(&self, account: &str, options: AskOptions) -> Result<Token, Error> {
        let min_ttl = options.min_ttl.map(prost_types::Duration::try_from).transpose();
        let min_ttl = min_ttl.map_err(|_| Error::settings("min_ttl is too long"))?;
        let request =
            GetTokenRequest { account: account.to_owned(), min_ttl, newer_than_generation: 0 };
        let timeout = options.timeout.unwrap_or(self.default_timeout());
        let call = self.shared.broker.get_token(request, later(Instant::now(), timeout));
        self.shared.unless_closed(account, call).await?
    }

    /// Opens a stream with the current token of each account that the names or patterns such as `acme-*` match,
    /// and then each replacement and end. The stream is not opened again when it ends, and the client does not
    /// keep its tokens. Services call [`token`](Self::token), which watches by itself.
    pub async fn watch<I>(&self, accounts: I) -> Result<TokenStream, Error>
    where
        I: IntoIterator<Item: Into<String>>,
    {
        let accounts: Vec<String> = accounts.into_iter().map(Into::into).collect();
        let name = accounts.join(",");
        let opened = self.shared.unless_closed(&name, self.shared.broker.watch(accounts)).await?;
        let opened = opened.map_err(|status| Error::from_status(&name, &status))?;
        Ok(TokenStream::new(name, opened.messages, self.shared.closed.clone()))
    }

    /// Ends the watch and the connections. Waiting and later calls fail with
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed). Returns within a second, and may be called again.
    pub async fn close(&self) {
        self.shared.closed.cancel();
        self.shared.tasks.close();
        // Tasks end at their next step; one that blocks on a disk may take longer.
        let _ = timeout(CLOSE_TIMEOUT, self.shared.tasks.wait()).await;
        self.shared.broker.close();
    }

    pub(crate) fn default_timeout(&self) -> Duration {
        self.shared.broker.settings().timeout
    }
}

#[cfg(feature = "_adapters")]
impl TokenClient {
    /// Returns a token to use instead of the one of generation `refused`, which the API refused with
    /// `upstream_code`, after a report. `None` if there is none before `deadline`.
    pub(crate) async fn replace_refused(
        &self,
        account: &str,
        refused: u64,
        upstream_code: &str,
        deadline: Instant,
    ) -> Option<Token> {
        let kept = |shared: &Shared| {
            let accounts = shared.accounts();
            let kept = accounts.get(account)?.usable(Instant::now())?;
            (kept.generation() > refused).then(|| kept.clone())
        };
        loop {
            if let Some(token) = kept(&self.shared) {
                return Some(token);
            }
            let report = self.shared.report_of(account, refused);
            let timeout = deadline.saturating_duration_since(Instant::now());
            let reported = report.outcome.get_or_init(async || {
                let outcome = self.report_within(account, refused, upstream_code, timeout).await;
                if let Err(error) = &outcome {
                    warn!(account, generation = refused, %error, "a refused token could not be reported");
                }
                (outcome.ok(), Instant::now())
            });
            match *reported.await {
                (Some(ReportOutcome::Reissuing | ReportOutcome::AlreadyReplaced), _) => break,
                // The broker does not keep such a report, so it is made again.
                (Some(ReportOutcome::TooSoon { retry_after }), at) => {
                    let until = later(at, retry_after.max(SHORTEST_REPORT_PAUSE));
                    if until >= deadline {
                        return None;
                    }
                    self.shared
                        .unless_closed(account, tokio::time::sleep_until(until))
                        .await
                        .ok()?;
                }
                (Some(ReportOutcome::NotATokenFault) | None, _) => return None,
            }
        }
        let token = self.shared.token(account, refused, deadline).await;
        token.inspect_err(|error| warn!(account, %error, "a refused token was not replaced")).ok()
    }
}

impl fmt::Debug for TokenClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenClient")
            .field("settings", self.shared.broker.settings())
            .field("is_closed", &self.shared.closed.is_cancelled())
            .finish_non_exhaustive()
    }
}

/// What all clones of a client and its tasks share.
pub(crate) struct Shared {
    pub(crate) broker: Arc<Broker>,
    accounts: Mutex<HashMap<String, Account>>,
    /// Notified when an account was added to the watch.
    pub(crate) watch_grew: Notify,
    closed: CancellationToken,
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
        /// The token that is returned if the ask fails.
        fallback: Option<Token>,
    },
}

impl Shared {
    /// Starts the tasks of the client, the first time that this is called.
    fn start(self: &Arc<Self>) {
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
    async fn unless_closed<T>(
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

    async fn token(
        self: &Arc<Self>,
        account: &str,
        newer_than: u64,
        deadline: Instant,
    ) -> Result<Token, Error> {
        loop {
            let (mut ask, is_owner, fallback) = match self.next(account, newer_than, deadline) {
                Next::Return(result) => return result,
                Next::Wait { ask, is_owner, fallback } => (ask, is_owner, fallback),
            };
            let limit = match &fallback {
                Some(_) => deadline.min(ask.started + REPLACEMENT_WAIT),
                None => deadline,
            };
            let outcome =
                self.unless_closed(account, timeout_at(limit, ask.outcome(account))).await?;
            let error = match outcome {
                Ok(Ok(token)) => return Ok(token),
                Ok(Err(error)) if !error.is_temporary() => return Err(error),
                Ok(Err(error)) => Some(error),
                Err(_) => None,
            };
            let now = Instant::now();
            if error.is_none() && fallback.is_some() {
                self.pause_because_slow(account, newer_than, now);
            }
            if let Some(token) = fallback {
                if token.is_usable(now) {
                    return Ok(token);
                }
                // The token ended meanwhile: now the caller waits like one that never had a token.
                if now < deadline {
                    continue;
                }
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
        let now = Instant::now();
        let mut accounts = self.accounts();
        if !accounts.contains_key(account) {
            remove_useless(&mut accounts, now);
        }
        let state = accounts.entry(account.to_owned()).or_insert_with(|| Account::new(now));
        state.last_used = now;
        let fallback = match state.decide(newer_than, now) {
            Decision::Use(token) => return Next::Return(Ok(token)),
            Decision::Refuse(error) => return Next::Return(Err(error)),
            Decision::Replace(token) => Some(token),
            Decision::Ask => None,
        };
        if let Some(ask) = state.asks.get(&newer_than).filter(|ask| ask.is_running()) {
            return Next::Wait { ask: ask.clone(), is_owner: false, fallback };
        }
        let wanted = Wanted {
            account: account.to_owned(),
            newer_than,
            deadline,
            retries: fallback.is_none(),
        };
        let ask = SharedAsk::start(self, wanted, now);
        state.asks.insert(newer_than, ask.clone());
        Next::Wait { ask, is_owner: true, fallback }
    }

    /// Takes the outcome of an ask into account. Returns what its callers get.
    pub(crate) fn finish(
        &self,
        wanted: &Wanted,
        outcome: Result<Token, Error>,
    ) -> Result<Token, Error> {
        let account = &wanted.account;
        let now = Instant::now();
        let mut accounts = self.accounts();
        let watched = accounts.values().filter(|account| account.is_watched).count();
        let Some(state) = accounts.get_mut(account) else { return outcome };
        let ask = state.asks.remove(&wanted.newer_than);
        match &outcome {
            Ok(token) => {
                debug!(account, generation = token.generation(), "the broker sent a token");
                if !state.is_watched && watched < LONGEST_WATCH {
                    state.is_watched = true;
                    self.watch_grew.notify_one();
                }
                return Ok(state.offer(token.clone(), now));
            }
            Err(error) if !error.is_temporary() => {
                debug!(account, %error, "the broker refuses the account's token");
                state.refuse(error.clone(), now);
            }
            Err(error) if !wanted.retries => {
                warn!(account, %error, "the token could not be replaced; the kept one is used");
                if ask.is_some_and(|ask| !ask.was_slow) {
                    state.pause(now, fastrand::f64());
                }
            }
            Err(error) => debug!(account, %error, "no token could be had"),
        }
        outcome
    }

    /// Makes callers use the kept token for a while, because the ask for its replacement takes long.
    fn pause_because_slow(&self, account: &str, newer_than: u64, now: Instant) {
        let mut accounts = self.accounts();
        let Some(state) = accounts.get_mut(account) else { return };
        let Some(ask) = state.asks.get_mut(&newer_than) else { return };
        if !std::mem::replace(&mut ask.was_slow, true) {
            warn!(account, "the token's replacement takes long; the kept one is used");
            state.pause(now, fastrand::f64());
        }
    }

    /// Returns the names for the next stream of the watch. Accounts that are not used any more leave it.
    pub(crate) fn watched_names(&self) -> Vec<String> {
        let now = Instant::now();
        let mut accounts = self.accounts();
        for account in accounts.values_mut() {
            account.is_watched &= now < account.last_used + UNUSED;
        }
        remove_useless(&mut accounts, now);
        let watched = accounts.iter().filter(|(_, account)| account.is_watched);
        watched.map(|(name, _)| name.clone()).collect()
    }

    /// Keeps a token that the broker pushed, if the program uses its account.
    pub(crate) fn offer(&self, account: &str, token: Token) {
        debug!(account, generation = token.generation(), "the broker pushed a token");
        if let Some(state) = self.accounts().get_mut(account) {
            state.offer(token, Instant::now());
        }
    }

    /// Forgets the account's token, and removes the account from the watch.
    pub(crate) fn end(&self, account: &str) {
        if let Some(state) = self.accounts().get_mut(account) {
            state.forget();
            state.is_watched = false;
        }
    }

    /// Removes the accounts from the watch, and makes their next callers ask, so that they hear what is wrong.
    pub(crate) fn leave_watch(&self, names: &[String]) {
        let now = Instant::now();
        let mut accounts = self.accounts();
        for name in names {
            if let Some(state) = accounts.get_mut(name) {
                state.end_reuse(now);
                state.is_watched = false;
            }
        }
    }

    /// Forgets all tokens.
    pub(crate) fn forget_all(&self) {
        self.accounts().values_mut().for_each(Account::forget);
    }

    /// Returns the report of a refused token, which all callers share that hold the same generation.
    #[cfg(feature = "_adapters")]
    fn report_of(&self, account: &str, generation: u64) -> Arc<Report> {
        let now = Instant::now();
        let mut accounts = self.accounts();
        let state = accounts.entry(account.to_owned()).or_insert_with(|| Account::new(now));
        match &state.report {
            Some(report) if report.is_shared(generation, now) => Arc::clone(report),
            _ => Arc::clone(state.report.insert(Arc::new(Report::new(generation)))),
        }
    }

    fn accounts(&self) -> MutexGuard<'_, HashMap<String, Account>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes accounts about which nothing is known any more, now and then, so that a program that asks for more and
/// more names does not need more and more memory.
fn remove_useless(accounts: &mut HashMap<String, Account>, now: Instant) {
    if accounts.len().is_power_of_two() {
        accounts.retain(|_, account| !account.is_useless(now));
    }
}

#[cfg(test)]
mod tests;
