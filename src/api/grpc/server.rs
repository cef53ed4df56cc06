//! The front door: takes connections, bounds what each may do, and lets them go in time.

mod arriving;
mod connection_limiter;
mod handshake;
mod preface;
mod proxied;
mod socket;
mod workers;

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use http::Request;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
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
use tonic::{body::Body, service::Routes};
use tower::Service;
use tracing::{debug, warn};

use self::{
    arriving::Arriving,
    connection_limiter::ConnectionPermit,
    preface::Greeted,
    socket::{Move, Socket},
};
pub use self::{connection_limiter::ConnectionLimiter, workers::Workers};
use super::{audit::Peer, connection::Connection, held::Held, is_stream};
use crate::{domain::clock::Clock, services::refusal_aggregator::RefusalAggregator, tls::Tls};

/// One address has this share of the connections at most, one in so many: one client's fault leaves room for
/// others.
const SHARE_OF_AN_ADDRESS: usize = 4;
/// The age at which a connection is told to finish, so that callers spread over replicas that came
/// later; with up to a quarter less, so that those of one moment do not all come again at one moment.
const AGE: Duration = Duration::from_mins(30);
/// Streams at once on a connection.
const MOST_STREAMS: u32 = 1_000;
/// Streams that a client may reset before we have answered them (rapid reset).
const MOST_RESETS: usize = 100;
/// The headers of a request, in bytes.
const LONGEST_HEADERS: u32 = 16 * 1024;
/// What a client may send on a stream before we have taken it, in bytes: the longest request.
const STREAM_WINDOW: u32 = 64 * 1024;
/// The same of a connection. `h2` counts a small piece of data as 256 bytes and ends a connection for which
/// it keeps more of them than fill half of this, so a small request in two pieces on each stream must fit.
const CONNECTION_WINDOW: u32 = 4 * 256 * MOST_STREAMS;
/// What of an answer waits for a client that does not read it, in bytes.
const MOST_UNSENT: usize = 64 * 1024;
/// How long a balancer may take to say whose connection it passes on.
const PROXIED_WITHIN: Duration = Duration::from_secs(10);
/// How long a TLS handshake may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// How long a client may take to say that it speaks HTTP/2: before that, nothing else would end the
/// connection.
const PREFACE_WITHIN: Duration = Duration::from_secs(10);
/// A silent peer is asked whether it lives, and how long it may take to say so.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(20);
/// The pause after the listener failed, as it does while no descriptors are left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// How long connections that were cut may take to be gone, and how often to look.
const GONE_WITHIN: Duration = Duration::from_secs(1);
const GONE_AGAIN: Duration = Duration::from_millis(1);
/// Why a connection is cut whose client takes no answers.
const UNREAD: &str = "answers are not read";

/// What a connection ends with, if not by itself.
type Broken = Box<dyn std::error::Error + Send + Sync>;

/// What stands behind the door.
#[derive(Clone)]
pub struct ConnectionServer {
    /// What is served.
    pub routes: Routes,
    /// Whose connections begin with a header of the PROXY protocol.
    pub balancers: Arc<[IpNet]>,
    /// TLS; without it, plain text.
    pub tls: Option<Arc<Tls>>,
    /// Who is in.
    pub guests: Arc<ConnectionLimiter>,
    /// Who serves them.
    pub workers: Arc<Workers>,
    /// How many may be in at once.
    pub most: usize,
    /// How long a connection that was told to finish may take: longer than any call.
    pub leave_within: Duration,
    /// Records handshakes that are refused.
    pub folds: RefusalAggregator,
    /// Time.
    pub clock: Clock,
}

/// Serves until `stop`; then tells each connection to finish, and returns when all have ended or
/// `drain` has passed.
pub async fn serve(
    listener: TcpListener,
    door: ConnectionServer,
    stop: CancellationToken,
    drain: Duration,
) {
    let places = Arc::new(Semaphore::new(door.most));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = accept(&listener, &places) => accepted,
        };
        match accepted {
            Ok(Arrival { stream, address, place }) => {
                let (door, stop) = (door.clone(), stop.clone());
                connections.spawn(async move {
                    let _place = place;
                    if let Err(error) = door.let_in(stream, address, stop).await {
                        debug!(%address, %error, "a connection ended");
                    }
                });
            }
            Err(error) => {
                warn!(%error, "no connection can be accepted");
                sleep(ACCEPT_AGAIN).await;
            }
        }
    }
    drop(listener);
    let finished = async { while connections.join_next().await.is_some() {} };
    if timeout(drain, finished).await.is_err() {
        warn!("some connections did not end in time and are cut");
        connections.shutdown().await;
    }
    // Those that were cut are gone from their threads in a moment, and begin no call that nobody waits for.
    let gone = async {
        while !door.workers.are_idle() {
            sleep(GONE_AGAIN).await;
        }
    };
    let _ = timeout(GONE_WITHIN, gone).await;
}

