//! An HTTP server that is not the API, and that must not be sent a token.

use std::{net::SocketAddr, sync::Arc};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::task::AbortOnDropHandle;

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 8\r\n\r\nstranger";

/// The running server. Dropping it stops it.
pub(crate) struct Stranger {
    address: SocketAddr,
    heard: Arc<Mutex<String>>,
    _server: AbortOnDropHandle<()>,
}

impl Stranger {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let heard = Arc::<Mutex<String>>::default();
        let server = tokio::spawn(serve(listener, heard.clone()));
        Ok(Self { address, heard, _server: AbortOnDropHandle::new(server) })
    }

    /// Replaces `{stranger}` in a text by the server's URL.
    pub(crate) fn put_into(&self, text: &str) -> String {
        text.replace("{stranger}", &format!("http://{}", self.address))
    }

    /// Returns all that was sent to it.
    pub(crate) fn heard(&self) -> String {
        self.heard.lock().clone()
    }
}

async fn serve(listener: TcpListener, heard: Arc<Mutex<String>>) {
    while let Ok((connection, _)) = listener.accept().await {
        tokio::spawn(answer(connection, heard.clone()));
    }
}

/// Answers each request on a connection, whatever it is.
async fn answer(mut connection: TcpStream, heard: Arc<Mutex<String>>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(length @ 1..) = connection.read(&mut buffer).await {
        heard.lock().push_str(&String::from_utf8_lossy(&buffer[..length]));
        if connection.write_all(ANSWER).await.is_err() {
            return;
        }
    }
}
