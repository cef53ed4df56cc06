//! A simulated RCS Biz Center, for `dev`, `simulate` and the tests: real HTTP on a real socket, with
//! faults that really happen there: a hang is a silent connection, not an error in the client.
//!
//! | where | what |
//! |---|---|
//! | `POST /api/1.1/token` | issues, to the letter of the API's document |
//! | `GET /api/1.1/whoami` | a protected call, so that a token can be tried |
//! | `/simulator/…` | accounts, faults and counts, while it runs |
//!
//! Its tokens differ from real ones in one claim, `simulatedSerial`: real ones of one second seem to
//! have nothing that tells them apart, and a simulator's user needs to.
//!
//! The upstream's time comes from a [`Clock`]; pauses (latency, drip) are real time, since the
//! timeouts that they are to meet are real.

mod api;
mod connection;
mod control;
mod faults;
mod jwt;
mod registry;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{Router, middleware};
use serde::Deserialize;
use tokio::{net::TcpListener, task::JoinHandle};

pub use self::faults::{Answer, FaultError, Faults};
use self::{
    connection::{Listener, Peer},
    registry::Registry,
};
use crate::domain::clock::{Clock, Timestamp};

/// How long [`Simulator::shutdown`] waits for answers under way.
const DRAIN: Duration = Duration::from_secs(2);

/// What the simulator begins with, and what a reset returns to.
#[derive(Clone, Default)]
pub struct Options {
    /// Who may ask for tokens.
    pub accounts: Vec<SimulatedAccount>,
    /// What goes wrong from the start.
    pub faults: Faults,
    /// Where the upstream's time comes from.
    pub clock: Clock,
}

/// A login at the simulated console.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimulatedAccount {
    /// Its id.
    pub client_id: String,
    /// Its API KEY.
    pub client_secret: String,
    /// A locked account is refused although its secret is right.
    #[serde(default)]
    pub locked: bool,
}

/// A running simulator. Dropping it stops it; [`Simulator::shutdown`] waits until it has.
pub struct Simulator {
    address: SocketAddr,
    registry: Arc<Registry>,
    server: JoinHandle<io::Result<()>>,
}

impl Simulator {
    /// Serves on `listener` until shut down.
    ///
    /// # Errors
    /// When the listener has no address.
    pub fn start(listener: TcpListener, options: Options) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let registry = Arc::new(Registry::new(options));
        let service = router(&registry).into_make_service_with_connect_info::<Peer>();
        let closing = registry.closing.clone();
        let server = tokio::spawn(async move {
            axum::serve(Listener(listener), service)
                .with_graceful_shutdown(closing.cancelled_owned())
                .await
        });
        Ok(Self { address, registry, server })
    }

    /// Serves on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// When there is none.
    pub async fn start_on_loopback(options: Options) -> io::Result<Self> {
        Self::start(TcpListener::bind(("127.0.0.1", 0)).await?, options)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The base of its API, as the broker's `UPSTREAM` setting takes it.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://{}/api/1.1", self.address)
    }

    /// Stops accepting, ends hanging answers, and returns when all are gone, after 2 s at the latest.
    pub async fn shutdown(mut self) {
        self.registry.closing.cancel();
        // Past the limit, the drop aborts.
        let _ = tokio::time::timeout(DRAIN, &mut self.server).await;
    }

    /// Adds an account, or changes its secret and unlocks it; its counts and tokens stay.
    pub fn add_account(&self, client_id: &str, client_secret: &str) {
        self.registry.put_account(client_id, Some(client_secret), Some(false));
    }

    /// Locks or unlocks an account, if there is one.
    pub fn lock_account(&self, client_id: &str, locked: bool) {
        self.registry.put_account(client_id, None, Some(locked));
    }

    /// Removes an account with its tokens.
    pub fn remove_account(&self, client_id: &str) {
        self.registry.remove_account(client_id);
    }

    /// The faults in force.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.registry.faults()
    }

    /// Puts `faults` in force, for the requests that arrive from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.registry.set_faults(faults);
    }

    /// Answers the next requests of `client_id` with `answers`, one each; then as the faults say.
    pub fn script(&self, client_id: &str, answers: impl IntoIterator<Item = Answer>) {
        self.registry.script(client_id, answers);
    }

    /// How many requests for a token arrived, from anyone.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.registry.counts().requests
    }

    /// The most requests for a token that were under way at one time.
    #[must_use]
    pub fn peak_in_flight(&self) -> u64 {
        self.registry.counts().peak_in_flight
    }

    /// How many requests named `client_id`, whatever came of them.
    #[must_use]
    pub fn attempts(&self, client_id: &str) -> u64 {
        self.registry.attempts(client_id)
    }

    /// How many tokens were issued to `client_id`.
    #[must_use]
    pub fn issued(&self, client_id: &str) -> u64 {
        self.registry.issued(client_id)
    }

    /// How many tokens were issued in all.
    #[must_use]
    pub fn issued_in_all(&self) -> u64 {
        self.registry.counts().issued
    }

    /// How many tokens were issued in each second of the upstream's time that had any, in order: the
    /// second since 1970, and the number. The last day's are kept.
    #[must_use]
    pub fn issues_per_second(&self) -> Vec<(i64, u64)> {
        self.registry.counts().issues_per_second
    }

    /// The newest live token of `client_id`.
    #[must_use]
    pub fn live_token(&self, client_id: &str) -> Option<String> {
        self.registry.live_token(client_id)
    }

    /// Whether `token` works now: issued here, not ended, and not replaced.
    #[must_use]
    pub fn is_live(&self, token: &str) -> bool {
        self.registry.look_up(token).is_ok()
    }

    /// The address from which the last request for a token came.
    #[must_use]
    pub fn last_peer(&self) -> Option<IpAddr> {
        self.registry.counts().last_peer
    }

    /// The upstream's time, skew included.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.registry.now()
    }

    /// Back to what it began with: accounts, faults, no counts, no tokens.
    pub fn reset(&self) {
        self.registry.reset();
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.registry.closing.cancel();
        self.server.abort();
    }
}

fn router(registry: &Arc<Registry>) -> Router {
    let api = api::routes().layer(middleware::map_response_with_state(registry.clone(), api::date));
    Router::new()
        .nest("/api/1.1", api)
        .nest("/simulator", control::routes())
        .with_state(registry.clone())
}
