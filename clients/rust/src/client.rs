//! The client: what programs call.

use std::{fmt, sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::DropGuard;
use tracing::debug;

use crate::{
    broker::Broker,
    error::{Error, ErrorKind},
    proto::{GetTokenRequest, ReportRejectedTokenRequest, report_rejected_token_response as wire},
    settings::TokenClientBuilder,
    shared::Shared,
    stream::TokenStream,
    time::later,
    token::Token,
};

/// A client for one caller of one deployment of the broker. Make one in a program, and clone it.
///
/// It needs a tokio runtime with timers and networking. The last clone that is dropped closes it.
#[derive(Clone)]
pub struct TokenClient {
    pub(crate) shared: Arc<Shared>,
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
        let shared = Shared::new(broker);
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
            Ok(wire::Outcome::NotATokenFault) => ReportOutcome::NotATokenFault,
            Ok(wire::Outcome::Unspecified) | Err(_) => {
                let why = "the answer to the report has an unknown outcome";
                return Err(Error::local(ErrorKind::Internal, account, why));
            }
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
        self.shared.close().await;
    }

    pub(crate) fn default_timeout(&self) -> Duration {
        self.shared.broker.settings().timeout
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

#[cfg(test)]
mod tests;
