//! The state of a simulated upstream (accounts with their live tokens, faults, scripts, counters), and
//! the rules by which it issues tokens.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::IpAddr,
    sync::Arc,
};

use aws_lc_rs::digest;
use chrono::TimeDelta;
use parking_lot::{Mutex, MutexGuard};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{
    faults::{Answer, Faults},
    jwt::Claims,
    options::{SimulatedAccount, SimulatorOptions},
};
use crate::domain::clock::{Clock, Timestamp, delta};

/// How many entries `issues_per_second` keeps, one for each second in which a token was issued.
const MAX_SECONDS: usize = 86_400;

/// An error of the simulated API: the HTTP status, and code and message of the JSON body.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct ApiError {
    pub(super) status: u16,
    pub(super) code: String,
    pub(super) message: &'static str,
}

impl ApiError {
    pub(super) fn new(status: u16, code: &str, message: &'static str) -> Self {
        Self { status, code: code.to_owned(), message }
    }
}

/// An issued token.
#[derive(Clone)]
pub(super) struct SimulatedToken {
    pub(super) serial: u64,
    pub(super) text: String,
    pub(super) expires_at: Timestamp,
}

/// A live token as the control endpoints show it: without its text.
#[derive(Serialize)]
pub(super) struct TokenInfo {
    serial: u64,
    /// The SHA-256 of the token's text, in hexadecimal.
    sha256: String,
    pub(super) expires_at: Timestamp,
}

/// An account as the control endpoints show it.
#[derive(Serialize)]
pub(super) struct AccountInfo {
    client_id: String,
    locked: bool,
    attempts: u64,
    issued: u64,
    live: Vec<TokenInfo>,
    script: Vec<Answer>,
}

/// Counters since the start or the last reset. `GET /simulator/counts` returns them.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Counters {
    pub(super) requests: u64,
    /// Protected calls, whatever the answer is.
    pub(super) api_requests: u64,
    pub(super) issued: u64,
    pub(super) in_flight: u64,
    pub(super) peak_in_flight: u64,
    pub(super) last_peer: Option<IpAddr>,
    pub(super) issues_per_second: Vec<(i64, u64)>,
}

pub(super) struct UpstreamState {
    clock: Clock,
    initial_accounts: Vec<SimulatedAccount>,
    initial_faults: Faults,
    /// Cancelled when the simulator shuts down. Requests that hang wait for it.
    pub(super) shutdown: CancellationToken,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    faults: Faults,
    accounts: BTreeMap<String, Account>,
    /// By client id, which need not be that of an account.
    scripts: HashMap<String, VecDeque<Answer>>,
    /// By client id, which need not be that of an account.
    attempts: HashMap<String, u64>,
    /// The serial of the last token. A reset keeps it, so that no two tokens are equal.
    serial: u64,
    counters: Counters,
    issues_per_second: BTreeMap<i64, u64>,
}

#[derive(Default)]
struct Account {
    secret: String,
    locked: bool,
    issued: u64,
    /// The tokens that have not been replaced, oldest first. Expired ones are removed when the next
    /// token is issued.
    tokens: Vec<SimulatedToken>,
}

