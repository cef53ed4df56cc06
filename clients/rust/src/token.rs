//! A token, and what the broker says about it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use crate::{
    error::{Error, ErrorKind},
    proto::GetTokenResponse,
    time::later,
};

/// A token counts as ended so long before its end, because a request needs time to reach the API.
const END_MARGIN: Duration = Duration::from_secs(1);

/// A token of an account. Its text forms do not contain the token itself. Cheap to clone.
#[derive(Clone)]
pub struct Token(Arc<Fields>);

struct Fields {
    account: String,
    access_token: String,
    generation: u64,
    allowed_ip: String,
    api_base_url: String,
    issued_at: Option<SystemTime>,
    expires_at: Option<SystemTime>,
    /// When the broker sent it, at the earliest.
    arrival: Instant,
    reuse_for: Duration,
    expires_in: Duration,
}

impl Token {
    /// Returns the token in an answer. Its times count from `arrival`.
    ///
    /// # Errors
    /// When the answer has no token, or times that are not above zero.
    pub(crate) fn from_answer(
        account: &str,
        answer: GetTokenResponse,
        arrival: Instant,
    ) -> Result<Self, Error> {
        let span = |span: Option<prost_types::Duration>| {
            span.and_then(|span| Duration::try_from(span).ok()).filter(|span| !span.is_zero())
        };
        let time = |time: Option<prost_types::Timestamp>| {
            time.and_then(|it| SystemTime::try_from(it).ok())
        };
        let incomplete = |what: &str| {
            Error::local(ErrorKind::Internal, account, format!("the broker's answer has no {what}"))
        };
        if answer.access_token.is_empty() {
            return Err(incomplete("token"));
        }
        Ok(Self(Arc::new(Fields {
            account: account.to_owned(),
            reuse_for: span(answer.reuse_for).ok_or_else(|| incomplete("positive reuse_for"))?,
            expires_in: span(answer.expires_in).ok_or_else(|| incomplete("positive expires_in"))?,
            access_token: answer.access_token,
            generation: answer.generation,
            allowed_ip: answer.allowed_ip,
            api_base_url: answer.api_base_url,
            issued_at: time(answer.issued_at),
            expires_at: time(answer.expires_at),
            arrival,
        })))
    }

    /// Returns the account's name.
    #[must_use]
    pub fn account(&self) -> &str {
        &self.0.account
    }

    /// Returns the token itself: a secret. Send it as `Authorization: Bearer …`, and treat it as opaque.
    #[must_use]
    pub fn access_token(&self) -> &str {
        &self.0.access_token
    }

    /// Returns a number that grows with each new token of the account.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.0.generation
    }

    /// Returns the address from which the API may accept the token; empty if the token names none.
    #[must_use]
    pub fn allowed_ip(&self) -> &str {
        &self.0.allowed_ip
    }

    /// Returns the base URL of the API for which the token is valid.
    #[must_use]
    pub fn api_base_url(&self) -> &str {
        &self.0.api_base_url
    }

    /// Returns how long the token is still valid; zero if it has ended.
    #[must_use]
    pub fn expires_in(&self) -> Duration {
        self.end().saturating_duration_since(Instant::now())
    }

    /// Returns for how long the token should still be used before the broker is asked again.
    #[must_use]
    pub fn reuse_for(&self) -> Duration {
        self.reuse_end().saturating_duration_since(Instant::now())
    }

    /// Returns when the token was issued, by the broker's clock.
    #[must_use]
    pub fn issued_at(&self) -> Option<SystemTime> {
        self.0.issued_at
    }

    /// Returns when the token ends, by the broker's clock. Prefer [`expires_in`](Self::expires_in), which needs
    /// no agreement of clocks.
    #[must_use]
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.0.expires_at
    }

    /// Returns when the token ends on this machine's monotonic clock.
    fn end(&self) -> Instant {
        later(self.0.arrival, self.0.expires_in)
    }

    /// Returns when the broker should be asked again.
    pub(crate) fn reuse_end(&self) -> Instant {
        later(self.0.arrival, self.0.reuse_for)
    }

    /// Whether a request with the token that is sent at `now` can still be accepted.
    pub(crate) fn is_usable(&self, now: Instant) -> bool {
        later(now, END_MARGIN) < self.end()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("account", &self.0.account)
            .field("generation", &self.0.generation)
            .field("allowed_ip", &self.0.allowed_ip)
            .field("api_base_url", &self.0.api_base_url)
            .field("expires_in", &self.expires_in())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::answer;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn a_token_counts_as_ended_one_second_before_its_end() {
        let now = Instant::now();
        let token = Token::from_answer("acme", answer(1, 5 * SECOND, 10 * SECOND), now).unwrap();
        assert!(token.is_usable(now + 9 * SECOND - Duration::from_millis(1)));
        assert!(!token.is_usable(now + 9 * SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_without_a_token_or_positive_times_is_refused() {
        let whole = answer(1, SECOND, SECOND);
        for incomplete in [
            GetTokenResponse { access_token: String::new(), ..whole.clone() },
            GetTokenResponse { reuse_for: None, ..whole.clone() },
            GetTokenResponse { reuse_for: Some(prost_types::Duration::default()), ..whole.clone() },
            GetTokenResponse { expires_in: None, ..whole.clone() },
            GetTokenResponse {
                expires_in: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
                ..whole.clone()
            },
        ] {
            let error = Token::from_answer("acme", incomplete, Instant::now()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Internal);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn times_without_end_are_accepted() {
        let forever = Duration::from_secs(u64::MAX / 1_000_000);
        let token = Token::from_answer("acme", answer(1, forever, forever), Instant::now());
        assert!(token.unwrap().is_usable(Instant::now() + 1000 * SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn the_debug_output_does_not_contain_the_token() {
        let answer = answer(7, SECOND, 2 * SECOND);
        let token = Token::from_answer("acme", answer.clone(), Instant::now()).unwrap();
        let text = format!("{token:?} {token:#?}");
        assert!(text.contains("acme") && text.contains('7'), "{text}");
        assert!(!text.contains(&answer.access_token), "{text}");
    }
}
