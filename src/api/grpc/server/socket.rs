//! Streams that move from the runtime that accepted them to the one that serves them. A stream that stayed
//! registered with the first runtime would cause a switch between threads at each wake-up.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

/// A TCP stream that can move to another runtime.
#[derive(Debug)]
pub(super) struct Socket {
    /// `None` only after a move has failed.
    stream: Option<TcpStream>,
}

/// A stream that can move to the runtime of the calling task.
pub(super) trait MoveToRuntime {
    /// Registers the stream with the current runtime, and removes it from its former one.
    ///
    /// # Errors
    /// When the registration fails. The stream is closed then.
    fn move_to_current_runtime(&mut self) -> io::Result<()>;
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream: Some(stream) }
    }

    fn stream(&mut self) -> io::Result<&mut TcpStream> {
        self.stream.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl MoveToRuntime for Socket {
    fn move_to_current_runtime(&mut self) -> io::Result<()> {
        if let Some(stream) = self.stream.take() {
            self.stream = Some(TcpStream::from_std(stream.into_std()?)?);
        }
        Ok(())
    }
}

impl MoveToRuntime for TlsStream<Socket> {
    fn move_to_current_runtime(&mut self) -> io::Result<()> {
        self.get_mut().0.move_to_current_runtime()
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(self.stream()?).poll_read(context, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.stream()?).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.stream()?).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream()?).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream()?).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[test]
    fn a_moved_stream_works_on_after_its_first_runtime_has_shut_down() {
        let runtime =
            || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let first = runtime();
        let (mut client, mut socket) = first.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let mut socket = Socket::new(listener.accept().await.unwrap().0);
            client.write_all(b"onetwo").await.unwrap();
            let mut received = [0; 3];
            socket.read_exact(&mut received).await.unwrap();
            assert_eq!(&received, b"one");
            (Socket::new(client), socket)
        });
        runtime().block_on(async {
            client.move_to_current_runtime().unwrap();
            socket.move_to_current_runtime().unwrap();
            first.shutdown_background();
            let mut received = [0; 3];
            // The first was received before the move, the second after it.
            for expected in [b"two", b"six"] {
                socket.read_exact(&mut received).await.unwrap();
                assert_eq!(&received, expected);
                client.write_all(b"six").await.unwrap();
            }
        });
    }
}