impl UpstreamState {
    pub(super) fn new(options: SimulatorOptions) -> Self {
        let SimulatorOptions { accounts, faults, clock } = options;
        let state = Self {
            clock,
            initial_accounts: accounts,
            initial_faults: faults,
            shutdown: CancellationToken::new(),
            inner: Mutex::default(),
        };
        state.reset();
        state
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    /// Returns the upstream's time, including the clock skew. Takes the lock.
    pub(super) fn now(&self) -> Timestamp {
        self.clock.now() + TimeDelta::seconds(self.lock().faults.clock_skew_seconds)
    }

    /// Restores the accounts and faults of the [`SimulatorOptions`], and removes all tokens, scripts and
    /// counters.
    pub(super) fn reset(&self) {
        let mut inner = self.lock();
        // Requests that are in flight will decrement this counter.
        let in_flight = inner.counters.in_flight;
        *inner = Inner {
            faults: self.initial_faults.clone(),
            serial: inner.serial,
            counters: Counters { in_flight, peak_in_flight: in_flight, ..Counters::default() },
            ..Inner::default()
        };
        for account in &self.initial_accounts {
            let SimulatedAccount { client_id, client_secret, locked } = account.clone();
            let account = Account { secret: client_secret, locked, ..Account::default() };
            inner.accounts.insert(client_id, account);
        }
    }

    pub(super) fn faults(&self) -> Faults {
        self.lock().faults.clone()
    }

    pub(super) fn initial_faults(&self) -> &Faults {
        &self.initial_faults
    }

    pub(super) fn set_faults(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    /// Changes an account. With a secret, creates the account if it does not exist. Returns whether
    /// it exists afterwards.
    pub(super) fn put_account(
        &self,
        client_id: &str,
        secret: Option<&str>,
        locked: Option<bool>,
    ) -> bool {
        let mut inner = self.lock();
        if let Some(secret) = secret {
            secret.clone_into(&mut inner.accounts.entry(client_id.to_owned()).or_default().secret);
        }
        let Some(account) = inner.accounts.get_mut(client_id) else { return false };
        account.locked = locked.unwrap_or(account.locked);
        true
    }

    pub(super) fn remove_account(&self, client_id: &str) -> bool {
        let mut inner = self.lock();
        inner.scripts.remove(client_id);
        inner.accounts.remove(client_id).is_some()
    }

    pub(super) fn script(&self, client_id: &str, answers: impl IntoIterator<Item = Answer>) {
        self.lock().scripts.insert(client_id.to_owned(), answers.into_iter().collect());
    }

    pub(super) fn accounts(&self) -> Vec<AccountInfo> {
        let now = self.now();
        let inner = self.lock();
        let info = |(client_id, account): (&String, &Account)| AccountInfo {
            client_id: client_id.clone(),
            locked: account.locked,
            attempts: inner.attempts.get(client_id).copied().unwrap_or_default(),
            issued: account.issued,
            live: account.live_tokens(now).map(SimulatedToken::info).collect(),
            script: inner.scripts.get(client_id).into_iter().flatten().cloned().collect(),
        };
        inner.accounts.iter().map(info).collect()
    }

    pub(super) fn counters(&self) -> Counters {
        let inner = self.lock();
        let issues_per_second = inner.issues_per_second.iter().map(|(at, n)| (*at, *n)).collect();
        Counters { issues_per_second, ..inner.counters.clone() }
    }

    pub(super) fn attempts(&self, client_id: &str) -> u64 {
        self.lock().attempts.get(client_id).copied().unwrap_or_default()
    }

    pub(super) fn issued(&self, client_id: &str) -> u64 {
        self.lock().accounts.get(client_id).map_or(0, |account| account.issued)
    }

    pub(super) fn live_token(&self, client_id: &str) -> Option<String> {
        let now = self.now();
        let inner = self.lock();
        inner.accounts.get(client_id)?.live_tokens(now).last().map(|token| token.text.clone())
    }

    /// Counts a token request, and counts it as in flight until the returned guard is dropped.
    pub(super) fn begin_request(self: &Arc<Self>, client_address: IpAddr) -> InFlightRequest {
        let mut inner = self.lock();
        let counters = &mut inner.counters;
        counters.requests += 1;
        counters.in_flight += 1;
        counters.peak_in_flight = counters.peak_in_flight.max(counters.in_flight);
        counters.last_peer = Some(client_address);
        InFlightRequest { number: counters.requests, state: self.clone() }
    }

    /// Counts a protected call.
    pub(super) fn count_api_request(&self) {
        self.lock().counters.api_requests += 1;
    }

    /// Counts an attempt of `client_id`, and returns how the request is answered: as the client's
    /// script says, or else by a random failure, or else as the faults say. `number` is that of
    /// [`InFlightRequest`].
    pub(super) fn next_answer(&self, client_id: &str, number: u64) -> Answer {
        let mut inner = self.lock();
        *inner.attempts.entry(client_id.to_owned()).or_default() += 1;
        if let Some(scripted) = inner.scripts.get_mut(client_id).and_then(VecDeque::pop_front) {
            return scripted;
        }
        if inner.faults.is_random_failure(number) {
            return Answer::Unavailable { status: 503 };
        }
        inner.faults.answer.clone()
    }

    /// Issues a token, if the client's address is allowed, `client_id` and `secret` are right, and
    /// the account is not locked.
    pub(super) fn issue(
        &self,
        client_id: &str,
        secret: &str,
        client_address: IpAddr,
    ) -> Result<SimulatedToken, ApiError> {
        let now = self.now();
        let mut inner = self.lock();
        let Inner { faults, accounts, serial, counters, issues_per_second, .. } = &mut *inner;
        if faults
            .allowed_addresses
            .as_ref()
            .is_some_and(|allowed| !allowed.contains(&client_address))
        {
            let Faults { unregistered_status: status, unregistered_code: code, .. } = faults;
            return Err(ApiError::new(*status, code, "Unregistered address"));
        }
        let account = accounts
            .get_mut(client_id)
            .ok_or_else(|| ApiError::new(401, "61005", "Invalid client id"))?;
        if account.secret != secret {
            return Err(ApiError::new(401, "61006", "Invalid secret key"));
        }
        if account.locked {
            // The code that the real API uses for this is unknown.
            return Err(ApiError::new(401, "61091", "Locked account"));
        }
        let live = account.live_tokens(now).last().filter(|_| faults.repeats_tokens);
        if let Some(token) = live {
            return Ok(token.clone());
        }
        *serial += 1;
        let expires_at = now + delta(faults.token_life);
        let allow_ip = faults.allow_ip.unwrap_or(client_address);
        let claims = Claims::new(client_id, allow_ip, (now, expires_at), *serial);
        let text =
            claims.sign().map_err(|_| ApiError::new(500, "69999", "The token cannot be signed"))?;
        let token = SimulatedToken { serial: *serial, text, expires_at };
        account.tokens.retain(|older| !faults.new_token_ends_older && older.expires_at > now);
        account.tokens.push(token.clone());
        account.issued += 1;
        counters.issued += 1;
        *issues_per_second.entry(now.timestamp()).or_default() += 1;
        if issues_per_second.len() > MAX_SECONDS {
            issues_per_second.pop_first();
        }
        Ok(token)
    }

    /// Returns the client id and the description of a token, or the error with which a protected
    /// call is refused if the token is not live.
    pub(super) fn look_up(&self, token: &str) -> Result<(String, TokenInfo), ApiError> {
        let invalid = || ApiError::new(401, "61003", "Invalid token");
        let now = self.now();
        let claims = Claims::verify(token).ok_or_else(invalid)?;
        let inner = self.lock();
        let found = inner.accounts.get(&claims.user_id).and_then(|account| {
            account.live_tokens(now).find(|live| live.serial == claims.simulated_serial)
        });
        match found {
            Some(live) if live.text == token => Ok((claims.user_id, live.info())),
            None if claims.has_expired(now) => Err(ApiError::new(401, "61004", "Expired token")),
            _ => Err(invalid()),
        }
    }
}

impl Account {
    fn live_tokens(&self, now: Timestamp) -> impl Iterator<Item = &SimulatedToken> {
        self.tokens.iter().filter(move |token| token.expires_at > now)
    }
}

impl SimulatedToken {
    fn info(&self) -> TokenInfo {
        TokenInfo {
            serial: self.serial,
            sha256: hex::encode(digest::digest(&digest::SHA256, self.text.as_bytes())),
            expires_at: self.expires_at,
        }
    }
}

/// A token request that has not been answered. Dropping it ends its count as in flight.
pub(super) struct InFlightRequest {
    /// The number of the request since the start or the last reset, from 1.
    pub(super) number: u64,
    state: Arc<UpstreamState>,
}

impl Drop for InFlightRequest {
    fn drop(&mut self) {
        let mut inner = self.state.lock();
        inner.counters.in_flight = inner.counters.in_flight.saturating_sub(1);
    }
}
