//! The server of gRPC connections: it accepts connections, limits how many there are and what each may do,
//! and ends them in time.
//!
//! A connection is accepted, and prepared by [`ConnectionServer`], on the main runtime: PROXY protocol, limit
//! per address, TLS, HTTP/2 preface. Until a client has completed these steps, it costs the broker little more
//! than a socket. Then the connection moves to a worker thread, which serves its calls (`http2.rs`).

mod connection_limiter;
mod handshake;
mod http2;
mod preface;
mod proxy_protocol;
mod request_body;
mod single_message;
mod socket;
mod worker_threads;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tower::BoxError;
use tracing::{debug, warn};

pub use self::{connection_limiter::ConnectionLimiter, worker_threads::WorkerThreads};
use self::{
    connection_limiter::ConnectionPermit,
    http2::{Lifetime, serve_connection},
    preface::PrefacedStream,
    socket::{MoveToRuntime, Socket},
};
use super::connection::ConnectionPeer;
use crate::{domain::clock::Clock, services::refusal_aggregator::RefusalAggregator, tls::Tls};

/// One address may have the maximum number of connections divided by this, a quarter of them, so that a
/// client that leaks connections leaves room for others.
const ADDRESS_SHARE_DIVISOR: usize = 4;
/// The age at which a connection drains, so that clients spread over replicas that were added later. Each
/// connection's limit is up to a quarter shorter, so that connections opened together end at different times.
const MAX_CONNECTION_AGE: Duration = Duration::from_mins(30);
/// How long a trusted balancer may take to send the PROXY protocol header.
const PROXY_HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may take to send the HTTP/2 preface. Without this limit, silent connections would stay
/// open.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause after a failed `accept`, which fails again at once as long as no file descriptors are left.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long to wait for aborted connections to leave their worker threads, and how often to check.
const ABORT_TIMEOUT: Duration = Duration::from_secs(1);
const ABORT_CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// What the server needs to serve a connection. Cheap to clone.
#[derive(Clone)]
pub struct ConnectionServer {
    /// The services to serve.
    pub routes: Routes,
    /// The networks of trusted balancers: connections from there must begin with a PROXY protocol header.
    pub balancers: Arc<[IpNet]>,
    /// The TLS configuration; without one, connections are plaintext.
    pub tls: Option<Arc<Tls>>,
    /// Counts and limits the connections of each address.
    pub limiter: Arc<ConnectionLimiter>,
    /// The threads that serve the connections.
    pub workers: Arc<WorkerThreads>,
    /// How many connections may be open at the same time.
    pub max_connections: usize,
    /// How long a connection may take to end once it drains. It is longer than any call may take.
    pub drain_timeout: Duration,
    /// Records refused handshakes.
    pub refusals: RefusalAggregator,
    /// The clock of audit records.
    pub clock: Clock,
}

/// Accepts and serves connections until `stop` is cancelled. Then drains every connection, and returns when
/// all have ended. Connections that are still open after `drain` are aborted.
pub async fn serve(
    listener: TcpListener,
    server: ConnectionServer,
    stop: CancellationToken,
    drain: Duration,
) {
    let permits = Arc::new(Semaphore::new(server.max_connections));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = accept(&listener, &permits) => accepted,
        };
        match accepted {
            Ok(AcceptedConnection { stream, address, permit }) => {
                let (server, stop) = (server.clone(), stop.clone());
                connections.spawn(async move {
                    let _permit = permit;
                    if let Err(error) = server.prepare_and_serve(stream, address, stop).await {
                        debug!(%address, %error, "a connection ended with an error");
                    }
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
    drop(listener);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if timeout(drain, all_ended).await.is_err() {
        warn!("some connections did not end in time and are aborted");
        connections.shutdown().await;
    }
    // Aborted connections leave their worker threads promptly; wait for that, so that no call starts after
    // the drain.
    let workers_idle = async {
        while !server.workers.are_idle() {
            sleep(ABORT_CHECK_INTERVAL).await;
        }
    };
    let _ = timeout(ABORT_TIMEOUT, workers_idle).await;
}

struct AcceptedConnection {
    stream: TcpStream,
    address: SocketAddr,
    permit: OwnedSemaphorePermit,
}

/// Accepts the next connection, once there are fewer than the maximum. Connections beyond it wait in the
/// kernel's backlog.
async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> io::Result<AcceptedConnection> {
    let permit = permits.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, address) = listener.accept().await?;
    Ok(AcceptedConnection { stream, address, permit })
}

impl ConnectionServer {
    /// Prepares an accepted connection and serves it to its end. Returns early when `stop` is cancelled
    /// during the preparation; dropping the future closes the connection.
    async fn prepare_and_serve(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        stop: CancellationToken,
    ) -> Result<(), BoxError> {
        stream.set_nodelay(true)?;
        let mut socket = Socket::new(stream);
        let client_address = self.client_address(&mut socket, address);
        let address = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            address = timeout(PROXY_HEADER_TIMEOUT, client_address) => address??,
        };
        let max_per_address = self.max_connections / ADDRESS_SHARE_DIVISOR;
        let Some(permit) = self.limiter.try_acquire(address.ip(), max_per_address) else {
            self.limiter.warn_of_too_many(address.ip(), max_per_address);
            return Err("the address has too many connections".into());
        };
        let Some(tls) = &self.tls else {
            let peer = ConnectionPeer { address, certificate: None };
            return self.serve_on_worker(socket, peer, permit, stop).await;
        };
        let handshake = TlsAcceptor::from(tls.config()).accept(socket);
        let stream = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            accepted = timeout(HANDSHAKE_TIMEOUT, handshake) => match accepted? {
                Ok(stream) => stream,
                Err(error) => {
                    handshake::record_failure(&self.refusals, &self.clock, address, &error).await;
                    return Err(error.into());
                }
            },
        };
        let certificate = handshake::client_certificate(&stream, tls).map(Arc::new);
        self.serve_on_worker(stream, ConnectionPeer { address, certificate }, permit, stop).await
    }

    /// Returns the address of the client: that of the connection, or the one that a trusted balancer names.
    async fn client_address(
        &self,
        socket: &mut Socket,
        address: SocketAddr,
    ) -> Result<SocketAddr, BoxError> {
        let ip = address.ip().to_canonical();
        if !self.balancers.iter().any(|network| network.contains(&ip)) {
            return Ok(address);
        }
        match proxy_protocol::read_client_address(socket).await {
            Ok(client) => Ok(client.unwrap_or(address)),
            Err(error) => {
                handshake::record_no_proxy_header(&self.refusals, &self.clock, address, &error)
                    .await;
                Err(error.into())
            }
        }
    }

    /// Waits for the HTTP/2 preface, moves the connection to the worker thread with the fewest connections,
    /// and returns when it has ended there.
    async fn serve_on_worker<S>(
        &self,
        stream: S,
        peer: ConnectionPeer,
        permit: ConnectionPermit,
        stop: CancellationToken,
    ) -> Result<(), BoxError>
    where
        S: MoveToRuntime + AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut stream = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            stream = timeout(PREFACE_TIMEOUT, PrefacedStream::after_preface(stream)) => stream??,
        };
        let routes = self.routes.clone();
        let max_age = permit.jittered(MAX_CONNECTION_AGE);
        let lifetime = Lifetime { max_age, drain_timeout: self.drain_timeout, stop };
        let served = self.workers.reserve_slot().run(async move {
            stream.move_to_current_runtime()?;
            serve_connection(stream, peer, routes, lifetime).await
        });
        served.await?
    }
}