/// Who stands at the door.
struct Arrival {
    stream: TcpStream,
    address: SocketAddr,
    place: OwnedSemaphorePermit,
}

async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> io::Result<Arrival> {
    let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, address) = listener.accept().await?;
    Ok(Arrival { stream, address, place })
}

impl ConnectionServer {
    /// Serves one connection to its end. What a client must do before it is served is done here, out of
    /// the way of those who serve.
    async fn let_in(
        &self,
        stream: TcpStream,
        from: SocketAddr,
        stop: CancellationToken,
    ) -> Result<(), Broken> {
        stream.set_nodelay(true)?;
        let mut socket = Socket::new(stream);
        let address = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            address = timeout(PROXIED_WITHIN, self.client_of(&mut socket, from)) => address??,
        };
        let most = self.most / SHARE_OF_AN_ADDRESS;
        let Some(guest) = self.guests.welcome(address.ip(), most) else {
            self.guests.warn_of_too_many(address.ip(), most);
            return Err("too many connections of one address".into());
        };
        let Some(tls) = &self.tls else {
            let peer = Peer { address, certificate: None };
            return self.seat(socket, peer, guest, stop).await;
        };
        let shaking = TlsAcceptor::from(tls.config()).accept(socket);
        let stream = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            shaken = timeout(HANDSHAKE_WITHIN, shaking) => match shaken? {
                Ok(stream) => stream,
                Err(error) => {
                    handshake::record_refused(&self.folds, &self.clock, address, &error).await;
                    return Err(error.into());
                }
            },
        };
        let certificate = handshake::shown(&stream).map(Arc::new);
        self.seat(stream, Peer { address, certificate }, guest, stop).await
    }

    /// Whose connection it is: that of `from`, or of whom a balancer names.
    async fn client_of(&self, socket: &mut Socket, from: SocketAddr) -> Result<SocketAddr, Broken> {
        let ip = from.ip().to_canonical();
        if !self.balancers.iter().any(|network| network.contains(&ip)) {
            return Ok(from);
        }
        match proxied::client_of(socket).await {
            Ok(client) => Ok(client.unwrap_or(from)),
            Err(error) => {
                handshake::record_unproxied(&self.folds, &self.clock, from, &error).await;
                Err(error.into())
            }
        }
    }

    /// Hears what the client says first, and gives it to the least busy of those who serve.
    async fn seat<S>(
        &self,
        stream: S,
        peer: Peer,
        guest: ConnectionPermit,
        stop: CancellationToken,
    ) -> Result<(), Broken>
    where
        S: Move + AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut greeted = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            greeted = timeout(PREFACE_WITHIN, Greeted::by_client(stream)) => greeted??,
        };
        let (routes, age, leave_within) = (self.routes.clone(), guest.age(AGE), self.leave_within);
        let served = self.workers.least_busy().run(async move {
            greeted.move_here()?;
            converse(greeted, peer, routes, age, leave_within, stop).await
        });
        served.await?
    }
}

/// Serves the calls of a connection until it ends, is too old or idle, or `stop`.
async fn converse<S>(
    stream: S,
    peer: Peer,
    routes: Routes,
    age: Duration,
    leave_within: Duration,
    stop: CancellationToken,
) -> Result<(), Broken>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let line = Connection::default();
    let service = {
        let line = line.clone();
        service_fn(move |request: Request<Incoming>| {
            let (mut routes, mut call) = (routes.clone(), line.begin());
            let (streams, reflects) = (is_stream(request.uri().path()), reflects(&request));
            let mut request = request.map(|body| Body::new(Arriving::new(body, reflects)));
            request.extensions_mut().insert(peer.clone());
            request.extensions_mut().insert(line.clone());
            async move {
                let answer = routes.call(request).await?;
                if !streams {
                    call.answered();
                }
                // The call goes on until its answer has left.
                Ok::<_, Infallible>(answer.map(|body| Held::new(body, call)))
            }
        })
    };
    let mut connection = std::pin::pin!(
        http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(MOST_STREAMS)
            .max_pending_accept_reset_streams(MOST_RESETS)
            .max_local_error_reset_streams(MOST_RESETS)
            .max_header_list_size(LONGEST_HEADERS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(MOST_UNSENT)
            .keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_WITHIN)
            .serve_connection(TokioIo::new(stream), service)
    );
    tokio::select! {
        ended = connection.as_mut() => return Ok(ended?),
        () = line.unread() => return Err(UNREAD.into()),
        () = stop.cancelled() => {}
        () = sleep(age) => {}
        () = line.idle() => {}
    }
    line.leaving().cancel();
    connection.as_mut().graceful_shutdown();
    tokio::select! {
        ended = connection => Ok(ended?),
        () = line.unread() => Err(UNREAD.into()),
        () = sleep(leave_within) => Err("the last calls did not end in time".into()),
    }
}

/// Whether it is a call of reflection, whose client sends one message after another.
fn reflects<B>(request: &Request<B>) -> bool {
    request.uri().path().ends_with("/ServerReflectionInfo")
}
