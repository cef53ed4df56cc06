//! The front door: takes connections, bounds what each may do, and lets them go in time.

use std::{io, sync::Arc, time::Duration};

use http::Request;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, service::Routes};
use tower::Service;
use tracing::{debug, warn};

use super::audit::Peer;

/// Connections at once; more wait in the listener's backlog.
const MOST_CONNECTIONS: usize = 10_000;
/// Streams at once on a connection.
const MOST_STREAMS: u32 = 1_000;
/// Streams that a client may reset before we have answered them (rapid reset).
const MOST_RESETS: usize = 100;
/// The headers of a request, in bytes.
const LONGEST_HEADERS: u32 = 16 * 1024;
/// What an HTTP/2 client says first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long a new connection may take to say it: before that, nothing else would end it.
const PREFACE_WITHIN: Duration = Duration::from_secs(10);
/// A silent peer is asked whether it lives, and how long it may take to say so.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(20);
/// The pause after the listener failed, as it does while no descriptors are left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serves `routes` until `stop`; then tells each connection to finish, and returns when all have
/// ended or `drain` has passed.
pub async fn serve(
    listener: TcpListener,
    routes: Routes,
    stop: CancellationToken,
    drain: Duration,
) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = accept(&listener, &places) => accepted,
        };
        match accepted {
            Ok((stream, place)) => {
                let (routes, stop) = (routes.clone(), stop.clone());
                connections.spawn(async move {
                    let _place = place;
                    if let Err(error) = converse(stream, routes, stop).await {
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

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

/// Returns once the whole preface has arrived, which stays to be read.
async fn preface(stream: &TcpStream) -> io::Result<()> {
    /// The pause before the rest of a preface that came in pieces is looked for again.
    const REST: Duration = Duration::from_millis(20);
    let mut said = [0; PREFACE.len()];
    loop {
        let arrived = stream.peek(&mut said).await?;
        if arrived == 0 || !PREFACE.starts_with(&said[..arrived]) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "this is no HTTP/2 client"));
        }
        if arrived == PREFACE.len() {
            return Ok(());
        }
        tokio::time::sleep(REST).await;
    }
}

/// Serves one connection to its end.
async fn converse(
    stream: TcpStream,
    routes: Routes,
    stop: CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let peer = Peer(stream.peer_addr()?);
    stream.set_nodelay(true)?;
    timeout(PREFACE_WITHIN, preface(&stream)).await??;
    let service = service_fn(move |request: Request<Incoming>| {
        let mut routes = routes.clone();
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(peer);
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
            .serve_connection(TokioIo::new(stream), service)
    );
    tokio::select! {
        ended = connection.as_mut() => return Ok(ended?),
        () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    Ok(connection.await?)
}
