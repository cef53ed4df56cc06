//! What the simulated upstream knows: accounts, their live tokens, the faults and the counts.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aws_lc_rs::digest;
use chrono::TimeDelta;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{Options, SimulatedAccount, faults::Answer, faults::Faults, jwt::Claims};
use crate::domain::clock::{Clock, Timestamp, delta};

/// How many seconds of issues are kept.
const SECONDS_KEPT: usize = 86_400;

/// An error in the API's form.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) code: String,
    pub(super) message: &'static str,
}

impl Refusal {
    pub(super) fn new(status: u16, code: &str, message: &'static str) -> Self {
        Self { status, code: code.to_owned(), message }
    }
}

/// A token as it was issued.
#[derive(Clone)]
pub(super) struct Issued {
    pub(super) serial: u64,
    pub(super) token: String,
    pub(super) expires_at: Timestamp,
}

/// A live token, without the token.
#[derive(Serialize)]
pub(super) struct LiveToken {
    serial: u64,
    /// The SHA-256 of the token, in hexadecimal.
    sha256: String,
    pub(super) expires_at: Timestamp,
}

/// An account as the control endpoints show it.
#[derive(Serialize)]
pub(super) struct AccountView {
    client_id: String,
    locked: bool,
    attempts: u64,
    issued: u64,
    live: Vec<LiveToken>,
    script: Vec<Answer>,
}

/// What happened since the start or the last reset.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Counts {
    pub(super) requests: u64,
    pub(super) issued: u64,
    pub(super) in_flight: u64,
    pub(super) peak_in_flight: u64,
    pub(super) last_peer: Option<IpAddr>,
    pub(super) issues_per_second: Vec<(i64, u64)>,
}

pub(super) struct Registry {
    clock: Clock,
    start: (Vec<SimulatedAccount>, Faults),
    /// Cancelled when the simulator stops: ends what hangs.
    pub(super) closing: CancellationToken,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    faults: Faults,
    accounts: BTreeMap<String, Account>,
    /// By client id, known or not.
    scripts: HashMap<String, VecDeque<Answer>>,
    attempts: HashMap<String, u64>,
    /// Never goes back, also not at a reset: it tells tokens apart.
    serial: u64,
    counts: Counts,
    per_second: BTreeMap<i64, u64>,
}

#[derive(Default)]
struct Account {
    secret: String,
    locked: bool,
    issued: u64,
    /// Neither replaced nor, at the last issue, ended; oldest first.
    tokens: Vec<Issued>,
}

