//! What the client knows about one account, and the decisions about it. Nothing here waits or looks at a clock.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

#[cfg(feature = "_adapters")]
use crate::replacement::Report;
use crate::{ask::AskInFlight, error::Error, time::Backoff, token::Token};

/// How long a refusal is answered without another call.
const REFUSAL_MEMORY: Duration = Duration::from_secs(1);
/// The pauses after failed attempts to replace a kept token that is still usable.
const REPLACEMENT_BACKOFF: Backoff =
    Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(30) };

/// The state of one account.
#[derive(Debug)]
pub(crate) struct Account {
    kept: Option<Kept>,
    refusal: Option<Refusal>,
    /// Failures since the kept token was last replaced.
    failures: u32,
    /// Until then, the kept token is used although it should be replaced.
    paused_until: Option<Instant>,
    /// The asks in flight, by the generation than which they want a newer one; 0 for any. The task of an ask
    /// removes it.
    pub(crate) asks: BTreeMap<u64, AskInFlight>,
    /// The last report that the API refused a token.
    #[cfg(feature = "_adapters")]
    pub(crate) report: Option<std::sync::Arc<Report>>,
    /// Whether the account belongs to the watch.
    pub(crate) is_watched: bool,
    /// When the program last asked for the account.
    pub(crate) last_used: Instant,
}

#[derive(Debug)]
struct Kept {
    token: Token,
    /// The token's own reuse end, or earlier.
    reuse_end: Instant,
}

#[derive(Debug)]
struct Refusal {
    error: Error,
    forgotten_at: Instant,
}

/// What to do when a token is wanted.
#[derive(Debug)]
pub(crate) enum Decision {
    /// Return this token.
    Use(Token),
    /// Ask for a replacement of the kept token, which is still usable.
    Replace,
    /// Ask for a token.
    Ask,
    /// Return this error.
    Refuse(Error),
}

