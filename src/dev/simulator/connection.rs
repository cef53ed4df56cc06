//! TCP connections that a handler can reset, so that the client receives a real RST.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    extract::connect_info::Connected,
    serve::{self, IncomingStream},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
};

/// How long to wait after `accept` failed, for example because no file descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A listener whose connections can be reset through their [`ResetHandle`].
pub(super) struct ResettableListener(pub(super) TcpListener);

impl serve::Listener for ResettableListener {
    type Io = ResettableConnection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (ResettableConnection, SocketAddr) {
        loop {
            match self.0.accept().await {
                Ok((stream, peer)) => {
                    // Small responses must not be delayed. If this fails, the connection still works.
                    let _ = stream.set_nodelay(true);
                    let reset = ResetHandle::default();
                    return (ResettableConnection { stream, reset }, peer);
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// What a handler knows of the connection on which its request arrived.
#[derive(Clone)]
pub(super) struct ClientConnection {
    /// The client's address. An IPv4-mapped IPv6 address is converted to IPv4.
    pub(super) address: IpAddr,
    pub(super) reset: ResetHandle,
}

impl Connected<IncomingStream<'_, ResettableListener>> for ClientConnection {
    fn connect_info(stream: IncomingStream<'_, ResettableListener>) -> Self {
        Self { address: stream.remote_addr().ip().to_canonical(), reset: stream.io().reset.clone() }
    }
}

/// Resets a connection: the next write fails, so the server closes the connection, and the client
/// receives an RST.
#[derive(Clone, Default)]
pub(super) struct ResetHandle(Arc<AtomicBool>);

impl ResetHandle {
    pub(super) fn reset(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn is_reset(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn check(&self) -> io::Result<()> {
        if self.is_reset() { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }
}

/// A connection of a [`ResettableListener`].
pub(super) struct ResettableConnection {
    stream: TcpStream,
    reset: ResetHandle,
}

impl Drop for ResettableConnection {
    fn drop(&mut self) {
        if self.reset.is_reset() {
            // With a linger time of zero, closing the socket sends an RST. If this fails, the client
            // sees an ordinary end of the connection.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for ResettableConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for ResettableConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.reset.check()?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.reset.check()?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
