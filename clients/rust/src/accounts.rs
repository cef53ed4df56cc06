//! What the client knows about all accounts. Nothing here waits.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};
use tracing::{debug, warn};

#[cfg(feature = "_adapters")]
use crate::replacement::Report;
use crate::{account::Account, ask::Wanted, error::Error, token::Token};

/// An account for which the program has not asked for so long leaves the watch.
const UNUSED: Duration = Duration::from_secs(60 * 60);
/// How many accounts one watch may have.
const LONGEST_WATCH: usize = 1_000;

/// The accounts for which the program has asked.
#[derive(Default)]
pub(crate) struct Accounts {
    states: Mutex<HashMap<String, Account>>,
    /// Notified when an account was added to the watch.
    watch_grew: Notify,
}

impl Accounts {
    /// Calls `act` with the state of an account for which the program asks now. Other accounts wait meanwhile.
    pub(crate) fn use_account<T>(
        &self,
        account: &str,
        act: impl FnOnce(&mut Account, Instant) -> T,
    ) -> T {
        let now = Instant::now();
        let mut states = self.lock();
        if !states.contains_key(account) {
            forget_useless(&mut states, now);
        }
        let state = states.entry(account.to_owned()).or_insert_with(|| Account::new(now));
        state.last_used = now;
        act(state, now)
    }

    /// Returns the kept token, if it is usable and of a later generation than `newer_than`.
    pub(crate) fn usable(&self, account: &str, newer_than: u64) -> Option<Token> {
        let states = self.lock();
        states.get(account)?.usable_newer_than(newer_than, Instant::now()).cloned()
    }

    /// Takes the outcome of an ask into account, and removes it. Returns what its callers get.
    pub(crate) fn finish(
        &self,
        wanted: &Wanted,
        outcome: Result<Token, Error>,
    ) -> Result<Token, Error> {
        let account = &wanted.account;
        let now = Instant::now();
        let mut states = self.lock();
        let watched = states.values().filter(|account| account.is_watched).count();
        let Some(state) = states.get_mut(account) else { return outcome };
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

    /// Removes an ask whose callers got a token in another way.
    pub(crate) fn remove_ask(&self, wanted: &Wanted) {
        if let Some(state) = self.lock().get_mut(&wanted.account) {
            state.asks.remove(&wanted.newer_than);
        }
    }

    /// Makes callers use the kept token for a while, because the ask for its replacement takes long.
    pub(crate) fn pause_because_slow(&self, account: &str, newer_than: u64) {
        let mut states = self.lock();
        let Some(state) = states.get_mut(account) else { return };
        let Some(ask) = state.asks.get_mut(&newer_than) else { return };
        if !std::mem::replace(&mut ask.was_slow, true) {
            warn!(account, "the token's replacement takes long; the kept one is used");
            state.pause(Instant::now(), fastrand::f64());
        }
    }

    /// Waits until an account is added to the watch. Cancel safe.
    pub(crate) async fn watch_grew(&self) {
        self.watch_grew.notified().await;
    }

    /// Returns the names for the next stream of the watch. Accounts that are not used any more leave it.
    pub(crate) fn watched_names(&self) -> BTreeSet<String> {
        let now = Instant::now();
        let mut states = self.lock();
        for state in states.values_mut() {
            if state.is_watched && now >= state.last_used + UNUSED {
                state.leave_watch(now);
            }
        }
        forget_useless(&mut states, now);
        let watched = states.iter().filter(|(_, state)| state.is_watched);
        watched.map(|(name, _)| name.clone()).collect()
    }

    /// Keeps a token that the broker pushed, if the program uses its account.
    pub(crate) fn offer(&self, token: &Token) {
        let account = token.account();
        debug!(account, generation = token.generation(), "the broker pushed a token");
        if let Some(state) = self.lock().get_mut(account) {
            state.offer(token.clone(), Instant::now());
        }
    }

    /// Forgets the account's token, and removes the account from the watch.
    pub(crate) fn end(&self, account: &str) {
        if let Some(state) = self.lock().get_mut(account) {
            state.forget();
            state.is_watched = false;
        }
    }

    /// Removes the accounts from the watch, and makes their next callers ask, so that they hear what is wrong.
    pub(crate) fn leave_watch(&self, names: &BTreeSet<String>) {
        let now = Instant::now();
        let mut states = self.lock();
        for name in names {
            if let Some(state) = states.get_mut(name) {
                state.leave_watch(now);
            }
        }
    }

    /// Forgets all tokens.
    pub(crate) fn forget_all(&self) {
        self.lock().values_mut().for_each(Account::forget);
    }

    /// Returns the report of a refused token, which all callers share that hold the same generation.
    #[cfg(feature = "_adapters")]
    pub(crate) fn report_of(&self, account: &str, generation: u64) -> std::sync::Arc<Report> {
        self.use_account(account, |state, now| match &state.report {
            Some(report) if report.is_shared(generation, now) => report.clone(),
            _ => state.report.insert(Report::new(generation).into()).clone(),
        })
    }

    /// Returns how many accounts there are.
    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Account>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets accounts about which nothing is known any more, so that a program that asks for more and more names does
/// not need more and more memory. It does so when the number of accounts is a power of two, because to go through
/// all of them for each new one would take longer and longer.
fn forget_useless(states: &mut HashMap<String, Account>, now: Instant) {
    if states.len().is_power_of_two() {
        states.retain(|_, state| !state.is_useless(now));
    }
}