impl Account {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            kept: None,
            refusal: None,
            failures: 0,
            paused_until: None,
            asks: BTreeMap::new(),
            #[cfg(feature = "_adapters")]
            report: None,
            is_watched: false,
            last_used: now,
        }
    }

    /// Decides what to do when a token of a later generation than `newer_than` is wanted.
    pub(crate) fn decide(&self, newer_than: u64, now: Instant) -> Decision {
        if let Some(refusal) = self.refusal.as_ref().filter(|it| now < it.forgotten_at) {
            return Decision::Refuse(refusal.error.clone());
        }
        match &self.kept {
            Some(Kept { token, reuse_end })
                if token.is_usable(now) && token.generation() > newer_than =>
            {
                let is_paused = self.paused_until.is_some_and(|until| now < until);
                if now < *reuse_end || is_paused {
                    Decision::Use(token.clone())
                } else {
                    Decision::Replace
                }
            }
            _ => Decision::Ask,
        }
    }

    /// Returns the kept token, if it is usable.
    pub(crate) fn usable(&self, now: Instant) -> Option<&Token> {
        self.kept.as_ref().map(|kept| &kept.token).filter(|token| token.is_usable(now))
    }

    /// Whether nothing would be lost without this state.
    pub(crate) fn is_useless(&self, now: Instant) -> bool {
        let refuses = self.refusal.as_ref().is_some_and(|refusal| now < refusal.forgotten_at);
        self.asks.is_empty() && !self.is_watched && !refuses && self.usable(now).is_none()
    }

    /// Returns the kept token, if it is usable and of a later generation than `newer_than`.
    pub(crate) fn usable_newer_than(&self, newer_than: u64, now: Instant) -> Option<&Token> {
        self.usable(now).filter(|token| token.generation() > newer_than)
    }

    /// Keeps `token` unless a newer one is kept and still usable, and gives it to the callers who wait for such a
    /// token. Returns the token that is kept now.
    pub(crate) fn offer(&mut self, token: Token, now: Instant) -> Token {
        self.refusal = None;
        let age = |token: &Token, reuse_end| (token.generation(), reuse_end);
        match &self.kept {
            Some(kept)
                if kept.token.is_usable(now)
                    && age(&kept.token, kept.reuse_end) >= age(&token, token.reuse_end()) =>
            {
                kept.token.clone()
            }
            _ => {
                self.failures = 0;
                self.paused_until = None;
                self.kept = Some(Kept { reuse_end: token.reuse_end(), token: token.clone() });
                if token.is_usable(now) {
                    for (_, ask) in self.asks.range_mut(..token.generation()) {
                        ask.settle(&token);
                    }
                }
                token
            }
        }
    }

    /// Forgets the kept token.
    pub(crate) fn forget(&mut self) {
        self.kept = None;
        self.failures = 0;
        self.paused_until = None;
    }

    /// Forgets the kept token because of `error`, and remembers the error for a while.
    pub(crate) fn refuse(&mut self, error: Error, now: Instant) {
        self.forget();
        self.refusal = Some(Refusal { error, forgotten_at: now + REFUSAL_MEMORY });
    }

    /// Takes the account off the watch. From now on nothing is pushed for it, so the next call asks, and hears
    /// what became of the token.
    pub(crate) fn leave_watch(&mut self, now: Instant) {
        self.is_watched = false;
        self.end_reuse(now);
    }

    /// Makes the next call ask for a replacement of the kept token.
    fn end_reuse(&mut self, now: Instant) {
        if let Some(kept) = &mut self.kept {
            kept.reuse_end = kept.reuse_end.min(now);
            self.paused_until = None;
        }
    }

    /// Begins a pause after a failed attempt to replace the kept token. `random` is from 0 to 1.
    pub(crate) fn pause(&mut self, now: Instant, random: f64) {
        self.paused_until = Some(now + REPLACEMENT_BACKOFF.pause(self.failures, random));
        self.failures = self.failures.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::ErrorKind, testing::answer};

    const SECOND: Duration = Duration::from_secs(1);

    /// Returns a token that is reused for 10 s and ends after 20 s.
    fn token(generation: u64, arrival: Instant) -> Token {
        Token::from_answer("acme", answer(generation, 10 * SECOND, 20 * SECOND), arrival).unwrap()
    }

    /// Returns an account with a token of generation 5 that arrived now.
    fn account() -> (Account, Instant) {
        let now = Instant::now();
        let mut account = Account::new(now);
        account.offer(token(5, now), now);
        (account, now)
    }

    /// Names the decision, with the generation of its token.
    fn decision(account: &Account, newer_than: u64, now: Instant) -> String {
        match account.decide(newer_than, now) {
            Decision::Use(token) => format!("use {}", token.generation()),
            Decision::Replace => "replace".into(),
            Decision::Ask => "ask".into(),
            Decision::Refuse(error) => error.kind().name().into(),
        }
    }

    #[test]
    fn the_kept_token_is_used_to_its_reuse_end_and_then_replaced_to_its_end() {
        let (account, now) = account();
        for (seconds, expected) in
            [(0, "use 5"), (9, "use 5"), (10, "replace"), (18, "replace"), (19, "ask")]
        {
            assert_eq!(decision(&account, 0, now + seconds * SECOND), expected, "{seconds} s");
        }
        assert_eq!(decision(&Account::new(now), 0, now), "ask");
    }

    #[test]
    fn a_kept_token_that_is_not_newer_than_wanted_is_not_used() {
        let (account, now) = account();
        assert_eq!(decision(&account, 4, now), "use 5");
        assert_eq!(decision(&account, 5, now), "ask");
    }

    #[test]
    fn the_newest_token_wins() {
        let (mut account, now) = account();
        assert_eq!(account.offer(token(4, now + SECOND), now + SECOND).generation(), 5);
        assert_eq!(decision(&account, 0, now + 10 * SECOND), "replace");
        // The same token with a later reuse end.
        account.offer(token(5, now + SECOND), now + SECOND);
        assert_eq!(decision(&account, 0, now + 10 * SECOND), "use 5");
        account.offer(token(6, now), now);
        assert_eq!(decision(&account, 5, now), "use 6");
        // A token that has ended is no longer the newest.
        let later = now + 30 * SECOND;
        assert_eq!(account.offer(token(3, later), later).generation(), 3);
    }

    #[test]
    fn after_failures_the_kept_token_is_used_without_asking_until_longer_and_longer_pauses_end() {
        let (mut account, start) = account();
        let mut now = start + 10 * SECOND;
        account.pause(now, 0.0);
        assert_eq!(decision(&account, 0, now + SECOND / 2), "use 5");
        now += SECOND;
        assert_eq!(decision(&account, 0, now), "replace");
        account.pause(now, 1.0);
        assert_eq!(decision(&account, 0, now + SECOND / 2), "use 5");
        assert_eq!(decision(&account, 0, now + SECOND), "replace");
        // A pause does not make a token last longer.
        account.pause(now, 0.0);
        assert_eq!(decision(&account, 0, start + 19 * SECOND), "ask");
        // A replacement ends the pause.
        account.offer(token(6, now), now);
        assert_eq!(account.failures, 0);
    }

    #[test]
    fn a_refusal_forgets_the_kept_token_and_is_remembered_for_a_second() {
        let (mut account, now) = account();
        account.refuse(Error::local(ErrorKind::NotGranted, "acme", "no"), now);
        assert_eq!(decision(&account, 0, now + SECOND / 2), "NOT_GRANTED");
        assert_eq!(decision(&account, 0, now + SECOND), "ask");
        account.refuse(Error::local(ErrorKind::NotGranted, "acme", "no"), now);
        account.offer(token(4, now), now);
        assert_eq!(decision(&account, 0, now), "use 4");
    }

    #[test]
    fn a_token_whose_reuse_was_ended_is_replaced_although_it_is_new() {
        let (mut account, now) = account();
        account.end_reuse(now + SECOND);
        assert_eq!(decision(&account, 0, now + SECOND), "replace");
    }
}