impl Registry {
    pub(super) fn new(options: Options) -> Self {
        let Options { accounts, faults, clock } = options;
        let registry = Self {
            clock,
            start: (accounts, faults),
            closing: CancellationToken::new(),
            inner: Mutex::default(),
        };
        registry.reset();
        registry
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The upstream's time.
    pub(super) fn now(&self) -> Timestamp {
        self.clock.now() + TimeDelta::seconds(self.lock().faults.clock_skew_seconds)
    }

    pub(super) fn reset(&self) {
        let mut inner = self.lock();
        let (accounts, faults) = &self.start;
        // Requests under way stay counted as such.
        let in_flight = inner.counts.in_flight;
        *inner = Inner {
            faults: faults.clone(),
            serial: inner.serial,
            counts: Counts { in_flight, peak_in_flight: in_flight, ..Counts::default() },
            ..Inner::default()
        };
        for account in accounts {
            let SimulatedAccount { client_id, client_secret, locked } = account.clone();
            let account = Account { secret: client_secret, locked, ..Account::default() };
            inner.accounts.insert(client_id, account);
        }
    }

    pub(super) fn faults(&self) -> Faults {
        self.lock().faults.clone()
    }

    pub(super) fn faults_at_start(&self) -> &Faults {
        &self.start.1
    }

    pub(super) fn set_faults(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    /// Changes an account, or makes it where a secret is given. Whether it is there then.
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

    pub(super) fn accounts(&self) -> Vec<AccountView> {
        let now = self.now();
        let inner = self.lock();
        let view = |(client_id, account): (&String, &Account)| AccountView {
            client_id: client_id.clone(),
            locked: account.locked,
            attempts: inner.attempts.get(client_id).copied().unwrap_or_default(),
            issued: account.issued,
            live: account.live(now).map(Issued::describe).collect(),
            script: inner.scripts.get(client_id).into_iter().flatten().cloned().collect(),
        };
        inner.accounts.iter().map(view).collect()
    }

    pub(super) fn counts(&self) -> Counts {
        let inner = self.lock();
        let issues_per_second = inner.per_second.iter().map(|(at, n)| (*at, *n)).collect();
        Counts { issues_per_second, ..inner.counts.clone() }
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
        inner.accounts.get(client_id)?.live(now).last().map(|issued| issued.token.clone())
    }

    /// Counts a request as under way until the guard goes.
    pub(super) fn begin(self: &Arc<Self>, from: IpAddr) -> InFlight {
        let mut inner = self.lock();
        let counts = &mut inner.counts;
        counts.requests += 1;
        counts.in_flight += 1;
        counts.peak_in_flight = counts.peak_in_flight.max(counts.in_flight);
        counts.last_peer = Some(from);
        InFlight { number: counts.requests, registry: self.clone() }
    }

    /// Counts an attempt of `client_id`, and decides how the `number`-th request is answered.
    pub(super) fn next_answer(&self, client_id: &str, number: u64) -> Answer {
        let mut inner = self.lock();
        *inner.attempts.entry(client_id.to_owned()).or_default() += 1;
        if let Some(scripted) = inner.scripts.get_mut(client_id).and_then(VecDeque::pop_front) {
            return scripted;
        }
        if inner.faults.hits(number) {
            return Answer::Unavailable { status: 503 };
        }
        inner.faults.answer.clone()
    }

    /// Issues a token, if address, id and secret are right.
    pub(super) fn issue(
        &self,
        client_id: &str,
        secret: &str,
        from: IpAddr,
    ) -> Result<Issued, Refusal> {
        let now = self.now();
        let mut inner = self.lock();
        let Inner { faults, accounts, serial, counts, per_second, .. } = &mut *inner;
        if faults.allowed_addresses.as_ref().is_some_and(|allowed| !allowed.contains(&from)) {
            let Faults { unregistered_status: status, unregistered_code: code, .. } = faults;
            return Err(Refusal::new(*status, code, "Unregistered address"));
        }
        let account = accounts
            .get_mut(client_id)
            .ok_or_else(|| Refusal::new(401, "61005", "Invalid client id"))?;
        if account.secret != secret {
            return Err(Refusal::new(401, "61006", "Invalid secret key"));
        }
        if account.locked {
            // The real code is unknown.
            return Err(Refusal::new(401, "61091", "Locked account"));
        }
        *serial += 1;
        let expires_at = now + delta(faults.token_life);
        let claims =
            Claims::new(client_id, faults.allow_ip.unwrap_or(from), (now, expires_at), *serial);
        let token =
            claims.sign().map_err(|_| Refusal::new(500, "69999", "The token cannot be made"))?;
        let issued = Issued { serial: *serial, token, expires_at };
        account.tokens.retain(|older| !faults.new_token_ends_older && older.expires_at > now);
        account.tokens.push(issued.clone());
        account.issued += 1;
        counts.issued += 1;
        *per_second.entry(now.timestamp()).or_default() += 1;
        if per_second.len() > SECONDS_KEPT {
            per_second.pop_first();
        }
        Ok(issued)
    }

    /// The owner and the description of a token, if it is live.
    pub(super) fn look_up(&self, token: &str) -> Result<(String, LiveToken), Refusal> {
        let invalid = || Refusal::new(401, "61003", "Invalid token");
        let now = self.now();
        let claims = Claims::verify(token).ok_or_else(invalid)?;
        let inner = self.lock();
        let found = inner.accounts.get(&claims.user_id).and_then(|account| {
            account.live(now).find(|issued| issued.serial == claims.simulated_serial)
        });
        match found {
            Some(issued) if issued.token == token => Ok((claims.user_id, issued.describe())),
            None if claims.has_ended(now) => Err(Refusal::new(401, "61004", "Expired token")),
            _ => Err(invalid()),
        }
    }
}

impl Account {
    fn live(&self, now: Timestamp) -> impl Iterator<Item = &Issued> {
        self.tokens.iter().filter(move |issued| issued.expires_at > now)
    }
}

impl Issued {
    fn describe(&self) -> LiveToken {
        LiveToken {
            serial: self.serial,
            sha256: hex::encode(digest::digest(&digest::SHA256, self.token.as_bytes())),
            expires_at: self.expires_at,
        }
    }
}

/// A request under way.
pub(super) struct InFlight {
    /// Which one it is since the start or the last reset, from 1.
    pub(super) number: u64,
    registry: Arc<Registry>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut inner = self.registry.lock();
        inner.counts.in_flight = inner.counts.in_flight.saturating_sub(1);
    }
}
