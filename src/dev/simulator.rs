//! A simulated RCS Biz Center for `dev`, `simulate`, the tests and the benchmarks. It serves HTTP on a
//! real socket, so that faults occur as they do with the real service: a hanging request, for
//! example, is a connection on which nothing arrives.
//!
//! | path | purpose |
//! |---|---|
//! | `POST /api/1.1/token` | issues a token, as the API's documentation specifies |
//! | `GET` and `POST /api/1.1/whoami` | a call that requires a token, to try whether a token works |
//! | `/simulator/…` | reads and changes accounts, faults and counters while the simulator runs |
//!
//! Its tokens have one claim that real ones do not have, `simulatedSerial`, because two real tokens
//! of one account that are issued in the same second may be equal.
//!
//! The upstream's time comes from a [`Clock`](crate::domain::clock::Clock). Delays (latency, slow
//! responses) are in real time, because the timeouts that they test are in real time.
//!
//! | file | contents |
//! |---|---|
//! | `simulator.rs` | [`Simulator`]: starts the server, and the interface for code in the same process |
//! | `options.rs` | the initial state |
//! | `upstream_state.rs` | accounts, tokens, faults and counters, and the rules by which tokens are issued |
//! | `faults.rs` | the faults that can be set |
//! | `api.rs` | the simulated API |
//! | `control.rs` | the endpoints under `/simulator` |
//! | `connection.rs` | connections that a handler can reset |
//! | `jwt.rs` | creating and verifying tokens |

mod api;
mod connection;
mod control;
mod faults;
mod jwt;
mod options;
mod upstream_state;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{Router, middleware};
use tokio::{net::TcpListener, task::JoinHandle};

use self::{
    connection::{ClientConnection, ResettableListener},
    upstream_state::UpstreamState,
};
pub use self::{
    faults::{Answer, ApiAnswer, FaultError, Faults},
    options::{SimulatedAccount, SimulatorOptions},
};
use crate::domain::clock::Timestamp;

/// How long [`Simulator::shutdown`] waits for requests in flight.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(2);

/// A running simulator. Dropping it stops it; [`Simulator::shutdown`] also waits until it has stopped.
pub struct Simulator {
    address: SocketAddr,
    state: Arc<UpstreamState>,
    server: JoinHandle<io::Result<()>>,
}

impl Simulator {
    /// Serves on `listener` in a task of the current Tokio runtime.
    ///
    /// # Errors
    /// When the address of the listener cannot be read.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn start(listener: TcpListener, options: SimulatorOptions) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let state = Arc::new(UpstreamState::new(options));
        let service = router(&state).into_make_service_with_connect_info::<ClientConnection>();
        let shutdown = state.shutdown.clone();
        let server = tokio::spawn(async move {
            axum::serve(ResettableListener(listener), service)
                .with_graceful_shutdown(shutdown.cancelled_owned())
                .await
        });
        Ok(Self { address, state, server })
    }

    /// Serves on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn start_on_loopback(options: SimulatorOptions) -> io::Result<Self> {
        Self::start(TcpListener::bind(("127.0.0.1", 0)).await?, options)
    }

    /// Returns the address on which it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the base URL of its API, as the broker's setting `UPSTREAM` takes it.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://{}/api/1.1", self.address)
    }

    /// Accepts no more connections, resets those whose requests hang, and waits up to 2 s for the
    /// other requests. Those that are still in flight then are aborted.
    pub async fn shutdown(mut self) {
        self.state.shutdown.cancel();
        // Dropping `self` aborts the server if it has not ended by then.
        let _ = tokio::time::timeout(SHUTDOWN_LIMIT, &mut self.server).await;
    }

    /// Adds an account, or changes the secret of an existing one and unlocks it. The tokens and
    /// counters of an existing account stay.
    pub fn add_account(&self, client_id: &str, client_secret: &str) {
        self.state.put_account(client_id, Some(client_secret), Some(false));
    }

    /// Locks or unlocks an account. Does nothing if it does not exist.
    pub fn lock_account(&self, client_id: &str, locked: bool) {
        self.state.put_account(client_id, None, Some(locked));
    }

    /// Returns the faults that are in effect.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.state.faults()
    }

    /// Replaces the faults. Requests that have been received already are not affected.
    pub fn set_faults(&self, faults: Faults) {
        self.state.set_faults(faults);
    }

    /// Sets how the next requests of `client_id` are answered, one element for each request. Later
    /// requests are answered as the faults say.
    pub fn script(&self, client_id: &str, answers: impl IntoIterator<Item = Answer>) {
        self.state.script(client_id, answers);
    }

    /// Returns how many token requests have been received.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.state.counters().requests
    }

    /// Returns how many protected calls have been received.
    #[must_use]
    pub fn api_requests(&self) -> u64 {
        self.state.counters().api_requests
    }

    /// Returns the highest number of token requests that were in flight at the same time.
    #[must_use]
    pub fn peak_in_flight(&self) -> u64 {
        self.state.counters().peak_in_flight
    }

    /// Returns how many token requests named `client_id`, whatever the answer was.
    #[must_use]
    pub fn attempts(&self, client_id: &str) -> u64 {
        self.state.attempts(client_id)
    }

    /// Returns how many tokens have been issued to `client_id`.
    #[must_use]
    pub fn issued(&self, client_id: &str) -> u64 {
        self.state.issued(client_id)
    }

    /// Returns for each second of the upstream's time in which tokens were issued: the second since
    /// 1970, and how many. The pairs are in order of time; only the newest 86,400 are kept.
    #[must_use]
    pub fn issues_per_second(&self) -> Vec<(i64, u64)> {
        self.state.counters().issues_per_second
    }

    /// Returns the newest live token of `client_id`.
    #[must_use]
    pub fn live_token(&self, client_id: &str) -> Option<String> {
        self.state.live_token(client_id)
    }

    /// Whether `token` is live: it was issued here, has not expired and has not been replaced.
    #[must_use]
    pub fn is_live(&self, token: &str) -> bool {
        self.state.look_up(token).is_ok()
    }

    /// Returns the address from which the last token request came.
    #[must_use]
    pub fn last_peer(&self) -> Option<IpAddr> {
        self.state.counters().last_peer
    }

    /// Returns the upstream's time, including the clock skew of the faults.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.state.now()
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.state.shutdown.cancel();
        self.server.abort();
    }
}

fn router(state: &Arc<UpstreamState>) -> Router {
    let api = api::routes().layer(middleware::map_response_with_state(state.clone(), api::date));
    Router::new()
        .nest("/api/1.1", api)
        .nest("/simulator", control::routes())
        .with_state(state.clone())
}
