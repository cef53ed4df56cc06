//! The first words of an HTTP/2 client, heard before anything is done for it.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::socket::Move;

/// What an HTTP/2 client says first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A stream whose client has said that it speaks HTTP/2. The words are read once more.
pub(super) struct Greeted<S> {
    stream: S,
    /// How much of the preface is still to be read again.
    left: usize,
}

impl<S: AsyncRead + Unpin> Greeted<S> {
    /// Waits for the preface; the caller bounds how long.
    pub(super) async fn by_client(mut stream: S) -> io::Result<Self> {
        let mut said = [0; PREFACE.len()];
        let mut heard = 0;
        while heard < said.len() {
            let more = stream.read(&mut said[heard..]).await?;
            heard += more;
            if more == 0 || !PREFACE.starts_with(&said[..heard]) {
                let kind = io::ErrorKind::InvalidData;
                return Err(io::Error::new(kind, "this is no HTTP/2 client"));
            }
        }
        Ok(Self { stream, left: PREFACE.len() })
    }
}

impl<S: Move> Move for Greeted<S> {
    fn move_here(&mut self) -> io::Result<()> {
        self.stream.move_here()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Greeted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.left > 0 {
            let rest = &PREFACE[PREFACE.len() - self.left..];
            let part = &rest[..rest.len().min(buffer.remaining())];
            buffer.put_slice(part);
            self.left -= part.len();
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Greeted<S> {
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
    async fn a_preface_in_pieces_is_waited_for_and_read_again() {
        let (mut client, server) = duplex(64);
        let greeting = tokio::spawn(Greeted::by_client(server));
        for piece in PREFACE.chunks(7) {
            client.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        client.write_all(b"more").await.unwrap();
        client.shutdown().await.unwrap();
        let mut all = Vec::new();
        greeting.await.unwrap().unwrap().read_to_end(&mut all).await.unwrap();
        assert_eq!(all, [&PREFACE[..], b"more"].concat());
    }

    #[tokio::test]
    async fn anything_else_is_refused_at_its_first_wrong_byte() {
        for said in [&b"GET / HTTP/1.1"[..], b"PRI * HTTP/1.1", b"\x16\x03\x01", b"PRI"] {
            let (mut client, server) = duplex(64);
            client.write_all(said).await.unwrap();
            client.shutdown().await.unwrap();
            assert!(Greeted::by_client(server).await.is_err(), "{said:?}");
        }
    }
}
