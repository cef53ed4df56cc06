//! The HTTP/2 connection preface, which is awaited before a connection takes a worker slot.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::socket::MoveToRuntime;

/// What an HTTP/2 client sends first (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A stream whose client has sent the preface. Reading it returns the preface once more, since the HTTP/2
/// implementation expects it.
pub(super) struct PrefacedStream<S> {
    stream: S,
    /// How many bytes of the preface are still to be returned.
    preface_left: usize,
}

impl<S: AsyncRead + Unpin> PrefacedStream<S> {
    /// Reads the preface. Sets no timeout of its own.
    ///
    /// # Errors
    /// At the first byte that differs from the preface, and when the client closes before its end.
    pub(super) async fn after_preface(mut stream: S) -> io::Result<Self> {
        let mut buffer = [0; PREFACE.len()];
        let mut received = 0;
        while received < buffer.len() {
            let more = stream.read(&mut buffer[received..]).await?;
            received += more;
            if more == 0 || !PREFACE.starts_with(&buffer[..received]) {
                let kind = io::ErrorKind::InvalidData;
                return Err(io::Error::new(kind, "the client does not speak HTTP/2"));
            }
        }
        Ok(Self { stream, preface_left: PREFACE.len() })
    }
}

impl<S: MoveToRuntime> MoveToRuntime for PrefacedStream<S> {
    fn move_to_current_runtime(&mut self) -> io::Result<()> {
        self.stream.move_to_current_runtime()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for PrefacedStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.preface_left > 0 {
            let rest = &PREFACE[PREFACE.len() - self.preface_left..];
            let part = &rest[..rest.len().min(buffer.remaining())];
            buffer.put_slice(part);
            self.preface_left -= part.len();
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for PrefacedStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn a_preface_in_pieces_is_awaited_and_can_be_read_again() {
        let (mut client, server) = duplex(64);
        let reading = tokio::spawn(PrefacedStream::after_preface(server));
        for piece in PREFACE.chunks(7) {
            client.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        client.write_all(b"more").await.unwrap();
        client.shutdown().await.unwrap();
        let mut all = Vec::new();
        reading.await.unwrap().unwrap().read_to_end(&mut all).await.unwrap();
        assert_eq!(all, [&PREFACE[..], b"more"].concat());
    }

    #[tokio::test]
    async fn another_protocol_is_refused_at_its_first_wrong_byte() {
        for sent in [&b"GET / HTTP/1.1"[..], b"PRI * HTTP/1.1", b"\x16\x03\x01", b"PRI"] {
            let (mut client, server) = duplex(64);
            client.write_all(sent).await.unwrap();
            client.shutdown().await.unwrap();
            assert!(PrefacedStream::after_preface(server).await.is_err(), "{sent:?}");
        }
    }
}
