//! The front door: takes connections, bounds what each may do, and lets them go in time.

mod guests;
mod preface;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use http::Request;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, service::Routes};
use tower::Service;
use tracing::{debug, warn};

pub use self::guests::Guests;
use self::{guests::Guest, preface::Greeted};
use super::audit::Peer;
use crate::{
    audit::{
        fold::Folds,
        record::{Event, Record},
    },
    clock::Clock,
    tls::{Shown, Tls},
};

/// Connections at once; more wait in the listener's backlog.
const MOST_CONNECTIONS: usize = 10_000;
/// Connections at once from one address: one client's fault leaves room for others.
const MOST_OF_AN_ADDRESS: usize = MOST_CONNECTIONS / 4;
/// The age at which a connection is told to finish, so that callers spread over replicas that came
/// later; with up to a quarter less, so that those of one moment do not all come again at one moment.
const AGE: Duration = Duration::from_mins(30);
/// Streams at once on a connection.
const MOST_STREAMS: u32 = 1_000;
/// Streams that a client may reset before we have answered them (rapid reset).
const MOST_RESETS: usize = 100;
/// The headers of a request, in bytes.
const LONGEST_HEADERS: u32 = 16 * 1024;
/// How long a TLS handshake may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// How long a client may take to say that it speaks HTTP/2: before that, nothing else would end the
/// connection.
const PREFACE_WITHIN: Duration = Duration::from_secs(10);
/// How long a refused handshake's record may take; nobody waits for it.
const RECORD_WITHIN: Duration = Duration::from_secs(5);
/// A silent peer is asked whether it lives, and how long it may take to say so.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(20);
/// The pause after the listener failed, as it does while no descriptors are left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// What a connection ends with, if not by itself.
type Broken = Box<dyn std::error::Error + Send + Sync>;

/// What stands behind the door.
#[derive(Clone)]
pub struct Door {
    /// What is served.
    pub routes: Routes,
    /// TLS; without it, plain text.
    pub tls: Option<Arc<Tls>>,
    /// Who is in.
    pub guests: Arc<Guests>,
    /// Records handshakes that are refused.
    pub folds: Folds,
    /// Time.
    pub clock: Clock,
}

/// Serves until `stop`; then tells each connection to finish, and returns when all have ended or
/// `drain` has passed.
pub async fn serve(listener: TcpListener, door: Door, stop: CancellationToken, drain: Duration) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = accept(&listener, &places) => accepted,
        };
        match accepted {
            Ok(Arrival { stream, address, place }) => {
                let Some(guest) = door.guests.welcome(address.ip(), MOST_OF_AN_ADDRESS) else {
                    debug!(%address, "too many connections of one address");
                    continue;
                };
                let (door, stop) = (door.clone(), stop.clone());
                connections.spawn(async move {
                    let _place = place;
                    if let Err(error) = door.let_in(stream, guest, stop).await {
                        debug!(%error, "a connection ended");
                    }
                });
            }
            Err(error) => {
                warn!(%error, "no connection can be accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
    drop(listener);
    let finished = async { while connections.join_next().await.is_some() {} };
    if timeout(drain, finished).await.is_err() {
        warn!("some connections did not end in time and are cut");
    }
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

impl Door {
    /// Serves one connection to its end.
    async fn let_in(
        &self,
        stream: TcpStream,
        guest: Guest,
        stop: CancellationToken,
    ) -> Result<(), Broken> {
        let address = stream.peer_addr()?;
        stream.set_nodelay(true)?;
        let Some(tls) = &self.tls else {
            return self.converse(stream, Peer { address, certificate: None }, guest, stop).await;
        };
        let handshake = TlsAcceptor::from(tls.config()).accept(stream);
        let stream = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            shaken = timeout(HANDSHAKE_WITHIN, handshake) => match shaken? {
                Ok(stream) => stream,
                Err(error) => {
                    self.record_refused(address, &error).await;
                    return Err(error.into());
                }
            },
        };
        let certificate = shown(&stream).map(Arc::new);
        self.converse(stream, Peer { address, certificate }, guest, stop).await
    }

    /// Records a handshake that the client lost. One that it only broke off, as probes do, is none.
    async fn record_refused(&self, address: SocketAddr, error: &io::Error) {
        let Some(fault) = error.get_ref().and_then(|it| it.downcast_ref::<rustls::Error>()) else {
            return;
        };
        let mut record = Record::new(self.clock.now(), Event::HandshakeRefused)
            .outcome("unauthenticated", reason(fault))
            .with("fault", fault.to_string());
        record.peer = Some(address.to_string());
        if self.folds.recorded(record, RECORD_WITHIN).await.is_err() {
            warn!(%address, "a refused handshake could not be recorded");
        }
    }

    async fn converse<S>(
        &self,
        stream: S,
        peer: Peer,
        guest: Guest,
        stop: CancellationToken,
    ) -> Result<(), Broken>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let greeted = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            greeted = timeout(PREFACE_WITHIN, Greeted::by_client(stream)) => greeted??,
        };
        let routes = self.routes.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let mut routes = routes.clone();
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(peer.clone());
            async move { routes.call(request).await }
        });
        let mut connection = std::pin::pin!(
            http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .max_concurrent_streams(MOST_STREAMS)
                .max_pending_accept_reset_streams(MOST_RESETS)
                .max_local_error_reset_streams(MOST_RESETS)
                .max_header_list_size(LONGEST_HEADERS)
                .keep_alive_interval(KEEPALIVE)
                .keep_alive_timeout(KEEPALIVE_WITHIN)
                .serve_connection(TokioIo::new(greeted), service)
        );
        tokio::select! {
            ended = connection.as_mut() => return Ok(ended?),
            () = stop.cancelled() => {}
            () = tokio::time::sleep(guest.age(AGE)) => {}
        }
        connection.as_mut().graceful_shutdown();
        Ok(connection.await?)
    }
}

/// Whom the client's certificate names, if it showed one. The handshake has verified it.
fn shown(stream: &TlsStream<TcpStream>) -> Option<Shown> {
    let (_, session) = stream.get_ref();
    session.peer_certificates().and_then(|chain| chain.first()).map(Shown::of)
}

/// The reason of a refused handshake, for the audit log.
fn reason(fault: &rustls::Error) -> &'static str {
    use rustls::{CertificateError, Error};
    match fault {
        Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => "CERTIFICATE_EXPIRED",
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => "UNKNOWN_ISSUER",
        Error::InvalidCertificate(_) | Error::NoCertificatesPresented => "CERTIFICATE_REFUSED",
        Error::InvalidMessage(_) | Error::InappropriateMessage { .. } => "NO_TLS",
        Error::AlertReceived(_) => "CLIENT_ALERT",
        _ => "HANDSHAKE_FAILED",
    }
}
