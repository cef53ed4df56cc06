//! One stream of tokens, as the broker sends it.

use std::fmt;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::{
    error::Error,
    proto::{WatchTokensResponse, account_ended as wire, watch_tokens_response},
    token::Token,
};

/// A stream of tokens: see [`TokenClient::watch`](crate::TokenClient::watch).
pub struct TokenStream {
    /// The names or patterns, for errors.
    name: String,
    messages: Streaming<WatchTokensResponse>,
    closed: CancellationToken,
}

/// What happened to an account.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TokenEvent {
    /// The account's current token, or its replacement.
    Token(Token),
    /// This caller can no longer use the account.
    Ended {
        /// The account's name.
        account: String,
        /// Why it ended.
        reason: EndReason,
    },
}

/// Why an account ended on a stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum EndReason {
    /// The account was removed.
    Removed,
    /// An admin disabled the account.
    Disabled,
    /// No grant covers the account any more.
    NotGranted,
    /// A reason that this version does not know.
    Other,
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Removed => "removed",
            Self::Disabled => "disabled",
            Self::NotGranted => "not_granted",
            Self::Other => "unspecified",
        })
    }
}

impl TokenStream {
    pub(crate) fn new(
        name: String,
        messages: Streaming<WatchTokensResponse>,
        closed: CancellationToken,
    ) -> Self {
        Self { name, messages, closed }
    }

    /// Waits for the next event. Returns `None` when the broker has ended the stream. Cancel safe.
    ///
    /// # Errors
    /// When the stream ended with an error. It has no more events then.
    pub async fn next(&mut self) -> Result<Option<TokenEvent>, Error> {
        loop {
            let message = tokio::select! {
                () = self.closed.cancelled() => return Err(Error::closed(&self.name)),
                message = self.messages.message() => message,
            };
            match message.map_err(|status| Error::from_status(&self.name, &status))? {
                None => return Ok(None),
                Some(message) => {
                    if let Some(event) = event(message)? {
                        return Ok(Some(event));
                    }
                }
            }
        }
    }
}

impl fmt::Debug for TokenStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenStream").field("accounts", &self.name).finish_non_exhaustive()
    }
}

/// Returns the event in `message`; `None` for one that this version does not know.
///
/// # Errors
/// When it is a token that is not complete.
pub(crate) fn event(message: WatchTokensResponse) -> Result<Option<TokenEvent>, Error> {
    let account = message.account;
    Ok(match message.event {
        Some(watch_tokens_response::Event::Token(answer)) => {
            Some(TokenEvent::Token(Token::from_answer(&account, answer, Instant::now())?))
        }
        Some(watch_tokens_response::Event::Ended(ended)) => {
            let reason = match wire::Reason::try_from(ended.reason) {
                Ok(wire::Reason::Removed) => EndReason::Removed,
                Ok(wire::Reason::Disabled) => EndReason::Disabled,
                Ok(wire::Reason::NotGranted) => EndReason::NotGranted,
                _ => EndReason::Other,
            };
            Some(TokenEvent::Ended { account, reason })
        }
        None => None,
    })
}
