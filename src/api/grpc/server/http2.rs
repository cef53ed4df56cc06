//! Serves the calls of one connection over HTTP/2.

use std::{convert::Infallible, time::Duration};

use http::Request;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, service::Routes};
use tower::{BoxError, Service};
use tracing::debug;

use super::{request_body::RequestBody, single_message::SingleMessage};
use crate::api::grpc::{
    connection::{ConnectionActivity, ConnectionPeer},
    guarded_body::GuardedBody,
    message::violation_of,
    method::{has_request_stream, has_response_stream},
};

/// How many streams a connection may have at the same time.
const MAX_STREAMS: u32 = 1_000;
/// How many streams a client may reset before we have answered them, and how many we may reset for its
/// faults, before the connection is closed. This bounds the "rapid reset" attack.
const MAX_RESETS: usize = 100;
/// The largest header list of a request, in bytes.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// How much a client may send on a stream before we have read it, in bytes: the largest request.
const STREAM_WINDOW: u32 = 64 * 1024;
/// How much a client may send on a connection before we have read it, in bytes. `h2` counts a small piece of
/// data as 256 bytes, and closes a connection for which it buffers more of them than fill half of the window.
/// A small request in two pieces on each stream must therefore fit.
const CONNECTION_WINDOW: u32 = 4 * 256 * MAX_STREAMS;
/// How much of a response is buffered for a client that does not read it, in bytes.
const MAX_SEND_BUFFER: usize = 64 * 1024;
/// A client that sends nothing for this long is sent a ping.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// How long the client may take to answer that ping.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// The error of a connection whose client does not read its responses.
const UNREAD: &str = "the client does not read its responses";

/// How long a connection may last.
pub(super) struct Lifetime {
    /// The age at which it drains.
    pub(super) max_age: Duration,
    /// How long it may take to end once it drains.
    pub(super) drain_timeout: Duration,
    /// Drains the connection at once when cancelled.
    pub(super) stop: CancellationToken,
}

/// Serves the calls of a connection until the client closes it, or does not read its responses. The
/// connection drains (GOAWAY: no new calls, and those in flight end) when it is too old, was idle for too
/// long, its client certificate is not accepted any more, or the server stops.
///
/// # Errors
/// When the connection fails, its client does not read the responses, or the connection does not end within
/// [`Lifetime::drain_timeout`] once it drains.
pub(super) async fn serve_connection<S>(
    stream: S,
    peer: ConnectionPeer,
    routes: Routes,
    lifetime: Lifetime,
) -> Result<(), BoxError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let activity = ConnectionActivity::default();
    let service = {
        let (activity, peer) = (activity.clone(), peer.clone());
        service_fn(move |request: Request<Incoming>| {
            let (mut routes, mut call) = (routes.clone(), activity.begin_call());
            let path = request.uri().path();
            let response_is_stream = has_response_stream(path);
            let request_is_stream = has_request_stream(path);
            let violation = violation_of(&request);
            let mut request = request.map(|body| {
                let body = RequestBody::new(body, request_is_stream);
                if request_is_stream {
                    Body::new(body)
                } else {
                    Body::new(SingleMessage::new(body))
                }
            });
            request.extensions_mut().insert(peer.clone());
            request.extensions_mut().insert(activity.clone());
            async move {
                let mut response = routes.call(request).await?;
                if let Some((status, _)) = violation {
                    *response.status_mut() = status;
                }
                if !response_is_stream {
                    call.response_ready();
                }
                // The call is in flight until its response has been sent.
                Ok::<_, Infallible>(response.map(|body| GuardedBody::new(body, call)))
            }
        })
    };
    let mut connection = std::pin::pin!(
        http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_pending_accept_reset_streams(MAX_RESETS)
            .max_local_error_reset_streams(MAX_RESETS)
            .max_header_list_size(MAX_HEADER_BYTES)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(MAX_SEND_BUFFER)
            .keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service)
    );
    tokio::select! {
        ended = connection.as_mut() => return Ok(ended?),
        () = activity.unread() => return Err(UNREAD.into()),
        () = lifetime.stop.cancelled() => {}
        () = sleep(lifetime.max_age) => {}
        () = activity.idle() => {}
        reason = peer.certificate_refused() => {
            debug!(address = %peer.address, reason, "a connection ends with its certificate");
        }
    }
    activity.draining().cancel();
    connection.as_mut().graceful_shutdown();
    tokio::select! {
        ended = connection => Ok(ended?),
        () = activity.unread() => Err(UNREAD.into()),
        () = sleep(lifetime.drain_timeout) => Err("the last calls did not end in time".into()),
    }
}
